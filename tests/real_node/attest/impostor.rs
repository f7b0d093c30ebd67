//! A pod that has the socket's directory mounted writable, and puts a server of its own in the agent's place.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    time::{Duration, Instant},
};

use test_harness::{agent::Launch, cgroups::PodCgroup, eventually};

use super::scene::{LONG, PATIENCE, Scene};

/// Time in which the agent has its socket again.
const TAKEN_BACK: Duration = Duration::from_secs(15);

#[tokio::test]
async fn a_pods_own_server_in_the_agents_place_is_displaced() {
    let _turn = test_harness::turn().await;
    let mut own = None;
    let scene = Scene::launched("certificate: { lifetime: 1h }", |agent, launch| {
        let cgroup = PodCgroup::new(&agent.pod.uid);
        let wrapper = cgroup.wrapper();
        own = Some(cgroup);
        launch.under(wrapper)
    })
    .await;
    let a = scene.a.pod.spiffe_id();
    let served = async || scene.ask(&scene.a.cgroup, "FetchSecrets", LONG, &["default"]).await;
    assert_eq!(served().await.ids, [&*a]);
    let socket = scene.agent.socket();
    let ours = fs::metadata(socket).unwrap().ino();

    // The program of the agent itself, in the cgroup of another pod: it answers health checks, and SDS by user. It keeps
    // its own path, whose loss it would notice, through the hard link.
    let dir = tempfile::tempdir_in(scene.dir.path()).unwrap();
    let impostor = Launch::dev(dir.path()).under(scene.b.cgroup.wrapper()).start().await;
    let link = dir.path().join("link");
    fs::hard_link(impostor.socket(), &link).unwrap();
    let theirs = fs::metadata(&link).unwrap().ino();
    let begun = Instant::now();
    fs::rename(&link, socket).unwrap();
    eventually("the agent has its socket again", TAKEN_BACK, async || match fs::metadata(socket).map(|meta| meta.ino()) {
        Ok(inode) if inode != theirs && inode != ours => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    assert!(begun.elapsed() < TAKEN_BACK, "{:?}", begun.elapsed());
    assert_eq!(served().await.ids, [&*a], "a neighbour is served by the agent again");
    assert_eq!(scene.agent.counted("sds_agent_socket_taken_by_strangers_total", &[], 1.0).await, 1.0);
    assert_eq!(scene.agent.counted("sds_agent_socket_bound", &[], 1.0).await, 1.0);
    let is_it = |line: &serde_json::Value| line["message"].as_str().is_some_and(|m| m.contains("no agent serves the socket"));
    let line = scene.agent.logs("the impostor", PATIENCE, is_it).await;
    assert!(line["cause"].as_str().is_some_and(|cause| cause.contains(&scene.b.pod.uid)), "the pod is named: {line}");
    assert_eq!(line["level"], "ERROR");
}
