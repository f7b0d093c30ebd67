//! Per-pod sockets with real mounts: the calls of a kubelet, Envoys that see one mounted directory, and agents and mount helpers that are
//! killed in between.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;
use test_harness::{
    agent::{self, Agent, Launch},
    agent_pod::AgentPod,
    cluster::{Cluster, Pod},
    host::{Host, IN_POD},
};

mod crowd;
mod faults;
mod hostile;
mod identity;
mod kubelet;
mod profiles;
mod refusals;
mod restarts;

use self::kubelet::Kubelet;

const PATIENCE: Duration = Duration::from_secs(60);
/// Publishing and unpublishing wait for no other party.
const PROMPT: Duration = Duration::from_secs(25);

/// A node with a mount helper, which its kubelet knows as a driver. The agent has no capability and does not see the kubelet's directory.
/// Only per-pod sockets are served.
struct Node {
    cluster: Cluster,
    name: String,
    namespace: String,
    agent_pod: AgentPod,
    host: Host,
    kubelet: Kubelet,
    launch: Launch,
    helper_launch: Launch,
    helper: Mutex<Option<Agent>>,
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
        let launch = agent_pod.launch_on(dir.path(), &sockets(dir.path(), wait), settings);
        let helper_launch = launch.mount_helper().under(host.container());
        let launch = launch.under(host.unprivileged());
        let kubelet = Kubelet::new(&host.kubelet());
        Self { cluster, name, namespace, agent_pod, host, kubelet, launch, helper_launch, helper: Mutex::default(), dir }
    }

    /// Starts an agent, and a mount helper if there is none.
    async fn start(&self) -> Agent {
        if self.helper.lock().unwrap().is_none() {
            self.start_helper().await;
        }
        self.launch.start().await
    }

    /// Starts a mount helper, which takes the place of one that has ended.
    async fn start_helper(&self) {
        let mut helper = self.helper_launch.spawn();
        self.kubelet.register().await;
        helper.ready().await;
        *self.helper.lock().unwrap() = Some(helper);
    }

    /// The mount helper, to be ended.
    fn take_helper(&self) -> Agent {
        self.helper.lock().unwrap().take().expect("a mount helper runs")
    }

    /// The log of the mount helper, and that of `agent`.
    fn logs(&self, agent: &Agent) -> [Vec<Value>; 2] {
        [self.helper.lock().unwrap().as_ref().expect("a mount helper runs").log(), agent.log()]
    }

    /// The mount helper's output.
    fn helper_output(&self) -> String {
        self.helper.lock().unwrap().as_ref().expect("a mount helper runs").process().output()
    }

    async fn pod(&self, name: &str) -> Pod {
        self.cluster.pod(&self.namespace, name, &self.name).await
    }

    /// The directory of sockets.
    fn sockets(&self) -> PathBuf {
        self.dir.path().join("pods")
    }

    /// The directories of all volumes.
    fn directories(&self) -> Vec<PathBuf> {
        let inner = |path: PathBuf| fs::read_dir(path).into_iter().flatten().map(|entry| entry.unwrap().path());
        inner(self.sockets()).flat_map(inner).collect()
    }

    /// The number of paths below the directory of sockets on which a server listens.
    fn listening(&self) -> usize {
        let table = fs::read_to_string("/proc/net/unix").unwrap();
        let own = self.sockets().display().to_string();
        let of_pods = table.lines().filter(|line| line.contains(&own) && !line.contains("agent.sock"));
        of_pods.filter(|line| line.split_whitespace().nth(3) == Some("00010000")).count()
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
