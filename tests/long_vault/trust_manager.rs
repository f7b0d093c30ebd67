//! Roots that trust-manager's own controller writes into a ConfigMap, and their way to the agent's clients.
//!
//! The test is in this group because the first build of the controller takes minutes, as that of Vault does.

use std::{collections::BTreeSet, fs, time::Duration};

use serde_json::{Value, json};
use test_harness::{
    child::Child,
    cluster::Cluster,
    eventually,
    manifests::{documents, install},
    plane::Plane,
    scene::{PATIENCE, Scene, Stream},
    tools,
};
use tokio::process::Command;
use x509_parser::pem::Pem;

/// Limit until the API server serves the kind, and the controller follows it.
const STARTED: Duration = Duration::from_secs(60);
const BUNDLES: &str = "/apis/trust.cert-manager.io/v1alpha1/bundles";
const SOURCES: &str = "/api/v1/namespaces/cert-manager/configmaps";

/// Installs the CRD of the controller's module and starts the controller.
async fn trust_manager(cluster: &Cluster, plane: &Plane) -> Child {
    let crd = fs::read_to_string(tools::trust_manager_crd()).unwrap();
    install(cluster, &documents(&crd)).await;
    eventually("Bundles are served", STARTED, async || cluster.try_get(BUNDLES).await.map(drop).map_err(|e| e.to_string())).await;
    let mut command = Command::new(tools::trust_manager());
    command.arg("--kubeconfig").arg(plane.kubeconfig()).args(["--trust-namespace", "cert-manager"]);
    let child = Child::spawn_tied("trust-manager", &mut command);
    child.stdout().until("the controller follows Bundles", STARTED, |lines| lines.iter().any(|line| line == "ready").then_some(())).await;
    child
}

fn root() -> String {
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    parameters.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
}

/// The certificates, regardless of their order.
fn certificates(pem: &str) -> BTreeSet<Vec<u8>> {
    Pem::iter_from_buffer(pem.as_bytes()).map(|block| block.unwrap().contents).collect()
}

async fn has(stream: &Stream, count: usize, roots: &[&str]) {
    let update = stream.update(count, PATIENCE).await;
    assert_eq!(certificates(update["trusted_ca_pem"].as_str().unwrap()), certificates(&roots.concat()), "update {count}");
}

fn config_map(name: &str, pem: &str) -> Value {
    json!({"metadata": {"name": name}, "data": {"roots.pem": pem}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_roots_of_a_bundle_are_served_and_follow_its_changes() {
    let (cluster, plane) = Cluster::own(&[]).await;
    let _controller = trust_manager(&cluster, &plane).await;
    let mut scene = Scene::new(&cluster).await;
    scene.agent_pod = scene.agent_pod.with_own_roots().await;
    let (namespace, target) = (scene.agent_pod.pod.namespace.clone(), scene.agent_pod.roots.clone());
    let agent = scene.agent_pod.launch(scene.dir.path(), "").spawn();
    let workload = scene.workload("app").await;
    let stream = workload.watch_roots(agent.socket());
    let source = format!("configMap {namespace}/{}[{}]", target.name, target.key);
    agent.logs("the ConfigMap is missed", PATIENCE, |line| line["source"] == source && line["level"] == "WARN").await;

    // A Bundle writes a ConfigMap of its own name.
    let (authority, [old, new, last]) = (cluster.authority().await, [root(), root(), root()]);
    cluster.create(SOURCES, &config_map("authority", &authority)).await;
    let bundle = json!({
        "apiVersion": "trust.cert-manager.io/v1alpha1", "kind": "Bundle", "metadata": {"name": target.name},
        "spec": {
            "sources": [{"configMap": {"name": "authority", "key": "roots.pem"}}, {"inLine": old}],
            "target": {
                "configMap": {"key": target.key},
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
            },
        },
    });
    cluster.create(BUNDLES, &bundle).await;
    has(&stream, 1, &[&authority, &old]).await;
    assert_eq!(workload.fetch(&agent).await["spiffe_id"], workload.id());

    // The Bundle changes, and then a ConfigMap that it names.
    let sources = json!([{"configMap": {"name": "authority", "key": "roots.pem"}}, {"inLine": new}]);
    cluster.patch(&format!("{BUNDLES}/{}", target.name), &json!({"spec": {"sources": sources}})).await;
    has(&stream, 2, &[&authority, &new]).await;
    cluster.patch(&format!("{SOURCES}/authority"), &config_map("authority", &format!("{authority}{last}"))).await;
    has(&stream, 3, &[&authority, &last, &new]).await;

    // Without the Bundle, trust-manager removes the ConfigMap. The last good roots stay.
    cluster.delete(&format!("{BUNDLES}/{}", target.name)).await;
    let missed = |line: &Value| line["source"] == source && line.to_string().contains("the ConfigMap does not exist");
    eventually("the ConfigMap is missed again", PATIENCE, async || match agent.log().iter().filter(|line| missed(line)).count() {
        2 => Ok(()),
        count => Err(format!("missed {count} times")),
    })
    .await;
    let kept = workload.fetch_roots(&agent).await;
    assert_eq!(certificates(kept["trusted_ca_pem"].as_str().unwrap()), certificates(&[authority, last, new].concat()));
    stream.assert_undisturbed();
}
