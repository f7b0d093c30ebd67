//! The agent's side of per-pod sockets: a socket in the directory of each published volume.
//!
//! The [mount helper](crate::csi), a process of its own, publishes volumes for the kubelet: it makes a directory for each volume and mounts
//! it in the pod. The agent binds a socket in the directory and serves it. The mount proves which pod a caller is. The agent mounts
//! nothing, reaches no path of the kubelet and needs no privilege for this.
//!
//! The mount helper calls the agent on a [socket](PerPod::helper_socket) in the parent of all directories, which only root may enter. It calls
//! after it has made a directory and before it mounts it, so an agent that is there serves the socket when the pod starts. An agent that
//! starts later finds the directory: it opens the socket for the mount helper first, and then serves the sockets of all directories. In
//! both cases, no key is sent before the pod index confirms the pod.

use std::sync::Arc;

use attest_kubernetes::pods::Pods;
use sds_server::{grpc::table::Table, session::Sessions};
use tokio_util::sync::CancellationToken;
use unix_peer::listener;
use workload_identity::NodeEnvironment;

use self::{service::Service, sockets::Sockets};
use crate::{
    per_pod::{PerPod, interface::pod_sockets_server::PodSocketsServer, root_socket::Server},
    warm::Prefetcher,
};

pub mod metrics;
pub mod service;
pub mod sockets;

const FIELD: &str = "sockets.perPod.directory";

/// The sockets of pods cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory of the pods' sockets cannot be used.
    #[error("sockets.perPod.directory: {0}")]
    Sockets(#[from] sockets::Error),
    /// The socket for the mount helper cannot be bound.
    #[error(transparent)]
    Helper(#[from] listener::Error),
}

/// The dependencies of [`PodSockets`].
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
    /// The metrics of the sockets.
    pub metrics: metrics::Metrics,
}

/// The sockets of pods, and the socket for the mount helper.
#[derive(Debug)]
pub struct PodSockets {
    sockets: Sockets,
    calls: Server,
}

impl PodSockets {
    /// Opens the socket for the mount helper, and then serves the sockets of the volumes that are published already.
    ///
    /// # Errors
    ///
    /// The directory of the sockets is not safe, or the socket for the mount helper cannot be bound.
    pub fn bind(parts: Parts) -> Result<Self, Error> {
        let Parts { config, node, pods, sessions, warmer, metrics } = parts;
        let resolver = warmer.resolver.clone();
        let path = config.helper_socket();
        let sockets = Sockets::open(&config, pods, sessions, warmer, metrics)?;
        let service = Service { own: node.pod, wait: config.wait_for_certificate, sockets: sockets.clone(), resolver };
        let services = Table::default().with(PodSocketsServer::new(service));
        let calls = Server::bind(FIELD, path, services, Arc::default())?;
        // A directory that the mount helper makes from here on is followed by a call to the socket.
        sockets.serve_all().map_err(Error::Sockets)?;
        Ok(Self { sockets, calls })
    }

    /// Serves until `last`. Then it removes the names of the sockets; the directories stay.
    pub async fn run(self, last: CancellationToken) {
        let Self { sockets, calls } = self;
        calls.run(last).await;
        sockets.unlink_if_owned().await;
    }
}
