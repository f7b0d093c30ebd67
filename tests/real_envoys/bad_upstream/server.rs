//! An API server that is unavailable for some time, and one without cert-manager's resources.

use std::time::Duration;

use serde_json::{Value, json};
use test_harness::{
    agent::Agent,
    cluster::{Cluster, ISSUER},
    eventually,
    scene::{PATIENCE, Scene},
};

use super::{HASTY, is_failure};

/// Limit from the API server's return until everything works: its start, and the longest pause between retries.
const RETURN: Duration = Duration::from_secs(60);
const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_away_costs_nobody_a_certificate_or_a_stream() {
    let (cluster, plane) = Cluster::own(&[]).await;
    let scene = Scene::new(&cluster).await;
    let launch = scene.agent_pod.launch(scene.dir.path(), "certificate: { lifetime: 1h }");
    let agent = launch.start().await;
    let (early, late) = (scene.workload("early").await, scene.workload("late").await);
    let before = early.watch(agent.socket());
    let first = before.update(1, PATIENCE).await;

    // The API server freezes, then ends: existing certificates are still served, new callers wait.
    plane.freeze();
    assert_eq!(early.fetch(&agent).await["serial"], first["serial"]);
    let plan = plane.kill();
    assert_eq!(early.fetch(&agent).await["serial"], first["serial"]);
    assert_eq!(early.fetch_roots(&agent).await["kind"], "bundle");
    assert_waits(&agent, &late).await;
    before.assert_undisturbed();
    agent.kill().await;

    // An agent that starts during the outage opens its socket and holds the streams of its callers.
    let agent = launch.spawn();
    agent.logs("serving", PATIENCE, |line| line["message"] == "serving").await;
    let held = [early.watch(agent.socket()), late.watch(agent.socket())];
    let refused = |line: &Value| line["message"] == "the watch does not work; trying again" && line["resource"] == "pods";
    let line = agent.logs("the unavailable server", PATIENCE, refused).await;
    assert!(line["error"].as_str().is_some_and(|error| error.contains("the connection was refused")), "{line}");
    assert_waits(&agent, &late).await;
    let state = agent.readiness().await.expect_err("it cannot be ready");
    assert!(state.contains("awaiting the pod index") && state.contains("awaiting the watch of requests"), "{state}");

    let _plane = plan.start().await;
    for (stream, workload) in held.iter().zip([&early, &late]) {
        assert_eq!(stream.update(1, RETURN).await["spiffe_id"], workload.id());
        stream.assert_undisturbed();
    }
    eventually("the agent is ready", PATIENCE, async || agent.readiness().await).await;
    eventually("the requests are consumed", PATIENCE, async || {
        let left = scene.requests().await;
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
}

/// A client with a short timeout gets an error that allows a retry, and not a permanent one.
async fn assert_waits(agent: &Agent, workload: &test_harness::scene::Workload) {
    let refusal = workload.refusal(agent, "500ms").await;
    assert_eq!(refusal.code, 69, "{refusal:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_resources_nothing_is_issued_and_nothing_is_lost() {
    let (cluster, _plane) = Cluster::own(&[]).await;
    let scene = Scene::new(&cluster).await;
    let agent = scene.agent_pod.launch(scene.dir.path(), HASTY).start().await;
    let (served, newcomer) = (scene.workload("served").await, scene.workload("newcomer").await);
    let stream = served.watch(agent.socket());
    let first = stream.update(1, PATIENCE).await;

    let names = ["certificaterequests.cert-manager.io", "clusterissuers.cert-manager.io"];
    let mut definitions = Vec::new();
    for name in names {
        definitions.push(cluster.get(&format!("{CRDS}/{name}")).await);
        cluster.delete(&format!("{CRDS}/{name}")).await;
    }
    let waiting = newcomer.watch(agent.socket());
    for workload in [&served, &newcomer] {
        // While the definition is being deleted, the first missing object is its issuer.
        let id = workload.id();
        let says = |line: &Value| {
            line["cause"]
                .as_str()
                .is_some_and(|c| c.contains("cert-manager's CRDs are not installed in this cluster: install cert-manager"))
        };
        agent.logs("the missing definitions are reported", RETURN, |line| is_failure(line, &id) && says(line)).await;
    }
    assert_eq!(served.fetch(&agent).await["serial"], first["serial"]);
    assert_eq!(stream.updates().len(), 1);
    assert!(agent.metric_of("sds_agent_issuances_total", &["result=\"api_error\""]).await > 1.5);

    // An agent of another node that starts during the outage.
    let other = Scene::new(&cluster).await;
    let starting = other.agent_pod.launch(other.dir.path(), HASTY).spawn();
    starting.logs("serving", PATIENCE, |line| line["message"] == "serving").await;
    let early = other.workload("early").await;
    let held = early.watch(starting.socket());
    let told = |line: &Value| line["message"] == "the watch does not work; trying again" && line["resource"] == names[0];
    let line = starting.logs("the missing resources", PATIENCE, told).await;
    assert!(line["error"].as_str().is_some_and(|error| error.contains("install cert-manager")), "{line}");
    let state = starting.readiness().await.expect_err("it cannot be ready");
    assert!(state.contains("awaiting the watch of requests"), "{state}");

    for definition in definitions {
        let metadata = json!({"name": definition["metadata"]["name"], "labels": definition["metadata"]["labels"]});
        cluster.create(CRDS, &json!({"metadata": metadata, "spec": definition["spec"]})).await;
    }
    let issuer = json!({
        "apiVersion": "cert-manager.io/v1", "kind": "ClusterIssuer",
        "metadata": {"name": ISSUER}, "spec": {"ca": {"secretName": "ca-key-pair"}},
    });
    eventually("the issuer is back", PATIENCE, async || {
        cluster.try_create("/apis/cert-manager.io/v1/clusterissuers", &issuer).await.map_err(|e| e.to_string())
    })
    .await;
    assert_ne!(stream.update(2, RETURN).await["serial"], first["serial"]);
    assert_eq!(waiting.update(1, RETURN).await["spiffe_id"], newcomer.id());
    assert_eq!(held.update(1, RETURN).await["spiffe_id"], early.id());
    eventually("the other agent is ready", PATIENCE, async || starting.readiness().await).await;
    [stream, waiting, held].iter().for_each(test_harness::scene::Stream::assert_undisturbed);
}
