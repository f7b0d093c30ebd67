//! Reissue on demand: renewals are advanced, and spread over a chosen duration.
//!
//! Each certificate stays until its replacement is published. Calls that are repeated during a reissue add no orders. Failed orders that
//! wait for their next attempt are retried within the same duration, because the operator may have fixed the cause.
//!
//! Certificates without a subscriber are replaced too, because callers fetch them. If the order for one fails, the next fetch tries again.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use agent_runtime::text;
use sds_server::store::Entry;
use tokio::{sync::oneshot, time::Instant};
use tracing::info;

use super::{Id, Now, Rotation};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::rotation::reissue";

/// Minimum time after a reissue for which another call leaves the certificate alone.
const JUST_DONE_WINDOW: Duration = Duration::from_secs(60);

/// Selects certificates. An absent field selects all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Which {
    /// Only certificates of this SPIFFE ID.
    pub spiffe_id: Option<String>,
    /// Only certificates of the profile of this name.
    pub profile: Option<String>,
}

/// A call to reissue certificates.
#[derive(Debug)]
pub struct Reissue {
    /// The certificates.
    pub which: Which,
    /// Duration over which renewals are spread.
    pub over: Duration,
    /// Receives the result.
    pub answer: oneshot::Sender<Reissued>,
}

/// Result of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reissued {
    /// Selected certificates: those in use, and those that clients hold from before a restart of the agent.
    pub matched: usize,
    /// Selected certificates that an earlier call has just replaced. They are left alone.
    pub just_done: usize,
    /// Failed orders that are retried, including those of workloads without a certificate.
    pub retried: usize,
}

/// Result of an earlier call for an entry.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    until: Instant,
    replaced: bool,
}

impl Rotation {
    pub(super) fn reissue(&mut self, call: Reissue) {
        let Reissue { which, over, answer } = call;
        let now = self.now();
        self.reissue_marks.retain(|_, mark| mark.until > now.mono);
        let mut counts = Reissued { matched: 0, just_done: 0, retried: 0 };
        for (id, entry) in self.entries.iter().map(|(id, entry)| (*id, entry.clone())).collect::<Vec<_>>() {
            if !self.is_about(&which, id, &entry) {
                continue;
            }
            let has_one = entry.current().is_some() || entry.is_held();
            if !has_one {
                counts.retried += usize::from(self.planner.hasten(now, id, over));
                continue;
            }
            counts.matched += 1;
            let until = now.mono + over.max(JUST_DONE_WINDOW);
            match self.reissue_marks.get(&id) {
                Some(mark) if mark.replaced => {
                    counts.just_done += 1;
                    continue;
                }
                // The call may advance the renewal further, but the certificate is replaced only once.
                Some(mark) => drop(self.reissue_marks.insert(id, Mark { until: mark.until.max(until), replaced: false })),
                None => drop(self.reissue_marks.insert(id, Mark { until, replaced: false })),
            }
            let at = now.wall + over.mul_f64(self.planner.draw());
            self.bring_forward(now, id, &entry, at);
            counts.retried += usize::from(self.planner.hasten(now, id, over));
        }
        // A client of the admin address can repeat the call in a loop.
        if let Some(left_out) = self.reissue_lines.permit("reissue", now.mono) {
            let shown = |told: &Option<String>| told.as_ref().map(|told| text::excerpt(told, text::MAX_NAME_CHARS));
            info!(
                target: LOG_TARGET, spiffe_id = shown(&which.spiffe_id),
                profile = shown(&which.profile),
                ?over,
                matched = counts.matched,
                just_done = counts.just_done,
                retried = counts.retried,
                left_out,
                "certificates are reissued as asked"
            );
        }
        // The caller may no longer wait for the result.
        let _ = answer.send(counts);
    }

    /// Advances the renewal of a certificate, in use or held by a client, to `at`, unless it is planned earlier.
    pub(super) fn bring_forward(&mut self, now: Now, id: Id, entry: &Arc<Entry>, at: SystemTime) {
        entry.hurry(at);
        self.planner.wanted_by(now, id, entry.demand());
        self.planner.expedite(now, id, at);
        entry.set_status(|status| status.next_attempt = status.next_attempt.map(|planned| planned.min(at)));
    }

    fn is_about(&self, which: &Which, id: Id, entry: &Arc<Entry>) -> bool {
        let of_id = which.spiffe_id.as_deref().is_none_or(|wanted| wanted == entry.identity.spiffe_id.as_str());
        let Some(identity) = self.identity_of(id) else { return false };
        of_id && which.profile.as_deref().is_none_or(|wanted| wanted == &*identity.profile.name)
    }

    /// Records that a certificate was published.
    pub(super) fn replaced(&mut self, id: Id) {
        if let Some(mark) = self.reissue_marks.get_mut(&id) {
            mark.replaced = true;
        }
    }
}
