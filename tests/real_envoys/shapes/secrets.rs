//! A server of secrets that serves each shape as it is, and counts what Envoy rejects.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex},
};

use futures::{Stream, StreamExt, future::BoxFuture};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use prost_types::Any;
use sds_server::proto::envoy::{
    config::core::v3::{DataSource, data_source::Specifier},
    extensions::transport_sockets::tls::v3::{CertificateValidationContext, Secret, TlsCertificate, secret::Type},
    service::discovery::v3::{DiscoveryRequest, DiscoveryResponse},
};
use tokio::net::UnixListener;
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    server::{Grpc, StreamingService},
};
use tonic_prost::ProstCodec;

use super::envoys::Trial;

const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// The secrets by name, and the answers to them.
#[derive(Clone)]
pub struct Secrets(Arc<Inner>);

struct Inner {
    secrets: BTreeMap<String, Vec<u8>>,
    /// The names whose secret was rejected, and those whose secret was accepted.
    answered: Mutex<(BTreeSet<String>, BTreeSet<String>)>,
}

impl Secrets {
    pub fn of(trials: &[Trial]) -> Self {
        let source = |text: &str| Some(DataSource { specifier: Some(Specifier::InlineBytes(text.as_bytes().to_vec().into())) });
        let mut secrets = BTreeMap::new();
        for trial in trials {
            let chain = Type::TlsCertificate(TlsCertificate { certificate_chain: source(&trial.chain), private_key: source(&trial.key) });
            let roots = Type::ValidationContext(CertificateValidationContext {
                trusted_ca: source(&trial.roots),
                crl: trial.lists.as_deref().and_then(source),
            });
            for (kind, content) in [("chain", chain), ("roots", roots)] {
                let name = format!("{kind}-{}", trial.id);
                secrets.insert(name.clone(), Secret { name, r#type: Some(content) }.encode_to_vec());
            }
        }
        Self(Arc::new(Inner { secrets, answered: Mutex::default() }))
    }

    /// Serves on a socket at `path` until the returned task is dropped.
    pub fn serve(&self, path: &Path) -> tokio::task::JoinHandle<()> {
        let listener = UnixListener::bind(path).expect("a socket");
        let secrets = self.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("a connection");
                let secrets = secrets.clone();
                let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
                    let secrets = secrets.clone();
                    async move { Ok::<_, Infallible>(Grpc::new(ProstCodec::default()).streaming(secrets, request.map(Body::new)).await) }
                });
                let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .max_concurrent_streams(None)
                    .serve_connection(TokioIo::new(stream), service);
                tokio::spawn(connection);
            }
        })
    }

    /// The names of the rejected secrets. `None` until all secrets are answered.
    pub fn rejected(&self) -> Option<BTreeSet<String>> {
        let answered = self.0.answered.lock().expect("not poisoned");
        (answered.0.len() + answered.1.len() >= self.0.secrets.len()).then(|| answered.0.clone())
    }

    fn answer(&self, request: &DiscoveryRequest) -> Option<DiscoveryResponse> {
        let [name] = &request.resource_names[..] else { return None };
        if !request.response_nonce.is_empty() {
            let mut answered = self.0.answered.lock().expect("not poisoned");
            let (rejected, accepted) = &mut *answered;
            if request.error_detail.is_some() { rejected } else { accepted }.insert(name.clone());
            return None;
        }
        let value = self.0.secrets.get(name).unwrap_or_else(|| panic!("no secret {name}")).clone();
        Some(DiscoveryResponse {
            version_info: "1".to_owned(),
            resources: vec![Any { type_url: TYPE_URL.to_owned(), value }],
            type_url: TYPE_URL.to_owned(),
            nonce: "1".to_owned(),
        })
    }
}

impl StreamingService<DiscoveryRequest> for Secrets {
    type Response = DiscoveryResponse;
    type ResponseStream = Pin<Box<dyn Stream<Item = Result<DiscoveryResponse, Status>> + Send>>;
    type Future = BoxFuture<'static, Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<DiscoveryRequest>>) -> Self::Future {
        let secrets = self.clone();
        let answers = request.into_inner().filter_map(move |request| {
            let answer = request.map(|request| secrets.answer(&request)).transpose();
            std::future::ready(answer)
        });
        Box::pin(std::future::ready(Ok(Response::new(Box::pin(answers) as Self::ResponseStream))))
    }
}
