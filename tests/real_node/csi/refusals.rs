//! Requests that the driver rejects: forged volume contexts, and files at the paths that the driver needs.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use serde_json::Value;
use test_harness::{child, cluster::Pod, eventually};
use tokio::time::Instant;
use tonic::Code;

use super::{Node, PATIENCE, PROMPT, certificate};

#[tokio::test]
async fn what_is_forged_or_in_the_way_is_refused_and_leaves_nothing() {
    let node = Node::new(&certificate("1h")).await;
    let agent = node.start().await;
    let (cart, victim) = (node.pod("cart").await, node.pod("victim").await);
    let elsewhere = node.cluster.node().await;
    let elsewhere = node.cluster.pod(&node.namespace, "elsewhere", &elsewhere).await;
    let request = |attributes: &[(&str, &str)]| node.kubelet.request(&cart, "sds", attributes);
    let context = |name: &str, value: &str| {
        let mut request = request(&[]);
        request.volume_context.insert(name.into(), value.into());
        request
    };

    let mut table = vec![
        // Without a CSIDriver object the context consists of the pod's own attributes. They name another pod, or this pod with a wrong
        // field.
        (context("csi.storage.k8s.io/pod.uid", &victim.uid), Code::PermissionDenied),
        (context("csi.storage.k8s.io/pod.name", &victim.name), Code::PermissionDenied),
        (context("csi.storage.k8s.io/pod.namespace", "kube-system"), Code::PermissionDenied),
        (context("csi.storage.k8s.io/serviceAccount.name", &victim.service_account), Code::PermissionDenied),
        (context("csi.storage.k8s.io/ephemeral", "false"), Code::InvalidArgument),
        (context("colour", "s3cr3t"), Code::InvalidArgument),
        (context("sds-agent.io/profile", "s3cr3t"), Code::PermissionDenied),
        (context("sds-agent.io/socket-name", "../socket"), Code::InvalidArgument),
        (context("sds-agent.io/socket-name", &"x".repeat(41)), Code::InvalidArgument),
        (node.kubelet.request(&elsewhere, "sds", &[]), Code::NotFound),
        (node.kubelet.request(&cart, &"v".repeat(64), &[]), Code::InvalidArgument),
    ];
    for path in [
        "/etc".to_owned(),
        format!("{}/../{}", node.kubelet.target(&cart.uid, "sds").display(), "mount"),
        format!("{}{}", node.kubelet.target(&cart.uid, "sds").display(), "/x".repeat(2500)),
    ] {
        let mut request = request(&[]);
        request.target_path = path;
        table.push((request, Code::InvalidArgument));
    }
    let mut writable = request(&[]);
    writable.readonly = false;
    table.push((writable, Code::InvalidArgument));

    for (request, code) in table {
        let shown = format!("{} {:?}", &request.target_path[..request.target_path.len().min(200)], request.volume_context);
        let status = node.kubelet.publish_as(request).await.expect_err(&shown);
        assert_eq!(status.code(), code, "{shown}: {status:?}");
        node.assert_nothing_left();
    }
    // One line for each volume and code, and one for the paths that name no volume.
    eventually("the lines", PATIENCE, async || {
        let lines = node.helper_output().matches("refused a call of the kubelet").count();
        if lines >= 4 { Ok(()) } else { Err(format!("{lines}")) }
    })
    .await;
    for log in [node.helper_output(), agent.process().output()] {
        assert!(!log.contains("s3cr3t"), "values of a volume context are in the log");
    }

    // The valid request is still accepted.
    let target = node.kubelet.publish(&cart, "sds").await;
    node.assert_served(&cart, &target).await;
}

/// A pod whose volume the kubelet publishes again and again, and one that is created in a loop.
#[tokio::test]
async fn a_flood_of_calls_is_one_line_for_each_volume_and_cause() {
    const CALLS: usize = 1000;
    let node = Node::new(&certificate("1h")).await;
    let agent = node.start().await;
    let (noisy, quiet) = (node.pod("noisy").await, node.pod("quiet").await);
    let begun = Instant::now();
    let refused = async |pod: &Pod, number: usize| {
        let mut request = node.kubelet.request(pod, "sds", &[]);
        request.volume_context.insert(format!("colour-{number}"), "red".into());
        assert_eq!(node.kubelet.publish_as(request).await.expect_err("a foreign attribute").code(), Code::InvalidArgument);
    };
    let of = |message: &str, pod: &Pod| {
        let is_it = |line: &Value| line["message"] == message && line.to_string().contains(&pod.uid);
        node.logs(&agent).concat().into_iter().filter(is_it).collect::<Vec<_>>()
    };
    let messages = ["refused a call of the kubelet", "volume published", "volume unpublished", "socket published", "socket unpublished"];
    for number in 0..CALLS / 2 {
        refused(&noisy, number).await;
        node.kubelet.publish(&noisy, "sds").await;
        node.kubelet.unpublish(&noisy.uid, "sds").await;
    }
    for _ in 0..20 {
        node.kubelet.register().await;
    }
    refused(&quiet, 0).await;
    node.kubelet.publish(&quiet, "sds").await;
    node.kubelet.unpublish(&quiet.uid, "sds").await;
    for message in messages {
        eventually(message, PATIENCE, async || match of(message, &quiet).len() {
            1 => Ok(()),
            lines => Err(format!("{lines} lines")),
        })
        .await;
    }
    for number in CALLS / 2..CALLS {
        refused(&noisy, number).await;
        node.kubelet.publish(&noisy, "sds").await;
        node.kubelet.unpublish(&noisy.uid, "sds").await;
    }
    // One line a minute.
    let most = 1 + begun.elapsed().as_secs() / 60;
    for message in messages {
        let lines = of(message, &noisy).len() as u64;
        assert!((1..=most).contains(&lines), "{message}: {lines} lines, {most} minutes");
    }
    let [helper, served] = node.logs(&agent);
    let registered = helper.iter().filter(|line| line["message"] == "the kubelet has registered the CSI driver").count() as u64;
    assert!((1..=most).contains(&registered), "{registered}");
    // Nothing else is written for each call: the lines about the one certificate, and those of the start.
    for log in [helper, served] {
        assert!(log.len() < 60, "{} lines:\n{log:#?}", log.len());
    }
    node.assert_nothing_left();
}

#[tokio::test]
async fn a_target_or_a_directory_that_is_not_ours_is_refused() {
    let node = Node::new(&certificate("1h")).await;
    let agent = node.start().await;
    let pod = node.pod("cart").await;
    let target = node.kubelet.target(&pod.uid, "sds");
    let request = || node.kubelet.request(&pod, "sds", &[]);
    let refused = async |what: &str| {
        let status = node.kubelet.publish_as(request()).await.expect_err(what);
        assert_eq!(status.code(), Code::FailedPrecondition, "{what}: {status:?}");
        assert_eq!((node.directories(), node.listening()), (Vec::<PathBuf>::new(), 0), "{what}");
        status.message().to_owned()
    };
    let on_host = async |program: &str| {
        let words = node.host.words();
        let words: Vec<_> = words.iter().map(String::as_str).chain(["sh", "-c", program]).collect();
        child::succeed(Path::new(words[0]), &words[1..], PROMPT).await;
    };

    fs::create_dir_all(&target).unwrap();
    on_host(&format!("mount -t tmpfs none '{}'", target.display())).await;
    assert!(refused("mounted").await.contains("has something else mounted on it"));
    on_host(&format!("umount '{}'", target.display())).await;
    node.kubelet.unpublish(&pod.uid, "sds").await;

    let outside = node.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::create_dir_all(target.parent().unwrap()).unwrap();
    symlink(&outside, &target).unwrap();
    assert!(refused("a link as the target").await.contains("is a symbolic link"));
    fs::remove_file(&target).unwrap();
    let volumes = target.ancestors().nth(2).unwrap();
    fs::remove_dir_all(volumes).unwrap();
    // The directory is not empty, so that no clean-up removes it.
    fs::create_dir_all(outside.join("sds/kept")).unwrap();
    symlink(&outside, volumes).unwrap();
    assert!(refused("a link on the way").await.contains("on the way"));
    fs::remove_file(volumes).unwrap();

    let own = node.sockets().join(&pod.uid);
    symlink(&outside, &own).unwrap();
    let status = node.kubelet.publish_as(request()).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("is a symbolic link or no directory"), "{status:?}");
    assert!(own.is_symlink(), "it is left alone");
    // The deletion of the pod must not hang because of it.
    node.kubelet.unpublish(&pod.uid, "sds").await;
    fs::remove_file(&own).unwrap();

    fs::create_dir(&own).unwrap();
    fs::set_permissions(&own, fs::Permissions::from_mode(0o777)).unwrap();
    let status = node.kubelet.publish_as(request()).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("can be written by others (mode 0777)"), "{status:?}");
    fs::remove_dir(&own).unwrap();

    let inner = |path: &Path| fs::read_dir(path).unwrap().count();
    assert_eq!((inner(&outside), inner(&outside.join("sds"))), (1, 1), "something was made where a link led");
    let target = node.kubelet.publish(&pod, "sds").await;
    node.assert_served(&pod, &target).await;
    drop(agent);
}

#[tokio::test]
async fn an_unsafe_directory_keeps_agent_and_mount_helper_from_starting() {
    let node = Node::new(&certificate("1h")).await;
    fs::create_dir(node.sockets()).unwrap();
    fs::set_permissions(node.sockets(), fs::Permissions::from_mode(0o777)).unwrap();
    for launch in [&node.launch, &node.helper_launch] {
        let mut process = launch.spawn();
        assert!(!process.exit(PATIENCE).await.success());
        let said = process.process().output();
        assert!(said.contains("sockets.perPod.directory: ") && said.contains("can be written by others (mode 0777)"), "{said}");
    }
    assert!(!node.kubelet.registration_socket().exists());
}
