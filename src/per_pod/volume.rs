//! The volume of a pod, and its place in the kubelet's directory. It does no I/O.

use std::{
    fmt,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use attest_kubernetes::mount::Claim;
use tonic::Status;

/// The default file name of the socket.
pub const DEFAULT_SOCKET: &str = "socket";
/// Maximum length of a socket's name. The name of the directory contains it and the volume's name.
pub const MAX_SOCKET_NAME_BYTES: usize = 40;
/// Maximum length of a path that the kernel accepts.
const MAX_PATH_BYTES: usize = 4095;
/// A volume's name is a DNS label.
pub const MAX_VOLUME_NAME_BYTES: usize = 63;
/// The kubelet's directory for volumes of CSI drivers, in the directory of a pod's volumes.
const PLUGIN: &str = "kubernetes.io~csi";
/// The attribute for the file name of the socket.
pub const SOCKET_NAME: &str = "sds-agent.io/socket-name";

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

/// A volume whose publish request is valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// The pod and volume of the target path.
    pub place: Place,
    /// The pod and service account in the volume context; the pod index must confirm them.
    pub claim: Claim,
    /// The socket's file name.
    pub socket: Arc<str>,
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

/// Whether `name` is a DNS label, or with `dots` a DNS name, of at most `longest` bytes.
pub fn is_dns(name: &str, longest: usize, dots: bool) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || (dots && b == b'.');
    let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    name.len() <= longest && name.bytes().all(inner) && edge(name.bytes().next()) && edge(name.bytes().last())
}
