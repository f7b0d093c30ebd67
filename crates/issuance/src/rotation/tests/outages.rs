//! The end of an outage.

use super::*;

/// The issuer fails for 200 identities. Returns the leases, and the number of orders until then.
async fn outage(b: &Bench, seconds: u64) -> (Vec<Lease>, usize) {
    b.script.lock().unwrap().extend((0..100_000).map(|_| Script::Fail(Retry::Backoff)));
    let leases: Vec<_> = (0..200).map(|n| b.want(&format!("sa-{n}"))).collect();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    assert!(leases.iter().all(|lease| lease.current().is_none_or(|svid| !svid.chain.validity.is_live(b.clock.now()))));
    b.script.lock().unwrap().clear();
    (leases, b.orders())
}

/// Asserts that all leases have a valid certificate within 20 s after the first one, with little more than one order for each.
async fn recovers(b: &Bench, leases: &[Lease], before: usize) {
    let live = |lease: &&Lease| lease.current().is_some_and(|svid| svid.chain.validity.is_live(b.clock.now()));
    while !leases.iter().any(|lease| live(&lease)) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(leases.iter().filter(live).count(), leases.len());
    let orders = b.orders() - before;
    assert!(orders <= leases.len() + planner::SLOTS, "{orders} orders for {} identities", leases.len());
}

#[tokio::test(start_paused = true)]
async fn waiting_clients_are_served_within_seconds_after_an_outage() {
    let b = Bench::new([]);
    let (leases, before) = outage(&b, 3600).await;
    recovers(&b, &leases, before).await;
}

#[tokio::test(start_paused = true)]
async fn expired_certificates_are_replaced_within_seconds_after_an_outage() {
    let b = Bench::new([]);
    let leases: Vec<_> = (0..200).map(|n| b.want(&format!("sa-{n}"))).collect();
    for lease in &leases {
        material(lease, None).await;
    }
    let (leases, before) = outage(&b, 2 * 3600).await;
    recovers(&b, &leases, before).await;
}
