//! Per-pod sockets with real mounts: the calls of a kubelet, Envoys that see one mounted directory, and agents that are killed in
//! between.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use tempfile::TempDir;
use test_harness::{
    agent::{self, Agent, Launch},
    agent_pod::AgentPod,
    cluster::{Cluster, Pod},
    host::{Host, IN_POD},
};

mod crowd;
mod identity;
mod kubelet;
mod profiles;
mod refusals;
mod restarts;

use self::kubelet::Kubelet;

const PATIENCE: Duration = Duration::from_secs(60);
/// Publishing and unpublishing wait for no other party.
const PROMPT: Duration = Duration::from_secs(25);

/// A node whose kubelet knows the agent as a driver. Only per-pod sockets are served.
struct Node {
    cluster: Cluster,
    name: String,
    namespace: String,
    agent_pod: AgentPod,
    host: Host,
    kubelet: Kubelet,
    launch: Launch,
    dir: TempDir,
}

impl Node {
    async fn new(settings: &str) -> Self {
        Self::waiting("0s", settings).await
    }

    /// Starts with `waitForCertificate`.
    async fn waiting(wait: &str, settings: &str) -> Self {
        let cluster = Cluster::connect().await;
        let dir = tempfile::tempdir().unwrap();
        let host = Host::new(dir.path()).await;
        let name = cluster.node().await;
        let namespace = cluster.namespace().await;
        let agent_pod = cluster.agent(dir.path(), &name).await;
        let launch = agent_pod.launch_on(dir.path(), &sockets(dir.path(), wait), settings).under(host.container());
        let kubelet = Kubelet::new(&host.kubelet());
        Self { cluster, name, namespace, agent_pod, host, kubelet, launch, dir }
    }

    async fn start(&self) -> Agent {
        let agent = self.launch.start().await;
        self.kubelet.register().await;
        agent
    }

    async fn pod(&self, name: &str) -> Pod {
        self.cluster.pod(&self.namespace, name, &self.name).await
    }

    /// The agent's directory of sockets.
    fn sockets(&self) -> PathBuf {
        self.dir.path().join("pods")
    }

    /// The directories of all volumes.
    fn directories(&self) -> Vec<PathBuf> {
        let inner = |path: PathBuf| fs::read_dir(path).into_iter().flatten().map(|entry| entry.unwrap().path());
        inner(self.sockets()).filter(|path| !path.ends_with(".view")).flat_map(inner).collect()
    }

    /// The number of paths below the directory of sockets on which a server listens.
    fn listening(&self) -> usize {
        let table = fs::read_to_string("/proc/net/unix").unwrap();
        let own = self.sockets().display().to_string();
        table.lines().filter(|line| line.contains(&own) && line.split_whitespace().nth(3) == Some("00010000")).count()
    }

    /// Fetches in the pod that has `target` mounted.
    async fn fetch(&self, target: &Path, socket: &str) -> Result<serde_json::Value, String> {
        let program = format!("'{}' fetch --socket {IN_POD}/{socket} --name default -o json --timeout 20s", agent::program().display());
        let output = self.host.in_pod(target, &program).await;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())
    }

    async fn assert_served(&self, pod: &Pod, target: &Path) {
        let certificate = self.fetch(target, "socket").await.unwrap();
        assert_eq!(certificate["spiffe_id"], pod.spiffe_id());
    }

    fn assert_nothing_left(&self) {
        assert_eq!(self.host.mounts(), []);
        assert_eq!(self.directories(), Vec::<PathBuf>::new());
        assert_eq!(self.listening(), 0);
        let targets: Vec<_> = fs::read_dir(self.host.kubelet().join("pods")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(targets, Vec::<PathBuf>::new());
    }
}

fn sockets(dir: &Path, wait: &str) -> String {
    let (directory, kubelet) = (dir.join("pods"), dir.join("kubelet"));
    let places = format!("directory: {}, kubeletDirectory: {}", directory.display(), kubelet.display());
    format!("{{ shared: {{ enabled: false }}, perPod: {{ enabled: true, {places}, waitForCertificate: {wait} }} }}")
}

fn fds(agent: &Agent) -> usize {
    fs::read_dir(format!("/proc/{}/fd", agent.process().pid())).unwrap().count()
}

fn certificate(lifetime: &str) -> String {
    format!("certificate: {{ lifetime: {lifetime} }}")
}
