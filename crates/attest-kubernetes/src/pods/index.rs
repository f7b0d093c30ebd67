//! The index: the known pods, and their updates by events of the watch. No I/O, no clock.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::SystemTime,
};

use agent_kube::pod::{MIRROR, Pod, PodObject, facts, has_not_begun, names::Names};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use workload_identity::{Account, Workload};

/// Maximum number of deleted pods whose UIDs are remembered, so that an older list does not restore them, and a
/// process that outlives its pod is known by its account.
const MAX_ENDED_PODS: usize = 1024;
/// Maximum number of UIDs that are remembered as unknown to the API server.
const MAX_UNKNOWN_PODS: usize = 256;

/// A pod, the changes of its facts, and the tokens of its end and of its first call.
#[derive(Debug, Clone)]
pub struct Known {
    /// Facts of the pod.
    pub pod: Arc<Pod>,
    /// The workload of the pod on the shared socket. It changes with the pod, for example with its labels.
    pub facts: watch::Sender<Workload>,
    /// Cancelled when the pod is deleted or its phase is terminal.
    pub terminated: CancellationToken,
    /// Cancelled when one of its processes has been attested on the shared socket.
    pub first_call: CancellationToken,
}

/// A pod that was first seen before any of its containers had started.
#[derive(Debug, Clone)]
pub struct Starting {
    /// The pod.
    pub known: Known,
    /// Paths of the node's directories and files that it mounts.
    pub host_paths: Vec<String>,
    /// Time at which the kubelet accepted the pod; `None` before that.
    pub since: Option<SystemTime>,
}

/// All known pods of the node.
#[derive(Debug, Default)]
pub(super) struct Index {
    pods: HashMap<Arc<str>, Known>,
    /// Texts that several pods share.
    names: Names,
    /// UID that the kubelet uses for a static pod → UID of its mirror pod.
    mirrors: HashMap<String, Arc<str>>,
    arrivals: HashMap<String, Vec<oneshot::Sender<()>>>,
    /// Pods that the last list lacked, and that no live read has confirmed or removed yet.
    doubtful: HashSet<Arc<str>>,
    /// UIDs in the list that is being read.
    list: HashSet<Arc<str>>,
    /// UIDs and accounts of deleted pods, the oldest first.
    deleted: VecDeque<(Arc<str>, Option<Account>)>,
    /// UIDs that a live read did not find, with the time until which they count as unknown.
    unknown: VecDeque<(Instant, String)>,
    /// Whether the containers of pods are kept.
    pub(super) keeps_containers: bool,
    /// The CSI driver whose volumes pick profiles.
    pub(super) driver: Option<String>,
    /// Number of pods that have ended so far.
    pub(super) pod_terminations: u64,
    /// Receives the pods that start.
    pub(super) starts: Option<mpsc::UnboundedSender<Starting>>,
}

impl Index {
    /// Returns the pod with this UID, or the mirror of the static pod with this UID. A real UID takes precedence, because annotations can
    /// be forged.
    pub(super) fn get(&self, uid: &str) -> Option<Known> {
        self.pods.get(uid).or_else(|| self.mirrors.get(uid).and_then(|real| self.pods.get(real))).cloned()
    }

    pub(super) fn len(&self) -> usize {
        self.pods.len()
    }

    /// Returns whether a pod with this UID was known and was deleted.
    pub(super) fn has_gone(&self, uid: &str) -> bool {
        self.deleted.iter().any(|(deleted, _)| &**deleted == uid)
    }

    /// Returns the service account of the pod with this UID, also of one that has ended or was deleted. `None` if the pod is not known,
    /// `Some(None)` if it has no service account.
    pub(super) fn account(&self, uid: &str) -> Option<Option<Account>> {
        let of_deleted = || self.deleted.iter().find(|(deleted, _)| &**deleted == uid).map(|(_, account)| account.clone());
        self.get(uid).map(|known| known.pod.workload().account()).or_else(of_deleted)
    }

    /// Returns whether a recent live read did not find this UID.
    pub(super) fn is_unknown(&mut self, uid: &str, now: Instant) -> bool {
        while self.unknown.front().is_some_and(|(until, _)| *until <= now) {
            self.unknown.pop_front();
        }
        self.unknown.iter().any(|(_, unknown)| unknown == uid)
    }

    /// Records until when a UID that a live read did not find counts as unknown.
    pub(super) fn note_unknown(&mut self, uid: &str, until: Instant) {
        if self.unknown.iter().any(|(_, unknown)| unknown == uid) {
            return;
        }
        if self.unknown.len() == MAX_UNKNOWN_PODS {
            self.unknown.pop_front();
        }
        self.unknown.push_back((until, uid.to_owned()));
    }

    /// Returns the pods that wait to be confirmed.
    pub(super) fn doubts(&self) -> HashSet<Arc<str>> {
        self.doubtful.clone()
    }

    /// Returns the UIDs of the pods that have not ended.
    pub(super) fn live(&self) -> HashSet<Arc<str>> {
        self.pods.iter().filter(|(_, known)| !known.pod.ended).map(|(uid, _)| uid.clone()).collect()
    }

    /// Returns the workloads of the pods that have not ended, on all their sockets.
    pub(super) fn workloads(&self) -> Vec<Workload> {
        self.pods.values().filter(|known| !known.pod.ended).flat_map(|known| known.pod.workloads()).collect()
    }

    /// Returns a signal for the arrival of the pod.
    pub(super) fn await_arrival(&mut self, uid: &str) -> oneshot::Receiver<()> {
        // Remove the signals of lookups that were dropped.
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

    /// Returns the number of known pods that the list lacks. They are in doubt until a live read confirms or removes them.
    pub(super) fn list_ends(&mut self) -> usize {
        let list = std::mem::take(&mut self.list);
        self.doubtful = self.pods.keys().filter(|uid| !list.contains(*uid)).cloned().collect();
        self.doubtful.len()
    }

    pub(super) fn applied(&mut self, slim: &PodObject) {
        let Some(mut pod) = facts(slim, self.driver.as_deref(), self.keeps_containers) else { return };
        let uid = pod.pod.uid.clone();
        // A UID is never used again, so an event about a deleted pod is stale.
        if self.has_gone(&uid) {
            return;
        }
        self.doubtful.remove(&uid);
        let before = self.pods.get(&uid);
        let is_new = before.is_none();
        let (terminated, first_call) = before.map_or_else(Default::default, |known| (known.terminated.clone(), known.first_call.clone()));
        let facts = before.map(|known| known.facts.clone());
        if pod.ended && !terminated.is_cancelled() {
            terminated.cancel();
            self.pod_terminations += 1;
        }
        if before.is_none_or(|known| *known.pod != pod) {
            self.names.share(&mut pod);
            let workload = pod.workload();
            let facts = facts.unwrap_or_else(|| watch::Sender::new(workload.clone()));
            // Most changes of a pod are changes of its status.
            facts.send_if_modified(|before| {
                let is_new = *before != workload;
                *before = workload;
                is_new
            });
            self.pods.insert(uid.clone(), Known { pod: Arc::new(pod), facts, terminated, first_call });
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

    /// Applies a live read that began when these `doubts` were open. It removes each of them that the read lacks, and adds pods that the
    /// watch has not reported yet. It decides no doubt that arose later: that pod may be younger than the read.
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

    /// Records the UID that the kubelet uses for a static pod, and that its cgroup names contain.
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
            // A receiver that was dropped is ignored.
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
        self.deleted.push_back((uid, known.pod.workload().account()));
    }
}
