//! The cost of events.

use std::sync::atomic::AtomicUsize;

use agent_runtime::clock::TestClock;
use futures::future::BoxFuture;
use sds_server::trust::crl::samples::Authority;

use super::*;

/// A clock that counts its timers.
#[derive(Debug)]
struct Counting {
    clock: TestClock,
    timers: Arc<AtomicUsize>,
}

impl Clock for Counting {
    fn now(&self) -> SystemTime {
        self.clock.now()
    }

    fn sleep_until(&self, until: SystemTime) -> BoxFuture<'_, ()> {
        self.timers.fetch_add(1, Ordering::SeqCst);
        self.clock.sleep_until(until)
    }
}

/// No certificate is issued, so that no renewal is planned.
#[tokio::test(start_paused = true)]
async fn an_event_arms_no_timer_of_the_wall_clock() {
    let timers: Arc<AtomicUsize> = Arc::default();
    let counted = timers.clone();
    let b = Bench::with_clock((0..1000).map(|_| Script::Pend), move |clock| Arc::new(Counting { clock, timers: counted }));
    let start = tokio::time::Instant::now();
    let mut leases = Vec::new();
    for n in 0..500 {
        leases.push(b.want(&format!("sa-{}", n % 50)));
        drop(b.want("other"));
        settle().await;
    }
    let minutes = usize::try_from(start.elapsed().as_secs() / 60).unwrap();
    let armed = timers.load(Ordering::SeqCst);
    assert!(armed <= 3 + minutes, "{armed} timers in {minutes} min");
    // A clock that is far from any planned time still wakes rotation, which notices steps.
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(timers.load(Ordering::SeqCst) >= armed + 9);
}

/// CPU time of this thread in nanoseconds. Other load of the machine does not change it.
fn thread_time() -> f64 {
    let line = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    line.split(' ').next().unwrap().parse().unwrap()
}

/// The cost of `count` clients that come while revocation lists wait for a chain.
async fn cost_of_a_cold_start(count: usize) -> f64 {
    let b = Bench::new((0..count).map(|_| Script::Pend));
    b.source.offer(Authority::new("another").list(0, 0).as_bytes()).unwrap();
    settle().await;
    let identities: Vec<_> = (0..count).map(|n| identity(&format!("sa-{n}"))).collect();
    let start = thread_time();
    let leases: Vec<_> = identities.iter().map(|identity| b.store.lease(identity, Demand::Now, None)).collect();
    settle().await;
    assert_eq!(leases.len(), b.store.snapshot().len());
    thread_time() - start
}

#[tokio::test(start_paused = true)]
async fn clients_that_come_while_lists_wait_cost_the_same_each() {
    let (few, many) = (1000, 8000);
    cost_of_a_cold_start(few).await;
    let (one, other) = (cost_of_a_cold_start(few).await / 1000.0, cost_of_a_cold_start(many).await / 8000.0);
    assert!(other < 4.0 * one, "{one:.0} ns for each of {few}, {other:.0} ns for each of {many}");
}
