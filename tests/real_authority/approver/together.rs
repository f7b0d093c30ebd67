//! Agents, approver and policy together: agents and other accounts keep working.

use std::time::{Duration, Instant};

use test_harness::{
    agent::Agent,
    cluster::Pod,
    eventually,
    scene::Workload,
    world::{GUARDED, NAMESPACE, PATIENCE, World},
};

const AGENT: &str = "system:serviceaccount:sds-agent:sds-agent";
const DECISIONS: &str = "sds_agent_approver_decisions_total";
const APPROVED: &str = "decision=\"approved\"";
const DENIED: &str = "decision=\"denied\"";

/// The whole path with only the permissions of `daemonset/`. A certificate costs the agent two writes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_of_two_nodes_get_their_certificates_by_two_writes_each() {
    const PODS: usize = 6;
    let world = World::start(&[GUARDED, &["--audit"]].concat()).await;
    world.install_policy().await;
    let approver = world.approver("approver-0", "1h").await;
    let shop = world.cluster.namespace().await;
    // Writes of other accounts before are not counted.
    let writes = |world: &World| -> Vec<String> {
        let lines = world.audit().into_iter().filter(|line| line["user"]["username"] == AGENT);
        let lines = lines.filter(|line| line["objectRef"]["resource"] == "certificaterequests");
        let verbs = lines.map(|line| line["verb"].as_str().unwrap().to_owned());
        verbs.filter(|verb| !matches!(verb.as_str(), "get" | "list" | "watch")).collect()
    };
    let before = writes(&world).len();

    let mut agents = Vec::new();
    for n in 0..2 {
        let node = world.cluster.node().await;
        let actor = world.actor(&format!("agent-{n}"), "sds-agent", &node).await;
        let agent = world.agent(&actor, "1h").await.start().await;
        for m in 0..PODS / 2 {
            let workload = Workload::of(world.cluster.pod(&shop, &format!("app-{n}-{m}"), &node).await);
            let got = workload.fetch(&agent).await;
            assert_eq!(got["spiffe_id"], workload.id());
        }
        agents.push(agent);
    }
    eventually("the requests are consumed", PATIENCE, async || {
        let left = world.requests(NAMESPACE).await;
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    let mut made = writes(&world).split_off(before);
    made.sort_unstable();
    println!("figure: {PODS} certificates: {} writes by the agents, of {} in the audit log", made.len(), before + made.len());
    let expected: Vec<_> = ["create"; PODS].into_iter().chain(["delete"; PODS]).collect();
    assert_eq!(made, expected);
    let approved = approver.counted(DECISIONS, &[APPROVED], 6.0).await;
    assert!((approved - 6.0).abs() < 0.5, "{approved}");
    let (sum, count) = (
        approver.metric("sds_agent_approver_decision_duration_seconds_sum").await,
        approver.metric("sds_agent_approver_decision_duration_seconds_count").await,
    );
    println!("figure: from a request's first sight to the written approval: {:.1} ms on average of {count}", sum / count * 1000.0);
}

/// The agent and the approver have different configurations, as during a rollout. The log names the difference, and the request is
/// approved without intervention once they agree.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_that_changes_the_configuration_is_waited_out() {
    let world = World::start(GUARDED).await;
    let node = world.cluster.node().await;
    let actor = world.actor("agent", "sds-agent", &node).await;
    let agent = world.agent(&actor, "1h").await.start().await;
    let old = world.approver("approver-old", "2h").await;
    let workload = Workload::of(world.cluster.pod(&world.cluster.namespace().await, "app", &node).await);
    let stream = workload.watch(agent.socket());
    let cause = |line: &serde_json::Value| {
        line["identity"] == workload.id() && line["cause"].as_str().is_some_and(|c| c.contains("ProfileMismatch"))
    };
    let line = agent.logs("the mismatch", PATIENCE, cause).await;
    let expected =
        "the duration is \"3600s\", and the approver's profile default requires \"7200s\": give agents and approver the same configuration";
    assert!(line["cause"].as_str().unwrap().contains(expected), "{line}");
    drop(old);
    let _new = world.approver("approver-new", "1h").await;
    assert_eq!(stream.update(1, PATIENCE).await["spiffe_id"], workload.id());
}

/// Lifetime and profile change, once with the approver first and once with the agent first. Requests are approved without intervention
/// and none is denied. After the overlap only the new configuration counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_the_configuration_denies_nobody_in_either_order() {
    const OVERLAP: Duration = Duration::from_secs(40);
    let world = World::start(GUARDED).await;
    let node = world.cluster.node().await;
    let actor = world.actor("agent", "sds-agent", &node).await;
    let shop = world.cluster.namespace().await;
    let app = async |name: &str| Workload::of(world.cluster.pod(&shop, name, &node).await);
    let (approver, mut mounted) = world.approver_with_overlap("approver", "1h", "40s").await;
    let reloaded = async |approver: &Agent, count: f64| {
        eventually("the approver has the new file", PATIENCE, async || {
            let reloads = approver.metric_of("sds_agent_configuration_reloads_total", &["result=\"ok\""]).await;
            if reloads >= count { Ok(()) } else { Err(reloads.to_string()) }
        })
        .await;
    };
    // The test restarts the agent with each configuration, because the live change is not under test here.
    let run = async |lifetime: &str, key: &str| world.agent(&actor, &format!("{lifetime}, key: {key}")).await.start().await;
    let first = run("1h", "ecdsa-p256").await;
    let workload = app("before").await;
    assert_eq!(workload.fetch(&first).await["spiffe_id"], workload.id());

    // The approver is first: with an agent that has the previous configuration, and then with one that has the new one.
    mounted.publish(&mounted.text.replace("lifetime: 1h", "lifetime: 2h"));
    reloaded(&approver, 1.0).await;
    let workload = app("behind").await;
    assert_eq!(workload.fetch(&first).await["spiffe_id"], workload.id());
    let former = approver.metric("sds_agent_approver_former_approvals_total").await;
    assert!((0.5..1.5).contains(&former), "{former}");
    first.kill().await;
    let second = run("2h", "ecdsa-p256").await;
    let workload = app("same").await;
    assert_eq!(workload.fetch(&second).await["spiffe_id"], workload.id());
    second.kill().await;

    // The agent is first: its request waits only until the approver has the file too.
    let third = run("3h", "rsa-2048").await;
    let workload = app("ahead").await;
    let stream = workload.watch(third.socket());
    approver.logs("it waits", PATIENCE, |line| line["reason"] == "ProfileMismatch" && line["seconds"].is_u64()).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(stream.updates().len(), 0);
    let good = mounted.text.replace("lifetime: 2h", "lifetime: 3h, key: rsa-2048");
    mounted.publish("certificate: { lifetime: for ever }\n");
    approver.logs("the file is wrong", PATIENCE, |line| line["field"] == "certificate.lifetime").await;
    let start = Instant::now();
    mounted.publish(&good);
    assert_eq!(stream.update(1, PATIENCE).await["spiffe_id"], workload.id());
    println!("figure: from the approver's new file to the certificate of an agent that was ahead: {:?}", start.elapsed());
    reloaded(&approver, 2.0).await;
    assert_eq!(approver.counted(DECISIONS, &[APPROVED], 4.0).await, 4.0);
    assert_eq!(approver.metric_of(DECISIONS, &[DENIED]).await, 0.0);

    // After the overlap the previous files do not count.
    third.kill().await;
    tokio::time::sleep(OVERLAP).await;
    let late = run("2h", "ecdsa-p256").await;
    let workload = app("late").await;
    let _stream = workload.watch(late.socket());
    late.logs("the denial", 2 * PATIENCE, |line| line["cause"].as_str().is_some_and(|cause| cause.contains("ProfileMismatch"))).await;
    approver.counted(DECISIONS, &[DENIED], 1.0).await;
}

/// The pod that represents a shared identity ends before the approval: another pod of the identity replaces it at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sibling_stands_in_for_a_pod_that_went_before_the_approval() {
    let world = World::start(GUARDED).await;
    let node = world.cluster.node().await;
    let actor = world.actor("agent", "sds-agent", &node).await;
    let agent = world.agent(&actor, "1h").await.start().await;
    let shop = world.cluster.namespace().await;
    let first = Workload::of(world.cluster.pod(&shop, "app", &node).await);
    let _asks = first.watch(agent.socket());
    let request = eventually("the request", PATIENCE, async || world.requests(NAMESPACE).await.pop().ok_or_else(String::new)).await;
    let sibling = Workload::of(world.cluster.pod_of(&shop, "app", "app-2", &node).await);
    let stream = sibling.watch(agent.socket());
    eventually("the agent knows the sibling", PATIENCE, async || {
        let known = agent.certificate(&sibling.id()).await.ok_or_else(|| "no identity".to_owned())?;
        if known["subscribers"] == 2 { Ok(()) } else { Err(known.to_string()) }
    })
    .await;
    let Pod { name, .. } = &first.pod;
    world.cluster.delete(&first.pod.path()).await;
    eventually("the pod is deleted", PATIENCE, async || match world.cluster.try_get(&first.pod.path()).await {
        Err(_) => Ok(()),
        Ok(_) => Err(name.clone()),
    })
    .await;
    let approver = world.approver("approver-0", "1h").await;
    assert_eq!(stream.update(1, PATIENCE).await["spiffe_id"], sibling.id());
    let gone = approver.metric_of(DECISIONS, &["reason=\"PodGone\""]).await;
    // The agent may have deleted the request itself when the pod ended.
    assert!(gone < 1.5, "{gone}");
    println!("figure: {request}: denied {gone} times before the sibling's was approved");
}
