//! The harness of the tests with real programs: the agent and other programs as child processes, a cluster, a node, load, and waits with
//! a limit.
//!
//! It depends on no crate of the workspace: it uses the agent as a program, so a change of the agent does not recompile the harness.
//! Cargo runs test programs one after the other, so a value that is unique in a process ([`turn`], the addresses of nodes) is unique in a
//! run.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::missing_errors_doc,
    clippy::cast_precision_loss,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    missing_docs,
    reason = "tests write files for other programs, wait for those, and fail loudly; their helpers document what a name does not say"
)]

use std::time::Duration;

use tokio::{
    sync::{Mutex, MutexGuard},
    time::{Instant, sleep, timeout_at},
};

pub mod agent;
pub mod agent_pod;
pub mod ask;
pub mod authority;
pub mod cgroups;
pub mod child;
pub mod cluster;
pub mod doctor;
pub mod envoy;
pub mod fetch;
pub mod guarded;
pub mod hoard;
pub mod host;
pub mod http;
pub mod load;
pub mod manifests;
pub mod memory;
pub mod node;
pub mod pair;
pub mod paths;
pub mod plane;
pub mod prometheus;
pub mod recorder;
pub mod relay;
pub mod scene;
pub mod shared_plane;
pub mod signer;
pub mod surge;
pub mod tools;
pub mod trace;
pub mod world;

/// Interval between two polls of a program's state that cannot be awaited.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Serialises tests with Envoys and load: they measure times, which parallel tests would distort on two cores. The caller holds the
/// guard for a whole test.
pub async fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::const_new(());
    TURN.lock().await
}

/// Polls until `probe` returns a value. Only for states of other programs. Panics with the last error when `limit` has passed.
pub async fn eventually<T>(what: &str, limit: Duration, mut probe: impl AsyncFnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + limit;
    let mut obstacle = "it was never seen".to_owned();
    while Instant::now() < deadline {
        match timeout_at(deadline, probe()).await {
            Ok(Ok(found)) => return found,
            Ok(Err(reason)) => obstacle = reason,
            Err(_) => break,
        }
        sleep(LOOK_AGAIN).await;
    }
    panic!("{what}: not within {limit:?}: {obstacle}");
}

/// A port of 127.0.0.1 that was free at the time of the call.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("its address").port()
}
