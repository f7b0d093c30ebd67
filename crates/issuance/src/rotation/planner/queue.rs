//! The queue of one issuer. It selects the due orders that may start. Does no I/O.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{Class, Id, aside::Turns, job::Rank};

/// Maximum number of orders in progress at one issuer. Parked orders do not count.
pub const SLOTS: usize = 8;
/// Slots that are reserved for certificates that are about to end.
pub const RESERVED: usize = 2;
/// Number of parked orders at which an issuer without an answer for [`UNRESPONSIVE_AFTER`] is unresponsive.
///
/// A pending order has no time limit, and its key stays in memory. An unresponsive issuer therefore gets only one more order per
/// [`PROBE_INTERVAL`]. Further requests would help no identity, and an issuer that recovers would have to sign all of them. One order per
/// interval still starts, because the parked ones may be stuck for a reason that does not concern it, such as requests of one namespace
/// that no approver decides. Any answer ends the limit, including a refusal.
pub(super) const MAX_PARKED: usize = 32;
const UNRESPONSIVE_AFTER: Duration = Duration::from_secs(60);
pub(super) const PROBE_INTERVAL: Duration = Duration::from_secs(60);

/// Identifies an issuer under any name that profiles use: `authority` of a profile. A name may move to another issuer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Authority(pub Arc<str>);

/// The due orders and the slots of an issuer.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// Due orders, by class.
    pub(super) waiting: [BTreeSet<(Rank, Id)>; 3],
    /// Slots in use, by class.
    pub(super) used: [usize; 3],
    /// Orders that are pending at the upstream and occupy no slot, those that were set aside included.
    pub(super) parked: usize,
    /// Time at which the upstream last answered, or at which the first of the parked orders was parked.
    pub(super) last_answer: Option<Instant>,
    /// Time at which an order was last started.
    pub(super) started: Option<Instant>,
    /// The orders that start beside pending ones.
    pub(super) turns: Turns,
    /// Whether an order has failed since the last certificate.
    pub(super) is_failing: bool,
    /// Time of the last certificate that ended an outage.
    pub(super) recovered: Option<Instant>,
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

    /// Returns when the next order may go to an upstream with [`MAX_PARKED`] parked orders. `None` if no order waits for that.
    pub(super) fn probe_at(&self) -> Option<Instant> {
        let is_held = self.parked >= MAX_PARKED && self.next().is_some();
        self.started.filter(|_| is_held).map(|last| last + PROBE_INTERVAL)
    }

    /// Returns the next order that may start. Orders of waiting clients come first, but leave one general slot to renewals that are queued.
    /// The reserved slots are for certificates that are about to end.
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
