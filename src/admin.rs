//! Serves probes, metrics and the admin endpoints over HTTP/1.
//!
//! There are two listeners. The metrics address is for the kubelet and Prometheus, which connect from outside the pod: `/livez`, `/readyz`,
//! `/metrics`. The admin address is for operators on the node and adds `/log-level`; that of an agent adds `/certs` and `/reissue` too.
//! No handler calls the API server or an issuer: `/livez` reports only that this process answers. No response contains a key; the closure
//! [`Certificates`] ensures that for `/certs`.
//!
//! A connection carries one request and is then closed, so that idle or slow clients do not block the probes.

use std::{convert::Infallible, fmt, fmt::Write as _, io, net::SocketAddr, sync::Arc, time::Duration};

use agent_runtime::{
    metrics::{Exposition, Format},
    readiness::Readiness,
    shutdown::{self, Shutdown},
    telemetry::hush::LogLimiter,
};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

mod controls;
mod listen;

pub use controls::{Certificates, Controls, LogLevel};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::admin";

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
/// Pause of the accept loop after an error of the machine, such as a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Time limit for a request in progress once the drain has begun.
const DRAIN: Duration = Duration::from_secs(1);

/// The listener cannot be created.
#[derive(Debug, thiserror::Error)]
#[error("{field} {address}: cannot listen: {cause}")]
pub struct Error {
    /// The field of the configuration.
    pub field: &'static str,
    /// Its value.
    pub address: SocketAddr,
    /// The kernel's answer.
    pub cause: io::Error,
}

/// Listens on `address`, the value of `field` in the configuration. Port 0 selects a free port. `[::]` means every IPv6 and IPv4 address,
/// or every IPv4 address if the node has no IPv6.
pub async fn bind(field: &'static str, address: SocketAddr) -> Result<TcpListener, Error> {
    listen::listen(address).await.map_err(|cause| Error { field, address, cause })
}

/// The paths that a listener serves.
#[derive(Clone)]
pub struct Routes {
    readiness: Readiness,
    exposition: Arc<Exposition>,
    controls: Option<Controls>,
    log: Option<LogLevel>,
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Routes").field("controls", &self.controls).field("log", &self.log).finish_non_exhaustive()
    }
}

type Answer = Response<Full<Bytes>>;

impl Routes {
    /// Serves `/livez`, `/readyz` and `/metrics`.
    pub fn new(readiness: Readiness, exposition: Arc<Exposition>) -> Self {
        Self { readiness, exposition, controls: None, log: None }
    }

    /// Adds `/certs` and `/reissue`, for the admin address of an agent.
    pub fn with_controls(self, controls: Controls) -> Self {
        Self { controls: Some(controls), ..self }
    }

    /// Adds `/log-level`, for the admin address, if the log filter can be changed.
    pub fn with_log(self, log: Option<LogLevel>) -> Self {
        Self { log, ..self }
    }

    /// The paths of [`new`](Self::new) alone, for the metrics address.
    pub fn without_controls(self) -> Self {
        Self { controls: None, log: None, ..self }
    }

    async fn answer<B>(&self, request: Request<B>) -> Answer
    where
        B: http_body::Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        match (request.uri().path(), &self.controls, &self.log) {
            ("/livez", ..) => page(&request, || answer(StatusCode::OK, TEXT, "ok\n")),
            ("/readyz", ..) => page(&request, || self.readyz(request.uri().query())),
            ("/metrics", ..) => page(&request, || self.metrics(Format::of(request.headers()))),
            ("/certs", Some(controls), _) => page(&request, || controls.certs()),
            ("/reissue", Some(controls), _) => controls.reissue(&request).await,
            ("/log-level", _, Some(log)) => log.answer(request).await,
            _ => answer(StatusCode::NOT_FOUND, TEXT, format!("not found; here are {}\n", self.paths())),
        }
    }

    fn paths(&self) -> &'static str {
        match (&self.controls, &self.log) {
            (Some(_), Some(_)) => "/livez, /readyz, /metrics, /certs, /reissue and /log-level",
            (Some(_), None) => "/livez, /readyz, /metrics, /certs and /reissue",
            (None, Some(_)) => "/livez, /readyz, /metrics and /log-level",
            (None, None) => "/livez, /readyz and /metrics",
        }
    }

    fn readyz(&self, query: Option<&str>) -> Answer {
        let (status, mut text) = if self.readiness.is_ready() {
            (StatusCode::OK, "ready\n".to_owned())
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, "not ready\n".to_owned())
        };
        let verbose = query.is_some_and(|query| query.split('&').any(|pair| pair.split('=').next() == Some("verbose")));
        if verbose {
            for name in self.readiness.awaited() {
                // Writing to a `String` does not fail.
                let _ = writeln!(text, "awaiting {name}");
            }
        }
        answer(status, TEXT, text)
    }

    fn metrics(&self, format: Format) -> Answer {
        match self.exposition.encode(format) {
            Ok(page) => answer(StatusCode::OK, format.content_type(), page),
            Err(_) => answer(StatusCode::INTERNAL_SERVER_ERROR, TEXT, "the metrics cannot be encoded\n"),
        }
    }
}

fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

fn page<B>(request: &Request<B>, page: impl FnOnce() -> Answer) -> Answer {
    if matches!(*request.method(), Method::GET | Method::HEAD) { page() } else { refuse_method("GET, HEAD") }
}

fn refuse_method(allowed: &'static str) -> Answer {
    let method = allowed.split_once(',').map_or(allowed, |(first, _)| first);
    let mut refused = answer(StatusCode::METHOD_NOT_ALLOWED, TEXT, format!("use {method}\n"));
    refused.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allowed));
    refused
}

/// Logs the address of metrics and probes.
pub fn tell(metrics: &TcpListener) {
    if let Ok(address) = metrics.local_addr() {
        tracing::info!(target: LOG_TARGET, %address, "serving metrics and probes");
    }
}

/// The limits of a listener.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Concurrent connections. Further ones wait in the kernel's backlog.
    connections: usize,
    /// Time limit for the request head.
    head: Duration,
    /// Time limit for a connection, from accept to close.
    connection: Duration,
}

const LIMITS: Limits = Limits { connections: 64, head: Duration::from_secs(5), connection: Duration::from_secs(30) };

/// Serves until the drain begins. A request in progress then has 1 s to complete.
pub async fn serve(listener: TcpListener, routes: Routes, shutdown: Shutdown) {
    serve_within(LIMITS, listener, routes, shutdown).await;
}

async fn serve_within(limits: Limits, listener: TcpListener, routes: Routes, shutdown: Shutdown) {
    let slots = Arc::new(Semaphore::new(limits.connections));
    let refusals = LogLimiter::default();
    let accepting = async {
        // The semaphore is never closed.
        while let Ok(slot) = slots.clone().acquire_owned().await {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let held = (slot, shutdown.guard());
                    tokio::spawn(connection(limits, stream, routes.clone(), shutdown.drain.clone(), held).in_current_span());
                }
                Err(error) if is_the_clients(&error) => {}
                Err(error) => {
                    if let Some(left_out) = refusals.permit("accept", Instant::now()) {
                        tracing::warn!(target: LOG_TARGET, %error, left_out, "cannot accept HTTP connections; trying again");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    shutdown.drain.run_until_cancelled(accepting).await;
}

/// Whether `accept` reports an error of one connection, and not of the listener or the machine.
fn is_the_clients(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

async fn connection(
    limits: Limits,
    stream: TcpStream,
    routes: Routes,
    drain: CancellationToken,
    _held: (OwnedSemaphorePermit, shutdown::Guard),
) {
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let routes = routes.clone();
        async move { Ok::<_, Infallible>(routes.answer(request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .keep_alive(false)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), service);
    let bounded = async {
        let mut served = std::pin::pin!(timeout(limits.connection, served));
        match drain.run_until_cancelled(served.as_mut()).await {
            Some(ended) => ended,
            None => timeout(DRAIN, served).await.and_then(|ended| ended),
        }
    };
    match bounded.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(target: LOG_TARGET, %error, "HTTP connection failed"),
        Err(_) => tracing::debug!(target: LOG_TARGET, "HTTP connection took too long"),
    }
}

#[cfg(test)]
mod tests;
