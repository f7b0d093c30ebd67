//! The steps about the API server: its answer, and the difference between its clock and this node's.

use std::time::{Duration, Instant, SystemTime};

use agent_kube::{Call, Failure};
use agent_runtime::clock::{Clock, SystemClock};
use http::{Request, StatusCode, header};
use issuance::issuer::verify::ALLOWED_SKEW;
use kube::client::{Body, Client};
use time::{OffsetDateTime, format_description::well_known::Rfc2822};

use super::report::Step;
use crate::cli::Exit;

/// The header has whole seconds, and an answer takes time: a smaller difference is not treated as skew.
const UNSURE: Duration = Duration::from_secs(3);

/// Requests the version of the server. The second step is absent if the request fails.
pub(super) async fn look(client: &Client) -> (Step, Option<Step>) {
    let name = "api server";
    let remedy = "check that the API server runs and that this node can reach it";
    let request = match Request::get("/version").body(Body::empty()) {
        Ok(request) => request,
        Err(error) => return (Step::failed(name, Exit::Failed, error.to_string(), remedy), None),
    };
    let begun = Instant::now();
    let answer = match client.send(request).await {
        Ok(answer) => answer,
        Err(error) => {
            let call = Call { verb: "get", resource: "version", name: None, namespace: None };
            return (Step::failed(name, Exit::Unavailable, Failure::of(&error, &call).to_string(), remedy), None);
        }
    };
    let took = begun.elapsed();
    let (status, date) = (answer.status(), answer.headers().get(header::DATE).and_then(|date| date.to_str().ok()));
    let clock = date.map_or_else(
        || Step::unknown("clock", "the API server's answer has no Date header", None),
        |date| skew(date, SystemClock.now(), took),
    );
    let server = match status {
        StatusCode::UNAUTHORIZED => {
            let remedy = "mount a token of the agent's service account; a bound token becomes invalid when its pod ends";
            Step::failed(name, Exit::NotPermitted, "it does not accept this account's token", remedy)
        }
        status if status.is_server_error() => Step::failed(name, Exit::Unavailable, format!("it answers {status}"), remedy),
        // An account without permission for `/version` may still have all permissions that the agent needs.
        _ => Step::ok(name, format!("it answers within {} ms", took.as_millis())),
    };
    (server, Some(clock))
}

/// Compares the header `date` with `now`. `took` is the duration of the request, which limits the accuracy.
fn skew(date: &str, now: SystemTime, took: Duration) -> Step {
    let name = "clock";
    // HTTP writes `GMT`, for which the parser of RFC 2822 expects a numeric offset.
    let Ok(server) = OffsetDateTime::parse(&date.replace("GMT", "+0000"), &Rfc2822).map(SystemTime::from) else {
        return Step::unknown(name, format!("the API server's Date cannot be read: {date}"), None);
    };
    let (direction, by) = match now.duration_since(server) {
        Ok(ahead) => ("ahead of", ahead),
        Err(behind) => ("behind", behind.duration()),
    };
    let unsure = UNSURE + took;
    if by <= unsure {
        return Step::ok(name, format!("it agrees with the API server's clock, within {} s", unsure.as_secs()));
    }
    let detail = format!("it is {} {direction} the API server's clock", humantime::format_duration(Duration::from_secs(by.as_secs())));
    let remedy = "synchronise the clocks (chrony, systemd-timesyncd) of this node and of the control plane";
    if by > ALLOWED_SKEW {
        let detail = format!("{detail}: new certificates may not be valid yet on this node, or are renewed at the wrong time");
        Step::failed(name, Exit::Failed, detail, remedy)
    } else {
        Step::warning(name, detail, remedy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::report::Outcome;

    #[test]
    fn a_clock_is_judged_by_its_distance() {
        let date = "Thu, 01 Jan 2026 00:00:00 GMT";
        let then = humantime::parse_rfc3339("2026-01-01T00:00:00Z").unwrap();
        let at = |seconds: i64| {
            if seconds < 0 {
                then - Duration::from_secs(seconds.unsigned_abs())
            } else {
                then + Duration::from_secs(seconds.unsigned_abs())
            }
        };
        for (seconds, result, words) in [
            (0, Outcome::Ok, "agrees"),
            (-2, Outcome::Ok, "agrees"),
            (20, Outcome::Warning, "it is 20s ahead of"),
            (-30, Outcome::Warning, "it is 30s behind"),
            (-300, Outcome::Failed, "it is 5m behind"),
            (7200, Outcome::Failed, "it is 2h ahead of"),
        ] {
            let step = skew(date, at(seconds), Duration::ZERO);
            assert!(step.result == result && step.detail.contains(words), "{seconds}: {step:?}");
        }
        assert_eq!(skew(date, at(8), Duration::from_secs(6)).result, Outcome::Ok, "the answer was slow");
        assert_eq!(skew("yesterday", then, Duration::ZERO).result, Outcome::Unknown);
    }
}
