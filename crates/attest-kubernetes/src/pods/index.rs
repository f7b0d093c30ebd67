//! The index itself: what is known of the pods, and what the watch's events make of it. No I/O, no clock.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::SystemTime,
};

use agent_kube::pod::{MIRROR, Pod, PodObject, facts, has_not_begun};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use workload_identity::Workload;

/// UIDs of deleted pods that are remembered, so that an older list does not bring them back.
const MAX_ENDED_PODS: usize = 1024;
/// UIDs that the API server does not know, and which are believed to be unknown for a while.
const MAX_UNKNOWN_PODS: usize = 256;
/// A pod and the token of its end.
#[derive(Debug, Clone)]
pub struct Known {
    /// The facts.
    pub pod: Arc<Pod>,
    /// Cancelled when it has been deleted or its phase is terminal.
    pub terminated: CancellationToken,
    /// Cancelled once one of its processes has been served on the shared socket.
    pub first_call: CancellationToken,
}

/// A pod that was first seen before any of its containers had started.
#[derive(Debug, Clone)]
pub struct Starting {
    /// The pod.
    pub known: Known,
    /// The node's directories and files that it mounts.
    pub host_paths: Vec<String>,
    /// When the kubelet took it on; none where it has not yet.
    pub since: Option<SystemTime>,
}

/// Every pod of the node.
#[derive(Debug, Default)]
pub(super) struct Index {
    pods: HashMap<Arc<str>, Known>,
    /// The kubelet's UID of a static pod → its mirror's.
    mirrors: HashMap<String, Arc<str>>,
    arrivals: HashMap<String, Vec<oneshot::Sender<()>>>,
    /// Missing from the last list, not confirmed yet.
    doubtful: HashSet<Arc<str>>,
    /// What the list that is being read holds.
    list: HashSet<Arc<str>>,
    deleted: VecDeque<Arc<str>>,
    /// UIDs that a live read did not find, and until when that is believed.
    unknown: VecDeque<(Instant, String)>,
    /// Whether the containers of pods are kept.
    pub(super) keeps_containers: bool,
    /// The CSI driver whose volumes pick profiles.
    pub(super) driver: Option<String>,
    /// How many pods have ended so far.
    pub(super) pod_terminations: u64,
    /// Who is told of pods that start.
    pub(super) starts: Option<mpsc::UnboundedSender<Starting>>,
}

impl Index {
    /// By the pod's UID, or by the one that a static pod has in its cgroups. A real UID goes first: annotations can be written.
    pub(super) fn get(&self, uid: &str) -> Option<Known> {
        self.pods.get(uid).or_else(|| self.mirrors.get(uid).and_then(|real| self.pods.get(real))).cloned()
    }

    pub(super) fn len(&self) -> usize {
        self.pods.len()
    }

    /// Whether a pod with this UID was here and was deleted.
    pub(super) fn has_gone(&self, uid: &str) -> bool {
        self.deleted.iter().any(|terminated| &**terminated == uid)
    }

    /// Whether a live read has lately found that there is no pod with this UID.
    pub(super) fn is_unknown(&mut self, uid: &str, now: Instant) -> bool {
        while self.unknown.front().is_some_and(|(until, _)| *until <= now) {
            self.unknown.pop_front();
        }
        self.unknown.iter().any(|(_, unknown)| unknown == uid)
    }

    /// A live read has found no pod with this UID.
    pub(super) fn note_unknown(&mut self, uid: &str, until: Instant) {
        if self.unknown.iter().any(|(_, unknown)| unknown == uid) {
            return;
        }
        if self.unknown.len() == MAX_UNKNOWN_PODS {
            self.unknown.pop_front();
        }
        self.unknown.push_back((until, uid.to_owned()));
    }

    /// The pods that wait to be confirmed.
    pub(super) fn doubts(&self) -> HashSet<Arc<str>> {
        self.doubtful.clone()
    }

    /// Those that have not ended.
    pub(super) fn live(&self) -> HashSet<Arc<str>> {
        self.pods.iter().filter(|(_, known)| !known.pod.ended).map(|(uid, _)| uid.clone()).collect()
    }

    /// Whom those that have not ended run as, on whatever socket.
    pub(super) fn workloads(&self) -> Vec<Workload> {
        self.pods.values().filter(|known| !known.pod.ended).flat_map(|known| known.pod.workloads()).collect()
    }

    /// A signal for when the pod is there.
    pub(super) fn await_arrival(&mut self, uid: &str) -> oneshot::Receiver<()> {
        // Those who gave up leave nothing behind.
        self.arrivals.retain(|_, senders| {
            senders.retain(|sender| !sender.is_closed());
            !senders.is_empty()
        });
        let (sender, receiver) = oneshot::channel();
        self.arrivals.entry(uid.to_owned()).or_default().push(sender);
        receiver
    }

    pub(super) fn list_begins(&mut self) {
        self.list.clear();
    }

    pub(super) fn listed(&mut self, pod: &PodObject) {
        if let Some(uid) = pod.metadata.uid.as_deref() {
            self.list.insert(uid.into());
        }
        self.applied(pod);
    }

    /// Returns how many known pods the list lacks: they are in doubt until a live read confirms it.
    pub(super) fn list_ends(&mut self) -> usize {
        let list = std::mem::take(&mut self.list);
        self.doubtful = self.pods.keys().filter(|uid| !list.contains(*uid)).cloned().collect();
        self.doubtful.len()
    }

    pub(super) fn applied(&mut self, slim: &PodObject) {
        let Some(pod) = facts(slim, self.driver.as_deref(), self.keeps_containers) else { return };
        let uid = pod.pod.uid.clone();
        // A UID never comes back: whoever tells of it tells an old story.
        if self.deleted.contains(&uid) {
            return;
        }
        self.doubtful.remove(&uid);
        let before = self.pods.get(&uid);
        let is_new = before.is_none();
        let (terminated, first_call) = before.map_or_else(Default::default, |known| (known.terminated.clone(), known.first_call.clone()));
        if pod.ended && !terminated.is_cancelled() {
            terminated.cancel();
            self.pod_terminations += 1;
        }
        if before.is_none_or(|known| *known.pod != pod) {
            self.pods.insert(uid.clone(), Known { pod: Arc::new(pod), terminated, first_call });
        }
        if is_new && has_not_begun(slim) {
            self.tell_of_start(slim, &uid);
        }
        self.note_mirror(slim, &uid);
        self.announce(&uid);
    }

    pub(super) fn deleted(&mut self, pod: &PodObject) {
        if let Some(uid) = pod.metadata.uid.as_deref() {
            self.remove(uid);
        }
    }

    /// A live read that began when these `doubts` were open: it tells which of them have gone, and may know pods before the watch does.
    /// Of a doubt that arose later it tells nothing: that pod may be younger than the read.
    pub(super) fn confirmed(&mut self, pods: &[PodObject], doubts: &HashSet<Arc<str>>) {
        for pod in pods {
            match pod.metadata.uid.as_deref() {
                Some(uid) if self.pods.contains_key(uid) => drop(self.doubtful.remove(uid)),
                _ => self.applied(pod),
            }
        }
        for uid in doubts {
            if self.doubtful.contains(uid) {
                self.remove(uid);
            }
        }
    }

    /// Notes a static pod's other UID: the kubelet's, which its cgroups bear.
    fn note_mirror(&mut self, pod: &PodObject, uid: &Arc<str>) {
        let annotation = |key: &str| pod.metadata.annotations.as_ref().and_then(|a| a.get(key));
        if let Some(hash) = annotation(MIRROR) {
            self.mirrors.insert(hash.clone(), uid.clone());
            self.announce(hash);
        }
    }

    fn tell_of_start(&self, slim: &PodObject, uid: &str) {
        if let Some((starts, known)) = self.starts.as_ref().zip(self.pods.get(uid)) {
            let volumes = slim.spec.volumes.iter().flatten();
            let host_paths = volumes.filter_map(|volume| Some(volume.host_path.as_ref()?.path.clone())).collect();
            let since = slim.status.as_ref().and_then(|status| humantime::parse_rfc3339(status.start_time.as_deref()?).ok());
            // Who does not listen any more is not told.
            let _ = starts.send(Starting { known: known.clone(), host_paths, since });
        }
    }

    fn announce(&mut self, uid: &str) {
        for arrival in self.arrivals.remove(uid).unwrap_or_default() {
            let _ = arrival.send(());
        }
    }

    fn remove(&mut self, uid: &str) {
        let Some((uid, known)) = self.pods.remove_entry(uid) else { return };
        known.terminated.cancel();
        self.pod_terminations += 1;
        self.doubtful.remove(&uid);
        self.mirrors.retain(|_, real| *real != uid);
        if self.deleted.len() == MAX_ENDED_PODS {
            self.deleted.pop_front();
        }
        self.deleted.push_back(uid);
    }
}
