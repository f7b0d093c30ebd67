//! Names, labels and annotations of an agent's requests.
//!
//! The name of a request consists of a digest of the agent process, a digest of the identity, and a counter. An agent that has received no
//! answer to a create can retry under the same name. Digests keep names short for pods and nodes with long names.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use agent_runtime::text::hex;
use aws_lc_rs::digest;
use parking_lot::RwLock;
use workload_identity::{Identity, NodeEnvironment, PodRef};

use crate::keys;

/// Prefix of the instance in [`keys::AGENT`], for an agent outside of a pod.
pub const PROCESS_PREFIX: &str = "process-";

/// Maximum length of a label's value in bytes.
const LABEL_BYTES: usize = 63;

/// The agent, as its requests name it.
#[derive(Debug)]
pub struct Agent {
    /// Name of the node.
    pub node_name: Arc<str>,
    /// UID of the node, if the agent's token names it. It changes if the Node object is recreated while the agent runs.
    node_uid: RwLock<Option<String>>,
    /// The agent's pod, if it runs in one.
    pub pod: Option<PodRef>,
    /// Identifier of this process, 12 hexadecimal digits. It is random, so that no two processes share the name of a request.
    pub instance: String,
    counter: AtomicU64,
}

impl Agent {
    /// Creates the agent of `node`. A node without a name is called `unknown`. `node_uid` is the node's UID, if the agent's token names it.
    /// `boot` is a random number, drawn once per process.
    pub fn new(node: &NodeEnvironment, node_uid: Option<String>, boot: u64) -> Self {
        let mut hash = digest::Context::new(&digest::SHA256);
        if let Some(pod) = &node.pod {
            hash.update(pod.uid.as_bytes());
        }
        hash.update(&boot.to_be_bytes());
        let instance = hex(&hash.finish().as_ref()[..6]);
        let node_name = node.node_name.clone().unwrap_or_else(|| "unknown".into());
        let node_uid = RwLock::new(node_uid);
        Self { node_name, node_uid, pod: node.pod.clone(), instance, counter: AtomicU64::new(0) }
    }

    /// Returns the UID of the node, if the agent's token names it.
    pub fn node_uid(&self) -> Option<String> {
        self.node_uid.read().clone()
    }

    /// Sets the UID of the node. Returns whether it has changed.
    pub fn set_node_uid(&self, uid: &str) -> bool {
        let mut known = self.node_uid.write();
        let has_changed = known.as_deref() != Some(uid);
        if has_changed {
            *known = Some(uid.to_owned());
        }
        has_changed
    }

    /// Returns the value of the label [`keys::AGENT`].
    pub fn uid(&self) -> String {
        match &self.pod {
            Some(pod) => pod.uid.to_string(),
            None => format!("{PROCESS_PREFIX}{}", self.instance),
        }
    }

    /// Returns a request name that this process has not used.
    pub fn request_name(&self, identity: &Identity) -> String {
        let count = self.counter.fetch_add(1, Ordering::Relaxed);
        format!("sds-{}-{}-{count}", self.instance, identity_digest(identity))
    }

    /// Returns the labels of this agent's requests.
    pub fn labels(&self) -> BTreeMap<String, String> {
        let uid = self.node_uid().map(|uid| (keys::NODE_UID, uid));
        let labels = [(keys::NODE, node_label(&self.node_name)), (keys::AGENT, self.uid()), (keys::INSTANCE, self.instance.clone())];
        labels.into_iter().chain(uid).map(|(key, value)| (key.to_owned(), value)).collect()
    }

    /// Returns the label selector of the requests of this agent's node.
    pub fn selector(&self) -> String {
        match self.node_uid() {
            Some(uid) => format!("{}={uid}", keys::NODE_UID),
            None => format!("{}={}", keys::NODE, node_label(&self.node_name)),
        }
    }

    /// Returns the label selector of requests that agents of the previous version made on this node, without the UID of the node. `None`
    /// if [`selector`](Self::selector) selects them, or if the node's name is longer than a label: agents of other nodes could set its
    /// digest.
    pub fn former_selector(&self) -> Option<String> {
        let is_exact = self.node_uid().is_some() && self.node_name.len() <= LABEL_BYTES;
        is_exact.then(|| format!("{}={},!{}", keys::NODE, self.node_name, keys::NODE_UID))
    }

    /// Returns the annotations of a request for `identity`. `evidence` is the pod in whose name the agent requests.
    pub fn annotations(&self, identity: &Identity, evidence: Option<&PodRef>) -> BTreeMap<String, String> {
        let mut out = BTreeMap::new();
        let mut put = |key: &str, value: &str| drop(out.insert(key.to_owned(), value.to_owned()));
        put(keys::NODE_NAME, &self.node_name);
        put(keys::PROFILE, &identity.profile.name);
        put(keys::SPIFFE_ID, identity.spiffe_id.as_str());
        if let Some(pod) = &self.pod {
            put(keys::AGENT_POD, &pod.to_string());
        }
        if let Some(pod) = evidence {
            put(keys::POD_NAMESPACE, &pod.namespace);
            put(keys::POD_NAME, &pod.name);
            put(keys::POD_UID, &pod.uid);
        }
        out
    }
}

/// Returns a node name as the value of a label. A node name has up to 253 characters, a label's value up to 63. A longer name becomes
/// `sha256-` and the first 40 hexadecimal digits of its SHA-256. [`keys::NODE_NAME`] has the full name.
pub fn node_label(node_name: &str) -> String {
    if node_name.len() <= LABEL_BYTES {
        return node_name.to_owned();
    }
    let hash = digest::digest(&digest::SHA256, node_name.as_bytes());
    format!("sha256-{}", hex(&hash.as_ref()[..20]))
}

/// Returns a short digest of SPIFFE ID, profile name and pod UID. All orders of an identity have the same digest.
pub fn identity_digest(identity: &Identity) -> String {
    let mut hash = digest::Context::new(&digest::SHA256);
    for part in [identity.spiffe_id.as_str(), &identity.profile.name, identity.pod_uid.as_deref().unwrap_or_default()] {
        hash.update(&(part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    hex(&hash.finish().as_ref()[..6])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_node_name_becomes_a_digest() {
        assert_eq!(node_label("worker-1"), "worker-1");
        assert_eq!(node_label(&"n".repeat(63)), "n".repeat(63));
        let (long, other) = ("n".repeat(64), "m".repeat(253));
        assert!(node_label(&long).len() <= LABEL_BYTES && node_label(&long).starts_with("sha256-"));
        assert_ne!(node_label(&long), node_label(&other));
    }

    #[test]
    fn requests_are_selected_by_the_uid_of_the_node_if_it_is_known() {
        let node = NodeEnvironment { node_name: Some("n1".into()), pod: None };
        let (with, without) = (Agent::new(&node, Some("u-1".into()), 1), Agent::new(&node, None, 1));
        assert_eq!((with.selector(), without.selector()), ("sds-agent.io/node-uid=u-1".into(), "sds-agent.io/node=n1".into()));
        assert_eq!((with.labels()[keys::NODE_UID].as_str(), with.labels()[keys::NODE].as_str()), ("u-1", "n1"));
        assert!(!without.labels().contains_key(keys::NODE_UID));
        let former = with.former_selector().unwrap();
        assert_eq!((former.as_str(), without.former_selector()), ("sds-agent.io/node=n1,!sds-agent.io/node-uid", None));
        let long = NodeEnvironment { node_name: Some("n".repeat(64).into()), pod: None };
        assert_eq!(Agent::new(&long, Some("u-1".into()), 1).former_selector(), None);
        assert_eq!(
            (with.set_node_uid("u-1"), with.set_node_uid("u-2"), with.selector()),
            (false, true, "sds-agent.io/node-uid=u-2".into())
        );
    }

    #[test]
    fn a_restarted_agent_is_another_instance_of_the_same_pod() {
        let pod = PodRef { namespace: "sds-agent".into(), name: "sds-agent-x".into(), uid: "u-1".into() };
        let node = NodeEnvironment { node_name: Some("n1".into()), pod: Some(pod) };
        let (first, second) = (Agent::new(&node, None, 1), Agent::new(&node, None, 2));
        assert_eq!((first.uid(), second.uid()), ("u-1".into(), "u-1".into()));
        assert_ne!(first.instance, second.instance);
        assert!(Agent::new(&NodeEnvironment::default(), None, 1).uid().starts_with(PROCESS_PREFIX));
    }
}
