//! The installation and the commands of operators: all of `daemonset/`, `doctor` and `certs`. With the real API server, kubelet, helm and
//! kustomize.
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

mod doctor;
mod manifests;
mod ops;
