//! The generated types of the service for the mount helper, and their conversions.

use std::sync::Arc;

use agent_kube::pod::picks::picked;
use attest_kubernetes::mount::Claim;
use tonic::Status;
use workload_identity::PodRef;

pub use generated::*;

use super::volume::{Place, Volume, is_pod_uid, is_socket, is_volume};

#[allow(clippy::all, clippy::pedantic, missing_docs)]
mod generated {
    tonic::include_proto!("sds_agent.podsockets.v1");
}

impl From<&Place> for PodVolume {
    fn from(place: &Place) -> Self {
        Self { pod_uid: place.uid.to_string(), name: place.volume.to_string() }
    }
}

impl From<&Volume> for ServeRequest {
    fn from(volume: &Volume) -> Self {
        let Volume { place, claim: Claim { pod, service_account, picked }, socket } = volume;
        Self {
            volume: Some(place.into()),
            socket_name: socket.to_string(),
            pod_name: pod.name.to_string(),
            pod_namespace: pod.namespace.to_string(),
            service_account: service_account.to_string(),
            profile: picked.as_deref().map(str::to_owned),
        }
    }
}

impl TryFrom<Option<PodVolume>> for Place {
    type Error = Status;

    fn try_from(volume: Option<PodVolume>) -> Result<Self, Status> {
        let PodVolume { pod_uid, name } = volume.unwrap_or_default();
        if is_pod_uid(&pod_uid) && is_volume(&name) {
            Ok(Self { uid: pod_uid.into(), volume: name.into() })
        } else {
            Err(Status::invalid_argument("volume is not the UID of a pod and the name of a volume"))
        }
    }
}

impl TryFrom<ServeRequest> for Volume {
    type Error = Status;

    fn try_from(request: ServeRequest) -> Result<Self, Status> {
        let ServeRequest { volume, socket_name, pod_name, pod_namespace, service_account, profile } = request;
        let place = Place::try_from(volume)?;
        if !is_socket(&socket_name) {
            return Err(Status::invalid_argument("socket_name is not the name of a socket"));
        }
        let pod = PodRef { namespace: pod_namespace.into(), name: pod_name.into(), uid: place.uid.clone() };
        // An empty text stands for a value that is no name of a profile.
        let picked = profile.map(|profile| picked(&profile).unwrap_or_default());
        let claim = Claim { pod, service_account: service_account.into(), picked };
        Ok(Self { place, claim, socket: Arc::from(socket_name) })
    }
}
