//! The cluster's pods, by UID: what the approver's watch tells of each, and a live read of one.
//!
//! The caller runs [`Pods::run`]. What the watch has not told is no news: only [`Pods::read`] says that a pod is not there.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod as ApiPod;
use kube::{Api, Client, core::ApiResource, runtime::watcher};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::{
    identity::{
        PodRef, Workload,
        picks::{Volume, picks},
    },
    kubernetes::{
        self, Call, Cause, Failure,
        metrics::Resource,
        watch::{Selection, Signal},
    },
};

/// The annotation of a static pod's mirror.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// A pod as the API tells it, without what the approver does not need.
pub type Slim = kube::api::Object<Spec, Status>;

/// `spec`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Spec {
    node_name: Option<String>,
    service_account_name: Option<String>,
    volumes: Option<Vec<Volume>>,
}

/// `status`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    phase: Option<String>,
}

/// The facts of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Which one.
    pub pod: PodRef,
    /// Where it runs; none before it has a node.
    pub node_name: Option<Arc<str>>,
    /// Whom it runs as. Static pods have no service account, whatever their mirror says.
    pub service_account: Option<Arc<str>>,
    /// Its labels, for the match rules of profiles.
    pub labels: Arc<BTreeMap<String, String>>,
    /// The profiles that it picks by its volumes.
    pub picks: BTreeSet<Arc<str>>,
    /// Whether its phase is terminal. A pod that is being deleted has not ended: its proxy still drains.
    pub ended: bool,
}

impl Pod {
    /// Who its processes can be, on whatever socket of the agent.
    pub fn workloads(&self) -> impl Iterator<Item = Workload> + '_ {
        [None].into_iter().chain(self.picks.iter().cloned().map(Some)).map(|picked| {
            let (service_account, labels) = (self.service_account.clone(), self.labels.clone());
            Workload::Pod { pod: self.pod.clone(), service_account, labels, picked }
        })
    }

    /// What an object of the API tells; none where it lacks what every pod has. `driver` is the CSI driver whose volumes pick profiles.
    pub fn of(slim: &Slim, driver: Option<&str>) -> Option<Self> {
        let metadata = &slim.metadata;
        let mirror = metadata.annotations.as_ref().is_some_and(|a| a.contains_key(MIRROR));
        let named = |field: &Option<String>| field.as_deref().filter(|name| !name.is_empty()).map(Arc::from);
        Some(Self {
            pod: PodRef {
                namespace: metadata.namespace.as_deref()?.into(),
                name: metadata.name.as_deref()?.into(),
                uid: metadata.uid.as_deref()?.into(),
            },
            node_name: named(&slim.spec.node_name),
            service_account: named(&slim.spec.service_account_name).filter(|_| !mirror),
            labels: Arc::new(metadata.labels.clone().unwrap_or_default()),
            picks: match (driver, &slim.spec.volumes) {
                (Some(driver), Some(volumes)) => picks(volumes, driver).into_values().collect(),
                _ => BTreeSet::new(),
            },
            ended: matches!(slim.status.as_ref().and_then(|s| s.phase.as_deref()), Some("Succeeded" | "Failed")),
        })
    }
}

/// The index. Clones share everything.
#[derive(Clone)]
pub struct Pods(Arc<Shared>);

struct Shared {
    client: Client,
    driver: Option<String>,
    metrics: kubernetes::Metrics,
    known: Mutex<HashMap<Arc<str>, Arc<Pod>>>,
    synced: watch::Sender<bool>,
    /// The watch is broken, or has told nothing since it was: what it knows may be old.
    stale: AtomicBool,
}

impl fmt::Debug for Pods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pods", self.known().len())
    }
}

impl Pods {
    /// Empty until [`run`](Self::run) runs. `driver` is the CSI driver whose volumes pick profiles.
    pub fn new(client: Client, driver: Option<String>, metrics: kubernetes::Metrics) -> Self {
        let synced = watch::Sender::new(false);
        Self(Arc::new(Shared { client, driver, metrics, known: Mutex::default(), synced, stale: AtomicBool::new(true) }))
    }

    /// Becomes true when the index has been complete for the first time, and stays so.
    pub fn synced(&self) -> watch::Receiver<bool> {
        self.0.synced.subscribe()
    }

    /// What the watch tells of the pod with this UID. None is no proof of its absence.
    pub fn watched(&self, uid: &str) -> Option<Arc<Pod>> {
        if self.0.stale.load(Ordering::Relaxed) { None } else { self.known().get(uid).cloned() }
    }

    /// Reads the pod of this namespace and name live; none where there is none.
    pub async fn read(&self, pod: &PodRef) -> Result<Option<Pod>, Failure> {
        let resource = ApiResource::erase::<ApiPod>(&());
        let api: Api<Slim> = Api::namespaced_with(self.0.client.clone(), &pod.namespace, &resource);
        let call = Call { verb: "get", resource: "pods", name: Some(&pod.name), namespace: None };
        match api.get(&pod.name).await {
            Ok(slim) => Ok(Pod::of(&slim, self.0.driver.as_deref())),
            Err(error) => match Failure::of(&error, &call) {
                failure if failure.cause == Cause::NotFound => Ok(None),
                failure => Err(failure),
            },
        }
    }

    /// Watches for ever.
    pub async fn run(&self) {
        let api: Api<Slim> = Api::all_with(self.0.client.clone(), &ApiResource::erase::<ApiPod>(&()));
        // From the API server's cache: what it lacks is read live before it counts.
        let config = watcher::Config { page_size: None, ..watcher::Config::default().any_semantic() };
        let selection = Selection { resource: Resource::pods, name: "pods".to_owned(), namespace: None, config };
        let mut signals = Box::pin(kubernetes::watch::watch(api, selection, self.0.metrics.clone()));
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
                    self.known().retain(|uid, _| list.contains(uid));
                    list = HashSet::new();
                    if !self.0.synced.send_replace(true) {
                        tracing::info!(pods = self.known().len(), "the index of the cluster's pods is complete");
                    }
                    true
                }
                Signal::Event(watcher::Event::Apply(pod)) => {
                    self.applied(&pod);
                    true
                }
                Signal::Event(watcher::Event::Delete(pod)) => {
                    if let Some(uid) = pod.metadata.uid.as_deref() {
                        self.known().remove(uid);
                    }
                    true
                }
                Signal::Trouble(..) => false,
            };
            self.0.stale.store(!works, Ordering::Relaxed);
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Arc<str>, Arc<Pod>>> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn applied(&self, slim: &Slim) -> Option<Arc<str>> {
        let pod = Pod::of(slim, self.0.driver.as_deref())?;
        let uid = pod.pod.uid.clone();
        self.known().insert(uid.clone(), Arc::new(pod));
        Some(uid)
    }
}
