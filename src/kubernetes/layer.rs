//! What every request to the API passes: time-outs, metrics, and a pace for watches.
//!
//! An answer is read whole before it is passed on, within [`ANSWER_TIMEOUT`]; a watch is passed on with its headers. A server that ends
//! each watch at once is asked again once a second, not as fast as it can end them.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use kube::client::Body;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};
use tokio::time::{Instant, sleep_until, timeout};
use tower::{BoxError, Service};

use crate::kubernetes::{ANSWER_TIMEOUT, watch::Ended};

/// Between two starts of the same watch.
const WATCH_PACE: Duration = Duration::from_secs(1);

/// The API did not answer in time.
#[derive(Debug, thiserror::Error)]
#[error("no answer within {} s", ANSWER_TIMEOUT.as_secs())]
pub struct TimedOut;

/// What is asked, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Verb {
    /// One object.
    get,
    /// Many.
    list,
    /// Their changes.
    watch,
    /// A new one.
    create,
    /// A part of it changed.
    patch,
    /// One less.
    delete,
    /// Something else.
    other,
}

/// Of what, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Resource {
    /// CertificateRequests.
    certificaterequests,
    /// Issuers.
    issuers,
    /// ClusterIssuers.
    clusterissuers,
    /// Pods.
    pods,
    /// ConfigMaps.
    configmaps,
    /// Events.
    events,
    /// Something else.
    other,
}

impl Resource {
    /// The label's value, which is the resource's plural.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::certificaterequests => "certificaterequests",
            Self::issuers => "issuers",
            Self::clusterissuers => "clusterissuers",
            Self::pods => "pods",
            Self::configmaps => "configmaps",
            Self::events => "events",
            Self::other => "other",
        }
    }

    /// The resource that a path of the API is about.
    fn of(path: &str) -> Self {
        let mut segments = path.split('/').filter(|s| !s.is_empty());
        // `api/<version>` or `apis/<group>/<version>`.
        let skip = if segments.next() == Some("apis") { 2 } else { 1 };
        let rest: Vec<&str> = segments.skip(skip).take(3).collect();
        let plural = match rest[..] {
            ["namespaces", _, plural] | [plural, ..] => plural,
            [] => "",
        };
        const KNOWN: [Resource; 6] = [
            Resource::certificaterequests,
            Resource::issuers,
            Resource::clusterissuers,
            Resource::pods,
            Resource::configmaps,
            Resource::events,
        ];
        KNOWN.into_iter().find(|r| r.as_str() == plural).unwrap_or(Self::other)
    }
}

/// What came back, as a metric label: the HTTP status, `timeout`, or `error` where there was no answer at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// An HTTP status.
    Status(u16),
    /// Nothing in time.
    Timeout,
    /// The connection failed.
    Error,
}

impl EncodeLabelValue for Code {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        match self {
            Self::Status(code) => EncodeLabelValue::encode(code, encoder),
            Self::Timeout => "timeout".encode(encoder),
            Self::Error => "error".encode(encoder),
        }
    }
}

/// Labels of `kube_requests_total` and `kube_request_duration_seconds`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Labels {
    verb: Verb,
    resource: Resource,
    code: Code,
}

/// Labels of `watch_restarts_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct WatchLabels {
    resource: Resource,
    reason: Ended,
}

/// What the client counts.
#[derive(Debug, Clone)]
pub struct Metrics {
    requests: Family<Labels, Counter>,
    duration: Family<Labels, Histogram>,
    restarts: Family<WatchLabels, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let buckets = || Histogram::new([0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]);
        Self { requests: Family::default(), duration: Family::new_with_constructor(buckets), restarts: Family::default() }
    }
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("kube_requests", "Requests to the Kubernetes API", metrics.requests.clone());
        registry.register(
            "kube_request_duration_seconds",
            "Time to the whole answer; for a watch, to its headers",
            metrics.duration.clone(),
        );
        registry.register("watch_restarts", "Watches that broke and were started again", metrics.restarts.clone());
        metrics
    }

    /// Counts a watch that broke.
    pub fn watch_ended(&self, resource: Resource, reason: Ended) {
        self.restarts.get_or_create(&WatchLabels { resource, reason }).inc();
    }

    fn observe(&self, verb: Verb, resource: Resource, code: Code, since: Instant) {
        let labels = Labels { verb, resource, code };
        self.requests.get_or_create(&labels).inc();
        self.duration.get_or_create(&labels).observe(since.elapsed().as_secs_f64());
    }

    /// How many watches broke, for tests.
    #[cfg(test)]
    pub fn restarts(&self, resource: Resource, reason: Ended) -> u64 {
        self.restarts.get_or_create(&WatchLabels { resource, reason }).get()
    }
}

/// Makes [`Observed`] services.
#[derive(Debug, Clone)]
pub struct Layer {
    metrics: Metrics,
    pace: Arc<Pace>,
}

impl Layer {
    /// Counts into `metrics`.
    pub fn new(metrics: Metrics) -> Self {
        Self { metrics, pace: Arc::default() }
    }
}

impl<S> tower::Layer<S> for Layer {
    type Service = Observed<S>;

    fn layer(&self, inner: S) -> Observed<S> {
        Observed { inner, metrics: self.metrics.clone(), pace: self.pace.clone() }
    }
}

/// A service whose requests are timed, counted and bounded.
#[derive(Debug, Clone)]
pub struct Observed<S> {
    inner: S,
    metrics: Metrics,
    pace: Arc<Pace>,
}

impl<S, B> Service<Request<Body>> for Observed<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
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
        let resource = Resource::of(request.uri().path());
        let verb = verb(&request);
        let turn = (verb == Verb::watch).then(|| self.pace.turn(request.uri()));
        let answer = self.inner.call(request);
        let metrics = self.metrics.clone();
        Box::pin(async move {
            if let Some(turn) = turn {
                sleep_until(turn).await;
            }
            let start = Instant::now();
            let whole = async {
                let (parts, body) = answer.await.map_err(Into::into)?.into_parts();
                let body = match verb {
                    Verb::watch => body.map_err(Into::into).boxed_unsync(),
                    _ => {
                        let bytes = body.collect().await.map_err(Into::into)?.to_bytes();
                        Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
                    }
                };
                Ok(Response::from_parts(parts, body))
            };
            let result = timeout(ANSWER_TIMEOUT, whole).await;
            let code = match &result {
                Ok(Ok(response)) => Code::Status(response.status().as_u16()),
                Ok(Err(_)) => Code::Error,
                Err(_) => Code::Timeout,
            };
            metrics.observe(verb, resource, code, start);
            result.unwrap_or_else(|_| Err(TimedOut.into()))
        })
    }
}

/// `kube` says in an extension which of its methods made the request.
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

/// When each watch was last started.
#[derive(Debug, Default)]
struct Pace(Mutex<HashMap<String, Instant>>);

impl Pace {
    /// The moment at which a watch of `uri` may start. There are as many kinds of them as the agent has watches.
    fn turn(&self, uri: &http::Uri) -> Instant {
        let selectors = uri.query().unwrap_or_default().split('&').filter(|p| !p.starts_with("resourceVersion="));
        let key = format!("{}?{}", uri.path(), selectors.collect::<Vec<_>>().join("&"));
        let now = Instant::now();
        let mut starts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = starts.get(&key).map_or(now, |last| now.max(*last + WATCH_PACE));
        starts.insert(key, turn);
        turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resource_is_read_from_the_path() {
        for (path, resource) in [
            ("/api/v1/pods", Resource::pods),
            ("/api/v1/namespaces/a/configmaps", Resource::configmaps),
            ("/apis/cert-manager.io/v1/namespaces/pods/certificaterequests/x", Resource::certificaterequests),
            ("/apis/cert-manager.io/v1/clusterissuers/x", Resource::clusterissuers),
            ("/apis/cert-manager.io/v1/certificaterequests", Resource::certificaterequests),
            ("/apis/cert-manager.io", Resource::other),
            ("/version", Resource::other),
            ("", Resource::other),
        ] {
            assert_eq!(Resource::of(path), resource, "{path}");
        }
    }
}
