//! Requests of other clients with the maximum size that the API server accepts.

use futures::{StreamExt, stream};
use serde_json::json;
use test_harness::{agent::Agent, ask::Ask, manifests, memory, turn, world::World};

/// Number of requests, and the minimum size of each in bytes.
const REQUESTS: usize = 250;
const BYTES: usize = 1 << 20;
/// The peak must be at most the memory limit divided by this number.
const SHARE: u64 = 2;

fn assert_fits(who: &str, program: &Agent, limit: u64) {
    let peak = memory::peak(program.process().pid());
    println!("figure: {who}, {REQUESTS} requests of {BYTES} bytes: at most {} MiB; the limit is {} MiB", peak >> 20, limit >> 20);
    assert!(peak * SHARE <= limit, "{who}: {peak} bytes, and the limit is {limit}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_a_mebibyte_fill_neither_the_approver_nor_an_agent() {
    let _turn = turn().await;
    let world = World::start(&["--controllers", "*,-certificaterequests-approver"]).await;
    let node = world.cluster.node().await;
    let actor = world.actor("agent", "sds-agent", &node).await;
    let pod = world.cluster.pod(&world.cluster.namespace().await, "app", &node).await;
    let ask = Ask::of(&actor, &pod);
    // The issuer does not exist and is not guarded by the policies; the requests have the label of the node.
    let ask = ask.spec("issuerRef", json!({"name": "x".repeat(BYTES), "kind": "Issuer"}));
    let created = stream::iter(0..REQUESTS).map(async |_| ask.create_in(&world.cluster).await.expect("a request is created"));
    assert_eq!(created.buffer_unordered(4).count().await, REQUESTS);

    // A ready approver has read all of them.
    let approver = world.approver("approver-0", "24h").await;
    assert_fits("the approver", &approver, manifests::memory_limit("approver/deployment.yaml", "Deployment"));
    let agent = world.agent(&actor, "24h").await.start().await;
    assert_fits("an agent", &agent, manifests::memory_limit("base/daemonset.yaml", "DaemonSet"));
}
