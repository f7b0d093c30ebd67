//! A client's connection at the level of the wire: the client of the `h2` crate, with gRPC framing in the test.

use std::{future::poll_fn, path::Path};

use bytes::Bytes;
use h2::{RecvStream, SendStream, client};
use http::Request;
use prost::Message;
use sds_server::{
    grpc::{PREFIX, prefix},
    proto::envoy::service::discovery::v3::{DiscoveryRequest, DiscoveryResponse},
    sds::service::SERVICE,
};
use tokio::{net::UnixStream, task::JoinHandle};
use tonic::{Code, Status};

use super::bench::soon;

pub struct Link {
    requests: client::SendRequest<Bytes>,
    connection: JoinHandle<Result<(), h2::Error>>,
}

pub struct Call {
    pub say: SendStream<Bytes>,
    response: Option<client::ResponseFuture>,
    body: Option<RecvStream>,
    pending: Vec<u8>,
}

impl Link {
    pub async fn connect(path: &Path) -> Self {
        Self::with(path, &client::Builder::new()).await
    }

    pub async fn with(path: &Path, builder: &client::Builder) -> Self {
        let stream = UnixStream::connect(path).await.unwrap();
        let (requests, connection) = soon("the connection", builder.handshake(stream)).await.unwrap();
        Self { requests, connection: tokio::spawn(connection) }
    }

    /// Starts a call of `path`.
    pub async fn call(&mut self, path: &str) -> Call {
        let request = Request::post(format!("http://localhost/{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .unwrap();
        poll_fn(|cx| self.requests.poll_ready(cx)).await.unwrap();
        let (response, say) = self.requests.send_request(request, false).unwrap();
        Call { say, response: Some(response), body: None, pending: Vec::new() }
    }

    /// Opens a stream.
    pub async fn stream(&mut self) -> Call {
        self.call(&format!("{SERVICE}/StreamSecrets")).await
    }

    /// Opens a stream and requests `names`.
    pub async fn asking(&mut self, names: &[&str]) -> Call {
        let mut call = self.stream().await;
        call.ask(names);
        call
    }

    /// Waits for the end of the connection.
    pub async fn ended(self) {
        // A reset is an end, as a GOAWAY is.
        let _ = soon("the connection's end", self.connection).await.unwrap();
    }

    pub fn is_open(&self) -> bool {
        !self.connection.is_finished()
    }
}

/// A framed request for `names`, with `node` additional bytes in the node metadata, where an Envoy describes itself.
pub fn request(names: &[&str], node: usize) -> Bytes {
    let names = names.iter().map(|n| (*n).to_owned()).collect();
    let mut message = DiscoveryRequest { resource_names: names, ..Default::default() }.encode_to_vec();
    prost::encoding::bytes::encode(2, &vec![7; node], &mut message);
    Bytes::from([&prefix(message.len())[..], &message].concat())
}

impl Call {
    pub fn ask(&mut self, names: &[&str]) {
        self.say.send_data(request(names, 0), false).unwrap();
    }

    /// Sends `bytes` and returns when the server's windows have accepted all of them.
    pub async fn send_through(&mut self, mut bytes: Bytes) {
        while !bytes.is_empty() {
            self.say.reserve_capacity(bytes.len());
            let room = soon("room", poll_fn(|cx| self.say.poll_capacity(cx))).await.unwrap().unwrap();
            self.say.send_data(bytes.split_to(room.min(bytes.len())), false).unwrap();
        }
    }

    pub async fn headers(&mut self) -> http::HeaderMap {
        let response = soon("the response", self.response.take().expect("requested once")).await.unwrap();
        let (head, body) = response.into_parts();
        self.body = Some(body);
        head.headers
    }

    async fn data(&mut self) -> Option<Bytes> {
        if self.body.is_none() {
            self.headers().await;
        }
        let body = self.body.as_mut().unwrap();
        let data = soon("data", body.data()).await?.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        Some(data)
    }

    /// The next response.
    pub async fn reply(&mut self) -> DiscoveryResponse {
        loop {
            if self.pending.len() >= PREFIX {
                let end = PREFIX + u32::from_be_bytes(self.pending[1..PREFIX].try_into().unwrap()) as usize;
                if self.pending.len() >= end {
                    let message: Vec<u8> = self.pending.drain(..end).skip(PREFIX).collect();
                    return DiscoveryResponse::decode(&message[..]).unwrap();
                }
            }
            let data = self.data().await.expect("a response before the stream's end");
            self.pending.extend_from_slice(&data);
        }
    }

    /// The final status; asserts that no message comes before it.
    pub async fn end(&mut self) -> (Code, String) {
        if self.body.is_none() {
            let headers = self.headers().await;
            if headers.contains_key("grpc-status") {
                return status(&headers);
            }
        }
        assert!(self.data().await.is_none(), "a message before the status");
        let trailers = soon("trailers", self.body.as_mut().unwrap().trailers()).await.unwrap().expect("trailers");
        status(&trailers)
    }
}

fn status(headers: &http::HeaderMap) -> (Code, String) {
    let status = Status::from_header_map(headers).expect("a status");
    (status.code(), status.message().to_owned())
}

/// The names of a response's secrets.
pub fn names(response: &DiscoveryResponse) -> Vec<String> {
    use sds_server::proto::envoy::extensions::transport_sockets::tls::v3::Secret;
    response.resources.iter().map(|any| Secret::decode(&any.value[..]).unwrap().name).collect()
}
