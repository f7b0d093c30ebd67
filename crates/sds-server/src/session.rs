//! The accept loop, and the HTTP/2 connections.
//!
//! Owns the limits of the protocol and the end of each connection. The [`quotas`] are checked before a connection is served. The client's
//! SETTINGS are answered before the caller is attested. A connection ends when its client closes it, when it is idle for too long, when its
//! workload has ended, at the deadline of the drain, or when the client never sends a byte.

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
use futures::future::BoxFuture;
use http::{HeaderMap, Request, header};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
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
    calls::{Call, Calls, Refused},
    metrics::{Metrics, Rejection},
    origin_cache::{Gone, OriginCache},
    quotas::{Exceeded, Quotas},
    services::Services,
    serving::{Batched, Begun, Serving},
};
use crate::{
    attest::origin::Origin,
    caller::{Authenticator, Cause, Connection, Refusals},
    grpc::{
        self, UntilEnd,
        request::{self, Inbox, MessageKind, MessageLimits, RequestGuard, RequestLimits},
    },
    limits::Limits,
};

/// Target of the log lines of this module.
const LOG_TARGET: &str = "sds_agent::session";

mod calls;
pub mod metrics;
mod origin_cache;
pub mod quotas;
pub mod services;
mod serving;

pub use calls::MAX_REFUSED_STREAMS;

/// Flow-control window of streams and connections, in bytes: the initial value of RFC 9113, section 6.9.2. `h2` applies a smaller window
/// before the client has acknowledged the SETTINGS (hyperium/h2#630): it then loses a WINDOW_UPDATE, and the stream hangs. A larger window
/// has no benefit on a Unix socket.
const WINDOW: u32 = 65_535;
const FRAME: u32 = 16_384;
const HEADER_LIST: u32 = 16_384;
/// Bytes buffered for each stream whose client reads slowly.
const SEND_BUFFER: usize = 64 << 10;
/// Connections that are accepted or rejected in a row before the accept loop yields.
const MAX_ACCEPTED_IN_A_ROW: usize = 16;

/// Timeouts of a connection.
#[derive(Debug, Clone)]
pub struct Timeouts {
    /// Time for the client to send its first byte. The connection is closed after it. Default: 10 s.
    pub first_byte: Duration,
    /// Time for the first message of a call to arrive, and for each message from its first byte. The call ends with DEADLINE_EXCEEDED after
    /// it. Default: 10 s.
    pub message: Duration,
    /// Time until the caller of a connection is attested. The connection is closed after it. Default: 60 s.
    pub attestation: Duration,
    /// Time for a graceful HTTP/2 close after GOAWAY. Default: 1 s.
    pub graceful_close: Duration,
    /// Delay before a refused stream gets its status, so that a client that retries at once is slowed down. Default: 100 ms.
    pub refusal_delay: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            first_byte: Duration::from_secs(10),
            message: Duration::from_secs(10),
            attestation: Duration::from_secs(60),
            graceful_close: Duration::from_secs(1),
            refusal_delay: Duration::from_millis(100),
        }
    }
}

/// Callers that need no identity: other agents, which keep a connection to notice the end of this one.
pub trait Companions: std::fmt::Debug + Send + Sync {
    /// Whether `peer` is such a caller. Must be cancel safe.
    fn is_companion<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, bool>;
}

/// The state that all connections of one socket share.
#[derive(Debug, Clone)]
pub struct Sessions {
    /// The gRPC services of the socket.
    pub services: Services,
    /// Attests callers and maps them to identities.
    pub authenticator: Authenticator,
    /// Limits for callers.
    pub limits: Limits,
    /// Counts connections and calls against the limits. All sockets of a process share it.
    pub quotas: Quotas,
    /// Limits log lines about refused callers.
    pub refusals: Arc<Refusals>,
    /// Timeouts of a connection.
    pub timeouts: Timeouts,
    /// Callers whose connections stay open without attestation. Default: none.
    pub companions: Option<Arc<dyn Companions>>,
    /// Metrics of the sockets.
    pub metrics: Metrics,
    /// Ends accepting. Each connection holds a guard of the drain.
    pub shutdown: Shutdown,
    /// Ends the streams. Cancelled after the name of the socket has been released.
    pub ending: CancellationToken,
}

impl Sessions {
    /// Accepts connections from `listener` until the drain begins. Open connections continue afterwards; each holds a guard of the drain.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, accepting ends. A connection that is being accepted at that moment may be closed; open connections
    /// continue.
    pub async fn accept(self, listener: UnixListener) {
        let sessions = Arc::new(self);
        let origin_cache = OriginCache::new(sessions.authenticator.attestor.origins());
        let mut pause = AcceptBackoff::default();
        let mut accepted_at_once = 0;
        loop {
            // Yields, so that a full accept queue does not starve the open connections.
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

    /// Serves or rejects a connection. Waits only if the origin of the connection is not cached and all permits to read origins are in use.
    async fn accept_connection(self: &Arc<Self>, stream: UnixStream, origin_cache: &OriginCache) {
        if self.quotas.are_exhausted() {
            self.metrics.rejected(Rejection::connection_limit);
            debug!(target: LOG_TARGET, "connection closed: limits.connections is reached");
            return;
        }
        // Taken at once, while the process that connected most probably still exists.
        let peer = match Peer::of(&stream) {
            Ok(peer) => peer,
            Err(error) => {
                self.metrics.rejected(Rejection::no_credentials);
                if let Some(left_out) = self.refusals.permit(Cause::unattributed("no credentials"), Instant::now()) {
                    warn!(target: LOG_TARGET, %error, left_out, "connection closed: the kernel returned no peer credentials");
                }
                return;
            }
        };
        // Held from here on, so that a drain that begins before the task has run waits for the connection.
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
            let origin = match origin_cache.resolve(&peer, read_permit).await {
                Some(Ok(origin)) => origin,
                Some(Err(Gone)) => return sessions.metrics.rejected(Rejection::caller_ended),
                None => return,
            };
            if let Some(session) = sessions.admit(peer, &origin, guard) {
                session.run(stream).await;
            }
        });
    }

    /// Returns a session for the connection of `peer`, or `None` if a quota is exceeded.
    fn admit(self: &Arc<Self>, peer: Peer, origin: &Origin, guard: Guard) -> Option<Session> {
        let place = self.quotas.admit(origin, Instant::now()).map_err(Exceeded::of_connections);
        let place = place.and_then(|mut place| place.reserve().map(|()| place).map_err(Exceeded::of_connection_memory));
        let place = match place {
            Ok(place) => place,
            Err((reason, limit)) => {
                self.metrics.rejected(reason);
                self.log_over_quota(origin, limit, "connection closed");
                return None;
            }
        };
        let connection = Arc::new(Connection::new(peer, self.authenticator.clone()).coming_from(origin.clone(), self.refusals.clone()));
        let calls = Arc::new(Calls::new(place));
        Some(Session { sessions: self.clone(), connection, calls, _guard: guard })
    }

    /// Logs that a quota is exceeded: one line for each caller, limit and minute.
    fn log_over_quota(&self, origin: &Origin, limit: &'static str, what: &str) {
        if let Some(left_out) = self.refusals.permit(self.authenticator.cause(origin, limit, false), Instant::now()) {
            warn!(target: LOG_TARGET, %origin, limit, left_out, "{what}: over quota; raise the limit if the caller needs more");
        }
    }
}

/// The headers that the services use. Others would be kept for as long as the call.
fn used(headers: &HeaderMap) -> HeaderMap {
    let names = [
        header::CONTENT_TYPE,
        header::TE,
        header::HeaderName::from_static("grpc-timeout"),
        header::HeaderName::from_static("grpc-encoding"),
    ];
    let copied = |value: &http::HeaderValue| http::HeaderValue::from_bytes(value.as_bytes()).ok();
    names.into_iter().filter_map(|name| headers.get(&name).and_then(copied).map(|value| (name, value))).collect()
}

/// Whether `error` concerns one connection, and not the socket.
fn is_connection_error(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted)
}

/// The pause after a failed accept: 50 ms, doubled after each further failure up to 1 s.
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
        let (reader, writer) = stream.into_split();
        let reader = Batched::new(reader);
        let batch = reader.batch();
        let io = AuthorityNormalizer::new(tokio::io::join(reader, writer));
        let spoke = io.spoke();
        let pause = self.sessions.timeouts.refusal_delay;
        let begun = Begun::default();
        let service = service_fn(|request| {
            let kind = self.sessions.services.kind(request.uri().path());
            let (request, reading) = self.receive(request, kind, &begun);
            let call = self.begin_call(kind).map(|call| (call, self.sessions.services.call(&self.connection, request)));
            async move {
                Ok::<_, Infallible>(match call {
                    Ok((call, answer)) => answer.await.until_end((call, reading)),
                    Err(refusal) => {
                        // Slows down a client that retries at once.
                        tokio::time::sleep(pause).await;
                        grpc::unary(Err(refusal)).until_end(reading)
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
        let served = pin!(served);
        let mut served = Serving::new(served, &begun, batch);
        let shutdown = &self.sessions.shutdown;
        let ended = tokio::select! {
            ended = &mut served => Some(ended),
            () = self.connection.terminated() => {
                served.connection().graceful_shutdown();
                tokio::time::timeout(self.sessions.timeouts.graceful_close, served).await.ok()
            }
            () = self.calls.too_many_refused() => {
                self.sessions.metrics.rejected(Rejection::refused_streams);
                None
            }
            () = self.unattested() => {
                self.sessions.metrics.rejected(Rejection::unattested);
                served.connection().graceful_shutdown();
                tokio::time::timeout(self.sessions.timeouts.graceful_close, served).await.ok()
            }
            () = self.idle(&spoke) => {
                served.connection().graceful_shutdown();
                tokio::time::timeout(self.sessions.timeouts.graceful_close, served).await.ok()
            }
            () = self.sessions.ending.cancelled() => {
                // The streams end by themselves. The connection of a client that does not read is dropped at the deadline of the drain. A
                // connection without a call is not waited for: its client may be idle, or may not answer the GOAWAY.
                served.connection().graceful_shutdown();
                let graceful_close = self.sessions.timeouts.graceful_close;
                tokio::select! {
                    ended = &mut served => Some(ended),
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

    /// Begins to read a request, also for a call that is rejected.
    fn receive(&self, request: Request<Incoming>, kind: MessageKind, begun: &Begun<Incoming>) -> (Request<Inbox>, RequestGuard) {
        let (mut parts, body) = request.into_parts();
        parts.headers = used(&parts.headers);
        let limits = &self.sessions.limits;
        let limits = RequestLimits {
            message: MessageLimits { bytes: limits.message_bytes, names: limits.names_per_stream },
            patience: self.sessions.timeouts.message,
        };
        let (intake, inbox, reading) = request::channel(body, kind, limits, self.calls.charge(), Instant::now());
        begun.lock().push(intake);
        (Request::from_parts(parts, inbox), reading)
    }

    /// Begins a call, or returns the status of a call over quota.
    fn begin_call(&self, kind: MessageKind) -> Result<Call, Status> {
        let bytes = if kind == MessageKind::Other { quotas::OTHER_CALL_BYTES } else { quotas::CALL_BYTES };
        self.calls.begin(bytes).map_err(|refused| {
            let ((reason, limit), status) = match refused {
                Refused::Streams(exceeded) => {
                    (exceeded.of_streams(), Status::resource_exhausted("the limit of concurrent streams is reached"))
                }
                Refused::Memory(exceeded) => (exceeded.of_memory(), request::over_memory(exceeded)),
            };
            self.sessions.metrics.refused(reason);
            self.sessions.log_over_quota(self.calls.origin(), limit, "stream refused");
            status
        })
    }

    /// Returns when the caller has not been attested in time, and is no companion.
    async fn unattested(&self) {
        tokio::time::sleep(self.sessions.timeouts.attestation).await;
        let may_stay = match &self.sessions.companions {
            _ if self.connection.is_attested() => true,
            Some(companions) => companions.is_companion(self.connection.peer()).await,
            None => false,
        };
        if may_stay {
            std::future::pending::<()>().await;
        }
    }

    /// Returns when the client has not sent a byte in time, or when the connection has had no call for the idle time.
    async fn idle(&self, spoke: &AtomicBool) {
        tokio::time::sleep(self.sessions.timeouts.first_byte).await;
        if !spoke.load(Ordering::Relaxed) {
            self.sessions.metrics.rejected(Rejection::silent);
            return;
        }
        self.without_calls(self.sessions.limits.idle).await;
    }

    /// Returns when the connection has had no call for `time`.
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
