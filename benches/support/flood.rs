//! A caller that takes all it can get: connects and opens streams as fast as it can, and keeps what it is given.

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

/// So many of each kind try at once.
const WORKERS: usize = 32;
/// Connections without a word, open or closed by the agent, that are kept in all.
const KEPT_CONNECTIONS: usize = 8_000;
/// Streams that one connection keeps; then it wants another connection.
const KEPT_STREAMS: usize = 50;

/// What it has tried and got.
#[derive(Debug, Default)]
pub struct Counts {
    /// Attempts to connect.
    pub connections: AtomicU64,
    /// Of these, turned away by a full queue.
    pub queue_full: AtomicU64,
    /// Attempts to open a stream on a connection that was taken on.
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

    /// In words.
    pub fn told(&self) -> String {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let Self { connections, queue_full, streams, served } = self;
        let (connections, queue_full) = (of(connections), of(queue_full));
        format!("{connections} connects ({queue_full} at a full queue), {} streams of which {} were served", of(streams), of(served))
    }
}

/// A flood under way. Dropping it ends it and gives everything back.
#[derive(Debug)]
pub struct Flood {
    /// So far.
    pub counts: Arc<Counts>,
    _workers: JoinSet<()>,
}

impl Flood {
    /// Begins.
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

/// Opens streams until there are enough, or until the connection is closed.
async fn streams(sender: SendRequest<Bytes>, counts: &Counts) -> Option<Kept> {
    let mut kept = Vec::new();
    while kept.len() < KEPT_STREAMS {
        let (response, requests) = ask(sender.clone().ready().await.ok()?)?;
        Counts::one(&counts.streams);
        let response = response.await.ok()?;
        // The status in the head: refused.
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
