//! The procedure of docs/runbook.md, "Deny a node", while the token of the node's agent is in use by an attacker.

use serde_json::json;
use test_harness::{
    ask::{Ask, denied, issued},
    eventually,
    world::{GUARDED, NAMESPACE, PATIENCE, World},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_denied_node_gets_nothing_until_it_is_allowed_again() {
    let world = World::start(GUARDED).await;
    world.install_policy().await;
    let (approver, mounted) = world.approver_with_overlap("approver-0", "24h", "10m").await;
    let (good, bad) = (world.cluster.node().await, world.cluster.node().await);
    let (agent, attacker) = (world.actor("agent-a", "sds-agent", &good).await, world.actor("agent-b", "sds-agent", &bad).await);
    let shop = world.cluster.namespace().await;
    let (own, theirs) = (world.cluster.pod(&shop, "own", &good).await, world.cluster.pod(&shop, "theirs", &bad).await);
    let path = Ask::of(&attacker, &theirs).create(&attacker).await.unwrap();
    issued(&world.cluster, &path).await;

    // The approver has the file first: it denies what the policy still accepts.
    mounted.deny(&format!("{bad}\n"));
    approver.counted("sds_agent_approver_denied_nodes", &[], 1.0).await;
    let path = Ask::of(&attacker, &theirs).create(&attacker).await.unwrap();
    let (reason, sentence) = denied(&world.cluster, &path).await;
    assert_eq!(reason, "NodeDenied");
    assert!(sentence.contains(&format!("node {bad:?} is in deniedNodes")), "{sentence}");

    // Then the policy rejects requests of the node by any of its tokens.
    let config = format!("/api/v1/namespaces/{NAMESPACE}/configmaps/sds-agent");
    let deny = async |nodes: &str| drop(world.cluster.merge(&config, &json!({"data": {"deniedNodes": nodes}})).await);
    deny(&format!("other-node\n{bad}\n")).await;
    let refused =
        eventually("the policy denies the node", PATIENCE, async || match Ask::of(&attacker, &theirs).try_dry_run(&attacker).await {
            Err(kube::Error::Api(status)) => Ok(status.message.clone()),
            answer => Err(format!("{answer:?}")),
        })
        .await;
    assert!(refused.contains(&format!("node {bad} is in deniedNodes")), "{refused}");
    let another = world.actor("agent-c", "sds-agent", &bad).await;
    assert!(Ask::of(&another, &theirs).refused(&another).await.contains("is in deniedNodes"));

    // Other nodes are served.
    let path = Ask::of(&agent, &own).create(&agent).await.unwrap();
    issued(&world.cluster, &path).await;

    deny("").await;
    mounted.deny("");
    eventually("the policy allows the node", PATIENCE, async || {
        Ask::of(&attacker, &theirs).try_dry_run(&attacker).await.map(drop).map_err(|error| error.to_string())
    })
    .await;
    eventually("the approver allows the node", PATIENCE, async || {
        let denied = approver.metric("sds_agent_approver_denied_nodes").await;
        if denied < 0.5 { Ok(()) } else { Err(denied.to_string()) }
    })
    .await;
    let path = Ask::of(&attacker, &theirs).create(&attacker).await.unwrap();
    issued(&world.cluster, &path).await;
}

/// The approver is in another namespace than the ConfigMap, as the Deployment is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_approver_follows_the_config_map_of_the_agents() {
    let world = World::start(GUARDED).await;
    let path = format!("/api/v1/namespaces/{NAMESPACE}/configmaps/sds-agent");
    let map = world.cluster.get(&path).await;
    world.cluster.delete(&path).await;
    let (launch, lines) = world.approver_of_config_map("approver-0").await;
    let mut approver = launch.spawn();
    eventually("it waits for the ConfigMap", PATIENCE, async || {
        let log = approver.log();
        let waits = log.iter().any(|line| line.to_string().contains("the ConfigMap does not exist; waiting for it"));
        if waits { Ok(()) } else { Err(format!("{log:?}")) }
    })
    .await;
    let configuration =
        format!("{}{lines}", map["data"]["config.yaml"].as_str().unwrap().replace("approver:\n", "approver:\n  overlap: 0s\n"));
    let made = json!({"metadata": {"name": "sds-agent"}, "data": {"config.yaml": configuration}});
    world.cluster.create(&format!("/api/v1/namespaces/{NAMESPACE}/configmaps"), &made).await;
    approver.ready().await;

    let (node, shop) = (world.cluster.node().await, world.cluster.namespace().await);
    let agent = world.actor("agent-a", "sds-agent", &node).await;
    let pod = world.cluster.pod(&shop, "own", &node).await;
    let ask = async || Ask::of(&agent, &pod).create(&agent).await.unwrap();
    issued(&world.cluster, &ask().await).await;
    // No kubelet has to update a volume, so the change arrives with the watch.
    world.cluster.merge(&path, &json!({"data": {"deniedNodes": format!("{node}\n")}})).await;
    approver.counted("sds_agent_approver_denied_nodes", &[], 1.0).await;
    assert_eq!(denied(&world.cluster, &ask().await).await.0, "NodeDenied");
    world.cluster.delete(&path).await;
    approver.counted("sds_agent_configuration_reloads_total", &["result=\"invalid\""], 1.0).await;
    assert_eq!(denied(&world.cluster, &ask().await).await.0, "NodeDenied", "without the ConfigMap the node stays denied");
}
