//! `sds-agent doctor` about processes and pods of a node, beside the agent whose verdict it tells.

use std::path::Path;

use serde_json::Value;
use tokio::process::Command;

use crate::support::{
    agent::Launch,
    agent_pod::Right,
    child::{self, Child},
    cluster::Cluster,
    scene::{PATIENCE, Scene, Workload},
};

/// Runs `doctor` as `launch` would run the agent. Its exit code and its steps.
pub async fn doctor(launch: &Launch, arguments: &[&str]) -> (Option<i32>, Vec<Value>) {
    let output = child::finish(launch.doctor(arguments), PATIENCE).await;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let report: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}{}", String::from_utf8_lossy(&output.stderr)));
    let steps = report["steps"].as_array().expect("steps").clone();
    assert_eq!(report["healthy"], output.status.success());
    let failed = steps.iter().filter(|step| step["result"] == "failed");
    assert!(failed.clone().all(|step| step["remedy"].is_string()), "a failure without a remedy: {text}");
    assert_eq!(failed.count() == 0, output.status.success(), "{text}");
    (output.status.code(), steps)
}

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

/// The evidence of a step.
pub fn detail<'a>(steps: &'a [Value], name: &str) -> &'a str {
    steps.iter().find(|step| step["name"] == name).and_then(|step| step["detail"].as_str()).unwrap_or_else(|| panic!("no {name}"))
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

    // It is in its cgroup a moment after it was started.
    let good = crate::support::eventually("the doctor is content", PATIENCE, async || match doctor(&launch, &["--pid", &pid]).await {
        (Some(0), steps) => Ok(steps),
        (_, steps) => Err(format!("{steps:?}")),
    })
    .await;
    let order =
        ["socket", "process", "handle", "own prefix", "cgroups", "rights", "index", "service account", "verdict", "issuer", "requests"];
    assert_eq!(results(&good), order.map(|name| (name, "ok")));
    assert!(detail(&good, "cgroups").contains(&format!("[decided by pod{}]", workload.pod.uid)), "{good:?}");
    assert!(detail(&good, "socket").contains(&format!("process {} (sds-agent)", agent.process().pid())), "{good:?}");
    assert!(detail(&good, "verdict").ends_with(&workload.id()), "{good:?}");
    assert_eq!(workload.fetch(&agent).await["spiffe_id"], workload.id(), "the agent says otherwise");

    let (code, steps) = doctor(&launch, &["--pod", &name]).await;
    assert_eq!(code, Some(0), "{steps:?}");
    assert!(detail(&steps, "pod").contains(&workload.pod.uid) && detail(&steps, "verdict").ends_with(&workload.id()));

    // No process, no pod, no pod of this node, no pod at all.
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

    // A right that was taken is told before all that follows from it.
    scene.agent_pod.allow(Right::Pods, &["list"]).await;
    let (code, steps) = doctor(&launch, &["--pid", &pid]).await;
    assert_eq!(code, Some(77), "{steps:?}");
    assert!(detail(&steps, "rights").contains("may not watch pods"), "{steps:?}");
}

#[tokio::test]
async fn a_socket_without_an_agent_is_told() {
    let scene = Scene::new(&Cluster::connect().await).await;
    let launch = scene.agent_pod.launch(scene.dir.path(), "certificate: { lifetime: 1h }");
    let (code, steps) = doctor(&launch, &[]).await;
    assert_eq!((code, results(&steps)), (Some(69), vec![("socket", "failed"), ("rights", "ok"), ("issuer", "ok"), ("requests", "ok")]));
}
