//! What the tests share: other programs, the agent as a child, and waiting with a limit.

use std::time::Duration;

use tokio::{
    sync::{Mutex, MutexGuard},
    time::{Instant, sleep, timeout_at},
};

pub mod agent;
pub mod agent_pod;
pub mod authority;
pub mod cgroups;
pub mod child;
pub mod cluster;
pub mod envoy;
pub mod fetch;
pub mod host;
pub mod http;
pub mod kubelet;
pub mod load;
pub mod manifests;
pub mod memory;
pub mod node;
pub mod pair;
pub mod plane;
pub mod prometheus;
pub mod recorder;
pub mod relay;
pub mod scene;
pub mod signer;
pub mod tools;
pub mod trace;
pub mod vault;

/// Between two looks at a program that cannot be awaited.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Tests with Envoys and load go one at a time: they measure, and two cores are few. Held for a whole test.
pub async fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::const_new(());
    TURN.lock().await
}

/// Looks until `probe` has an answer. For other programs' states only; panics with the last obstacle when `limit` has passed.
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

/// A port of 127.0.0.1 that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("its address").port()
}
