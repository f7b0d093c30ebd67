//! The agent between its clients and its issuers: two Envoys, grpcurl and `fetch` on one side, the embedded issuer and the real cert-manager
//! on the other, and what goes wrong on that side.
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

mod bad_upstream;
mod dev;
mod embed;
mod envoy_cert_manager;
mod envoy_embedded;
mod grpcurl;
mod guides;
mod upgrade;
