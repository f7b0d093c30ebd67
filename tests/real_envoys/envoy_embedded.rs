//! Two real Envoys on `dev`: mTLS, and certificates that are replaced under load, over each kind of stream.

use std::time::Duration;

use test_harness::{
    agent::Launch,
    envoy::{Envoy, Sds, Side},
    eventually,
    pair::{End, Pair},
};

const ROTATIONS: u64 = 4;

/// Both run as this user and so have the same identity.
fn own_id() -> String {
    format!("spiffe://example.org/uid/{}", nix::unistd::getuid())
}

#[tokio::test]
async fn state_of_the_world_rotates_under_load() {
    rotates_under_load(Sds::StateOfTheWorld).await;
}

#[tokio::test]
async fn delta_rotates_under_load() {
    rotates_under_load(Sds::Delta).await;
}

#[tokio::test]
async fn google_grpc_rotates_under_load() {
    rotates_under_load(Sds::GoogleGrpc).await;
}

async fn rotates_under_load(sds: Sds) {
    let _turn = test_harness::turn().await;
    let dir = tempfile::tempdir().unwrap();
    let agent = Launch::dev(dir.path()).lifetime("10s").start().await;
    let id = own_id();
    let end = End { id: &id, sds, cgroup: None };
    let pair = Pair::start(agent.socket(), end, end).await;
    pair.request().await.unwrap();

    let before = pair.taken().await;
    let load = pair.load();
    pair.rotated_under(&load, before, ROTATIONS, Duration::from_secs(120)).await;
    let tally = load.stop().await;
    pair.assert_clean(&tally).await;
    for envoy in [&pair.server, &pair.client] {
        assert!(envoy.stats().await.sum("ssl_context_update_by_sds") >= ROTATIONS);
    }
}

/// Also a check of the tests: an Envoy is not live before it has its secrets.
#[tokio::test]
async fn an_envoy_that_came_first_is_served_when_the_agent_comes() {
    let _turn = test_harness::turn().await;
    let dir = tempfile::tempdir().unwrap();
    let launch = Launch::dev(dir.path());
    let id = own_id();
    let envoy = Envoy::start(Side::Server { client: &id }, launch.socket(), Sds::StateOfTheWorld, None).await;
    eventually("it tries", Duration::from_secs(30), async || match envoy.stats().await.sum("sds.default.update_failure") {
        0 => Err("no failure yet".into()),
        _ => Ok(()),
    })
    .await;
    assert_ne!(envoy.state().await.unwrap(), "LIVE");
    let _agent = launch.start().await;
    envoy.live().await;
}
