//! The agent between clients and issuers: two Envoys, grpcurl and `fetch` as clients, the embedded issuer and the real cert-manager as
//! issuers, and failures of the issuers.
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

mod bad_upstream;
mod cluster_trust_bundles;
mod dev;
mod embed;
mod envoy_cert_manager;
mod envoy_embedded;
mod grpcurl;
mod guides;
mod shapes;
mod upgrade;
