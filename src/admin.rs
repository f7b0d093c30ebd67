//! Serves probes, metrics and the admin endpoints over HTTP/1.
//!
//! There are three listeners. The probes address is for the kubelet: `/livez` and `/readyz`. The metrics address is for Prometheus and adds
//! `/metrics`. Both are reached from outside the pod. The admin address is for operators on the node and adds `/log-level`; that of an agent
//! adds `/certs` and `/reissue` too; [`access`] decides which requests it accepts. No handler calls the API server or an issuer: `/livez`
//! reports only that this process answers. No response contains a key; the closure [`Certificates`] ensures that for `/certs`.
//!
//! A connection carries one request and is then closed, so that idle or slow clients do not block the probes.

use std::{fmt, fmt::Write as _, io, net::SocketAddr, sync::Arc};

use agent_runtime::{
    metrics::{Exposition, Format},
    readiness::Readiness,
    shutdown::Shutdown,
};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use tokio::net::TcpListener;

pub mod access;
mod connections;
mod controls;
mod listen;
mod metrics;
mod places;

use connections::{PAGES, PROBES};
pub use controls::{Certificates, Controls, LogLevel};
use metrics::Listener;
pub use metrics::Metrics;

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::admin";

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";

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
/// or every IPv4 address if the node has no IPv6. Call it inside the runtime.
pub fn bind(field: &'static str, address: SocketAddr) -> Result<TcpListener, Error> {
    listen::listen(address).map_err(|cause| Error { field, address, cause })
}

/// The addresses of the listeners.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// `admin.address`
    pub admin: SocketAddr,
    /// `metrics.address`
    pub metrics: SocketAddr,
    /// `probes.address`
    pub probes: SocketAddr,
}

/// `mountHelper`: the addresses of a mount helper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MountHelper {
    /// `metricsAddress`
    pub metrics: SocketAddr,
    /// `probesAddress`
    pub probes: SocketAddr,
}

/// The listeners of a process. A mount helper has no admin address.
#[derive(Debug)]
pub struct Listeners {
    admin: Option<TcpListener>,
    metrics: TcpListener,
    probes: TcpListener,
}

impl Listeners {
    /// Opens the listeners. Call it inside the runtime.
    pub fn bind(addresses: Addresses) -> Result<Self, Error> {
        Ok(Self {
            admin: Some(bind("admin.address", addresses.admin)?),
            metrics: bind("metrics.address", addresses.metrics)?,
            probes: bind("probes.address", addresses.probes)?,
        })
    }

    /// Opens the listeners of a mount helper. Call it inside the runtime.
    pub fn of_mount_helper(addresses: &MountHelper) -> Result<Self, Error> {
        Ok(Self {
            admin: None,
            metrics: bind("mountHelper.metricsAddress", addresses.metrics)?,
            probes: bind("mountHelper.probesAddress", addresses.probes)?,
        })
    }

    /// The admin address, with the port that the kernel has chosen.
    pub fn admin_address(&self) -> io::Result<Option<SocketAddr>> {
        self.admin.as_ref().map(TcpListener::local_addr).transpose()
    }

    /// Logs the addresses of metrics and probes, and serves in the background until the drain begins. A request in progress then has 1 s to
    /// complete.
    pub fn serve(self, routes: &Routes, metrics: &Metrics, shutdown: &Shutdown) {
        if let (Ok(metrics), Ok(probes)) = (self.metrics.local_addr(), self.probes.local_addr()) {
            tracing::info!(target: LOG_TARGET, address = %metrics, %probes, "serving metrics and probes");
        }
        let admin = self.admin.map(|admin| (Listener::admin, PAGES, admin, routes.clone()));
        let others =
            [(Listener::metrics, PAGES, self.metrics, routes.for_metrics()), (Listener::probes, PROBES, self.probes, routes.for_probes())];
        for (which, limits, listener, routes) in admin.into_iter().chain(others) {
            tokio::spawn(connections::serve(limits, listener, routes, metrics.evicted(which), shutdown.clone()));
        }
    }
}

/// The paths that a listener serves.
#[derive(Clone)]
pub struct Routes {
    readiness: Readiness,
    exposition: Option<Arc<Exposition>>,
    controls: Option<Controls>,
    log: Option<LogLevel>,
    /// Checks each request by [`access`].
    is_admin: bool,
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Routes").field("controls", &self.controls).field("log", &self.log).finish_non_exhaustive()
    }
}

type Answer = Response<Full<Bytes>>;

impl Routes {
    /// The paths of an admin address: `/livez`, `/readyz` and `/metrics`.
    pub fn new(readiness: Readiness, exposition: Arc<Exposition>) -> Self {
        Self { readiness, exposition: Some(exposition), controls: None, log: None, is_admin: true }
    }

    /// Adds `/certs` and `/reissue`, for an agent.
    pub fn with_controls(self, controls: Controls) -> Self {
        Self { controls: Some(controls), ..self }
    }

    /// Adds `/log-level`, if the log filter can be changed.
    pub fn with_log(self, log: Option<LogLevel>) -> Self {
        Self { log, ..self }
    }

    /// `/livez`, `/readyz` and `/metrics`, for the metrics address.
    fn for_metrics(&self) -> Self {
        Self { controls: None, log: None, is_admin: false, ..self.clone() }
    }

    /// `/livez` and `/readyz`, for the probes address.
    fn for_probes(&self) -> Self {
        Self { exposition: None, ..self.for_metrics() }
    }

    /// Answers a request. Calls `arrived` when the request is complete, before the answer is made.
    async fn answer<B>(&self, request: Request<B>, arrived: impl FnOnce()) -> Answer
    where
        B: http_body::Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        if self.is_admin
            && let Err(sentence) = access::check(&request)
        {
            arrived();
            return answer(StatusCode::FORBIDDEN, TEXT, sentence);
        }
        if let ("/log-level", Some(log)) = (request.uri().path(), &self.log) {
            return log.answer(request, arrived).await;
        }
        // The bodies of all other requests are ignored.
        arrived();
        match (request.uri().path(), &self.exposition, &self.controls) {
            ("/livez", ..) => page(&request, || answer(StatusCode::OK, TEXT, "ok\n")),
            ("/readyz", ..) => page(&request, || self.readyz(request.uri().query())),
            ("/metrics", Some(exposition), _) => page(&request, || metrics_page(exposition, Format::of(request.headers()))),
            ("/certs", _, Some(controls)) => page(&request, || controls.certs()),
            ("/reissue", _, Some(controls)) => controls.reissue(&request).await,
            _ => answer(StatusCode::NOT_FOUND, TEXT, format!("not found; here are {}\n", self.paths())),
        }
    }

    fn paths(&self) -> String {
        let further = [
            ("/metrics", self.exposition.is_some()),
            ("/certs", self.controls.is_some()),
            ("/reissue", self.controls.is_some()),
            ("/log-level", self.log.is_some()),
        ];
        let mut paths: Vec<_> =
            ["/livez", "/readyz"].into_iter().chain(further.into_iter().filter_map(|(path, is)| is.then_some(path))).collect();
        let last = paths.pop().unwrap_or_default();
        format!("{} and {last}", paths.join(", "))
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
}

fn metrics_page(exposition: &Exposition, format: Format) -> Answer {
    match exposition.encode(format) {
        Ok(page) => answer(StatusCode::OK, format.content_type(), page),
        Err(_) => answer(StatusCode::INTERNAL_SERVER_ERROR, TEXT, "the metrics cannot be encoded\n"),
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

#[cfg(test)]
mod tests;
