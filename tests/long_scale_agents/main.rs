//! The cost of agents for the cluster, with 200 real ones: `make test-long GROUP=scale-agents`.
//!
//! The limits are counts and sizes for each agent, which do not depend on the speed of the machine.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::cast_precision_loss,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "tests write files for other programs, wait for those, and fail loudly"
)]

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use serde_json::json;
use test_harness::{
    agent::Agent,
    cluster::{Cluster, labels},
    eventually, manifests, memory,
    plane::Plane,
    turn,
    world::World,
};

const AGENTS: usize = 200;
/// Pods of a node, as the control plane's flag `--pods` creates them.
const PODS: usize = 30;
/// Agents that start concurrently.
const AT_ONCE: usize = 8;
const PATIENCE: Duration = Duration::from_secs(300);
/// Time in which an idle agent makes no request.
const IDLE: Duration = Duration::from_secs(30);
/// Watches of an agent: its pods, its requests and the roots.
const WATCHES: f64 = 3.0;
/// Maximum number of requests for the start of an agent, without its watches.
const REQUESTS: f64 = 8.0;
/// Maximum heap in use that one agent adds to the API server, in bytes, garbage included.
const HEAP: f64 = 4.0 * 1024.0 * 1024.0;
/// Maximum bytes of watch events for one change of a pod of an agent's node.
const CHANGE: f64 = 32.0 * 1024.0;
const ACCOUNT: &str = "system:serviceaccount:sds-agent:sds-agent";

fn node(n: usize) -> String {
    format!("crowd-{n:06}-node")
}

/// The sum of the API server's samples of a metric whose labels contain all of `words`.
async fn metric(cluster: &Cluster, name: &str, words: &[&str]) -> f64 {
    let text = cluster.text("/metrics").await;
    let is_it = |line: &&str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{') || rest.starts_with(' '))
            && words.iter().all(|word| line.contains(word))
    };
    text.lines().filter(is_it).map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

async fn watches(cluster: &Cluster) -> f64 {
    metric(cluster, "apiserver_longrunning_requests", &["verb=\"WATCH\""]).await
}

async fn heap(cluster: &Cluster) -> f64 {
    metric(cluster, "go_memstats_heap_inuse_bytes", &[]).await + metric(cluster, "go_memstats_stack_inuse_bytes", &[]).await
}

async fn watched_bytes(cluster: &Cluster) -> f64 {
    metric(cluster, "apiserver_watch_events_sizes_sum", &["pods"]).await
}

/// The agents' requests that the API server has answered so far, by verb and resource.
fn requests(world: &World) -> BTreeMap<String, usize> {
    let mut out = BTreeMap::new();
    for line in world.audit().iter().filter(|line| line["user"]["username"] == ACCOUNT) {
        let text = |value: &serde_json::Value| value.as_str().unwrap_or("?").to_owned();
        *out.entry(format!("{} {}", text(&line["verb"]), text(&line["objectRef"]["resource"]))).or_default() += 1;
    }
    out
}

fn without_watches(requests: &BTreeMap<String, usize>) -> usize {
    requests.iter().filter(|(kind, _)| !kind.starts_with("watch ")).map(|(_, count)| count).sum()
}

async fn start(world: &World, n: usize) -> Agent {
    let node = node(n);
    world.cluster.create("/api/v1/nodes", &json!({"metadata": {"name": node, "labels": labels()}})).await;
    let actor = world.actor(&format!("agent-{n}"), "sds-agent", &node).await;
    world.agent(&actor, "24h").await.start().await
}

/// A FlowSchema for the agents with a priority level of their own. No manifest has it: the figures show whether it would help.
fn priority_level() -> [serde_json::Value; 2] {
    let version = "flowcontrol.apiserver.k8s.io/v1";
    let queuing = json!({"queues": 64, "handSize": 6, "queueLengthLimit": 50});
    let limited = json!({"nominalConcurrencyShares": 30, "limitResponse": {"type": "Queue", "queuing": queuing}});
    let subject = json!({"kind": "ServiceAccount", "serviceAccount": {"namespace": "sds-agent", "name": "sds-agent"}});
    let all = json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"], "clusterScope": true});
    [
        json!({
            "apiVersion": version, "kind": "PriorityLevelConfiguration", "metadata": {"name": "sds-agent"},
            "spec": {"type": "Limited", "limited": limited},
        }),
        json!({
            "apiVersion": version, "kind": "FlowSchema", "metadata": {"name": "sds-agent"},
            "spec": {
                "priorityLevelConfiguration": {"name": "sds-agent"}, "matchingPrecedence": 900, "distinguisherMethod": {"type": "ByUser"},
                "rules": [{"subjects": [subject], "resourceRules": [all]}],
            },
        }),
    ]
}

/// Restarts the API server and waits until all agents watch again.
async fn after_a_restart(cluster: &Cluster, plane: Plane, watches_before: f64, case: &str) -> Plane {
    let each = |total: f64| total / AGENTS as f64;
    let begun = Instant::now();
    let plane = plane.kill().start().await;
    eventually("all agents watch again", PATIENCE, async || {
        let now = each(watches(cluster).await - watches_before);
        if now >= WATCHES - 0.1 { Ok(()) } else { Err(format!("{now} for each")) }
    })
    .await;
    // A new process counts from zero.
    let busy = each(metric(cluster, "apiserver_request_total", &["code=\"429\""]).await);
    println!(
        "figure: {case}: {:?} after the restart of the API server all agents watch again; {busy:.2} requests for each were answered with 429",
        begun.elapsed()
    );
    plane
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_agents_cost_the_cluster_little() {
    let _turn = turn().await;
    let pods = (AGENTS * PODS).to_string();
    let world = World::start(&["--controllers", "*,-certificaterequests-approver", "--pods", &pods, "--audit"]).await;
    let (watches_before, heap_before) = (watches(&world.cluster).await, heap(&world.cluster).await);
    let agents: Vec<Agent> = stream::iter(0..AGENTS).map(|n| start(&world, n)).buffer_unordered(AT_ONCE).collect().await;
    let each = |total: f64| total / AGENTS as f64;

    let (watches_each, heap_each) = (each(watches(&world.cluster).await - watches_before), each(heap(&world.cluster).await - heap_before));
    let at_start = requests(&world);
    let requests_each = each(without_watches(&at_start) as f64);
    println!(
        "figure: {AGENTS} agents of {PODS} pods: for each {watches_each:.2} watches, {requests_each:.2} requests, {heap_each:.0} bytes of heap and stacks"
    );
    println!("figure: requests of all agents: {at_start:?}");
    assert!((WATCHES - 0.05..WATCHES + 0.2).contains(&watches_each), "{watches_each} watches");
    assert!(requests_each <= REQUESTS, "{requests_each} requests");
    assert!(heap_each <= HEAP, "{heap_each} bytes");
    let peaks: Vec<u64> = agents.iter().map(|agent| memory::peak(agent.process().pid())).collect();
    println!("figure: an agent peaks at {} to {} KiB", peaks.iter().min().unwrap() >> 10, peaks.iter().max().unwrap() >> 10);

    tokio::time::sleep(IDLE).await;
    let idle = without_watches(&requests(&world)) - without_watches(&at_start);
    assert_eq!(idle, 0, "idle agents made requests");

    // A change of a pod reaches the agent of its node alone.
    let (before, changes) = (watched_bytes(&world.cluster).await, 200_usize);
    for n in 0..changes {
        let path = format!("/api/v1/namespaces/crowd/pods/crowd-{:06}-pod", n * PODS);
        world.cluster.patch(&path, &json!({"metadata": {"annotations": {"example.com/change": n.to_string()}}})).await;
    }
    eventually("the changes are sent", PATIENCE, async || {
        let bytes = (watched_bytes(&world.cluster).await - before) / changes as f64;
        if bytes > 0.0 { Ok(()) } else { Err(format!("{bytes} bytes")) }
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let bytes = (watched_bytes(&world.cluster).await - before) / changes as f64;
    println!("figure: a change of a pod: {bytes:.0} bytes of watch events, for all watchers of pods together");
    assert!(bytes <= CHANGE, "{bytes} bytes");

    // A restart of the API server with all agents connected, without and with a priority level of their own.
    let World { cluster, plane, .. } = world;
    let plane = after_a_restart(&cluster, plane, watches_before, "without a FlowSchema").await;
    for object in priority_level() {
        cluster.apply(&manifests::path(&object), &object).await;
    }
    let _plane = after_a_restart(&cluster, plane, watches_before, "with a FlowSchema").await;
    for agent in &agents {
        agent.readiness().await.expect("an agent is ready");
    }
}
