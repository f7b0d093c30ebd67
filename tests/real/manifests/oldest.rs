//! The oldest Kubernetes that is supported, by its own API server; cert-manager and the controllers are those of the other tests.

use test_harness::{
    manifests::apply_all,
    scene::Workload,
    tools,
    world::{GUARDED, World},
};

const VERSION: &str = "v1.30.";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_of_it_is_admitted_and_works_at_the_oldest_api_server() {
    let program = tools::oldest_apiserver();
    let world = World::start(&[GUARDED, &["--apiserver", program.to_str().expect("a plain path")]].concat()).await;
    let version = world.cluster.get("/version").await["gitVersion"].as_str().unwrap().to_owned();
    assert!(version.starts_with(VERSION), "{version}");

    // Its policies refuse what they are there to refuse.
    world.install_policy().await;
    // And the way of a certificate: with the node that its token names, approved by us, signed by cert-manager.
    let approver = world.approver("approver-0", "1h").await;
    let node = world.cluster.node().await;
    let actor = world.actor("agent-0", "sds-agent", &node).await;
    let agent = world.agent(&actor, "1h").await.start().await;
    let workload = Workload::of(world.cluster.pod(&world.cluster.namespace().await, "cart", &node).await);
    let got = workload.fetch(&agent).await;
    assert_eq!(got["spiffe_id"], workload.id());
    let approved = approver.metric_of("sds_agent_approver_decisions_total", &["decision=\"approved\""]).await;
    assert!((approved - 1.0).abs() < 0.5, "{approved}");

    println!("figure: {} objects applied at {version}", apply_all(&world.cluster).await);
}
