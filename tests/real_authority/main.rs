//! Which authority signs which certificates for which caller: approver and policy, profiles, configuration changes, CRLs. With the real
//! API server, cert-manager and Envoy.
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

mod approver;
mod profiles;
mod reload;
mod revocation;
