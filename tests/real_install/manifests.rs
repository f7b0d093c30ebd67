//! What `daemonset/` installs: the chart against kustomize, the objects against the real API server, the pods on the real kubelet.
//!
//! Everything here is rendered by the real programs and applied as it is. Where a pod cannot be as it is on a test's node, `site` says in
//! one place what is changed.

mod applied;
mod equal;
mod istio;
mod node;
mod parameters;
mod readme;
mod rights;
mod rollout;
mod site;
