//! A steady flow of requests, and a count of the failed ones. Phases have a number of requests and no duration: a slow machine takes
//! longer, and the test proves the same.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::http;

/// Number of parallel requests, and the minimum interval of each.
const WORKERS: usize = 2;
const PACE: Duration = Duration::from_millis(10);
/// A request that takes longer has failed. Where no server listens, the error comes at once.
const PATIENCE: Duration = Duration::from_secs(60);
/// Minimum number of requests in a phase.
const PHASE: u64 = 50;
/// A phase that takes longer fails the test.
const PHASE_PATIENCE: Duration = Duration::from_secs(300);
/// Maximum number of failures that are reported with their text.
const MOST_TOLD: usize = 5;

/// Requests in the background.
pub struct Load {
    workers: JoinSet<()>,
    end: CancellationToken,
    tally: Arc<watch::Sender<Tally>>,
    phases: Mutex<Vec<String>>,
}

/// The results of the requests.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Requests that were answered or failed.
    pub requests: u64,
    pub failed: u64,
    /// The text of the first few failures.
    pub failures: Vec<String>,
    /// The name of each phase and the number of its requests, each at least 50.
    pub phases: Vec<String>,
}

impl Load {
    /// Sends requests to `target` until stopped. A request succeeds only with status 200 and `expected` in the body.
    pub fn start(target: SocketAddr, expected: &'static str) -> Self {
        let (end, tally) = (CancellationToken::new(), Arc::new(watch::channel(Tally::default()).0));
        let mut workers = JoinSet::new();
        for _ in 0..WORKERS {
            workers.spawn(work(target, expected, end.clone(), tally.clone()));
        }
        Self { workers, end, tally, phases: Mutex::default() }
    }

    /// Waits until 50 requests have begun and ended in this phase of the test, regardless of the time.
    pub async fn passes(&self, phase: &str) {
        let mut tally = self.tally.subscribe();
        let since = tally.borrow().requests;
        // Requests in progress began before this phase.
        let goal = since + PHASE + WORKERS as u64;
        let passed = timeout(PHASE_PATIENCE, tally.wait_for(|tally| tally.requests >= goal)).await.is_ok();
        let made = self.tally.borrow().requests - since;
        assert!(passed, "{phase}: only {made} requests in {PHASE_PATIENCE:?}: {:?}", self.tally.borrow());
        self.phases.lock().expect("not poisoned").push(format!("{phase}: {made}"));
    }

    /// Waits for the requests in progress and returns the counts.
    pub async fn stop(self) -> Tally {
        self.end.cancel();
        self.workers.join_all().await;
        Tally { phases: self.phases.into_inner().expect("not poisoned"), ..self.tally.borrow().clone() }
    }
}

async fn work(target: SocketAddr, expected: &str, end: CancellationToken, tally: Arc<watch::Sender<Tally>>) {
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Skip);
    while end.run_until_cancelled(pace.tick()).await.is_some() {
        let failure = match timeout(PATIENCE, http::get_ok(target, "/")).await {
            Ok(Ok(body)) if body.contains(expected) => None,
            Ok(Ok(body)) => Some(format!("unexpected answer {body:?}")),
            Ok(Err(reason)) => Some(reason),
            Err(_) => Some(format!("no answer within {PATIENCE:?}")),
        };
        tally.send_modify(|tally| {
            tally.requests += 1;
            tally.failed += u64::from(failure.is_some());
            tally.failures.extend(failure.filter(|_| tally.failures.len() < MOST_TOLD));
        });
    }
}
