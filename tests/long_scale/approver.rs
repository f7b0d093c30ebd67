//! The cluster with `daemonset/` installed, of `tests/real`.

#[path = "../real/approver/ask.rs"]
pub mod ask;
#[path = "../real/approver/world.rs"]
pub mod world;
