//! Index of the cluster's pods by UID, filled by a watch, and live reads of single pods.
//!
//! The caller runs [`Pods::run`]. A pod that is missing from the index may exist, because the watch may lag: only [`Pods::read`] proves
//! that a pod does not exist.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use agent_kube::{
    self, Call, Cause, Failure,
    labels::Resource,
    pod::{Pod, PodObject, names::Names},
    watch::{Selection, Signal},
};
use futures::StreamExt;
use kube::{Api, Client, runtime::watcher};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;
use workload_identity::PodRef;

use super::replicas::{Replicas, Standing};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::approver::pods";

/// Pods per page of a list. Every API server pages a consistent read. Older API servers do not page a read from their cache.
const PODS_PER_PAGE: u32 = 200;
/// Maximum size of a pod's labels and picks in the index, in bytes. The API server limits labels only by the size of the object, and the
/// index stays in memory. A pod with more is read live.
const MAX_HELD_BYTES: usize = 16 << 10;

/// The index of pods, and the rank of this replica among the approver's pods. Clones share one index.
#[derive(Clone)]
pub struct Pods(Arc<Shared>);

struct Shared {
    client: Client,
    driver: Option<String>,
    metrics: agent_kube::Metrics,
    known: Mutex<Known>,
    replicas: Mutex<Replicas>,
    standing: watch::Sender<Standing>,
    synced: watch::Sender<bool>,
    /// True while the watch is broken: the index may be out of date.
    stale: AtomicBool,
}

/// The indexed pods by UID, and the texts that they share.
#[derive(Default)]
struct Known {
    pods: HashMap<Arc<str>, Arc<Pod>>,
    names: Names,
}

impl fmt::Debug for Pods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pods", self.known().pods.len())
    }
}

impl Pods {
    /// Creates an index, which stays empty until [`run`](Self::run) runs. `own` is the pod of this replica. `driver` is the name of the
    /// CSI driver whose volumes pick profiles.
    pub fn new(client: Client, own: Option<PodRef>, driver: Option<String>, metrics: agent_kube::Metrics) -> Self {
        let replicas = Replicas::new(own);
        Self(Arc::new(Shared {
            client,
            driver,
            metrics,
            known: Mutex::default(),
            standing: watch::Sender::new(replicas.standing()),
            replicas: Mutex::new(replicas),
            synced: watch::Sender::new(false),
            stale: AtomicBool::new(true),
        }))
    }

    /// Returns the rank of this replica among the approver's pods, and its changes.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.0.standing.subscribe()
    }

    /// Returns whether this replica runs as a pod, so that other replicas may exist.
    pub fn may_have_replicas(&self) -> bool {
        self.replicas().is_one()
    }

    /// Becomes true when the first list of pods is complete, and stays true.
    pub fn synced(&self) -> watch::Receiver<bool> {
        self.0.synced.subscribe()
    }

    /// Returns the indexed pod with this UID. `None` does not prove that the pod does not exist; it is returned for every pod while the
    /// watch is broken.
    pub fn watched(&self, uid: &str) -> Option<Arc<Pod>> {
        if self.0.stale.load(Ordering::Relaxed) { None } else { self.known().pods.get(uid).cloned() }
    }

    /// Reads the pod of this namespace and name from the API server. The UID of the result may differ. Returns `None` if the pod does not
    /// exist.
    ///
    /// # Errors
    ///
    /// The request failed, for any reason other than 404.
    pub async fn read(&self, pod: &PodRef) -> Result<Option<Pod>, Failure> {
        let api: Api<PodObject> = Api::namespaced(self.0.client.clone(), &pod.namespace);
        let call = Call { verb: "get", resource: "pods", name: Some(&pod.name), namespace: None };
        match api.get(&pod.name).await {
            Ok(slim) => Ok(Pod::of(&slim, self.0.driver.as_deref())),
            Err(error) => match Failure::of(&error, &call) {
                failure if failure.cause == Cause::NotFound => Ok(None),
                failure => Err(failure),
            },
        }
    }

    /// Watches the pods of all namespaces until the future is dropped.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops updates of the index; [`watched`](Self::watched) then returns outdated pods. Run it for as long as the
    /// index is used.
    pub async fn run(&self) {
        let api: Api<PodObject> = Api::all(self.0.client.clone());
        let config = watcher::Config::default().page_size(PODS_PER_PAGE);
        let selection = Selection { resource: Resource::pods, name: "pods".to_owned(), namespace: None, config };
        let mut signals = Box::pin(agent_kube::watch::watch(api, selection, self.0.metrics.clone()));
        let mut list = HashSet::new();
        while let Some(signal) = signals.next().await {
            let works = match signal {
                Signal::Event(watcher::Event::Init) => {
                    list.clear();
                    continue;
                }
                Signal::Event(watcher::Event::InitApply(pod)) => {
                    list.extend(self.applied(&pod));
                    continue;
                }
                Signal::Event(watcher::Event::InitDone) => {
                    self.known().pods.retain(|uid, _| list.contains(uid));
                    self.replicas().retain(&list);
                    list = HashSet::new();
                    self.stand_again();
                    if !self.0.synced.send_replace(true) {
                        tracing::info!(target: LOG_TARGET, pods = self.known().pods.len(), "the index of the cluster's pods is complete");
                    }
                    true
                }
                Signal::Event(watcher::Event::Apply(pod)) => {
                    self.applied(&pod);
                    self.stand_again();
                    true
                }
                Signal::Event(watcher::Event::Delete(pod)) => {
                    if let Some(uid) = pod.metadata.uid.as_deref() {
                        self.known().pods.remove(uid);
                        self.replicas().deleted(uid);
                        self.stand_again();
                    }
                    true
                }
                Signal::Trouble(..) => false,
            };
            self.0.stale.store(!works, Ordering::Relaxed);
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock()
    }

    fn replicas(&self) -> MutexGuard<'_, Replicas> {
        self.0.replicas.lock()
    }

    fn stand_again(&self) {
        let standing = self.replicas().standing();
        self.0.standing.send_if_modified(|before| std::mem::replace(before, standing) != standing);
    }

    fn applied(&self, slim: &PodObject) -> Option<Arc<str>> {
        let mut pod = Pod::of(slim, self.0.driver.as_deref())?;
        let uid = pod.pod.uid.clone();
        self.replicas().applied(slim, &pod);
        let mut known = self.known();
        if held_bytes(&pod) <= MAX_HELD_BYTES {
            known.names.share(&mut pod);
            known.pods.insert(uid.clone(), Arc::new(pod));
        } else {
            known.pods.remove(&uid);
        }
        Some(uid)
    }
}

/// Returns the size of the parts of a pod that only the size of the object limits.
fn held_bytes(pod: &Pod) -> usize {
    let labels = pod.labels.iter().map(|(key, value)| key.len() + value.len());
    let picks = pod.picks.iter().map(|(volume, profile)| volume.len() + profile.len());
    labels.chain(picks).sum()
}
