//! The approver's own pods and their order. The first replica decides, and the others are on standby. No I/O.
//!
//! The replicas need no election, because each of them watches the cluster's pods and sees the others. The first replica is the oldest
//! pod of the approver's namespace and service account that is assigned to a node, has not ended and is not being deleted. A pod hands
//! over when its deletion begins, before its process ends. A new pod never precedes running ones.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use agent_kube::pod::{Pod, PodObject};
use workload_identity::PodRef;

/// Rank of this replica among the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rank {
    /// The watch has not reported the replica's own pod.
    Unknown,
    /// The replica precedes all others.
    First,
    /// Another replica precedes this one.
    Later,
    /// The replica's own pod is being deleted, and another replica is not.
    Leaving,
}

/// Rank of this replica, and departures of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Rank of this replica.
    pub rank: Rank,
    /// Number of other replicas that have left since the start, or are being deleted.
    pub departures: u64,
}

/// The running pods of the approver's own namespace, including those of other service accounts.
#[derive(Debug)]
pub struct Replicas {
    own: Option<PodRef>,
    pods: HashMap<Arc<str>, Replica>,
    departures: u64,
}

#[derive(Debug)]
struct Replica {
    account: Arc<str>,
    deleting: bool,
    /// Seconds since the epoch.
    created: i64,
}

impl Replicas {
    /// Creates an empty set. `own` is the pod of this replica; without it the rank stays [`Rank::Unknown`].
    pub fn new(own: Option<PodRef>) -> Self {
        Self { own, pods: HashMap::new(), departures: 0 }
    }

    /// Returns whether this replica runs as a pod.
    pub fn is_one(&self) -> bool {
        self.own.is_some()
    }

    /// Notes a new or changed pod. `slim` is the API object of `pod`.
    pub fn applied(&mut self, slim: &PodObject, pod: &Pod) {
        if self.own.as_ref().is_none_or(|own| own.namespace != pod.pod.namespace) {
            return;
        }
        let Some(account) = pod.service_account.clone().filter(|_| !pod.ended && pod.node_name.is_some()) else {
            return self.deleted(&pod.pod.uid);
        };
        let metadata = &slim.metadata;
        let created = metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second());
        let replica = Replica { account, deleting: metadata.deletion_timestamp.is_some(), created };
        let begins_to_leave = replica.deleting && self.pods.get(&pod.pod.uid).is_some_and(|before| !before.deleting);
        if begins_to_leave {
            self.count_departure(&pod.pod.uid);
        }
        self.pods.insert(pod.pod.uid.clone(), replica);
    }

    /// Notes that the pod with this UID was deleted or has ended.
    pub fn deleted(&mut self, uid: &str) {
        if self.pods.get(uid).is_some_and(|replica| !replica.deleting) {
            self.count_departure(uid);
        }
        self.pods.remove(uid);
    }

    /// Counts the departure of the pod with this UID, if it is another replica.
    fn count_departure(&mut self, uid: &str) {
        let account = |uid: &str| self.pods.get(uid).map(|replica| &replica.account);
        let own = self.own.as_ref().filter(|own| *own.uid != *uid);
        if own.and_then(|own| account(&own.uid)).is_some_and(|own| account(uid) == Some(own)) {
            self.departures += 1;
        }
    }

    /// Removes pods that a complete list does not contain.
    pub fn retain(&mut self, list: &HashSet<Arc<str>>) {
        let gone: Vec<_> = self.pods.keys().filter(|uid| !list.contains(*uid)).cloned().collect();
        gone.iter().for_each(|uid| self.deleted(uid));
    }

    /// Returns the rank of this replica, and the departures of others.
    pub fn standing(&self) -> Standing {
        Standing { rank: self.rank(), departures: self.departures }
    }

    fn rank(&self) -> Rank {
        let Some((uid, own)) = self.own.as_ref().and_then(|own| self.pods.get_key_value(&own.uid)) else { return Rank::Unknown };
        let order = |uid: &Arc<str>, replica: &Replica| (replica.deleting, replica.created, uid.clone());
        let mine = order(uid, own);
        let mut others = self.pods.iter().filter(|(other, replica)| *other != uid && replica.account == own.account);
        if own.deleting && others.clone().any(|(_, other)| !other.deleting) {
            Rank::Leaving
        } else if others.any(|(uid, other)| order(uid, other) < mine) {
            Rank::Later
        } else {
            Rank::First
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn own() -> Option<PodRef> {
        Some(PodRef { namespace: "mesh".into(), name: "b".into(), uid: "u-b".into() })
    }

    /// A pod of the approver, created at `second`.
    fn pod(name: &str, second: u8) -> Value {
        json!({
            "metadata": {
                "namespace": "mesh", "name": name, "uid": format!("u-{name}"), "creationTimestamp": format!("2026-01-01T00:00:{second:02}Z"),
            },
            "spec": {"nodeName": "n1", "serviceAccountName": "approver"}, "status": {"phase": "Running"},
        })
    }

    fn apply(replicas: &mut Replicas, object: &Value) -> Rank {
        let slim: PodObject = serde_json::from_value(object.clone()).unwrap();
        replicas.applied(&slim, &Pod::of(&slim, None).unwrap());
        replicas.standing().rank
    }

    #[test]
    fn the_oldest_that_is_not_being_deleted_is_the_first() {
        let mut replicas = Replicas::new(own());
        assert_eq!(replicas.standing().rank, Rank::Unknown);
        assert_eq!(apply(&mut replicas, &pod("a", 7)), Rank::Unknown, "its own pod has not been seen");
        assert_eq!(apply(&mut replicas, &pod("b", 7)), Rank::Later, "the UID orders two pods of the same age");
        assert_eq!(apply(&mut replicas, &pod("c", 8)), Rank::Later);
        let mut leaving = pod("a", 7);
        leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:10:00Z");
        assert_eq!(apply(&mut replicas, &leaving), Rank::First, "the older pod is being deleted");

        // The deletion of the own pod begins: the replica hands over if another replica exists.
        let mut own = pod("b", 7);
        own["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:20:00Z");
        assert_eq!(apply(&mut replicas, &own), Rank::Leaving);
        assert_eq!(replicas.standing().departures, 1);
        replicas.deleted("u-c");
        replicas.deleted("u-a");
        assert_eq!(replicas.standing().departures, 2, "one deletion was counted when it began");
        assert_eq!(replicas.standing().rank, Rank::First, "no other replica can take over");
        replicas.retain(&HashSet::new());
        assert_eq!(replicas.standing().rank, Rank::Unknown);
    }

    #[test]
    fn pods_that_are_no_replicas_do_not_count() {
        let changes: [fn(&mut Value); 5] = [
            |pod| pod["metadata"]["namespace"] = json!("other"),
            |pod| pod["spec"]["serviceAccountName"] = json!("agent"),
            |pod| pod["spec"]["nodeName"] = Value::Null,
            |pod| pod["status"]["phase"] = json!("Failed"),
            |pod| pod["status"]["phase"] = json!("Succeeded"),
        ];
        for change in changes {
            let mut replicas = Replicas::new(own());
            apply(&mut replicas, &pod("b", 7));
            assert_eq!(apply(&mut replicas, &pod("a", 1)), Rank::Later);
            let mut other = pod("a", 1);
            change(&mut other);
            if other["metadata"]["namespace"] == "other" {
                replicas.deleted("u-a");
            }
            assert_eq!(apply(&mut replicas, &other), Rank::First, "{other}");
        }
        // Departures of agents in the same namespace are not counted.
        let mut replicas = Replicas::new(own());
        apply(&mut replicas, &pod("b", 7));
        let mut agent = pod("agent", 1);
        agent["spec"]["serviceAccountName"] = json!("agent");
        apply(&mut replicas, &agent);
        replicas.deleted("u-agent");
        assert_eq!(replicas.standing(), Standing { rank: Rank::First, departures: 0 });
        let mut alone = Replicas::new(None);
        assert_eq!(apply(&mut alone, &pod("b", 7)), Rank::Unknown);
        assert!(alone.pods.is_empty());
    }
}
