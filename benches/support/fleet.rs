//! Many Envoys: connections with streams that accept every push, on bare HTTP/2 so that the clients cost little.

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

/// So many connect at once.
const AT_ONCE: usize = 64;
/// Nothing takes longer on a machine that works.
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

    /// How many streams there are.
    pub fn streams(&self) -> usize {
        self.streams
    }

    /// The moments at which a push reached the streams, when it has reached them all.
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

/// One stream: asks, and accepts whatever comes until the server ends.
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
