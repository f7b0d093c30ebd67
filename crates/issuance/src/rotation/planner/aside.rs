//! Requests that their upstream has lost, or does not answer in time. Does no I/O.
//!
//! A pending request has no time limit, because an operator or another controller may still decide it. But an upstream can lose a request:
//! its controller stops between two writes, or never gets to it. If a client needs the certificate and the request is late, the order is
//! set aside, and another one starts beside it. The first answer wins, and the driver drops the other order with its request.
//!
//! At most [`MAX_PENDING`] orders of an entry exist at a time. A further order replaces the younger one of them, after a wait of 4 to 5 min.
//!
//! If an upstream is slow, further requests do not help. So one order of each issuer is tried first. While it is not answered, the wait
//! until the next one doubles from 4 to 5 min up to 1 h. If it is answered before the older one, the upstream has lost requests: the
//! others follow at once. The slots of the issuer, and its limit while it is unresponsive, apply as to all orders.

use std::time::{Duration, SystemTime};

use sds_server::material::Validity;
use tokio::time::Instant;

use super::{
    Action, Id, Now, Planner,
    job::{Job, Phase, due, end, ending_at},
    queue::Queue,
    schedule,
};

/// Maximum number of orders of an entry at a time.
const MAX_PENDING: usize = 2;
/// Minimum time for which a request is pending before another one starts beside it. A quarter of the remaining lifetime if that is less.
const LATE_AFTER: Duration = Duration::from_secs(60);
/// Time for which the request for a first certificate is pending before another one starts beside it.
pub(super) const LATE_AFTER_WITHOUT_CERTIFICATE: Duration = Duration::from_secs(900);
/// Time after an answer to an order beside an older one for which others start without waiting for each other.
const LOSS_WINDOW: Duration = Duration::from_secs(60);

/// When an order may start beside a pending one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beside {
    /// Now.
    Now,
    /// At this time of the wall clock at the earliest.
    AtWall(SystemTime),
    /// At this time of the monotonic clock at the earliest.
    AtMono(Instant),
    /// No client needs a certificate.
    Never,
}

/// The orders of one issuer that start beside pending ones.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// Number of orders that were set aside.
    pub(super) aside: usize,
    /// The last turn, and the wait until the next one.
    last: Option<(Instant, Duration)>,
    /// Number of turns since an order was answered before an older one.
    unanswered: u32,
    /// Time at which an order was answered before an older one.
    loss: Option<Instant>,
}

impl Turns {
    /// Takes the turn for an entry with an order that was set aside.
    pub(super) fn take(&mut self, now: Instant, draw: f64) {
        if self.aside == 1 {
            // All orders of earlier turns are answered.
            self.unanswered = 0;
        }
        self.last = Some((now, schedule::further_request(self.unanswered, draw)));
        self.unanswered = self.unanswered.saturating_add(1);
    }

    /// Returns when the next order may start whose certificate in use lives for another `left`. `None` if it may start at any time.
    fn next(&self, now: Instant, left: Option<Duration>) -> Option<Instant> {
        let (last, wait) = self.last.filter(|_| self.aside > 0 && self.loss.is_none_or(|at| now >= at + LOSS_WINDOW))?;
        Some(last + schedule::capped_by_expiry(wait, left))
    }

    fn lost(&mut self, now: Instant) {
        (self.loss, self.unanswered) = (Some(now), 0);
    }
}

/// Returns when an order may start beside the oldest pending one of `job`, which started at `oldest`.
pub(super) fn beside(job: &Job, now: Now, oldest: Instant, queue: Option<&Queue>) -> Beside {
    let Some(due) = due(job, now) else { return Beside::Never };
    let needed = ending_at(job).map_or(due, |ending| ending.max(due));
    if needed > now.wall {
        return Beside::AtWall(needed);
    }
    let left = end(job).map(|end| end.duration_since(now.wall).unwrap_or_default());
    let late_after = if left.is_some() { schedule::capped_by_expiry(LATE_AFTER, left) } else { LATE_AFTER_WITHOUT_CERTIFICATE };
    // An order that is queued has had its turn.
    let turn = queue.filter(|_| !matches!(job.phase, Phase::Queued(..))).and_then(|queue| queue.turns.next(now.mono, left));
    let at = turn.map_or(oldest + late_after, |turn| turn.max(oldest + late_after));
    if at > now.mono { Beside::AtMono(at) } else { Beside::Now }
}

/// Whether the start of another order exceeds [`MAX_PENDING`], so that the youngest order that was set aside is dropped.
pub(super) fn is_full(job: &Job) -> bool {
    job.aside.len() >= MAX_PENDING
}

impl Planner {
    /// An order that was set aside was answered with a verified certificate. `index` is its position, the oldest first.
    pub fn aside_issued(&mut self, now: Now, id: Id, index: usize, validity: Validity, renew_at: SystemTime) {
        self.note_answer(now, id, Some(index));
        self.certificate_issued(now, id, validity, renew_at);
    }

    /// An order that was set aside failed. The other orders of the entry continue. `index` is its position, the oldest first.
    pub fn aside_failed(&mut self, now: Now, id: Id, index: usize) {
        self.note_answer(now, id, Some(index));
        let Some(job) = self.jobs.get_mut(&id).filter(|job| index < job.aside.len()) else { return };
        job.aside.remove(index);
        let queue = self.queues.entry(job.authority.clone()).or_default();
        (queue.parked, queue.turns.aside) = (queue.parked - 1, queue.turns.aside - 1);
        self.consider(now, id);
    }

    /// Number of orders that were set aside, of all entries.
    pub fn set_aside(&self) -> usize {
        self.queues.values().map(|queue| queue.turns.aside).sum()
    }

    /// Sets the pending order of an entry aside. The order remains parked.
    pub(super) fn put_aside(&mut self, id: Id, started: Instant) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.aside.push(started);
        job.phase = Phase::Resting;
        self.queues.entry(job.authority.clone()).or_default().turns.aside += 1;
        self.actions.push_back(Action::SetAside(id));
    }

    /// Drops all orders that were set aside.
    pub(super) fn drop_aside(&mut self, id: Id) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let count = std::mem::take(&mut job.aside).len();
        let queue = self.queues.entry(job.authority.clone()).or_default();
        (queue.parked, queue.turns.aside) = (queue.parked - count, queue.turns.aside - count);
    }

    /// Sets how long the pending order of an entry, which is not its first one, is awaited before another one replaces it.
    pub(super) fn await_beside(&mut self, now: Now, id: Id) {
        let draw = self.draw();
        let Some(job) = self.jobs.get_mut(&id).filter(|job| !job.aside.is_empty()) else { return };
        let left = end(job).map(|end| end.duration_since(now.wall).unwrap_or_default());
        job.not_before = Some(now.mono + schedule::capped_by_expiry(schedule::further_request(0, draw), left));
    }

    /// The latest order of the entry was answered. If an older one was not, the upstream has lost requests: the late ones are replaced.
    pub(super) fn note_loss(&mut self, now: Now, id: Id) {
        let Some(job) = self.jobs.get(&id).filter(|job| !job.aside.is_empty()) else { return };
        let authority = job.authority.clone();
        self.queues.entry(authority.clone()).or_default().turns.lost(now.mono);
        let ids: Vec<Id> = self.jobs.iter().filter(|(_, job)| job.authority == authority).map(|(id, _)| *id).collect();
        for other in ids.into_iter().filter(|other| *other != id) {
            self.consider(now, other);
        }
    }
}
