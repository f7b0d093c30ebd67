//! Identifies the pod of a caller, proven by the kernel and the Kubernetes API.
//!
//! - [`attestor`]: the socket that all pods of a node share: peer, cgroup, pod, service account;
//! - [`mount`]: a socket that is mounted into a single pod;
//! - [`cgroup`]: the parser of `/proc/<pid>/cgroup`;
//! - [`pods`]: this node's pods by UID, from one watch.

// Only the tests write files.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod attestor;
pub mod cgroup;
pub mod mount;
pub mod pods;
