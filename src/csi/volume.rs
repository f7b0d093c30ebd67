//! Checks a publish request of the kubelet. It does no I/O and runs before anything is created.
//!
//! A pod can forge the volume context: if the CSIDriver object is missing or has no `podInfoOnMount`, the kubelet passes the pod's own
//! attributes unchanged. Therefore the pod UID must equal that of the target path, which only the kubelet chooses, and the pod index must
//! confirm the pod before a key is sent. No error contains a value of the context, because it may be a token.

use std::{
    fmt,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use agent_kube::pod::picks::{PROFILE, picked};
use agent_runtime::text;
use attest_kubernetes::mount::Claim;
use tonic::Status;
use workload_identity::PodRef;

use crate::csi::{
    PerPod,
    proto::csi::v1::{NodePublishVolumeRequest, VolumeCapability, volume_capability::AccessType},
};

/// The prefix of attributes that the kubelet sets.
const KUBERNETES: &str = "csi.storage.k8s.io/";
const POD_NAME: &str = "csi.storage.k8s.io/pod.name";
const POD_NAMESPACE: &str = "csi.storage.k8s.io/pod.namespace";
const POD_UID: &str = "csi.storage.k8s.io/pod.uid";
const SERVICE_ACCOUNT: &str = "csi.storage.k8s.io/serviceAccount.name";
const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";
/// The attribute for the file name of the socket.
pub const SOCKET_NAME: &str = "sds-agent.io/socket-name";
/// The default file name of the socket.
pub const DEFAULT_SOCKET: &str = "socket";
/// Maximum length of a socket's name. The name of the directory contains it and the volume's name.
const MAX_SOCKET_NAME_BYTES: usize = 40;
/// Maximum length of a path that the kernel accepts.
const MAX_PATH_BYTES: usize = 4095;
/// A volume's name is a DNS label.
const MAX_VOLUME_NAME_BYTES: usize = 63;
/// The kubelet's directory for volumes of CSI drivers, in the directory of a pod's volumes.
const PLUGIN: &str = "kubernetes.io~csi";

/// One volume of one pod, which also determines its target path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Place {
    /// The pod's UID in the target path.
    pub uid: Arc<str>,
    /// The name of the volume in the pod's spec.
    pub volume: Arc<str>,
}

impl Place {
    /// The parent directory of the target, relative to the kubelet's directory, and the name of the target in it.
    pub fn target(&self) -> (PathBuf, &'static str) {
        (["pods", &self.uid, "volumes", PLUGIN, &self.volume].iter().collect(), "mount")
    }

    /// Parses a target path.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` if the path does not have exactly the kubelet's form.
    pub fn of_target(path: &str, kubelet: &Path) -> Result<Self, Status> {
        let wrong = |what: &str| {
            let form = kubelet.join("pods/<uid>/volumes").join(PLUGIN).join("<volume>/mount");
            Err(Status::invalid_argument(format!("target_path {what}; it has to be {}", form.display())))
        };
        if path.is_empty() {
            return Err(Status::invalid_argument("target_path is missing"));
        }
        if path.len() > MAX_PATH_BYTES {
            return wrong(&format!("has {} bytes and the kernel takes {MAX_PATH_BYTES}", path.len()));
        }
        let Some(rest) = Path::new(path).strip_prefix(kubelet).ok() else {
            return wrong(&format!("is not below sockets.perPod.kubeletDirectory ({})", kubelet.display()));
        };
        let parts: Option<Vec<&str>> = rest
            .components()
            .map(|part| match part {
                Component::Normal(name) => name.to_str(),
                _ => None,
            })
            .collect();
        let place = match parts.as_deref() {
            Some(["pods", uid, "volumes", PLUGIN, volume, "mount"]) if is_pod_uid(uid) && is_volume(volume) => {
                Self { uid: (*uid).into(), volume: (*volume).into() }
            }
            _ => return wrong("is not a pod's volume"),
        };
        // The components are those of other texts too, with a `.` or a doubled slash.
        let (parent, name) = place.target();
        if kubelet.join(parent).join(name).as_os_str() != path {
            return wrong("is not a plain path: it has a `.`, or more slashes than needed");
        }
        Ok(place)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "volume {} of pod {}", self.volume, self.uid)
    }
}

/// A valid publish request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// The pod and volume of the target path.
    pub place: Place,
    /// The pod and service account in the volume context; the pod index must confirm them.
    pub claim: Claim,
    /// The socket's file name.
    pub socket: Arc<str>,
}

impl Volume {
    /// Checks every field of a request.
    ///
    /// # Errors
    ///
    /// `PermissionDenied` if the volume context names another pod than the target path; `InvalidArgument` for any other invalid field.
    pub fn check(request: &NodePublishVolumeRequest, config: &PerPod) -> Result<Self, Status> {
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
        Ok(Self { place, claim, socket })
    }
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

/// Whether `name` is valid for a socket: a plain file name without a leading `.`, which names of unfinished sockets have.
pub fn is_socket(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=MAX_SOCKET_NAME_BYTES).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('.')
}

/// Whether `name` is valid for a volume: a DNS label.
pub fn is_volume(name: &str) -> bool {
    is_dns(name, MAX_VOLUME_NAME_BYTES, false)
}

/// Whether `uid` is a UUID, or has the 32 hexadecimal digits that the kubelet uses for a static pod.
pub fn is_pod_uid(uid: &str) -> bool {
    let hex = |part: &str| part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let lengths: Vec<usize> = uid.split('-').map(str::len).collect();
    matches!(lengths[..], [8, 4, 4, 4, 12] | [32]) && uid.split('-').all(hex)
}

fn is_dns(name: &str, longest: usize, dots: bool) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || (dots && b == b'.');
    let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    name.len() <= longest && name.bytes().all(inner) && edge(name.bytes().next()) && edge(name.bytes().last())
}

#[cfg(test)]
mod tests;
