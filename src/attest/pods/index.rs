//! The index itself: what is known of the pods, and what the watch's events make of it. No I/O, no clock.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::SystemTime,
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::identity::{
    PodRef, Workload,
    picks::{Volume, picks},
};

/// UIDs of deleted pods that are remembered, so that an older list does not bring them back.
const REMEMBERED: usize = 1024;
/// UIDs that the API server does not know, and which are believed to be unknown for a while.
const MOST_UNKNOWN: usize = 256;
/// The annotation of a static pod's mirror. Its value is the UID by which the kubelet knows the pod, and which its cgroups bear.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// A pod as the API tells it, without what the agent does not need.
pub type Slim = kube::api::Object<Spec, Status>;

/// `spec`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Spec {
    node_name: Option<String>,
    service_account_name: Option<String>,
    host_network: Option<bool>,
    volumes: Option<Vec<Volume>>,
}

/// `status`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Status {
    phase: Option<String>,
    /// When the kubelet took it on, by the node's own clock.
    start_time: Option<String>,
    container_statuses: Option<Vec<Container>>,
    init_container_statuses: Option<Vec<Container>>,
    ephemeral_container_statuses: Option<Vec<Container>>,
}

/// `status.containerStatuses[]`, and its like for init and ephemeral containers
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Container {
    name: Option<String>,
    /// `<runtime>://<id>`
    #[serde(rename = "containerID")]
    id: Option<String>,
}

/// The facts of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Which one.
    pub pod: PodRef,
    /// Whom it runs as. Static pods have no service account, whatever their mirror says.
    pub service_account: Option<Arc<str>>,
    /// Its labels, for the match rules of profiles.
    pub labels: Arc<BTreeMap<String, String>>,
    /// The profiles that it picks, by the names of the volumes by which it does; only where the driver is known.
    pub picks: BTreeMap<Arc<str>, Arc<str>>,
    /// Whether it shares the node's network.
    pub host_network: bool,
    /// Whether it is the mirror of a static pod.
    pub mirror: bool,
    /// Whether its phase is terminal. A pod that is being deleted has not ended: its proxy still drains.
    pub ended: bool,
    /// (id, name) of its containers of every kind that the kubelet has told of; only where they are asked for.
    pub containers: Vec<(Arc<str>, Arc<str>)>,
}

impl Pod {
    /// The facts that `object` tells, without its containers; none where it is no whole object. `driver` is the CSI driver whose volumes
    /// pick profiles.
    pub fn of(object: &Slim, driver: Option<&str>) -> Option<Self> {
        facts(object, driver, false)
    }

    /// Who its processes are on the shared socket.
    pub fn workload(&self) -> Workload {
        self.picking(None)
    }

    /// Who its processes are on the socket in its volume of this name.
    pub fn workload_at(&self, volume: &str) -> Workload {
        self.picking(self.picks.get(volume).cloned())
    }

    /// Who its processes can be, on whatever socket.
    pub fn workloads(&self) -> impl Iterator<Item = Workload> + '_ {
        [None].into_iter().chain(self.picks.values().cloned().map(Some)).map(|picked| self.picking(picked))
    }

    fn picking(&self, picked: Option<Arc<str>>) -> Workload {
        let (service_account, labels) = (self.service_account.clone(), self.labels.clone());
        Workload::Pod { pod: self.pod.clone(), service_account, labels, picked }
    }

    /// The name of the container with this id.
    pub fn container(&self, id: &str) -> Option<Arc<str>> {
        self.containers.iter().find(|(known, _)| **known == *id).map(|(_, name)| name.clone())
    }
}

/// A pod and the token of its end.
#[derive(Debug, Clone)]
pub struct Known {
    /// The facts.
    pub pod: Arc<Pod>,
    /// Cancelled when it has been deleted or its phase is terminal.
    pub gone: CancellationToken,
    /// Cancelled once one of its processes has been served on the shared socket.
    pub called: CancellationToken,
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
    pub(super) departures: u64,
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
        self.deleted.iter().any(|gone| &**gone == uid)
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
        if self.unknown.len() == MOST_UNKNOWN {
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

    pub(super) fn listed(&mut self, pod: &Slim) {
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

    pub(super) fn applied(&mut self, slim: &Slim) {
        let Some(pod) = facts(slim, self.driver.as_deref(), self.keeps_containers) else { return };
        let uid = pod.pod.uid.clone();
        // A UID never comes back: whoever tells of it tells an old story.
        if self.deleted.contains(&uid) {
            return;
        }
        self.doubtful.remove(&uid);
        let before = self.pods.get(&uid);
        let is_new = before.is_none();
        let (gone, called) = before.map_or_else(Default::default, |known| (known.gone.clone(), known.called.clone()));
        if pod.ended && !gone.is_cancelled() {
            gone.cancel();
            self.departures += 1;
        }
        if before.is_none_or(|known| *known.pod != pod) {
            self.pods.insert(uid.clone(), Known { pod: Arc::new(pod), gone, called });
        }
        if is_new && has_not_begun(slim) {
            self.tell_of_start(slim, &uid);
        }
        self.note_mirror(slim, &uid);
        self.announce(&uid);
    }

    pub(super) fn deleted(&mut self, pod: &Slim) {
        if let Some(uid) = pod.metadata.uid.as_deref() {
            self.remove(uid);
        }
    }

    /// A live read that began when these `doubts` were open: it tells which of them have gone, and may know pods before the watch does.
    /// Of a doubt that arose later it tells nothing: that pod may be younger than the read.
    pub(super) fn confirmed(&mut self, pods: &[Slim], doubts: &HashSet<Arc<str>>) {
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
    fn note_mirror(&mut self, pod: &Slim, uid: &Arc<str>) {
        let annotation = |key: &str| pod.metadata.annotations.as_ref().and_then(|a| a.get(key));
        if let Some(hash) = annotation(MIRROR) {
            self.mirrors.insert(hash.clone(), uid.clone());
            self.announce(hash);
        }
    }

    fn tell_of_start(&self, slim: &Slim, uid: &str) {
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
        known.gone.cancel();
        self.departures += 1;
        self.doubtful.remove(&uid);
        self.mirrors.retain(|_, real| *real != uid);
        if self.deleted.len() == REMEMBERED {
            self.deleted.pop_front();
        }
        self.deleted.push_back(uid);
    }
}

fn facts(pod: &Slim, driver: Option<&str>, with_containers: bool) -> Option<Pod> {
    let metadata = &pod.metadata;
    let mirror = metadata.annotations.as_ref().is_some_and(|a| a.contains_key(MIRROR));
    let account = pod.spec.service_account_name.as_deref().filter(|name| !name.is_empty() && !mirror);
    Some(Pod {
        pod: PodRef {
            namespace: metadata.namespace.as_deref()?.into(),
            name: metadata.name.as_deref()?.into(),
            uid: metadata.uid.as_deref()?.into(),
        },
        service_account: account.map(Arc::from),
        labels: Arc::new(metadata.labels.clone().unwrap_or_default()),
        picks: driver.map_or_else(BTreeMap::new, |driver| picks(pod.spec.volumes.as_deref().unwrap_or_default(), driver)),
        host_network: pod.spec.host_network.unwrap_or(false),
        mirror,
        ended: matches!(pod.status.as_ref().and_then(|s| s.phase.as_deref()), Some("Succeeded" | "Failed")),
        containers: pod.status.as_ref().filter(|_| with_containers).map_or(Vec::new(), containers),
    })
}

/// Whether nothing of a pod can have run yet. In the phase `Pending` init containers may run, and with them a proxy; what decides is that
/// the kubelet has told of no container.
fn has_not_begun(pod: &Slim) -> bool {
    if pod.metadata.deletion_timestamp.is_some() {
        return false;
    }
    let Some(status) = &pod.status else { return true };
    matches!(status.phase.as_deref(), None | Some("Pending")) && containers(status).is_empty()
}

fn containers(status: &Status) -> Vec<(Arc<str>, Arc<str>)> {
    let kinds = [&status.init_container_statuses, &status.container_statuses, &status.ephemeral_container_statuses];
    let known = |container: &Container| {
        let (_runtime, id) = container.id.as_deref()?.split_once("://")?;
        Some((id.into(), container.name.as_deref()?.into()))
    };
    kinds.into_iter().flatten().flatten().filter_map(known).collect()
}
