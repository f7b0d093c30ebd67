//! Shared parts of the benches: the agent and the floor on Unix sockets, one client for both, and a server in a separate process.
#![allow(
    dead_code,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a bench may fail loudly, prints, computes with rounded figures, and uses a part of this"
)]

pub mod agent;
pub mod client;
pub mod fleet;
pub mod flood;
pub mod floor;
pub mod process;
pub mod pushing;
pub mod stats;
