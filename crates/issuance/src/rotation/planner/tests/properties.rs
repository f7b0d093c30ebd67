//! Any sequence of events.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Want(Id),
    Hold(Id, u64, u64),
    Idle(Id),
    Pass(u32),
    Jump(i32),
    Submit(usize),
    Issue(usize, u64),
    Fail(usize, u8),
    Expedite(Id),
    Retire(Id, bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..12u64).prop_map(Step::Want),
        (0..12u64, 1..500u64, 1..500u64).prop_map(|(id, a, b)| Step::Hold(id, a, a + b)),
        (0..12u64).prop_map(Step::Idle),
        (0..400u32).prop_map(Step::Pass),
        (-5000..5000i32).prop_map(Step::Jump),
        (0..12usize).prop_map(Step::Submit),
        (0..12usize, 10..2000u64).prop_map(|(i, life)| Step::Issue(i, life)),
        (0..12usize, 0..4u8).prop_map(|(i, r)| Step::Fail(i, r)),
        (0..12u64).prop_map(Step::Expedite),
        (0..12u64, any::<bool>()).prop_map(|(id, retired)| Step::Retire(id, retired)),
    ]
}

/// A planner, and the orders that a driver would run for it.
struct Driver {
    bench: Bench,
    /// The entry of each order, and whether the order was set aside. The oldest is first.
    orders: Vec<(Id, bool)>,
}

impl Driver {
    /// The position of an order among those of its entry that were set aside.
    fn index(&self, order: usize) -> Option<usize> {
        let (id, is_aside) = self.orders[order];
        is_aside.then(|| self.orders[..order].iter().filter(|(other, aside)| *other == id && *aside).count())
    }

    fn issue(&mut self, order: usize, life: u64) {
        let (id, index) = (self.orders[order].0, self.index(order));
        self.orders.retain(|(other, _)| *other != id);
        let Some(index) = index else { return self.bench.issued(id, life) };
        let (now, life) = (self.bench.now, Duration::from_secs(life));
        let validity = Validity { not_before: now.wall, not_after: now.wall + life };
        self.bench.planner.aside_issued(now, id, index, validity, now.wall + life / 2);
    }

    fn issue_all(&mut self) {
        while !self.orders.is_empty() {
            self.issue(0, 100_000);
        }
    }

    fn fail(&mut self, order: usize, retry: Retry) {
        let (now, index) = (self.bench.now, self.index(order));
        let (id, _) = self.orders.remove(order);
        match index {
            Some(index) => self.bench.planner.aside_failed(now, id, index),
            None => drop(self.bench.planner.failed(now, id, retry, retry == Retry::Backoff)),
        }
    }

    fn run(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..1000 {
            let Some(action) = self.bench.planner.poll(self.bench.now) else { break };
            let latest = |id: Id| move |order: &(Id, bool)| *order == (id, false);
            match action {
                Action::Start(id) => {
                    prop_assert!(!self.orders.iter().any(latest(id)), "two orders for {id}");
                    self.orders.push((id, false));
                    prop_assert!(self.orders.iter().filter(|(other, _)| *other == id).count() <= 2, "three orders for {id}");
                }
                Action::SetAside(id) => self.orders.iter_mut().filter(|order| latest(id)(order)).for_each(|order| order.1 = true),
                Action::Withdraw(id) => {
                    let youngest = self.orders.iter().rposition(|order| *order == (id, true));
                    prop_assert!(youngest.is_some(), "{id} has no order to withdraw");
                    self.orders.remove(youngest.unwrap());
                }
                Action::Abandon(id) => {
                    let order = self.orders.iter().position(latest(id)).expect("an order to abandon");
                    self.fail(order, Retry::Backoff);
                }
                Action::Forget(id) => {
                    self.orders.retain(|(other, _)| *other != id);
                    self.bench.planner.forgotten(id);
                }
                Action::Publish(_) => {}
            }
        }
        let Bench { planner, now, .. } = &mut self.bench;
        prop_assert_eq!(planner.poll(*now), None, "the planner spins");
        let (wall, mono) = planner.next_wake();
        prop_assert!(wall.is_none_or(|at| at > now.wall) && mono.is_none_or(|at| at > now.mono));
        for queue in planner.queues.values() {
            prop_assert!(queue.used.iter().sum::<usize>() <= SLOTS);
            prop_assert!(queue.used[1] + queue.used[2] <= SLOTS - RESERVED);
        }
        prop_assert_eq!(planner.set_aside(), self.orders.iter().filter(|(_, is_aside)| *is_aside).count());
        let parked = planner.jobs.values().filter(|job| matches!(job.phase, Phase::Running { slot: None, .. })).count();
        prop_assert_eq!(planner.parked(), parked + planner.set_aside());
        Ok(())
    }
}

proptest! {
    /// After any sequence of steps, an entry has at most two orders, one of them set aside, slots are neither exceeded nor leaked, and the
    /// driver is not woken without need. When every order is answered, every entry with a subscriber has a certificate.
    #[test]
    fn orders_are_few_bounded_and_in_the_end_served(steps in prop::collection::vec(step(), 1..150)) {
        let mut d = Driver { bench: Bench::new(), orders: Vec::new() };
        let mut subscribed: BTreeSet<Id> = BTreeSet::new();
        for step in steps {
            let now = d.bench.now;
            match step {
                Step::Want(id) => { d.bench.want(id); subscribed.insert(id); }
                Step::Hold(id, a, z) => { if subscribed.insert(id) { d.bench.hold(id, a, z); } }
                Step::Idle(id) => { d.bench.planner.idle(now, id); subscribed.remove(&id); }
                Step::Pass(s) => d.bench.pass(f64::from(s)),
                Step::Jump(s) => {
                    let by = Duration::from_secs(u64::from(s.unsigned_abs()));
                    d.bench.now.wall = if s < 0 { now.wall - by } else { now.wall + by };
                    d.bench.planner.clock_stepped(d.bench.now);
                }
                Step::Submit(i) => if let Some((id, false)) = d.orders.get(i) { d.bench.planner.submitted(now, *id); },
                Step::Issue(i, life) => if i < d.orders.len() { d.issue(i, life); },
                Step::Fail(i, r) => if i < d.orders.len() {
                    let retry = [Retry::Now, Retry::Backoff, Retry::After(Duration::from_secs(300)), Retry::Configuration][usize::from(r)];
                    d.fail(i, retry);
                },
                Step::Expedite(id) => d.bench.planner.expedite(now, id, now.wall),
                Step::Retire(id, retired) => if d.bench.planner.retire(now, id, retired) && retired {
                    d.orders.retain(|(other, _)| *other != id);
                },
            }
            d.run()?;
        }
        // From here on, every entry has a profile, and every order succeeds.
        for id in 0..12 {
            d.bench.planner.retire(d.bench.now, id, false);
        }
        d.run()?;
        for _ in 0..200 {
            d.issue_all();
            d.bench.pass(20.0);
            d.run()?;
        }
        d.issue_all();
        d.run()?;
        prop_assert_eq!(d.bench.planner.parked(), 0);
        for id in subscribed {
            let job = &d.bench.planner.jobs[&id];
            let held = matches!(job.demand, Some(Demand::Held { renew_at, .. }) if renew_at > d.bench.now.wall);
            prop_assert!(held || job.in_use.is_some_and(|c| c.validity.is_live(d.bench.now.wall)), "{id} has nothing: {job:?}");
        }
    }
}
