//! One entry's job: how far it is, and what the time makes of it. Pure.

use std::time::SystemTime;

use sds_server::{material::Validity, store::Demand};
use tokio::time::Instant;

use super::{Authority, Class, Now};

/// A certificate with less than this share of its life left is about to end.
const ENDING: f64 = 0.2;

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

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Phase {
    /// Nothing under way.
    Resting,
    /// Due, and waiting for a slot.
    Queued(Class, Rank),
    /// With the issuer.
    Running { slot: Option<Class>, submitted: bool, deadline: Option<Instant> },
    /// Issued, and waiting for slow clocks.
    Settling(Instant),
}

/// The order within a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    /// First attempts before retries.
    pub(super) retry: bool,
    /// What ends first; for those who have nothing, the epoch.
    pub(super) deadline: SystemTime,
    /// First come, first served.
    pub(super) sequence: u64,
}

/// What the planner knows of an entry.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) authority: Authority,
    /// What subscribers without material need.
    pub(super) demand: Option<Demand>,
    pub(super) leased: bool,
    /// No profile issues it any more.
    pub(super) retired: bool,
    pub(super) in_use: Option<InUse>,
    pub(super) issued: Option<InUse>,
    pub(super) phase: Phase,
    pub(super) failures: u32,
    pub(super) swift_retries: u32,
    pub(super) not_before: Option<Instant>,
    pub(super) by_clock: bool,
    pub(super) forget_at: Option<Instant>,
    pub(super) idle_since: Option<Instant>,
    pub(super) timers: (Option<SystemTime>, Option<Instant>),
}

/// When the job's next order is due; none when nobody needs one.
pub(super) fn due(job: &Job, now: Now) -> Option<SystemTime> {
    if !job.leased || job.retired {
        return None;
    }
    match (&job.in_use, job.demand) {
        (Some(certificate), _) if certificate.validity.is_live(now.wall) => Some(certificate.renew_at),
        (Some(_), _) | (None, Some(Demand::Now)) => Some(now.wall),
        (None, Some(Demand::Held { renew_at, not_after })) => Some(renew_at.min(not_after)),
        (None, None) => None,
    }
}

/// The end of the certificate in use, ours or one that a client holds from before.
pub(super) fn end(job: &Job) -> Option<SystemTime> {
    match (&job.in_use, job.demand) {
        (Some(certificate), _) => Some(certificate.validity.not_after),
        (None, Some(Demand::Held { not_after, .. })) => Some(not_after),
        _ => None,
    }
}

/// From when on the job is [`Class::Ending`].
fn ending_at(job: &Job) -> Option<SystemTime> {
    match (&job.in_use, job.demand) {
        (Some(certificate), _) => Some(certificate.ending_at()),
        // Its beginning is unknown: as much again is left after the renewal as half the life, for the usual share.
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

/// The next moment at which [`class`] gives another answer.
pub(super) fn turning_point(job: &Job, now: Now) -> Option<SystemTime> {
    [ending_at(job), end(job)].into_iter().flatten().filter(|at| *at > now.wall).min()
}
