//! Callers that fetch: each lease ends before rotation has read its event.

use super::*;
use crate::rotation::reissue::{Reissued, Which};

/// Fetches as the service does: without a lease if no attempt is due, and otherwise with a lease that ends in the same turn.
fn visit(b: &Bench) -> Option<Arc<Svid>> {
    let (identity, now) = (identity("a"), b.clock.now());
    b.store.at_rest(&identity, now).or_else(|| b.want("a").current())
}

/// Visits every 100 s until `at`, so that the entry is kept, and once at `at`.
async fn visit_until(b: &Bench, at: SystemTime) -> Option<Arc<Svid>> {
    while let Ok(left) = at.duration_since(b.clock.now()).map(|left| left.min(Duration::from_secs(100))) {
        visit(b);
        if left.is_zero() {
            break;
        }
        tokio::time::sleep(left).await;
    }
    visit(b)
}

async fn reissue(b: &Bench, over: Duration) -> Reissued {
    let (answer, counts) = tokio::sync::oneshot::channel();
    b.reissue.send(Reissue { which: Which::default(), over, answer }).await.unwrap();
    counts.await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_fetch_that_finds_a_due_certificate_starts_one_order() {
    let b = Bench::new([]);
    let first = material(&b.want("a"), None).await;
    let mut current = first;
    for orders in 2..8 {
        assert!(Arc::ptr_eq(&visit_until(&b, current.renew_at).await.unwrap(), &current), "it is served while the next one is issued");
        settle().await;
        assert_eq!(b.orders(), orders);
        let settled = schedule::settled_at(&current.chain.validity).duration_since(current.chain.validity.not_before).unwrap();
        tokio::time::sleep(settled).await;
        let next = visit(&b).unwrap();
        assert!(!Arc::ptr_eq(&next, &current));
        assert!(b.clock.now() < current.chain.validity.not_after);
        current = next;
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_fetches_in_a_loop_has_one_order_at_a_time() {
    let b = Bench::new([Script::Issue, Script::Pend]);
    let first = material(&b.want("a"), None).await;
    visit_until(&b, first.renew_at).await;
    for _ in 0..1000 {
        visit(&b);
        settle().await;
    }
    assert_eq!(b.orders(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_fetches_in_a_loop_waits_for_the_backoff() {
    let wait = Duration::from_secs(60);
    let b = Bench::new([Script::Issue]);
    let first = material(&b.want("a"), None).await;
    visit_until(&b, first.renew_at - Duration::from_secs(1)).await;
    b.script.lock().unwrap().extend((0..100).map(|_| Script::Fail(Retry::After(wait))));
    let start = tokio::time::Instant::now();
    while start.elapsed() < 10 * wait {
        visit(&b);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The first order, and at most one in each wait.
    assert!((6..=11).contains(&b.orders()), "{}", b.orders());
}

#[tokio::test(start_paused = true)]
async fn an_order_for_a_caller_that_has_left_names_its_pod() {
    let b = Bench::new([]);
    let pod = PodRef { namespace: "ns".into(), name: "one".into(), uid: "one".into() };
    let first = material(&b.store.lease(&identity("a"), Demand::Now, Some(pod.clone())), None).await;
    visit_until(&b, first.renew_at).await;
    settle().await;
    assert_eq!(*b.evidence.lock().unwrap(), [Some(pod.clone()), Some(pod)]);
}

#[tokio::test(start_paused = true)]
async fn a_first_certificate_is_ordered_though_its_caller_has_left() {
    let b = Bench::new([]);
    assert!(visit(&b).is_none());
    settle().await;
    assert_eq!(b.orders(), 1);
    assert!(visit(&b).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_fetched_certificate_is_replaced_when_its_root_is_removed() {
    let b = Bench::new([Script::Issue, Script::Foreign]);
    let first = material(&b.want("a"), None).await;
    settle().await;
    b.source.take(b.foreign.bundle().unwrap()).unwrap();
    tokio::time::sleep(Duration::from_secs(121)).await;
    assert_eq!(b.orders(), 2, "no client has fetched since");
    let second = visit(&b).unwrap();
    assert_ne!(first.authority, second.authority);
    assert!(b.store.at_rest(&identity("a"), b.clock.now()).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_call_to_reissue_reaches_a_fetched_certificate() {
    let b = Bench::new([]);
    let first = material(&b.want("a"), None).await;
    settle().await;
    assert_eq!(reissue(&b, Duration::from_secs(30)).await, Reissued { matched: 1, just_done: 0, retried: 0 });
    // A client that comes and goes meanwhile does not cancel the call.
    drop(b.want("a"));
    tokio::time::sleep(Duration::from_secs(30 + 61)).await;
    assert_eq!(b.orders(), 2, "no client has fetched since");
    let second = visit(&b).unwrap();
    assert!(!Arc::ptr_eq(&first, &second));
    assert_eq!(reissue(&b, Duration::ZERO).await, Reissued { matched: 1, just_done: 0, retried: 0 });
    visit(&b);
    settle().await;
    visit(&b);
    assert_eq!(b.orders(), 3, "each call replaces it once");
}

#[tokio::test(start_paused = true)]
async fn a_call_to_reissue_retries_for_a_caller_that_has_left() {
    let b = Bench::new([Script::Fail(Retry::After(Duration::from_secs(300)))]);
    visit(&b);
    settle().await;
    assert_eq!(reissue(&b, Duration::from_secs(10)).await, Reissued { matched: 0, just_done: 0, retried: 1 });
    tokio::time::sleep(Duration::from_secs(11)).await;
    assert_eq!(b.orders(), 2);
    assert!(visit(&b).is_some());
}

#[tokio::test(start_paused = true)]
async fn an_idle_certificate_that_no_client_fetches_is_not_renewed() {
    let b = Bench::new([]);
    let weak = Arc::downgrade(&material(&b.want("a"), None).await);
    tokio::time::sleep(RETENTION + Duration::from_secs(1)).await;
    assert!(weak.upgrade().is_none());
    assert_eq!(b.orders(), 1);
}
