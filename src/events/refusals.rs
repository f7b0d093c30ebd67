//! Which pods have been told that they are not served. It reads no clock, and forgets the oldest first.

use std::{collections::VecDeque, sync::Arc};

use sds_server::attest::Reason;

/// Pods and reasons at once: about as many as a node has pods.
const MAX_PODS: usize = 256;

/// What has been told, by pod and reason.
#[derive(Debug, Default)]
pub struct Refusals(VecDeque<(Arc<str>, Reason)>);

impl Refusals {
    /// Whether a refusal of the pod with this UID is news.
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

    /// Whether it is news that the pod is served. That one process is says nothing of another that the policy does not let.
    pub fn served(&mut self, uid: &Arc<str>) -> bool {
        let before = self.0.len();
        self.0.retain(|(told, reason)| told != uid || !is_the_pods(*reason));
        self.0.len() < before
    }
}

/// The reasons that are about a pod as it stands, and that somebody can do something about.
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
        assert!(!refusals.served(&pod), "nobody was told of trouble");
        assert!(refusals.refused(&pod, Reason::no_identity) && !refusals.refused(&pod, Reason::no_identity));
        assert!(refusals.refused(&other, Reason::no_identity));
        assert!(refusals.served(&pod) && !refusals.served(&pod));
        assert!(refusals.refused(&pod, Reason::no_identity), "and a new one again");
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
        assert!(refusals.refused(&Arc::from("0"), Reason::no_identity), "the oldest is forgotten");
    }
}
