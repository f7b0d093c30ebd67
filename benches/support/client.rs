//! One HTTP/2 connection on a Unix socket as a tonic client, used for the agent and the floor, and the messages of a call.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use http::uri::PathAndQuery;
use prost::Message;
use sds_server::{
    grpc::{
        PREFIX,
        client::{self, Connection, Error},
        prefix,
    },
    sds::stream::TYPE_URL,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, client::Grpc};
use tonic_prost::ProstCodec;

/// `FetchSecrets` of the agent.
pub const FETCH: &str = "/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets";
/// `StreamSecrets` of the agent.
pub const STREAM: &str = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets";

/// Bytes of `node` in a real Envoy's first request.
const NODE: usize = 61_000;

/// A `DiscoveryRequest` with its node, which the agent ignores.
#[derive(Clone, PartialEq, Message)]
pub struct Ask {
    #[prost(string, tag = "1")]
    pub version: String,
    #[prost(bytes = "bytes", tag = "2")]
    pub node: Bytes,
    #[prost(string, repeated, tag = "3")]
    pub names: Vec<String>,
    #[prost(string, tag = "4")]
    pub type_url: String,
    #[prost(string, tag = "5")]
    pub nonce: String,
}

impl Ask {
    /// 84 bytes on the wire, including the gRPC prefix.
    pub fn small(name: &str) -> Self {
        Self { names: vec![name.to_owned()], type_url: TYPE_URL.to_owned(), ..Self::default() }
    }

    /// As large as the first request of a real Envoy.
    pub fn envoy(name: &str) -> Self {
        Self { node: Bytes::from_static(&[b'n'; NODE]), ..Self::small(name) }
    }

    /// Acknowledges `reply`.
    pub fn ack(name: &str, reply: Reply) -> Self {
        Self { version: reply.version, nonce: reply.nonce, ..Self::small(name) }
    }
}

/// A `DiscoveryResponse` with one resource, which stays encoded.
#[derive(Clone, PartialEq, Message)]
pub struct Reply {
    #[prost(string, tag = "1")]
    pub version: String,
    #[prost(bytes = "bytes", tag = "2")]
    pub resource: Bytes,
    #[prost(string, tag = "5")]
    pub nonce: String,
}

/// A client on one connection. Clones share it.
pub type Client = Grpc<Connection>;

/// Connects, and retries until the server listens.
pub async fn connect(path: &Path) -> Client {
    let (connection, driver) = loop {
        match client::connect(path).await {
            Err(Error::Connect(_)) => tokio::time::sleep(Duration::from_millis(5)).await,
            connected => break connected.unwrap(),
        }
    };
    tokio::spawn(driver);
    Grpc::with_origin(connection, client::origin())
}

/// One unary call.
pub async fn unary(client: &mut Client, path: &'static str, ask: Ask) -> Reply {
    client.ready().await.unwrap();
    let codec = ProstCodec::<Ask, Reply>::default();
    client.unary(tonic::Request::new(ask), PathAndQuery::from_static(path), codec).await.unwrap().into_inner()
}

/// Opens a stream; the sender is the client's half.
pub async fn stream(client: &mut Client, first: Ask) -> (mpsc::Sender<Ask>, Streaming<Reply>) {
    let (sender, receiver) = mpsc::channel(4);
    sender.send(first).await.unwrap();
    client.ready().await.unwrap();
    let codec = ProstCodec::<Ask, Reply>::default();
    let request = tonic::Request::new(ReceiverStream::new(receiver));
    (sender, client.streaming(request, PathAndQuery::from_static(STREAM), codec).await.unwrap().into_inner())
}

/// The work before a workload has its first secret: connect, open a stream as an Envoy does, and receive the secret.
pub async fn first_secret(path: Arc<Path>, name: &str) {
    let mut client = connect(&path).await;
    let (_sender, mut replies) = stream(&mut client, Ask::envoy(name)).await;
    let reply = replies.message().await.unwrap().unwrap();
    assert!(!reply.resource.is_empty());
}

/// A message in gRPC framing.
pub fn framed(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    let mut out = BytesMut::with_capacity(PREFIX + len);
    out.put_slice(&prefix(len));
    message.encode(&mut out).unwrap();
    out.freeze()
}
