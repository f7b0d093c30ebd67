//! The approver in a cluster of many pods, and a restart of the API server.

use test_harness::{
    ask::{Ask, condition},
    eventually, manifests, memory,
    relay::Relay,
    turn,
    world::{PATIENCE, World, list_pods_again, pod_pages},
};

const PODS: usize = 100_000;
/// Maximum peak in bytes, and the multiple of it that the memory limit of the Deployment must be at least.
const MOST: u64 = 256 << 20;
const TIMES: u64 = 2;
const WITHOUT: &str = "*,-certificaterequests-approver,-certificaterequests-issuer-ca";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_pods_use_at_most_half_of_the_memory_limit() {
    let _turn = turn().await;
    let world = World::start(&["--controllers", WITHOUT, "--pods", &PODS.to_string()]).await;
    let relay = Relay::to(&world.server()).await;
    let approver = world.approver_through("approver-0", "24h", &relay).await;
    let peak = || memory::peak(approver.process().pid());
    let at_first = peak();
    let listed = pod_pages(&approver).await;
    assert!(listed >= (PODS / 200) as f64, "{listed} pages");

    let node = world.cluster.node().await;
    let agent = world.actor("agent", "sds-agent", &node).await;
    let World { cluster, plane, .. } = world;
    let restarts = async || approver.metric_of("sds_agent_watch_restarts_total", &["resource=\"pods\""]).await;
    let before = restarts().await;
    let _plane = plane.kill().start().await;
    eventually("the watch of pods is started again", PATIENCE, async || {
        let now = restarts().await;
        if now > before { Ok(()) } else { Err(format!("{before} restarts, then {now}")) }
    })
    .await;
    // A pod that the watch before the restart has not reported.
    let pod = cluster.pod(&cluster.namespace().await, "app", &node).await;
    let path = Ask::of(&agent, &pod).create(&agent).await.expect("a request is created");
    eventually("it is approved", PATIENCE, async || {
        let request = cluster.get(&path).await;
        condition(&request, "Approved").map(drop).ok_or_else(|| request["status"].to_string())
    })
    .await;
    // The second list is read with a fragmented heap.
    list_pods_again(&cluster, &approver, &relay).await;
    let (after, limit) = (peak(), manifests::memory_limit("approver/deployment.yaml", "Deployment"));
    println!(
        "figure: {PODS} pods: at most {} MiB after the list, {} MiB after a restart and another list; the limit is {} MiB",
        at_first >> 20,
        after >> 20,
        limit >> 20
    );
    assert!(after <= MOST && MOST * TIMES <= limit, "{after} bytes, and the limit is {limit}");
}
