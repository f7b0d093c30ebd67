//! Permissions that the agent does not have, or that are revoked and granted again.

use test_harness::{
    agent_pod::Right,
    cluster::Cluster,
    eventually,
    scene::{PATIENCE, Scene},
};

use super::{HASTY, failure, failures};

#[tokio::test]
async fn a_right_that_is_taken_and_given_back_costs_nobody_a_certificate() {
    let cluster = Cluster::connect().await;
    let scene = Scene::new(&cluster).await;
    let agent = scene.agent_pod.launch(scene.dir.path(), HASTY).start().await;
    let (served, newcomer) = (scene.workload("served").await, scene.workload("newcomer").await);
    let stream = served.watch(agent.socket());
    let first = stream.update(1, PATIENCE).await;

    scene.agent_pod.allow(Right::Requests, &["get", "list", "watch", "delete"]).await;
    let waiting = newcomer.watch(agent.socket());
    let namespace = &scene.agent_pod.pod.namespace;
    let lack = format!(
        "create certificaterequests.cert-manager.io in namespace {namespace}: forbidden by RBAC: this program's service account lacks the verb \
         create on certificaterequests.cert-manager.io in namespace {namespace}"
    );
    for workload in [&served, &newcomer] {
        assert_eq!(failure(&agent, &workload.id(), PATIENCE).await, lack);
    }
    assert_eq!(served.fetch(&agent).await["serial"], first["serial"]);
    assert_eq!(stream.updates().len(), 1);
    assert!(waiting.updates().is_empty());
    assert!(agent.metric_of("sds_agent_issuances_total", &["result=\"api_error\""]).await > 1.5);
    assert!(agent.metric_of("sds_agent_kube_requests_total", &["verb=\"create\"", "code=\"403\""]).await > 1.5);

    scene.agent_pod.allow(Right::Requests, &["create", "get", "list", "watch", "delete"]).await;
    assert_ne!(stream.update(2, PATIENCE).await["serial"], first["serial"]);
    assert_eq!(waiting.update(1, PATIENCE).await["spiffe_id"], newcomer.id());
    [stream, waiting].iter().for_each(test_harness::scene::Stream::assert_undisturbed);
}

/// Lists show the same objects as the watch, so the agent still serves, slowly. It logs the missing permission once and retries less and
/// less often.
#[tokio::test]
async fn a_watch_that_is_forbidden_is_told_once_and_asked_for_ever_less() {
    let cluster = Cluster::connect().await;
    let scene = Scene::new(&cluster).await;
    scene.agent_pod.allow(Right::Requests, &["create", "get", "list", "delete"]).await;
    let agent = scene.agent_pod.launch(scene.dir.path(), HASTY).start().await;
    let lack = "forbidden by RBAC: this program's service account lacks the verb watch on certificaterequests.cert-manager.io in namespace";
    let about = |line: &serde_json::Value, message: &str| {
        line["resource"] == "certificaterequests.cert-manager.io" && line["message"].as_str().is_some_and(|text| text.contains(message))
    };
    let line = agent.logs("the watch that is forbidden", PATIENCE, |line| about(line, "the watch does not work")).await;
    assert!(line["error"].as_str().is_some_and(|error| error.contains(lack)), "{line}");

    let forbidden = ["verb=\"watch\"", "resource=\"certificaterequests\"", "code=\"403\""];
    eventually("it tries again", PATIENCE, async || {
        let tries = agent.metric_of("sds_agent_kube_requests_total", &forbidden).await;
        if tries > 3.5 { Ok(()) } else { Err(format!("{tries} tries")) }
    })
    .await;
    let told = agent.log().iter().filter(|line| about(line, "the watch ")).count();
    assert_eq!(told, 1, "the same failure is logged repeatedly");

    assert!(agent.metric_of("sds_agent_watch_restarts_total", &["reason=\"start_failed\""]).await > 3.5);

    let workload = scene.workload("app").await;
    let stream = workload.watch(agent.socket());
    stream.update(1, PATIENCE).await;
    scene.agent_pod.allow(Right::Requests, &["create", "get", "list", "watch", "delete"]).await;
    // The next certificate comes by the watch and so proves that it works.
    stream.update(2, PATIENCE).await;
    agent.logs("the watch that works", PATIENCE, |line| about(line, "the watch works again")).await;
    stream.assert_undisturbed();
}

#[tokio::test]
async fn an_issuer_that_may_not_be_looked_at_is_used_all_the_same() {
    let cluster = Cluster::connect().await;
    let scene = Scene::new(&cluster).await;
    scene.agent_pod.allow(Right::ClusterIssuers, &[]).await;
    let agent = scene.agent_pod.launch(scene.dir.path(), HASTY).start().await;
    let workload = scene.workload("app").await;
    assert_eq!(workload.fetch(&agent).await["spiffe_id"], workload.id());
    let is_it = |line: &serde_json::Value| line["issuer"] == "mesh-ca" && line["level"] == "WARN";
    agent.logs("the issuer that may not be looked at", PATIENCE, is_it).await;
    let warnings: Vec<_> = agent.log().into_iter().filter(is_it).collect();
    let [warning] = &warnings[..] else { panic!("not one warning: {warnings:?}") };
    assert_eq!(warning["message"], "the issuer cannot be checked; going on without");
    let lack = "lacks the verb get on clusterissuers.cert-manager.io in the whole cluster";
    assert!(warning["error"].as_str().is_some_and(|error| error.contains(lack)), "{warning}");
    assert!(failures(&agent, &workload.id()).is_empty());
}

/// The agent cannot identify callers, so it rejects none: the socket is open, streams wait, and the agent is not ready.
#[tokio::test]
async fn without_pods_callers_wait() {
    let cluster = Cluster::connect().await;
    let scene = Scene::new(&cluster).await;
    scene.agent_pod.allow(Right::Pods, &[]).await;
    let launch = scene.agent_pod.launch(scene.dir.path(), HASTY);
    let agent = launch.spawn();
    let is_it = |line: &serde_json::Value| line["resource"] == "pods" && line["level"] == "WARN";
    let line = agent.logs("the pods that are forbidden", PATIENCE, is_it).await;
    let lack = "lacks the verb list on pods in the whole cluster";
    assert!(line["error"].as_str().is_some_and(|error| error.contains(lack)), "{line}");

    let workload = scene.workload("app").await;
    let stream = workload.watch(agent.socket());
    let refusal = workload.refusal(&agent, "1s").await;
    assert_eq!(refusal.code, 69, "{refusal:?}");
    let state = agent.readiness().await.expect_err("it cannot be ready");
    assert!(state.contains("503") && state.contains("awaiting the pod index"), "{state}");
    assert!(stream.updates().is_empty());

    scene.agent_pod.allow(Right::Pods, &["list", "watch"]).await;
    assert_eq!(stream.update(1, PATIENCE).await["spiffe_id"], workload.id());
    stream.assert_undisturbed();
    eventually("the agent is ready", PATIENCE, async || agent.readiness().await).await;
    assert!(agent.metric_of("sds_agent_attestations_total", &["result=\"refused\""]).await < 0.5);
}
