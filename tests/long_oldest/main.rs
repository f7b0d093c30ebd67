//! The oldest supported Kubernetes, with its own API server. cert-manager and the controllers are those of the other tests.
//!
//! `make test-long GROUP=oldest`. `make test` contains the check that needs no old API server: `manifests/applied` lists the versions of
//! all kinds.

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

use test_harness::{
    guarded::{Guarded, moved},
    manifests::apply_all,
    scene::Workload,
    tools,
    world::{GUARDED, World},
};

const VERSION: &str = "v1.30.";

/// The flags of a control plane with the old API server.
fn flags() -> Vec<&'static str> {
    let program = tools::oldest_apiserver().into_os_string().into_string().expect("a plain path");
    [GUARDED, &["--apiserver", program.leak()]].concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_admitted_and_works() {
    let world = World::start(&flags()).await;
    let version = world.cluster.get("/version").await["gitVersion"].as_str().unwrap().to_owned();
    assert!(version.starts_with(VERSION), "{version}");

    // The policies reject the requests that they must reject.
    world.install_policy().await;
    // The path of a certificate: the token names the node, the approver approves, cert-manager signs.
    let approver = world.approver("approver-0", "1h").await;
    let node = world.cluster.node().await;
    let actor = world.actor("agent-0", "sds-agent", &node).await;
    let agent = world.agent(&actor, "1h").await.start().await;
    let workload = Workload::of(world.cluster.pod(&world.cluster.namespace().await, "cart", &node).await);
    let got = workload.fetch(&agent).await;
    assert_eq!(got["spiffe_id"], workload.id());
    let approved = approver.counted("sds_agent_approver_decisions_total", &["decision=\"approved\""], 1.0).await;
    assert!((approved - 1.0).abs() < 0.5, "{approved}");

    println!("figure: {} objects applied at {version}", apply_all(&world.cluster).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parameters_that_are_missing_hold_up_no_other_issuer() {
    let scene = Guarded::of(World::start(&flags()).await).await;
    scene.world.install_policy().await;
    scene.assert_no_state_of_the_parameters_matters_to_others().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_namespace_by_kustomize_holds_up_no_other_issuer() {
    let world = World::start_in(&flags(), &moved().await).await;
    Guarded::of(world).await.assert_another_namespace_holds_up_no_other_issuer().await;
}
