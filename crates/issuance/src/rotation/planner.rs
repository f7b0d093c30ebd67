//! The decisions of rotation: a state machine without I/O.
//!
//! The planner owns a `Job` for each entry of the store. The driver reports each event with its time, and performs the returned
//! [`Action`]s. Renewals are times of the wall clock. Waits (backoff, parking, settling, retention) use the monotonic clock, so that a step
//! of the wall clock neither delays nor shortens them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    time::{Duration, SystemTime},
};

use sds_server::{material::Validity, store::Demand};
use tokio::time::Instant;

use super::schedule::{self, RenewalJitter};
use crate::issuer::Retry;

mod aside;
mod job;
mod queue;
mod waits;

use aside::{Beside, beside};
use job::{InUse, Job, Phase, Rank, class, due, due_for_a_client, end, lingers, turning_point};
use queue::Queue;
pub use queue::{Authority, RESERVED, SLOTS};

/// Time within which an order must reach its upstream. After it, the order has failed.
pub const PREPARING: Duration = Duration::from_secs(60);
/// Time after which an order that is pending at its upstream gives up its slot. The order itself goes on.
const PARK_AFTER: Duration = Duration::from_secs(10);
/// Maximum number of consecutive retries at once, each in the name of another pod.
const SWIFT_RETRIES: u32 = 3;

/// Identifier of an entry.
pub type Id = u64;

/// The time of both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// The wall clock.
    pub wall: SystemTime,
    /// The monotonic clock.
    pub mono: Instant,
}

/// An action for the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Order a certificate.
    Start(Id),
    /// Abandon an order that has not reached its upstream, then report it as failed.
    Abandon(Id),
    /// Keep the pending order, because another one will start beside it. The first answer counts.
    SetAside(Id),
    /// Drop the youngest order that was set aside, with its request.
    Withdraw(Id),
    /// Publish the issued certificate.
    Publish(Id),
    /// Ask the store to forget the entry, then report the result.
    Forget(Id),
}

/// Priority of an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// The certificate in use has less than a fifth of its lifetime left.
    Ending,
    /// Clients wait and have no certificate.
    Waiting,
    /// A renewal long before the end of the certificate.
    Routine,
}

/// The state machine of rotation.
#[derive(Debug)]
pub struct Planner {
    jobs: HashMap<Id, Job>,
    wall: BTreeSet<(SystemTime, Id)>,
    mono: BTreeSet<(Instant, Id)>,
    queues: BTreeMap<Authority, Queue>,
    actions: VecDeque<Action>,
    retention: Duration,
    sequence: u64,
    random: fastrand::Rng,
}

impl Planner {
    /// Creates an empty planner. `retention` is how long an entry without subscribers is kept. `seed` is for the random numbers.
    pub fn new(retention: Duration, seed: u64) -> Self {
        Self {
            jobs: HashMap::new(),
            wall: BTreeSet::new(),
            mono: BTreeSet::new(),
            queues: BTreeMap::new(),
            actions: VecDeque::new(),
            retention,
            sequence: 0,
            random: fastrand::Rng::with_seed(seed),
        }
    }

    /// Draws a random number in 0..1.
    pub fn draw(&mut self) -> f64 {
        self.random.f64()
    }

    /// An entry has subscribers. `demand` is the need of those without material. `authority` names the entry's queue and never changes.
    pub fn wanted(&mut self, now: Now, id: Id, authority: &Authority, demand: Option<Demand>) {
        let job = self.jobs.entry(id).or_insert_with(|| Job {
            authority: authority.clone(),
            demand: None,
            leased: true,
            owed: false,
            retired: false,
            in_use: None,
            issued: None,
            phase: Phase::Resting,
            aside: Vec::new(),
            place: None,
            failures: 0,
            swift_retries: 0,
            not_before: None,
            backs_off: false,
            by_clock: false,
            forget_at: None,
            idle_since: None,
            timers: (None, None),
        });
        (job.leased, job.demand, job.forget_at, job.idle_since) = (true, demand, None, None);
        self.consider(now, id);
    }

    /// The need of the subscribers without material has changed.
    pub fn wanted_by(&mut self, now: Now, id: Id, demand: Option<Demand>) {
        if let Some(job) = self.jobs.get_mut(&id) {
            job.demand = demand;
            self.consider(now, id);
        }
    }

    /// Sets how long an entry without subscribers is kept. It applies when the last subscriber of an entry leaves.
    pub fn set_retention(&mut self, retention: Duration) {
        self.retention = retention;
    }

    /// Sets whether no profile issues the entry. Nothing is ordered for a retired entry, and the driver drops an order in progress. Returns
    /// whether the value has changed.
    pub fn retire(&mut self, now: Now, id: Id, retired: bool) -> bool {
        if self.jobs.get(&id).is_none_or(|job| job.retired == retired) {
            return false;
        }
        if retired {
            self.leave_phase(id);
            self.drop_aside(id);
        }
        if let Some(job) = self.jobs.get_mut(&id) {
            (job.retired, job.issued, job.place) = (retired, None, None);
        }
        self.consider(now, id);
        true
    }

    /// The last subscriber of an entry has left. If an order was due and had not started, it still starts, once: a client that fetches does
    /// not wait for the renewal, and a client without a certificate keeps its place in the queue.
    pub fn idle(&mut self, now: Now, id: Id) {
        let retention = self.retention;
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let has_none = matches!(job.phase, Phase::Resting | Phase::Queued(..));
        job.owed |= job.leased && has_none && due(job, now).is_some_and(|at| at <= now.wall);
        job.leased = false;
        job.idle_since.get_or_insert(now.mono);
        job.forget_at = Some(now.mono + retention);
        self.consider(now, id);
    }

    /// The store has forgotten the entry.
    pub fn forgotten(&mut self, id: Id) {
        self.leave_phase(id);
        self.drop_aside(id);
        self.set_timers(id, None, None);
        self.jobs.remove(&id);
    }

    /// The upstream has the request of an order.
    pub fn submitted(&mut self, now: Now, id: Id) {
        if let Some(Job { phase: Phase::Running { submitted: submitted @ false, deadline, .. }, .. }) = self.jobs.get_mut(&id) {
            (*submitted, *deadline) = (true, Some(now.mono + PARK_AFTER));
            self.consider(now, id);
        }
    }

    /// Returns the jitter for the certificate that was just issued. Call it before [`issued`](Self::issued).
    pub fn renewal_jitter(&self, now: Now, id: Id) -> RenewalJitter {
        let Some(job) = self.jobs.get(&id) else { return RenewalJitter::FullCycle };
        let in_time = match (&job.in_use, job.demand) {
            (Some(c), _) => now.wall <= c.renew_at + c.validity.lifetime().mul_f64(0.1),
            // An earlier process drew the renewal time. If this process drew again, a restarted fleet would order more. About half of the
            // lifetime is left at the renewal.
            (None, Some(Demand::Held { renew_at, not_after })) => {
                now.wall <= renew_at + not_after.duration_since(renew_at).unwrap_or_default().mul_f64(0.2)
            }
            (None, _) => false,
        };
        if job.failures == 0 && in_time { RenewalJitter::Configured } else { RenewalJitter::FullCycle }
    }

    /// The latest order of an entry was answered with a verified certificate. It is published after a settling time, or at once if the old
    /// one ends too soon. The driver drops all other orders of the entry.
    pub fn issued(&mut self, now: Now, id: Id, validity: Validity, renew_at: SystemTime) {
        self.note_answer(now, id, None);
        self.note_loss(now, id);
        self.certificate_issued(now, id, validity, renew_at);
    }

    fn certificate_issued(&mut self, now: Now, id: Id, validity: Validity, renew_at: SystemTime) {
        self.leave_phase(id);
        self.drop_aside(id);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        (job.failures, job.swift_retries, job.not_before, job.by_clock) = (0, 0, None, false);
        job.issued = Some(InUse { validity, renew_at });
        let settle = schedule::settled_at(&validity).duration_since(now.wall).unwrap_or_default();
        let old = job.in_use.map_or(Duration::ZERO, |c| c.validity.remaining(now.wall));
        // At least half of the remaining lifetime stays as a margin: the old certificate does not end while the new one settles.
        let wait = if old / 2 > settle { settle } else { Duration::ZERO };
        job.phase = Phase::Settling(now.mono + wait);
        self.consider(now, id);
        self.recover(now, id);
    }

    /// The latest order of an entry failed. `by_clock` says that a wrong clock explains the failure. Returns the wait before the next
    /// attempt.
    pub fn failed(&mut self, now: Now, id: Id, retry: Retry, by_clock: bool) -> Duration {
        self.note_answer(now, id, None);
        let after_recovery = self.note_failure(now, id, retry);
        self.leave_phase(id);
        let draw = self.draw();
        let Some(job) = self.jobs.get_mut(&id) else { return Duration::ZERO };
        let swift = retry == Retry::Now && job.swift_retries < SWIFT_RETRIES;
        if swift {
            job.swift_retries += 1;
        } else {
            job.failures = job.failures.saturating_add(1);
        }
        let left = end(job).map(|end| end.duration_since(now.wall).unwrap_or_default());
        let wait = match retry {
            Retry::Now if swift => Duration::ZERO,
            Retry::Now | Retry::Backoff => schedule::backoff(job.failures, left, draw),
            // Up to 20 % is added, so that orders do not retry all at once.
            Retry::After(wait) => wait.min(schedule::MAX_BACKOFF).mul_f64(1.0 + draw / 5.0),
            Retry::Configuration => schedule::MAX_BACKOFF.mul_f64(1.0 - draw / 5.0),
        };
        let wait = schedule::capped_by_expiry(wait, left);
        let wait = after_recovery.map_or(wait, |within| wait.min(within.mul_f64(draw)));
        (job.not_before, job.backs_off) = (Some(now.mono + wait), retry == Retry::Backoff);
        (job.by_clock, job.owed) = (by_clock, false);
        job.phase = Phase::Resting;
        self.consider(now, id);
        wait
    }

    /// Advances a renewal to `at`, if it is planned later. Used when the certificate in use must be replaced early. The order starts even
    /// if no client subscribes then: the certificate would be fetched, or served to the next subscriber, within the retention.
    pub fn expedite(&mut self, now: Now, id: Id, at: SystemTime) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if let Some(certificate) = &mut job.in_use {
            certificate.renew_at = certificate.renew_at.min(at);
            job.owed = true;
            self.consider(now, id);
        }
    }

    /// Returns the wall-clock time of the next attempt, if a client subscribes or fetches then. `None` if no attempt is planned.
    pub fn next_attempt(&self, now: Now, id: Id) -> Option<SystemTime> {
        let job = self.jobs.get(&id)?;
        let due = due_for_a_client(job, now)?;
        let wait = job.not_before.map_or(now.wall, |t| now.wall + t.saturating_duration_since(now.mono));
        Some(due.max(wait))
    }

    /// Number of orders of `class` that wait for a slot.
    pub fn queued(&self, class: Class) -> usize {
        self.queues.values().map(|queue| queue.waiting[class as usize].len()).sum()
    }

    /// Number of orders that are pending at their upstream and occupy no slot.
    pub fn parked(&self) -> usize {
        self.queues.values().map(|queue| queue.parked).sum()
    }

    /// Returns the unresponsive issuers: at least 32 orders are parked there, and none was answered for 60 s.
    pub fn unresponsive(&self, now: Now) -> impl Iterator<Item = &Authority> {
        self.queues.iter().filter(move |(_, queue)| queue.is_unresponsive(now.mono)).map(|(authority, _)| authority)
    }

    /// Returns the next action that is due.
    pub fn poll(&mut self, now: Now) -> Option<Action> {
        while let Some(&(_, id)) = self.wall.first().filter(|(at, _)| *at <= now.wall) {
            self.wall.pop_first();
            if let Some(job) = self.jobs.get_mut(&id) {
                job.timers.0 = None;
            }
            self.consider(now, id);
        }
        while let Some(&(_, id)) = self.mono.first().filter(|(at, _)| *at <= now.mono) {
            self.mono.pop_first();
            if let Some(job) = self.jobs.get_mut(&id) {
                job.timers.1 = None;
            }
            self.consider(now, id);
        }
        self.dispatch(now);
        self.actions.pop_front()
    }

    /// Returns the next times, of either clock, at which [`poll`](Self::poll) has something to do.
    pub fn next_wake(&self) -> (Option<SystemTime>, Option<Instant>) {
        // An order that could start, but has not started, waits for an unresponsive issuer.
        let probe = self.queues.values().filter_map(Queue::probe_at).min();
        let mono = self.mono.first().map(|(at, _)| *at);
        (self.wall.first().map(|(at, _)| *at), [mono, probe].into_iter().flatten().min())
    }

    /// Advances a job as far as the time allows, and sets its timers for the next change.
    fn consider(&mut self, now: Now, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let forgets = job.forget_at.is_some_and(|at| at <= now.mono) && !lingers(job, now);
        if forgets {
            // The entry leaves the queue too.
            job.owed = false;
        }
        let (mut wall, mut mono) = (None, None);
        match job.phase {
            Phase::Running { started, slot, submitted, deadline } => match deadline {
                Some(at) if at > now.mono => mono = Some(at),
                Some(_) => {
                    job.phase = Phase::Running { started, slot: None, submitted, deadline: None };
                    let queue = self.queues.entry(job.authority.clone()).or_default();
                    if let Some(class) = slot {
                        queue.used[class as usize] -= 1;
                    }
                    if submitted {
                        queue.park(now.mono);
                        self.await_beside(now, id);
                        return self.consider(now, id);
                    }
                    self.actions.push_back(Action::Abandon(id));
                }
                None if submitted => match job.not_before.filter(|at| *at > now.mono && !job.aside.is_empty()) {
                    Some(at) => mono = Some(at),
                    None => match beside(job, now, job.aside.first().copied().unwrap_or(started), self.queues.get(&job.authority)) {
                        Beside::Now => {
                            self.put_aside(id, started);
                            return self.consider(now, id);
                        }
                        Beside::AtWall(at) => wall = Some(at),
                        Beside::AtMono(at) => mono = Some(at),
                        Beside::Never => {}
                    },
                },
                None => {}
            },
            // After a step of the clock, the certificate in use may have ended. Then the new one is published at once.
            Phase::Settling(at) if at > now.mono && job.in_use.is_some_and(|c| c.validity.is_live(now.wall)) => mono = Some(at),
            Phase::Settling(_) => {
                (job.in_use, job.phase, job.demand, job.owed) = (job.issued.take(), Phase::Resting, None, false);
                self.actions.push_back(Action::Publish(id));
                return self.consider(now, id);
            }
            Phase::Resting | Phase::Queued(..) => {
                let waits = job.not_before.is_some_and(|at| at > now.mono);
                let mut is_due = false;
                let beside = job.aside.first().map_or(Beside::Now, |at| beside(job, now, *at, self.queues.get(&job.authority)));
                let had_turn = matches!(job.phase, Phase::Queued(..));
                match (due(job, now), beside) {
                    (None, _) | (_, Beside::Never) => {}
                    (Some(_), _) if waits => mono = job.not_before,
                    (Some(at), _) if at > now.wall => wall = Some(at),
                    (_, Beside::AtWall(at)) => wall = Some(at),
                    (_, Beside::AtMono(at)) => mono = Some(at),
                    (_, Beside::Now) => {
                        is_due = true;
                        // The class changes when the certificate nears its end, and again when it has ended.
                        wall = turning_point(job, now);
                    }
                }
                let queue = self.queues.entry(job.authority.clone()).or_default();
                let class = class(job, now);
                if let Phase::Queued(old, rank) = job.phase
                    && (!is_due || old != class)
                {
                    // The class has changed; or the order is no longer due, because its subscribers have left or the clock was set back.
                    queue.waiting[old as usize].remove(&(rank, id));
                    job.phase = Phase::Resting;
                }
                if is_due && job.phase == Phase::Resting {
                    if !had_turn && !job.aside.is_empty() {
                        queue.turns.take(now.mono, self.random.f64());
                    }
                    let deadline = end(job).filter(|end| *end > now.wall).unwrap_or(SystemTime::UNIX_EPOCH);
                    let sequence = *job.place.get_or_insert_with(|| {
                        self.sequence += 1;
                        self.sequence
                    });
                    let rank = Rank { retry: job.failures > 0 || !job.aside.is_empty(), deadline, sequence };
                    job.phase = Phase::Queued(class, rank);
                    queue.waiting[class as usize].insert((rank, id));
                }
            }
        }
        if forgets {
            job.forget_at = None;
            self.actions.push_back(Action::Forget(id));
        } else if let Some(at) = job.forget_at {
            // A pending order and a record of failures survive a temporary absence of the clients.
            let at = if at > now.mono { at } else { now.mono + self.retention.max(Duration::from_secs(1)) };
            job.forget_at = Some(at);
            mono = Some(mono.map_or(at, |m| m.min(at)));
        }
        self.set_timers(id, wall, mono);
    }

    fn set_timers(&mut self, id: Id, wall: Option<SystemTime>, mono: Option<Instant>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let (old_wall, old_mono) = std::mem::replace(&mut job.timers, (wall, mono));
        if old_wall != wall {
            old_wall.map(|at| self.wall.remove(&(at, id)));
            wall.map(|at| self.wall.insert((at, id)));
        }
        if old_mono != mono {
            old_mono.map(|at| self.mono.remove(&(at, id)));
            mono.map(|at| self.mono.insert((at, id)));
        }
    }

    /// Records the time of an answer to a submitted order: to the one set aside at `index`, or to the latest one.
    fn note_answer(&mut self, now: Now, id: Id, index: Option<usize>) {
        let is_submitted = |job: &Job| index.is_some() || matches!(job.phase, Phase::Running { submitted: true, .. });
        let job = self.jobs.get(&id).filter(|job| is_submitted(job));
        if let Some(queue) = job.and_then(|job| self.queues.get_mut(&job.authority)) {
            queue.last_answer = Some(now.mono);
        }
    }

    /// Gives back the slot or the place in the queue.
    fn leave_phase(&mut self, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let queue = self.queues.entry(job.authority.clone()).or_default();
        match job.phase {
            Phase::Running { slot: Some(class), .. } => queue.used[class as usize] -= 1,
            Phase::Running { slot: None, submitted: true, deadline: None, .. } => queue.parked -= 1,
            Phase::Queued(class, rank) => drop(queue.waiting[class as usize].remove(&(rank, id))),
            _ => {}
        }
        job.phase = Phase::Resting;
    }

    /// Starts queued orders in free slots. Each issuer has its own slots.
    fn dispatch(&mut self, now: Now) {
        for queue in self.queues.values_mut() {
            while let Some((class, rank, id)) = queue.next().filter(|_| queue.is_open(now.mono)) {
                queue.started = Some(now.mono);
                queue.waiting[class as usize].remove(&(rank, id));
                queue.used[class as usize] += 1;
                if let Some(job) = self.jobs.get_mut(&id) {
                    if aside::is_full(job) && job.aside.pop().is_some() {
                        (queue.parked, queue.turns.aside) = (queue.parked - 1, queue.turns.aside - 1);
                        self.actions.push_back(Action::Withdraw(id));
                    }
                    let deadline = now.mono + PREPARING;
                    job.phase = Phase::Running { started: now.mono, slot: Some(class), submitted: false, deadline: Some(deadline) };
                    job.place = None;
                    self.actions.push_back(Action::Start(id));
                    let (wall, mono) = job.timers;
                    let mono_new = job.forget_at.map_or(deadline, |at| at.min(deadline));
                    job.timers = (None, Some(mono_new));
                    wall.map(|at| self.wall.remove(&(at, id)));
                    mono.map(|at| self.mono.remove(&(at, id)));
                    self.mono.insert((mono_new, id));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
