//! The parts that the two processes for per-pod sockets share: the [mount helper](crate::csi), which makes a directory for each volume and
//! mounts it in the pod, and the [agent](crate::pod_sockets), which serves a socket in it.
//!
//! The agent serves a [service](interface) to the mount helper, on a socket in the parent of all directories, which only root may enter.

use std::{path::PathBuf, time::Duration};

pub mod directory;
pub mod interface;
pub(crate) mod log;
pub mod root_socket;
pub mod turns;
pub mod volume;

/// The name of the agent's socket for the mount helper. It is not a valid pod UID.
pub const HELPER_SOCKET: &str = "agent.sock";
/// Time limit for the pod index to report that a pod does not exist. After it the agent serves the socket without confirmation: no key is
/// sent before the index confirms the pod.
pub const CONFIRMATION: Duration = Duration::from_secs(3);

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

    /// The agent's socket for the mount helper.
    pub fn helper_socket(&self) -> PathBuf {
        self.directory.join(HELPER_SOCKET)
    }

    /// The socket by which the kubelet finds the driver.
    pub fn registration_socket(&self) -> PathBuf {
        self.kubelet_directory.join("plugins_registry").join(format!("{}-reg.sock", self.driver_name))
    }
}
