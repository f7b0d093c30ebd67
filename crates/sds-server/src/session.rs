//! The accept loop, and one connection's life on HTTP/2.
//!
//! Owns the limits of the protocol and every way in which a connection ends. The client's SETTINGS are answered at once, before anybody
//! asks who it is; whether there is a place is asked before that, of the [`quotas`]. A connection ends when its client ends it, when
//! nothing happens on it for long, when its workload has ended, at the drain's deadline, or when it never spoke at all.

use std::{
    convert::Infallible,
    io,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use agent_runtime::shutdown::{Guard, Shutdown};
use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    net::{UnixListener, UnixStream},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{debug, warn};
use unix_peer::{authority_rewrite::AuthorityNormalizer, peer::Peer};

use self::{
    calls::{Call, Calls},
    metrics::{Metrics, Rejection},
    origin_cache::OriginCache,
    quotas::Quotas,
    services::Services,
};
use crate::{
    attest::origin::Origin,
    caller::{Authenticator, Cause, Connection, Refusals},
    grpc::{self, UntilEnd},
    limits::Limits,
};

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::session";

mod calls;
pub mod metrics;
mod origin_cache;
pub mod quotas;
pub mod services;

pub use calls::MAX_REFUSED_STREAMS;

/// Both windows. Below the protocol's initial value the `h2` crate loses a WINDOW_UPDATE when the peer sent before it saw our SETTINGS,
/// and the stream hangs; more buys nothing on a Unix socket.
const WINDOW: u32 = 65_535;
const FRAME: u32 = 16_384;
const HEADER_LIST: u32 = 16_384;
/// Bytes buffered for each stream of a client that reads slowly.
const SEND_BUFFER: usize = 64 << 10;
/// Connections that are taken or turned away before others have their turn.
const MAX_ACCEPTED_IN_A_ROW: usize = 16;

/// How long connections are borne with.
#[derive(Debug, Clone)]
pub struct Timeouts {
    /// A connection that has said nothing by then never will.
    pub first_byte: Duration,
    /// What a connection gets for its last words: its workload has ended, or it was idle.
    pub graceful_close: Duration,
    /// How long a refused stream waits for its answer.
    pub refusal_delay: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { first_byte: Duration::from_secs(10), graceful_close: Duration::from_secs(1), refusal_delay: Duration::from_millis(100) }
    }
}

/// What the sessions of one socket share.
#[derive(Debug, Clone)]
pub struct Sessions {
    /// What is served.
    pub services: Services,
    /// How callers are known.
    pub authenticator: Authenticator,
    /// What is taken on.
    pub limits: Limits,
    /// Who may take how much of it; the same for all sockets.
    pub quotas: Quotas,
    /// What the log has been told about callers that are refused.
    pub refusals: Arc<Refusals>,
    /// What is borne with.
    pub timeouts: Timeouts,
    /// What is counted.
    pub metrics: Metrics,
    /// The end of accepting, and the drain that connections hold up.
    pub shutdown: Shutdown,
    /// The end of the streams: after the socket's name has been released.
    pub ending: CancellationToken,
}

impl Sessions {
    /// Accepts connections until the drain begins. Connections outlive this; each holds a guard of the drain.
    pub async fn accept(self, listener: UnixListener) {
        let sessions = Arc::new(self);
        let origin_cache = OriginCache::new(sessions.authenticator.attestor.origins());
        let mut pause = AcceptBackoff::default();
        let mut accepted_at_once = 0;
        loop {
            // A queue that never empties is no reason to let those wait who are inside.
            accepted_at_once += 1;
            if accepted_at_once > MAX_ACCEPTED_IN_A_ROW {
                accepted_at_once = 0;
                tokio::task::yield_now().await;
            }
            let accepted = tokio::select! {
                () = sessions.shutdown.drain.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    pause = AcceptBackoff::default();
                    sessions.accept_connection(stream, &origin_cache).await;
                }
                Err(error) if is_connection_error(&error) => {
                    debug!(target: LOG_TARGET, %error, "a connection ended before it was accepted");
                }
                Err(error) => {
                    let wait = pause.next();
                    sessions.metrics.rejected(Rejection::accept_error);
                    if let Some(left_out) = sessions.refusals.permit(Cause::unattributed("accept"), Instant::now()) {
                        let wait_milliseconds = wait.as_millis();
                        warn!(target: LOG_TARGET, %error, wait_milliseconds, left_out, "cannot accept connections; trying again (out of file descriptors?)");
                    }
                    tokio::select! {
                        () = sessions.shutdown.drain.cancelled() => return,
                        () = tokio::time::sleep(wait) => {}
                    }
                }
            }
        }
    }

    /// Takes a connection on or turns it away; waits only where it is not known whose it is and many others are being asked about.
    async fn accept_connection(self: &Arc<Self>, stream: UnixStream, origin_cache: &OriginCache) {
        if self.quotas.are_exhausted() {
            self.metrics.rejected(Rejection::connection_limit);
            debug!(target: LOG_TARGET, "connection closed: there are as many as limits.connections allows");
            return;
        }
        // The handle is taken now, while the process that connected is most surely there.
        let peer = match Peer::of(&stream) {
            Ok(peer) => peer,
            Err(error) => {
                self.metrics.rejected(Rejection::no_credentials);
                if let Some(left_out) = self.refusals.permit(Cause::unattributed("no credentials"), Instant::now()) {
                    warn!(target: LOG_TARGET, %error, left_out, "connection closed: the kernel does not tell who it is");
                }
                return;
            }
        };
        // Held from here: a drain that begins before the task has run waits for it all the same.
        let guard = self.shutdown.guard();
        if let Some(origin) = origin_cache.cached(&peer) {
            if let Some(session) = self.admit(peer, &origin, guard) {
                tokio::spawn(session.run(stream));
            }
            return;
        }
        let read_permit = origin_cache.read_permit().await;
        let (sessions, origin_cache) = (self.clone(), origin_cache.clone());
        tokio::spawn(async move {
            let Some(origin) = origin_cache.resolve(&peer, read_permit).await else { return };
            if let Some(session) = sessions.admit(peer, &origin, guard) {
                session.run(stream).await;
            }
        });
    }

    /// A place for the connection of `peer`, if there is one.
    fn admit(self: &Arc<Self>, peer: Peer, origin: &Origin, guard: Guard) -> Option<Session> {
        let place = match self.quotas.admit(origin, Instant::now()) {
            Ok(place) => place,
            Err(exceeded) => {
                let (reason, limit) = exceeded.of_connections();
                self.metrics.rejected(reason);
                self.log_over_quota(origin, limit, "connection closed");
                return None;
            }
        };
        let connection = Arc::new(Connection::new(peer, self.authenticator.clone()).coming_from(origin.clone(), self.refusals.clone()));
        let calls = Arc::new(Calls::new(place));
        Some(Session { sessions: self.clone(), connection, calls, _guard: guard })
    }

    /// One line for each caller, limit and minute.
    fn log_over_quota(&self, origin: &Origin, limit: &'static str, what: &str) {
        if let Some(left_out) = self.refusals.permit(self.authenticator.cause(origin, limit, false), Instant::now()) {
            warn!(target: LOG_TARGET, %origin, limit, left_out, "{what}: over quota; raise the limit if the caller needs more");
        }
    }
}

/// Errors of the one connection, not of the socket.
fn is_connection_error(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted)
}

/// The rest between two attempts to accept: neither spinning nor giving up.
#[derive(Default)]
struct AcceptBackoff(u32);

impl AcceptBackoff {
    fn next(&mut self) -> Duration {
        let wait = Duration::from_millis(50 << self.0.min(5)).min(Duration::from_secs(1));
        self.0 += 1;
        wait
    }
}

struct Session {
    sessions: Arc<Sessions>,
    connection: Arc<Connection>,
    calls: Arc<Calls>,
    _guard: Guard,
}

impl Session {
    async fn run(self, stream: UnixStream) {
        let _open = self.sessions.metrics.connected();
        let io = AuthorityNormalizer::new(stream);
        let spoke = io.spoke();
        let pause = self.sessions.timeouts.refusal_delay;
        let service = service_fn(|request| {
            let call = self.begin_call().map(|call| (call, self.sessions.services.call(&self.connection, request)));
            async move {
                Ok::<_, Infallible>(match call {
                    Ok((call, answer)) => answer.await.until_end(call),
                    Err(refusal) => {
                        // Who asks again as soon as it is told is told late.
                        tokio::time::sleep(pause).await;
                        grpc::unary(Err(refusal))
                    }
                })
            }
        });
        let served = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .max_frame_size(FRAME)
            .max_header_list_size(HEADER_LIST)
            .max_concurrent_streams(self.sessions.limits.streams_per_connection)
            .max_send_buf_size(SEND_BUFFER)
            .auto_date_header(false)
            .serve_connection(TokioIo::new(io), service);
        let mut served = pin!(served);
        let shutdown = &self.sessions.shutdown;
        let ended = tokio::select! {
            ended = served.as_mut() => Some(ended),
            () = self.connection.terminated() => {
                served.as_mut().graceful_shutdown();
                tokio::time::timeout(self.sessions.timeouts.graceful_close, served).await.ok()
            }
            () = self.calls.too_many_refused() => {
                self.sessions.metrics.rejected(Rejection::refused_streams);
                None
            }
            () = self.idle(&spoke) => {
                served.as_mut().graceful_shutdown();
                tokio::time::timeout(self.sessions.timeouts.graceful_close, served).await.ok()
            }
            () = self.sessions.ending.cancelled() => {
                // The streams end by themselves; whoever does not read is left at the drain's deadline. Without a call there is nothing
                // to wait for: a client may be silent, or not answer the goodbye.
                served.as_mut().graceful_shutdown();
                let graceful_close = self.sessions.timeouts.graceful_close;
                tokio::select! {
                    ended = served => Some(ended),
                    () = async {
                        tokio::time::sleep(graceful_close).await;
                        self.without_calls(graceful_close).await;
                    } => None,
                    () = shutdown.abort.cancelled() => None,
                }
            }
        };
        match ended {
            Some(Ok(())) => {}
            Some(Err(error)) => debug!(target: LOG_TARGET, peer = ?self.connection.peer(), %error, "connection ended with an error"),
            None => debug!(target: LOG_TARGET, peer = ?self.connection.peer(), "connection dropped"),
        }
    }

    /// Begins a call, or says why there is no place for it.
    fn begin_call(&self) -> Result<Call, Status> {
        self.calls.begin().map_err(|exceeded| {
            let (reason, limit) = exceeded.of_streams();
            self.sessions.metrics.refused(reason);
            self.sessions.log_over_quota(self.calls.origin(), limit, "stream refused");
            Status::resource_exhausted("there are as many streams as this workload may have")
        })
    }

    /// Returns when the connection never spoke, or has had no call for the idle time.
    async fn idle(&self, spoke: &AtomicBool) {
        tokio::time::sleep(self.sessions.timeouts.first_byte).await;
        if !spoke.load(Ordering::Relaxed) {
            self.sessions.metrics.rejected(Rejection::silent);
            return;
        }
        self.without_calls(self.sessions.limits.idle).await;
    }

    /// Returns when there has been no call for `time`.
    async fn without_calls(&self, time: Duration) {
        loop {
            match self.calls.idle_since() {
                Some(since) if since.elapsed() >= time => return,
                Some(since) => tokio::time::sleep_until(since + time).await,
                None => tokio::time::sleep(time).await,
            }
        }
    }
}
