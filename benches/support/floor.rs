//! The floor: a unary echo as a user of tonic would write it, on tonic's own server with its defaults, and without the router that
//! several services would need.

use std::{
    convert::Infallible,
    path::Path,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{
    Status,
    body::Body,
    server::{Grpc, UnaryService},
    transport::Server,
};
use tonic_prost::ProstCodec;
use tower::Service;

use super::client::{Ask, Reply, connect, unary};

/// The method of the echo. Its path is as long as the agent's, because the cost of a path depends on its length.
pub const ECHO: &str = "/bench.floor.what.tonic.needs.v1.UnaryEchoOnSocket/EchoBytes";

/// Answers every request with the same bytes, in the form of the code that tonic generates for a service of one method.
#[derive(Clone)]
struct Floor(Arc<Reply>);

struct Echo(Arc<Reply>);

impl UnaryService<Ask> for Echo {
    type Response = Reply;
    type Future = BoxFuture<'static, Result<tonic::Response<Reply>, Status>>;

    fn call(&mut self, _: tonic::Request<Ask>) -> Self::Future {
        let reply = self.0.clone();
        Box::pin(async move { Ok(tonic::Response::new(Reply::clone(&reply))) })
    }
}

impl Service<Request<Body>> for Floor {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let reply = self.0.clone();
        match request.uri().path() {
            ECHO => Box::pin(async move {
                let mut grpc = Grpc::new(ProstCodec::<Reply, Ask>::default());
                Ok(grpc.unary(Echo(reply), request).await)
            }),
            _ => Box::pin(async { Ok(Status::unimplemented("").into_http()) }),
        }
    }
}

/// Serves at `path`, with answers of the size of `like`.
pub fn start(path: &Path, like: &Reply) {
    let size = prost::Message::encoded_len(like);
    // The tag and the length take three bytes.
    let reply = Reply { resource: Bytes::from(vec![b'r'; size - 3]), ..Reply::default() };
    let listener = UnixListenerStream::new(UnixListener::bind(path).unwrap());
    tokio::spawn(Server::builder().serve_with_incoming(Floor(Arc::new(reply)), listener));
}

/// Connects and receives one answer to a first request of the size of Envoy's.
pub async fn first_answer(path: Arc<Path>) {
    let mut client = connect(&path).await;
    let reply = unary(&mut client, ECHO, Ask::envoy("default")).await;
    assert!(!reply.resource.is_empty());
}
