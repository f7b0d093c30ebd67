//! Pending requests beside which another one is made.

use super::{
    super::{
        aside::LATE_AFTER_WITHOUT_CERTIFICATE,
        queue::{MAX_PARKED, PROBE_INTERVAL},
    },
    *,
};

/// Serves `ids` with certificates of 1,000 s, whose renewals then pend. They are [`Class::Ending`] after 300 s, and expire after 500 s.
fn pending_renewals(b: &mut Bench, ids: std::ops::Range<Id>) {
    for id in ids.clone() {
        b.serve(id, 1000);
    }
    b.pass(500.0);
    assert_eq!(pend(b, 0), Vec::from_iter(ids));
}

/// For `seconds`, the upstream takes every order and answers none. Returns the orders.
fn pend(b: &mut Bench, seconds: u64) -> Vec<Id> {
    let mut started = Vec::new();
    for second in 0..=seconds {
        loop {
            let starts = b.starts();
            if starts.is_empty() {
                break;
            }
            for id in starts {
                b.planner.submitted(b.now, id);
                started.push(id);
            }
        }
        if second < seconds {
            b.pass(1.0);
        }
    }
    started
}

fn aside_issued(b: &mut Bench, id: Id) {
    let validity = Validity { not_before: b.now.wall, not_after: b.now.wall + Duration::from_secs(1000) };
    b.planner.aside_issued(b.now, id, 0, validity, b.now.wall + Duration::from_secs(500));
}

#[test]
fn another_order_starts_when_the_certificate_in_use_is_ending() {
    let mut b = Bench::new();
    pending_renewals(&mut b, 1..2);
    assert_eq!(pend(&mut b, 299), [0; 0]);
    b.pass(1.0);
    assert_eq!(b.actions(), [Action::SetAside(1), Action::Start(1)]);
    assert_eq!((b.planner.parked(), b.planner.set_aside()), (1, 1));
    b.issued(1, 1000);
    assert_eq!((b.planner.parked(), b.planner.set_aside()), (0, 0));
}

#[test]
fn a_late_answer_to_the_first_order_counts() {
    let mut b = Bench::new();
    pending_renewals(&mut b, 1..2);
    assert_eq!(pend(&mut b, 310), [1]);
    aside_issued(&mut b, 1);
    assert_eq!((b.planner.parked(), b.planner.set_aside()), (0, 0));
    b.pass(50.0);
    assert_eq!(b.actions(), [Action::Publish(1)]);
    b.pass(449.0);
    assert_eq!(b.actions(), []);
}

#[test]
fn a_certificate_that_is_renewed_near_its_end_has_a_minute_to_be_signed() {
    let mut b = Bench::new();
    // The renewal is planned so late that the certificate is ending then.
    b.want(1);
    b.actions();
    let validity = Validity { not_before: b.now.wall, not_after: b.now.wall + Duration::from_secs(10_000) };
    b.planner.issued(b.now, 1, validity, b.now.wall + Duration::from_secs(9000));
    b.actions();
    b.pass(9000.0);
    assert_eq!(pend(&mut b, 59), [1]);
    b.pass(1.0);
    assert_eq!(b.starts(), [1]);
}

#[test]
fn clients_without_a_certificate_get_another_order_after_fifteen_minutes() {
    let mut b = Bench::new();
    b.want(1);
    let wait = LATE_AFTER_WITHOUT_CERTIFICATE.as_secs();
    assert_eq!(pend(&mut b, wait - 1), [1]);
    assert_eq!(pend(&mut b, 1), [1]);
    // The client leaves, so that no further order starts.
    b.planner.idle(b.now, 1);
    assert_eq!(pend(&mut b, 2 * wait), [0; 0]);
}

#[test]
fn further_orders_replace_the_younger_one_at_growing_intervals() {
    let mut b = Bench::new();
    b.want(1);
    let first = pend(&mut b, LATE_AFTER_WITHOUT_CERTIFICATE.as_secs());
    assert_eq!(first, [1, 1]);
    let (mut live, begun, mut minutes) = (2, b.now.mono, Vec::new());
    for _ in 0..5 * 3600 {
        for action in b.actions() {
            match action {
                Action::Start(id) => {
                    live += 1;
                    minutes.push(b.now.mono.duration_since(begun).as_secs() / 60);
                    b.planner.submitted(b.now, id);
                }
                Action::Withdraw(_) => live -= 1,
                Action::SetAside(_) => {}
                other => panic!("{other:?}"),
            }
            assert!(live <= 2, "the oldest and one other");
        }
        b.pass(1.0);
    }
    let intervals: Vec<_> = minutes.windows(2).map(|pair| pair[1] - pair[0]).collect();
    for (interval, most) in intervals.iter().zip([10, 20, 40, 60, 60]) {
        assert!((most * 4 / 5 - 1..=most + 1).contains(interval), "{minutes:?}");
    }
    assert!((4..=5).contains(&minutes[0]) && intervals.len() >= 4, "{minutes:?}");
}

#[test]
fn a_failure_of_either_order_leaves_the_other_one() {
    let mut b = Bench::new();
    pending_renewals(&mut b, 1..2);
    assert_eq!(pend(&mut b, 320), [1]);
    b.planner.aside_failed(b.now, 1, 0);
    assert_eq!((b.planner.parked(), b.planner.set_aside(), pend(&mut b, 10)), (1, 0, vec![]));
    assert_eq!(pend(&mut b, 60), [1], "the other one is late too");
    assert_eq!(b.planner.set_aside(), 1);
    b.planner.failed(b.now, 1, Retry::Backoff, false);
    assert_eq!((b.planner.parked(), b.planner.set_aside()), (1, 1));
    assert_eq!(pend(&mut b, 15), [1], "after its backoff");
    b.planner.forgotten(1);
    assert_eq!((b.planner.parked(), b.planner.next_wake()), (0, (None, None)));
}

#[test]
fn orders_beside_pending_ones_keep_to_the_slots_and_to_the_probes() {
    let mut b = Bench::new();
    for id in 0..3 * MAX_PARKED as Id {
        b.hold(id, 0, 1500);
    }
    let (mut orders, mut seconds) = (0, 0);
    while seconds < 7200 {
        let started = pend(&mut b, 1);
        assert!(started.len() <= SLOTS, "{} orders in a second", started.len());
        (orders, seconds) = (orders + started.len(), seconds + 1);
    }
    let probes = 7200 / PROBE_INTERVAL.as_secs();
    assert!(orders <= 2 * MAX_PARKED + usize::try_from(probes).unwrap(), "{orders} orders in two hours without an answer");
    assert!(b.planner.set_aside() > 0);
}

#[test]
fn a_backlog_is_not_ordered_a_second_time_while_it_is_answered() {
    let mut b = Bench::new();
    for id in 0..60 {
        b.hold(id, 0, 4500);
    }
    let backlog = pend(&mut b, 2600);
    assert_eq!(backlog.len(), 60, "each has a request");
    // The certificates are ending when the upstream is back. It answers one request each second, the oldest first.
    assert!(pend(&mut b, 200).len() <= 4, "as many as probes");
    let mut further = 0;
    for id in backlog {
        if b.planner.jobs[&id].aside.is_empty() {
            b.issued(id, 10_000);
        } else {
            aside_issued(&mut b, id);
        }
        further += pend(&mut b, 1).len();
    }
    assert!(further <= 2, "{further} further orders");
    assert_eq!(b.planner.parked(), 0);
}

#[test]
fn one_order_is_tried_first_and_its_answer_opens_the_way() {
    let mut b = Bench::new();
    for id in 0..20 {
        b.hold(id, 0, 100_000);
    }
    assert_eq!(pend(&mut b, 80).len(), 20, "each has a request");
    b.pass(79_000.0);
    // The certificates are ending. The upstream has lost the requests, and then does not answer for an hour.
    let tried = pend(&mut b, 3600).len();
    assert!((3..=5).contains(&tried), "{tried} orders in an hour");
    let next = loop {
        match b.starts()[..] {
            [id] => break id,
            [] => b.pass(1.0),
            _ => panic!("more than one order"),
        }
    };
    b.planner.submitted(b.now, next);
    b.issued(next, 100_000);
    let mut started = 0;
    for _ in 0..20 {
        for id in b.starts() {
            b.planner.submitted(b.now, id);
            b.issued(id, 100_000);
            started += 1;
        }
        b.pass(1.0);
    }
    assert_eq!((started, b.planner.parked()), (19, 0), "all others are ordered again at once");
}

#[test]
fn a_certificate_near_its_end_does_not_wait_for_the_orders_of_others() {
    let mut b = Bench::new();
    let not_after = b.now.wall + Duration::from_secs(3000);
    b.want(1);
    b.hold(2, 0, 3000);
    assert_eq!(pend(&mut b, LATE_AFTER_WITHOUT_CERTIFICATE.as_secs()), [1, 2, 1]);
    // Turns are up to an hour apart, and this certificate ends earlier.
    let further = pend(&mut b, 2090).into_iter().filter(|id| *id == 2).count();
    assert!(b.now.wall < not_after && further >= 2, "{further} further orders before its end");
}

#[test]
fn a_lost_request_is_ordered_again_though_others_are_answered() {
    let mut b = Bench::new();
    pending_renewals(&mut b, 1..2);
    // Every 5 s another identity is served.
    for id in 10..70 {
        b.want(id);
        assert_eq!(pend(&mut b, 1), [id]);
        b.issued(id, 86_400);
        b.actions();
        b.pass(4.0);
    }
    assert_eq!(pend(&mut b, 1), [1]);
}
