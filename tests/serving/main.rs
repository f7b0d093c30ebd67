//! The server together with store, rotation and an embedded issuer. No other program is needed.
//!
//! [`sds`] has paused time and no socket; [`session`] has real sockets and real time.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "tests write files, and fail loudly"
)]

mod sds;
mod session;
