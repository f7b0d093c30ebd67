//! Agents that are killed or end and start again, and an unavailable upstream.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    time::Duration,
};

use serde_json::json;
use test_harness::{
    agent,
    envoy::{Envoy, Sds, Side},
    eventually,
    host::IN_POD,
    pair::Pair,
};
use tokio::time::Instant;
use tonic::Code;

use super::{Node, PATIENCE, PROMPT, certificate};

#[tokio::test]
async fn envoys_that_see_one_mounted_directory_talk_and_survive_a_killed_agent() {
    let _turn = test_harness::turn().await;
    let node = Node::new(&certificate("60s")).await;
    let agent = node.start().await;
    let (server, client) = (node.pod("server").await, node.pod("client").await);
    let (server_id, client_id) = (server.spiffe_id(), client.spiffe_id());
    let targets = [node.kubelet.publish(&server, "sds").await, node.kubelet.publish(&client, "sds").await];

    let socket = Path::new(IN_POD).join("socket");
    let start = async |target: &Path, side: Side<'_>, sds| Envoy::start_under(&node.host.pod(target), side, &socket, sds).await;
    let first = start(&targets[0], Side::Server { client: &client_id }, Sds::StateOfTheWorld).await;
    let tls = first.live().await;
    let second = start(&targets[1], Side::Client { server: &server_id, at: tls }, Sds::Delta).await;
    let entrance = second.live().await;
    let pair = Pair { server: first, client: second, tls, entrance };
    pair.request().await.unwrap();

    // The mounts of pods refer to the inodes of the directories, so the directories must not change while the agent restarts.
    let before = pair.taken().await;
    let mounts = node.host.mounts();
    assert_eq!(mounts.len(), 2, "{mounts:?}");
    let load = pair.load();
    load.passes("before the agent is killed").await;
    agent.kill().await;
    load.passes("without an agent").await;
    let agent = node.start().await;
    assert_eq!(node.host.mounts(), mounts);
    pair.rotated(before, 1, Duration::from_secs(120)).await;
    load.passes("after a rotation").await;
    let tally = load.stop().await;
    pair.assert_clean(&tally).await;

    // The mount helper is killed and starts again, which no client notices.
    let load = pair.load();
    load.passes("before the mount helper is killed").await;
    node.take_helper().kill().await;
    load.passes("without a mount helper").await;
    node.start_helper().await;
    assert_eq!(node.host.mounts(), mounts);
    load.passes("with another mount helper").await;
    let tally = load.stop().await;
    pair.assert_clean(&tally).await;
    drop(pair);

    for pod in [&server, &client] {
        node.kubelet.unpublish(&pod.uid, "sds").await;
    }
    node.assert_nothing_left();
    agent.wrote("sockets of pods are served again", 1).await;
}

#[tokio::test]
async fn a_restart_clears_ended_pods_and_serves_the_remaining_ones() {
    let node = Node::new(&certificate("1h")).await;
    let mut agent = node.start().await;
    let (stays, goes) = (node.pod("stays").await, node.pod("goes").await);
    let named = node.kubelet.request(&stays, "named", &[("sds-agent.io/socket-name", "sds.sock")]);
    let named = node.kubelet.publish_as(named).await.unwrap();
    let target = node.kubelet.publish(&stays, "sds").await;
    let gone = node.kubelet.publish(&goes, "sds").await;
    let inode = node.host.inode(&target);
    node.assert_served(&stays, &target).await;

    // A graceful end removes the socket paths and keeps the mounts.
    let mut helper = node.take_helper();
    for process in [&mut agent, &mut helper] {
        process.terminate();
        assert!(process.exit(PATIENCE).await.success());
    }
    assert_eq!(node.listening(), 0);
    assert!(!node.sockets().join("agent.sock").exists());
    assert!(!node.kubelet.registration_socket().exists() && !node.kubelet.driver_socket().exists());
    assert_eq!(node.host.mounts().len(), 3);
    assert!(node.host.inode(&target.join("socket")).is_none());

    node.cluster.delete(&format!("/api/v1/namespaces/{}/pods/goes?gracePeriodSeconds=0", node.namespace)).await;
    let (file, link) = (node.sockets().join("file"), node.sockets().join(goes.uid.replace(|c: char| c.is_ascii_digit(), "a")));
    fs::write(&file, "").unwrap();
    symlink("/etc", &link).unwrap();
    let open = node.sockets().join(&stays.uid).join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();

    let agent = node.start().await;
    assert!(node.helper_output().contains("the kubelet has registered the CSI driver"));
    eventually("the ended pod is cleared", PATIENCE, async || {
        let (mounted, there) = (node.host.mounts().iter().any(|m| m.target == gone), node.sockets().join(&goes.uid).exists());
        if mounted || there { Err(format!("mounted: {mounted}, there: {there}")) } else { Ok(()) }
    })
    .await;
    assert_eq!(node.host.inode(&target), inode, "it is the directory that the pod has mounted");
    node.assert_served(&stays, &target).await;
    assert_eq!(node.fetch(&named, "sds.sock").await.unwrap()["spiffe_id"], stays.spiffe_id());
    assert!(file.exists() && link.is_symlink() && open.exists());
    assert_eq!(fs::read_dir(&open).unwrap().count(), 0);
    let log = node.helper_output();
    for stray in ["is a symbolic link or no directory", "file is not named by the UID of a pod", "open can be written by others"] {
        assert!(log.contains(stray), "{stray}: {log}");
    }

    // The mount helper also unpublishes volumes that it does not know, and volumes of the previous process.
    node.kubelet.unpublish(&goes.uid, "sds").await;
    node.kubelet.unpublish(&stays.uid, "named").await;
    node.kubelet.unpublish(&stays.uid, "sds").await;
    assert_eq!(node.host.mounts(), []);
    agent.kill().await;

    // An unpublish of a volume that is not served: only the paths identify it.
    let agent = node.start().await;
    let target = node.kubelet.publish(&stays, "sds").await;
    agent.kill().await;
    node.take_helper().kill().await;
    fs::rename(node.sockets(), node.dir.path().join("lost")).unwrap();
    let _agent = node.start().await;
    assert!(node.host.mounts().iter().any(|mount| mount.target == target));
    node.kubelet.unpublish(&stays.uid, "sds").await;
    assert_eq!(node.host.mounts(), []);
}

/// Neither call contacts the upstream: pods start and end while the API server is unavailable.
#[tokio::test]
async fn the_upstream_is_away_and_pods_start_and_end() {
    let node = Node::new(&certificate("1h")).await;
    let pod = node.pod("cart").await;
    let kubeconfig = node.dir.path().join("kubeconfig");
    let access = fs::read_to_string(&kubeconfig).unwrap();
    let mut away: serde_json::Value = serde_json::from_str(&access).unwrap();
    away["clusters"][0]["cluster"]["server"] = json!("https://127.0.0.1:1");
    fs::write(&kubeconfig, away.to_string()).unwrap();
    let agent = node.launch.spawn();
    node.start_helper().await;
    agent.wrote("serving a root-only socket", 1).await;

    let begun = Instant::now();
    let target = node.kubelet.publish(&pod, "sds").await;
    let forged = node.pod("forger").await;
    let mut request = node.kubelet.request(&forged, "sds", &[]);
    request.volume_context.insert("csi.storage.k8s.io/serviceAccount.name".into(), pod.service_account.clone());
    let forged_target = node.kubelet.publish_as(request).await.unwrap();
    assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
    assert_eq!(node.listening(), 2);
    // The agent cannot identify the pods: a caller waits, and no key leaves.
    for target in [&target, &forged_target] {
        let program = format!("'{}' fetch --socket {IN_POD}/socket --name default -o json --timeout 3s", agent::program().display());
        let output = node.host.in_pod(target, &program).await;
        assert!(!output.status.success() && output.stdout.is_empty());
    }
    let begun = Instant::now();
    node.kubelet.unpublish(&pod.uid, "sds").await;
    let target = node.kubelet.publish(&pod, "sds").await;
    assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());

    // The upstream returns with the next process. A volume that was published for a pod which the index does not confirm is not served.
    agent.kill().await;
    fs::write(&kubeconfig, access).unwrap();
    let agent = node.start().await;
    node.assert_served(&pod, &target).await;
    let mut request = node.kubelet.request(&forged, "sds", &[]);
    request.volume_context.insert("csi.storage.k8s.io/serviceAccount.name".into(), pod.service_account.clone());
    let status = node.kubelet.publish_as(request).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    drop(agent);
}

/// An agent with a wrong node name sees no pods. It must not remove the sockets of all pods for this reason.
#[tokio::test]
async fn an_agent_on_the_wrong_node_clears_nothing() {
    let node = Node::new(&certificate("1h")).await;
    let agent = node.start().await;
    let pod = node.pod("cart").await;
    node.kubelet.publish(&pod, "sds").await;
    agent.kill().await;
    node.take_helper().kill().await;
    node.start_helper().await;
    let mounts = node.host.mounts();
    let elsewhere = node.cluster.node().await;
    let agent = node.launch.clone().env("NODE_NAME", &elsewhere).start().await;
    eventually("the log says so", PATIENCE, async || {
        if agent.process().output().contains("the agent's own pod is not on NODE_NAME") { Ok(()) } else { Err("not yet".into()) }
    })
    .await;
    assert_eq!((node.host.mounts(), node.directories().len()), (mounts, 1));
}
