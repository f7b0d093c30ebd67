//! Issuers that do not exist, that differ from their reference, or that have an unsupported type.

use std::time::Duration;

use serde_json::json;
use test_harness::{
    agent::Agent,
    agent_pod::Right,
    cluster::{Cluster, ISSUER, labels, name_of},
    scene::{PATIENCE, Scene, Stream, Workload},
};

use super::{HASTY, failure, failures};

const CERT_MANAGER: &str = "/apis/cert-manager.io/v1";
/// Minimum wait in seconds after a failure that only another configuration fixes.
const LONG: u64 = 200;

/// A workload that waits for a certificate of an issuer that cannot serve. Its process ends before its cgroup does.
struct Waiting {
    stream: Stream,
    workload: Workload,
    agent: Agent,
    scene: Scene,
}

impl Waiting {
    /// `issuer` is the reference in the agent's configuration. The cause must contain `words`.
    async fn for_issuer(scene: Scene, issuer: &str, words: &[&str]) -> Self {
        let mut scene = scene;
        issuer.clone_into(&mut scene.agent_pod.issuer);
        // The agent can read issuers of both kinds, so that it can distinguish them.
        scene.agent_pod.allow(Right::Issuers, &["get"]).await;
        let agent = scene.agent_pod.launch(scene.dir.path(), HASTY).start().await;
        let workload = scene.workload("app").await;
        let stream = workload.watch(agent.socket());

        let cause = failure(&agent, &workload.id(), PATIENCE).await;
        assert!(words.iter().all(|word| cause.contains(word)), "{issuer}: {cause}");
        let at_start: Vec<_> = agent.log().into_iter().filter(|line| line["level"] == "ERROR").collect();
        assert!(at_start.len() == 1 && at_start[0]["cause"] == *cause, "{issuer}: not logged once at the start: {at_start:?}");

        let waiting = Self { stream, workload, agent, scene };
        waiting.assert_held().await;
        waiting
    }

    /// Asserts that the agent makes no request and that the client waits in its stream. A client with a short timeout gets an error that
    /// says so.
    async fn assert_held(&self) {
        let refusal = self.workload.refusal(&self.agent, "500ms").await;
        assert_eq!(refusal.code, 69, "{refusal:?}");
        assert!(refusal.words.contains("the certificate is being issued"), "{refusal:?}");
        assert!(self.stream.updates().is_empty());
        self.stream.assert_undisturbed();
        assert!(self.scene.requests().await.is_empty(), "a request was made");
    }

    /// Asserts one log line and one count for each failure.
    async fn assert_told_once(&self) {
        assert_eq!(failures(&self.agent, &self.workload.id()).len(), 1);
        let counted = self.agent.metric_of("sds_agent_issuances_total", &["result=\"api_error\""]).await;
        assert!((counted - 1.0).abs() < 0.5, "counted {counted} times");
        let wait = failures(&self.agent, &self.workload.id())[0]["retry_in_seconds"].as_u64();
        assert!(wait.is_some_and(|wait| wait > LONG), "retried after {wait:?} s");
    }
}

#[tokio::test]
async fn a_self_signed_issuer_is_refused() {
    let cluster = Cluster::connect().await;
    let issuer = json!({
        "apiVersion": "cert-manager.io/v1", "kind": "ClusterIssuer",
        "metadata": {"generateName": "self-signed-", "labels": labels()}, "spec": {"selfSigned": {}},
    });
    let name = name_of(&cluster.create(&format!("{CERT_MANAGER}/clusterissuers"), &issuer).await);
    let words = [&name, "is of type SelfSigned", "make a CA issuer from it and name that one in issuerRef"];
    let waiting = Waiting::for_issuer(Scene::new(&cluster).await, &format!("{{ name: {name}, kind: ClusterIssuer }}"), &words).await;
    waiting.assert_told_once().await;
    cluster.delete(&format!("{CERT_MANAGER}/clusterissuers/{name}")).await;
}

#[tokio::test]
async fn a_name_of_the_other_kind_is_told_with_the_kind() {
    let cluster = Cluster::connect().await;
    let as_issuer = async {
        let words = ["Issuer \"mesh-ca\" does not exist in namespace", "set issuerRef.kind to ClusterIssuer"];
        Waiting::for_issuer(Scene::new(&cluster).await, &format!("{{ name: {ISSUER}, kind: Issuer }}"), &words).await
    };
    let as_cluster_issuer = async {
        let scene = Scene::new(&cluster).await;
        create_issuer(&scene, "local-ca").await;
        let words = ["ClusterIssuer \"local-ca\" does not exist", "set issuerRef.kind to Issuer"];
        Waiting::for_issuer(scene, "{ name: local-ca, kind: ClusterIssuer }", &words).await
    };
    let (one, other) = tokio::join!(as_issuer, as_cluster_issuer);
    one.assert_told_once().await;
    other.assert_told_once().await;
}

/// An operator can create the issuer after the agents started, so the agent checks again soon.
#[tokio::test]
async fn an_issuer_that_comes_later_serves_who_has_waited() {
    let cluster = Cluster::connect().await;
    let words = ["get issuers.cert-manager.io later-ca in namespace", "it does not exist: create it, or correct issuerRef.name"];
    let waiting = Waiting::for_issuer(Scene::new(&cluster).await, "{ name: later-ca, kind: Issuer }", &words).await;
    create_issuer(&waiting.scene, "later-ca").await;
    let certificate = waiting.stream.update(1, PATIENCE).await;
    assert_eq!(certificate["spiffe_id"], waiting.workload.id());
    waiting.stream.assert_undisturbed();
    let told = failures(&waiting.agent, &waiting.workload.id()).len();
    let counted = waiting.agent.metric_of("sds_agent_issuances_total", &["result=\"api_error\""]).await;
    #[expect(clippy::cast_precision_loss, reason = "a few")]
    let same = (counted - told as f64).abs() < 0.5;
    assert!(same, "{told} logged, {counted} counted");
}

/// An error that is visible without a cluster is an error of the configuration, before anything else happens.
#[tokio::test]
async fn an_unknown_kind_is_a_mistake_of_the_configuration() {
    let cluster = Cluster::connect().await;
    let mut scene = Scene::new(&cluster).await;
    scene.agent_pod.issuer = "{ name: mesh-ca, kind: MeshIssuer }".into();
    let launch = scene.agent_pod.launch(scene.dir.path(), "");
    let mut agent = launch.spawn();
    let status = agent.exit(Duration::from_secs(10)).await;
    assert_eq!(status.code(), Some(64));
    let output = agent.process().output();
    let words = ["issuer.certManager.issuerRef.kind: \"MeshIssuer\" is not a kind of cert-manager.io", "use ClusterIssuer or Issuer"];
    assert!(words.iter().all(|word| output.contains(word)), "{output}");
    assert!(!launch.socket().exists());
}

/// Creates an Issuer with a copy of the private CA in the agent's namespace.
async fn create_issuer(scene: &Scene, name: &str) {
    let (certificate, key) = scene.cluster.authority_with_key().await;
    let namespace = &scene.agent_pod.pod.namespace;
    let secret = json!({
        "metadata": {"name": name}, "type": "kubernetes.io/tls", "stringData": {"tls.crt": certificate, "tls.key": key},
    });
    scene.cluster.create(&format!("/api/v1/namespaces/{namespace}/secrets"), &secret).await;
    let issuer = json!({
        "apiVersion": "cert-manager.io/v1", "kind": "Issuer",
        "metadata": {"name": name}, "spec": {"ca": {"secretName": name}},
    });
    scene.cluster.create(&format!("{CERT_MANAGER}/namespaces/{namespace}/issuers"), &issuer).await;
}
