//! Many Envoys: connections with streams that acknowledge every push, on HTTP/2 without tonic so that the clients use little processor
//! time.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes, BytesMut};
use futures::{StreamExt, future, stream};
use h2::client::SendRequest;
use prost::Message;
use sds_server::grpc::PREFIX;
use tokio::{
    net::UnixStream,
    sync::{
        mpsc::{self, UnboundedReceiver, UnboundedSender},
        oneshot,
    },
    task::JoinSet,
    time::timeout,
};

use super::client::{Ask, Reply, STREAM, framed};

/// Number of connections that are opened concurrently.
const AT_ONCE: usize = 64;
/// Limit for each step, which a working machine never reaches.
const PATIENCE: Duration = Duration::from_secs(60);

/// Open connections. Dropping them closes them.
pub struct Fleet {
    streams: usize,
    pushes: UnboundedReceiver<Instant>,
    _tasks: Vec<JoinSet<()>>,
}

impl Fleet {
    /// Opens `connections`, each with one stream for each first request, and returns when every stream has its first secret.
    pub async fn open(socket: &Path, connections: usize, firsts: &[Ask]) -> Self {
        let (told, pushes) = mpsc::unbounded_channel();
        let opening = stream::iter(0..connections).map(|_| connect(socket, firsts, &told)).buffer_unordered(AT_ONCE).collect();
        let tasks = timeout(PATIENCE, opening).await.unwrap();
        let mut fleet = Self { streams: connections * firsts.len(), pushes, _tasks: tasks };
        fleet.pushed().await;
        fleet
    }

    /// The number of streams.
    pub fn streams(&self) -> usize {
        self.streams
    }

    /// Waits until a push has reached all streams; returns the time of each.
    pub async fn pushed(&mut self) -> Vec<Instant> {
        let mut moments = Vec::with_capacity(self.streams);
        while moments.len() < self.streams {
            let missing = self.streams - moments.len();
            timeout(PATIENCE, self.pushes.recv_many(&mut moments, missing)).await.unwrap();
        }
        moments
    }
}

async fn connect(socket: &Path, firsts: &[Ask], told: &UnboundedSender<Instant>) -> JoinSet<()> {
    let stream = UnixStream::connect(socket).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { drop(connection.await) });
    let mut ready = Vec::new();
    for first in firsts {
        let (done, waiting) = oneshot::channel();
        tasks.spawn(watch(sender.clone(), first.clone(), told.clone(), done));
        ready.push(waiting);
    }
    future::try_join_all(ready).await.unwrap();
    tasks
}

/// One stream: sends the first request, and acknowledges every response until the server ends.
async fn watch(sender: SendRequest<Bytes>, first: Ask, told: UnboundedSender<Instant>, done: oneshot::Sender<()>) {
    let request = http::Request::post(format!("http://localhost{STREAM}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap();
    let (response, mut requests) = sender.ready().await.unwrap().send_request(request, false).unwrap();
    let name = first.names[0].clone();
    requests.send_data(framed(&first), false).unwrap();
    drop(first);
    let mut replies = response.await.unwrap().into_body();
    let (mut buffer, mut done) = (BytesMut::new(), Some(done));
    while let Some(Ok(chunk)) = replies.data().await {
        let _ = replies.flow_control().release_capacity(chunk.len());
        buffer.extend_from_slice(&chunk);
        while let Some(message) = unframed(&mut buffer) {
            let _ = told.send(Instant::now());
            let reply = Reply::decode(message).unwrap();
            if requests.send_data(framed(&Ask::ack(&name, reply)), false).is_err() {
                return;
            }
            if let Some(done) = done.take() {
                let _ = done.send(());
            }
        }
        if buffer.is_empty() {
            buffer = BytesMut::new();
        }
    }
}

fn unframed(buffer: &mut BytesMut) -> Option<Bytes> {
    let length = u32::from_be_bytes(buffer.get(1..PREFIX)?.try_into().unwrap()) as usize;
    if buffer.len() < PREFIX + length {
        return None;
    }
    buffer.advance(PREFIX);
    Some(buffer.split_to(length).freeze())
}
