//! A caller that uses as much as it can: it connects and opens streams as fast as possible, and keeps all that it gets.

use std::{
    collections::VecDeque,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use h2::{
    RecvStream, SendStream,
    client::{ResponseFuture, SendRequest},
};
use tokio::{net::UnixStream, task::JoinSet};

use super::client::{Ask, STREAM, framed};

/// Number of concurrent workers of each kind.
const WORKERS: usize = 32;
/// Maximum number of connections without data that are kept, open or closed by the agent.
const KEPT_CONNECTIONS: usize = 8_000;
/// Number of streams that are kept on one connection before the next connection is used.
const KEPT_STREAMS: usize = 50;

/// The attempts and their results.
#[derive(Debug, Default)]
pub struct Counts {
    /// Attempts to connect.
    pub connections: AtomicU64,
    /// Of these, rejected by a full queue.
    pub queue_full: AtomicU64,
    /// Attempts to open a stream on an accepted connection.
    pub streams: AtomicU64,
    /// Of these, served.
    pub served: AtomicU64,
}

impl Counts {
    fn one(count: &AtomicU64) {
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Attempts of both kinds.
    pub fn attempts(&self) -> u64 {
        self.connections.load(Ordering::Relaxed) + self.streams.load(Ordering::Relaxed)
    }

    /// The counts as text.
    pub fn told(&self) -> String {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let Self { connections, queue_full, streams, served } = self;
        let (connections, queue_full) = (of(connections), of(queue_full));
        format!("{connections} connects ({queue_full} at a full queue), {} streams of which {} were served", of(streams), of(served))
    }
}

/// A flood in progress. Dropping it ends the flood and closes everything.
#[derive(Debug)]
pub struct Flood {
    /// The counts so far.
    pub counts: Arc<Counts>,
    _workers: JoinSet<()>,
}

impl Flood {
    /// Starts the flood.
    pub fn start(socket: &Arc<Path>) -> Self {
        let counts = Arc::<Counts>::default();
        let mut workers = JoinSet::new();
        for _ in 0..WORKERS {
            workers.spawn(take_streams(socket.clone(), counts.clone()));
            workers.spawn(take_connections(socket.clone(), counts.clone()));
        }
        Self { counts, _workers: workers }
    }
}

async fn connect(socket: &Path, counts: &Counts) -> UnixStream {
    loop {
        tokio::task::yield_now().await;
        Counts::one(&counts.connections);
        if let Ok(stream) = UnixStream::connect(socket).await {
            return stream;
        }
        Counts::one(&counts.queue_full);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn take_connections(socket: Arc<Path>, counts: Arc<Counts>) {
    let mut kept = VecDeque::new();
    loop {
        kept.push_back(connect(&socket, &counts).await);
        if kept.len() > KEPT_CONNECTIONS / WORKERS {
            kept.pop_front();
        }
    }
}

async fn take_streams(socket: Arc<Path>, counts: Arc<Counts>) {
    let (mut drivers, mut kept) = (JoinSet::new(), Vec::new());
    loop {
        while drivers.try_join_next().is_some() {}
        let stream = connect(&socket, &counts).await;
        let Ok((sender, connection)) = h2::client::handshake(stream).await else { continue };
        drivers.spawn(async move { drop(connection.await) });
        kept.extend(streams(sender, &counts).await);
    }
}

type Kept = (SendRequest<Bytes>, Vec<(SendStream<Bytes>, RecvStream)>);

/// Opens streams until [`KEPT_STREAMS`] are open, or until the connection is closed.
async fn streams(sender: SendRequest<Bytes>, counts: &Counts) -> Option<Kept> {
    let mut kept = Vec::new();
    while kept.len() < KEPT_STREAMS {
        let (response, requests) = ask(sender.clone().ready().await.ok()?)?;
        Counts::one(&counts.streams);
        let response = response.await.ok()?;
        // A status in the headers means that the stream was rejected.
        if !response.headers().contains_key("grpc-status") {
            Counts::one(&counts.served);
            kept.push((requests, response.into_body()));
        }
    }
    Some((sender, kept))
}

fn ask(mut sender: SendRequest<Bytes>) -> Option<(ResponseFuture, SendStream<Bytes>)> {
    let request = http::Request::post(format!("http://localhost{STREAM}"));
    let request = request.header("content-type", "application/grpc").header("te", "trailers").body(()).unwrap();
    let (response, mut requests) = sender.send_request(request, false).ok()?;
    requests.send_data(framed(&Ask::small("default")), false).ok()?;
    Some((response, requests))
}
