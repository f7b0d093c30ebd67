//! The manifests in `daemonset/`: the chart compared with kustomize, the objects with the real API server, the pods with the real
//! kubelet.
//!
//! The real programs render all manifests, and the tests apply them unchanged. Where a pod cannot run unchanged on a test's node, `site`
//! makes the changes in one place.

mod applied;
mod equal;
mod istio;
mod network_policy;
mod node;
mod parameters;
mod placement;
mod readme;
mod rights;
mod rollout;
mod site;
mod socket_mounts;
