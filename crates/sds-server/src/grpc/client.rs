//! A client connection: one HTTP/2 connection to a Unix socket, as a service for the clients that tonic generates.
//!
//! tonic's own channel reconnects and times out by itself. This connection does neither: the caller decides both, and a lost connection is
//! an error.

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

/// The sending half of an HTTP/2 connection. The connection closes when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Connection(SendRequest<Body>);

/// The connection could not be established.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No process listens on the socket, or the caller has no permission to connect.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    /// The server does not speak HTTP/2.
    #[error("the HTTP/2 handshake failed: {0}")]
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

/// Connects to the socket at `path`. Returns the connection and the future that drives it.
///
/// The caller must poll the future; it returns when the connection has ended. Calls on the connection report the error that ended it.
///
/// # Errors
///
/// [`Error::Connect`] if the socket cannot be reached, and [`Error::Handshake`] if the HTTP/2 handshake fails.
pub async fn connect(path: &Path) -> Result<(Connection, impl Future<Output = ()> + Send + use<>), Error> {
    over(UnixStream::connect(path).await.map_err(Error::Connect)?).await
}

/// Like [`connect`], over a connected socket.
///
/// # Errors
///
/// [`Error::Handshake`] if the HTTP/2 handshake fails.
pub async fn over(stream: UnixStream) -> Result<(Connection, impl Future<Output = ()> + Send + use<>), Error> {
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.map_err(Error::Handshake)?;
    Ok((Connection(sender), async move { drop(connection.await) }))
}

/// The origin for generated clients. Its authority is `localhost`, which every server accepts.
pub fn origin() -> Uri {
    Uri::from_static("http://localhost")
}
