//! Reissuing by hand: renewals are brought forward, spread over a chosen time. No certificate is thrown away: each stays until its
//! replacement is there, and calls that are repeated while one of them is at work add no orders. What had failed and waits for its next
//! attempt is tried again within the same time: whoever calls has mended something.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use agent_runtime::text;
use sds_server::store::Entry;
use tokio::{sync::oneshot, time::Instant};
use tracing::info;

use super::{Id, Now, Rotation};

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::rotation::reissue";

/// So long after a certificate was reissued another call leaves it alone, at the least.
const JUST_DONE_WINDOW: Duration = Duration::from_secs(60);

/// Whose certificates.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Which {
    /// Only of this SPIFFE ID.
    pub spiffe_id: Option<String>,
    /// Only of the profile of this name.
    pub profile: Option<String>,
}

/// A call.
#[derive(Debug)]
pub struct Reissue {
    /// Whose.
    pub which: Which,
    /// Over which time.
    pub over: Duration,
    /// Who wants to know what will be done.
    pub answer: oneshot::Sender<Reissued>,
}

/// What will be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reissued {
    /// Certificates in use, ours or held by clients from before a restart, that the call is about.
    pub matched: usize,
    /// Of these, the ones that an earlier call has just had replaced, and that are left alone.
    pub just_done: usize,
    /// Orders that had failed and are tried again, among them those of workloads without a certificate.
    pub retried: usize,
}

/// What an earlier call has done to an entry.
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
                // Sooner, if it says so; but once.
                Some(mark) => drop(self.reissue_marks.insert(id, Mark { until: mark.until.max(until), replaced: false })),
                None => drop(self.reissue_marks.insert(id, Mark { until, replaced: false })),
            }
            let at = now.wall + over.mul_f64(self.planner.draw());
            self.bring_forward(now, id, &entry, at);
            counts.retried += usize::from(self.planner.hasten(now, id, over));
        }
        let shown = |told: &Option<String>| told.as_ref().map(|told| text::excerpt(told, text::MAX_NAME_CHARS));
        info!(
            target: LOG_TARGET, spiffe_id = shown(&which.spiffe_id),
            profile = shown(&which.profile),
            ?over,
            matched = counts.matched,
            just_done = counts.just_done,
            retried = counts.retried,
            "certificates are reissued as asked"
        );
        // Who asked may have gone.
        let _ = answer.send(counts);
    }

    /// A certificate that is there, or that clients have, is renewed at `at`, unless it is sooner.
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

    /// A certificate was published.
    pub(super) fn replaced(&mut self, id: Id) {
        if let Some(mark) = self.reissue_marks.get_mut(&id) {
            mark.replaced = true;
        }
    }
}
