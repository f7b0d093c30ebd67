//! Remembers the pods that got a Warning because a caller was refused. It reads no clock and forgets the oldest entries first.

use std::{collections::VecDeque, sync::Arc};

use sds_server::attest::Reason;

/// Maximum of remembered pairs of pod and reason: about the number of pods on a node.
const MAX_PODS: usize = 256;

/// The refusals that were reported, by pod UID and reason.
#[derive(Debug, Default)]
pub struct Refusals(VecDeque<(Arc<str>, Reason)>);

impl Refusals {
    /// Records a refusal of the pod with this UID. Returns whether it has to be reported.
    pub fn refused(&mut self, uid: &Arc<str>, reason: Reason) -> bool {
        let is_news = is_told(reason) && !self.0.iter().any(|(told, why)| (told, *why) == (uid, reason));
        if is_news {
            if self.0.len() == MAX_PODS {
                self.0.pop_front();
            }
            self.0.push_back((uid.clone(), reason));
        }
        is_news
    }

    /// Records that a caller of the pod is served. Returns whether that has to be reported. A served process does not clear refusals of
    /// other processes by the attestation policy.
    pub fn served(&mut self, uid: &Arc<str>) -> bool {
        let before = self.0.len();
        self.0.retain(|(told, reason)| told != uid || !is_the_pods(*reason));
        self.0.len() < before
    }
}

/// Whether a reason is reported: it does not pass by itself, and an operator can fix it.
fn is_told(reason: Reason) -> bool {
    is_the_pods(reason) || matches!(reason, Reason::uid_not_allowed | Reason::container_not_allowed)
}

fn is_the_pods(reason: Reason) -> bool {
    matches!(reason, Reason::no_identity | Reason::no_service_account)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_news_once_and_its_end_too() {
        let (mut refusals, pod, other) = (Refusals::default(), Arc::from("a"), Arc::from("b"));
        assert!(!refusals.served(&pod), "no pod got a Warning");
        assert!(refusals.refused(&pod, Reason::no_identity) && !refusals.refused(&pod, Reason::no_identity));
        assert!(refusals.refused(&other, Reason::no_identity));
        assert!(refusals.served(&pod) && !refusals.served(&pod));
        assert!(refusals.refused(&pod, Reason::no_identity), "a refusal after that is reported again");
    }

    #[test]
    fn a_process_that_may_not_is_told_once_however_often_another_may() {
        let (mut refusals, pod) = (Refusals::default(), Arc::from("a"));
        assert!(refusals.refused(&pod, Reason::container_not_allowed));
        for _ in 0..3 {
            assert!(!refusals.served(&pod) && !refusals.refused(&pod, Reason::container_not_allowed));
        }
    }

    #[test]
    fn what_passes_by_itself_is_no_news_and_what_is_kept_is_bounded() {
        let mut refusals = Refusals::default();
        for reason in [Reason::process_gone, Reason::unknown_pod, Reason::pod_ended, Reason::unreadable] {
            assert!(!refusals.refused(&Arc::from("a"), reason));
        }
        for pod in 0..MAX_PODS + 1 {
            assert!(refusals.refused(&Arc::from(pod.to_string()), Reason::no_identity));
        }
        assert_eq!(refusals.0.len(), MAX_PODS);
        assert!(refusals.refused(&Arc::from("0"), Reason::no_identity), "the oldest entry is forgotten");
    }
}
