//! The layer that every request to the API passes: rate limit, time-outs, metrics, and a minimum interval between starts of a watch.
//!
//! A response is read completely before it is returned, within [`ANSWER_TIMEOUT`] and up to [`MAX_ANSWER_BYTES`]. A page of a list has at
//! most [`MAX_PAGE_BYTES`], see [`pages`]. A watch that the server has accepted is returned with its headers. A server that ends each watch
//! at once gets one request per second for it.
//!
//! The layer retries nothing, and this client does not contain `kube`'s own retries. A response of 429 or 5xx goes to the caller. The delay
//! that it asks for applies to all requests with the same verb and resource.

use std::{
    collections::HashMap,
    future::{Future, poll_fn},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use agent_runtime::{telemetry::hush::LogLimiter, text};
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited, combinators::UnsyncBoxBody};
use kube::client::Body;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until, timeout};
use tower::{BoxError, Service};

use crate::{
    ANSWER_TIMEOUT, MAX_ANSWER_BYTES, RequestRate,
    failure::{TimedOut, TooLarge},
    labels::{Code, Resource, Verb, Wait},
    metrics::Metrics,
    pages::{self, MAX_PAGE_BYTES, Page, PageSizes},
    retry_after,
    throttle::{Kind, RetryAfter, Throttle, Waits},
};

/// Target of this module's log lines.
const LOG_TARGET: &str = "sds_agent::kubernetes::layer";

/// Minimum interval between two starts of the same watch.
const WATCH_RESTART_INTERVAL: Duration = Duration::from_secs(1);

/// Wraps services in [`Observed`]. Clones share the rate limiter and the metrics.
#[derive(Debug, Clone)]
pub struct Layer(Shared);

/// State that all requests of the client share.
#[derive(Debug, Clone)]
struct Shared {
    metrics: Metrics,
    pace: Arc<WatchRestartPacer>,
    throttle: Arc<Throttle>,
    pages: Arc<PageSizes>,
    /// Log limiter of objects that are left out of lists, by resource.
    skips: Arc<LogLimiter<&'static str>>,
}

impl Layer {
    /// Records requests in `metrics` and limits them to `rate`.
    pub fn new(metrics: Metrics, rate: RequestRate) -> Self {
        let throttle = Arc::new(Throttle::new(rate));
        Self(Shared { metrics, pace: Arc::default(), throttle, pages: Arc::default(), skips: Arc::default() })
    }
}

impl<S> tower::Layer<S> for Layer {
    type Service = Observed<S>;

    fn layer(&self, inner: S) -> Observed<S> {
        Observed { inner, shared: self.0.clone() }
    }
}

/// A service whose requests are rate-limited, bounded in time and size, and recorded in the metrics.
#[derive(Debug, Clone)]
pub struct Observed<S> {
    inner: S,
    shared: Shared,
}

impl<S, B> Service<Request<Body>> for Observed<S>
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<BoxError> + Send,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError> + Send,
{
    type Response = Response<UnsyncBoxBody<Bytes, BoxError>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let kind = (verb(&request), Resource::of(request.uri().path()));
        let shared = self.shared.clone();
        match Page::of(&request, &shared.pages).filter(|_| kind.0 == Verb::list) {
            Some(page) => {
                let next = self.inner.clone();
                // The service that is ready serves the first request.
                let ready = std::mem::replace(&mut self.inner, next);
                Box::pin(async move { shared.page(ready, kind, page).await })
            }
            None => {
                let slot = (kind.0 == Verb::watch).then(|| shared.pace.slot(request.uri()));
                let answer = self.inner.call(request);
                Box::pin(async move {
                    if let Some(slot) = slot {
                        sleep_until(slot).await;
                    }
                    shared.answered(kind, answer, MAX_ANSWER_BYTES).await
                })
            }
        }
    }
}

type Answer = Response<UnsyncBoxBody<Bytes, BoxError>>;

impl Shared {
    /// Sends one request when the rate limit permits, and reads the response of at most `limit` bytes.
    async fn answered<B, E>(
        &self,
        kind: Kind,
        answer: impl Future<Output = Result<Response<B>, E>>,
        limit: usize,
    ) -> Result<Answer, BoxError>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError> + Send,
        E: Into<BoxError>,
    {
        if let Err(left) = self.admitted(kind).await {
            return Ok(synthetic_429(left));
        }
        let start = Instant::now();
        let whole = async {
            let (mut parts, body) = answer.await.map_err(Into::into)?.into_parts();
            // Only an accepted watch is a stream. The response that rejects a watch is read like any other, within the time-out.
            if kind.0 == Verb::watch && parts.status.is_success() {
                return Ok(Response::from_parts(parts, body.map_err(Into::into).boxed_unsync()));
            }
            let mut bytes = Limited::new(body, limit).collect().await.map_err(|error| too_large(error, limit))?.to_bytes();
            if let Some(after) = retry_after::asked(parts.status, &parts.headers, &bytes) {
                self.asked_to_wait(kind, after, parts.status);
                bytes = retry_after::body(parts.status, after, &bytes).into();
                parts.headers.remove(header::CONTENT_LENGTH);
            }
            Ok(Response::from_parts(parts, full(bytes)))
        };
        let result = timeout(ANSWER_TIMEOUT, whole).await;
        let code = match &result {
            Ok(Ok(response)) => Code::Status(response.status().as_u16()),
            Ok(Err(_)) => Code::Error,
            Err(_) => Code::Timeout,
        };
        self.observe(kind, code, start);
        result.unwrap_or_else(|_| Err(TimedOut.into()))
    }

    /// Reads one page of a list, with as many of its objects as fit.
    async fn page<S, B>(&self, mut service: S, kind: Kind, mut page: Page) -> Result<Answer, BoxError>
    where
        S: Service<Request<Body>, Response = Response<B>>,
        S::Error: Into<BoxError>,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError> + Send,
    {
        loop {
            match self.answered(kind, service.call(page.request()), MAX_PAGE_BYTES).await {
                Ok(response) => {
                    let size = http_body::Body::size_hint(response.body()).exact().and_then(|size| usize::try_from(size).ok());
                    page.fitted(size.unwrap_or(MAX_PAGE_BYTES), &self.pages);
                    return Ok(response);
                }
                Err(error) if !error.is::<TooLarge>() => return Err(error),
                Err(_) if page.shrink(&self.pages) => {}
                Err(error) => {
                    poll_fn(|cx| service.poll_ready(cx)).await.map_err(Into::into)?;
                    let metadata = self.answered(kind, service.call(page.metadata_request()), MAX_PAGE_BYTES).await?;
                    if !metadata.status().is_success() {
                        return Ok(metadata);
                    }
                    let (mut parts, body) = metadata.into_parts();
                    let Some(skipped) = pages::skipped(&body.collect().await?.to_bytes()) else { return Err(error) };
                    self.skipped(kind.1, &skipped);
                    parts.headers.remove(header::CONTENT_LENGTH);
                    return Ok(Response::from_parts(parts, full(skipped.body)));
                }
            }
            poll_fn(|cx| service.poll_ready(cx)).await.map_err(Into::into)?;
        }
    }

    /// Counts and logs an object that is left out of a list.
    fn skipped(&self, resource: Resource, skipped: &pages::Skipped) {
        self.metrics.object_skipped(resource);
        let Some(left_out) = self.skips.permit(resource.as_str(), Instant::now()) else { return };
        let excerpt = |name: &str| text::excerpt(name, text::MAX_NAME_CHARS);
        tracing::warn!(
            target: LOG_TARGET, resource = resource.as_str(),
            namespace = excerpt(&skipped.namespace),
            name = excerpt(&skipped.name),
            left_out,
            "an object is too large to be read; it is left out of the list"
        );
    }

    /// Waits until a request may be sent. The error is the remaining delay, if that is too long to wait here.
    async fn admitted(&self, kind: Kind) -> Result<(), Duration> {
        let (result, waits) = match self.throttle.admit(kind).await {
            Ok(waits) => (Ok(()), waits),
            Err(RetryAfter { left, waits }) => (Err(left), waits),
        };
        let Waits { rate_limit, retry_after } = waits;
        self.metrics.waited(Wait::rate_limit, rate_limit);
        self.metrics.waited(Wait::retry_after, retry_after);
        result
    }

    fn asked_to_wait(&self, kind: Kind, after: Duration, status: StatusCode) {
        if self.throttle.hold(kind, after) {
            let (verb, resource) = (kind.0, kind.1.as_str());
            tracing::warn!(target: LOG_TARGET, ?verb, resource, status = status.as_u16(), seconds = after.as_secs(), "the API server asks to wait; waiting");
        }
    }

    fn observe(&self, kind: Kind, code: Code, since: Instant) {
        self.metrics.observe(kind.0, kind.1, code, since);
        if matches!(code, Code::Status(..429)) && self.throttle.answered(kind) {
            tracing::info!(target: LOG_TARGET, verb = ?kind.0, resource = kind.1.as_str(), "the API server accepts these requests again");
        }
    }
}

/// A local 429 for a request that is not sent, because the server has asked to wait longer than a request waits here.
fn synthetic_429(left: Duration) -> Response<UnsyncBoxBody<Bytes, BoxError>> {
    let status = StatusCode::TOO_MANY_REQUESTS;
    let body = retry_after::body(status, left, b"the API server has asked to wait; the request was not sent");
    let mut response = Response::new(full(body.into()));
    *response.status_mut() = status;
    response
}

/// Converts the error of the size limit to [`TooLarge`], and returns any other error unchanged.
fn too_large(error: BoxError, limit: usize) -> BoxError {
    if error.is::<LengthLimitError>() { TooLarge(limit).into() } else { error }
}

fn full(bytes: Bytes) -> UnsyncBoxBody<Bytes, BoxError> {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// Returns the verb of a request. `kube` stores the name of its method in an extension of the request.
fn verb(request: &Request<Body>) -> Verb {
    match request.extensions().get::<&'static str>().copied() {
        Some("get" | "get_metadata") => Verb::get,
        Some("list" | "list_metadata") => Verb::list,
        Some("watch" | "watch_metadata") => Verb::watch,
        Some("create") => Verb::create,
        Some("patch" | "patch_status") => Verb::patch,
        Some("delete") => Verb::delete,
        _ => Verb::other,
    }
}

/// Time of the last start of each watch.
#[derive(Debug, Default)]
struct WatchRestartPacer(Mutex<HashMap<String, Instant>>);

impl WatchRestartPacer {
    /// Returns when a watch of `uri` may start. Watches that differ only in the resource version share one entry, so the map stays small.
    fn slot(&self, uri: &http::Uri) -> Instant {
        let selectors = uri.query().unwrap_or_default().split('&').filter(|p| !p.starts_with("resourceVersion="));
        let key = format!("{}?{}", uri.path(), selectors.collect::<Vec<_>>().join("&"));
        let now = Instant::now();
        let mut starts = self.0.lock();
        let slot = starts.get(&key).map_or(now, |last| now.max(*last + WATCH_RESTART_INTERVAL));
        starts.insert(key, slot);
        slot
    }
}
