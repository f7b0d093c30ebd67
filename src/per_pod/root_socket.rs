//! Serves gRPC services on a Unix socket that only root may use: to the kubelet, or to the mount helper.
//!
//! The server keeps the socket's name as long as the process runs: if the name is removed, for example by an old process that ends, it
//! binds again. At the end it removes the name only if the name still refers to its own inode.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use agent_runtime::telemetry::hush::LogLimiter;
use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use sds_server::grpc::table::Table;
use tokio::{
    net::UnixStream,
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tower::ServiceExt;
use tracing::{debug, error, info, warn};
use unix_peer::{authority_rewrite::AuthorityNormalizer, listener};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::root_socket";

/// Only root may connect; the kubelet and the mount helper run as root.
const MODE: u32 = 0o600;
/// Maximum of concurrent connections. The clients open one for each call.
const CONNECTIONS: usize = 512;
/// Interval of checks whether the name exists.
const LOOK: Duration = Duration::from_secs(30);
/// Delay before the socket is bound again on request.
const OFFER_RETRY_INTERVAL: Duration = Duration::from_secs(10);
/// Pause after an error of `accept`.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// A bound socket and its services.
#[derive(Debug)]
pub struct Server {
    field: &'static str,
    path: PathBuf,
    bound: listener::Bound,
    services: Arc<Table>,
    again: Arc<Notify>,
    places: Arc<Semaphore>,
    lines: LogLimiter<&'static str>,
}

impl Server {
    /// Binds `path`, which comes from `field` of the configuration. A notification of `again` binds it again after 10 s.
    pub fn bind(field: &'static str, path: PathBuf, services: Table, again: Arc<Notify>) -> Result<Self, listener::Error> {
        let bound = listener::bind_for(field, &path, MODE)?;
        let (services, places) = (Arc::new(services), Arc::new(Semaphore::new(CONNECTIONS)));
        Ok(Self { field, path, bound, services, again, places, lines: LogLimiter::default() })
    }

    /// Serves until `last`.
    pub async fn run(mut self, last: CancellationToken) {
        info!(target: LOG_TARGET, socket = %self.path.display(), "serving a root-only socket");
        let (mut look, mut offer_at) = (Instant::now() + LOOK, None);
        loop {
            let again = self.again.clone();
            tokio::select! {
                () = last.cancelled() => break,
                accepted = self.bound.listener.accept() => match accepted {
                    Ok((stream, _)) => self.welcome(stream, &last),
                    Err(error) => {
                        if let Some(left_out) = self.lines.permit("accept", Instant::now()) {
                            warn!(target: LOG_TARGET, %error, socket = %self.path.display(), left_out, "cannot accept connections; trying again");
                        }
                        tokio::time::sleep(ACCEPT_RETRY_INTERVAL).await;
                    }
                },
                () = again.notified() => offer_at = Some(Instant::now() + OFFER_RETRY_INTERVAL),
                () = sleep_until(offer_at.unwrap_or(look)) => {
                    if offer_at.take().is_some() || self.is_missing() {
                        self.rebind();
                    }
                    look = Instant::now() + LOOK;
                }
            }
        }
        self.bound.name.unlink_if_owned();
    }

    /// Whether the name does not exist. A name that refers to another socket is left, because that may be the successor's.
    fn is_missing(&self) -> bool {
        std::fs::symlink_metadata(&self.path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    }

    fn rebind(&mut self) {
        match listener::bind_for(self.field, &self.path, MODE) {
            Ok(bound) => {
                if let Some(left_out) = self.lines.permit("bound again", Instant::now()) {
                    info!(target: LOG_TARGET, socket = %self.path.display(), left_out, "the root-only socket is bound again");
                }
                self.bound = bound;
            }
            Err(cause) => {
                if let Some(left_out) = self.lines.permit("not bound", Instant::now()) {
                    error!(target: LOG_TARGET, %cause, left_out, "cannot bind the root-only socket again");
                }
            }
        }
    }

    fn welcome(&self, stream: UnixStream, last: &CancellationToken) {
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            if let Some(left_out) = self.lines.permit("connections", Instant::now()) {
                warn!(target: LOG_TARGET, socket = %self.path.display(), left_out, "connection closed: there are {CONNECTIONS} already");
            }
            return;
        };
        tokio::spawn(connection(stream, self.services.clone(), last.clone(), place));
    }
}

async fn connection(stream: UnixStream, services: Arc<Table>, last: CancellationToken, _place: OwnedSemaphorePermit) {
    let service = service_fn(move |request| {
        let services = services.clone();
        async move {
            match services.find(&request) {
                Some(service) => service.oneshot(request).await,
                None => Ok(Status::unimplemented("this socket does not serve workloads").into_http()),
            }
        }
    });
    let served = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_header_list_size(16_384)
        .serve_connection(TokioIo::new(AuthorityNormalizer::new(stream)), service);
    let mut served = std::pin::pin!(served);
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = last.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        debug!(target: LOG_TARGET, %error, "a connection ended with an error");
    }
}
