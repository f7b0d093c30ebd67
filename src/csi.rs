//! Sockets of pods: the agent as a CSI driver that gives each pod a directory with a socket of its own.
//!
//! A pod's inline volume becomes `<directory>/<pod uid>/<volume>`, with a socket in it that knows its callers by the mount, mounted
//! read-only where the kubelet wants it. The kubelet finds the driver by its registration socket; both are served here, without a sidecar.
//! The driver stands in the way of pods that start and end, so nothing here waits for the upstream: a socket is there at once, and
//! whoever calls it waits in an open stream. The directories are the record: a restart binds again inside them, as their inodes are what
//! pods have mounted.
//!
//! The caller runs [`Driver::run`] until the streams have ended; volumes are published and unpublished to the last.

use std::{path::PathBuf, sync::Arc, time::Duration};

use attest_kubernetes::pods::Pods;
use futures::future::join_all;
use sds_server::{attest::Reason, grpc::table::Table, session::Sessions};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use unix_peer::listener;
use workload_identity::{NodeEnvironment, PodRef};

use self::{metrics::Metrics, registration::Registrar, server::Server, sockets::Sockets, volume::Place};
use crate::{
    csi::proto::{
        csi::v1::{identity_server::IdentityServer, node_server::NodeServer},
        pluginregistration::registration_server::RegistrationServer,
    },
    warm::Prefetcher,
};

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::csi";

pub mod directory;
pub mod metrics;
pub mod mounts;
pub mod proto;
pub mod registration;
pub mod server;
pub mod service;
pub mod sockets;
pub mod volume;

const FIELD: &str = "sockets.perPod.kubeletDirectory";
/// Between two attempts to learn which pods have gone.
const SWEEP_RETRY_INTERVAL: Duration = Duration::from_secs(30);

/// One socket for each pod, handed out as a CSI driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PerPod {
    /// `directory`: where they are, each in a directory of its own.
    pub directory: PathBuf,
    /// `driverName`: what pods' volumes name.
    pub driver_name: String,
    /// `kubeletDirectory`: the kubelet's own, at the same path here as there.
    pub kubelet_directory: PathBuf,
    /// `waitForCertificate`: how long a pod's start may wait for its certificate.
    pub wait_for_certificate: Duration,
}

impl PerPod {
    /// Where the kubelet calls the driver.
    pub fn driver_socket(&self) -> PathBuf {
        self.kubelet_directory.join("plugins").join(&self.driver_name).join("csi.sock")
    }

    /// Where the kubelet learns of the driver.
    pub fn registration_socket(&self) -> PathBuf {
        self.kubelet_directory.join("plugins_registry").join(format!("{}-reg.sock", self.driver_name))
    }
}

/// Why the driver cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its sockets.
    #[error("sockets.perPod.directory: {0}")]
    Sockets(#[from] sockets::Error),
    /// The kubelet's sockets.
    #[error(transparent)]
    Kubelet(#[from] listener::Error),
}

/// What the driver needs.
#[derive(Debug)]
pub struct Parts {
    /// `sockets.perPod`
    pub config: PerPod,
    /// `NODE_NAME`, and the agent's own pod there.
    pub node: NodeEnvironment,
    /// The pod index.
    pub pods: Pods,
    /// What every socket serves; its attestor is replaced by each socket's own.
    pub sessions: Sessions,
    /// Starts issues.
    pub warmer: Prefetcher,
    /// What is counted.
    pub metrics: Metrics,
}

/// A driver whose sockets are open.
#[derive(Debug)]
pub struct Driver {
    sockets: Sockets,
    own: Option<PodRef>,
    calls: Server,
    registration: Server,
}

impl Driver {
    /// Serves again what is published already, then opens the driver's socket, then the one by which the kubelet learns of it.
    pub fn bind(parts: Parts) -> Result<Self, Error> {
        let Parts { config, node, pods, sessions, warmer, metrics } = parts;
        let resolver = warmer.resolver.clone();
        let sockets = Sockets::open(&config, pods, sessions, warmer, metrics.clone())?;
        let config = Arc::new(config);
        let name = node.node_name.unwrap_or_default();
        let driver = service::Driver { config: config.clone(), node: name, sockets: sockets.clone(), resolver, metrics };
        let services = Table::default().with(IdentityServer::new(driver.clone())).with(NodeServer::new(driver));
        let calls = Server::bind(FIELD, config.driver_socket(), services, Arc::default())?;
        let refused = Arc::new(Notify::new());
        let registrar = Registrar { config: config.clone(), refused: refused.clone() };
        let services = Table::default().with(RegistrationServer::new(registrar));
        let registration = Server::bind(FIELD, config.registration_socket(), services, refused)?;
        Ok(Self { sockets, own: node.pod, calls, registration })
    }

    /// Serves the kubelet until `last`; then the names go, and the mounts stay.
    pub async fn run(self, last: CancellationToken) {
        let Self { sockets, own, calls, registration } = self;
        let cleared = last.run_until_cancelled(clear(&sockets, own.as_ref()));
        tokio::join!(calls.run(last.clone()), registration.run(last.clone()), cleared);
        sockets.unlink_if_owned().await;
    }
}

/// Removes what an earlier process has published for pods that are gone, once the complete index and a live read say so. The kubelet
/// unpublishes what it remembers by itself; it does not remember everything.
async fn clear(sockets: &Sockets, own: Option<&PodRef>) {
    if sockets.pods().synced().wait_for(|synced| *synced).await.is_err() {
        return;
    }
    // An index that lacks even this agent's pod is another node's.
    if let Some(own) = own
        && let Err(cause) = sockets.pods().wait_for(&own.uid).await
    {
        warn!(target: LOG_TARGET, pod = %own, %cause, "the agent's own pod is not on NODE_NAME; sockets of pods that seem gone are kept");
        return;
    }
    loop {
        let asked = sockets.inherited().into_iter().map(|place| async {
            let known = sockets.pods().wait_for(&place.uid).await;
            (place, known)
        });
        let mut unclear = 0;
        for (place, known) in join_all(asked).await {
            match known {
                Err(error) if error.reason == Reason::unknown_pod => remove(sockets, place).await,
                // It is there, or its end is known: the kubelet will come for it.
                Ok(_) => {}
                Err(error) if !error.temporary => {}
                Err(_) => unclear += 1,
            }
        }
        if unclear == 0 {
            return;
        }
        tokio::time::sleep(SWEEP_RETRY_INTERVAL).await;
    }
}

async fn remove(sockets: &Sockets, place: Place) {
    let Place { uid, volume } = place.clone();
    match sockets.unpublish(place).await {
        Ok(()) => info!(target: LOG_TARGET, pod_uid = %uid, %volume, "removed the socket of a pod that is gone"),
        Err(cause) => warn!(target: LOG_TARGET, pod_uid = %uid, %volume, %cause, "cannot remove the socket of a pod that is gone"),
    }
}
