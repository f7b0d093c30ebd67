//! Trust sources that are forbidden, missing, empty or garbage, before and after a first valid bundle.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::json;
use test_harness::{
    agent::Agent,
    agent_pod::Right,
    cluster::Cluster,
    eventually,
    scene::{PATIENCE, Scene},
};

use super::HASTY;

#[tokio::test]
async fn a_bundle_that_goes_bad_changes_nothing() {
    let cluster = Cluster::connect().await;
    let mut scene = Scene::new(&cluster).await;
    scene.agent_pod = scene.agent_pod.with_own_roots().await;
    scene.agent_pod.allow(Right::Trust, &[]).await;
    let agent = scene.agent_pod.launch(scene.dir.path(), HASTY).spawn();
    let workload = scene.workload("app").await;

    let is_it = |line: &serde_json::Value| line["resource"] == "configmaps roots" && line["level"] == "WARN";
    let line = agent.logs("the ConfigMap that is forbidden", PATIENCE, is_it).await;
    assert!(line["error"].as_str().is_some_and(|error| error.contains("lacks the verb list on configmaps roots")), "{line}");
    // The agent does not serve a certificate that it cannot verify.
    let (certificate, roots) = (workload.watch(agent.socket()), workload.watch_roots(agent.socket()));
    scene.agent_pod.allow(Right::Trust, &["get", "list", "watch"]).await;
    refused(&agent, 1, "the ConfigMap does not exist").await;
    let state = agent.readiness().await.expect_err("it cannot be ready");
    assert!(state.contains("awaiting the trust bundle"), "{state}");
    assert!(certificate.updates().is_empty() && roots.updates().is_empty());

    let namespace = scene.agent_pod.pod.namespace.clone();
    let maps = format!("/api/v1/namespaces/{namespace}/configmaps");
    let authority = cluster.authority().await;
    let good = json!({"metadata": {"name": "roots"}, "data": {"ca.crt": authority}});
    cluster.create(&maps, &good).await;
    let first = roots.update(1, PATIENCE).await;
    assert_eq!(certificate.update(1, PATIENCE).await["spiffe_id"], workload.id());
    eventually("the agent is ready", PATIENCE, async || agent.readiness().await).await;

    let path = format!("{maps}/roots");
    cluster.patch(&path, &json!({"data": {"ca.crt": ""}})).await;
    refused(&agent, 2, "holds no certificate").await;
    cluster.patch(&path, &json!({"data": {"ca.crt": "garbage"}})).await;
    refused(&agent, 3, "holds no certificate").await;
    cluster.patch(&path, &json!({"data": {"ca.crt": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"}})).await;
    refused(&agent, 4, "is not valid X.509").await;
    cluster.patch(&path, &json!({"data": {"ca.crt": null, "ca.pem": authority}})).await;
    refused(&agent, 5, "the ConfigMap has no such key, only [\\\"ca.pem\\\"]").await;
    cluster.delete(&path).await;
    refused(&agent, 6, "the ConfigMap does not exist").await;
    // The agent still verifies and renews certificates with the last valid bundle.
    certificate.update(2, PATIENCE).await;
    assert_eq!(workload.fetch_roots(&agent).await["trusted_ca_pem"], first["trusted_ca_pem"]);
    assert_eq!(roots.updates().len(), 1, "something was pushed");

    let key = rcgen::KeyPair::generate().expect("a key");
    let another = rcgen::CertificateParams::new(Vec::new()).expect("parameters").self_signed(&key).expect("a root").pem();
    cluster.create(&maps, &json!({"metadata": {"name": "roots"}, "data": {"ca.crt": format!("{authority}{another}")}})).await;
    let second = roots.update(2, PATIENCE).await;
    assert_ne!(second["trusted_ca_pem"], first["trusted_ca_pem"]);

    // As `kubectl create configmap --from-file` writes a file with one byte of Latin-1.
    let latin = BASE64_STANDARD.encode([b"# \xe9\n", authority.as_bytes()].concat());
    cluster.patch(&path, &json!({"data": null, "binaryData": {"ca.crt": latin}})).await;
    assert_eq!(roots.update(3, PATIENCE).await["trusted_ca_pem"], first["trusted_ca_pem"]);
    [certificate, roots].iter().for_each(test_harness::scene::Stream::assert_undisturbed);
}

/// Waits until the source had no valid content for the `count`th time. Each failure is counted and logged once, with these words.
async fn refused(agent: &Agent, count: usize, words: &str) {
    let told = || agent.log().into_iter().filter(|line| line["source"].as_str().is_some() && line["level"] == "WARN");
    eventually(&format!("rejected for the {count}th time: {words}"), PATIENCE, async || {
        let told = told().count();
        if told >= count { Ok(()) } else { Err(format!("logged {told} times")) }
    })
    .await;
    let told: Vec<_> = told().collect();
    assert_eq!(told.len(), count, "{told:?}");
    let last = told.last().expect("a warning").to_string();
    assert!(last.contains(words) && last.contains("the last good one stays in use"), "{last}");
    let counted = agent.metric("sds_agent_bundles_refused_total").await;
    #[expect(clippy::cast_precision_loss, reason = "a few")]
    let same = (counted - count as f64).abs() < 0.5;
    assert!(same, "{count} logged, {counted} counted");
}
