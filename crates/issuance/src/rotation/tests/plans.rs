//! Changes of the plan during orders, renewals and waits.

use workload_identity::Profile;

use super::*;

fn plan(b: &Bench, change: impl FnOnce(&mut Profile)) -> Arc<Plan> {
    let mut profile = (*identity("a").profile).clone();
    change(&mut profile);
    let issuers = b.plan.borrow().issuer(&IssuerName("mesh".into())).cloned().unwrap();
    let issuers = BTreeMap::from([(profile.issuer.clone(), issuers)]);
    Arc::new(Plan::new(issuers, [Arc::new(profile)], RETENTION))
}

#[tokio::test(start_paused = true)]
async fn a_configuration_change_retries_failed_orders_at_once() {
    for retry in [Retry::Configuration, Retry::After(Duration::from_secs(3000))] {
        let b = Bench::new([Script::Fail(retry), Script::Fail(retry)]);
        let lease = b.want("a");
        settle().await;
        assert_eq!(b.orders(), 1);
        for tries in [2, 3] {
            b.plan.send_replace(plan(&b, |_| {}));
            tokio::time::sleep(Duration::from_secs(3)).await;
            assert_eq!(b.orders(), tries, "{retry:?}");
        }
        material(&lease, None).await;
    }
}

#[tokio::test(start_paused = true)]
async fn identities_without_a_profile_are_not_ordered_or_renewed() {
    let b = Bench::new([Script::Issue, Script::Pend]);
    let lease = b.want("a");
    let first = material(&lease, None).await;
    let pending = b.want("b");
    settle().await;
    assert_eq!((b.orders(), b.dropped.load(Ordering::SeqCst)), (2, 1));

    b.plan.send_replace(plan(&b, |profile| profile.epoch = 1));
    settle().await;
    assert_eq!(b.dropped.load(Ordering::SeqCst), 2, "the pending order is given up, and its request deleted");
    let late = b.want("c");
    tokio::time::sleep(Duration::from_secs(3000)).await;
    assert_eq!(b.orders(), 2);
    assert!(Arc::ptr_eq(&lease.current().unwrap(), &first), "it is still served");
    assert!(pending.current().is_none() && late.current().is_none());

    b.plan.send_replace(plan(&b, |_| {}));
    material(&pending, None).await;
    material(&late, None).await;
    material(&lease, Some(&first)).await;
    assert_eq!(b.orders(), 5);
}

#[tokio::test(start_paused = true)]
async fn an_issuer_that_is_called_otherwise_goes_on_issuing() {
    let b = Bench::new([]);
    let lease = b.want("a");
    let first = material(&lease, None).await;
    b.plan.send_replace(plan(&b, |profile| (profile.issuer, profile.name) = (IssuerName("moved".into()), "moved".into())));
    let second = material(&lease, Some(&first)).await;
    assert_eq!((&*second.identity.profile.issuer.0, b.orders()), ("moved", 2));
}
