//! The service: it joins a request's stream, the pure state, the store and the bundles, and does the I/O.
//!
//! Streams are held, not failed: while a certificate is being issued, while the bundle is unknown, while the upstream is down. A stream
//! ends when its client ends it, when its workload has ended or has no identity any more, when the agent drains, or by an error of the client.

use std::sync::Arc;

use agent_runtime::clock::Clock;
use bytes::Bytes;
use http::{Request, Response};
use http_body::Body as HttpBody;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{
    metrics::{Kind, Metrics},
    names::{Directory, Target},
    reissue_window::ReissueWindow,
    secret,
    stream::Violation,
};
use crate::{
    caller::Connection,
    grpc::{self, Body, Incoming},
    limits::Limits,
    material::Svid,
    sds::encoded::Variant,
    store::Store,
    trust::{Bundle, BundleSet},
};

mod drive;
mod fetch;

/// The service's path on the wire.
pub const SERVICE: &str = "envoy.service.secret.v3.SecretDiscoveryService";

/// The secret discovery service, for every connection.
#[derive(Debug)]
pub struct Service {
    /// Where certificates are.
    pub store: Arc<Store>,
    /// Where bundles are.
    pub trust: watch::Receiver<Arc<BundleSet>>,
    /// What names mean.
    pub directory: Directory,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// What one stream may ask.
    pub limits: Limits,
    /// What is counted.
    pub metrics: Metrics,
    /// Over which time certificates are issued anew that a change of the configuration has made foreign.
    pub reissue_window: watch::Receiver<ReissueWindow>,
    /// Ends every stream.
    pub ending: CancellationToken,
}

/// What exists now, for one caller.
struct View {
    svid: Option<Arc<Svid>>,
    bundles: Arc<BundleSet>,
}

impl View {
    fn bundle(&self, target: &Target) -> Option<&Arc<Bundle>> {
        match target {
            Target::OwnBundle => self.bundles.own.as_ref(),
            Target::FederatedBundle(domain) => self.bundles.federated.get(domain),
            Target::Certificate | Target::Unknown => None,
        }
    }

    fn version(&self, target: &Target) -> Option<&str> {
        match target {
            Target::Certificate => self.svid.as_ref().map(|svid| svid.version()),
            target => self.bundle(target).map(|bundle| bundle.version()),
        }
    }

    fn has_all(&self, known: &[(String, Target)]) -> bool {
        known.iter().all(|(_, target)| self.version(target).is_some())
    }

    fn resource(&self, target: &Target, variant: Variant, name: &str) -> Option<(Kind, Bytes)> {
        match target {
            Target::Certificate => self.svid.as_ref().map(|svid| (Kind::certificate, secret::certificate(svid, variant, name))),
            target => self.bundle(target).map(|bundle| (Kind::bundle, secret::bundle(bundle, variant, name))),
        }
    }
}

impl Service {
    /// Answers a call of this service; `None` when the method is not one of it.
    pub async fn call<B>(self: &Arc<Self>, connection: &Arc<Connection>, request: Request<B>) -> Option<Response<Body>>
    where
        B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
        B::Error: std::fmt::Display,
    {
        let method = request.uri().path().strip_prefix('/')?.strip_prefix(SERVICE)?.strip_prefix('/')?;
        match method {
            "StreamSecrets" => Some(self.stream(connection, request, Variant::Sotw)),
            "DeltaSecrets" => Some(self.stream(connection, request, Variant::Delta)),
            "FetchSecrets" => Some(grpc::unary(self.fetch(connection, request).await)),
            _ => None,
        }
    }

    fn stream<B>(self: &Arc<Self>, connection: &Arc<Connection>, request: Request<B>, variant: Variant) -> Response<Body>
    where
        B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
        B::Error: std::fmt::Display,
    {
        let mut incoming = Incoming::new(request.into_body(), self.limits.message_bytes);
        let (service, connection) = (self.clone(), connection.clone());
        grpc::streaming(move |sender| async move {
            service.metrics.streams.inc();
            let _open = scopeguard(&service.metrics);
            service.drive(&connection, &mut incoming, variant, sender).await
        })
    }
}

/// Whether `target` will have an answer, now or soon: a certificate can be issued, and the own bundle comes.
fn is_known(target: &Target, bundles: &BundleSet) -> bool {
    match target {
        Target::Unknown => false,
        Target::FederatedBundle(domain) => bundles.federated.contains_key(domain),
        Target::Certificate | Target::OwnBundle => true,
    }
}

/// Returns when there is something new; never without something to watch.
async fn changed(material: Option<&mut watch::Receiver<Option<Arc<Svid>>>>) {
    let ended = match material {
        Some(material) => material.changed().await.is_err(),
        None => true,
    };
    if ended {
        std::future::pending::<()>().await;
    }
}

fn violation(error: &Violation) -> Status {
    match error {
        Violation::TypeUrl(_) => Status::invalid_argument(error.to_string()),
        Violation::TooManyNames(_) => Status::resource_exhausted(error.to_string()),
    }
}

fn ended() -> Status {
    Status::permission_denied("the workload has ended")
}

/// Counts the stream as closed when it is dropped, however it ends.
fn scopeguard(metrics: &Metrics) -> impl Drop + use<> {
    struct Open(prometheus_client::metrics::gauge::Gauge);
    impl Drop for Open {
        fn drop(&mut self) {
            self.0.dec();
        }
    }
    Open(metrics.streams.clone())
}
