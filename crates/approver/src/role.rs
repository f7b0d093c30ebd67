//! The role of this replica: it decides, or it is on standby. A state machine without I/O or clock.
//!
//! Two replicas that write at the same time lose about a third of their writes to each other, and together they ask cert-manager's webhook
//! more than it answers. So one replica decides, the [first](Rank::First), and the others are on standby: they know every request, and
//! neither judge nor write.
//!
//! There is no lease. A replica on standby watches decisions, not heartbeats: when a request waits and no decision of another replica has
//! been seen for [`TAKEOVER_AFTER`], it decides by itself. So a replica that lives and decides nothing is replaced as one that has died.
//! Where two replicas decide, the one that loses a write to the other goes on standby, whichever it is. A decision is written with the
//! version of the request that was judged: two replicas that decide at once are slow, and never wrong.

use std::time::Duration;

use tokio::time::Instant;

use super::replicas::{Rank, Standing};

/// How long a request may wait without any decision of another replica.
pub const TAKEOVER_AFTER: Duration = Duration::from_secs(2);
/// The same after takeovers that were not needed. They happen where each answer of the webhook takes longer than [`TAKEOVER_AFTER`].
const MAX_TAKEOVER_AFTER: Duration = Duration::from_secs(8);
/// A takeover that lasted so long was needed.
const STABLE_AFTER: Duration = Duration::from_secs(60);
/// After another replica has left, its successor loses writes to it and stays: the last writes of the one that leaves are on their way.
const HANDOVER_GRACE: Duration = Duration::from_secs(5);

/// Why a replica decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// It does not run as a pod, and cannot know of others.
    Alone,
    /// It is the first.
    First,
    /// Another replica has left, and this one is the first of those that stay.
    Successor,
    /// A request waited, and no other replica decided.
    Takeover,
}

impl Cause {
    /// For the log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Alone => "it does not run as a pod",
            Self::First => "it is the oldest replica",
            Self::Successor => "an older replica has left",
            Self::Takeover => "no other replica decided",
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Role {
    standing: Standing,
    /// Why it decides; none on standby.
    decides: Option<Cause>,
    /// Between [`TAKEOVER_AFTER`] and [`MAX_TAKEOVER_AFTER`].
    takeover_after: Duration,
    /// On standby, while a request waits: when it takes over.
    takeover_at: Option<Instant>,
    /// When it took over.
    took_over_at: Option<Instant>,
    /// The end of the grace of a handover.
    grace_until: Option<Instant>,
}

impl Role {
    /// The role at the start. A replica that may have others is on standby until it knows its rank, or takes over.
    pub fn new(may_have_others: bool) -> Self {
        let standing = Standing { rank: Rank::Unknown, departures: 0 };
        let decides = if may_have_others { None } else { Some(Cause::Alone) };
        Self { standing, decides, takeover_after: TAKEOVER_AFTER, takeover_at: None, took_over_at: None, grace_until: None }
    }

    /// Why it decides; none on standby.
    pub fn decides(&self) -> Option<Cause> {
        self.decides
    }

    /// Its place among the replicas is this one now.
    pub fn stands_at(&mut self, standing: Standing, now: Instant) {
        let before = std::mem::replace(&mut self.standing, standing);
        let decides = match standing.rank {
            Rank::First if before.rank == Rank::Unknown => Some(Cause::First),
            Rank::First if before.rank != Rank::First => Some(Cause::Successor),
            // The replica that left may have been the one that decided.
            Rank::First if standing.departures != before.departures => Some(Cause::Successor),
            rank if rank != before.rank => None,
            _ => return,
        };
        (self.decides, self.takeover_at, self.took_over_at, self.takeover_after) = (decides, None, None, TAKEOVER_AFTER);
        self.grace_until = (decides == Some(Cause::Successor)).then(|| now + HANDOVER_GRACE);
    }

    /// Another replica has decided a request.
    pub fn other_decided(&mut self) {
        self.takeover_at = None;
    }

    /// A decision of this replica was not written, because another one had decided.
    pub fn lost_conflict(&mut self, now: Instant) {
        if self.grace_until.is_some_and(|until| now < until) {
            return;
        }
        self.takeover_after = match self.took_over_at.take() {
            Some(since) if now.duration_since(since) < STABLE_AFTER => (self.takeover_after * 2).min(MAX_TAKEOVER_AFTER),
            _ => TAKEOVER_AFTER,
        };
        (self.decides, self.takeover_at) = (None, None);
    }

    /// Takes over if it is time. On standby, the moment at which this has to be called again. `waits` says whether a request could be
    /// decided; `jitter`, between 0 and 1, keeps several replicas from taking over at the same moment.
    pub fn next(&mut self, waits: bool, now: Instant, jitter: f64) -> Option<Instant> {
        if self.decides.is_some() || !waits {
            self.takeover_at = None;
            return None;
        }
        let wait = self.takeover_after.mul_f64(1.0 + jitter / 2.0);
        let takeover_at = *self.takeover_at.get_or_insert_with(|| now + wait);
        if now < takeover_at {
            return Some(takeover_at);
        }
        (self.decides, self.takeover_at, self.took_over_at) = (Some(Cause::Takeover), None, Some(now));
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, milliseconds: u64) -> Instant {
        start + Duration::from_millis(milliseconds)
    }

    fn ranked(role: &mut Role, rank: Rank) -> bool {
        let departures = role.standing.departures;
        role.stands_at(Standing { rank, departures }, Instant::now());
        role.decides().is_some()
    }

    fn standing_by() -> Role {
        let mut role = Role::new(true);
        assert!(!ranked(&mut role, Rank::Later));
        role
    }

    #[test]
    fn the_first_decides_and_the_others_are_on_standby() {
        assert!(Role::new(false).decides().is_some(), "there are no others");
        let mut role = Role::new(true);
        assert!(role.decides().is_none(), "there may be others");
        assert!(ranked(&mut role, Rank::First));
        assert!(!ranked(&mut role, Rank::Later));
        assert!(ranked(&mut role, Rank::First), "those before it have gone");
        assert!(!ranked(&mut role, Rank::Leaving));
    }

    #[test]
    fn a_replica_that_loses_a_write_is_on_standby_until_another_one_leaves() {
        let (mut role, now) = (Role::new(true), Instant::now());
        assert!(ranked(&mut role, Rank::First));
        role.lost_conflict(now);
        assert!(role.decides().is_none() && !ranked(&mut role, Rank::First), "another one took over while it was away, and does the work");
        role.stands_at(Standing { rank: Rank::First, departures: 1 }, now);
        assert_eq!(role.decides(), Some(Cause::Successor));
        role.lost_conflict(at(now, 4999));
        assert_eq!(role.decides(), Some(Cause::Successor), "by a last decision of the one that leaves");
        role.lost_conflict(now + HANDOVER_GRACE);
        assert_eq!(role.decides(), None);

        let mut role = standing_by();
        role.stands_at(Standing { rank: Rank::Later, departures: 1 }, now);
        assert!(role.decides().is_none(), "there is one before it");
    }

    #[test]
    fn a_standby_takes_over_when_a_request_stays_undecided() {
        let (mut role, start) = (standing_by(), Instant::now());
        assert_eq!(role.next(false, start, 0.0), None, "nothing waits");
        assert_eq!(role.next(true, at(start, 500), 1.0), Some(at(start, 3500)), "the time, and a half of it");
        assert_eq!(role.next(true, at(start, 1000), 0.0), Some(at(start, 3500)), "drawn once");
        role.other_decided();
        assert_eq!(role.next(true, at(start, 3400), 0.0), Some(at(start, 5400)));
        assert_eq!(role.next(false, at(start, 4000), 0.0), None, "what waited was decided");
        assert_eq!(role.next(true, at(start, 5000), 0.0), Some(at(start, 7000)));
        assert!(role.decides().is_none());
        assert_eq!(role.next(true, at(start, 7000), 0.0), None);
        assert_eq!(role.decides(), Some(Cause::Takeover));
        role.other_decided();
        assert!(role.decides().is_some() && !ranked(&mut role, Rank::Leaving), "as long as it loses no write, and stays");
    }

    #[test]
    fn a_takeover_that_was_not_needed_doubles_the_wait_for_the_next() {
        let (mut role, mut now) = (standing_by(), Instant::now());
        for patience in [2, 4, 8, 8] {
            let takeover = role.next(true, now, 0.0).unwrap();
            assert_eq!(takeover - now, Duration::from_secs(patience));
            now = takeover;
            assert!(role.next(true, now, 0.0).is_none() && role.decides().is_some());
            role.lost_conflict(now);
            assert!(role.decides().is_none());
        }
        let takeover = role.next(true, now, 0.0).unwrap();
        assert!(role.next(true, takeover, 0.0).is_none());
        now = takeover + STABLE_AFTER;
        role.lost_conflict(now);
        assert_eq!(role.next(true, now, 0.0), Some(now + TAKEOVER_AFTER));
    }

    /// A program that does not run as a pod has no rank.
    #[test]
    fn a_replica_without_a_rank_decides_until_it_loses_a_write() {
        let (mut role, now) = (Role::new(false), Instant::now());
        role.lost_conflict(now);
        assert!(role.decides().is_none());
        assert_eq!(role.next(true, now, 0.0), Some(now + TAKEOVER_AFTER));
    }
}
