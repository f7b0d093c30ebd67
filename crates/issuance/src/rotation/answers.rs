//! Effects of the answers to orders: a verified certificate settles and is then published, and a failure is logged and retried.

use std::{sync::Arc, time::Duration};

use agent_runtime::{clock, text};
use sds_server::material::{self, Svid};
use tracing::{info, warn};
use workload_identity::PodRef;

use super::{Id, Now, Rotation, orders::Running, schedule};
use crate::issuer::{Error, Issued, Retry, verify};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::rotation";

/// Maximum length of an order's error in the log and the status, in characters.
const MAX_CAUSE_CHARS: usize = 1200;

impl Rotation {
    /// Handles a verified answer. `order` is its order, if it has not ended before, and `index` its position among the orders set aside.
    pub(super) fn issued(&mut self, id: Id, issued: Issued, verified: &verify::Verified, order: Option<&Running>, index: Option<usize>) {
        let now = self.now();
        let Some(identity) = self.identity_of(id) else {
            // The plan has changed, and rotation has yet to read the change.
            return self.release(now, id, index);
        };
        let profile = &identity.profile;
        let validity = issued.chain.validity;
        let renewal_jitter = self.planner.renewal_jitter(now, id);
        let renew_at = schedule::renew_at(&validity, now.wall, profile, renewal_jitter, self.planner.draw());
        let authority = material::authority_digest(&profile.fingerprint(), verified.anchor.as_ref());
        if let Some(trust) = &self.parts.authorities {
            trust.met(&issued.chain, now.wall);
        }
        if validity.lifetime() < profile.lifetime / 2 {
            warn!(target: LOG_TARGET, %identity, asked = ?profile.lifetime, got = ?validity.lifetime(), "the issuer shortens certificates: more renewals than configured");
        }
        let took = order.map_or(Duration::ZERO, |order| order.started.elapsed());
        self.parts.metrics.issued(&profile.issuer, &issued.phases);
        info!(
            target: LOG_TARGET, %identity,
            issuer = %profile.issuer,
            request = order.and_then(Running::request),
            serial = %issued.chain.serial,
            fingerprint = %issued.chain.fingerprint,
            not_after = %clock::rfc3339(validity.not_after),
            renew_at = %clock::rfc3339(renew_at),
            milliseconds = u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            "certificate issued"
        );
        let svid = Svid::new(identity.clone(), issued.chain, issued.key, renew_at, schedule::settled_at(&validity), authority)
            .with_path(&verified.path);
        self.verified.insert(id, Arc::new(svid));
        self.awaiting_anchor.remove(&id);
        self.rejected_evidence.remove(&id);
        match index {
            Some(index) => self.planner.aside_issued(now, id, index, validity, renew_at),
            None => self.planner.issued(now, id, validity, renew_at),
        }
        self.show_pending(id);
    }

    /// Ends an order for the planner. It has no result, and is retried after a backoff.
    pub(super) fn release(&mut self, now: Now, id: Id, index: Option<usize>) {
        match index {
            Some(index) => self.planner.aside_failed(now, id, index),
            None => drop(self.planner.failed(now, id, Retry::Backoff, false)),
        }
    }

    /// Handles the failure of the latest order, or of an answer that was verified before.
    pub(super) fn failed(&mut self, id: Id, evidence: Option<PodRef>, error: &Error) {
        self.order_failed(id, evidence, None, error);
    }

    /// Handles the failure of the latest order, or of the one at `index` among the orders set aside.
    pub(super) fn order_failed(&mut self, id: Id, evidence: Option<PodRef>, index: Option<usize>, error: &Error) {
        let now = self.now();
        let pod = evidence.clone();
        let by_clock = matches!(error, Error::InvalidCertificate(verify::Error::Expired(_) | verify::Error::NotYetValid { .. }));
        let has_sibling =
            |pod: &PodRef| self.entries.get(&id).and_then(|entry| entry.evidence(Some(pod))).is_some_and(|other| other != *pod);
        let retry = match (error.retry(), evidence.filter(has_sibling)) {
            // The retry names another pod of the identity. If there is none, it would repeat the same evidence.
            (Retry::Now, None) => Retry::Backoff,
            (Retry::Now, Some(pod)) => {
                self.rejected_evidence.insert(id, pod);
                Retry::Now
            }
            // The denial may concern only this pod, for example after a change of its labels: the next attempt names another pod.
            (retry, Some(pod)) if matches!(error, Error::Denied { .. }) => {
                self.rejected_evidence.insert(id, pod);
                retry
            }
            (retry, _) => retry,
        };
        // The other orders of the entry continue after the failure of one that was set aside.
        let wait = match index {
            Some(index) => {
                self.planner.aside_failed(now, id, index);
                None
            }
            None => Some(self.planner.failed(now, id, retry, by_clock)),
        };
        let Some(entry) = self.entries.get(&id) else { return };
        let identity = self.identity_of(id).unwrap_or_else(|| entry.identity.clone());
        let issuer = &identity.profile.issuer;
        let renewal = entry.current();
        self.parts.metrics.failed(issuer, error.outcome(), renewal.is_some());
        let left = renewal.as_ref().map(|svid| svid.chain.validity.remaining(now.wall).as_secs());
        // Serial of the certificate in use.
        let serial = renewal.as_ref().map(|svid| tracing::field::display(&svid.chain.serial));
        let pod = pod.as_ref().map(tracing::field::display);
        // Each part was limited where it was read. This limits the whole text.
        let cause = text::excerpt(&error.to_string(), MAX_CAUSE_CHARS);
        warn!(
            target: LOG_TARGET, identity = %entry.identity,
            %issuer,
            pod,
            serial,
            cause,
            retry_in_seconds = wait.map(|wait| wait.as_secs()),
            valid_for_seconds = left,
            "no new certificate; {}",
            if left.is_some_and(|left| left > 0) { "the one in use stays" } else { "its clients wait" }
        );
        if let Some(observer) = &self.parts.observer {
            observer.failed(entry, error);
        }
        let next = self.planner.next_attempt(now, id);
        entry.set_status(|status| (status.last_error, status.next_attempt) = (Some(cause), next));
        self.show_pending(id);
    }
}
