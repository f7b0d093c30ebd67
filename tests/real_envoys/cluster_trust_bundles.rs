//! Roots in ClusterTrustBundles, with the real API server: by name, by signer and labels, through changes of the objects, without the
//! permission, and on an API server that does not serve them.

use serde_json::{Value, json};
use test_harness::{
    agent::Agent,
    cluster::Cluster,
    eventually,
    manifests::{documents, install, read},
    plane::Plan,
    scene::{PATIENCE, Scene, Stream, Workload},
};

/// The flags of a control plane that serves a version of the API.
const V1BETA1: [&str; 4] = [
    "--apiserver-arg",
    "--feature-gates=ClusterTrustBundle=true",
    "--apiserver-arg",
    "--runtime-config=certificates.k8s.io/v1beta1/clustertrustbundles=true",
];
const V1ALPHA1: [&str; 4] = [V1BETA1[0], V1BETA1[1], V1BETA1[2], "--runtime-config=certificates.k8s.io/v1alpha1/clustertrustbundles=true"];
/// The binding by which Kubernetes allows every service account to read ClusterTrustBundles.
const DEFAULT_BINDING: &str = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/system:cluster-trust-bundle-discovery";
const PARTNER: &str = "spiffe://partner.example";

fn root() -> String {
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    parameters.self_signed(&rcgen::KeyPair::generate().expect("a key")).expect("a root").pem()
}

/// The path of the objects in this version of the API.
fn path(version: &str) -> String {
    format!("/apis/certificates.k8s.io/{version}/clustertrustbundles")
}

async fn create(cluster: &Cluster, version: &str, name: &str, tier: &str, pem: &str) {
    let signer = name.rsplit_once(':').map(|(signer, _)| signer.replace(':', "/"));
    let object = json!({
        "apiVersion": format!("certificates.k8s.io/{version}"), "kind": "ClusterTrustBundle",
        "metadata": {"name": name, "labels": {"tier": tier}}, "spec": {"signerName": signer, "trustBundle": pem},
    });
    cluster.create(&path(version), &object).await;
}

/// Update number `count` of the stream has these roots, in this order.
async fn has(stream: &Stream, count: usize, roots: &[&str]) {
    let update = stream.update(count, PATIENCE).await;
    let plain = |pem: &str| pem.split_whitespace().collect::<String>();
    assert_eq!(plain(update["trusted_ca_pem"].as_str().expect("PEM")), plain(&roots.concat()), "update {count}");
}

/// The warnings about the source of this name, of which the last one has these words.
async fn told(agent: &Agent, source: &str, words: &str) -> usize {
    let warnings = || agent.log().into_iter().filter(|line| line["source"] == source && line["level"] == "WARN");
    let line = agent.logs(words, PATIENCE, |line| line["source"] == source && line.to_string().contains(words)).await;
    assert!(line.to_string().contains("the last good one stays in use"), "{line}");
    warnings().count()
}

/// Gives the agent's account the permissions of the component.
async fn install_component(cluster: &Cluster, scene: &Scene) {
    let mut objects = documents(&read("cluster-trust-bundles/rbac.yaml"));
    for object in &mut objects {
        if let Some(subject) = object.pointer_mut("/subjects/0") {
            let pod = &scene.agent_pod.pod;
            assert_eq!((&subject["name"], &subject["namespace"]), (&json!("sds-agent"), &json!("sds-agent")));
            *subject = json!({"kind": "ServiceAccount", "name": pod.service_account, "namespace": pod.namespace});
        }
    }
    install(cluster, &objects).await;
}

fn partner(workload: &Workload, agent: &Agent) -> Stream {
    workload.watch_named(agent.socket(), PARTNER)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roots_of_a_signer_and_of_a_name_follow_their_objects() {
    let (cluster, _plane) = Cluster::own(&V1BETA1).await;
    cluster.delete(DEFAULT_BINDING).await;
    let mut scene = Scene::new(&cluster).await;
    scene.agent_pod.trust = Some(
        "{ sources: [ { clusterTrustBundle: { signerName: example.com/mesh, labelSelector: { matchLabels: { tier: live }, \
         matchExpressions: [ { key: retired, operator: DoesNotExist } ] } } } ], \
         federated: { partner.example: { clusterTrustBundle: { name: partner-roots } } } }"
            .to_owned(),
    );
    let agent = scene.agent_pod.launch(scene.dir.path(), "").spawn();
    let forbidden = |line: &Value| line["resource"] == "clustertrustbundles.certificates.k8s.io" && line["level"] == "WARN";
    let line = agent.logs("the missing permission", PATIENCE, forbidden).await;
    let words = "lacks the verb list on clustertrustbundles.certificates.k8s.io in the whole cluster";
    assert!(line["error"].as_str().is_some_and(|error| error.contains(words)), "{line}");
    install_component(&cluster, &scene).await;

    let signer = "clusterTrustBundle signer example.com/mesh, labels tier=live,!retired";
    let workload = scene.workload("app").await;
    let (roots, partner) = (workload.watch_roots(agent.socket()), partner(&workload, &agent));
    told(&agent, signer, "no ClusterTrustBundle of this signer has these labels").await;
    told(&agent, "clusterTrustBundle partner-roots", "the ClusterTrustBundle does not exist").await;
    let state = agent.readiness().await.expect_err("it cannot be ready");
    assert!(state.contains("awaiting the trust bundle"), "{state}");

    // The union is in the order of the names, not of the creation. Only the objects of the signer with the labels count.
    let (authority, [first, third, fourth]) = (cluster.authority().await, [root(), root(), root()]);
    create(&cluster, "v1beta1", "example.com:mesh:b", "live", &authority).await;
    has(&roots, 1, &[&authority]).await;
    assert_eq!(workload.fetch(&agent).await["spiffe_id"], workload.id());
    create(&cluster, "v1beta1", "example.com:mesh:c", "canary", &third).await;
    create(&cluster, "v1beta1", "example.com:other:a", "live", &fourth).await;
    create(&cluster, "v1beta1", "a", "live", &fourth).await;
    create(&cluster, "v1beta1", "example.com:mesh:a", "live", &first).await;
    has(&roots, 2, &[&first, &authority]).await;
    let object = |name: &str| format!("{}/example.com:mesh:{name}", path("v1beta1"));
    cluster.patch(&object("c"), &json!({"metadata": {"labels": {"tier": "live"}}})).await;
    has(&roots, 3, &[&first, &authority, &third]).await;
    cluster.patch(&object("c"), &json!({"spec": {"trustBundle": fourth}})).await;
    has(&roots, 4, &[&first, &authority, &fourth]).await;
    cluster.delete(&object("a")).await;
    has(&roots, 5, &[&authority, &fourth]).await;
    cluster.patch(&object("c"), &json!({"metadata": {"labels": {"retired": ""}}})).await;
    has(&roots, 6, &[&authority]).await;
    // Without an object, the last good roots stay.
    cluster.delete(&object("b")).await;
    let logged = "no ClusterTrustBundle of this signer";
    eventually("the last object is missed", PATIENCE, async || match told(&agent, signer, logged).await {
        2 => Ok(()),
        other => Err(format!("{other} warnings")),
    })
    .await;
    assert_eq!(workload.fetch(&agent).await["spiffe_id"], workload.id());
    assert_eq!(roots.updates().len(), 6);

    assert_eq!(partner.updates().len(), 0);
    create(&cluster, "v1beta1", "partner-roots", "", &third).await;
    has(&partner, 1, &[&third]).await;
    cluster.patch(&format!("{}/partner-roots", path("v1beta1")), &json!({"spec": {"trustBundle": first}})).await;
    has(&partner, 2, &[&first]).await;
    [roots, partner].iter().for_each(Stream::assert_undisturbed);
    let doctor = scene.agent_pod.launch(scene.dir.path(), "").doctor(&[]).output().await.expect("doctor runs");
    let report = String::from_utf8_lossy(&doctor.stdout);
    assert!(report.contains("the API server serves clustertrustbundles.certificates.k8s.io in v1beta1"), "{report}");
    for place in
        ["clustertrustbundles.certificates.k8s.io in the whole cluster", "clustertrustbundles.certificates.k8s.io partner-roots in"]
    {
        assert!(report.contains(&format!("this account may list, watch {place}")), "{report}");
    }
}

/// The agent works with its other sources, logs how to get the kind, and reads it when the API server serves it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_server_without_the_kind_is_explained_once_and_asked_again() {
    let (cluster, plane) = Cluster::own(&[]).await;
    let mut scene = Scene::new(&cluster).await;
    scene.agent_pod.trust = Some(
        "{ sources: [ { configMap: { namespace: cert-manager, name: mesh-roots } } ], \
         federated: { partner.example: { clusterTrustBundle: { name: partner-roots } } } }"
            .to_owned(),
    );
    let agent = scene.agent_pod.launch(scene.dir.path(), "").start().await;
    let workload = scene.workload("app").await;
    let (partner, source) = (partner(&workload, &agent), "clusterTrustBundle partner-roots");
    told(&agent, source, "the API server does not serve ClusterTrustBundles").await;
    let line = agent.logs("the way out", PATIENCE, |line| line["source"] == source).await;
    let error = line["error"].as_str().expect("an error");
    for words in
        ["Kubernetes 1.37", "--feature-gates=ClusterTrustBundle=true", "--runtime-config=certificates.k8s.io/v1beta1/clustertrustbundles"]
    {
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(workload.fetch(&agent).await["spiffe_id"], workload.id());
    let doctor = scene.agent_pod.launch(scene.dir.path(), "").doctor(&[]).output().await.expect("doctor runs");
    let report: Value = serde_json::from_slice(&doctor.stdout).expect("JSON");
    let step = report["steps"].as_array().expect("steps").iter().find(|step| step["name"] == "trust bundles").expect("the step");
    assert_eq!((&step["result"], &step["detail"]), (&json!("failed"), &json!("the API server does not serve ClusterTrustBundles")));

    let plan: Plan = plane.kill();
    let _plane = plan.with(&V1ALPHA1).start().await;
    let pem = root();
    create(&cluster, "v1alpha1", "partner-roots", "", &pem).await;
    has(&partner, 1, &[&pem]).await;
    let warnings = agent.log().into_iter().filter(|line| line["source"] == source && line["level"] == "WARN");
    let warnings: Vec<_> = warnings.filter(|line| line.to_string().contains("does not serve")).collect();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
}
