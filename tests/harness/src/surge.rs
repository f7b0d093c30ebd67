//! An agent, two Envoys of pods of its node, and further agents on the same socket, as a surge of the DaemonSet creates them.

use std::{path::Path, sync::Mutex};

use tempfile::TempDir;

use crate::{
    agent::{Agent, Launch, program},
    agent_pod::AgentPod,
    cgroups::PodCgroup,
    cluster::{Cluster, Pod},
    envoy::Sds,
    pair::{End, Pair},
};

/// A lifetime for which no renewal is due during a test.
const SETTINGS: &str = "certificate: { lifetime: 1h }";

/// A node with an agent, and the pods of two Envoys.
pub struct Surge {
    pub cluster: Cluster,
    pub agent_pod: AgentPod,
    pub agent: Agent,
    pub server: (Pod, PodCgroup),
    pub client: (Pod, PodCgroup),
    /// The cgroups of the agents: an agent finds the pod of the process that serves its socket.
    cgroups: Mutex<Vec<PodCgroup>>,
    _dir: TempDir,
}

impl Surge {
    /// Starts with the program under test.
    pub async fn start() -> Self {
        Self::start_with(program()).await
    }

    /// Starts with another version of the program.
    pub async fn start_with(program: &Path) -> Self {
        let (cluster, dir) = (Cluster::connect().await, tempfile::tempdir().unwrap());
        let (node, namespace) = (cluster.node().await, cluster.namespace().await);
        let agent_pod = cluster.agent(dir.path(), &node).await;
        let cgroup = PodCgroup::new(&agent_pod.pod.uid);
        let launch = agent_pod.launch(dir.path(), SETTINGS).program(program).under(cgroup.wrapper());
        let agent = launch.start().await;
        let [server, client] = [cluster.pod(&namespace, "server", &node).await, cluster.pod(&namespace, "client", &node).await];
        let (server_cgroup, client_cgroup) = (PodCgroup::new(&server.uid), PodCgroup::new(&client.uid));
        let (server, client) = ((server, server_cgroup), (client, client_cgroup));
        Self { cluster, agent_pod, agent, server, client, cgroups: Mutex::new(vec![cgroup]), _dir: dir }
    }

    /// An agent of another pod, on the same socket.
    pub async fn successor(&self, dir: &Path) -> Launch {
        self.launch(&self.agent_pod.successor(dir).await, dir)
    }

    /// An agent of `pod` on the same socket, with its configuration in `dir`.
    pub fn launch(&self, pod: &AgentPod, dir: &Path) -> Launch {
        let sockets = format!("{{ shared: {{ path: {}, mode: \"0666\" }} }}", self.agent.socket().display());
        let cgroup = PodCgroup::new(&pod.pod.uid);
        let launch = pod.launch_on(dir, &sockets, SETTINGS).under(cgroup.wrapper());
        self.cgroups.lock().expect("no test panics while it adds a cgroup").push(cgroup);
        launch
    }

    /// Two Envoys on the socket, one with each protocol variant.
    pub async fn pair(&self) -> Pair {
        let (server, client) = (self.server.0.spiffe_id(), self.client.0.spiffe_id());
        let server = End { id: &server, sds: Sds::StateOfTheWorld, cgroup: Some(&self.server.1) };
        let client = End { id: &client, sds: Sds::Delta, cgroup: Some(&self.client.1) };
        Pair::start(self.agent.socket(), server, client).await
    }
}
