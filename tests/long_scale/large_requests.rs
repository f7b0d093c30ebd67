//! Requests of other clients with the maximum size that the API server accepts.

use std::time::Duration;

use futures::{StreamExt, stream};
use serde_json::json;
use test_harness::{agent::Agent, ask::Ask, memory, turn, world::World};

/// Number of requests, and the minimum size of each in bytes.
const REQUESTS: usize = 300;
const BYTES: usize = 1 << 20;
/// Maximum memory that the requests add, in bytes.
const MORE: u64 = 64 << 20;

fn assert_fits(who: &str, without: u64, program: &Agent) {
    let more = memory::peak(program.process().pid()).saturating_sub(without);
    println!("figure: {who}, {REQUESTS} requests of {BYTES} bytes: {} MiB more than the {} MiB without them", more >> 20, without >> 20);
    assert!(more <= MORE, "{who}: {more} bytes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_a_mebibyte_fill_neither_the_approver_nor_an_agent() {
    let _turn = turn().await;
    let world = World::start(&["--controllers", "*,-certificaterequests-approver"]).await;
    let node = world.cluster.node().await;
    let actor = world.actor("agent", "sds-agent", &node).await;
    let pod = world.cluster.pod(&world.cluster.namespace().await, "app", &node).await;
    let uid = world.cluster.get(&format!("/api/v1/nodes/{node}")).await["metadata"]["uid"].clone();
    // The issuer does not exist and is not guarded by the policies; the requests have the labels of the node.
    let mut ask = Ask::of(&actor, &pod).spec("issuerRef", json!({"name": "x".repeat(BYTES), "kind": "Issuer"}));
    ask.object["metadata"]["labels"]["sds-agent.io/node-uid"] = uid;
    let start = async |name: &str| (world.approver(name, "24h").await, world.agent(&actor, "24h").await.start().await);
    let (approver, agent) = start("approver-0").await;
    let (without_approver, without_agent) = (memory::peak(approver.process().pid()), memory::peak(agent.process().pid()));
    let created = stream::iter(0..REQUESTS).map(async |_| ask.create_in(&world.cluster).await.expect("a request is created"));
    assert_eq!(created.buffer_unordered(4).count().await, REQUESTS);

    // These have received each request as a change.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_fits("the approver, by its watch", without_approver, &approver);
    assert_fits("an agent, by its watch", without_agent, &agent);
    drop((approver, agent));
    // A ready program has read all of them in its list.
    let (approver, agent) = start("approver-1").await;
    assert_fits("the approver, by its list", without_approver, &approver);
    assert_fits("an agent, by its list", without_agent, &agent);
}
