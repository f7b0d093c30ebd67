//! The agent on a node: callers in real cgroups and namespaces, the kubelet and its mounts, memory and disk, addresses, Prometheus.
//!
//! No test is skipped: if a program is missing, the tests that need it fail and say how to get it.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::cast_precision_loss,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "tests write files for other programs, wait for those, and fail loudly"
)]

mod attest;
mod bad_caller;
mod csi;
mod harness;
mod ipv6;
mod kubelet;
mod monitoring;
mod no_disk;
mod warm_up;
