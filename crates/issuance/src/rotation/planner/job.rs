//! The state of one entry, and its changes with time. Does no I/O.

use std::time::{Duration, SystemTime};

use sds_server::{material::Validity, store::Demand};
use tokio::time::Instant;

use super::{Authority, Class, Now};

/// A certificate with less than this share of its lifetime left is [`Class::Ending`].
const ENDING: f64 = 0.2;
/// Maximum time for which a pending order or a backoff keeps an entry after its last subscriber has left.
const LINGER: Duration = Duration::from_secs(3600);

/// A certificate in use.
#[derive(Debug, Clone, Copy)]
pub(super) struct InUse {
    pub(super) validity: Validity,
    pub(super) renew_at: SystemTime,
}

impl InUse {
    fn ending_at(&self) -> SystemTime {
        self.validity.not_after - self.validity.lifetime().mul_f64(ENDING)
    }
}

/// Phase of a job.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Phase {
    /// No order is queued or runs.
    Resting,
    /// The order is due and waits for a slot.
    Queued(Class, Rank),
    /// The order runs.
    Running { started: Instant, slot: Option<Class>, submitted: bool, deadline: Option<Instant> },
    /// The certificate is issued, and waits until peers with slow clocks accept it.
    Settling(Instant),
}

/// Position within a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    /// First attempts precede retries.
    pub(super) retry: bool,
    /// End of the certificate in use: the earliest precedes. Without a certificate, the Unix epoch.
    pub(super) deadline: SystemTime,
    /// First in, first out.
    pub(super) sequence: u64,
}

/// State of an entry.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) authority: Authority,
    /// Need of the subscribers without material.
    pub(super) demand: Option<Demand>,
    pub(super) leased: bool,
    /// Whether one more order is to start although no client subscribes: the last subscriber left while an order was due, as a client that
    /// fetches does, or the certificate must be replaced early. Ends with the next order.
    pub(super) owed: bool,
    /// Whether no profile issues the entry.
    pub(super) retired: bool,
    pub(super) in_use: Option<InUse>,
    pub(super) issued: Option<InUse>,
    /// The phase of the latest order.
    pub(super) phase: Phase,
    /// The starts of the orders that were set aside, the oldest first.
    pub(super) aside: Vec<Instant>,
    /// The place in the queue, from the time at which the order was first due to its start.
    pub(super) place: Option<u64>,
    pub(super) failures: u32,
    pub(super) swift_retries: u32,
    pub(super) not_before: Option<Instant>,
    /// Whether `not_before` is a backoff: the upstream has named no time.
    pub(super) backs_off: bool,
    pub(super) by_clock: bool,
    pub(super) forget_at: Option<Instant>,
    pub(super) idle_since: Option<Instant>,
    pub(super) timers: (Option<SystemTime>, Option<Instant>),
}

/// Returns when the next order is due. `None` if no client needs one.
pub(super) fn due(job: &Job, now: Now) -> Option<SystemTime> {
    due_for_a_client(job, now).filter(|_| job.leased || job.owed)
}

/// Returns when the next order is due, if a client subscribes or fetches then.
pub(super) fn due_for_a_client(job: &Job, now: Now) -> Option<SystemTime> {
    if job.retired {
        return None;
    }
    match (&job.in_use, job.demand) {
        (Some(certificate), _) if certificate.validity.is_live(now.wall) => Some(certificate.renew_at),
        (Some(_), _) | (None, Some(Demand::Now)) => Some(now.wall),
        (None, Some(Demand::Held { renew_at, not_after })) => Some(renew_at.min(not_after)),
        (None, None) => None,
    }
}

/// Whether the entry is kept after the retention, because of a pending order or of a wait after a failure.
pub(super) fn lingers(job: &Job, now: Now) -> bool {
    let waits = job.failures > 0 && job.not_before.is_some_and(|at| at > now.mono);
    let is_busy = waits || !job.aside.is_empty() || matches!(job.phase, Phase::Running { .. } | Phase::Settling(_));
    is_busy && job.idle_since.is_some_and(|since| now.mono < since + LINGER)
}

/// Returns the end of the certificate in use: the agent's own, or one that a client holds from before a restart.
pub(super) fn end(job: &Job) -> Option<SystemTime> {
    match (&job.in_use, job.demand) {
        (Some(certificate), _) => Some(certificate.validity.not_after),
        (None, Some(Demand::Held { not_after, .. })) => Some(not_after),
        _ => None,
    }
}

/// Returns the time from which the job is [`Class::Ending`].
pub(super) fn ending_at(job: &Job) -> Option<SystemTime> {
    match (&job.in_use, job.demand) {
        (Some(certificate), _) => Some(certificate.ending_at()),
        // The beginning of a held certificate is unknown. The estimate assumes that half of the lifetime is left at the renewal.
        (None, Some(Demand::Held { renew_at, not_after })) => {
            Some(not_after - not_after.duration_since(renew_at).unwrap_or_default().mul_f64(2.0 * ENDING))
        }
        _ => None,
    }
}

pub(super) fn class(job: &Job, now: Now) -> Class {
    match (end(job), ending_at(job)) {
        (Some(end), Some(ending)) if now.wall < end => {
            if now.wall >= ending {
                Class::Ending
            } else {
                Class::Routine
            }
        }
        _ => Class::Waiting,
    }
}

/// Returns the next time at which [`class`] changes.
pub(super) fn turning_point(job: &Job, now: Now) -> Option<SystemTime> {
    [ending_at(job), end(job)].into_iter().flatten().filter(|at| *at > now.wall).min()
}
