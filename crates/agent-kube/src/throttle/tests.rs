use tokio::{task::JoinHandle, time::timeout};

use super::*;

const CREATE: Kind = (Verb::create, Resource::certificaterequests);
const DELETE: Kind = (Verb::delete, Resource::certificaterequests);
const WATCH: Kind = (Verb::watch, Resource::pods);

fn throttle(per_second: u32, burst: u32) -> Arc<Throttle> {
    Arc::new(Throttle::new(RequestRate { per_second, burst }))
}

/// Starts a request. Its task returns the time at which the request was admitted.
fn ask(throttle: &Arc<Throttle>, kind: Kind) -> JoinHandle<Instant> {
    let throttle = throttle.clone();
    tokio::spawn(async move {
        throttle.admit(kind).await.unwrap();
        Instant::now()
    })
}

async fn settle() {
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_burst_goes_at_once_and_the_rest_at_the_rate() {
    let (throttle, start) = (throttle(20, 40), Instant::now());
    let all: Vec<_> = (0..140).map(|_| ask(&throttle, CREATE)).collect();
    let mut times = Vec::new();
    for request in all {
        times.push((request.await.unwrap() - start).as_millis());
    }
    assert_eq!(times.iter().filter(|t| **t == 0).count(), 40);
    assert_eq!((times[40], times[139]), (50, 5000), "first come, first served");

    tokio::time::sleep(Duration::from_secs(60)).await;
    let later = Instant::now();
    for _ in 0..40 {
        throttle.admit(CREATE).await.unwrap();
    }
    assert_eq!(later.elapsed(), Duration::ZERO, "an idle minute accumulates one burst");
    let waits = throttle.admit(CREATE).await.unwrap();
    assert_eq!(waits, Waits { rate_limit: Duration::from_millis(50), retry_after: Duration::ZERO });
}

#[tokio::test(start_paused = true)]
async fn no_class_starves_another() {
    let (throttle, start) = (throttle(10, 1), Instant::now());
    for _ in 0..1000 {
        drop(ask(&throttle, DELETE));
    }
    settle().await;
    let create = ask(&throttle, CREATE).await.unwrap() - start;
    assert!(create <= Duration::from_millis(300), "a create behind 1,000 deletes waits for two of them, not {create:?}");

    for _ in 0..1000 {
        drop(ask(&throttle, CREATE));
    }
    settle().await;
    let start = Instant::now();
    let watch = ask(&throttle, WATCH).await.unwrap() - start;
    assert!(watch <= Duration::from_millis(500), "{watch:?}");
    let left = || throttle.lock().queues.each_ref().map(|queue| queue.waiting.len());
    let before = left();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let after = left();
    let (creates, deletes) = (before[0] - after[0], before[2] - after[2]);
    assert!((79..=81).contains(&creates) && (19..=21).contains(&deletes), "four creates for each delete, not {creates} and {deletes}");
}

#[tokio::test(start_paused = true)]
async fn who_gives_up_takes_no_token_along_and_holds_up_nobody() {
    let (throttle, start) = (throttle(1, 1), Instant::now());
    throttle.admit(CREATE).await.unwrap();
    let all: Vec<_> = (0..10).map(|_| ask(&throttle, CREATE)).collect();
    settle().await;
    // All except the last, including the first one, which has set the timer.
    all[..9].iter().for_each(JoinHandle::abort);
    let last = all.into_iter().last().unwrap();
    let last = timeout(Duration::from_secs(60), last).await.expect("no request has a timer");
    assert_eq!(last.unwrap() - start, Duration::from_secs(1));
    assert!(throttle.lock().first().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_hold_stops_its_own_kind_those_in_the_queue_included_and_nobody_else() {
    let (throttle, start) = (throttle(10, 1), Instant::now());
    throttle.admit(DELETE).await.unwrap();
    let queued = ask(&throttle, CREATE);
    settle().await;
    assert!(throttle.hold(CREATE, Duration::from_secs(10)));
    assert!(!throttle.hold(CREATE, Duration::from_secs(1)), "logged once");
    let late = ask(&throttle, CREATE);
    let other = ask(&throttle, WATCH);
    assert!(other.await.unwrap() - start < Duration::from_secs(1));
    for held in [queued, late] {
        let waited = held.await.unwrap() - start;
        assert!(waited >= Duration::from_secs(10) && waited <= Duration::from_millis(15_300), "{waited:?}");
    }
    assert!(throttle.answered(CREATE) && !throttle.answered(CREATE));
}

#[tokio::test(start_paused = true)]
async fn a_long_hold_is_told_at_once_and_no_hold_is_for_ever() {
    let throttle = throttle(10, 10);
    throttle.hold(CREATE, Duration::from_secs(86_400));
    let start = Instant::now();
    let held = throttle.admit(CREATE).await.unwrap_err();
    assert_eq!(start.elapsed(), Duration::ZERO);
    assert!(held.left >= MAX_RETRY_AFTER && held.left <= MAX_RETRY_AFTER * 3 / 2, "{held:?}");
    tokio::time::sleep(held.left).await;
    timeout(Duration::from_secs(1), throttle.admit(CREATE)).await.unwrap().unwrap();
    assert!(throttle.lock().holds.is_empty());
}
