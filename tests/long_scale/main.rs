//! Loads that take minutes: `make test-long GROUP=scale`. No limit depends on the speed of the machine.

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

mod cold_start;
mod large_requests;
mod many_pods;
