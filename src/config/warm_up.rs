//! The section `warmUp`: pods whose certificates the agent orders before the first call.

use super::{Attestation, SharedSocket, WarmUp, reader::Section, values};

/// Decodes the section; the inner `None` means that it is disabled. `shared` is the shared socket, or `None` if it is invalid.
pub(super) fn decode(
    section: &Section<'_>,
    attestation: Option<Attestation>,
    shared: Option<Option<&SharedSocket>>,
) -> Option<Option<WarmUp>> {
    let enabled = section.read("enabled", false, values::boolean);
    let pod_labels = section.map("podLabels", values::object_label);
    let socket_mount = section.read("socketMount", true, values::boolean);
    if enabled != Some(true) {
        return enabled.map(|_| None);
    }
    if attestation == Some(Attestation::Unix) {
        section.wrong("enabled", "needs pods, which `attestation: unix` does not know", "set attestation to kubernetes, or this to false");
    } else if shared == Some(None) {
        let what = "is about callers of sockets.shared, which is not enabled; pods with sockets of their own are warmed up anyway";
        section.wrong("enabled", what, "set it to false");
    }
    let warm_up = WarmUp { pod_labels: pod_labels?, socket_mount: socket_mount? };
    if !warm_up.socket_mount && warm_up.pod_labels.is_empty() {
        section.wrong("socketMount", "leaves no pod to warm up, because podLabels is empty", "name labels, or set enabled to false");
        return None;
    }
    Some(Some(warm_up))
}
