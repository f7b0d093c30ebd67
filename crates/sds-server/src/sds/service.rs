//! The service. It connects the stream state with requests, the store and the bundles, and does the I/O.
//!
//! A stream stays open without a response while a certificate is being issued, the bundle is unknown or the issuer is unavailable. A stream
//! ends when its client ends it or breaks the protocol, when its workload has ended or no longer has an identity, and at shutdown.

use std::sync::Arc;

use agent_runtime::clock::Clock;
use bytes::Bytes;
use http::{Request, Response};
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
    grpc::{
        self, Body,
        request::{Inbox, MessageKind},
    },
    limits::Limits,
    material::Svid,
    sds::encoded::Variant,
    store::Store,
    trust::{Bundle, BundleSet},
};

mod drive;
mod fetch;

/// The full name of the gRPC service.
pub const SERVICE: &str = "envoy.service.secret.v3.SecretDiscoveryService";

/// The secret discovery service. All connections share it.
#[derive(Debug)]
pub struct Service {
    /// The certificates.
    pub store: Arc<Store>,
    /// The trust bundles.
    pub trust: watch::Receiver<Arc<BundleSet>>,
    /// Maps resource names to targets.
    pub directory: Directory,
    /// The wall clock.
    pub clock: Arc<dyn Clock>,
    /// Limits of message size and names.
    pub limits: Limits,
    /// Metrics of the service.
    pub metrics: Metrics,
    /// The window for reissuing certificates after a change of the configuration.
    pub reissue_window: watch::Receiver<ReissueWindow>,
    /// Ends every stream and call with UNAVAILABLE.
    pub ending: CancellationToken,
}

/// The resources that are available now, for one caller.
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
    /// The kind of messages of a call with this path. Those of other services are [`Other`](MessageKind::Other).
    pub fn kind(&self, path: &str) -> MessageKind {
        match method(path) {
            Some("StreamSecrets" | "FetchSecrets") => MessageKind::Sotw,
            Some("DeltaSecrets") => MessageKind::Delta,
            _ => MessageKind::Other,
        }
    }

    /// Serves a call of this service. Returns `None` if the service has no such method.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future cancels the call. For a stream, dropping the body of the response ends the stream and its lease.
    pub async fn call(self: &Arc<Self>, connection: &Arc<Connection>, request: Request<Inbox>) -> Option<Response<Body>> {
        match method(request.uri().path())? {
            "StreamSecrets" => Some(self.stream(connection, request, Variant::Sotw)),
            "DeltaSecrets" => Some(self.stream(connection, request, Variant::Delta)),
            "FetchSecrets" => Some(grpc::unary(self.fetch(connection, request).await)),
            _ => None,
        }
    }

    fn stream(self: &Arc<Self>, connection: &Arc<Connection>, request: Request<Inbox>, variant: Variant) -> Response<Body> {
        let mut incoming = request.into_body();
        let (service, connection) = (self.clone(), connection.clone());
        grpc::streaming(move |sender| async move {
            service.metrics.streams.inc();
            let _open = scopeguard(&service.metrics);
            service.drive(&connection, &mut incoming, variant, sender).await
        })
    }
}

/// The method of this service that a path names.
fn method(path: &str) -> Option<&str> {
    path.strip_prefix('/')?.strip_prefix(SERVICE)?.strip_prefix('/')
}

/// Whether `target` is available now or will be: a certificate can be issued, and the own bundle will be loaded.
fn is_known(target: &Target, bundles: &BundleSet) -> bool {
    match target {
        Target::Unknown => false,
        Target::FederatedBundle(domain) => bundles.federated.contains_key(domain),
        Target::Certificate | Target::OwnBundle => true,
    }
}

/// Returns when the material has changed. Pending forever without a lease.
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

/// Returns a guard that counts the stream as closed when it is dropped.
fn scopeguard(metrics: &Metrics) -> impl Drop + use<> {
    struct Open(prometheus_client::metrics::gauge::Gauge);
    impl Drop for Open {
        fn drop(&mut self) {
            self.0.dec();
        }
    }
    Open(metrics.streams.clone())
}
