//! The files that a pod gets, and the operations on them that fail; the driver as the kubelet sees it.

use std::{fs, os::unix::fs::PermissionsExt};

use serde_json::json;
use test_harness::{agent, eventually, fetch, host::IN_POD};
use tokio::{io::AsyncReadExt, net::UnixStream, time::timeout};
use tonic::Code;

use super::{Node, PATIENCE, PROMPT, certificate};

/// The flags of every mount.
const GUARDED: [&str; 4] = ["ro", "nosuid", "nodev", "noexec"];

#[tokio::test]
async fn a_pod_gets_its_own_identity_through_a_mount_that_it_cannot_change() {
    let node = Node::new(&certificate("1h")).await;
    let agent = node.start().await;
    let (cart, other) = (node.pod("cart").await, node.pod("other").await);
    let cart_target = node.kubelet.publish(&cart, "sds").await;
    // The longest possible names.
    let (volume, socket) = ("v".repeat(63), "s".repeat(40));
    let named = node.kubelet.request(&other, &volume, &[("sds-agent.io/socket-name", &socket)]);
    let other_target = node.kubelet.publish_as(named).await.unwrap();

    node.assert_served(&cart, &cart_target).await;
    let certificate = node.fetch(&other_target, &socket).await.unwrap();
    assert_eq!(certificate["spiffe_id"], other.spiffe_id());

    // Neither pod gets the other's certificate, by any name.
    let program =
        format!("'{}' fetch --socket {IN_POD}/socket --name {} -o json --timeout 3s", agent::program().display(), other.spiffe_id());
    let output = node.host.in_pod(&cart_target, &program).await;
    assert!(!output.status.success() && !String::from_utf8_lossy(&output.stdout).contains("chain_pem"));

    for mount in node.host.mounts() {
        let flags: Vec<_> = mount.options.split(',').collect();
        assert!(GUARDED.iter().all(|flag| flags.contains(flag)), "the host's copy of the mount is {}", mount.options);
    }
    for attempt in ["touch /mnt/file", "rm /mnt/socket", "mv /mnt/socket /mnt/other", "chmod 777 /mnt", "ln -s /etc/shadow /mnt/link"] {
        let output = node.host.in_pod(&cart_target, attempt).await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("Read-only file system"), "{attempt}: {said}");
    }
    let seen = node.host.in_pod(&cart_target, &format!("ls -A {IN_POD} '{}'", node.dir.path().display())).await;
    assert_eq!(
        String::from_utf8_lossy(&seen.stdout).split_whitespace().filter(|word| !word.ends_with(':')).collect::<Vec<_>>(),
        ["socket"]
    );
    assert!((agent.metric("sds_agent_pod_sockets").await - 2.0).abs() < 0.5);
    assert_eq!(fs::metadata(node.sockets()).unwrap().permissions().mode() & 0o777, 0o700);
}

#[tokio::test]
async fn publishing_starts_the_issue_before_anybody_asks() {
    let node = Node::new(&certificate("1h")).await;
    let recorder = node.cluster.record_requests(&node.agent_pod.pod.namespace).await;
    let _agent = node.start().await;
    let pod = node.pod("early").await;
    node.kubelet.publish(&pod, "sds").await;
    eventually("a request of a pod that has not called", PATIENCE, async || {
        let seen = recorder.seen();
        if seen.iter().any(|request| request.uris == [pod.spiffe_id()]) { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await;
}

#[tokio::test]
async fn a_pod_that_may_wait_starts_with_its_certificate() {
    let node = Node::waiting("30s", &certificate("1h")).await;
    let agent = node.start().await;
    assert!(agent.metric("sds_agent_issuances_total").await < 0.5);
    node.kubelet.publish(&node.pod("patient").await, "sds").await;
    assert!(agent.metric("sds_agent_issuances_total").await > 0.5, "published before the certificate was there");
}

#[tokio::test]
async fn unpublishing_ends_connections_whether_or_not_they_have_spoken() {
    let node = Node::new(&certificate("1h")).await;
    let _agent = node.start().await;
    let pod = node.pod("cart").await;
    node.kubelet.publish(&pod, "sds").await;
    let path = node.directories()[0].join("socket");
    let mut silent = UnixStream::connect(&path).await.unwrap();
    let (_watch, lines) = fetch::watch(&path);
    lines.until("the stream's first secret", PATIENCE, |lines| (!lines.is_empty()).then_some(())).await;

    node.kubelet.unpublish(&pod.uid, "sds").await;
    // The call ends, regardless of the answers before.
    let mut told = Vec::new();
    drop(timeout(PROMPT, silent.read_to_end(&mut told)).await.expect("the connection ends"));
    node.assert_nothing_left();
}

#[tokio::test]
async fn publishing_the_same_volume_again_changes_nothing() {
    let node = Node::new(&certificate("1h")).await;
    let agent = node.start().await;
    let pod = node.pod("cart").await;
    let target = node.kubelet.publish(&pod, "sds").await;
    let (mounts, inode) = (node.host.mounts(), node.host.inode(&target.join("socket")));
    for _ in 0..20 {
        node.kubelet.publish(&pod, "sds").await;
    }
    assert_eq!((node.host.mounts(), node.host.inode(&target.join("socket"))), (mounts.clone(), inode));

    let renamed = node.kubelet.request(&pod, "sds", &[("sds-agent.io/socket-name", "other")]);
    let status = node.kubelet.publish_as(renamed).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists, "{status:?}");
    assert_eq!(node.host.mounts(), mounts);
    node.assert_served(&pod, &target).await;

    // A socket path that is removed is created again at the next call.
    fs::remove_file(node.directories()[0].join("socket")).unwrap();
    node.kubelet.publish(&pod, "sds").await;
    node.assert_served(&pod, &target).await;
    drop(agent);
}

#[tokio::test]
async fn the_registration_is_offered_again_after_the_kubelet_refuses() {
    let node = Node::new(&certificate("1h")).await;
    let _agent = node.start().await;
    let socket = node.kubelet.registration_socket();
    let inode = || node.host.inode(&socket);
    let first = inode().unwrap();
    node.kubelet.ask("NotifyRegistrationStatus", &json!({"pluginRegistered": false, "error": "not now"})).await;
    eventually("the socket is offered again", PATIENCE, async || match inode() {
        Some(second) if second != first => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    fs::remove_file(&socket).unwrap();
    eventually("the socket is back", PATIENCE, async || if socket.exists() { Ok(()) } else { Err("no".into()) }).await;
    node.kubelet.register().await;
}
