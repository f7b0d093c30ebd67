//! The real rotation task on paused time, with a scripted issuer.

mod bench;
mod costs;
mod fetches;
mod outages;
mod plans;
mod requests;

use std::{collections::BTreeMap, sync::atomic::Ordering, task::Poll};

use sds_server::{
    material::authority_of_certificate,
    store::{Demand, Lease},
};
use tokio::sync::oneshot;
use workload_identity::samples::identity;

use self::bench::{Bench, RETENTION, Script, material, settle};
use super::*;
use crate::issuer::Retry;

#[tokio::test(start_paused = true)]
async fn many_subscribers_make_one_order_and_share_the_certificate() {
    let b = Bench::new([]);
    let leases: Vec<_> = (0..50).map(|_| b.want("a")).collect();
    let first = material(&leases[0], None).await;
    for lease in &leases {
        assert!(Arc::ptr_eq(&first, &material(lease, None).await));
    }
    assert_eq!(b.orders(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_replaced_before_it_ends_again_and_again() {
    let b = Bench::new([]);
    let lease = b.want("a");
    let mut current = material(&lease, None).await;
    for _ in 0..5 {
        let next = material(&lease, Some(&current)).await;
        assert!(b.clock.now() < current.chain.validity.not_after, "replaced after its end");
        current = next;
    }
    assert_eq!(b.orders(), 6);
}

#[tokio::test(start_paused = true)]
async fn a_failing_renewal_keeps_the_good_certificate_and_recovers() {
    let b = Bench::new([
        Script::Issue,
        Script::Fail(Retry::Backoff),
        Script::Panic,
        Script::Foreign,
        Script::Fail(Retry::After(Duration::from_secs(60))),
    ]);
    let lease = b.want("a");
    let first = material(&lease, None).await;
    let second = material(&lease, Some(&first)).await;
    assert_eq!(b.orders(), 6);
    assert!(b.clock.now() < first.chain.validity.not_after);
    assert_eq!(second.spiffe_id().as_str(), "spiffe://cluster.local/ns/shop/sa/a");
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_not_published_until_its_root_is_trusted() {
    let b = Bench::new([Script::Foreign, Script::Fail(Retry::After(Duration::from_secs(3000)))]);
    let lease = b.want("a");
    settle().await;
    assert!(lease.current().is_none());
    b.source.take(b.foreign.bundle().unwrap()).unwrap();
    let svid = material(&lease, None).await;
    assert_eq!(b.orders(), 1, "the first answer is verified again");
    let root = authority_of_certificate(&b.foreign.bundle().unwrap().roots()[0]).unwrap();
    assert!(svid.version().contains(&format!(".{root}-")), "its root is the last level: {}", svid.version());
}

#[tokio::test(start_paused = true)]
async fn nothing_is_published_before_the_bundle_that_it_must_lead_to() {
    let b = Bench::without_bundle([], true);
    let lease = b.want("a");
    settle().await;
    assert_eq!((b.orders(), lease.current().is_some()), (1, false));
    b.source.take(b.embedded.bundle().unwrap()).unwrap();
    material(&lease, None).await;
    assert_eq!(b.orders(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_root_that_leaves_the_bundle_takes_its_certificates_along_soon() {
    let b = Bench::new([]);
    let lease = b.want("a");
    let first = material(&lease, None).await;
    b.script.lock().unwrap().push_back(Script::Foreign);
    let start = tokio::time::Instant::now();
    b.source.take(b.foreign.bundle().unwrap()).unwrap();
    let second = material(&lease, Some(&first)).await;
    assert_ne!(first.authority, second.authority);
    // At most a minute of spread and a minute of settling.
    assert!(start.elapsed() <= Duration::from_secs(121), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn what_is_at_rest_can_be_taken_in_passing_and_what_is_due_cannot() {
    let b = Bench::new([]);
    let passing = |at| b.store.at_rest(&identity("a"), at);
    assert!(passing(b.clock.now()).is_none(), "no client has subscribed yet");
    let svid = material(&b.want("a"), None).await;
    settle().await;
    let now = b.clock.now();
    assert!(Arc::ptr_eq(&svid, &passing(now).unwrap()));
    assert!(passing(svid.renew_at).is_none());
    // No client subscribes, but `at_rest` is called.
    tokio::time::sleep(Duration::from_secs(200)).await;
    assert!(passing(now).is_some());
    tokio::time::sleep(Duration::from_secs(200)).await;
    assert!(passing(now).is_some(), "the retention has begun again");
    // Its authority is no longer trusted: it is replaced within 60 s, though no client subscribes.
    b.script.lock().unwrap().push_back(Script::Foreign);
    b.source.take(b.foreign.bundle().unwrap()).unwrap();
    settle().await;
    assert!(passing(b.clock.now() + Duration::from_secs(60)).is_none());
    tokio::time::sleep(Duration::from_secs(121)).await;
    assert!(!Arc::ptr_eq(&svid, &passing(b.clock.now()).unwrap()));
    assert_eq!(b.orders(), 2);
}

/// Only a chain shows which authorities sign, and a restart loses that knowledge.
#[tokio::test(start_paused = true)]
async fn a_waiting_crl_renews_exactly_one_held_certificate() {
    let b = Bench::new([]);
    let now = b.clock.now();
    let held = Demand::Held { renew_at: now + Duration::from_secs(6000), not_after: now + Duration::from_secs(12_000) };
    let leases = ["a", "b", "c"].map(|who| b.store.lease(&identity(who), held, None));
    settle().await;
    assert_eq!(b.orders(), 0);
    let list = sds_server::trust::crl::samples::Authority::new("another").list(0, 0);
    b.source.offer(list.as_bytes()).unwrap();
    settle().await;
    assert_eq!(b.orders(), 1);
    assert_eq!(leases.iter().filter(|lease| lease.current().is_some()).count(), 1);
    b.source.offer(sds_server::trust::crl::samples::Authority::new("yet another").list(0, 0).as_bytes()).unwrap();
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(b.orders(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_held_certificate_is_renewed_at_its_moment_and_holds_nobody_else_up() {
    let b = Bench::new([]);
    let now = b.clock.now();
    let held = Demand::Held { renew_at: now + Duration::from_secs(600), not_after: now + Duration::from_secs(1200) };
    let lease = b.store.lease(&identity("a"), held, None);
    tokio::time::sleep(Duration::from_secs(599)).await;
    assert_eq!(b.orders(), 0);
    material(&lease, None).await;
    assert_eq!(b.orders(), 1);

    let held = b.store.lease(&identity("b"), held, None);
    let other = b.want("b");
    material(&other, None).await;
    assert!(held.current().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_forward_jump_withholds_and_destroys_nothing() {
    let b = Bench::new([]);
    let lease = b.want("a");
    let svid = material(&lease, None).await;
    b.script.lock().unwrap().extend((0..50).map(|_| Script::Fail(Retry::Backoff)));
    let mut watch = lease.watch();
    watch.mark_unchanged();
    b.clock.step(86_400 * 30);
    watch.changed().await.unwrap();
    assert!(!svid.chain.validity.is_live(b.clock.now()));
    assert!(Arc::ptr_eq(&lease.current().unwrap(), &svid), "it is still there");
    b.clock.step(-86_400 * 30);
    watch.changed().await.unwrap();
    assert!(svid.chain.validity.is_live(b.clock.now()));
    assert!(Arc::ptr_eq(&lease.current().unwrap(), &svid));
}

#[tokio::test(start_paused = true)]
async fn a_sibling_stands_in_for_a_pod_that_has_gone() {
    let b = Bench::new([Script::Fail(Retry::Now)]);
    let pod = |name: &str| PodRef { namespace: "ns".into(), name: name.into(), uid: name.into() };
    let a = b.store.lease(&identity("a"), Demand::Now, Some(pod("one")));
    let _b = b.store.lease(&identity("a"), Demand::Now, Some(pod("two")));
    let start = tokio::time::Instant::now();
    material(&a, None).await;
    assert_eq!(start.elapsed(), Duration::ZERO);
    let shown = b.evidence.lock().unwrap().clone();
    assert_eq!(shown.len(), 2);
    assert_ne!(shown[0], shown[1]);
}

/// An approver may deny a pod whose labels have changed, and approve its siblings.
#[tokio::test(start_paused = true)]
async fn after_a_denial_the_next_try_is_in_a_siblings_name_and_in_its_time() {
    let wait = Duration::from_secs(300);
    let b = Bench::new([Script::Deny(wait)]);
    let pod = |name: &str| PodRef { namespace: "ns".into(), name: name.into(), uid: name.into() };
    let a = b.store.lease(&identity("a"), Demand::Now, Some(pod("one")));
    let _b = b.store.lease(&identity("a"), Demand::Now, Some(pod("two")));
    let start = tokio::time::Instant::now();
    material(&a, None).await;
    assert!(start.elapsed() >= wait, "{:?}", start.elapsed());
    let shown = b.evidence.lock().unwrap().clone();
    assert_eq!(shown.len(), 2);
    assert_ne!(shown[0], shown[1]);
}

#[tokio::test(start_paused = true)]
async fn a_pending_order_is_dropped_when_its_identity_is_forgotten() {
    let b = Bench::new([Script::Pend]);
    let lease = b.want("a");
    settle().await;
    let status = b.store.snapshot()[0].status();
    assert_eq!(status.request.as_deref(), Some("pending-1"));
    drop(lease);
    tokio::time::sleep(Duration::from_secs(3000)).await;
    assert_eq!(b.dropped.load(Ordering::SeqCst), 0);
    tokio::time::sleep(Duration::from_secs(1000)).await;
    assert_eq!(b.dropped.load(Ordering::SeqCst), 1);
    assert!(b.store.snapshot().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_key_is_wiped_when_nobody_has_asked_for_it_for_the_retention() {
    let b = Bench::new([]);
    let lease = b.want("a");
    let weak = Arc::downgrade(&material(&lease, None).await);
    drop(lease);
    tokio::time::sleep(Duration::from_secs(299)).await;
    assert!(weak.upgrade().is_some());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(weak.upgrade().is_none(), "no reference is left behind");
}

#[tokio::test(start_paused = true)]
async fn a_subscriber_that_leaves_again_keeps_no_key_or_renewal() {
    let b = Bench::new([]);
    let lease = b.want("a");
    let weak = Arc::downgrade(&material(&lease, None).await);
    drop(lease);
    // The second lease begins after rotation has handled the end of the first, the third before it has handled the end of the second.
    tokio::time::sleep(Duration::from_secs(100)).await;
    drop(b.want("a"));
    drop(b.want("a"));
    tokio::time::sleep(Duration::from_secs(299)).await;
    assert!(weak.upgrade().is_some());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(weak.upgrade().is_none(), "no reference is left behind");
    tokio::time::sleep(Duration::from_secs(7200)).await;
    assert_eq!(b.orders(), 1, "no client has requested a renewal");
    assert!(b.store.snapshot().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_settling_renewal_is_not_published_under_a_changed_bundle() {
    let b = Bench::new([]);
    let lease = b.want("a");
    let first = material(&lease, None).await;
    tokio::time::sleep(first.renew_at.duration_since(b.clock.now()).unwrap()).await;
    settle().await;
    assert_eq!(b.orders(), 2);
    assert!(Arc::ptr_eq(&lease.current().unwrap(), &first), "the renewal is verified, and settles");
    b.script.lock().unwrap().extend((0..100).map(|_| Script::Foreign));
    b.source.take(b.foreign.bundle().unwrap()).unwrap();
    let second = material(&lease, Some(&first)).await;
    assert_ne!(first.authority, second.authority, "what was verified under the old bundle is not published under the new one");
}

/// Polls each ready task once.
async fn turn() {
    let mut turned = false;
    std::future::poll_fn(|context| {
        context.waker().wake_by_ref();
        if std::mem::replace(&mut turned, true) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn whenever_the_bundle_changes_what_is_served_leads_to_it_soon() {
    // The change meets the order at another point each time: before it, in its task, between its task and its publication, after it.
    for moment in (0..8).cycle().take(80) {
        let b = Bench::new([Script::Issue]);
        b.script.lock().unwrap().extend((0..100).map(|_| Script::Foreign));
        let body = async move {
            let lease = b.want("a");
            for _ in 0..moment {
                turn().await;
            }
            b.source.take(b.foreign.bundle().unwrap()).unwrap();
            tokio::time::sleep(Duration::from_secs(180)).await;
            let (svid, roots) = (lease.current().unwrap(), b.foreign.bundle().unwrap());
            assert!(
                sds_server::material::is_current_authority(&svid.authority, &svid.identity.profile.fingerprint(), Some(&roots)),
                "{moment} turns"
            );
        };
        // The body runs in a task, so that it takes turns with the others.
        tokio::spawn(body).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn shutdown_drops_the_orders_under_way() {
    let b = Bench::new([Script::Pend]);
    let _lease = b.want("a");
    settle().await;
    b.shutdown.cancel();
    b.task.await.unwrap();
    assert_eq!(b.dropped.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn a_key_goes_with_the_last_who_may_have_it_whatever_the_retention() {
    let b = Bench::new([]);
    let (lease, sibling) = (b.want("a"), b.want("b"));
    let (svid, kept) = (Arc::downgrade(&material(&lease, None).await), Arc::downgrade(&material(&sibling, None).await));
    drop(sibling);
    settle().await;

    // The pod ends before its stream does.
    b.present.leaves("a");
    settle().await;
    assert!(svid.upgrade().is_some(), "a stream still has it");
    drop(lease);
    settle().await;
    assert!(svid.upgrade().is_none() && b.store.snapshot().len() == 1);

    // The entry is idle, and then the pod ends.
    assert!(kept.upgrade().is_some());
    b.present.leaves("b");
    settle().await;
    assert!(kept.upgrade().is_none() && b.store.snapshot().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_order_is_dropped_with_the_last_user_of_its_identity() {
    let b = Bench::new([Script::Pend, Script::Fail(Retry::After(Duration::from_secs(100)))]);
    let lease = b.want("a");
    settle().await;
    drop(lease);
    b.present.leaves("a");
    settle().await;
    assert_eq!((b.dropped.load(Ordering::SeqCst), b.store.snapshot().len()), (1, 0));

    drop(b.want("b"));
    settle().await;
    b.present.leaves("b");
    settle().await;
    let _again = b.want("b");
    tokio::time::sleep(Duration::from_secs(50)).await;
    assert_eq!(b.orders(), 2, "the next subscriber waits as long as the issuer has requested");
}
