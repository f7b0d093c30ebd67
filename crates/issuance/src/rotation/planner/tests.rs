use std::time::UNIX_EPOCH;

use super::*;

mod properties;
mod requests;
mod silence;
mod waits;

const DAY: u64 = 86_400;
const RETENTION: Duration = Duration::from_secs(300);

/// A planner on a clock that only the test moves.
struct Bench {
    planner: Planner,
    now: Now,
    issuer: Authority,
}

impl Bench {
    fn new() -> Self {
        let now = Now { wall: UNIX_EPOCH + Duration::from_secs(1_000 * DAY), mono: Instant::now() };
        Self { planner: Planner::new(RETENTION, 1), now, issuer: Authority("mesh".into()) }
    }

    fn pass(&mut self, seconds: f64) {
        let by = Duration::from_secs_f64(seconds);
        (self.now.wall, self.now.mono) = (self.now.wall + by, self.now.mono + by);
    }

    fn actions(&mut self) -> Vec<Action> {
        std::iter::from_fn(|| self.planner.poll(self.now)).collect()
    }

    fn starts(&mut self) -> Vec<Id> {
        self.actions().into_iter().filter_map(|a| if let Action::Start(id) = a { Some(id) } else { None }).collect()
    }

    fn want(&mut self, id: Id) {
        self.planner.wanted(self.now, id, &self.issuer.clone(), Some(Demand::Now));
    }

    fn hold(&mut self, id: Id, renew_in: u64, ends_in: u64) {
        let at = |seconds| self.now.wall + Duration::from_secs(seconds);
        let demand = Demand::Held { renew_at: at(renew_in), not_after: at(ends_in) };
        self.planner.wanted(self.now, id, &self.issuer.clone(), Some(demand));
    }

    /// Issues a certificate that begins now, and is renewed at half of its lifetime.
    fn issued(&mut self, id: Id, life: u64) {
        let life = Duration::from_secs(life);
        let validity = Validity { not_before: self.now.wall, not_after: self.now.wall + life };
        self.planner.issued(self.now, id, validity, self.now.wall + life / 2);
    }

    fn serve(&mut self, id: Id, life: u64) {
        self.want(id);
        assert_eq!(self.actions(), [Action::Start(id)]);
        self.issued(id, life);
        assert_eq!(self.actions(), [Action::Publish(id)]);
    }
}

#[test]
fn a_waiting_client_is_served_once_and_the_renewal_follows_at_its_moment() {
    let mut b = Bench::new();
    b.serve(1, 1000);
    b.want(1);
    assert_eq!(b.actions(), [], "a further subscriber changes nothing");
    b.pass(499.0);
    assert_eq!(b.actions(), []);
    b.pass(1.0);
    assert_eq!(b.actions(), [Action::Start(1)]);
}

#[test]
fn a_renewal_settles_before_it_replaces_a_good_certificate() {
    let mut b = Bench::new();
    b.serve(1, 1000);
    b.pass(500.0);
    assert_eq!(b.actions(), [Action::Start(1)]);
    b.issued(1, 1000);
    assert_eq!(b.actions(), []);
    b.pass(49.0);
    assert_eq!(b.actions(), []);
    b.pass(1.0);
    assert_eq!(b.actions(), [Action::Publish(1)]);
}

#[test]
fn nothing_settles_while_the_old_certificate_ends() {
    let mut b = Bench::new();
    b.serve(1, 1000);
    b.pass(950.0);
    b.actions();
    b.issued(1, 1000);
    assert_eq!(b.actions(), [Action::Publish(1)], "50 s are left and settling takes 50");
}

#[test]
fn a_failed_renewal_is_retried_before_the_certificate_ends() {
    let mut b = Bench::new();
    b.serve(1, 100);
    b.pass(50.0);
    assert_eq!(b.starts(), [1]);
    let wait = b.planner.failed(b.now, 1, Retry::After(Duration::from_secs(300)), false);
    assert!(wait <= Duration::from_secs_f64(12.5), "a quarter of the 50 s that are left, not {wait:?}");
    assert_eq!(b.starts(), [0; 0]);
    b.pass(wait.as_secs_f64());
    assert_eq!(b.starts(), [1]);
}

#[test]
fn a_failing_issuer_is_asked_less_while_a_certificate_has_long_to_live() {
    // Mean waits after ten failures: at the renewal of a certificate of 24 h, and without a certificate.
    let mut waits = [0.0; 2];
    for (i, life) in [Some(DAY), None].into_iter().enumerate() {
        for id in 1..=200 {
            let mut b = Bench::new();
            b.planner = Planner::new(RETENTION, id);
            if let Some(life) = life {
                b.serve(id, life);
                b.pass(43_200.0);
            } else {
                b.want(id);
            }
            for _ in 0..10 {
                assert_eq!(b.starts(), [id]);
                let wait = b.planner.failed(b.now, id, Retry::Backoff, false);
                waits[i] += wait.as_secs_f64() / 200.0;
                b.pass(wait.as_secs_f64());
            }
        }
    }
    // Half of 2 + 4 + … + 1024 s, and half of the same sum with at most 300 s each.
    assert!((950.0..1100.0).contains(&waits[0]) && (520.0..590.0).contains(&waits[1]), "{waits:?}");
}

#[test]
fn who_has_mended_something_ends_the_wait() {
    let mut b = Bench::new();
    b.want(1);
    assert_eq!(b.starts(), [1]);
    assert!(!b.planner.hasten(b.now, 1, Duration::ZERO), "it is under way");
    b.planner.failed(b.now, 1, Retry::After(Duration::from_secs(3600)), false);
    assert!(b.planner.next_attempt(b.now, 1).unwrap() <= b.now.wall + Duration::from_secs(360), "no longer than a backoff, and a little");
    b.pass(1.0);
    assert!(b.planner.hasten(b.now, 1, Duration::from_secs(10)));
    b.pass(10.0);
    assert_eq!(b.starts(), [1]);
    assert!(!b.planner.hasten(b.now, 2, Duration::ZERO), "the entry is unknown");
}

#[test]
fn a_reconnect_does_not_end_a_wait_and_a_configuration_change_does() {
    let mut b = Bench::new();
    b.want(1);
    assert_eq!(b.starts(), [1]);
    b.planner.failed(b.now, 1, Retry::After(Duration::from_secs(300)), false);
    b.planner.idle(b.now, 1);
    b.want(1);
    b.pass(299.0);
    assert_eq!(b.starts(), [0; 0]);
    b.planner.configuration_changed(b.now);
    b.pass(2.0);
    assert_eq!(b.starts(), [1]);
}

#[test]
fn other_evidence_is_tried_at_once_but_not_for_ever() {
    let mut b = Bench::new();
    b.want(1);
    for _ in 0..=SWIFT_RETRIES {
        assert_eq!(b.starts(), [1]);
        b.planner.failed(b.now, 1, Retry::Now, false);
    }
    assert_eq!(b.starts(), [0; 0]);
}

#[test]
fn six_slots_serve_everybody_and_two_only_what_is_about_to_end() {
    let mut b = Bench::new();
    for id in 1..20 {
        b.want(id);
    }
    assert_eq!(b.starts().len(), 6);
    for id in 200..210 {
        b.hold(id, 0, 4);
    }
    assert_eq!(b.starts(), [0; 0]);
    b.pass(2.5);
    let ending = b.starts();
    assert_eq!(ending.len(), 2);
    assert!(ending.iter().all(|id| (200..210).contains(id)), "only what is about to end gets the reserved slots: {ending:?}");
}

#[test]
fn waiting_clients_come_first_but_leave_a_renewal_its_slot() {
    let mut b = Bench::new();
    b.hold(50, 1, 1000);
    b.pass(2.0);
    for id in 1..20 {
        b.want(id);
    }
    let started = b.starts();
    assert_eq!(started, [1, 2, 3, 4, 5, 50]);
}

#[test]
fn renewals_go_by_what_ends_first() {
    let mut b = Bench::new();
    for id in 1..=10 {
        b.hold(id, 10, 2000 - id);
    }
    b.pass(11.0);
    assert_eq!(b.starts(), [10, 9, 8, 7, 6, 5]);
}

#[test]
fn a_pending_order_gives_up_its_slot_and_stays_alive() {
    let mut b = Bench::new();
    for id in 1..=7 {
        b.want(id);
    }
    assert_eq!(b.starts().len(), 6);
    for id in 1..=6 {
        b.planner.submitted(b.now, id);
    }
    b.pass(9.0);
    assert_eq!(b.actions(), []);
    b.pass(1.0);
    assert_eq!(b.actions(), [Action::Start(7)]);
    b.pass(3600.0);
    b.issued(1, 1000);
    assert!(b.actions().contains(&Action::Publish(1)), "however long it took");
}

#[test]
fn an_order_that_never_reaches_its_upstream_is_abandoned() {
    let mut b = Bench::new();
    b.want(1);
    b.actions();
    b.pass(PREPARING.as_secs_f64());
    assert_eq!(b.actions(), [Action::Abandon(1)]);
    b.planner.failed(b.now, 1, Retry::Backoff, false);
    b.pass(5.0);
    assert_eq!(b.starts(), [1]);
}

#[test]
fn one_issuers_trouble_takes_no_slot_of_another() {
    let mut b = Bench::new();
    for id in 1..=20 {
        b.want(id);
    }
    assert_eq!(b.starts().len(), 6);
    b.planner.wanted(b.now, 99, &Authority("other".into()), Some(Demand::Now));
    assert_eq!(b.starts(), [99]);
}

#[test]
fn a_held_certificate_waits_for_its_renewal_time() {
    let mut b = Bench::new();
    b.hold(1, 500, 1000);
    b.pass(100.0);
    assert_eq!(b.actions(), []);
    b.hold(2, 500, 1000);
    b.want(2);
    assert_eq!(b.starts(), [2]);
    b.pass(400.0);
    assert_eq!(b.starts(), [1]);
}

#[test]
fn a_forward_jump_renews_and_a_backward_jump_waits_for_the_moment() {
    let mut b = Bench::new();
    b.serve(1, 1000);
    b.now.wall += Duration::from_secs(5000);
    b.planner.clock_stepped(b.now);
    assert_eq!(b.starts(), [1]);

    let mut b = Bench::new();
    b.serve(1, 1000);
    b.now.wall -= Duration::from_secs(5000);
    b.planner.clock_stepped(b.now);
    assert_eq!(b.actions(), []);
    assert_eq!(b.planner.next_wake().0, Some(b.now.wall + Duration::from_secs(5500)));
}

#[test]
fn nothing_settles_once_a_jump_has_ended_the_old_certificate() {
    let mut b = Bench::new();
    b.serve(1, 1000);
    b.pass(500.0);
    assert_eq!(b.starts(), [1]);
    b.issued(1, 1000);
    assert_eq!(b.actions(), [], "it settles");
    b.now.wall += Duration::from_secs(600);
    b.planner.clock_stepped(b.now);
    assert_eq!(b.actions().first(), Some(&Action::Publish(1)));
}

#[test]
fn a_mended_clock_ends_the_waits_that_a_wrong_one_caused() {
    let mut b = Bench::new();
    b.want(1);
    b.want(2);
    b.actions();
    b.planner.failed(b.now, 1, Retry::After(Duration::from_secs(300)), true);
    b.planner.failed(b.now, 2, Retry::After(Duration::from_secs(300)), false);
    b.planner.clock_stepped(b.now);
    b.pass(2.0);
    assert_eq!(b.starts(), [1]);
}

#[test]
fn an_idle_entry_is_not_renewed_and_is_forgotten_after_the_retention() {
    let mut b = Bench::new();
    b.serve(1, 100);
    b.planner.idle(b.now, 1);
    b.pass(299.0);
    assert_eq!(b.actions(), []);
    b.pass(1.0);
    assert_eq!(b.actions(), [Action::Forget(1)]);
    b.planner.forgotten(1);
    assert_eq!(b.planner.next_wake(), (None, None));
}

#[test]
fn a_subscriber_that_returns_gets_the_renewal_that_fell_due_meanwhile() {
    let mut b = Bench::new();
    b.serve(1, 400);
    b.planner.idle(b.now, 1);
    b.pass(250.0);
    assert_eq!(b.actions(), []);
    b.want(1);
    assert_eq!(b.starts(), [1]);
}

#[test]
fn a_pending_order_outlives_the_retention_of_a_crash_looping_client() {
    let mut b = Bench::new();
    b.want(1);
    b.actions();
    b.planner.submitted(b.now, 1);
    b.planner.idle(b.now, 1);
    b.pass(301.0);
    assert_eq!(b.actions(), []);
    for _ in 0..10 {
        b.pass(300.0);
        assert_eq!(b.actions(), []);
    }
    b.pass(301.0);
    assert_eq!(b.actions(), [Action::Forget(1)], "and is given up after an hour");
}

#[test]
fn the_first_certificate_and_the_one_after_trouble_are_spread() {
    let mut b = Bench::new();
    b.want(1);
    b.actions();
    assert_eq!(b.planner.renewal_jitter(b.now, 1), RenewalJitter::FullCycle);
    b.issued(1, 1000);
    b.actions();
    b.pass(500.0);
    b.actions();
    assert_eq!(b.planner.renewal_jitter(b.now, 1), RenewalJitter::Configured);
    b.planner.failed(b.now, 1, Retry::Backoff, false);
    assert_eq!(b.planner.renewal_jitter(b.now, 1), RenewalJitter::FullCycle);
    b.issued(1, 1000);
    b.pass(60.0);
    b.actions();
    b.pass(600.0);
    assert_eq!(b.planner.renewal_jitter(b.now, 1), RenewalJitter::FullCycle, "it came a tenth of a life too late");
}

#[test]
fn nothing_is_left_to_spin_on() {
    let mut b = Bench::new();
    for id in 1..=30 {
        b.want(id);
    }
    b.hold(31, 0, 1000);
    b.actions();
    let (wall, mono) = b.planner.next_wake();
    assert!(
        wall.is_none_or(|at| at > b.now.wall) && mono.is_none_or(|at| at > b.now.mono),
        "a due job without a slot does not wake the driver"
    );
}
