//! A rolling restart with a surge: the new agent starts beside the one that serves, and takes its socket only when it can serve.

use std::{fs, os::unix::fs::MetadataExt, path::Path, time::Duration};

use serde_json::{Value, json};
use test_harness::{agent::Launch, eventually, surge::Surge};
use tokio::net::UnixStream;

const PATIENCE: Duration = Duration::from_secs(60);

/// An agent that never reaches the API server. Its pod does not matter then.
fn broken(surge: &Surge, dir: &Path) -> Launch {
    let port = test_harness::free_port();
    let nowhere = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "agent",
        "clusters": [{"name": "test", "cluster": {"server": format!("http://127.0.0.1:{port}")}}],
        "users": [{"name": "agent", "user": {"token": "none"}}],
        "contexts": [{"name": "agent", "context": {"cluster": "test", "user": "agent"}}],
    });
    let access = dir.join("nowhere");
    fs::write(&access, nowhere.to_string()).unwrap();
    surge.launch(&surge.agent_pod, dir).env("KUBECONFIG", access.to_str().unwrap())
}

fn inode(socket: &Path) -> u64 {
    fs::metadata(socket).expect("the socket is there").ino()
}

#[tokio::test]
async fn a_rolling_restart_loses_nothing_and_orders_nothing() {
    let _turn = test_harness::turn().await;
    let mut surge = Surge::start().await;
    let pair = surge.pair().await;
    pair.request().await.unwrap();
    let namespace = surge.agent_pod.pod.namespace.clone();
    eventually("the first requests are consumed", PATIENCE, async || {
        let left = surge.cluster.requests(&namespace).await;
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    let recorder = surge.cluster.record_requests(&namespace).await;
    let (socket, dir) = (surge.agent.socket().to_owned(), tempfile::tempdir().unwrap());
    let before = inode(&socket);

    let load = pair.load();
    load.passes("before the restart").await;
    let successor = surge.successor(dir.path()).await.start().await;
    assert_ne!(inode(&socket), before, "the ready agent has the socket");
    successor.logs("it waited", PATIENCE, |line| line["message"].as_str().is_some_and(|m| m.contains("a predecessor serves"))).await;
    load.passes("with two agents").await;
    for agent in [&surge.agent, &successor] {
        assert_eq!(agent.metric("sds_agent_socket_taken_by_strangers_total").await, 0.0, "an agent is taken for another process");
    }
    surge.agent.terminate();
    assert!(surge.agent.exit(PATIENCE).await.success());
    eventually("both Envoys have changed over, with two streams each", PATIENCE, async || {
        let streams = successor.metric("sds_agent_streams").await;
        if streams >= 4.0 { Ok(()) } else { Err(format!("{streams} streams")) }
    })
    .await;
    // The new agent serves a pod that starts now.
    assert_ne!(inode(&socket), before);
    load.passes("after the restart").await;
    let tally = load.stop().await;

    pair.assert_clean(&tally).await;
    let seen = recorder.seen();
    assert!(seen.is_empty(), "no renewal was due, but there were requests: {seen:?}");
    let held = successor.metric_of("sds_agent_certificates", &["state=\"held_by_client\""]).await;
    assert!(held >= 2.0, "{held} certificates are held by clients");
}

#[tokio::test]
async fn a_broken_successor_never_takes_the_socket() {
    let surge = Surge::start().await;
    let (socket, dir) = (surge.agent.socket().to_owned(), tempfile::tempdir().unwrap());
    let before = inode(&socket);
    let launch = broken(&surge, dir.path());
    let mut broken = launch.spawn();
    broken.logs("it has tried", PATIENCE, |line| line["message"].as_str().is_some_and(|m| m.contains("the watch does not work"))).await;

    let readiness = broken.readiness().await.expect_err("it is not ready");
    assert!(readiness.contains("a healthy predecessor"), "{readiness}");
    assert_eq!(inode(&socket), before);
    let answer = test_harness::fetch::ask(Some(&surge.server.1), &socket, &test_harness::fetch::BOTH, "10s").await;
    assert!(answer.is_ok(), "the old one serves: {answer:?}");
    broken.terminate();
    assert!(broken.exit(PATIENCE).await.success());
    assert_eq!(inode(&socket), before, "its end leaves the socket alone");
    assert_eq!(
        fs::read_dir(socket.parent().unwrap())
            .unwrap()
            .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'))
            .count(),
        0
    );

    // If the old agent ends meanwhile, the new one takes the socket although it is not ready.
    let mut broken = launch.spawn();
    broken.logs("it waits", PATIENCE, |line| line["message"].as_str().is_some_and(|m| m.contains("a predecessor serves"))).await;
    surge.agent.kill().await;
    broken.logs("it steps in", PATIENCE, |line| line["message"].as_str().is_some_and(|m| m.contains("the socket is acquired"))).await;
    assert_ne!(inode(&socket), before);
    broken.terminate();
    broken.exit(PATIENCE).await;
}

/// The container of the old pod restarts while a new pod waits, before the controller deletes the old pod: the restarted agent takes the
/// socket, and removes it at its end.
#[tokio::test]
async fn whoever_is_left_has_the_socket() {
    let surge = Surge::start().await;
    let (socket, dirs) = (surge.agent.socket().to_owned(), [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()]);
    let (next, broken) = (surge.successor(dirs[0].path()).await, broken(&surge, dirs[1].path()));
    // The kernel reuses inode numbers at once, so the change time is compared too.
    let look = || fs::metadata(&socket).map(|meta| (meta.ino(), meta.ctime(), meta.ctime_nsec()));
    let mut last = look().unwrap();
    let mut changed = async |what: &str| {
        last = eventually(what, PATIENCE, async || match look() {
            Ok(now) if now != last => Ok(now),
            other => Err(format!("{other:?}")),
        })
        .await;
        UnixStream::connect(&socket).await.expect("it is served");
    };
    let taken = |line: &Value| line["message"].as_str().is_some_and(|m| m.contains("another agent has taken the socket"));

    // A killed agent leaves its socket's path behind; an agent that ends by SIGTERM removes it.
    for is_killed in [true, false] {
        let mut next = next.start().await;
        changed("the next one has taken the socket").await;
        surge.agent.logs("the previous agent has noticed", PATIENCE, taken).await;
        if is_killed {
            next.kill().await;
        } else {
            next.terminate();
            assert!(next.exit(PATIENCE).await.success());
        }
        changed("the previous agent has it again").await;
        let answer = test_harness::fetch::ask(Some(&surge.server.1), &socket, &test_harness::fetch::BOTH, "10s").await;
        assert!(answer.is_ok(), "{answer:?}");
    }

    // An agent that is not ready yields the socket to one that is, and takes it again when that one ends.
    let mut broken = broken.spawn();
    broken.logs("it waits", PATIENCE, |line| line["message"].as_str().is_some_and(|m| m.contains("a predecessor serves"))).await;
    surge.agent.kill().await;
    changed("it steps in").await;
    let mut next = next.start().await;
    changed("one that can serve has taken the socket").await;
    // Without the API server it cannot attest the other one, and waits for it.
    let noticed = |line: &Value| line["message"].as_str().is_some_and(|m| m.contains("another process has taken the socket"));
    broken.logs("it knows", PATIENCE, noticed).await;
    let readiness = broken.readiness().await.expect_err("it is not ready");
    assert!(readiness.contains("a healthy predecessor"), "{readiness}");
    next.terminate();
    assert!(next.exit(PATIENCE).await.success());
    changed("it steps in again").await;
    broken.terminate();
    assert!(broken.exit(PATIENCE).await.success());
    assert!(!socket.exists(), "the last agent removes the path");
}
