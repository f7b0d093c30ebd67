//! One HTTP/2 connection to a Unix socket, as a service for tonic's generated clients.
//!
//! tonic's own channel would reconnect and time out by itself; here both are decided by the caller, and a lost connection is an error.

use std::{
    future::Future,
    io,
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
use tokio::net::UnixStream;
use tonic::body::Body;
use tower::Service;

/// The sending half of an HTTP/2 connection. The connection ends with its last holder.
#[derive(Debug, Clone)]
pub struct Connection(SendRequest<Body>);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens, or the caller may not connect.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    /// Who listens does not speak HTTP/2.
    #[error("no HTTP/2: {0}")]
    Handshake(#[source] hyper::Error),
}

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

/// Connects to the socket at `path`. The second half drives the connection and returns when it has ended; its error reaches the calls
/// on the connection, too.
pub async fn connect(path: &Path) -> Result<(Connection, impl Future<Output = ()> + Send + use<>), Error> {
    let stream = UnixStream::connect(path).await.map_err(Error::Connect)?;
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.map_err(Error::Handshake)?;
    Ok((Connection(sender), async move { drop(connection.await) }))
}

/// The origin that generated clients are given: its authority, `localhost`, is one that every server accepts.
pub fn origin() -> Uri {
    Uri::from_static("http://localhost")
}
