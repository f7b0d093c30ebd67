//! The mount helper: the CSI driver that gives each pod a directory with its own SDS socket.
//!
//! An inline volume of a pod becomes the directory `<directory>/<pod uid>/<volume>`. The driver mounts it read-only on the kubelet's
//! target path; the mount proves which pod a caller is. The [agent](crate::pod_sockets), a process without privileges, binds the socket in
//! the directory and serves it. The kubelet finds the driver by its registration socket; the driver serves both sockets itself, without a
//! sidecar.
//!
//! The helper is privileged, so it does little: it reads calls of the kubelet, makes directories and mounts them. It holds no key, serves
//! no pod, has no access to the API server, and treats the agent as hostile.
//!
//! The kubelet waits for the driver when a pod starts or ends. Therefore no call waits for the agent longer than a fixed limit. The
//! directories record which volumes are published.

use std::{collections::HashSet, sync::Arc, time::Duration};

use agent_runtime::readiness;
use sds_server::grpc::table::Table;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use unix_peer::listener;

use self::{metrics::Metrics, registration::Registrar, volumes::Volumes};
use crate::{
    csi::proto::{
        csi::v1::{identity_server::IdentityServer, node_server::NodeServer},
        pluginregistration::registration_server::RegistrationServer,
    },
    per_pod::{PerPod, log, root_socket::Server, volume::Place},
};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::csi";

pub mod agent;
pub mod metrics;
pub mod mounts;
pub mod proto;
pub mod registration;
pub mod request;
pub mod service;
pub mod volumes;

const FIELD: &str = "sockets.perPod.kubeletDirectory";
/// Interval of retries to find out from the agent which pods have ended.
const SWEEP_RETRY_INTERVAL: Duration = Duration::from_secs(30);

/// The driver cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory of the pods' sockets cannot be used.
    #[error("sockets.perPod.directory: {0}")]
    Volumes(#[from] volumes::Error),
    /// A socket for the kubelet cannot be bound.
    #[error(transparent)]
    Kubelet(#[from] listener::Error),
}

/// The dependencies of the driver.
#[derive(Debug)]
pub struct Parts {
    /// `sockets.perPod`
    pub config: PerPod,
    /// `NODE_NAME`
    pub node: Arc<str>,
    /// The metrics of the driver.
    pub metrics: Metrics,
    /// Released when the kubelet has registered the driver.
    pub registration: readiness::Guard,
}

/// A driver whose sockets are open.
#[derive(Debug)]
pub struct Driver {
    volumes: Volumes,
    calls: Server,
    registration: Server,
    registered: watch::Receiver<bool>,
    guard: readiness::Guard,
    metrics: Metrics,
}

impl Driver {
    /// Opens the driver's socket, and then the registration socket.
    ///
    /// # Errors
    ///
    /// The directory of the sockets is not safe, or a socket cannot be bound.
    pub fn bind(parts: Parts) -> Result<Self, Error> {
        let Parts { config, node, metrics, registration: guard } = parts;
        let volumes = Volumes::open(&config, metrics.clone())?;
        let config = Arc::new(config);
        let driver = service::Driver { config: config.clone(), node, volumes: volumes.clone(), metrics: metrics.clone() };
        let services = Table::default().with(IdentityServer::new(driver.clone())).with(NodeServer::new(driver));
        let calls = Server::bind(FIELD, config.driver_socket(), services, Arc::default())?;
        let refused = Arc::new(Notify::new());
        let (outcome, registered) = watch::channel(false);
        let registrar = Registrar::new(config.clone(), refused.clone(), outcome);
        let services = Table::default().with(RegistrationServer::new(registrar));
        let registration = Server::bind(FIELD, config.registration_socket(), services, refused)?;
        Ok(Self { volumes, calls, registration, registered, guard, metrics })
    }

    /// Serves the kubelet until `last`. Then it removes the names of its sockets; the mounts stay.
    pub async fn run(self, last: CancellationToken) {
        let Self { volumes, calls, registration, registered, guard, metrics } = self;
        let beside = async { tokio::join!(clear(&volumes), follow(registered, guard, &metrics)) };
        tokio::join!(calls.run(last.clone()), registration.run(last.clone()), last.run_until_cancelled(beside));
        volumes.finish().await;
    }
}

/// Shows in the metrics whether the driver is registered, and releases the guard at the first time.
async fn follow(mut registered: watch::Receiver<bool>, guard: readiness::Guard, metrics: &Metrics) {
    let mut guard = Some(guard);
    loop {
        let is_registered = *registered.borrow_and_update();
        metrics.registered(is_registered);
        if is_registered {
            drop(guard.take());
        }
        if registered.changed().await.is_err() {
            return;
        }
    }
}

/// Unpublishes volumes that an earlier process published for pods that no longer exist, once the agent confirms that. The kubelet
/// unpublishes the volumes that it remembers, but it does not remember all of them.
async fn clear(volumes: &Volumes) {
    loop {
        let inherited = volumes.inherited();
        if inherited.is_empty() {
            return;
        }
        if let Ok(ended) = volumes.agent().find_ended(&inherited).await {
            remove(volumes, ended.into_iter().collect()).await;
            return;
        }
        tokio::time::sleep(SWEEP_RETRY_INTERVAL).await;
    }
}

async fn remove(volumes: &Volumes, ended: HashSet<Place>) {
    // The kubelet may have published a volume again in the meantime.
    let inherited = volumes.inherited();
    for place in ended.into_iter().filter(|place| inherited.contains(place)) {
        let Place { uid, volume } = place.clone();
        let removed = volumes.unpublish_ended(place.clone()).await;
        let cause = if removed.is_ok() { log::Cause::Removed(place) } else { log::Cause::NotRemoved(place) };
        let Some(left_out) = volumes.log().permit(cause) else { continue };
        match removed {
            Ok(()) => info!(target: LOG_TARGET, pod_uid = %uid, %volume, left_out, "removed the socket of a pod that no longer exists"),
            Err(cause) => {
                warn!(target: LOG_TARGET, pod_uid = %uid, %volume, %cause, left_out, "cannot remove the socket of a pod that no longer exists");
            }
        }
    }
}
