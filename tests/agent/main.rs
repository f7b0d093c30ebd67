//! A complete agent on real sockets. Needs no other program.

#![allow(
    clippy::cast_precision_loss,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "tests write files, and fail loudly"
)]

mod handover;
mod parts;
