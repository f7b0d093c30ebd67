//! Upgrade from the previous version to this one and downgrade, for the program, the approver and the policy.
//!
//! `make test-long GROUP=former`. The previous version is the commit that `tests/tools.sh` names. Its program is built from `git
//! archive`, and its manifests are read from there.

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

use std::{fs, path::PathBuf, time::Duration};

use serde_json::Value;
use test_harness::{
    agent::Agent,
    ask::issued,
    eventually,
    guarded::Guarded,
    manifests,
    recorder::Recorder,
    scene::Workload,
    surge::Surge,
    tools,
    world::{GUARDED, World},
};

mod per_pod;

const PATIENCE: Duration = Duration::from_secs(60);

/// The objects in a file of the previous version.
fn objects(file: &str) -> Vec<Value> {
    let path = tools::former_source().join(file);
    manifests::documents(&fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

/// Records the requests from then on, when those of the first certificates are deleted.
async fn record_after_the_first(surge: &Surge) -> Recorder {
    let namespace = &surge.agent_pod.pod.namespace;
    eventually("the first requests are consumed", PATIENCE, async || {
        let left = surge.cluster.requests(namespace).await;
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    surge.cluster.record_requests(namespace).await
}

/// Waits until both Envoys have connected to `agent`.
async fn has_streams(agent: &Agent) {
    eventually("both Envoys have changed over, with two streams each", PATIENCE, async || {
        let streams = agent.metric("sds_agent_streams").await;
        if streams >= 4.0 { Ok(()) } else { Err(format!("{streams} streams")) }
    })
    .await;
}

/// Waits until `recorder` has seen `count` requests.
async fn has_ordered(recorder: &Recorder, count: usize) {
    eventually("the requests are created", PATIENCE, async || {
        let seen = recorder.seen().len();
        if seen == count { Ok(()) } else { Err(format!("{seen} requests")) }
    })
    .await;
}

/// Upgrades to this version and downgrades, with requests between two Envoys all the time.
#[tokio::test]
async fn an_upgrade_and_the_way_back_lose_nothing_and_order_nothing() {
    let _turn = test_harness::turn().await;
    let former = tools::former();
    let mut surge = Surge::start_with(&former).await;
    let pair = surge.pair().await;
    pair.request().await.unwrap();
    let recorder = record_after_the_first(&surge).await;
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];

    let load = pair.load();
    load.passes("with the former version").await;
    let mut upgraded = surge.successor(dirs[0].path()).await.start().await;
    load.passes("with both").await;
    surge.agent.terminate();
    assert!(surge.agent.exit(PATIENCE).await.success());
    has_streams(&upgraded).await;
    load.passes("with this version").await;
    let back = surge.launch(&surge.agent_pod, dirs[1].path()).program(&former).start().await;
    upgraded.terminate();
    assert!(upgraded.exit(PATIENCE).await.success());
    has_streams(&back).await;
    load.passes("with the former version again").await;
    let tally = load.stop().await;

    pair.assert_clean(&tally).await;
    let seen = recorder.seen();
    assert!(seen.is_empty(), "no renewal was due, but there were requests: {seen:?}");
}

/// The former version cannot read the versions of this one. It orders again, once for each identity, what this version has issued, while
/// the Envoys keep their certificates.
#[tokio::test]
async fn the_way_back_orders_again_what_this_version_has_issued() {
    let _turn = test_harness::turn().await;
    let former = tools::former();
    let mut surge = Surge::start_with(&former).await;
    let pair = surge.pair().await;
    pair.request().await.unwrap();
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let load = pair.load();
    load.passes("with the former version").await;
    let mut upgraded = surge.successor(dirs[0].path()).await.start().await;
    surge.agent.terminate();
    assert!(surge.agent.exit(PATIENCE).await.success());
    has_streams(&upgraded).await;

    let recorder = record_after_the_first(&surge).await;
    let since = pair.taken().await;
    let answer = upgraded.post("/reissue?over=0s").await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    pair.rotated_under(&load, since, 1, 3 * PATIENCE).await;
    has_ordered(&recorder, 2).await;
    let back = surge.launch(&surge.agent_pod, dirs[1].path()).program(&former).start().await;
    upgraded.terminate();
    assert!(upgraded.exit(PATIENCE).await.success());
    has_streams(&back).await;
    has_ordered(&recorder, 4).await;
    load.passes("with the former version again").await;
    let tally = load.stop().await;
    pair.assert_clean(&tally).await;
    println!("figure: requests after the way back: {}, for 2 identities that this version had issued", recorder.seen().len() - 2);
    assert_eq!(recorder.seen().len(), 4, "once for each identity");
}

/// Each approver approves the requests of each version's agent: in an upgrade either may be first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_approver_serves_agents_of_either_version() {
    let former = tools::former();
    let world = World::start(GUARDED).await;
    world.install_policy().await;
    let (node, shop) = (world.cluster.node().await, world.cluster.namespace().await);
    for (number, approver_is_former) in [true, false].into_iter().enumerate() {
        let program = approver_is_former.then_some(former.as_path());
        let approver = world.approver_of(program, &format!("approver-{number}"), "1h").await;
        for agent_is_former in [true, false] {
            let name = format!("{number}-{agent_is_former}");
            let actor = world.actor(&format!("agent-{name}"), "sds-agent", &node).await;
            let launch = world.agent(&actor, "1h").await;
            let launch = if agent_is_former { launch.program(&former) } else { launch };
            let agent = launch.start().await;
            let workload = Workload::of(world.cluster.pod(&shop, &format!("app-{name}"), &node).await);
            let case = format!("approver former: {approver_is_former}, agent former: {agent_is_former}");
            assert_eq!(workload.fetch(&agent).await["spiffe_id"], workload.id(), "{case}");
        }
        let approved = approver.counted("sds_agent_approver_decisions_total", &["decision=\"approved\""], 2.0).await;
        assert!((1.5..2.5).contains(&approved), "{approved}");
    }
}

/// The previous policy with the ConfigMap of this version, and then this version's policy, with the API servers of two Kubernetes
/// versions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_former_policy_works_beside_the_new_configmap_and_is_replaced() {
    let policy = objects("daemonset/approver/policy.yaml");
    let oldest = tools::oldest_apiserver().into_os_string().into_string().expect("a plain path");
    for flags in [GUARDED.to_vec(), [GUARDED, &["--apiserver", &oldest]].concat()] {
        Guarded::of(World::start(&flags).await).await.upgrade(&policy).await;
    }
}

/// This version's policy works with a ConfigMap of the previous version.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_former_configmap_works_with_the_new_policy() {
    let map = objects("daemonset/base/config.yaml").into_iter().find(|object| object["kind"] == "ConfigMap").expect("a ConfigMap");
    let scene = Guarded::of(World::start(GUARDED).await).await;
    scene.world.install_policy().await;
    scene.publish(&map, &[]).await;
    scene.until_bounded("the previous ConfigMap", Some("above 24h,")).await;
    scene.assert_only_the_mesh_is_guarded("the previous ConfigMap").await;
    scene.assert_the_mesh_is_served("the previous ConfigMap").await;
}

/// Configurations of the previous version are still valid.
#[tokio::test]
async fn every_former_configuration_is_accepted() {
    let mut checked = 0;
    let folder = tempfile::tempdir().unwrap();
    for map in objects("daemonset/base/config.yaml").iter().filter(|object| object["kind"] == "ConfigMap") {
        let file: PathBuf = folder.path().join("config.yaml");
        fs::write(&file, map["data"]["config.yaml"].as_str().expect("a configuration")).unwrap();
        let arguments = ["check-config", "--config", file.to_str().expect("a plain path")];
        test_harness::child::succeed(test_harness::agent::program(), &arguments, PATIENCE).await;
        checked += 1;
    }
    assert_eq!(checked, 1);
}

/// A request as an agent of each version creates it.
async fn requests_of_both_versions(scene: &Guarded, made: &mut Vec<String>, step: &str) {
    let uid = scene.world.cluster.get(&format!("/api/v1/nodes/{}", scene.agent.node)).await["metadata"]["uid"].take();
    let former = scene.ask();
    let mut new = former.clone();
    new.object["metadata"]["labels"]["sds-agent.io/node-uid"] = uid;
    for (version, ask) in [("former", former), ("new", new)] {
        let path = ask.create(&scene.agent).await.unwrap_or_else(|error| panic!("{step}: the request of the {version} agent: {error}"));
        made.push(path);
    }
}

/// The whole installation is upgraded object by object, in the order of kustomize and in that of Helm, and returned to the former version.
/// The API server accepts each request of an agent of either version at every step, and the approver that is installed then approves them
/// all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_step_of_an_upgrade_and_of_the_way_back_accepts_every_request() {
    let source = tools::former_source();
    let by_kustomize = [manifests::kustomize(&source.join("daemonset/shared")).await, manifests::rendered("shared").await];
    let by_helm = [manifests::helm_of(&source.join("daemonset/chart"), "sds-agent").await, manifests::helm("sds-agent", &[]).await];
    for (order, [former, new]) in [("kustomize", by_kustomize), ("Helm", by_helm)] {
        let mut scene = Guarded::of(World::start_in(GUARDED, &former).await).await;
        scene.until_a_stranger_is_refused("to agentUsernames of ConfigMap").await;
        for (version, objects, program) in [("new", &new, None), ("former", &former, Some(tools::former()))] {
            let mut made = Vec::new();
            for object in objects {
                let path = manifests::path(object);
                scene.world.cluster.apply(&path, object).await;
                requests_of_both_versions(&scene, &mut made, &format!("after {path} of the {version} version, by {order}")).await;
            }
            let deployment = manifests::named(objects, "Deployment", "sds-agent-approver");
            scene.world.approver_namespace = deployment["metadata"]["namespace"].as_str().expect("a namespace").to_owned();
            let _approver = scene.world.approver_of(program.as_deref(), &format!("approver-{version}"), "24h").await;
            for path in &made {
                issued(&scene.world.cluster, path).await;
            }
            println!("figure: to the {version} version by {order}: {} requests accepted and issued", made.len());
        }
    }
}
