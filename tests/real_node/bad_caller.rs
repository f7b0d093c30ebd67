//! Callers without an identity, callers that get one later, and callers that lose it.

use std::time::Duration;

use tempfile::TempDir;
use test_harness::{
    agent::{self, Agent},
    child,
    cluster::Cluster,
    eventually, fetch, memory,
    scene::{PATIENCE, Scene, Workload},
};
use tokio::process::Command;

/// The error for every caller that can never be served, regardless of the cause.
const FLAT: &str = "sds-agent: the server has no identity for this process: no identity is available to this caller\n";

async fn scene() -> (Scene, Agent) {
    let scene = Scene::new(&Cluster::connect().await).await;
    let agent = scene.agent_pod.launch(scene.dir.path(), "certificate: { lifetime: 1h }").start().await;
    (scene, agent)
}

/// The cause for which the only caller was rejected: one line in the log.
async fn cause(agent: &Agent) -> String {
    let is_it = |line: &serde_json::Value| line["message"] == "caller not served";
    let line = agent.logs("the caller that is not served", PATIENCE, is_it).await;
    assert_eq!(agent.log().iter().filter(|line| is_it(line)).count(), 1, "it is logged more than once");
    line["cause"].as_str().expect("a cause").to_owned()
}

/// Asserts that the cause is visible to the operator: one line in the log, and a count.
async fn assert_refused(agent: &Agent, refusal: &fetch::Refusal, reason: &str, words: &[&str]) {
    assert_eq!((refusal.code, refusal.words.as_str()), (77, FLAT));
    let cause = cause(agent).await;
    assert!(cause.starts_with(&format!("{reason}: ")) && words.iter().all(|word| cause.contains(word)), "{cause}");
    let labels = ["result=\"refused\"".to_owned(), format!("reason=\"{reason}\"")];
    let counted = agent.metric_of("sds_agent_attestations_total", &labels.each_ref().map(String::as_str)).await;
    assert!((counted - 1.0).abs() < 0.5, "counted {counted} times");
}

#[tokio::test]
async fn a_process_outside_of_any_pod_is_refused() {
    let (_scene, agent) = scene().await;
    let refusal = fetch::ask(None, agent.socket(), &fetch::BOTH, "10s").await.expect_err("it is in no pod");
    assert_refused(&agent, &refusal, "not_in_pod", &["its cgroup paths contain no pod"]).await;
}

/// The service account in the mirror of a static pod proves nothing, because a kubelet can write any name there.
#[tokio::test]
async fn a_static_pod_is_refused() {
    let (scene, agent) = scene().await;
    let hash = "0123456789abcdef0123456789abcdef";
    let pod = scene.cluster.mirror_pod(&scene.namespace, "static", &scene.node, hash).await;
    let workload = Workload::of(pod);
    let refusal = workload.refusal(&agent, "10s").await;
    let words = format!("static pod {}/static has no service account", scene.namespace);
    assert_refused(&agent, &refusal, "no_service_account", &[&words]).await;
}

/// A process can call before the watch reports its pod. The agent reads the API server once and then asks the client to retry; it does
/// not poll. It serves the pod when the watch has reported it. (While the index is incomplete, the agent holds the stream, see
/// `bad_upstream::rights`.)
#[tokio::test]
async fn a_pod_that_is_known_later_than_it_calls_is_served_then() {
    let (scene, agent) = scene().await;
    let late = Workload::of(scene.cluster.unbound_pod(&scene.namespace, "late").await);
    let lists = async || agent.metric_of("sds_agent_kube_requests_total", &["verb=\"list\"", "resource=\"pods\""]).await;
    let before = lists().await;
    let refusal = late.refusal(&agent, "10s").await;
    assert_eq!(refusal.code, 69, "{refusal:?}");
    assert_eq!(refusal.words, "sds-agent: the server cannot answer now: the caller cannot be identified right now\n");
    assert!((lists().await - before - 1.0).abs() < 0.5, "not one look at the pods");
    let cause = cause(&agent).await;
    assert!(cause.starts_with("unknown_pod: the API server knows no pod with UID "), "{cause}");
    assert!(agent.metric_of("sds_agent_attestations_total", &["result=\"unavailable\"", "reason=\"unknown_pod\""]).await > 0.5);

    scene.cluster.bind(&late.pod, &scene.node).await;
    let stream = late.watch(agent.socket());
    assert_eq!(stream.update(1, PATIENCE).await["spiffe_id"], late.id());
    let calls = agent.metric("sds_agent_attestations_total").await;
    assert!(lists().await - before < calls + 0.5, "the pods were listed {} times for {calls} calls", lists().await - before);
    assert!(agent.metric_of("sds_agent_attestations_total", &["result=\"refused\""]).await < 0.5);
}

#[tokio::test]
async fn a_pod_that_is_deleted_loses_its_stream_and_its_key() {
    let scene = Scene::new(&Cluster::connect().await).await;
    let agent = scene.agent_pod.launch(scene.dir.path(), "certificate: { lifetime: 1h }\nretention: 1s").start().await;
    let (workload, other) = (scene.workload("app").await, scene.workload("other").await);
    let (mut stream, others) = (workload.watch(agent.socket()), other.watch(agent.socket()));
    stream.update(1, PATIENCE).await;
    others.update(1, PATIENCE).await;
    let [key, others_key] = [Key::of(&workload, &agent).await, Key::of(&other, &agent).await];
    assert!(key.is_in(&agent) && others_key.is_in(&agent), "the search finds no key where one must be");

    scene.cluster.delete(&workload.pod.path()).await;
    let (code, words) = stream.end(PATIENCE).await;
    assert_eq!(code, Some(77), "{words}");
    assert_eq!(words, "sds-agent: the server has no identity for this process: the workload has ended\n");
    let refusal = workload.refusal(&agent, "3s").await;
    // The UID of a deleted pod is never reused.
    assert_eq!(refusal.code, 77, "{refusal:?}");

    eventually("the certificate is forgotten", PATIENCE, async || match agent.certificate(&workload.id()).await {
        None => Ok(()),
        Some(row) => Err(row.to_string()),
    })
    .await;
    eventually("the key is wiped", PATIENCE, async || if key.is_in(&agent) { Err("it is there".into()) } else { Ok(()) }).await;
    assert!(others_key.is_in(&agent), "the key of another pod was wiped as well");
    assert_eq!(others.updates().len(), 1);
    others.assert_undisturbed();
}

/// A workload's private key, as text and as bytes.
struct Key {
    text: Vec<u8>,
    bytes: Vec<u8>,
    _dir: TempDir,
}

impl Key {
    async fn of(workload: &Workload, agent: &Agent) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let file = dir.path().join("key.pem");
        let mut command: Command = workload.cgroup.command(agent::program());
        command.arg("fetch").arg("--socket").arg(agent.socket()).args(["--name", "default", "-o", "json", "--write-key"]).arg(&file);
        let output = child::finish(command, Duration::from_secs(10)).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let pem = std::fs::read(&file).expect("the key");
        let (_, parsed) = x509_parser::pem::parse_x509_pem(&pem).expect("PEM");
        let line = pem.split(|byte| *byte == b'\n').nth(2).expect("a line in the middle").to_vec();
        // The private scalar of a P-256 key follows its header.
        let number = parsed.contents.get(36..68).expect("a key of P-256 in PKCS#8").to_vec();
        Self { text: line, bytes: number, _dir: dir }
    }

    /// Whether the agent's memory contains the key.
    fn is_in(&self, agent: &Agent) -> bool {
        [&self.text, &self.bytes].into_iter().any(|form| memory::holds(agent.process().pid(), form))
    }
}
