//! The approver's memory in a cluster with many pods.

use test_harness::{
    ask::{Ask, condition},
    eventually, manifests, memory,
    relay::Relay,
    world::{PATIENCE, World, list_pods_again, pod_pages},
};

/// Number of pods, as `tests/controlplane` creates them, and their minimum size in bytes: of a whole pod as the API server sends it, and
/// of its managed fields alone.
const PODS: usize = 10_000;
const FEWER_PODS: usize = 2_000;
/// Maximum memory for each further pod, in bytes.
const EACH: u64 = 2 << 10;
const POD_BYTES: usize = 10_000;
const MANAGED_BYTES: usize = 4_000;
/// The memory limit of the Deployment must be at least this multiple of the approver's peak.
const TIMES: u64 = 3;
/// No other approver and no signer runs.
const WITHOUT: &str = "*,-certificaterequests-approver,-certificaterequests-issuer-ca";

/// The peak of an approver that has read `pods` pods, in bytes.
async fn peak_with(pods: usize) -> u64 {
    let world = World::start(&["--controllers", WITHOUT, "--pods", &pods.to_string()]).await;
    let approver = world.approver("approver-0", "24h").await;
    let index = approver.logs("the index", PATIENCE, |line| line["message"] == "the index of the cluster's pods is complete").await;
    assert!(index["pods"].as_u64().is_some_and(|found| found >= pods as u64), "{index}");
    memory::peak(approver.process().pid())
}

/// Measured at the start, and again after a second list of all pods with a fragmented heap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_pods_fit_the_shipped_limit_three_times() {
    let world = World::start(&["--controllers", WITHOUT, "--pods", &PODS.to_string()]).await;
    let cluster = &world.cluster;
    let one = cluster.get("/api/v1/namespaces/crowd/pods/crowd-000000-pod").await;
    let (size, managed) = (one.to_string().len(), one["metadata"]["managedFields"].to_string().len());
    assert!(size >= POD_BYTES && managed >= MANAGED_BYTES, "{size} bytes, {managed} of them managed fields");

    let relay = Relay::to(&world.server()).await;
    let approver = world.approver_through("approver-0", "24h", &relay).await;
    let index = approver.logs("the index", PATIENCE, |line| line["message"] == "the index of the cluster's pods is complete").await;
    assert!(index["pods"].as_u64().is_some_and(|pods| pods >= PODS as u64), "{index}");
    let at_first = memory::peak(approver.process().pid());
    let fewer = peak_with(FEWER_PODS).await;
    let each = at_first.saturating_sub(fewer) / (PODS - FEWER_PODS) as u64;
    println!("figure: {} KiB with {FEWER_PODS} pods, {} KiB with {PODS}: {each} bytes for each further pod", fewer >> 10, at_first >> 10);
    assert!(each <= EACH, "{each} bytes");
    let node = cluster.node().await;
    let agent = world.actor("agent", "sds-agent", &node).await;
    let pod = cluster.pod(&cluster.namespace().await, "app", &node).await;
    let answered = async || {
        let path = Ask::of(&agent, &pod).create(&agent).await.expect("a request is created");
        eventually("the request is approved", PATIENCE, async || {
            let request = cluster.get(&path).await;
            condition(&request, "Approved").map(drop).ok_or_else(|| request["status"].to_string())
        })
        .await;
    };
    answered().await;
    let listed = pod_pages(&approver).await;
    assert!(listed >= (PODS / 200) as f64, "{listed} pages");

    list_pods_again(cluster, &approver, &relay).await;
    answered().await;
    let peak = memory::peak(approver.process().pid());
    let limit = manifests::memory_limit("approver/deployment.yaml", "Deployment");
    println!(
        "figure: {PODS} pods of {size} bytes: at most {} MiB after the first list, {} MiB after more; the limit is {} MiB",
        at_first >> 20,
        peak >> 20,
        limit >> 20
    );
    assert!(peak * TIMES <= limit, "{peak} bytes, and the limit is {limit}");
}
