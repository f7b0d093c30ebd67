//! Revoked permissions, killed agents, and agents that overlap.

use serde_json::json;
use test_harness::{
    ask::{Ask, denied, issued},
    eventually,
    scene::Workload,
    world::{GUARDED, NAMESPACE, PATIENCE, World},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_right_that_is_revoked_is_reported_and_waited_for() {
    let world = World::start(GUARDED).await;
    let approver = world.approver("approver-0", "24h").await;
    let [a, b] = [world.cluster.node().await, world.cluster.node().await];
    let agent = world.actor("agent", "sds-agent", &a).await;
    let shop = world.cluster.namespace().await;
    let (here, there) = (world.cluster.pod(&shop, "here", &a).await, world.cluster.pod(&shop, "there", &b).await);
    issued(&world.cluster, &Ask::of(&agent, &here).create(&agent).await.unwrap()).await;

    let role = "/apis/rbac.authorization.k8s.io/v1/clusterroles/sds-agent-approver";
    let rules = world.cluster.get(role).await["rules"].clone();
    for (right, words, with_reads) in [
        ("signers", "cannot decide about a request", true),
        ("certificaterequests/status", "lacks the verb patch on certificaterequests.cert-manager.io/status", true),
        ("pods", "lacks the verb get on pods", false),
    ] {
        let fewer: Vec<_> = rules.as_array().unwrap().iter().filter(|rule| rule["resources"] != json!([right])).cloned().collect();
        assert!(fewer.len() < rules.as_array().unwrap().len());
        let errors = approver.metric("sds_agent_approver_errors_total").await;
        world.cluster.patch(role, &json!({"rules": fewer})).await;
        // The authorizer sees the change later: until then requests are decided.
        let waiting = eventually("requests are no longer decided", PATIENCE, async || {
            let paths = [Ask::of(&agent, &here).create(&agent).await.unwrap(), Ask::of(&agent, &there).create(&agent).await.unwrap()];
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            let open = world.cluster.get(&paths[1]).await["status"]["conditions"].is_null();
            if open { Ok(paths) } else { Err("the denial was written".to_owned()) }
        })
        .await;
        approver
            .logs(right, PATIENCE, |line| {
                line["message"] == "cannot decide about a request; trying again"
                    && [&line["error"], &line["message"]].iter().any(|text| text.as_str().is_some_and(|text| text.contains(words)))
            })
            .await;
        assert!(approver.metric("sds_agent_approver_errors_total").await > errors + 0.5);
        if with_reads {
            assert!(world.cluster.get(&waiting[0]).await["status"]["conditions"].is_null());
        }
        world.cluster.patch(role, &json!({"rules": rules})).await;
        issued(&world.cluster, &waiting[0]).await;
        assert_eq!(denied(&world.cluster, &waiting[1]).await.0, "WrongNode");
    }
}

/// No approver runs. The agent is killed while it waits, and its successor in the same pod deletes the request that it left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_killed_between_create_and_issue_leaves_nothing() {
    let world = World::start(GUARDED).await;
    world.install_policy().await;
    let node = world.cluster.node().await;
    let actor = world.actor("agent", "sds-agent", &node).await;
    let launch = world.agent(&actor, "1h").await;
    let agent = launch.start().await;
    let workload = Workload::of(world.cluster.pod(&world.cluster.namespace().await, "app", &node).await);
    let waiting = workload.watch(agent.socket());
    let left = eventually("the request", PATIENCE, async || world.requests(NAMESPACE).await.pop().ok_or_else(String::new)).await;
    agent.kill().await;
    drop(waiting);
    assert_eq!(world.requests(NAMESPACE).await, [left.as_str()]);

    let agent = launch.start().await;
    eventually("the sweep", PATIENCE, async || {
        let requests = world.requests(NAMESPACE).await;
        if requests.is_empty() { Ok(()) } else { Err(format!("{requests:?}")) }
    })
    .await;
    assert!(agent.metric("sds_agent_orphaned_requests_deleted_total").await > 0.5);
}

/// A rolling update with a surge: two agents on a node, each with a waiting request. Only requests of an ended agent are swept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_agents_on_a_node_never_delete_each_others_requests() {
    let world = World::start(GUARDED).await;
    world.install_policy().await;
    let node = world.cluster.node().await;
    let shop = world.cluster.namespace().await;
    let workloads =
        [Workload::of(world.cluster.pod(&shop, "app-0", &node).await), Workload::of(world.cluster.pod(&shop, "app-1", &node).await)];
    let (mut agents, mut streams, mut live) = (Vec::new(), Vec::new(), Vec::<String>::new());
    for (n, workload) in workloads.iter().enumerate() {
        // This request shows that the sweep has run: its agent's pod has been deleted.
        let ghost = world.actor(&format!("ghost-{n}"), "sds-agent", &node).await;
        let mut ask = Ask::of(&ghost, &workload.pod);
        ask.object["metadata"]["labels"]["sds-agent.io/agent-uid"] = json!(ghost.pod.uid);
        ask.object["metadata"]["labels"]["sds-agent.io/instance"] = json!("000000000000");
        let orphan = ask.create(&ghost).await.unwrap();
        world.cluster.delete(&ghost.pod.path()).await;

        let actor = world.actor(&format!("agent-{n}"), "sds-agent", &node).await;
        let agent = world.agent(&actor, "1h").await.start().await;
        eventually("the sweep", PATIENCE, async || {
            let requests = world.requests(NAMESPACE).await;
            if requests.contains(&orphan) { Err(format!("{requests:?}")) } else { Ok(()) }
        })
        .await;
        assert_eq!(world.requests(NAMESPACE).await, live, "the sweep deleted requests of running agents");
        streams.push(workload.watch(agent.socket()));
        agents.push(agent);
        live = eventually("a request of each agent", PATIENCE, async || {
            let requests = world.requests(NAMESPACE).await;
            if requests.len() == n + 1 { Ok(requests) } else { Err(format!("{requests:?}")) }
        })
        .await;
    }
    let _approver = world.approver("approver-0", "1h").await;
    for (stream, workload) in streams.iter().zip(&workloads) {
        assert_eq!(stream.update(1, PATIENCE).await["spiffe_id"], workload.id());
        stream.assert_undisturbed();
    }
}
