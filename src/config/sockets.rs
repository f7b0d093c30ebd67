//! The section `sockets`: the shared socket, sockets of pods, or both.
//!
//! Owns the rules between them: at least one kind is enabled, sockets of pods need `attestation: kubernetes`, and the directory of the
//! shared socket does not contain the sockets of pods.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;

use super::{
    Attestation, PerPod, SharedSocket,
    error::FieldError,
    reader::Section,
    values::{self, MAX_SOCKET_PATH_BYTES},
};

/// The kubelet waits two minutes for a call; the agent's own limit stays below.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// The enabled sockets of either kind.
pub(super) type Sockets = (Option<SharedSocket>, Option<PerPod>);

/// Decodes the section.
pub(super) fn decode(sockets: &Section<'_>, attestation: Option<Attestation>) -> Option<Sockets> {
    let shared = sockets.section("shared", |shared| {
        let enabled = shared.read("enabled", true, values::boolean);
        let path = shared.read("path", "/run/sds-agent/sds.sock".into(), values::socket_path);
        let mode = shared.read("mode", 0o666, values::mode);
        if mode.is_some_and(|mode| mode & 0o600 != 0o600) {
            shared.wrong("mode", "prevents the agent from using its own socket", "begin it with 6, such as \"0666\" or \"0660\"");
        }
        let accept_pid_reuse = shared.read("acceptPidReuse", false, values::boolean);
        if accept_pid_reuse == Some(true) {
            let risk = "before Linux 6.5, a process that takes over the pid of a caller that has just ended is served as that caller";
            shared.warn("acceptPidReuse", risk);
        }
        let socket = SharedSocket { path: path?, mode: mode?, accept_pid_reuse: accept_pid_reuse? };
        Some(enabled?.then_some(socket))
    });
    let per_pod = sockets.section("perPod", |section| per_pod(section, attestation, shared.as_ref().and_then(Option::as_ref)));
    let (shared, per_pod) = (shared?, per_pod?);
    if shared.is_none() && per_pod.is_none() {
        sockets.wrong_here("has neither shared nor perPod enabled, so no client could be served", "enable at least one of them");
        return None;
    }
    Some((shared, per_pod))
}

fn per_pod(section: &Section<'_>, attestation: Option<Attestation>, shared: Option<&SharedSocket>) -> Option<Option<PerPod>> {
    let enabled = section.read("enabled", false, values::boolean);
    let directory = section.read("directory", "/run/sds-agent-pods".into(), plain_path);
    let driver_name = section.read("driverName", "csi.sds-agent.io".to_owned(), driver_name);
    let kubelet_directory = section.read("kubeletDirectory", "/var/lib/kubelet".into(), plain_path);
    let wait = section.read("waitForCertificate", Duration::ZERO, values::duration(Duration::ZERO..=MAX_WAIT));
    if enabled != Some(true) {
        return enabled.map(|_| None);
    }
    if attestation == Some(Attestation::Unix) {
        let what = "needs pods, which `attestation: unix` does not know";
        section.wrong("enabled", what, "set attestation to kubernetes, or this to false");
    }
    let inside = |directory: &Path| shared.and_then(|shared| shared.path.parent()).is_some_and(|other| directory.starts_with(other));
    if directory.as_deref().is_some_and(inside) {
        let what = "is inside the directory of sockets.shared.path, which pods mount: they could open each other's sockets";
        section.wrong("directory", what, "use a directory of its own, such as /run/sds-agent-pods");
    }
    let per_pod =
        PerPod { directory: directory?, driver_name: driver_name?, kubelet_directory: kubelet_directory?, wait_for_certificate: wait? };
    let longest = [per_pod.driver_socket(), per_pod.registration_socket()].map(|path| path.as_os_str().len()).into_iter().max();
    if longest.is_some_and(|len| len > MAX_SOCKET_PATH_BYTES) {
        let what = format!("leads to socket paths of more than {MAX_SOCKET_PATH_BYTES} bytes, and the kernel's limit allows no more");
        section.wrong("kubeletDirectory", what, "shorten it, or sockets.perPod.driverName");
        return None;
    }
    Some(Some(per_pod))
}

/// An absolute path in normal form: without `.`, `..`, and doubled or final slashes.
fn plain_path(value: &Value) -> Result<PathBuf, FieldError> {
    let path = values::absolute_path(value)?;
    let plain: PathBuf = path.components().collect();
    // `components` leaves out `.` and doubled slashes, so a path that contains them differs.
    let is_plain = plain.as_os_str() == path.as_os_str() && !path.components().any(|c| c.as_os_str() == "..");
    match path.parent() {
        None => Err(FieldError::new("is the root of the file system", "choose a directory")),
        Some(_) if is_plain => Ok(path),
        Some(_) => Err(FieldError::new("is not in normal form", "leave out '.', '..' and doubled or final slashes")),
    }
}

/// A driver name that the Container Storage Interface accepts.
fn driver_name(value: &Value) -> Result<String, FieldError> {
    let name = values::object_name(value)?;
    if name.len() > 63 { Err(FieldError::new("is longer than 63 bytes", "choose a shorter name")) } else { Ok(name) }
}
