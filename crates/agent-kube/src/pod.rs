//! What a pod's object tells, read in one place: the agent names callers by it, and the approver what it may approve. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::Deserialize;
use workload_identity::{PodRef, Workload};

use self::picks::{Volume, picks};
use super::object::{Kind, Observed};

pub mod picks;

/// The annotation of a static pod's mirror. Its value is the UID by which the kubelet knows the pod, and which its cgroups bear.
pub const MIRROR: &str = "kubernetes.io/config.mirror";

/// A pod as agents and approver read it.
pub type PodObject = Observed<PodKind, Spec, Status>;

/// Pods: their labels, by which profiles match, and the one annotation that is read.
#[derive(Debug, Clone)]
pub struct PodKind;

impl Kind for PodKind {
    const GROUP: &'static str = "";
    const VERSION: &'static str = "v1";
    const KIND: &'static str = "Pod";
    const PLURAL: &'static str = "pods";

    fn keeps_label(_key: &str) -> bool {
        true
    }

    fn keeps_annotation(key: &str) -> bool {
        key == MIRROR
    }
}

/// `spec`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Spec {
    node_name: Option<String>,
    service_account_name: Option<String>,
    host_network: Option<bool>,
    /// `volumes`
    pub volumes: Option<Vec<Volume>>,
}

/// `status`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Status {
    phase: Option<String>,
    /// When the kubelet took it on, by the node's own clock.
    pub start_time: Option<String>,
    container_statuses: Option<Vec<Container>>,
    init_container_statuses: Option<Vec<Container>>,
    ephemeral_container_statuses: Option<Vec<Container>>,
}

/// `status.containerStatuses[]`, and its like for init and ephemeral containers
#[derive(Debug, Clone, Default, Deserialize)]
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
    /// Where it runs; none before it has a node.
    pub node_name: Option<Arc<str>>,
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
    pub fn of(object: &PodObject, driver: Option<&str>) -> Option<Self> {
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

    /// Who its processes can be, on whatever socket; each once.
    pub fn workloads(&self) -> impl Iterator<Item = Workload> + '_ {
        let picked: BTreeSet<_> = self.picks.values().cloned().collect();
        [None].into_iter().chain(picked.into_iter().map(Some)).map(|picked| self.picking(picked))
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

/// The facts of `pod`, with the names of its containers where they are asked for.
pub fn facts(pod: &PodObject, driver: Option<&str>, with_containers: bool) -> Option<Pod> {
    let metadata = &pod.metadata;
    let mirror = metadata.annotations.as_ref().is_some_and(|a| a.contains_key(MIRROR));
    let named = |field: &Option<String>| field.as_deref().filter(|name| !name.is_empty()).map(Arc::from);
    Some(Pod {
        pod: PodRef {
            namespace: metadata.namespace.as_deref()?.into(),
            name: metadata.name.as_deref()?.into(),
            uid: metadata.uid.as_deref()?.into(),
        },
        node_name: named(&pod.spec.node_name),
        service_account: named(&pod.spec.service_account_name).filter(|_| !mirror),
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
pub fn has_not_begun(pod: &PodObject) -> bool {
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
