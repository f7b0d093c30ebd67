//! Checks a publish request of the kubelet. It does no I/O and runs before anything is created.
//!
//! A pod can forge the volume context: if the CSIDriver object is missing or has no `podInfoOnMount`, the kubelet passes the pod's own
//! attributes unchanged. Therefore the pod UID must equal that of the target path, which only the kubelet chooses, and the pod index must
//! confirm the pod before a key is sent. No error contains a value of the context, because it may be a token.

use std::sync::Arc;

use agent_kube::pod::picks::{PROFILE, picked};
use agent_runtime::text;
use attest_kubernetes::mount::Claim;
use tonic::Status;
use workload_identity::PodRef;

use crate::{
    csi::proto::csi::v1::{NodePublishVolumeRequest, VolumeCapability, volume_capability::AccessType},
    per_pod::{
        PerPod,
        volume::{DEFAULT_SOCKET, MAX_SOCKET_NAME_BYTES, MAX_VOLUME_NAME_BYTES, Place, SOCKET_NAME, Volume, is_dns, is_socket},
    },
};

/// The prefix of attributes that the kubelet sets.
const KUBERNETES: &str = "csi.storage.k8s.io/";
const POD_NAME: &str = "csi.storage.k8s.io/pod.name";
const POD_NAMESPACE: &str = "csi.storage.k8s.io/pod.namespace";
const POD_UID: &str = "csi.storage.k8s.io/pod.uid";
const SERVICE_ACCOUNT: &str = "csi.storage.k8s.io/serviceAccount.name";
const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";

/// Checks every field of a request, and returns the volume.
///
/// # Errors
///
/// `PermissionDenied` if the volume context names another pod than the target path; `InvalidArgument` for any other invalid field.
pub fn check(request: &NodePublishVolumeRequest, config: &PerPod) -> Result<Volume, Status> {
    if request.volume_id.is_empty() {
        return Err(Status::invalid_argument("volume_id is missing"));
    }
    let place = Place::of_target(&request.target_path, &config.kubelet_directory)?;
    capability(request.volume_capability.as_ref())?;
    if !request.readonly {
        return Err(Status::invalid_argument("the volume is not read-only; set readOnly: true on it in the pod"));
    }
    if request.secrets.keys().any(|name| !name.starts_with(KUBERNETES)) {
        return Err(Status::invalid_argument("this driver takes no secrets; remove nodePublishSecretRef from the volume"));
    }
    attributes(request.volume_context.keys())?;
    let told = |name: &str| request.volume_context.get(name).map(String::as_str).filter(|value| !value.is_empty());
    let claim = claim(&place, config, told)?;
    let socket = socket(told(SOCKET_NAME).unwrap_or(DEFAULT_SOCKET))?;
    Ok(Volume { place, claim, socket })
}

fn capability(capability: Option<&VolumeCapability>) -> Result<(), Status> {
    let Some(access) = capability.and_then(|capability| capability.access_type.as_ref()) else {
        return Err(Status::invalid_argument("volume_capability has no access type; this driver mounts directories"));
    };
    match access {
        AccessType::Block(_) => Err(Status::invalid_argument("volume_capability asks for a block device; this driver mounts directories")),
        AccessType::Mount(mount) if !mount.fs_type.is_empty() => {
            Err(Status::invalid_argument("volume_capability asks for a file system; remove fsType from the volume"))
        }
        AccessType::Mount(mount) if !mount.mount_flags.is_empty() => {
            Err(Status::invalid_argument("volume_capability asks for mount options, and this driver takes none"))
        }
        AccessType::Mount(_) => Ok(()),
    }
}

/// Rejects unknown attributes, which are mistakes of the pod. Any attribute of Kubernetes passes, because newer kubelets add some.
fn attributes<'a>(names: impl Iterator<Item = &'a String>) -> Result<(), Status> {
    for name in names {
        match name.as_str() {
            SOCKET_NAME | PROFILE => {}
            name if name.starts_with(KUBERNETES) => {}
            name => {
                let name = text::excerpt(name, text::MAX_NAME_CHARS);
                let known = format!("this driver knows {SOCKET_NAME} and {PROFILE}");
                return Err(Status::invalid_argument(format!("volume attribute {name:?} is not known; {known}")));
            }
        }
    }
    Ok(())
}

fn claim<'a>(place: &Place, config: &PerPod, told: impl Fn(&str) -> Option<&'a str>) -> Result<Claim, Status> {
    let driver = &config.driver_name;
    let need = |name: &str| {
        let remedy = format!("the CSIDriver {driver} needs podInfoOnMount: true");
        told(name).ok_or_else(|| Status::invalid_argument(format!("the volume context has no {name}; {remedy}")))
    };
    let (name, namespace, uid, account) = (need(POD_NAME)?, need(POD_NAMESPACE)?, need(POD_UID)?, need(SERVICE_ACCOUNT)?);
    if need(EPHEMERAL)? != "true" {
        let remedy = format!("write it inline (csi: {{ driver: {driver} }}), and give the CSIDriver volumeLifecycleModes: [Ephemeral]");
        return Err(Status::invalid_argument(format!("{EPHEMERAL} is not true: the volume is not inline; {remedy}")));
    }
    if uid != &*place.uid {
        return Err(Status::permission_denied(format!("{POD_UID} is not the pod of target_path, {}", place.uid)));
    }
    if !is_dns(namespace, MAX_VOLUME_NAME_BYTES, false) || !is_dns(name, 253, true) || !is_dns(account, 253, true) {
        return Err(Status::invalid_argument("the pod's namespace, name or service account is not a name that Kubernetes gives"));
    }
    let pod = PodRef { namespace: namespace.into(), name: name.into(), uid: place.uid.clone() };
    Ok(Claim { pod, service_account: account.into(), picked: told(PROFILE).and_then(picked) })
}

fn socket(name: &str) -> Result<Arc<str>, Status> {
    if is_socket(name) {
        return Ok(name.into());
    }
    let form = format!("use 1 to {MAX_SOCKET_NAME_BYTES} letters, digits, '-', '_' and '.', and no '.' in front");
    Err(Status::invalid_argument(format!("volume attribute {SOCKET_NAME} is not the plain name of a file; {form}")))
}

#[cfg(test)]
mod tests;
