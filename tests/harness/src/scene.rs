//! A node with an agent's pod and workloads, whose processes run `fetch`.

use std::{path::Path, time::Duration};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    agent::Agent,
    agent_pod::AgentPod,
    cgroups::PodCgroup,
    child::Child,
    cluster::{Cluster, Pod},
    fetch::{self, Refusal},
};

/// Limit for steps that depend only on processes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A node, an agent's pod with the least permissions, and a namespace for workloads.
pub struct Scene {
    pub cluster: Cluster,
    pub node: String,
    pub namespace: String,
    pub agent_pod: AgentPod,
    pub dir: TempDir,
}

impl Scene {
    pub async fn new(cluster: &Cluster) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let node = cluster.node().await;
        let agent_pod = cluster.agent(dir.path(), &node).await;
        Self { cluster: cluster.clone(), namespace: cluster.namespace().await, node, agent_pod, dir }
    }

    /// Creates a running pod with a service account of this name.
    pub async fn workload(&self, name: &str) -> Workload {
        Workload::of(self.cluster.pod(&self.namespace, name, &self.node).await)
    }

    /// The names of the agent's requests.
    pub async fn requests(&self) -> Vec<String> {
        self.cluster.requests(&self.agent_pod.pod.namespace).await
    }
}

/// A pod whose processes the test starts.
pub struct Workload {
    pub pod: Pod,
    pub cgroup: PodCgroup,
}

impl Workload {
    pub fn of(pod: Pod) -> Self {
        Self { cgroup: PodCgroup::new(&pod.uid), pod }
    }

    pub fn id(&self) -> String {
        self.pod.spiffe_id()
    }

    /// The certificate that a process of the pod gets.
    pub async fn fetch(&self, agent: &Agent) -> Value {
        self.fetch_kind(agent, "certificate").await
    }

    /// The trust bundle that a process of the pod gets.
    pub async fn fetch_roots(&self, agent: &Agent) -> Value {
        self.fetch_kind(agent, "bundle").await
    }

    /// Asserts that the pod gets no certificate within `patience`; returns the error of `fetch`.
    pub async fn refusal(&self, agent: &Agent, patience: &str) -> Refusal {
        let answer = fetch::ask(Some(&self.cgroup), agent.socket(), &["default"], patience).await;
        answer.expect_err("it has got a certificate")
    }

    async fn fetch_kind(&self, agent: &Agent, kind: &str) -> Value {
        let answer = fetch::ask(Some(&self.cgroup), agent.socket(), &fetch::BOTH, "10s").await;
        let found = answer.unwrap_or_else(|refusal| panic!("{}: {refusal:?}", self.id())).remove(kind);
        found.unwrap_or_else(|| panic!("{}: no {kind}", self.id()))
    }

    /// Opens a stream for its certificate.
    pub fn watch(&self, socket: &Path) -> Stream {
        Stream { child: fetch::watch_as(Some(&self.cgroup), socket, "default") }
    }

    /// Opens a stream for the trust bundle.
    pub fn watch_roots(&self, socket: &Path) -> Stream {
        self.watch_named(socket, "ROOTCA")
    }

    /// Opens a stream for the secret of this name.
    pub fn watch_named(&self, socket: &Path, name: &str) -> Stream {
        Stream { child: fetch::watch_as(Some(&self.cgroup), socket, name) }
    }
}

/// A client's open stream.
pub struct Stream {
    child: Child,
}

impl Stream {
    /// The updates so far.
    pub fn updates(&self) -> Vec<Value> {
        fetch::updates(&self.child.stdout().text().lines().map(str::to_owned).collect::<Vec<_>>())
    }

    /// Waits for `count` updates in total; returns the last of them.
    pub async fn update(&self, count: usize, limit: Duration) -> Value {
        let lines = self.child.stdout();
        lines.until(&format!("update {count} of a stream"), limit, |lines| fetch::updates(lines).into_iter().nth(count - 1)).await
    }

    /// Asserts that the connection was never replaced and the server sent only updates.
    pub fn assert_undisturbed(&self) {
        assert_eq!(self.child.stderr().text(), "", "the client was disturbed");
    }

    /// The errors of the client so far.
    pub fn complaints(&self) -> String {
        self.child.stderr().text()
    }

    /// Waits for the client's end; returns its exit code and its standard error.
    pub async fn end(&mut self, limit: Duration) -> (Option<i32>, String) {
        let status = self.child.exit(limit).await;
        (status.code(), self.complaints())
    }
}
