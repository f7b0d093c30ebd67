//! Agent and approver in pods of the real kubelet, with the security context, rights and configuration of the manifests and no more.

use serde_json::{Value, json};

use super::site::{Ours, PATIENCE, Site};
use crate::support::{self, cluster::Pod, eventually};

const OWN: &str = "/run/sds/socket";
const SHARED: &str = "/run/sds-agent/sds.sock";
/// `CAP_IPC_LOCK` alone, as /proc shows it.
const IPC_LOCK: &str = "0000000000004000";
const NONE: &str = "0000000000000000";

fn own() -> (&'static str, Value) {
    ("/run/sds", json!({"csi": {"driver": "csi.sds-agent.io", "readOnly": true}}))
}

fn shared() -> (&'static str, Value) {
    ("/run/sds-agent", json!({"hostPath": {"path": "/run/sds-agent", "type": "Directory"}}))
}

async fn assert_served(site: &Site, pod: &Pod, socket: &str) {
    let certificate = site.fetch(pod, socket, "default").await.unwrap_or_else(|e| panic!("{}, {socket}: {e}", pod.name));
    assert_eq!(certificate["spiffe_id"], pod.spiffe_id(), "{socket}");
    let roots = site.fetch(pod, socket, "ROOTCA").await.unwrap_or_else(|e| panic!("{}, {socket}: {e}", pod.name));
    assert!(roots["trusted_ca_pem"].as_str().unwrap().contains("BEGIN CERTIFICATE"), "{roots}");
}

/// The approver, and that it runs as a nobody.
async fn approver(site: &Site) -> Ours {
    let approver = site.run("Deployment", "sds-agent-approver", "approver-0", "{}").await;
    assert_eq!(site.process(&approver, "CapEff").await, NONE);
    assert_eq!(site.process(&approver, "CapBnd").await, NONE);
    assert_eq!(site.process(&approver, "Uid").await.split_whitespace().next(), Some("65532"));
    assert_eq!(site.process(&approver, "Seccomp").await, "2");
    approver
}

/// Nothing that they asked for was forbidden, and every approval is the approver's.
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
        if seen["spec"]["drivers"][0]["name"] == "csi.sds-agent.io" { Ok(()) } else { Err(seen.to_string()) }
    })
    .await;
}

/// With one capability, no other user's rights, and the kernel's filter: that suffices to know callers and to lock keys.
#[tokio::test]
async fn the_daemonset_of_the_shared_socket_serves_pods_and_hands_over_to_a_surge() {
    let _turn = support::turn().await;
    let site = Site::start("shared").await;
    let approver = approver(&site).await;
    // Or it does not start.
    let agent = site.run("DaemonSet", "sds-agent", "sds-agent-one", "{ lockMemory: always }").await;
    for (key, value) in [("CapEff", IPC_LOCK), ("CapBnd", IPC_LOCK), ("CapAmb", NONE), ("Seccomp", "2"), ("NoNewPrivs", "1")] {
        assert_eq!(site.process(&agent, key).await, value, "{key}");
    }
    assert!(site.metrics(&agent).await.contains("sds_agent_memory_locked 1"));

    let cart = site.workload("cart", &[shared()]).await;
    let other = site.workload("other", &[shared()]).await;
    for pod in [&cart, &other] {
        assert_served(&site, pod, SHARED).await;
    }
    // The pod can take neither the socket nor its place.
    let written = site.node.exec(&cart, &["/sds-agent", "dev", "--socket", SHARED, "--admin", "127.0.0.1:0"]).await;
    let words = String::from_utf8_lossy(&written.stderr).into_owned();
    assert!(!written.status.success() && words.contains("Read-only file system"), "{words}");

    // As maxSurge: 1 has it: the next one is ready, then the first one goes.
    let next = site.run("DaemonSet", "sds-agent", "sds-agent-two", "{ lockMemory: always }").await;
    assert!(site.node.container_log(&next.pod, "sds-agent").contains("the socket is ours"));
    site.node.delete(&agent.pod).await;
    for pod in [&cart, &other] {
        assert_served(&site, pod, SHARED).await;
    }
    assert_rights_sufficed(&site, &next, &approver).await;
}

#[tokio::test]
async fn the_daemonset_of_pods_sockets_serves_pods_without_seeing_their_processes() {
    let _turn = support::turn().await;
    let site = Site::start("per-pod").await;
    let approver = approver(&site).await;
    let agent = site.run("DaemonSet", "sds-agent", "sds-agent-one", "{}").await;
    until_registered(&site).await;
    let cart = site.workload("cart", &[own()]).await;
    let other = site.workload("other", &[own()]).await;
    for pod in [&cart, &other] {
        assert_served(&site, pod, OWN).await;
    }
    assert!(!site.node.path("/run/sds-agent").exists(), "nobody has made a shared socket's directory");

    // As maxSurge: 0 has it: the first one goes, then the next one comes.
    site.node.delete(&agent.pod).await;
    let next = site.run("DaemonSet", "sds-agent", "sds-agent-two", "{}").await;
    for pod in [&cart, &other] {
        assert_served(&site, pod, OWN).await;
    }
    site.node.delete(&cart).await;
    assert_rights_sufficed(&site, &next, &approver).await;
}

#[tokio::test]
async fn the_daemonset_of_both_serves_a_pod_on_both() {
    let _turn = support::turn().await;
    let site = Site::start("both").await;
    let approver = approver(&site).await;
    let agent = site.run("DaemonSet", "sds-agent", "sds-agent-one", "{}").await;
    until_registered(&site).await;
    let cart = site.workload("cart", &[own(), shared()]).await;
    for socket in [OWN, SHARED] {
        assert_served(&site, &cart, socket).await;
    }
    assert_rights_sufficed(&site, &agent, &approver).await;
}
