//! A steady flow of requests, and a count of those that failed.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use super::http;

/// Requests that run side by side, and the pace of each.
const WORKERS: usize = 2;
const PACE: Duration = Duration::from_millis(10);
/// A request that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Requests going on in the background.
pub struct Load {
    workers: JoinSet<Tally>,
    end: CancellationToken,
}

/// What came of them.
#[derive(Debug, Default)]
pub struct Tally {
    pub requests: u64,
    pub failed: u64,
    /// The first few failures, each a sentence.
    pub failures: Vec<String>,
}

impl Load {
    /// Asks `target` until stopped; only an answer of 200 with `expected` in it counts as good.
    pub fn start(target: SocketAddr, expected: &'static str) -> Self {
        let end = CancellationToken::new();
        let mut workers = JoinSet::new();
        for _ in 0..WORKERS {
            workers.spawn(work(target, expected, end.clone()));
        }
        Self { workers, end }
    }

    /// Lets the requests under way finish and counts.
    pub async fn stop(self) -> Tally {
        self.end.cancel();
        let mut total = Tally::default();
        for tally in self.workers.join_all().await {
            total.requests += tally.requests;
            total.failed += tally.failed;
            total.failures.extend(tally.failures);
        }
        total
    }
}

async fn work(target: SocketAddr, expected: &str, end: CancellationToken) -> Tally {
    let mut tally = Tally::default();
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Skip);
    while end.run_until_cancelled(pace.tick()).await.is_some() {
        tally.requests += 1;
        let failure = match timeout(PATIENCE, http::get_ok(target, "/")).await {
            Ok(Ok(body)) if body.contains(expected) => continue,
            Ok(Ok(body)) => format!("unexpected answer {body:?}"),
            Ok(Err(reason)) => reason,
            Err(_) => format!("no answer within {PATIENCE:?}"),
        };
        tally.failed += 1;
        if tally.failures.len() < 5 {
            tally.failures.push(failure);
        }
    }
    tally
}
