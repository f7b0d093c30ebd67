//! One HTTP/2 connection to a Unix socket, as a tonic client.
//!
//! tonic's own channel would reconnect and time out by itself; here both are decided by the caller, and a lost connection is an error.

use std::{
    path::Path,
    task::{Context, Poll},
};

use futures::future::BoxFuture;
use http::{Request, Response, Uri};
use hyper::{
    body::Incoming,
    client::conn::http2::{self, SendRequest},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::UnixStream, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, body::Body};
use tower::Service;

use super::failure::Failure;
use crate::proto::envoy::service::{
    discovery::v3::{DiscoveryRequest, DiscoveryResponse},
    secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient,
};

/// A client on one connection.
pub type Client = SecretDiscoveryServiceClient<Connection>;

/// The sending half of an HTTP/2 connection. The connection ends with its last holder.
#[derive(Debug, Clone)]
pub struct Connection(SendRequest<Body>);

impl Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// Connects. The authority sent is `localhost`, which every server accepts.
pub async fn connect(path: &Path) -> Result<Client, Failure> {
    let stream = UnixStream::connect(path).await.map_err(|source| Failure::Connect { path: path.to_owned(), source })?;
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (sender, connection) = handshake.map_err(|source| Failure::Handshake { path: path.to_owned(), source })?;
    // Its end reaches the calls on it as their error.
    tokio::spawn(connection);
    Ok(Client::with_origin(Connection(sender), Uri::from_static("http://localhost")))
}

/// Opens a stream with its first request. What is sent into the first half goes to the server.
pub async fn stream(
    client: &mut Client,
    first: DiscoveryRequest,
) -> Result<(mpsc::Sender<DiscoveryRequest>, Streaming<DiscoveryResponse>), Failure> {
    let (sender, receiver) = mpsc::channel(4);
    // There is room for it.
    let _ = sender.try_send(first);
    let responses = client.stream_secrets(ReceiverStream::new(receiver)).await.map_err(Failure::status)?;
    Ok((sender, responses.into_inner()))
}
