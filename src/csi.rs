//! The CSI driver, which gives each pod a directory with its own SDS socket.
//!
//! An inline volume of a pod becomes the directory `<directory>/<pod uid>/<volume>` with a socket. The driver mounts it read-only on the
//! kubelet's target path; the mount proves which pod a caller is. The kubelet finds the driver by its registration socket; the agent
//! serves both sockets itself, without a sidecar.
//!
//! The kubelet waits for the driver when a pod starts or ends. Therefore no call waits for the API server or an issuer longer than a fixed
//! limit. The socket is served at once, and a caller waits in an open stream. The directories record which volumes are published. After a
//! restart the agent binds the sockets again inside the same directories, because pods have mounted their inodes.
//!
//! The caller runs [`Driver::run`] until the streams have ended; the driver publishes and unpublishes volumes until then.

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

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::csi";

pub mod directory;
mod log;
pub mod metrics;
pub mod mounts;
pub mod proto;
pub mod registration;
pub mod server;
pub mod service;
pub mod sockets;
pub mod volume;

const FIELD: &str = "sockets.perPod.kubeletDirectory";
/// Interval of retries to find out which pods have ended.
const SWEEP_RETRY_INTERVAL: Duration = Duration::from_secs(30);

/// `sockets.perPod`: one socket for each pod, through the CSI driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PerPod {
    /// `directory`: the parent of the directories of all sockets.
    pub directory: PathBuf,
    /// `driverName`: the CSI driver's name in volumes of pods.
    pub driver_name: String,
    /// `kubeletDirectory`: the kubelet's root directory, at the same path in the agent's container and on the node.
    pub kubelet_directory: PathBuf,
    /// `waitForCertificate`: the longest time for which publishing waits for the pod's certificate.
    pub wait_for_certificate: Duration,
}

impl PerPod {
    /// The socket on which the kubelet calls the driver.
    pub fn driver_socket(&self) -> PathBuf {
        self.kubelet_directory.join("plugins").join(&self.driver_name).join("csi.sock")
    }

    /// The socket by which the kubelet finds the driver.
    pub fn registration_socket(&self) -> PathBuf {
        self.kubelet_directory.join("plugins_registry").join(format!("{}-reg.sock", self.driver_name))
    }
}

/// The driver cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory of the pods' sockets cannot be used.
    #[error("sockets.perPod.directory: {0}")]
    Sockets(#[from] sockets::Error),
    /// A socket for the kubelet cannot be bound.
    #[error(transparent)]
    Kubelet(#[from] listener::Error),
}

/// The dependencies of the driver.
#[derive(Debug)]
pub struct Parts {
    /// `sockets.perPod`
    pub config: PerPod,
    /// `NODE_NAME` and the agent's own pod.
    pub node: NodeEnvironment,
    /// The pod index.
    pub pods: Pods,
    /// The sessions that every socket serves, each with its own attestor.
    pub sessions: Sessions,
    /// Orders certificates for published sockets.
    pub warmer: Prefetcher,
    /// The metrics of the driver.
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
    /// Serves the sockets that are published already, then opens the driver's socket, and then the registration socket.
    ///
    /// # Errors
    ///
    /// The directory of the sockets is not safe, or a socket cannot be bound.
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
        let registrar = Registrar::new(config.clone(), refused.clone());
        let services = Table::default().with(RegistrationServer::new(registrar));
        let registration = Server::bind(FIELD, config.registration_socket(), services, refused)?;
        Ok(Self { sockets, own: node.pod, calls, registration })
    }

    /// Serves the kubelet until `last`. Then it removes the sockets' names; the mounts stay.
    pub async fn run(self, last: CancellationToken) {
        let Self { sockets, own, calls, registration } = self;
        let cleared = last.run_until_cancelled(clear(&sockets, own.as_ref()));
        tokio::join!(calls.run(last.clone()), registration.run(last.clone()), cleared);
        sockets.unlink_if_owned().await;
    }
}

/// Removes volumes that an earlier process published for pods that no longer exist, once the complete pod index and a read of the API
/// server confirm that. The kubelet unpublishes the volumes that it remembers, but it does not remember all of them.
async fn clear(sockets: &Sockets, own: Option<&PodRef>) {
    if sockets.pods().synced().wait_for(|synced| *synced).await.is_err() {
        return;
    }
    // If the index does not have the agent's own pod, it is that of another node.
    if let Some(own) = own
        && let Err(cause) = sockets.pods().wait_for(&own.uid).await
    {
        warn!(target: LOG_TARGET, pod = %own, %cause, "the agent's own pod is not on NODE_NAME; sockets of unknown pods are kept");
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
                // The pod exists, or the index knows that it has ended: the kubelet unpublishes its volumes.
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
    let removed = sockets.unpublish(place.clone()).await;
    let cause = if removed.is_ok() { log::Cause::Removed(place) } else { log::Cause::NotRemoved(place) };
    let Some(left_out) = sockets.log().permit(cause) else { return };
    match removed {
        Ok(()) => info!(target: LOG_TARGET, pod_uid = %uid, %volume, left_out, "removed the socket of a pod that no longer exists"),
        Err(cause) => {
            warn!(target: LOG_TARGET, pod_uid = %uid, %volume, %cause, left_out, "cannot remove the socket of a pod that no longer exists");
        }
    }
}
