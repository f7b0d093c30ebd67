//! What is installed and run by operators: everything below `daemonset/`, `doctor` and `certs`. With the real API server, kubelet, helm and
//! kustomize.
//!
//! Nothing is skipped: where a program is missing, the tests that need it fail and say how to get it.

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

mod doctor;
mod manifests;
mod ops;
