//! Which pod a caller is, proven by the kernel and the Kubernetes API.
//!
//! - [`attestor`]: peer, cgroup, pod, service account, for the socket that all pods of a node share;
//! - [`mount`]: the pod that a socket of its own was mounted into;
//! - [`cgroup`]: the reading of `/proc/<pid>/cgroup`;
//! - [`pods`]: this node's pods, by UID, from one watch.

// It writes no file; its tests do.
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod attestor;
pub mod cgroup;
pub mod mount;
pub mod pods;
