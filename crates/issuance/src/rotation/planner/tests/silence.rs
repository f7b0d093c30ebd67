//! Unresponsive issuers.

use super::{
    super::queue::{MAX_PARKED, PROBE_INTERVAL},
    *,
};

/// For this time, the upstream takes every order and answers none. Returns the number of orders.
fn unanswered(b: &mut Bench, seconds: u64) -> usize {
    let mut started = 0;
    for _ in 0..seconds {
        for id in b.starts() {
            started += 1;
            b.planner.submitted(b.now, id);
        }
        b.pass(1.0);
    }
    started
}

#[test]
fn an_unresponsive_issuer_is_probed_once_a_minute_until_it_answers() {
    let mut b = Bench::new();
    for id in 0..1000 {
        b.want(id);
    }
    let first = unanswered(&mut b, 120);
    assert!((MAX_PARKED..=2 * MAX_PARKED).contains(&first), "{first} in two minutes");
    assert_eq!(unanswered(&mut b, 3600), 60, "one a minute");
    assert_eq!(b.planner.unresponsive(b.now).collect::<Vec<_>>(), [&b.issuer]);
    assert!(b.planner.set_aside() > 0, "after 15 min, another order waits beside a pending one");
    assert_eq!(b.planner.parked() - b.planner.set_aside() + b.planner.queued(Class::Waiting), 1000, "no order is lost");
    assert_eq!(unanswered(&mut b, 11), 1);
    let (_, wake) = b.planner.next_wake();
    assert!(wake.is_some_and(|at| at > b.now.mono && at <= b.now.mono + PROBE_INTERVAL), "and the driver does not wake before");

    // Another issuer of the same agent is not delayed.
    let other = Authority("other".into());
    for id in 5000..5006 {
        b.planner.wanted(b.now, id, &other, Some(Demand::Now));
    }
    assert_eq!(b.starts(), (5000..5006).collect::<Vec<_>>());

    // One answer is enough, and a refusal is an answer.
    b.planner.aside_failed(b.now, 0, 0);
    assert_eq!(b.planner.unresponsive(b.now).count(), 0);
    assert_eq!(b.starts().len(), SLOTS - RESERVED);
    for id in 0..1000 {
        b.issued(id, 3600);
    }
    assert_eq!(b.planner.parked(), 0);
}

#[test]
fn stuck_requests_do_not_slow_an_issuer_that_answers_others() {
    let mut b = Bench::new();
    for id in 0..200 {
        b.want(id);
    }
    for _ in 0..600 {
        for id in b.starts() {
            b.planner.submitted(b.now, id);
            // Three of four requests are stuck.
            if id % 4 == 0 {
                b.issued(id, 86_400);
            }
        }
        b.pass(1.0);
    }
    assert_eq!((b.planner.parked(), b.planner.queued(Class::Waiting)), (150, 0));
}

#[test]
fn what_is_parked_is_counted_once_whatever_becomes_of_it() {
    let mut b = Bench::new();
    for id in 0..4 {
        b.want(id);
    }
    for id in b.starts() {
        b.planner.submitted(b.now, id);
    }
    b.pass(10.0);
    b.actions();
    assert_eq!(b.planner.parked(), 4);
    b.planner.submitted(b.now, 0);
    b.issued(0, 1000);
    b.planner.failed(b.now, 1, Retry::Backoff, false);
    b.planner.forgotten(2);
    assert_eq!(b.planner.parked(), 1);

    // An order that never reached its upstream is not parked, even if the report arrives late.
    b.want(9);
    assert_eq!(b.starts(), [9]);
    b.pass(60.0);
    assert!(b.actions().contains(&Action::Abandon(9)));
    b.planner.submitted(b.now, 9);
    b.planner.failed(b.now, 9, Retry::Backoff, false);
    assert_eq!(b.planner.parked(), 1);
}
