//! Decides when a pod gets an event about its certificate. It does no I/O, reads no clock and keeps no certificate.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use workload_identity::PodRef;

/// Consecutive failures after which pods get a Warning, regardless of their duration.
const TROUBLE_AFTER_FAILURES: u32 = 3;
/// Time since the first failure after which the next failure is reported, regardless of their number.
const TROUBLE_AFTER: Duration = Duration::from_secs(30);
/// Maximum of pods of one identity that get an event: those of further replicas would say the same.
const MAX_PODS_PER_IDENTITY: usize = 8;

/// The machine-readable reason of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// An approver denied the request.
    CertificateDenied,
    /// Issuance failed.
    CertificateNotIssued,
    /// The request waits for approval or signature.
    CertificatePending,
    /// The certificate is not valid by the node's clock, which was set.
    CertificateWithheld,
    /// A certificate is issued after a Warning.
    CertificateIssued,
    /// A caller of the pod is refused.
    CallerRefused,
    /// Callers of the pod are served after a Warning.
    CallerServed,
}

impl Reason {
    /// The reason as the event has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CertificateDenied => "CertificateDenied",
            Self::CertificateNotIssued => "CertificateNotIssued",
            Self::CertificatePending => "CertificatePending",
            Self::CertificateWithheld => "CertificateWithheld",
            Self::CertificateIssued => "CertificateIssued",
            Self::CallerRefused => "CallerRefused",
            Self::CallerServed => "CallerServed",
        }
    }
}

/// An event to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodEvent {
    /// The pod of the event.
    pub pod: PodRef,
    /// The reason of the event.
    pub reason: Reason,
    /// The text for the operator.
    pub message: String,
}

/// The identities whose issuance fails, by the id of their store entry.
#[derive(Debug, Default)]
pub struct PodTransitions(HashMap<u64, Trouble>);

#[derive(Debug)]
struct Trouble {
    since: Instant,
    failures: u32,
    /// Whether a Warning was reported, so that later pods get one too.
    is_told: bool,
    told: HashSet<Arc<str>>,
    pods: Vec<PodRef>,
}

impl PodTransitions {
    /// Records a failure for `pods`, and returns the events to write. With `at_once`, the first failure is reported.
    pub fn failed(&mut self, now: Instant, id: u64, pods: &[PodRef], reason: Reason, at_once: bool, message: &str) -> Vec<PodEvent> {
        let fresh = || Trouble { since: now, failures: 0, is_told: false, told: HashSet::new(), pods: Vec::new() };
        let trouble = self.0.entry(id).or_insert_with(fresh);
        trouble.failures = trouble.failures.saturating_add(1);
        trouble.is_told |= at_once || trouble.failures >= TROUBLE_AFTER_FAILURES || now.duration_since(trouble.since) > TROUBLE_AFTER;
        if !trouble.is_told {
            return Vec::new();
        }
        let mut notes = Vec::new();
        for pod in pods {
            if trouble.pods.len() < MAX_PODS_PER_IDENTITY && trouble.told.insert(pod.uid.clone()) {
                trouble.pods.push(pod.clone());
                notes.push(PodEvent { pod: pod.clone(), reason, message: message.to_owned() });
            }
        }
        notes
    }

    /// Records success. Returns a Normal event for each pod that got a Warning.
    pub fn issued(&mut self, id: u64, message: &str) -> Vec<PodEvent> {
        let pods = self.0.remove(&id).map(|trouble| trouble.pods).unwrap_or_default();
        pods.into_iter().map(|pod| PodEvent { pod, reason: Reason::CertificateIssued, message: message.to_owned() }).collect()
    }

    /// Forgets an identity that has no subscriber.
    pub fn forgotten(&mut self, id: u64) {
        self.0.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str) -> PodRef {
        PodRef { namespace: "shop".into(), name: name.into(), uid: name.into() }
    }

    fn fails(ledger: &mut PodTransitions, now: Instant, pods: &[PodRef]) -> Vec<String> {
        let notes = ledger.failed(now, 1, pods, Reason::CertificateNotIssued, false, "no");
        notes.into_iter().map(|note| note.pod.name.to_string()).collect()
    }

    #[test]
    fn trouble_is_told_once_and_its_end_once() {
        let (mut ledger, now) = (PodTransitions::default(), Instant::now());
        let pods = [pod("a"), pod("b")];
        assert!(fails(&mut ledger, now, &pods).is_empty() && fails(&mut ledger, now, &pods).is_empty());
        assert_eq!(fails(&mut ledger, now, &pods), ["a", "b"]);
        for _ in 0..50 {
            assert!(fails(&mut ledger, now + Duration::from_secs(600), &pods).is_empty());
        }
        assert_eq!(fails(&mut ledger, now, &[pod("a"), pod("late")]), ["late"], "a later pod gets an event too");
        let over = ledger.issued(1, "yes");
        assert_eq!(over.iter().map(|note| &*note.pod.name).collect::<Vec<_>>(), ["a", "b", "late"]);
        assert!(over.iter().all(|note| note.reason == Reason::CertificateIssued && note.message == "yes"));
        assert!(ledger.issued(1, "yes").is_empty() && ledger.0.is_empty());
    }

    #[test]
    fn a_hiccup_is_no_news_and_a_long_one_is() {
        let (mut ledger, now) = (PodTransitions::default(), Instant::now());
        assert!(fails(&mut ledger, now, &[pod("a")]).is_empty());
        assert!(ledger.issued(1, "yes").is_empty(), "no pod got a Warning");
        assert!(fails(&mut ledger, now, &[pod("a")]).is_empty());
        assert_eq!(fails(&mut ledger, now + Duration::from_secs(31), &[pod("a")]), ["a"]);
    }

    #[test]
    fn a_denial_is_told_at_once_and_what_nobody_asks_for_is_forgotten() {
        let (mut ledger, now) = (PodTransitions::default(), Instant::now());
        let denied = |ledger: &mut PodTransitions| ledger.failed(now, 7, &[pod("a")], Reason::CertificateDenied, true, "no").len();
        assert_eq!((denied(&mut ledger), denied(&mut ledger)), (1, 0));
        ledger.forgotten(7);
        assert!(ledger.issued(7, "yes").is_empty());
        assert_eq!(denied(&mut ledger), 1);
    }

    #[test]
    fn an_identity_of_many_pods_tells_some_of_them() {
        let (mut ledger, now) = (PodTransitions::default(), Instant::now());
        let many: Vec<_> = (0..50).map(|n| pod(&n.to_string())).collect();
        assert_eq!(ledger.failed(now, 1, &many, Reason::CertificateDenied, true, "no").len(), MAX_PODS_PER_IDENTITY);
        assert!(ledger.failed(now, 1, &many, Reason::CertificateDenied, true, "no").is_empty());
        assert_eq!(ledger.issued(1, "yes").len(), MAX_PODS_PER_IDENTITY);
    }
}
