//! Which authority signs what, and for which caller: approver and policy, profiles, a changed configuration, revocation lists. With the real
//! API server, cert-manager and Envoy.
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

mod approver;
mod profiles;
mod reload;
mod revocation;
