//! Reads how long a server asks to wait, from the headers and the body of its response (`Retry-After`: RFC 9110, section 10.2.3).
//!
//! The API server's own queues answer 429 with a header and a line of text. Its storage and its webhooks name the delay in the body. A
//! proxy may send a date. `kube` passes on only the body, so a delay from a header is written into the body.

use std::time::Duration;

use http::{HeaderMap, StatusCode, header};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc2822};

/// Delay after a 429 that names none: 1 s.
const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(1);

/// Returns the delay that a response asks for; `None` if it asks for none. If header and body name different delays, the longer one
/// applies.
pub(super) fn asked(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Option<Duration> {
    let busy = status == StatusCode::TOO_MANY_REQUESTS;
    if !busy && !status.is_server_error() {
        return None;
    }
    let body: Option<Value> = serde_json::from_slice(body).ok();
    let told = body.as_ref().and_then(|body| body.pointer("/details/retryAfterSeconds")).and_then(Value::as_u64).filter(|s| *s > 0);
    let asked = told.map(Duration::from_secs).max(in_header(headers));
    asked.or(busy.then_some(DEFAULT_RETRY_AFTER))
}

fn in_header(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let told = text(header::RETRY_AFTER)?.trim();
    if let Ok(seconds) = told.parse() {
        return Some(Duration::from_secs(seconds)).filter(|time| !time.is_zero());
    }
    // The date is compared with the response's `Date`, because the clocks of server and agent may differ.
    let date = |text: &str| OffsetDateTime::parse(text, &Rfc2822).ok();
    let left = date(told)? - date(text(header::DATE)?)?;
    Duration::try_from(left).ok().filter(|time| !time.is_zero())
}

/// Returns the body as a `Status` that asks to wait for `after`, rounded up to seconds. A body that is no `Status` becomes the message of a
/// new one.
pub(super) fn body(status: StatusCode, after: Duration, body: &[u8]) -> Vec<u8> {
    let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
    let parsed: Option<Value> = serde_json::from_slice(body).ok().filter(|v: &Value| v["kind"] == "Status");
    let mut answer = parsed.unwrap_or_else(|| {
        let reason = status.canonical_reason().unwrap_or_default().replace(' ', "");
        let message = String::from_utf8_lossy(body);
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status.as_u16(), "reason": reason, "message": message.trim()})
    });
    if !answer["details"].is_object() {
        answer["details"] = json!({});
    }
    answer["details"]["retryAfterSeconds"] = json!(seconds.min(u64::from(u32::MAX)));
    answer.to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn every_way_of_saying_it_is_understood() {
        let (busy, away) = (StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE);
        let said = br#"{"kind":"Status","code":429,"details":{"retryAfterSeconds":7}}"#;
        let date: &[_] = &[("retry-after", "Wed, 21 Oct 2026 07:28:30 GMT"), ("date", "Wed, 21 Oct 2026 07:28:00 GMT")];
        for (status, told, body, seconds) in [
            (busy, &[("retry-after", "5")][..], &b"Too many requests, please try again later."[..], Some(5)),
            (busy, &[], said, Some(7)),
            (busy, &[("retry-after", "9")], said, Some(9)),
            (busy, date, b"", Some(30)),
            (busy, &date[..1], b"", Some(1)),
            (busy, &[("retry-after", "soon")], b"", Some(1)),
            (away, &[("retry-after", "5")], b"", Some(5)),
            (StatusCode::GATEWAY_TIMEOUT, &[], said, Some(7)),
            (away, &[], b"no", None),
            (away, &[("retry-after", "0")], b"", None),
            (StatusCode::FORBIDDEN, &[("retry-after", "5")], said, None),
            (StatusCode::OK, &[("retry-after", "5")], b"", None),
        ] {
            assert_eq!(asked(status, &headers(told), body), seconds.map(Duration::from_secs), "{status} {told:?}");
        }
    }

    #[test]
    fn the_answer_that_is_passed_on_says_it_in_its_body() {
        let text = body(StatusCode::TOO_MANY_REQUESTS, Duration::from_millis(4100), b"Too many requests\n");
        let status: kube::core::Status = serde_json::from_slice(&text).unwrap();
        assert_eq!((status.code, &*status.reason, &*status.message), (429, "TooManyRequests", "Too many requests"));
        assert_eq!(status.details.unwrap().retry_after_seconds, 5);
        let full = br#"{"kind":"Status","code":503,"reason":"X","message":"m","details":{"kind":"pods"}}"#;
        let status: kube::core::Status =
            serde_json::from_slice(&body(StatusCode::SERVICE_UNAVAILABLE, Duration::from_secs(3), full)).unwrap();
        let details = status.details.unwrap();
        assert_eq!((&*status.reason, &*details.kind, details.retry_after_seconds), ("X", "pods", 3));
    }
}
