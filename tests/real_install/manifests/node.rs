//! Agent and approver in pods of the real kubelet, with only the security context, permissions and configuration of the manifests.

use serde_json::json;
use test_harness::{child, eventually, node::DRIVER, tools};

use super::site::{Ours, PATIENCE, Site, Way};

const OWN: Way = Way { name: "own", socket: "/run/sds/socket", volume: || json!({"csi": {"driver": DRIVER, "readOnly": true}}) };
const SHARED: Way = Way {
    name: "shared",
    socket: "/run/sds-agent/sds.sock",
    volume: || json!({"hostPath": {"path": "/run/sds-agent", "type": "Directory"}}),
};
/// `CAP_IPC_LOCK` alone, in the format of /proc.
const IPC_LOCK: &str = "0000000000004000";
const NONE: &str = "0000000000000000";

/// The version of Landlock that the kernel supports, according to the kernel; 0 or less: none.
async fn landlock_of_the_kernel() -> i64 {
    // landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION)
    let program = "import ctypes; print(ctypes.CDLL(None).syscall(444, 0, 0, 1))";
    let python = tools::system("python3", "python3");
    child::succeed(&python, &["-c", program], PATIENCE).await.trim().parse().unwrap()
}

/// Asserts that the agent is confined as far as the kernel supports it, in a container with a filter of the runtime.
async fn assert_confined(site: &Site, agent: &Ours) {
    let metrics = site.metrics(agent).await;
    let version = landlock_of_the_kernel().await;
    let (landlock, words) = match version {
        6.. => (1, "\"landlock\":\"in force\""),
        1..6 => (1, "\"landlock\":\"in force, as far as this kernel supports it\""),
        _ => (0, "\"landlock\":\"this kernel does not support it\""),
    };
    println!("figure: Landlock version {version}: {words}");
    assert!(metrics.contains(&format!("sds_agent_confined{{by=\"landlock\"}} {landlock}")), "{metrics}");
    assert!(metrics.contains("sds_agent_confined{by=\"seccomp\"} 1"), "{metrics}");
    let log = site.node.container_log(&agent.pod, "sds-agent");
    let line = log.lines().find(|line| line.contains("process confined")).unwrap_or_else(|| panic!("{log}"));
    for words in [words, "\"seccomp\":\"in force\"", "\"reads_all\":false", "\"starts_programs\":false"] {
        assert!(line.contains(words), "{words}: {line}");
    }
    let filters: u32 = site.process(agent, "Seccomp_filters").await.parse().unwrap();
    assert!(filters >= 2, "{filters}: the runtime's and its own");
}

/// Starts the approver and asserts that it runs without privileges.
async fn approver(site: &Site) -> Ours {
    let approver = site.run("Deployment", "sds-agent-approver", "approver-0", "{}").await;
    assert_eq!(site.process(&approver, "CapEff").await, NONE);
    assert_eq!(site.process(&approver, "CapBnd").await, NONE);
    assert_eq!(site.process(&approver, "Uid").await.split_whitespace().next(), Some("65532"));
    assert_eq!(site.process(&approver, "Seccomp").await, "2");
    approver
}

/// Asserts that no call was forbidden and that the approver made every approval.
async fn assert_rights_sufficed(site: &Site, agent: &Ours, approver: &Ours) {
    for ours in [agent, approver] {
        let metrics = site.metrics(ours).await;
        let requests: Vec<_> = metrics.lines().filter(|line| line.starts_with("sds_agent_kube_requests_total{")).collect();
        assert!(!requests.is_empty(), "{metrics}");
        let refused: Vec<_> = requests.iter().filter(|line| line.contains("code=\"403\"")).collect();
        assert!(refused.is_empty(), "{}: {refused:?}", ours.pod.name);
    }
    let metrics = site.metrics(approver).await;
    let approved = |line: &&str| line.starts_with("sds_agent_approver_decisions_total{") && line.contains("decision=\"approved\"");
    let count = metrics.lines().find(approved).and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    assert!(count.is_some_and(|count| count > 0.5), "{metrics}");
}

async fn until_registered(site: &Site) {
    let path = format!("/apis/storage.k8s.io/v1/csinodes/{}", site.node.name());
    eventually("the kubelet registers the driver", PATIENCE, async || {
        let seen = site.cluster.try_get(&path).await.map_err(|e| e.to_string())?;
        if seen["spec"]["drivers"][0]["name"] == DRIVER { Ok(()) } else { Err(seen.to_string()) }
    })
    .await;
}

/// One capability, no permissions of other users and the seccomp filter suffice to identify callers and to lock keys.
#[tokio::test]
async fn the_shared_socket_daemonset_hands_over_to_a_surge_pod() {
    let _turn = test_harness::turn().await;
    let site = Site::start("shared").await;
    let approver = approver(&site).await;
    // With `always` the agent does not start without locked memory.
    let agent = site.run("DaemonSet", "sds-agent", "sds-agent-one", "{ lockMemory: always }").await;
    for (key, value) in [("CapEff", IPC_LOCK), ("CapBnd", IPC_LOCK), ("CapAmb", NONE), ("Seccomp", "2"), ("NoNewPrivs", "1")] {
        assert_eq!(site.process(&agent, key).await, value, "{key}");
    }
    assert!(site.metrics(&agent).await.contains("sds_agent_memory_locked 1"));
    assert_confined(&site, &agent).await;

    let cart = site.workload("cart", &[SHARED]).await;
    let other = site.workload("other", &[SHARED]).await;
    for pod in [&cart, &other] {
        site.assert_served(pod, SHARED).await;
    }
    // A pod can replace neither the socket nor its path.
    let words = site.thief("thief", SHARED).await;
    assert!(words.contains("Read-only file system"), "{words}");

    // With `maxSurge: 1`, the next pod becomes ready before the first one ends.
    let next = site.run("DaemonSet", "sds-agent", "sds-agent-two", "{ lockMemory: always }").await;
    assert!(site.node.container_log(&next.pod, "sds-agent").contains("the socket is acquired"));
    // Each knows the other by its cgroup and its pod, as the container runtime and the API server have them.
    eventually("the previous agent has attested its successor", PATIENCE, async || {
        let words = site.node.container_log(&agent.pod, "sds-agent");
        if words.contains("another agent has taken the socket") { Ok(()) } else { Err(words) }
    })
    .await;
    for agent in [&agent, &next] {
        assert!(site.metrics(agent).await.contains("sds_agent_socket_taken_by_strangers_total 0"));
    }
    site.node.delete(&agent.pod).await;
    for pod in [&cart, &other] {
        site.assert_connected_again(pod, SHARED).await;
    }
    site.assert_served(&site.workload("late", &[SHARED]).await, SHARED).await;
    assert_rights_sufficed(&site, &next, &approver).await;
}

#[tokio::test]
async fn the_per_pod_daemonset_serves_pods_without_the_host_pid_namespace() {
    let _turn = test_harness::turn().await;
    let site = Site::start("per-pod").await;
    let approver = approver(&site).await;
    let agent = site.run("DaemonSet", "sds-agent", "sds-agent-one", "{}").await;
    until_registered(&site).await;
    // The agent has one capability and a seccomp filter; only the mount helper is privileged.
    for (key, value) in [("CapEff", IPC_LOCK), ("CapBnd", IPC_LOCK), ("CapAmb", NONE), ("Seccomp", "2"), ("NoNewPrivs", "1")] {
        assert_eq!(site.process(&agent, key).await, value, "{key}");
    }
    assert_eq!(site.process_in(&agent, "mount-helper", "Seccomp").await, "0");
    assert_confined(&site, &agent).await;
    let cart = site.workload("cart", &[OWN]).await;
    let other = site.workload("other", &[OWN]).await;
    for pod in [&cart, &other] {
        site.assert_served(pod, OWN).await;
    }
    assert!(!site.node.path("/run/sds-agent").exists(), "the directory of a shared socket exists");

    // The kubelet starts each container alone again. Pods start in the meantime, or after it.
    site.node.kill_in(&agent.pod, "mount-helper").await;
    site.assert_served(&site.workload("after-the-mount-helper", &[OWN]).await, OWN).await;
    site.node.kill_in(&agent.pod, "sds-agent").await;
    for pod in [&cart, &other] {
        site.assert_connected_again(pod, OWN).await;
    }
    site.assert_served(&site.workload("after-the-agent", &[OWN]).await, OWN).await;

    // With `maxSurge: 0`, the first pod ends before the next one starts.
    site.node.delete(&agent.pod).await;
    let next = site.run("DaemonSet", "sds-agent", "sds-agent-two", "{}").await;
    for pod in [&cart, &other] {
        site.assert_connected_again(pod, OWN).await;
    }
    site.assert_served(&site.workload("late", &[OWN]).await, OWN).await;
    site.node.delete(&cart).await;
    assert_rights_sufficed(&site, &next, &approver).await;
}

#[tokio::test]
async fn the_daemonset_of_both_serves_a_pod_on_both() {
    let _turn = test_harness::turn().await;
    let site = Site::start("both").await;
    let approver = approver(&site).await;
    let agent = site.run("DaemonSet", "sds-agent", "sds-agent-one", "{}").await;
    until_registered(&site).await;
    let cart = site.workload("cart", &[OWN, SHARED]).await;
    for way in [OWN, SHARED] {
        site.assert_served(&cart, way).await;
    }
    assert_rights_sufficed(&site, &agent, &approver).await;
}
