//! The admin endpoints that change the agent: `/reissue` for certificates and `/log-level` for the log.
//!
//! Owns the parsing of requests and the format of responses. Rotation reissues; [`telemetry`](agent_runtime::telemetry) changes the filter.
//! An invalid request changes nothing and is answered with the reason.

use std::{fmt, sync::Arc, time::Duration};

use agent_runtime::{
    telemetry::{Filter, hush::LogLimiter},
    text,
};
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Limited};
use issuance::rotation::reissue::{Reissue, Which};
use tokio::{
    sync::{mpsc, oneshot},
    task::AbortHandle,
    time::Instant,
};
use tracing::info;

use super::{Answer, JSON, TEXT, answer, refuse_method};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::admin::controls";

/// Returns one JSON object for each certificate of the agent, without its key.
pub type Certificates = Arc<dyn Fn() -> Vec<serde_json::Value> + Send + Sync>;

/// Default time over which reissues are spread.
const REISSUE_OVER: Duration = Duration::from_secs(300);
/// Maximum of `over`, and of `for` in `/log-level`.
const MAX_REISSUE_WINDOW: Duration = Duration::from_secs(7 * 86_400);
/// Maximum length of a log filter.
const MAX_FILTER_BYTES: usize = 4096;

/// Serves `/certs` and `/reissue` on the admin address of an agent.
#[derive(Clone)]
pub struct Controls {
    /// Lists the certificates for `/certs`.
    pub certificates: Certificates,
    /// The channel to rotation, which reissues.
    pub reissue: mpsc::Sender<Reissue>,
}

impl fmt::Debug for Controls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controls").finish_non_exhaustive()
    }
}

impl Controls {
    pub(super) fn certs(&self) -> Answer {
        answer(StatusCode::OK, JSON, serde_json::json!({ "certificates": (self.certificates)() }).to_string() + "\n")
    }

    /// `POST /reissue[?spiffe_id=…][&profile=…][&over=5m]`
    pub(super) async fn reissue<B>(&self, request: &Request<B>) -> Answer {
        if request.method() != Method::POST {
            return refuse_method("POST");
        }
        let (mut which, mut over) = (Which::default(), REISSUE_OVER);
        for (name, value) in pairs(request.uri().query()) {
            match &*name {
                "spiffe_id" => which.spiffe_id = Some(value),
                "profile" => which.profile = Some(value),
                "over" => match duration("over", &value) {
                    Ok(told) => over = told,
                    Err(text) => return answer(StatusCode::BAD_REQUEST, TEXT, text),
                },
                _ => return unknown(&name, "spiffe_id, profile and over"),
            }
        }
        let (tell, told) = oneshot::channel();
        let leaving = || answer(StatusCode::SERVICE_UNAVAILABLE, TEXT, "the agent is shutting down\n");
        if self.reissue.send(Reissue { which, over, answer: tell }).await.is_err() {
            return leaving();
        }
        let Ok(counts) = told.await else { return leaving() };
        let over = humantime::format_duration(over).to_string();
        let body = serde_json::json!({ "matched": counts.matched, "just_done": counts.just_done, "retried": counts.retried, "over": over });
        answer(StatusCode::OK, JSON, body.to_string() + "\n")
    }
}

/// The log filter, and the filter to restore after a change for a limited time.
#[derive(Debug, Clone)]
pub struct LogLevel {
    filter: Filter,
    usual: Arc<parking_lot::Mutex<Usual>>,
    lines: Arc<LogLimiter<&'static str>>,
}

#[derive(Debug)]
struct Usual {
    /// The filter that is restored after a change for a limited time.
    directives: String,
    /// Number of changes so far.
    changes: u64,
    /// The task that restores it. There is at most one: a later change replaces it.
    restoring: Option<AbortHandle>,
}

impl LogLevel {
    /// Changes `filter`. Its current value is restored after a change for a limited time.
    pub fn new(filter: Filter) -> Self {
        let usual = Arc::new(parking_lot::Mutex::new(Usual { directives: filter.current(), changes: 0, restoring: None }));
        Self { filter, usual, lines: Arc::default() }
    }

    /// `GET /log-level`, and `PUT` or `POST` with the filter as the body, `[?for=10m]`.
    /// Calls `arrived` when the body is read, or at once if it is not read.
    pub(super) async fn answer<B>(&self, request: Request<B>, arrived: impl FnOnce()) -> Answer
    where
        B: http_body::Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (head, body) = request.into_parts();
        if !matches!(head.method, Method::PUT | Method::POST) {
            arrived();
            return match head.method {
                Method::GET | Method::HEAD => answer(StatusCode::OK, TEXT, self.filter.current() + "\n"),
                _ => refuse_method("GET, HEAD, PUT, POST"),
            };
        }
        let body = Limited::new(body, MAX_FILTER_BYTES).collect().await;
        arrived();
        let mut time = None;
        for (name, value) in pairs(head.uri.query()) {
            match &*name {
                "for" => match duration("for", &value) {
                    Ok(told) => time = Some(told),
                    Err(text) => return answer(StatusCode::BAD_REQUEST, TEXT, text),
                },
                _ => return unknown(&name, "for"),
            }
        }
        let Ok(body) = body else {
            return answer(
                StatusCode::BAD_REQUEST,
                TEXT,
                format!("the filter did not arrive, or is longer than {MAX_FILTER_BYTES} bytes\n"),
            );
        };
        let body = body.to_bytes();
        let Some(text) = std::str::from_utf8(&body).ok().map(str::trim).filter(|text| !text.is_empty()) else {
            return answer(
                StatusCode::BAD_REQUEST,
                TEXT,
                "write a filter as the body, such as `debug` or `sds_agent::rotation=debug,info`\n",
            );
        };
        match self.change(text, time) {
            Ok(()) => answer(StatusCode::OK, TEXT, self.filter.current() + "\n"),
            Err(error) => answer(StatusCode::BAD_REQUEST, TEXT, format!("{error}\n")),
        }
    }

    pub(super) fn change(&self, directives: &str, time: Option<Duration>) -> Result<(), agent_runtime::telemetry::Error> {
        // Held to the end, so that two changes at once leave one filter and one task.
        let mut usual = self.usual.lock();
        let before = self.filter.current();
        self.filter.replace(directives)?;
        usual.changes += 1;
        if let Some(restoring) = usual.restoring.take() {
            restoring.abort();
        }
        let for_seconds = time.map(|time| time.as_secs());
        // The new filter decides whether this line is written.
        if let Some(left_out) = self.lines.permit("changed", Instant::now()) {
            info!(target: LOG_TARGET, before = shown(&before), now = shown(directives), for_seconds, left_out, "the log's filter was changed");
        }
        match time {
            None => directives.clone_into(&mut usual.directives),
            Some(time) => usual.restoring = Some(tokio::spawn(self.clone().restore(usual.changes, time)).abort_handle()),
        }
        Ok(())
    }

    /// Restores the usual filter `time` after this change, unless there was a later one.
    async fn restore(self, change: u64, time: Duration) {
        tokio::time::sleep(time).await;
        let usual = self.usual.lock();
        if usual.changes == change
            && self.filter.replace(&usual.directives).is_ok()
            && let Some(left_out) = self.lines.permit("restored", Instant::now())
        {
            info!(target: LOG_TARGET, now = shown(&usual.directives), left_out, "the log's former filter is restored");
        }
    }
}

fn duration(name: &str, value: &str) -> Result<Duration, String> {
    match humantime::parse_duration(value) {
        Ok(told) if told <= MAX_REISSUE_WINDOW => Ok(told),
        _ => Err(format!("{name}: {:?} is not a time of at most seven days; write, for example, {name}=5m\n", shown(value))),
    }
}

fn unknown(name: &str, known: &str) -> Answer {
    answer(StatusCode::BAD_REQUEST, TEXT, format!("{:?} is not known here; known: {known}\n", shown(name)))
}

fn shown(told: &str) -> String {
    text::excerpt(told, text::MAX_NAME_CHARS)
}

/// The names and values of a query, decoded.
fn pairs(query: Option<&str>) -> impl Iterator<Item = (String, String)> {
    query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(name), decoded(value))
    })
}

/// Decodes percent-encoded bytes, such as `%2F` for `/`. An invalid code stays as it is.
fn decoded(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        let code = after.get(..2).filter(|_| *byte == b'%').and_then(|hex| std::str::from_utf8(hex).ok());
        match code.filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit())).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(code) => {
                out.push(code);
                rest = &after[2..];
            }
            None => {
                out.push(*byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
