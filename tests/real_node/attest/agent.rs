//! The environment of the agent itself: a separate cgroup namespace, an old kernel; and the time to identify a caller.

use std::{fs, sync::Arc, time::Instant};

use agent_kube::Metrics;
use attest_kubernetes::{attestor::KubernetesAttestor, pods::Pods};
use sds_server::attest::Attestor;
use test_harness::{cgroups::PodCgroup, child::Child, tools};
use tokio::net::UnixListener;
use unix_peer::peer::Peer;

use super::{
    nothing_is_gained,
    scene::{PATIENCE, Scene, caller},
};

#[tokio::test]
async fn an_agent_in_a_pod_with_a_cgroup_namespace_of_its_own() {
    let _turn = test_harness::turn().await;
    let mut own = None;
    let scene = Scene::launched("certificate: { lifetime: 1h }", |agent, launch| {
        let cgroup = PodCgroup::new(&agent.pod.uid);
        let words = format!("{}exec unshare --cgroup \"$0\" \"$@\"", cgroup.moves());
        own = Some(cgroup);
        launch.under(["sh".to_owned(), "-c".to_owned(), words])
    })
    .await;
    let pid = scene.agent.process().pid();
    let seen = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(seen.lines().all(|line| line.contains(&format!("/pod{}/", scene.agent_pod.pod.uid))), "{seen}");
    let namespaces = [format!("/proc/{pid}/ns/cgroup"), "/proc/self/ns/cgroup".to_owned()].map(|path| fs::read_link(path).unwrap());
    assert_ne!(namespaces[0], namespaces[1]);
    nothing_is_gained(&scene).await;
}

#[tokio::test]
async fn on_an_old_kernel_the_agent_starts_only_where_the_risk_was_accepted() {
    let _turn = test_harness::turn().await;
    let mut scene = Scene::start("certificate: { lifetime: 1h }").await;
    scene.agent.terminate();
    scene.agent.exit(PATIENCE).await;

    // The agent first checks whether a socket returns a pidfd of its peer.
    let log = scene.dir.path().join("trace");
    let inject = ["-f", "-e", "trace=getsockopt", "-e", "inject=getsockopt:error=ENOPROTOOPT:when=1", "-o"];
    let wrapper = [tools::strace().to_str().unwrap().to_owned()].into_iter().chain(inject.map(str::to_owned));
    let old = scene.launch.clone().under(wrapper.chain([log.to_str().unwrap().to_owned()]));
    let mut agent = old.spawn();
    let status = agent.exit(PATIENCE).await;
    let said = agent.process().output();
    assert!(!status.success() && said.contains("Linux 6.5") && said.contains("sockets.shared.acceptPidReuse: true"), "{status} {said}");
    assert!(!agent.socket().exists(), "clients are kept waiting");

    let config = scene.dir.path().join("config.yaml");
    let accepting = fs::read_to_string(&config).unwrap().replace("mode: \"0666\"", "mode: \"0666\", acceptPidReuse: true");
    fs::write(&config, accepting).unwrap();
    let agent = old.start().await;
    agent.wrote("takes over the pid", 1).await;
}

/// Measures the time from a connection to the name of its pod, for the note.
#[tokio::test]
async fn a_caller_is_known_within_milliseconds() {
    const ROUNDS: usize = 5000;
    /// Maximum cost of an attestation, in reads of a file in `/proc`.
    const MOST_READS: u32 = 100;
    let _turn = test_harness::turn().await;
    let scene = Scene::start("certificate: { lifetime: 1h }").await;
    let metrics = Metrics::default();
    let pods = Pods::new(scene.agent_pod.client().await, &scene.node, metrics);
    let running = tokio::spawn({
        let pods = pods.clone();
        async move { pods.run(tokio_util::sync::CancellationToken::new()).await }
    });
    pods.synced().wait_for(|synced| *synced).await.unwrap();
    let attestor = Arc::new(KubernetesAttestor::new(pods, "/proc".into(), None).unwrap());

    let path = scene.dir.path().join("bench.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut command = scene.a.cgroup.command(caller());
    let _caller = Child::spawn("test-caller", command.arg("watch").arg(&path).arg("default"));
    let (stream, _) = listener.accept().await.unwrap();
    let (mut times, mut reads) = (Vec::with_capacity(ROUNDS), Vec::with_capacity(ROUNDS));
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let peer = Peer::of(&stream).unwrap();
        let attested = attestor.attest(&peer).await.unwrap();
        times.push(start.elapsed());
        assert_eq!(*attested.workload.pod().unwrap().uid, *scene.a.pod.uid);
        // The minimum work of an attestation, measured in the same run.
        let start = Instant::now();
        std::fs::read(format!("/proc/{}/cgroup", peer.pid)).unwrap();
        reads.push(start.elapsed());
    }
    running.abort();
    times.sort_unstable();
    reads.sort_unstable();
    let (p50, p99, read) = (times[ROUNDS / 2], times[ROUNDS * 99 / 100], reads[ROUNDS / 2]);
    let [in_the_middle, most, of_a_read] = [p50, p99, read].map(|time| time.as_micros());
    eprintln!("figure: attestation, warm: p50 {in_the_middle} µs, p99 {most} µs of {ROUNDS}; one read of its cgroups {of_a_read} µs");
    assert!(p50 < read * MOST_READS, "{p50:?} for what takes {read:?} to read");
}
