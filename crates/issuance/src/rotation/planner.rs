//! What to do next, and when to look again: the decisions of rotation as a pure state machine.
//!
//! It owns a `Job` for each entry of the store, and no I/O: the driver feeds it what happened, with the time, and performs the
//! [`Action`]s that it asks for. Renewals are moments of the wall clock; waits (backoff, parking, settling, retention) are monotonic, so
//! that a stepped clock neither delays nor hurries them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    time::{Duration, SystemTime},
};

use sds_server::{material::Validity, store::Demand};
use tokio::time::Instant;

use super::schedule::{self, RenewalJitter};
use crate::issuer::Retry;

mod job;
mod queue;

use job::{InUse, Job, Phase, Rank, class, due, end, turning_point};
use queue::Queue;
pub use queue::{Authority, RESERVED, SLOTS};

/// An order that has not reached its upstream by then has failed.
const PREPARING: Duration = Duration::from_secs(60);
/// An order that its upstream leaves pending for longer gives up its slot, and nothing else.
const PARK_AFTER: Duration = Duration::from_secs(10);
/// Retries at once, with other evidence, in a row.
const SWIFT_RETRIES: u32 = 3;
/// A forgotten identity's order that is still pending, or its backoff, is kept for at most this long.
const LINGER: Duration = Duration::from_secs(3600);

/// An entry's id.
pub type Id = u64;

/// Both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// The wall clock.
    pub wall: SystemTime,
    /// The monotonic clock.
    pub mono: Instant,
}

/// What the driver has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Order a certificate.
    Start(Id),
    /// Abandon an order that never reached its upstream, then report it as failed.
    Abandon(Id),
    /// Publish what was issued.
    Publish(Id),
    /// Ask the store to forget the entry, then report the answer.
    Forget(Id),
}

/// How pressing an order is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// A certificate in use has less than a fifth of its life left.
    Ending,
    /// Clients wait and have nothing.
    Waiting,
    /// A renewal in good time.
    Routine,
}

/// The state machine.
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
    /// An empty planner. `retention` is how long an entry without subscribers is kept.
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

    /// A number in 0..1.
    pub fn draw(&mut self) -> f64 {
        self.random.f64()
    }

    /// An entry has subscribers; `demand` is what those without material need. `authority` names its queue, for ever.
    pub fn wanted(&mut self, now: Now, id: Id, authority: &Authority, demand: Option<Demand>) {
        let job = self.jobs.entry(id).or_insert_with(|| Job {
            authority: authority.clone(),
            demand: None,
            leased: true,
            retired: false,
            in_use: None,
            issued: None,
            phase: Phase::Resting,
            failures: 0,
            swift_retries: 0,
            not_before: None,
            by_clock: false,
            forget_at: None,
            idle_since: None,
            timers: (None, None),
        });
        (job.leased, job.demand, job.forget_at, job.idle_since) = (true, demand, None, None);
        self.consider(now, id);
    }

    /// What the subscribers without material need has changed.
    pub fn wanted_by(&mut self, now: Now, id: Id, demand: Option<Demand>) {
        if let Some(job) = self.jobs.get_mut(&id) {
            job.demand = demand;
            self.consider(now, id);
        }
    }

    /// How long entries without subscribers are kept, from their next end on.
    pub fn set_retention(&mut self, retention: Duration) {
        self.retention = retention;
    }

    /// Whether no profile issues the entry any more. Then nothing is ordered for it, and what was under way is over: the driver drops it.
    /// True where this is news.
    pub fn retire(&mut self, now: Now, id: Id, retired: bool) -> bool {
        if self.jobs.get(&id).is_none_or(|job| job.retired == retired) {
            return false;
        }
        if retired {
            self.leave_phase(id);
        }
        if let Some(job) = self.jobs.get_mut(&id) {
            (job.retired, job.issued) = (retired, None);
        }
        self.consider(now, id);
        true
    }

    /// An entry's last subscriber has gone.
    pub fn idle(&mut self, now: Now, id: Id) {
        let retention = self.retention;
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.leased = false;
        job.idle_since.get_or_insert(now.mono);
        job.forget_at = Some(now.mono + retention);
        self.consider(now, id);
    }

    /// The store has forgotten the entry.
    pub fn forgotten(&mut self, id: Id) {
        self.leave_phase(id);
        self.set_timers(id, None, None);
        self.jobs.remove(&id);
    }

    /// The upstream has the order.
    pub fn submitted(&mut self, now: Now, id: Id) {
        if let Some(Job { phase: Phase::Running { submitted: submitted @ false, deadline, .. }, .. }) = self.jobs.get_mut(&id) {
            (*submitted, *deadline) = (true, Some(now.mono + PARK_AFTER));
            self.consider(now, id);
        }
    }

    /// Which draw the certificate that has just been issued gets.
    pub fn renewal_jitter(&self, now: Now, id: Id) -> RenewalJitter {
        let Some(job) = self.jobs.get(&id) else { return RenewalJitter::FullCycle };
        let in_time = match (&job.in_use, job.demand) {
            (Some(c), _) => now.wall <= c.renew_at + c.validity.lifetime().mul_f64(0.1),
            // Its place in the cycle was drawn before this process began; drawing it again would make a restarted fleet ask for more. Half
            // its life is left at the renewal, more or less.
            (None, Some(Demand::Held { renew_at, not_after })) => {
                now.wall <= renew_at + not_after.duration_since(renew_at).unwrap_or_default().mul_f64(0.2)
            }
            (None, _) => false,
        };
        if job.failures == 0 && in_time { RenewalJitter::Configured } else { RenewalJitter::FullCycle }
    }

    /// An order was answered with a verified certificate.
    pub fn issued(&mut self, now: Now, id: Id, validity: Validity, renew_at: SystemTime) {
        self.note_answer(now, id);
        self.leave_phase(id);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        (job.failures, job.swift_retries, job.not_before, job.by_clock) = (0, 0, None, false);
        job.issued = Some(InUse { validity, renew_at });
        let settle = schedule::settled_at(&validity).duration_since(now.wall).unwrap_or_default();
        let old = job.in_use.map_or(Duration::ZERO, |c| c.validity.remaining(now.wall));
        // Half of what is left stays as a margin: settling never lets the old one end.
        let wait = if old / 2 > settle { settle } else { Duration::ZERO };
        job.phase = Phase::Settling(now.mono + wait);
        self.consider(now, id);
    }

    /// An order failed. `by_clock` says that a mended clock would mend it. Returns the wait before the next attempt.
    pub fn failed(&mut self, now: Now, id: Id, retry: Retry, by_clock: bool) -> Duration {
        self.note_answer(now, id);
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
            // A little late rather than all at once.
            Retry::After(wait) => wait.min(schedule::MAX_BACKOFF).mul_f64(1.0 + draw / 5.0),
            Retry::Configuration => schedule::MAX_BACKOFF.mul_f64(1.0 - draw / 5.0),
        };
        let wait = schedule::capped_by_expiry(wait, left);
        job.not_before = Some(now.mono + wait);
        job.by_clock = by_clock;
        job.phase = Phase::Resting;
        self.consider(now, id);
        wait
    }

    /// A configuration change: every wait is over.
    pub fn configuration_changed(&mut self, now: Now) {
        self.end_waits(now, |_| true);
    }

    /// The wall clock was stepped: every moment of it is looked at again, and failures that a wrong clock explains are tried again.
    pub fn clock_stepped(&mut self, now: Now) {
        self.end_waits(now, |job| job.by_clock);
    }

    fn end_waits(&mut self, now: Now, which: impl Fn(&Job) -> bool) {
        let ids: Vec<Id> = self.jobs.keys().copied().collect();
        for id in ids {
            let spread = self.draw();
            if let Some(job) = self.jobs.get_mut(&id).filter(|job| job.not_before.is_some() && which(job)) {
                job.not_before = Some(now.mono + Duration::from_secs(2).mul_f64(spread));
            }
            self.consider(now, id);
        }
    }

    /// Brings a renewal forward to `at`: the certificate in use is no longer of a current authority.
    pub fn expedite(&mut self, now: Now, id: Id, at: SystemTime) {
        if let Some(certificate) = self.jobs.get_mut(&id).and_then(|job| job.in_use.as_mut()) {
            certificate.renew_at = certificate.renew_at.min(at);
            self.consider(now, id);
        }
    }

    /// Lets a wait after a failure end within `over`; says whether there was one.
    pub fn hasten(&mut self, now: Now, id: Id, over: Duration) -> bool {
        let at = now.mono + over.mul_f64(self.draw());
        let Some(job) = self.jobs.get_mut(&id).filter(|job| job.not_before.is_some_and(|wait| wait > now.mono)) else { return false };
        job.not_before = job.not_before.min(Some(at));
        self.consider(now, id);
        true
    }

    /// When the entry will be tried next, for people: a moment of the wall clock.
    pub fn next_attempt(&self, now: Now, id: Id) -> Option<SystemTime> {
        let job = self.jobs.get(&id)?;
        let due = due(job, now)?;
        let wait = job.not_before.map_or(now.wall, |t| now.wall + t.saturating_duration_since(now.mono));
        Some(due.max(wait))
    }

    /// Orders that wait for a slot, by class.
    pub fn queued(&self, class: Class) -> usize {
        self.queues.values().map(|queue| queue.waiting[class as usize].len()).sum()
    }

    /// Orders without a slot that their upstreams have not answered.
    pub fn parked(&self) -> usize {
        self.queues.values().map(|queue| queue.parked).sum()
    }

    /// Issuers that hold many orders and have long answered none.
    pub fn unresponsive(&self, now: Now) -> impl Iterator<Item = &Authority> {
        self.queues.iter().filter(move |(_, queue)| queue.is_unresponsive(now.mono)).map(|(authority, _)| authority)
    }

    /// The next thing to do now.
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

    /// The next moments, of either clock, at which [`poll`](Self::poll) has something to do.
    pub fn next_wake(&self) -> (Option<SystemTime>, Option<Instant>) {
        // What could start and has not waits for a silent issuer.
        let probe = self.queues.values().filter_map(Queue::probe_at).min();
        let mono = self.mono.first().map(|(at, _)| *at);
        (self.wall.first().map(|(at, _)| *at), [mono, probe].into_iter().flatten().min())
    }

    /// Moves a job on as far as the time allows, and sets its timers for the rest.
    fn consider(&mut self, now: Now, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let (mut wall, mut mono) = (None, None);
        match job.phase {
            Phase::Running { slot, submitted, deadline } => match deadline {
                Some(at) if at > now.mono => mono = Some(at),
                Some(_) => {
                    job.phase = Phase::Running { slot: None, submitted, deadline: None };
                    let queue = self.queues.entry(job.authority.clone()).or_default();
                    if let Some(class) = slot {
                        queue.used[class as usize] -= 1;
                    }
                    if submitted {
                        queue.park(now.mono);
                    } else {
                        self.actions.push_back(Action::Abandon(id));
                    }
                }
                None => {}
            },
            // Where the clock was stepped meanwhile, there may be no good certificate left to wait with.
            Phase::Settling(at) if at > now.mono && job.in_use.is_some_and(|c| c.validity.is_live(now.wall)) => mono = Some(at),
            Phase::Settling(_) => {
                (job.in_use, job.phase, job.demand) = (job.issued.take(), Phase::Resting, None);
                self.actions.push_back(Action::Publish(id));
                return self.consider(now, id);
            }
            Phase::Resting | Phase::Queued(..) => {
                let waits = job.not_before.is_some_and(|at| at > now.mono);
                let mut is_due = false;
                match due(job, now) {
                    Some(_) if waits => mono = job.not_before,
                    Some(at) if at > now.wall => wall = Some(at),
                    Some(_) => {
                        is_due = true;
                        // Its class changes when its certificate nears its end, and again when that has come.
                        wall = turning_point(job, now);
                    }
                    None => {}
                }
                let queue = self.queues.entry(job.authority.clone()).or_default();
                let class = class(job, now);
                if let Phase::Queued(old, rank) = job.phase
                    && (!is_due || old != class)
                {
                    // Its class has changed; or it is no longer due: its subscribers have gone, or the clock was set back.
                    queue.waiting[old as usize].remove(&(rank, id));
                    job.phase = Phase::Resting;
                }
                if is_due && job.phase == Phase::Resting {
                    self.sequence += 1;
                    let deadline = end(job).filter(|end| *end > now.wall).unwrap_or(SystemTime::UNIX_EPOCH);
                    let rank = Rank { retry: job.failures > 0, deadline, sequence: self.sequence };
                    job.phase = Phase::Queued(class, rank);
                    queue.waiting[class as usize].insert((rank, id));
                }
            }
        }
        if let Some(at) = job.forget_at {
            let busy = matches!(job.phase, Phase::Running { .. } | Phase::Settling(_))
                || job.not_before.is_some_and(|t| t > now.mono && job.failures > 0);
            let lingers = busy && job.idle_since.is_some_and(|since| now.mono < since + LINGER);
            if at > now.mono {
                mono = Some(mono.map_or(at, |m| m.min(at)));
            } else if lingers {
                // Neither a pending order nor a record of failures is lost because its clients are away for a while.
                let again = now.mono + self.retention.max(Duration::from_secs(1));
                job.forget_at = Some(again);
                mono = Some(mono.map_or(again, |m| m.min(again)));
            } else {
                job.forget_at = None;
                self.actions.push_back(Action::Forget(id));
            }
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

    /// What the upstream had has been answered.
    fn note_answer(&mut self, now: Now, id: Id) {
        if let Some(Job { phase: Phase::Running { submitted: true, .. }, authority, .. }) = self.jobs.get(&id)
            && let Some(queue) = self.queues.get_mut(authority)
        {
            queue.last_answer = Some(now.mono);
        }
    }

    /// Gives back the slot, or the place in the queue.
    fn leave_phase(&mut self, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let queue = self.queues.entry(job.authority.clone()).or_default();
        match job.phase {
            Phase::Running { slot: Some(class), .. } => queue.used[class as usize] -= 1,
            Phase::Running { slot: None, submitted: true, deadline: None } => queue.parked -= 1,
            Phase::Queued(class, rank) => drop(queue.waiting[class as usize].remove(&(rank, id))),
            _ => {}
        }
        job.phase = Phase::Resting;
    }

    /// Fills free slots, each issuer's by itself.
    fn dispatch(&mut self, now: Now) {
        for queue in self.queues.values_mut() {
            while let Some((class, rank, id)) = queue.next().filter(|_| queue.is_open(now.mono)) {
                queue.started = Some(now.mono);
                queue.waiting[class as usize].remove(&(rank, id));
                queue.used[class as usize] += 1;
                if let Some(job) = self.jobs.get_mut(&id) {
                    let deadline = now.mono + PREPARING;
                    job.phase = Phase::Running { slot: Some(class), submitted: false, deadline: Some(deadline) };
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
