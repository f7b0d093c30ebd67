//! A scripted SDS server on a real Unix socket, for the tests of `fetch`.

use std::{convert::Infallible, path::PathBuf, sync::Arc};

use futures::future::BoxFuture;
use http::{Request, Response};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use sds_server::proto::envoy::service::discovery::v3::{DiscoveryRequest, DiscoveryResponse};
use tokio::{
    net::UnixListener,
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, body::Body, server::Grpc};
use tonic_prost::ProstCodec;
use tower::Service;

type Codec = ProstCodec<DiscoveryResponse, DiscoveryRequest>;
type Answer = Result<DiscoveryResponse, Status>;
type FetchScript = Arc<dyn Fn(DiscoveryRequest, &http::HeaderMap) -> Answer + Send + Sync>;

/// One open stream: the client's requests, and the sender of responses.
pub(crate) struct Opened {
    pub requests: Streaming<DiscoveryRequest>,
    pub responses: mpsc::Sender<Answer>,
}

/// A server that answers `FetchSecrets` with a script and passes streams to the test. Dropping it ends its connections.
pub(crate) struct Server {
    pub path: PathBuf,
    pub streams: mpsc::Receiver<Opened>,
    accepting: JoinHandle<()>,
}

impl Server {
    pub(crate) fn start(path: PathBuf, fetch: impl Fn(DiscoveryRequest, &http::HeaderMap) -> Answer + Send + Sync + 'static) -> Self {
        let listener = UnixListener::bind(&path).unwrap();
        let (opened, streams) = mpsc::channel(8);
        let script = Script { fetch: Arc::new(fetch), opened };
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let script = script.clone();
                let serve = service_fn(move |request| script.clone().serve(request));
                connections.spawn(http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), serve));
            }
        });
        Self { path, streams, accepting }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

#[derive(Clone)]
struct Script {
    fetch: FetchScript,
    opened: mpsc::Sender<Opened>,
}

impl Script {
    async fn serve(self, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let mut grpc = Grpc::new(Codec::default());
        Ok(match request.uri().path() {
            "/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets" => grpc.unary(self, request).await,
            "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets" => grpc.streaming(self, request).await,
            _ => Status::unimplemented("").into_http(),
        })
    }
}

impl Service<tonic::Request<DiscoveryRequest>> for Script {
    type Response = tonic::Response<DiscoveryResponse>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Self::Response, Status>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Status>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: tonic::Request<DiscoveryRequest>) -> Self::Future {
        let headers = request.metadata().clone().into_headers();
        let answer = (self.fetch)(request.into_inner(), &headers).map(tonic::Response::new);
        Box::pin(async { answer })
    }
}

impl Service<tonic::Request<Streaming<DiscoveryRequest>>> for Script {
    type Response = tonic::Response<ReceiverStream<Answer>>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Self::Response, Status>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Status>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: tonic::Request<Streaming<DiscoveryRequest>>) -> Self::Future {
        let opened = self.opened.clone();
        Box::pin(async move {
            let (responses, answers) = mpsc::channel(8);
            let _ = opened.send(Opened { requests: request.into_inner(), responses }).await;
            Ok(tonic::Response::new(ReceiverStream::new(answers)))
        })
    }
}
