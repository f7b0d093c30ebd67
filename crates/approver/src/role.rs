//! The role of this replica: it decides, or it is on standby. A state machine without I/O or clock.
//!
//! Two replicas that write at the same time lose about a third of their writes to conflicts, and together they exceed the rate of
//! cert-manager's webhook. So one replica decides, the [first](Rank::First). The others are on standby: they watch every request, and
//! neither judge nor write.
//!
//! The replicas use no Lease. A replica on standby watches decisions instead of heartbeats. If a request waits and no other replica has
//! decided a request for 2 s ([`TAKEOVER_AFTER`]), it takes over. So a replica that runs without deciding is replaced like one that has
//! died. If two replicas decide, the one that loses a write to a conflict goes on standby. A decision is written with the
//! `resourceVersion` of the request that was judged, so two deciding replicas cost throughput and never overwrite each other.

use std::time::Duration;

use tokio::time::Instant;

use super::replicas::{Rank, Standing};

/// Time for which a request may wait without a decision of another replica before a replica on standby takes over.
pub const TAKEOVER_AFTER: Duration = Duration::from_secs(2);
/// Upper bound of that time after unnecessary takeovers. They happen if each response of the webhook takes longer than
/// [`TAKEOVER_AFTER`].
const MAX_TAKEOVER_AFTER: Duration = Duration::from_secs(8);
/// A takeover that lasts this long was necessary.
const STABLE_AFTER: Duration = Duration::from_secs(60);
/// Time after a handover in which the successor ignores conflicts: the last writes of the leaving replica may still be in flight.
const HANDOVER_GRACE: Duration = Duration::from_secs(5);

/// Why a replica decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The replica does not run as a pod, and cannot find other replicas.
    Alone,
    /// The replica is the first at its start.
    First,
    /// Another replica has left, and this one is the first of the remaining ones.
    Successor,
    /// A request waited, and no other replica decided.
    Takeover,
}

impl Cause {
    /// Returns the text of the log field `cause`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Alone => "it does not run as a pod",
            Self::First => "it is the oldest replica",
            Self::Successor => "an older replica has left",
            Self::Takeover => "no other replica decided",
        }
    }
}

/// Whether this replica decides, and when it takes over. The caller passes events and the time, and calls [`next`](Self::next) after each.
#[derive(Debug)]
pub struct Role {
    standing: Standing,
    /// Why the replica decides; `None` on standby.
    decides: Option<Cause>,
    /// Between [`TAKEOVER_AFTER`] and [`MAX_TAKEOVER_AFTER`].
    takeover_after: Duration,
    /// Time of the takeover; set on standby while a request waits.
    takeover_at: Option<Instant>,
    /// Time of the last takeover.
    took_over_at: Option<Instant>,
    /// End of [`HANDOVER_GRACE`].
    grace_until: Option<Instant>,
}

impl Role {
    /// Creates the initial role. With `may_have_others`, the replica is on standby until it knows its rank or takes over.
    pub fn new(may_have_others: bool) -> Self {
        let standing = Standing { rank: Rank::Unknown, departures: 0 };
        let decides = if may_have_others { None } else { Some(Cause::Alone) };
        Self { standing, decides, takeover_after: TAKEOVER_AFTER, takeover_at: None, took_over_at: None, grace_until: None }
    }

    /// Returns why the replica decides, or `None` on standby.
    pub fn decides(&self) -> Option<Cause> {
        self.decides
    }

    /// Notes the replica's current standing.
    pub fn stands_at(&mut self, standing: Standing, now: Instant) {
        let before = std::mem::replace(&mut self.standing, standing);
        let decides = match standing.rank {
            Rank::First if before.rank == Rank::Unknown => Some(Cause::First),
            Rank::First if before.rank != Rank::First => Some(Cause::Successor),
            // The replica that left may have been the deciding one.
            Rank::First if standing.departures != before.departures => Some(Cause::Successor),
            rank if rank != before.rank => None,
            _ => return,
        };
        (self.decides, self.takeover_at, self.took_over_at, self.takeover_after) = (decides, None, None, TAKEOVER_AFTER);
        self.grace_until = (decides == Some(Cause::Successor)).then(|| now + HANDOVER_GRACE);
    }

    /// Notes that another replica has decided a request, which restarts the wait for a takeover.
    pub fn other_decided(&mut self) {
        self.takeover_at = None;
    }

    /// Notes that a decision of this replica was not written, because another replica had decided first. The replica goes on standby,
    /// except within 5 s after a handover.
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

    /// Takes over if the time has come. Returns the time of the next call, or `None` if no takeover is pending. `waits` is whether a
    /// request is ready to be decided. `jitter`, 0 to 1, adds up to half of the wait, so that replicas do not take over simultaneously.
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
        assert!(Role::new(false).decides().is_some(), "no other replica can exist");
        let mut role = Role::new(true);
        assert!(role.decides().is_none(), "other replicas may exist");
        assert!(ranked(&mut role, Rank::First));
        assert!(!ranked(&mut role, Rank::Later));
        assert!(ranked(&mut role, Rank::First), "the older replicas have left");
        assert!(!ranked(&mut role, Rank::Leaving));
    }

    #[test]
    fn a_replica_that_loses_a_write_is_on_standby_until_another_one_leaves() {
        let (mut role, now) = (Role::new(true), Instant::now());
        assert!(ranked(&mut role, Rank::First));
        role.lost_conflict(now);
        assert!(role.decides().is_none() && !ranked(&mut role, Rank::First), "another replica took over, and decides");
        role.stands_at(Standing { rank: Rank::First, departures: 1 }, now);
        assert_eq!(role.decides(), Some(Cause::Successor));
        role.lost_conflict(at(now, 4999));
        assert_eq!(role.decides(), Some(Cause::Successor), "the conflict is with a last decision of the leaving replica");
        role.lost_conflict(now + HANDOVER_GRACE);
        assert_eq!(role.decides(), None);

        let mut role = standing_by();
        role.stands_at(Standing { rank: Rank::Later, departures: 1 }, now);
        assert!(role.decides().is_none(), "an older replica exists");
    }

    #[test]
    fn a_standby_takes_over_when_a_request_stays_undecided() {
        let (mut role, start) = (standing_by(), Instant::now());
        assert_eq!(role.next(false, start, 0.0), None, "no request waits");
        assert_eq!(role.next(true, at(start, 500), 1.0), Some(at(start, 3500)), "the wait with the full jitter of one half");
        assert_eq!(role.next(true, at(start, 1000), 0.0), Some(at(start, 3500)), "the jitter is drawn once for each wait");
        role.other_decided();
        assert_eq!(role.next(true, at(start, 3400), 0.0), Some(at(start, 5400)));
        assert_eq!(role.next(false, at(start, 4000), 0.0), None, "the waiting request was decided");
        assert_eq!(role.next(true, at(start, 5000), 0.0), Some(at(start, 7000)));
        assert!(role.decides().is_none());
        assert_eq!(role.next(true, at(start, 7000), 0.0), None);
        assert_eq!(role.decides(), Some(Cause::Takeover));
        role.other_decided();
        assert!(role.decides().is_some() && !ranked(&mut role, Rank::Leaving), "it decides until it loses a write or leaves");
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

    /// A replica that does not run as a pod has no rank.
    #[test]
    fn a_replica_without_a_rank_decides_until_it_loses_a_write() {
        let (mut role, now) = (Role::new(false), Instant::now());
        role.lost_conflict(now);
        assert!(role.decides().is_none());
        assert_eq!(role.next(true, now, 0.0), Some(now + TAKEOVER_AFTER));
    }
}
