//! The queue of one issuer: which of its due orders may start. Pure.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{Class, Id, job::Rank};

/// Orders under way at one issuer.
pub const SLOTS: usize = 8;
/// Of these, kept for certificates that are about to end.
pub const RESERVED: usize = 2;
/// An order may stay with its upstream for ever, and its key is kept: so there is a bound to what is left with one that is dead. With so
/// many parked and [`UNRESPONSIVE_AFTER`] since it answered anybody, it gets one more in each [`PROBE_INTERVAL`] and no more: a thousand requests that nobody
/// works off help no identity, and all of them would be worked off by an issuer that comes back. One order still goes through now and
/// then, because what is parked may be stuck for a reason of its own, such as requests of one namespace that no approver takes, and the
/// next one would be answered. Any answer ends it at once, a refusal too.
pub(super) const MAX_PARKED: usize = 32;
const UNRESPONSIVE_AFTER: Duration = Duration::from_secs(60);
pub(super) const PROBE_INTERVAL: Duration = Duration::from_secs(60);

/// An issuer, whatever profiles call it: `authority` of a profile. A name may move to another issuer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Authority(pub Arc<str>);

/// An issuer's orders that are due, and what it has.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// Due orders, by class.
    pub(super) waiting: [BTreeSet<(Rank, Id)>; 3],
    /// Slots in use, by class.
    pub(super) used: [usize; 3],
    /// Orders without a slot that the upstream has.
    pub(super) parked: usize,
    /// When the upstream last answered, or got the first of the parked.
    pub(super) last_answer: Option<Instant>,
    /// When an order was last started.
    pub(super) started: Option<Instant>,
}

impl Queue {
    pub(super) fn park(&mut self, now: Instant) {
        if self.parked == 0 {
            self.last_answer = Some(now);
        }
        self.parked += 1;
    }

    pub(super) fn is_unresponsive(&self, now: Instant) -> bool {
        self.parked >= MAX_PARKED && self.last_answer.is_some_and(|last_answer| now >= last_answer + UNRESPONSIVE_AFTER)
    }

    pub(super) fn is_open(&self, now: Instant) -> bool {
        !self.is_unresponsive(now) || self.started.is_none_or(|last| now >= last + PROBE_INTERVAL)
    }

    /// When the next order goes to an upstream that has so many, where one waits for that.
    pub(super) fn probe_at(&self) -> Option<Instant> {
        let is_held = self.parked >= MAX_PARKED && self.next().is_some();
        self.started.filter(|_| is_held).map(|last| last + PROBE_INTERVAL)
    }

    /// What may start now: waiting clients first, all but one of the general slots at the most while there are renewals too, and the
    /// reserved slots for what is about to end.
    pub(super) fn next(&self) -> Option<(Class, Rank, Id)> {
        let [ending, waiting, routine] = self.used;
        if ending + waiting + routine >= SLOTS {
            return None;
        }
        let first = |class: Class| self.waiting[class as usize].first().map(|(rank, id)| (class, *rank, *id));
        let (next_ending, next_waiting, next_routine) = (first(Class::Ending), first(Class::Waiting), first(Class::Routine));
        if ending < RESERVED && next_ending.is_some() {
            return next_ending;
        }
        let general = SLOTS - RESERVED;
        let free = waiting + routine < general;
        let renewals_wait = next_ending.is_some() || next_routine.is_some();
        let turn = waiting + 1 < general || !renewals_wait;
        next_waiting.filter(|_| free && turn).or(next_ending).or(next_routine.filter(|_| free))
    }
}
