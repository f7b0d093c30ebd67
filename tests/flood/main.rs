//! The flood, in a program of its own: cargo runs one after another, so that nothing else disturbs what it measures.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::cast_precision_loss,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    dead_code,
    unreachable_pub,
    reason = "tests write files for other programs, wait for those, and fail loudly; of the harness it needs a part"
)]

#[path = "../real/flood.rs"]
mod flood;
#[path = "../real/support/mod.rs"]
mod support;
