//! Facts of a pod, read from its object. The agent identifies callers by them, and the approver derives from them what it may approve. No
//! I/O.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::Deserialize;
use workload_identity::{Labels, PodRef, Workload};

use self::picks::{Volume, picks};
use super::object::{Kind, Observed};

pub mod names;
pub mod picks;

/// Annotation of a static pod's mirror pod. Its value is the UID that the kubelet uses for the static pod, and that the pod's cgroup names
/// contain.
pub const MIRROR: &str = "kubernetes.io/config.mirror";

/// A pod, with the fields that the agent and the approver read.
pub type PodObject = Observed<PodKind, Spec, Status>;

/// Kind of pods. Keeps all labels, because profiles match them, and of the annotations only [`MIRROR`].
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
    /// `startTime`: when the kubelet accepted the pod, by the node's clock.
    pub start_time: Option<String>,
    container_statuses: Option<Vec<Container>>,
    init_container_statuses: Option<Vec<Container>>,
    ephemeral_container_statuses: Option<Vec<Container>>,
}

/// `status.containerStatuses[]`, and the corresponding lists of init and ephemeral containers
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Container {
    name: Option<String>,
    /// `<runtime>://<id>`
    #[serde(rename = "containerID")]
    id: Option<String>,
}

/// Facts of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Namespace, name and UID.
    pub pod: PodRef,
    /// Node of the pod; `None` before it is scheduled.
    pub node_name: Option<Arc<str>>,
    /// Service account; always `None` for a static pod, regardless of its mirror pod's spec.
    pub service_account: Option<Arc<str>>,
    /// Labels, for the match rules of profiles.
    pub labels: Labels,
    /// Profiles that the pod picks, by the name of the volume that picks them. Empty if the CSI driver is not known.
    pub picks: BTreeMap<Arc<str>, Arc<str>>,
    /// Whether the pod uses the node's network.
    pub host_network: bool,
    /// Whether this is the mirror pod of a static pod.
    pub mirror: bool,
    /// Whether the phase is `Succeeded` or `Failed`. A pod that is being deleted has not ended: its proxy still drains.
    pub ended: bool,
    /// `deletionTimestamp` in Unix seconds, by the API server's clock: the end of the grace period of a pod that is being deleted.
    pub deleted_at: Option<i64>,
    /// (id, name) of each init, ordinary and ephemeral container whose id the kubelet has reported. Empty unless containers are requested.
    pub containers: Vec<(Arc<str>, Arc<str>)>,
}

impl Pod {
    /// Returns the facts of `object` without its containers; `None` if it has no namespace, name or UID. `driver` is the CSI driver whose
    /// volumes pick profiles.
    pub fn of(object: &PodObject, driver: Option<&str>) -> Option<Self> {
        facts(object, driver, false)
    }

    /// Returns the workload of the pod's processes on the shared socket.
    pub fn workload(&self) -> Workload {
        self.picking(None)
    }

    /// Returns the workload of the pod's processes on the socket in the volume with this name.
    pub fn workload_at(&self, volume: &str) -> Workload {
        self.picking(self.picks.get(volume).cloned())
    }

    /// Returns every workload that the pod's processes can be on any socket, each once.
    pub fn workloads(&self) -> impl Iterator<Item = Workload> + '_ {
        let picked: BTreeSet<_> = self.picks.values().cloned().collect();
        [None].into_iter().chain(picked.into_iter().map(Some)).map(|picked| self.picking(picked))
    }

    fn picking(&self, picked: Option<Arc<str>>) -> Workload {
        let (service_account, labels) = (self.service_account.clone(), self.labels.clone());
        Workload::Pod { pod: self.pod.clone(), service_account, labels, picked }
    }

    /// Returns the name of the container with this id.
    pub fn container(&self, id: &str) -> Option<Arc<str>> {
        self.containers.iter().find(|(known, _)| **known == *id).map(|(_, name)| name.clone())
    }
}

/// Returns the facts of `pod`, with its containers if `with_containers` is set; `None` if it has no namespace, name or UID.
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
        labels: metadata.labels.iter().flatten().map(|(key, value)| (key.as_str(), value.as_str())).collect(),
        picks: driver.map_or_else(BTreeMap::new, |driver| picks(pod.spec.volumes.as_deref().unwrap_or_default(), driver)),
        host_network: pod.spec.host_network.unwrap_or(false),
        mirror,
        ended: matches!(pod.status.as_ref().and_then(|s| s.phase.as_deref()), Some("Succeeded" | "Failed")),
        deleted_at: metadata.deletion_timestamp.as_ref().map(|time| time.0.as_second()),
        containers: pod.status.as_ref().filter(|_| with_containers).map_or(Vec::new(), containers),
    })
}

/// Returns whether no container of the pod can have run yet. The phase `Pending` is not sufficient: init containers run in that phase, and
/// a proxy may be one of them. The kubelet must not have reported any container id either.
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
