//! Waits after failures, and places in the queue.

use super::*;

/// Polls every 100 ms for `seconds`, and issues each order at once. Returns the orders.
fn answered(b: &mut Bench, seconds: u64) -> Vec<Id> {
    let mut started = Vec::new();
    for _ in 0..seconds * 10 {
        loop {
            let starts = b.starts();
            if starts.is_empty() {
                break;
            }
            for id in starts {
                b.issued(id, 86_400);
                started.push(id);
            }
        }
        b.pass(0.1);
    }
    started
}

/// All orders of `ids` fail for `seconds`.
fn failing(b: &mut Bench, seconds: u64) {
    for _ in 0..seconds {
        loop {
            let starts = b.starts();
            if starts.is_empty() {
                break;
            }
            for id in starts {
                b.planner.failed(b.now, id, Retry::Backoff, false);
            }
        }
        b.pass(1.0);
    }
}

#[test]
fn the_first_success_after_an_outage_hastens_what_waits_or_ends() {
    let mut b = Bench::new();
    for id in 0..200 {
        b.want(id);
    }
    let other = Authority("other".into());
    b.planner.wanted(b.now, 1000, &other, Some(Demand::Now));
    // Its certificate has long to live.
    b.hold(1001, 0, 100 * DAY);
    failing(&mut b, 3600);
    let mut waits = [1000, 1001].map(|id| b.planner.jobs[&id].not_before);
    while b.starts().is_empty() {
        b.pass(0.1);
    }
    // The first order after the outage: whichever it is, it is answered.
    let first = b.planner.jobs.iter().find(|(_, job)| matches!(job.phase, Phase::Running { .. })).map(|(id, _)| *id).unwrap();
    if first > 200 {
        waits = [None; 2];
    }
    b.issued(first, 86_400);
    let served = answered(&mut b, 20);
    assert!(served.len() >= 199 && served.len() <= 201, "{} orders in 20 s", served.len());
    assert!((0..200).all(|id| b.planner.jobs[&id].in_use.is_some()));
    for (id, wait) in [1000, 1001].into_iter().zip(waits) {
        let wait = wait.filter(|at| *at > b.now.mono);
        assert!(wait.is_none() || b.planner.jobs[&id].not_before == wait, "another issuer, or a routine renewal: {id}");
    }
}

#[test]
fn an_order_that_fails_late_in_an_outage_is_hastened_too() {
    let mut b = Bench::new();
    b.want(1);
    b.want(2);
    failing(&mut b, 3600);
    while b.planner.hasten(b.now, 1, Duration::ZERO) | b.planner.hasten(b.now, 2, Duration::ZERO) {}
    assert_eq!(b.starts().len(), 2);
    b.pass(1.0);
    b.issued(1, 86_400);
    assert!(b.planner.failed(b.now, 2, Retry::Backoff, false) <= Duration::from_secs(15));
    // A time that the upstream has named is respected.
    b.pass(15.0);
    assert_eq!(b.starts(), [2]);
    assert!(b.planner.failed(b.now, 2, Retry::After(Duration::from_secs(300)), false) >= Duration::from_secs(300));
}

#[test]
fn an_issuer_that_rejects_one_identity_is_not_asked_for_it_more_often() {
    // Identity 0 always fails, and every 2 s another identity gets its first certificate.
    let mut b = Bench::new();
    b.want(0);
    let (mut orders, seconds) = (0, 3600);
    for second in 0..seconds {
        if second % 2 == 0 {
            b.want(second + 1);
        }
        for id in b.starts() {
            if id == 0 {
                orders += 1;
                b.planner.failed(b.now, 0, Retry::Backoff, false);
            } else {
                b.issued(id, 86_400);
            }
        }
        b.pass(1.0);
    }
    assert!(orders <= 15 + seconds / 60 * 2, "{orders} orders in an hour");
}

#[test]
fn a_denial_is_not_hastened_by_the_success_of_another_identity() {
    let mut b = Bench::new();
    b.want(1);
    b.want(2);
    b.want(3);
    assert_eq!(b.starts(), [1, 2, 3]);
    b.planner.failed(b.now, 1, Retry::After(Duration::from_secs(300)), false);
    b.planner.failed(b.now, 3, Retry::Configuration, false);
    b.issued(2, 86_400);
    b.pass(239.0);
    assert_eq!(b.starts(), [0; 0]);
}

#[test]
fn a_client_that_gives_up_keeps_its_place_in_the_queue() {
    let mut b = Bench::new();
    for id in 1..=6 {
        b.want(id);
    }
    assert_eq!(b.starts().len(), 6);
    for id in 7..=9 {
        b.want(id);
    }
    // A client with a short deadline calls again and again.
    for _ in 0..20 {
        b.planner.idle(b.now, 7);
        b.pass(1.0);
        assert_eq!(b.starts(), [0; 0]);
        b.want(7);
    }
    b.planner.idle(b.now, 7);
    b.issued(1, 86_400);
    assert_eq!(b.starts(), [7], "the slot is free while no client waits, and the next call finds the certificate");
    b.issued(7, 86_400);
    assert_eq!(b.starts(), [8]);
}

#[test]
fn a_place_in_the_queue_ends_with_the_retention() {
    let mut b = Bench::new();
    for id in 1..=7 {
        b.want(id);
    }
    assert_eq!(b.starts().len(), 6);
    b.planner.idle(b.now, 7);
    b.pass(RETENTION.as_secs_f64());
    let actions = b.actions();
    assert!(actions.contains(&Action::Forget(7)), "{actions:?}");
    b.planner.forgotten(7);
    b.issued(1, 86_400);
    assert_eq!(b.starts(), [0; 0]);
}

#[test]
fn a_place_in_the_queue_survives_a_change_of_the_class() {
    let mut b = Bench::new();
    for id in 1..=6 {
        b.want(id);
    }
    assert_eq!(b.starts().len(), 6);
    // Two certificates that are about to end occupy the reserved slots.
    b.hold(20, 0, 4);
    b.hold(21, 0, 4);
    b.pass(2.5);
    assert_eq!(b.starts(), [20, 21]);
    b.hold(7, 0, 5);
    b.want(8);
    b.pass(5.1);
    assert_eq!(b.starts(), [0; 0]);
    b.issued(1, 86_400);
    assert_eq!(b.starts(), [7], "its client's certificate has expired, and it has waited longer");
}
