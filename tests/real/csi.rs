//! Sockets of pods with real mounts: a kubelet's calls, Envoys that see one mounted directory, and agents that are killed in between.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    time::Duration,
};

use futures::future::join_all;
use serde_json::json;
use tempfile::TempDir;
use tokio::time::{Instant, timeout};
use tonic::Code;

use crate::support::{
    self,
    agent::{self, Agent, Launch},
    agent_pod::AgentPod,
    child,
    cluster::{Cluster, Pod},
    envoy::{Envoy, Sds, Side},
    eventually,
    host::{Host, IN_POD},
    kubelet::Kubelet,
    pair::Pair,
};

const PATIENCE: Duration = Duration::from_secs(60);
/// Publishing and unpublishing wait for nobody.
const PROMPT: Duration = Duration::from_secs(5);
/// The flags that every mount has.
const GUARDED: [&str; 4] = ["ro", "nosuid", "nodev", "noexec"];

/// A node whose kubelet knows the agent as a driver; nothing is served but sockets of pods.
struct Node {
    cluster: Cluster,
    name: String,
    namespace: String,
    agent_pod: AgentPod,
    host: Host,
    kubelet: Kubelet,
    launch: Launch,
    dir: TempDir,
}

impl Node {
    async fn new(settings: &str) -> Self {
        let cluster = Cluster::connect().await;
        let dir = tempfile::tempdir().unwrap();
        let host = Host::new(dir.path()).await;
        let name = cluster.node().await;
        let namespace = cluster.namespace().await;
        let agent_pod = cluster.agent(dir.path(), &name).await;
        let launch = agent_pod.launch_on(dir.path(), &sockets(dir.path()), settings).under(host.container());
        let kubelet = Kubelet::new(&host.kubelet());
        Self { cluster, name, namespace, agent_pod, host, kubelet, launch, dir }
    }

    async fn start(&self) -> Agent {
        let agent = self.launch.start().await;
        self.kubelet.register().await;
        agent
    }

    async fn pod(&self, name: &str) -> Pod {
        self.cluster.pod(&self.namespace, name, &self.name).await
    }

    /// Where the agent has the sockets.
    fn sockets(&self) -> PathBuf {
        self.dir.path().join("pods")
    }

    /// Every directory of a volume.
    fn directories(&self) -> Vec<PathBuf> {
        let inner = |path: PathBuf| fs::read_dir(path).into_iter().flatten().map(|entry| entry.unwrap().path());
        inner(self.sockets()).filter(|path| !path.ends_with(".view")).flat_map(inner).collect()
    }

    /// The paths on which somebody listens, below the directory of sockets.
    fn listening(&self) -> usize {
        let table = fs::read_to_string("/proc/net/unix").unwrap();
        let own = self.sockets().display().to_string();
        table.lines().filter(|line| line.contains(&own) && line.split_whitespace().nth(3) == Some("00010000")).count()
    }

    /// Asks in the pod that has `target` mounted.
    async fn fetch(&self, target: &Path, socket: &str) -> Result<serde_json::Value, String> {
        let program = format!("'{}' fetch --socket {IN_POD}/{socket} --name default -o json --timeout 20s", agent::program().display());
        let output = self.host.in_pod(target, &program).await;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())
    }

    async fn assert_served(&self, pod: &Pod, target: &Path) {
        let certificate = self.fetch(target, "socket").await.unwrap();
        assert_eq!(certificate["spiffe_id"], pod.spiffe_id());
    }

    fn assert_nothing_left(&self) {
        assert_eq!(self.host.mounts(), []);
        assert_eq!(self.directories(), Vec::<PathBuf>::new());
        assert_eq!(self.listening(), 0);
        let targets: Vec<_> = fs::read_dir(self.host.kubelet().join("pods")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(targets, Vec::<PathBuf>::new());
    }
}

fn sockets(dir: &Path) -> String {
    let (directory, kubelet) = (dir.join("pods"), dir.join("kubelet"));
    let per_pod = format!("{{ enabled: true, directory: {}, kubeletDirectory: {} }}", directory.display(), kubelet.display());
    format!("{{ shared: {{ enabled: false }}, perPod: {per_pod} }}")
}

fn fds(agent: &Agent) -> usize {
    fs::read_dir(format!("/proc/{}/fd", agent.process().pid())).unwrap().count()
}

#[tokio::test]
async fn envoys_that_see_one_mounted_directory_talk_and_survive_a_killed_agent() {
    let _turn = support::turn().await;
    let node = Node::new("certificate: { lifetime: 60s }").await;
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

    // The pods' own mounts are of the directories' inodes: nobody touches them while the agent is away and comes back.
    let before = pair.taken().await;
    let mounts = node.host.mounts();
    assert_eq!(mounts.len(), 2, "{mounts:?}");
    let load = pair.load();
    agent.kill().await;
    let agent = node.start().await;
    assert_eq!(node.host.mounts(), mounts);
    pair.rotated(before, 1, Duration::from_secs(120)).await;
    let tally = load.stop().await;
    pair.assert_clean(&tally, 200).await;
    drop(pair);

    for pod in [&server, &client] {
        node.kubelet.unpublish(&pod.uid, "sds").await;
    }
    node.assert_nothing_left();
    assert!(agent.process().output().contains("sockets of pods are served again"));
}

#[tokio::test]
async fn a_pod_gets_its_own_identity_through_a_mount_that_it_cannot_change() {
    let node = Node::new("certificate: { lifetime: 1h }").await;
    let agent = node.start().await;
    let (cart, other) = (node.pod("cart").await, node.pod("other").await);
    let cart_target = node.kubelet.publish(&cart, "sds").await;
    // The longest names there are.
    let (volume, socket) = ("v".repeat(63), "s".repeat(40));
    let named = node.kubelet.request(&other, &volume, &[("sds-agent.io/socket-name", &socket)]);
    let other_target = node.kubelet.publish_as(named).await.unwrap();

    node.assert_served(&cart, &cart_target).await;
    let certificate = node.fetch(&other_target, &socket).await.unwrap();
    assert_eq!(certificate["spiffe_id"], other.spiffe_id());

    // By no name does one get the other's.
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
    let node = Node::new("certificate: { lifetime: 1h }").await;
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
async fn publishing_again_changes_nothing_and_another_volume_in_its_place_is_refused() {
    let node = Node::new("certificate: { lifetime: 1h }").await;
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

    // A name that is taken away comes back with the next call.
    fs::remove_file(node.directories()[0].join("socket")).unwrap();
    node.kubelet.publish(&pod, "sds").await;
    node.assert_served(&pod, &target).await;
    drop(agent);
}

#[tokio::test]
async fn what_is_forged_or_in_the_way_is_refused_and_leaves_nothing() {
    let node = Node::new("certificate: { lifetime: 1h }").await;
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
        // Without a CSIDriver object a pod's own attributes are all there is: it names another pod, or itself wrongly.
        (context("csi.storage.k8s.io/pod.uid", &victim.uid), Code::PermissionDenied),
        (context("csi.storage.k8s.io/pod.name", &victim.name), Code::PermissionDenied),
        (context("csi.storage.k8s.io/pod.namespace", "kube-system"), Code::PermissionDenied),
        (context("csi.storage.k8s.io/serviceAccount.name", &victim.service_account), Code::PermissionDenied),
        (context("csi.storage.k8s.io/ephemeral", "false"), Code::InvalidArgument),
        (context("colour", "s3cr3t"), Code::InvalidArgument),
        (context("sds-agent.io/profile", "s3cr3t"), Code::InvalidArgument),
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
    let log = agent.process().output();
    assert!(log.matches("refused a call of the kubelet").count() >= 15, "{log}");
    assert!(!log.contains("s3cr3t"), "values of a volume context are in the log");

    // The good one is still good.
    let target = node.kubelet.publish(&cart, "sds").await;
    node.assert_served(&cart, &target).await;
}

#[tokio::test]
async fn a_target_or_a_directory_that_is_not_ours_is_refused() {
    let node = Node::new("certificate: { lifetime: 1h }").await;
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
    // It holds something, so that nobody's clearing up takes it away.
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
    // A pod must not hang for it.
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
async fn a_restart_clears_what_is_gone_serves_what_is_there_and_leaves_strays_alone() {
    let node = Node::new("certificate: { lifetime: 1h }").await;
    let mut agent = node.start().await;
    let (stays, goes) = (node.pod("stays").await, node.pod("goes").await);
    let named = node.kubelet.request(&stays, "named", &[("sds-agent.io/socket-name", "sds.sock")]);
    let named = node.kubelet.publish_as(named).await.unwrap();
    let target = node.kubelet.publish(&stays, "sds").await;
    let gone = node.kubelet.publish(&goes, "sds").await;
    let inode = node.host.inode(&target);
    node.assert_served(&stays, &target).await;

    // A proper end takes the names and leaves the mounts.
    agent.terminate();
    assert!(agent.exit(PATIENCE).await.success());
    assert_eq!(node.listening(), 0);
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
    eventually("the pod that is gone is cleared", PATIENCE, async || {
        let (mounted, there) = (node.host.mounts().iter().any(|m| m.target == gone), node.sockets().join(&goes.uid).exists());
        if mounted || there { Err(format!("mounted: {mounted}, there: {there}")) } else { Ok(()) }
    })
    .await;
    assert_eq!(node.host.inode(&target), inode, "it is the directory that the pod has mounted");
    node.assert_served(&stays, &target).await;
    assert_eq!(node.fetch(&named, "sds.sock").await.unwrap()["spiffe_id"], stays.spiffe_id());
    assert!(file.exists() && link.is_symlink() && open.exists());
    assert_eq!(fs::read_dir(&open).unwrap().count(), 0);
    let log = agent.process().output();
    for stray in ["is a symbolic link or no directory", "file has not the UID of a pod", "open can be written by others"] {
        assert!(log.contains(stray), "{stray}: {log}");
    }

    // What it does not know it unpublishes all the same, and what it has inherited.
    node.kubelet.unpublish(&goes.uid, "sds").await;
    node.kubelet.unpublish(&stays.uid, "named").await;
    node.kubelet.unpublish(&stays.uid, "sds").await;
    assert_eq!(node.host.mounts(), []);
    agent.kill().await;

    // An unpublish of what nobody serves: only the paths tell.
    let agent = node.start().await;
    let target = node.kubelet.publish(&stays, "sds").await;
    agent.kill().await;
    fs::rename(node.sockets(), node.dir.path().join("lost")).unwrap();
    let _agent = node.start().await;
    assert!(node.host.mounts().iter().any(|mount| mount.target == target));
    node.kubelet.unpublish(&stays.uid, "sds").await;
    assert_eq!(node.host.mounts(), []);
}

#[tokio::test]
async fn an_unsafe_directory_keeps_the_agent_from_starting() {
    let node = Node::new("certificate: { lifetime: 1h }").await;
    fs::create_dir(node.sockets()).unwrap();
    fs::set_permissions(node.sockets(), fs::Permissions::from_mode(0o777)).unwrap();
    let mut agent = node.launch.spawn();
    assert!(!agent.exit(PATIENCE).await.success());
    let said = agent.process().output();
    assert!(said.contains("sockets.perPod.directory: ") && said.contains("can be written by others (mode 0777)"), "{said}");
    assert!(!node.kubelet.registration_socket().exists());
}

/// Neither call asks anybody: pods start and end while the API server is away.
#[tokio::test]
async fn the_upstream_is_away_and_pods_start_and_end() {
    let node = Node::new("certificate: { lifetime: 1h }").await;
    let pod = node.pod("cart").await;
    let kubeconfig = node.dir.path().join("kubeconfig");
    let access = fs::read_to_string(&kubeconfig).unwrap();
    let mut away: serde_json::Value = serde_json::from_str(&access).unwrap();
    away["clusters"][0]["cluster"]["server"] = json!("https://127.0.0.1:1");
    fs::write(&kubeconfig, away.to_string()).unwrap();
    let agent = node.launch.spawn();
    node.kubelet.register().await;

    let begun = Instant::now();
    let target = node.kubelet.publish(&pod, "sds").await;
    let forged = node.pod("forger").await;
    let mut request = node.kubelet.request(&forged, "sds", &[]);
    request.volume_context.insert("csi.storage.k8s.io/serviceAccount.name".into(), pod.service_account.clone());
    let forged_target = node.kubelet.publish_as(request).await.unwrap();
    assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
    assert_eq!(node.listening(), 2);
    // Nobody can say whose they are: a caller waits, and no key leaves.
    for target in [&target, &forged_target] {
        let program = format!("'{}' fetch --socket {IN_POD}/socket --name default -o json --timeout 3s", agent::program().display());
        let output = node.host.in_pod(target, &program).await;
        assert!(!output.status.success() && output.stdout.is_empty());
    }
    let begun = Instant::now();
    node.kubelet.unpublish(&pod.uid, "sds").await;
    let target = node.kubelet.publish(&pod, "sds").await;
    assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());

    // The upstream comes back with the next process; what was published for another than the index knows is not served.
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

#[tokio::test]
async fn the_registration_is_offered_again_to_a_kubelet_that_refused_and_where_the_name_was_taken() {
    let node = Node::new("certificate: { lifetime: 1h }").await;
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

#[tokio::test]
async fn two_hundred_and_fifty_pods_at_once_leave_nothing_behind() {
    const PODS: usize = 250;
    let _turn = support::turn().await;
    let node = Node::new("certificate: { lifetime: 1h }").await;
    let agent = node.start().await;
    let first = node.pod("many").await;
    let others = join_all((1..PODS).map(|n| {
        let node = &node;
        async move { node.cluster.pod_of(&node.namespace, "many", &format!("many-{n}"), &node.name).await }
    }));
    let pods: Vec<Pod> = std::iter::once(first).chain(others.await).collect();

    // One round warms up what a process keeps for itself.
    for round in 0..3 {
        let before = fds(&agent);
        let begun = Instant::now();
        let targets = join_all(pods.iter().map(|pod| node.kubelet.publish(pod, "sds"))).await;
        let published = begun.elapsed();
        assert_eq!((node.host.mounts().len(), node.directories().len(), node.listening()), (PODS, PODS, PODS));
        for index in [0, PODS / 2, PODS - 1] {
            node.assert_served(&pods[index], &targets[index]).await;
        }
        assert!((agent.metric("sds_agent_pod_sockets").await - 250.0).abs() < 0.5);

        let begun = Instant::now();
        join_all(pods.iter().map(|pod| node.kubelet.unpublish(&pod.uid, "sds"))).await;
        eprintln!("figure: {PODS} pods at once: published in {published:?}, unpublished in {:?}", begun.elapsed());
        eventually("nobody listens any more", PATIENCE, async || match node.listening() {
            0 => Ok(()),
            left => Err(format!("{left} listen")),
        })
        .await;
        node.assert_nothing_left();
        let settled = eventually("the descriptors are back", PATIENCE, async || {
            let now = fds(&agent);
            if round == 0 || now <= before { Ok(now) } else { Err(format!("{now} and not {before}")) }
        });
        settled.await;
        assert!(agent.metric("sds_agent_pod_sockets").await < 0.5);
    }
    // Publishing and unpublishing cross: whatever wins, an unpublish ends it.
    let crossed = pods.iter().flat_map(|pod| {
        let (kubelet, uid) = (&node.kubelet, &pod.uid);
        let publish = async move { drop(kubelet.publish_as(kubelet.request(pod, "sds", &[])).await) };
        let unpublish = async move { drop(timeout(PATIENCE, kubelet.unpublish_quietly(uid, "sds")).await) };
        [futures::future::Either::Left(publish), futures::future::Either::Right(unpublish)]
    });
    join_all(crossed).await;
    join_all(pods.iter().map(|pod| node.kubelet.unpublish(&pod.uid, "sds"))).await;
    eventually("nobody listens any more", PATIENCE, async || match node.listening() {
        0 => Ok(()),
        left => Err(format!("{left} listen")),
    })
    .await;
    assert_eq!((node.host.mounts(), node.directories()), (vec![], vec![]));
}
