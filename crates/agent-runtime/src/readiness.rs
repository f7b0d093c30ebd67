//! The agent's readiness. It is reached once, when all resources that are needed to serve are available, and is not lost again.
//!
//! The agent is ready when every [`Guard`] has been dropped, and stays ready until the process ends: a failure upstream must not take a
//! thousand agents out of service at once. A part that must be in sync first holds a guard, which is named after the resource that it waits
//! for. The composition root holds the first guard until every part has taken its own.

use std::{fmt, sync::Arc};

use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use tokio::sync::watch;

/// Name of the guard that the composition root holds.
const START: &str = "start";

/// The agent's readiness. Clones are the same readiness.
#[derive(Debug, Clone)]
pub struct Readiness {
    state: watch::Sender<State>,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    awaited: Vec<(u64, Arc<str>)>,
    ready: bool,
}

/// Prevents readiness until it is dropped.
#[must_use = "a guard that is dropped at once prevents nothing"]
pub struct Guard {
    readiness: Readiness,
    /// `None` after it was abandoned.
    id: Option<u64>,
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Guard({:?})", self.id)
    }
}

impl Readiness {
    /// Creates a readiness that waits for the returned guard.
    pub fn new(metrics: Metrics) -> (Self, Guard) {
        let readiness = Self { state: watch::Sender::new(State::default()), metrics };
        let start = readiness.guard(START);
        (readiness, start)
    }

    /// Adds a guard, listed as `name` in the response to `/readyz?verbose`. It has no effect after readiness was reached.
    pub fn guard(&self, name: &str) -> Guard {
        let mut id = 0;
        self.state.send_if_modified(|state| {
            id = state.next;
            state.next += 1;
            if !state.ready {
                state.awaited.push((id, name.into()));
            }
            false
        });
        Guard { readiness: self.clone(), id: Some(id) }
    }

    /// Returns whether readiness has been reached.
    pub fn is_ready(&self) -> bool {
        self.state.borrow().ready
    }

    /// Returns the names of the guards that are still held, oldest first.
    pub fn awaited(&self) -> Vec<Arc<str>> {
        self.state.borrow().awaited.iter().map(|(_, name)| name.clone()).collect()
    }

    /// Waits until no guard except `guard` is held. Cancel safe.
    pub async fn awaits_only(&self, guard: &Guard) {
        let only = |state: &State| state.awaited.iter().all(|(id, _)| Some(*id) == guard.id);
        // The sender lives in `self`, so the wait does not fail.
        let _ = self.state.subscribe().wait_for(only).await;
    }

    /// Waits until readiness has been reached. Cancel safe.
    pub async fn reached(&self) {
        // The sender lives in `self`, so the wait does not fail.
        let _ = self.state.subscribe().wait_for(|state| state.ready).await;
    }
}

impl Guard {
    /// Drops the guard without releasing it: its resource will never be available, and the agent does not become ready.
    pub fn abandon(mut self) {
        self.id = None;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let Some(mine) = self.id else { return };
        let mut reached = false;
        self.readiness.state.send_modify(|state| {
            state.awaited.retain(|(id, _)| *id != mine);
            reached = !state.ready && state.awaited.is_empty();
            state.ready |= reached;
        });
        if reached {
            self.readiness.metrics.ready.set(1);
        }
    }
}

/// Metrics of readiness.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    ready: Gauge,
}

impl Metrics {
    /// Registers the metrics in `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("ready", "1 after the agent has become ready; it does not return to 0", metrics.ready.clone());
        metrics
    }

    /// Registers all metrics, for the reference.
    #[cfg(any(test, feature = "testing"))]
    pub fn sample(registry: &mut Registry) {
        Self::register(registry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_is_what_is_left_when_every_guard_is_dropped_and_it_latches() {
        let metrics = Metrics::default();
        let (readiness, start) = Readiness::new(metrics.clone());
        let (pods, bundle) = (readiness.guard("pod index"), readiness.guard("trust bundle"));
        let waiter = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.reached().await }
        });
        drop(start);
        drop(pods);
        assert_eq!(readiness.awaited(), ["trust bundle".into()]);
        assert!(!readiness.is_ready());
        assert_eq!(metrics.ready.get(), 0);

        drop(bundle);
        assert!(readiness.is_ready());
        assert_eq!(metrics.ready.get(), 1);
        waiter.await.unwrap();

        let _late = readiness.guard("late");
        assert!(readiness.is_ready() && readiness.awaited().is_empty());
    }

    #[test]
    fn an_abandoned_guard_makes_nobody_ready() {
        let (readiness, start) = Readiness::new(Metrics::default());
        readiness.guard("the pod index").abandon();
        drop(start);
        assert!(!readiness.is_ready());
    }

    #[test]
    fn the_start_holds_readiness_back_between_two_parts() {
        let (readiness, start) = Readiness::new(Metrics::default());
        drop(readiness.guard("quick"));
        assert!(!readiness.is_ready());
        assert_eq!(readiness.awaited(), [START.into()]);
        drop(start);
        assert!(readiness.is_ready());
    }
}
