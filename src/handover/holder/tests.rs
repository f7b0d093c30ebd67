//! Attestation of this process, with a scripted `/proc` and API server.

use std::{fs, os::unix::net::UnixStream as StdStream};

use agent_kube::fake::{FakeApi, Fault};
use attest_kubernetes::pods::Pods;
use serde_json::{Value, json};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;

const OWN: &str = "2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4e";
const OTHER: &str = "3b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4e";

fn pod(uid: &str, namespace: &str, account: Option<&str>) -> Value {
    json!({
        "metadata": {"name": format!("pod-{uid}"), "namespace": namespace, "uid": uid},
        "spec": {"nodeName": "n1", "serviceAccountName": account},
    })
}

fn cgroup(uid: &str) -> String {
    format!("0::/kubepods/burstable/pod{uid}/f00")
}

/// An agent of the pod [`OWN`], and this process as the holder.
struct World {
    api: FakeApi,
    attestor: SameAccount,
    peer: Peer,
    _proc: tempfile::TempDir,
    _running: DropGuard,
}

impl World {
    /// The holder is in `cgroup`; the API server knows `pods`.
    fn new(cgroup: &str, pods: &[Value]) -> Self {
        let (api, metrics) = (FakeApi::new(), agent_kube::Metrics::default());
        for pod in pods {
            api.put("pods", pod.clone());
        }
        let index = Pods::new(api.client(&metrics), "n1", metrics);
        let shutdown = CancellationToken::new();
        tokio::spawn({
            let (index, shutdown) = (index.clone(), shutdown.clone());
            async move { index.run(shutdown).await }
        });
        let (socket, _other) = StdStream::pair().unwrap();
        let peer = Peer::of(&socket).unwrap();
        let proc = tempfile::tempdir().unwrap();
        for (name, content) in [("self", "0::/"), (peer.pid.to_string().as_str(), cgroup)] {
            fs::create_dir(proc.path().join(name)).unwrap();
            fs::write(proc.path().join(name).join("cgroup"), content).unwrap();
        }
        let own = PodRef { namespace: "mesh".into(), name: "agent".into(), uid: OWN.into() };
        let kubernetes = KubernetesAttestor::new(index.clone(), proc.path().to_owned(), Some(&own)).unwrap();
        let attestor = SameAccount::new(kubernetes, index, own);
        Self { api, attestor, peer, _proc: proc, _running: shutdown.drop_guard() }
    }

    async fn verdict(&self) -> Verdict {
        timeout(Duration::from_secs(20), self.attestor.attest(&self.peer)).await.expect("no verdict")
    }
}

fn own() -> Value {
    pod(OWN, "mesh", Some("sds-agent"))
}

#[tokio::test]
async fn only_the_namespace_and_account_of_the_own_pod_make_an_agent() {
    let cases = [
        (Some(("mesh", Some("sds-agent"))), true),
        (Some(("mesh", Some("default"))), false),
        (Some(("shop", Some("sds-agent"))), false),
        (Some(("mesh", None)), false),
        // The holder is in the agent's own pod.
        (None, true),
    ];
    for (other, is_agent) in cases {
        let (uid, others) = match other {
            Some((namespace, account)) => (OTHER, vec![own(), pod(OTHER, namespace, account)]),
            None => (OWN, vec![own()]),
        };
        let verdict = World::new(&cgroup(uid), &others).verdict().await;
        assert_eq!(verdict == Verdict::Agent, is_agent, "{other:?}: {verdict:?}");
        assert!(is_agent || matches!(verdict, Verdict::Impostor(_)), "{other:?}: {verdict:?}");
    }
}

#[tokio::test]
async fn what_is_no_evidence_of_an_agent_has_its_own_verdict() {
    let outside = World::new("0::/system.slice/sds-agent.service", &[own()]).verdict().await;
    assert!(matches!(outside, Verdict::Impostor(_)), "{outside:?}");
    let conflicting = World::new(&format!("1:cpu:/kubepods/pod{OWN}\n{}", cgroup(OTHER)), &[own()]).verdict().await;
    assert!(matches!(conflicting, Verdict::Impostor(_)), "{conflicting:?}");
    let unknown = World::new(&cgroup(OTHER), &[own()]).verdict().await;
    assert!(matches!(unknown, Verdict::UnknownPod(_)), "{unknown:?}");
    // The agent cannot compare with its own pod if it was deleted by force before the start.
    let orphaned = World::new(&cgroup(OTHER), &[pod(OTHER, "mesh", Some("sds-agent"))]).verdict().await;
    assert!(matches!(orphaned, Verdict::Unavailable(_)), "{orphaned:?}");
    let mut invisible = World::new(&cgroup(OTHER), &[own()]);
    invisible.peer.pid = 0;
    assert!(matches!(invisible.verdict().await, Verdict::Unavailable(_)));
    let mut ended = World::new(&cgroup(OTHER), &[own(), pod(OTHER, "mesh", Some("sds-agent"))]);
    ended.peer = Peer::without_process(0);
    ended.peer.pid = 1;
    let verdict = ended.verdict().await;
    assert!(matches!(verdict, Verdict::Ended(_)), "{verdict:?}");
}

#[tokio::test]
async fn an_agent_is_known_after_its_pod_was_deleted() {
    let world = World::new(&cgroup(OTHER), &[own(), pod(OTHER, "mesh", Some("sds-agent"))]);
    assert_eq!(world.verdict().await, Verdict::Agent);
    world.api.remove("pods", "mesh", &format!("pod-{OTHER}"));
    let mut ends = world.attestor.pods.pod_terminations();
    timeout(Duration::from_secs(20), ends.wait_for(|count| *count == 1)).await.unwrap().unwrap();
    assert_eq!(world.verdict().await, Verdict::Agent);
}

#[tokio::test]
async fn a_failed_live_read_decides_nothing() {
    let world = World::new(&cgroup(OTHER), &[own()]);
    timeout(Duration::from_secs(20), world.attestor.pods.synced().wait_for(|synced| *synced)).await.unwrap().unwrap();
    world.api.fail("list", "pods", Fault::Status(500, json!({})), 1);
    let verdict = world.verdict().await;
    assert!(matches!(verdict, Verdict::Unavailable(_)), "{verdict:?}");
}
