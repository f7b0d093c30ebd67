//! Pods that make the agent hold as much memory as they can, under the memory limit of the manifests.

use std::{
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use nix::unistd::Pid;
use test_harness::{
    agent::Agent,
    cgroups::PodCgroup,
    child::Child,
    cluster::Cluster,
    eventually,
    hoard::{self, Counts, Way},
    manifests, memory,
    scene::{PATIENCE, Scene, Workload},
};

use super::worker::{child, told};

const SOCKET: &str = "SDS_AGENT_TEST_HOARD";
const WAY: &str = "SDS_AGENT_TEST_HOARD_WAY";
/// Connections of each pod, as many as one pod may have.
const CONNECTIONS: usize = 256;
/// Streams that each pod opens, or tries to open, for each way.
const STREAMS: f64 = 1_000.0;
/// Batches of fetches that the neighbour makes during each way.
const BATCHES: usize = 2;
/// Share of the limit that the agent may use.
const SHARE: f64 = 0.85;

/// An agent under the memory limit of the DaemonSet, and a neighbour that fetches all the time.
pub struct Siege {
    scene: Scene,
    cgroup: PodCgroup,
    agent: Agent,
    neighbour: Child,
    _quiet: Workload,
    limit: u64,
}

impl Siege {
    pub async fn begin() -> Self {
        let scene = Scene::new(&Cluster::connect().await).await;
        let cgroup = PodCgroup::at(&format!("sds-agent-test/{}", scene.agent_pod.pod.uid));
        let limit = manifests::memory_limit("base/daemonset.yaml", "DaemonSet");
        cgroup.limit_memory(limit);
        let wrapper = ["sh".to_owned(), "-c".to_owned(), format!("{}exec \"$0\" \"$@\"", cgroup.moves())];
        let launch = scene.agent_pod.launch(scene.dir.path(), "certificate: { lifetime: 1h }");
        let agent = launch.under(wrapper).start().await;
        let quiet = scene.workload("quiet").await;
        let neighbour = child("worker::child_that_works", &quiet.cgroup, agent.socket());
        Self { scene, cgroup, agent, neighbour, _quiet: quiet, limit }
    }

    /// Attacks with this many pods, each with its whole quota. Returns the highest charge that the agent has reported meanwhile.
    pub async fn attack(&self, way: Way, pods: usize) -> f64 {
        let mut attackers = Vec::new();
        for number in 0..pods {
            let pod = self.scene.workload(&format!("{}-{number}", format!("{way:?}").to_lowercase())).await;
            let mut command = pod.cgroup.command(&std::env::current_exe().expect("this program"));
            command.args(["--exact", "hoarders::child_that_hoards", "--ignored", "--nocapture"]);
            command.env(SOCKET, self.agent.socket()).env(WAY, format!("{way:?}"));
            attackers.push((Child::spawn("hoarder", &mut command), pod));
        }
        let made = self.batches(0).await;
        let mut charged: f64 = 0.0;
        for (attacker, _) in &attackers {
            // A connection with half a frame has no stream.
            let (what, least) = if way == Way::PartialFrame { ("connections ", CONNECTIONS as f64) } else { ("streams ", STREAMS) };
            let enough = |lines: &[String]| told(lines, what).last().copied().filter(|count| *count >= least);
            attacker.stdout().until("the attempts", 8 * PATIENCE, enough).await;
            charged = charged.max(self.agent.metric("sds_agent_caller_memory_bytes").await);
        }
        // A failed fetch ends the neighbour's process.
        self.batches(made + BATCHES).await;
        charged.max(self.agent.metric("sds_agent_caller_memory_bytes").await)
    }

    /// Waits until only the connection of the neighbour is charged.
    pub async fn until_all_is_given_back(&self) {
        eventually("the charges of the ended pods are gone", 2 * PATIENCE, async || {
            let charged = self.agent.metric("sds_agent_caller_memory_bytes").await;
            if charged < 256.0 * 1024.0 { Ok(()) } else { Err(format!("{charged} bytes are charged")) }
        })
        .await;
    }

    /// Waits until the neighbour has made `least` batches of fetches; returns their number.
    async fn batches(&self, least: usize) -> usize {
        let enough = |lines: &[String]| Some(told(lines, "median ").len()).filter(|made| *made >= least);
        self.neighbour.stdout().until("the neighbour's fetches", 8 * PATIENCE, enough).await
    }

    /// The highest resident memory of the agent, which is asserted to be below the limit.
    pub fn assert_it_stands(&self, what: &str) -> u64 {
        let peak = memory::peak(self.agent.process().pid());
        println!("figure: {what}: the agent used at most {} MiB of {} MiB", peak >> 20, self.limit >> 20);
        assert_eq!(self.cgroup.oom_kills(), 0, "{what}: the kernel has killed the agent");
        assert!(peak as f64 <= SHARE * self.limit as f64, "{what}: {peak} of {}", self.limit);
        peak
    }

    pub async fn metric(&self, name: &str) -> f64 {
        self.agent.metric(name).await
    }

    /// The process of the agent.
    pub fn process(&self) -> Pid {
        self.agent.process().pid()
    }
}

/// A default limit of the agent.
pub fn default_limit(value: impl Fn(&sds_server::limits::Limits) -> usize) -> u64 {
    value(&sds_server::limits::Limits::default()) as u64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a process of a pod"]
async fn child_that_hoards() {
    let (Some(socket), Ok(way)) = (std::env::var_os(SOCKET).map(PathBuf::from), std::env::var(WAY)) else { return };
    let counts = Arc::<Counts>::default();
    let attack = hoard::attack(&socket, Way::named(&way), CONNECTIONS, counts.clone());
    let report = async {
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let of = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
            println!("connections {} streams {} bytes {} ", of(&counts.connections), of(&counts.streams), of(&counts.bytes));
        }
    };
    tokio::select! {
        () = attack => {}
        () = report => {}
    }
}
