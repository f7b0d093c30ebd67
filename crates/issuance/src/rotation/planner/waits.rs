//! Waits after failures, and what ends them early. Does no I/O.

use std::time::Duration;

use super::{
    Class, Id, Now, Planner, Retry,
    job::{Job, Phase, class, due, due_for_a_client},
};

/// Time over which the orders that failed during an outage are retried after it.
const RECOVERY_SPREAD: Duration = Duration::from_secs(15);
/// Minimum time between two recoveries of an issuer. An issuer that fails for some identities only is not asked for them more often.
const RECOVERY_INTERVAL: Duration = Duration::from_secs(60);

impl Planner {
    /// The configuration has changed: all waits end within 2 s.
    pub fn configuration_changed(&mut self, now: Now) {
        self.end_waits(now, |_| true);
    }

    /// The wall clock was stepped: all its times are compared again, and waits after failures that a wrong clock explains end within 2 s.
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

    /// Shortens a wait after a failure, so that it ends within `over`. The order then starts even if no client subscribes. Returns whether
    /// the entry was waiting.
    pub fn hasten(&mut self, now: Now, id: Id, over: Duration) -> bool {
        let at = now.mono + over.mul_f64(self.draw());
        let waits = |job: &&mut Job| job.not_before.is_some_and(|wait| wait > now.mono) && due_for_a_client(job, now).is_some();
        let Some(job) = self.jobs.get_mut(&id).filter(waits) else { return false };
        (job.not_before, job.owed) = (job.not_before.min(Some(at)), true);
        self.consider(now, id);
        true
    }

    /// Records a failure for which the upstream has named no time. Returns the time within which to retry if the order started before the
    /// end of an outage, and so belongs to it.
    pub(super) fn note_failure(&mut self, now: Now, id: Id, retry: Retry) -> Option<Duration> {
        let job = self.jobs.get(&id).filter(|_| retry == Retry::Backoff)?;
        let queue = self.queues.get_mut(&job.authority)?;
        let recovered = queue.recovered.filter(|at| now.mono < *at + RECOVERY_SPREAD);
        match (recovered, job.phase) {
            (Some(at), Phase::Running { started, .. }) if started < at => Some(at + RECOVERY_SPREAD - now.mono),
            _ => {
                queue.is_failing = true;
                None
            }
        }
    }

    /// The issuer of the entry has issued a certificate. If this ends an outage, the entries of this issuer that back off, and have no
    /// certificate or one that ends, are retried within 15 s.
    pub(super) fn recover(&mut self, now: Now, id: Id) {
        let Some(authority) = self.jobs.get(&id).map(|job| job.authority.clone()) else { return };
        let Some(queue) = self.queues.get_mut(&authority) else { return };
        let is_early = queue.recovered.is_some_and(|at| now.mono < at + RECOVERY_INTERVAL);
        if is_early || !std::mem::take(&mut queue.is_failing) {
            return;
        }
        queue.recovered = Some(now.mono);
        let backs_off = |job: &Job| {
            job.authority == authority
                && job.backs_off
                && job.not_before.is_some_and(|at| at > now.mono)
                && matches!(job.phase, Phase::Resting)
                && due(job, now).is_some_and(|at| at <= now.wall)
                && class(job, now) != Class::Routine
        };
        let ids: Vec<Id> = self.jobs.iter().filter(|(_, job)| backs_off(job)).map(|(id, _)| *id).collect();
        for id in ids {
            let at = now.mono + RECOVERY_SPREAD.mul_f64(self.draw());
            if let Some(job) = self.jobs.get_mut(&id) {
                job.not_before = job.not_before.min(Some(at));
            }
            self.consider(now, id);
        }
    }
}
