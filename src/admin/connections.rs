//! Accepts connections and serves one request on each.
//!
//! A listener accepts every connection at once: clients that connect and say nothing, or that do not read, cannot keep another client
//! waiting. [`places`](super::places) decides which connection ends instead.

use std::{
    convert::Infallible,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use agent_runtime::{
    shutdown::{self, Shutdown},
    telemetry::hush::LogLimiter,
};
use http::Request;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::metrics::counter::Counter;
use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};
use tokio::{
    io::{AsyncRead, ReadBuf},
    net::{TcpListener, TcpStream, tcp::OwnedReadHalf},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::{
    Routes,
    places::{Place, Places, Size},
};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::admin";

/// Pause of the accept loop after an error of the machine, such as a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Time limit for a request in progress once the drain has begun.
pub(super) const DRAIN: Duration = Duration::from_secs(1);

/// The limits of a listener.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Concurrent connections.
    pub(super) size: Size,
    /// Time limit for the request head.
    pub(super) head: Duration,
    /// Time limit for a connection, from accept to close. It ends connections whose client does not read the answer.
    pub(super) connection: Duration,
}

/// For metrics and for the admin endpoints. An answer can be large, and a client on a slow connection can take seconds to read it.
pub(super) const PAGES: Limits = Limits {
    size: Size { connections: 512, answers: 64, incomplete_per_peer: 8 },
    head: Duration::from_secs(5),
    connection: Duration::from_secs(30),
};

/// For probes. An answer is smaller than the send buffer of a new connection, so it never waits for its client.
pub(super) const PROBES: Limits = Limits {
    size: Size { connections: 1024, answers: 1024, incomplete_per_peer: 8 },
    head: Duration::from_secs(1),
    connection: Duration::from_secs(5),
};

/// Serves until the drain begins. A request in progress then has 1 s to complete. `evicted` counts connections that were replaced.
pub(super) async fn serve(limits: Limits, listener: TcpListener, routes: Routes, evicted: Counter, shutdown: Shutdown) {
    let places = Places::new(limits.size);
    let refusals = LogLimiter::default();
    let accepting = async {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    // An IPv4 peer of an IPv6 listener is the same peer as on an IPv4 listener.
                    let place = places.take(peer.ip().to_canonical()).await;
                    let (held, evicted) = (shutdown.guard(), evicted.clone());
                    tokio::spawn(
                        connection(limits, stream, routes.clone(), shutdown.drain.clone(), place, evicted, held).in_current_span(),
                    );
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

/// Serves one connection to its end.
pub(super) async fn connection(
    limits: Limits,
    stream: TcpStream,
    routes: Routes,
    drain: CancellationToken,
    place: Place,
    evicted: Counter,
    _held: shutdown::Guard,
) {
    let place = Arc::new(place);
    let of_request = place.clone();
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let (routes, place) = (routes.clone(), of_request.clone());
        async move { Ok::<_, Infallible>(routes.answer(request, || place.complete()).await) }
    });
    let (reader, writer) = stream.into_split();
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .keep_alive(false)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(tokio::io::join(Prompt(reader), writer)), service);
    let bounded = async {
        let mut served = std::pin::pin!(timeout(limits.connection, served));
        match drain.run_until_cancelled(served.as_mut()).await {
            Some(ended) => ended,
            None => timeout(DRAIN, served).await.and_then(|ended| ended),
        }
    };
    let ended = tokio::select! {
        // The connection first: it may find its request, and is then not evicted.
        biased;
        ended = bounded => ended,
        () = place.evicted() => {
            evicted.inc();
            tracing::debug!(target: LOG_TARGET, "HTTP connection closed: a newer one needs its place");
            return;
        }
    };
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(target: LOG_TARGET, %error, "HTTP connection failed"),
        Err(_) => tracing::debug!(target: LOG_TARGET, "HTTP connection took too long"),
    }
}

/// Reads what the kernel has, also if the runtime has not reported yet that the connection is readable. The runtime
/// reports that late on a busy machine, and a connection must not be evicted although its request has arrived.
struct Prompt(OwnedReadHalf);

impl AsyncRead for Prompt {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match recv(self.0.as_ref(), buffer.initialize_unfilled(), RecvFlags::DONTWAIT) {
            Ok((read, _)) => {
                buffer.advance(read);
                Poll::Ready(Ok(()))
            }
            // Waits until it is readable. An error is reported there too.
            Err(Errno::AGAIN | Errno::INTR) => Pin::new(&mut self.0).poll_read(context, buffer),
            Err(errno) => Poll::Ready(Err(errno.into())),
        }
    }
}
