//! When a pod is told: pure decisions about how it goes with each identity. It keeps no material and reads no clock.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use workload_identity::PodRef;

/// So many failures in a row are trouble, whatever time they took.
const TROUBLE_AFTER_FAILURES: u32 = 3;
/// So long without success is trouble, however few the failures.
const TROUBLE_AFTER: Duration = Duration::from_secs(30);
/// Pods of one identity that are told: the rest of a node's replicas have the same to say.
const MAX_PODS_PER_IDENTITY: usize = 8;

/// Why a pod is told; one word for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// An approver said no.
    CertificateDenied,
    /// It was tried, and again.
    CertificateNotIssued,
    /// The request waits for somebody.
    CertificatePending,
    /// The clock was set.
    CertificateWithheld,
    /// It is over.
    CertificateIssued,
    /// A process of it asks, and may have nothing.
    CallerRefused,
    /// It may have something after all.
    CallerServed,
}

impl Reason {
    /// The word.
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

/// One event to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodEvent {
    /// On which pod.
    pub pod: PodRef,
    /// Why.
    pub reason: Reason,
    /// The operator's sentence.
    pub message: String,
}

/// How it goes with each identity that is in trouble, by the entry's id.
#[derive(Debug, Default)]
pub struct PodTransitions(HashMap<u64, Trouble>);

#[derive(Debug)]
struct Trouble {
    since: Instant,
    failures: u32,
    /// Whether it has been told, so that pods that come later are told too.
    is_told: bool,
    told: HashSet<Arc<str>>,
    pods: Vec<PodRef>,
}

impl PodTransitions {
    /// It went wrong, for these `pods`. What goes wrong `at_once` is trouble the first time.
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

    /// It went well: whoever was told of trouble is told that it is over.
    pub fn issued(&mut self, id: u64, message: &str) -> Vec<PodEvent> {
        let pods = self.0.remove(&id).map(|trouble| trouble.pods).unwrap_or_default();
        pods.into_iter().map(|pod| PodEvent { pod, reason: Reason::CertificateIssued, message: message.to_owned() }).collect()
    }

    /// Nobody asks for it any more.
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
        assert_eq!(fails(&mut ledger, now, &[pod("a"), pod("late")]), ["late"], "who comes later is told too");
        let over = ledger.issued(1, "yes");
        assert_eq!(over.iter().map(|note| &*note.pod.name).collect::<Vec<_>>(), ["a", "b", "late"]);
        assert!(over.iter().all(|note| note.reason == Reason::CertificateIssued && note.message == "yes"));
        assert!(ledger.issued(1, "yes").is_empty() && ledger.0.is_empty());
    }

    #[test]
    fn a_hiccup_is_no_news_and_a_long_one_is() {
        let (mut ledger, now) = (PodTransitions::default(), Instant::now());
        assert!(fails(&mut ledger, now, &[pod("a")]).is_empty());
        assert!(ledger.issued(1, "yes").is_empty(), "nobody was told of trouble");
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
