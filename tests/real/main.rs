//! The agent with real programs: two Envoys, grpcurl, openssl, strace, a control plane with the real cert-manager, and Vault's own engines.
//!
//! Nothing here is skipped: where a program is missing, the tests that need it fail and say how to get it. `make test` gets them all.
//! Everything stays on loopback and Unix sockets. Time is real and lifetimes are short.

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

mod approver;
mod attest;
mod bad_caller;
mod bad_upstream;
mod csi;
mod dev;
mod doctor;
mod embed;
mod envoy_cert_manager;
mod envoy_embedded;
mod grpcurl;
mod guides;
mod harness;
mod ipv6;
mod kubelet;
mod manifests;
mod monitoring;
mod no_disk;
mod ops;
mod profiles;
mod reload;
mod revocation;
mod upgrade;
mod vault;
mod warm_up;
