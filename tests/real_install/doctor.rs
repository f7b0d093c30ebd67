//! `sds-agent doctor` for processes and pods of a node, compared with the agent's own result.

use std::path::Path;

use serde_json::Value;
use test_harness::{
    agent::Launch,
    agent_pod::Right,
    child::Child,
    cluster::Cluster,
    doctor::{detail, doctor},
    scene::{PATIENCE, Scene, Workload},
};
use tokio::process::Command;

fn results(steps: &[Value]) -> Vec<(&str, &str)> {
    steps.iter().filter_map(|step| Some((step["name"].as_str()?, step["result"].as_str()?))).collect()
}

fn failed(steps: &[Value]) -> Vec<&str> {
    results(steps).into_iter().filter(|(_, result)| *result == "failed").map(|(name, _)| name).collect()
}

fn sleeper(workload: &Workload) -> Child {
    let mut command: Command = workload.cgroup.command(Path::new("sleep"));
    Child::spawn("sleep", command.arg("600"))
}

#[tokio::test]
async fn the_doctor_tells_the_agents_verdict_and_its_evidence() {
    let scene = Scene::new(&Cluster::connect().await).await;
    let launch = scene.agent_pod.launch(scene.dir.path(), "certificate: { lifetime: 1h }");
    let agent = launch.start().await;
    let workload = scene.workload("app").await;
    let process = sleeper(&workload);
    let pid = process.pid().to_string();
    let name = format!("{}/{}", workload.pod.namespace, workload.pod.name);

    // The process is in its cgroup shortly after its start.
    let good = test_harness::eventually("the doctor is content", PATIENCE, async || match doctor(&launch, &["--pid", &pid]).await {
        (Some(0), steps) => Ok(steps),
        (_, steps) => Err(format!("{steps:?}")),
    })
    .await;
    let order =
        ["socket", "process", "handle", "own prefix", "cgroups", "rights", "index", "service account", "verdict", "issuer", "requests"];
    // No request exists now, so no request is approved.
    let unknown = ("approver", "unknown");
    assert_eq!(results(&good), order.into_iter().map(|name| (name, "ok")).chain([unknown]).collect::<Vec<_>>());
    assert!(detail(&good, "cgroups").contains(&format!("[decided by pod{}]", workload.pod.uid)), "{good:?}");
    assert!(detail(&good, "socket").contains(&format!("process {} (sds-agent)", agent.process().pid())), "{good:?}");
    assert!(detail(&good, "verdict").ends_with(&workload.id()), "{good:?}");
    assert_eq!(workload.fetch(&agent).await["spiffe_id"], workload.id(), "the agent disagrees");

    let (code, steps) = doctor(&launch, &["--pod", &name]).await;
    assert_eq!(code, Some(0), "{steps:?}");
    assert!(detail(&steps, "pod").contains(&workload.pod.uid) && detail(&steps, "verdict").ends_with(&workload.id()));

    // A process outside of pods, a process that does not exist, a pod of another node, an unknown pod.
    let outside = std::process::id().to_string();
    let (code, steps) = doctor(&launch, &["--pid", &outside]).await;
    assert_eq!((code, failed(&steps)), (Some(77), vec!["cgroups", "verdict"]));
    assert!(detail(&steps, "verdict").starts_with("not_in_pod: "), "{steps:?}");
    let (code, steps) = doctor(&launch, &["--pid", &i32::MAX.to_string()]).await;
    assert_eq!((code, failed(&steps)), (Some(1), vec!["process"]));
    let elsewhere = scene.cluster.pod(&scene.namespace, "elsewhere", &scene.cluster.node().await).await;
    for pod in [format!("{}/{}", elsewhere.namespace, elsewhere.name), format!("{}/nobody", scene.namespace)] {
        let (code, steps) = doctor(&launch, &["--pod", &pod]).await;
        assert_eq!((code, failed(&steps)), (Some(1), vec!["pod"]), "{pod}");
    }

    // A revoked permission is reported before its consequences.
    scene.agent_pod.allow(Right::Pods, &["list"]).await;
    let (code, steps) = doctor(&launch, &["--pid", &pid]).await;
    assert_eq!(code, Some(77), "{steps:?}");
    assert!(detail(&steps, "rights").contains("may not watch pods"), "{steps:?}");
}

/// The result of a step.
fn result<'a>(steps: &'a [Value], name: &str) -> &'a str {
    results(steps).into_iter().find(|(found, _)| *found == name).map_or("absent", |(_, result)| result)
}

#[tokio::test]
async fn a_survey_tells_of_the_agent_its_node_and_its_rights() {
    let scene = Scene::new(&Cluster::connect().await).await;
    let launch = scene.agent_pod.launch(scene.dir.path(), "certificate: { lifetime: 1h }");
    let (code, steps) = doctor(&launch, &[]).await;
    assert_eq!((code, failed(&steps)), (Some(69), vec!["socket", "agent"]), "there is no agent: {steps:?}");

    let agent = launch.start().await;
    let (code, steps) = doctor(&launch, &[]).await;
    assert_eq!((code, failed(&steps)), (Some(0), vec![]), "{steps:?}");
    let names: Vec<_> = results(&steps).into_iter().map(|(name, _)| name).collect();
    let order = [
        "socket",
        "health",
        "directory",
        "mounts",
        "agent",
        "readiness",
        "open files",
        "memory lock",
        "kernel",
        "host pids",
        "own prefix",
        "api server",
        "clock",
        "rights",
        "verdict",
        "issuer",
        "requests",
        "approver",
    ];
    assert_eq!(names, order);
    for name in ["socket", "health", "agent", "readiness", "kernel", "host pids", "api server", "clock", "rights", "issuer", "requests"] {
        assert_eq!(result(&steps, name), "ok", "{steps:?}");
    }
    assert!(detail(&steps, "open files").starts_with("the agent has "), "{steps:?}");
    assert!(detail(&steps, "memory lock").starts_with("the agent's memory is "), "{steps:?}");
    assert!(detail(&steps, "verdict").starts_with("this process is in no pod"), "{steps:?}");
    let namespace = &scene.agent_pod.pod.namespace;
    let requests = format!("may create, get, list, watch, delete certificaterequests.cert-manager.io in namespace {namespace}");
    assert!(detail(&steps, "rights").contains(&requests), "{steps:?}");

    // A missing optional permission is a warning; a missing required one is named with its verb.
    scene.agent_pod.allow(Right::Events, &[]).await;
    let (code, steps) = doctor(&launch, &[]).await;
    assert_eq!((code, result(&steps, "rights")), (Some(0), "warning"));
    assert!(detail(&steps, "rights").starts_with("this account may not create events.events.k8s.io in the whole cluster"), "{steps:?}");
    scene.agent_pod.allow(Right::Requests, &["create", "get", "list", "watch"]).await;
    let (code, steps) = doctor(&launch, &[]).await;
    assert_eq!((code, failed(&steps)), (Some(77), vec!["rights"]));
    let lack = format!("this account may not delete certificaterequests.cert-manager.io in namespace {namespace}\n");
    assert!(detail(&steps, "rights").starts_with(&lack), "{steps:?}");

    // A killed agent leaves its socket behind.
    agent.kill().await;
    let (code, steps) = doctor(&launch, &[]).await;
    assert_eq!((code, failed(&steps)), (Some(69), vec!["socket", "agent", "rights"]));
    assert!(detail(&steps, "socket").contains("left by an agent that ended"), "{steps:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_away_is_69_and_nothing_else_is_asked_of_it() {
    let (cluster, plane) = Cluster::own(&[]).await;
    let scene = Scene::new(&cluster).await;
    let launch = scene.agent_pod.launch(scene.dir.path(), "certificate: { lifetime: 1h }");
    let agent = launch.start().await;
    drop(plane);
    let (code, steps) = doctor(&launch, &[]).await;
    assert_eq!((code, failed(&steps)), (Some(69), vec!["api server"]), "{steps:?}");
    assert!(detail(&steps, "api server").contains("the connection was refused"), "{steps:?}");
    assert_eq!(steps.last().expect("a step")["name"], "api server");
    assert_eq!(result(&steps, "readiness"), "ok", "its trouble is not the agent's: {steps:?}");
    drop(agent);
}

/// Neither a cluster nor a reference to one exists.
#[tokio::test]
async fn by_user_id_there_is_no_cluster_to_ask() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let launch = Launch::run(dir.path(), "attestation: unix\nissuer: { embedded: {} }\n");
    let agent = launch.start().await;
    let (code, steps) = doctor(&launch, &[]).await;
    assert_eq!((code, failed(&steps)), (Some(0), vec![]), "{steps:?}");
    assert_eq!((result(&steps, "api server"), result(&steps, "verdict")), ("absent", "ok"), "{steps:?}");

    // A workload has mounted the socket file instead of its directory: this file does not change when a new agent creates its socket.
    let mounted = dir.path().join("mounted");
    std::fs::write(&mounted, "").expect("a file to mount on");
    let script = format!("mount --bind {} {} && exec sleep 600", agent.socket().display(), mounted.display());
    let mut command = Command::new("unshare");
    let workload = Child::spawn("a workload", command.args(["--mount", "--propagation", "private", "sh", "-c", &script]));
    let pid = workload.pid().to_string();
    let says = async |wanted: &str, words: &str| {
        test_harness::eventually(&format!("the mounts are {wanted}"), PATIENCE, async || {
            let (_, steps) = doctor(&launch, &[]).await;
            let told = detail(&steps, "mounts");
            if result(&steps, "mounts") == wanted && told.contains(words) && told.contains(&pid) {
                Ok(())
            } else {
                Err(format!("{steps:?}"))
            }
        })
        .await;
    };
    says("warning", "mount the socket file, which becomes invalid when this agent ends").await;
    agent.kill().await;
    let _successor = launch.start().await;
    says("failed", "refer to a deleted socket").await;
}
