//! An agent in the hands of an attacker: it can change everything in the directory of sockets, and answer the mount helper as it likes.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::symlink,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use nix::unistd::Pid;
use sds_agent::per_pod::{
    interface::{
        FindEndedRequest, FindEndedResponse, PodVolume, ServeRequest, ServeResponse, WithdrawRequest, WithdrawResponse,
        pod_sockets_server::{PodSockets, PodSocketsServer},
    },
    root_socket::Server,
};
use sds_server::grpc::table::Table;
use test_harness::{child, cluster::Pod, eventually};
use tokio::{io::AsyncWriteExt, net::UnixListener, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};

use super::{Node, PATIENCE, PROMPT, certificate};

const HELPER_SOCKET: &str = "agent.sock";
/// The time that the mount helper waits for an agent, and some more for a busy machine.
const HELPER_WAITS: Duration = Duration::from_secs(15);

impl Node {
    /// Every mount on the host is a directory below that of the sockets, read-only.
    fn assert_only_own_mounts(&self) {
        for mount in self.host.mounts() {
            assert!(mount.root.starts_with(self.sockets()) && mount.options.contains("ro,nosuid,nodev,noexec"), "{mount:?}");
        }
    }

    async fn pods(&self, count: usize) -> Vec<Pod> {
        let mut pods = vec![self.pod("pod").await];
        for number in 1..count {
            pods.push(self.cluster.pod_of(&self.namespace, "pod", &format!("pod-{number}"), &self.name).await);
        }
        pods
    }

    async fn publish_quickly(&self, pod: &Pod) -> Result<(), Status> {
        let begun = Instant::now();
        let published = self.kubelet.publish_as(self.kubelet.request(pod, "sds", &[])).await;
        assert!(begun.elapsed() < HELPER_WAITS, "{:?}", begun.elapsed());
        published.map(drop)
    }
}

/// Replaces directories of volumes and of pods by links, and moves directories of one pod to another until `ends`.
fn swap(sockets: &Path, outside: &Path, uids: &[String], ends: &AtomicBool) -> usize {
    let mut swapped = 0;
    while !ends.load(Ordering::Relaxed) {
        for (number, uid) in uids.iter().enumerate() {
            let (pod, leaf, aside) = (sockets.join(uid), sockets.join(uid).join("sds"), sockets.join(".aside"));
            let other = sockets.join(&uids[(number + 1) % uids.len()]).join("sds");
            let done = match number % 3 {
                0 => fs::rename(&pod, &aside).and_then(|()| symlink(outside, &pod)),
                1 => fs::rename(&leaf, &aside).and_then(|()| symlink(outside, &leaf)),
                _ => fs::rename(&leaf, &aside).and_then(|()| fs::rename(&other, &leaf)),
            };
            swapped += usize::from(done.is_ok());
            let _ = fs::remove_dir_all(&aside);
            for link in [&pod, &leaf] {
                if link.is_symlink() {
                    let _ = fs::remove_file(link);
                }
            }
        }
    }
    swapped
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn swapped_links_and_directories_give_no_mount_outside() {
    let node = Node::new(&certificate("1h")).await;
    node.start_helper().await;
    let outside = node.dir.path().join("outside");
    fs::create_dir_all(outside.join("sds")).unwrap();
    fs::write(outside.join("sds/secret"), "").unwrap();
    let mode = || fs::metadata(&outside).unwrap().permissions();
    let before = mode();
    let pods = node.pods(6).await;
    let uids: Vec<_> = pods.iter().map(|pod| pod.uid.clone()).collect();
    let ends = Arc::new(AtomicBool::new(false));
    let swapping = {
        let (sockets, outside, ends) = (node.sockets(), outside.clone(), ends.clone());
        tokio::task::spawn_blocking(move || swap(&sockets, &outside, &uids, &ends))
    };
    let (mut published, mut refused) = (0, 0);
    for _ in 0..60 {
        for pod in &pods {
            match node.publish_quickly(pod).await {
                Ok(()) => published += 1,
                Err(_) => refused += 1,
            }
            node.assert_only_own_mounts();
            let _ = node.kubelet.unpublish_quietly(&pod.uid, "sds").await;
        }
    }
    ends.store(true, Ordering::Relaxed);
    let swapped = swapping.await.unwrap();
    println!("figure: {published} volumes published and {refused} refused during {swapped} swaps");
    assert!(published > 0 && refused > 0 && swapped > 100, "{published} published, {refused} refused, {swapped} swaps");
    assert_eq!(mode(), before, "the mode of a directory outside was changed");
    assert!(outside.join("sds/secret").exists());
    for pod in &pods {
        node.kubelet.unpublish(&pod.uid, "sds").await;
    }
    assert_eq!(node.host.mounts(), []);
}

/// The resident memory of a process, in bytes.
fn resident(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
}

/// An agent that accepts connections, and sends `bytes` again and again.
async fn talk(listener: UnixListener, bytes: &'static [u8], connections: Arc<AtomicUsize>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        connections.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            if bytes.is_empty() {
                std::future::pending::<()>().await;
            }
            while stream.write_all(bytes).await.is_ok() {}
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_or_flooding_agent_delays_no_pod_beyond_the_limit() {
    let node = Node::new(&certificate("1h")).await;
    node.start_helper().await;
    let pod = node.pod("cart").await;
    let resident = || resident(node.helper.lock().unwrap().as_ref().unwrap().process().pid());
    let before = resident();
    // No byte; no HTTP/2; SETTINGS, and PINGs without end; a header block without end.
    let floods: [&[u8]; 4] = [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"\0\0\0\x04\0\0\0\0\0\0\0\x08\x06\0\0\0\0\0\0\0\0\0\0\0\0\0", &[0; 4096]];
    for bytes in floods {
        let socket = node.sockets().join(HELPER_SOCKET);
        let _ = fs::remove_file(&socket);
        let connections = Arc::new(AtomicUsize::new(0));
        let talking = tokio::spawn(talk(UnixListener::bind(&socket).unwrap(), bytes, connections.clone()));
        for _ in 0..3 {
            node.publish_quickly(&pod).await.unwrap();
            node.assert_only_own_mounts();
            let begun = Instant::now();
            node.kubelet.unpublish(&pod.uid, "sds").await;
            assert!(begun.elapsed() < HELPER_WAITS, "{:?}", begun.elapsed());
        }
        assert!(connections.load(Ordering::Relaxed) >= 6, "the mount helper calls the agent");
        talking.abort();
    }
    let after = resident();
    println!("figure: the mount helper used {} KiB before, and {} KiB after four floods", before >> 10, after >> 10);
    assert!(after < before + (16 << 20), "{before} and {after} bytes");

    // A link leads to no other socket.
    let other = node.dir.path().join("other.sock");
    let connections = Arc::new(AtomicUsize::new(0));
    let _talking = tokio::spawn(talk(UnixListener::bind(&other).unwrap(), b"", connections.clone()));
    let socket = node.sockets().join(HELPER_SOCKET);
    fs::remove_file(&socket).unwrap();
    symlink(&other, &socket).unwrap();
    node.publish_quickly(&pod).await.unwrap();
    assert_eq!(connections.load(Ordering::Relaxed), 0);
}

/// An agent that answers as the test says.
#[derive(Clone, Default)]
struct Liar {
    refusal: Option<Status>,
    ended: Vec<PodVolume>,
    asked: Arc<Mutex<HashSet<String>>>,
}

#[tonic::async_trait]
impl PodSockets for Liar {
    async fn serve(&self, request: Request<ServeRequest>) -> Result<Response<ServeResponse>, Status> {
        self.asked.lock().unwrap().insert(request.into_inner().pod_name);
        self.refusal.clone().map_or_else(|| Ok(Response::new(ServeResponse {})), Err)
    }

    async fn withdraw(&self, _: Request<WithdrawRequest>) -> Result<Response<WithdrawResponse>, Status> {
        Err(Status::permission_denied("no"))
    }

    async fn find_ended(&self, request: Request<FindEndedRequest>) -> Result<Response<FindEndedResponse>, Status> {
        let mut volumes = request.into_inner().volumes;
        self.asked.lock().unwrap().extend(volumes.iter().map(|volume| volume.name.clone()));
        volumes.extend(self.ended.clone());
        Ok(Response::new(FindEndedResponse { volumes }))
    }
}

impl Liar {
    fn start(&self, node: &Node) -> CancellationToken {
        let socket = node.sockets().join(HELPER_SOCKET);
        let _ = fs::remove_file(&socket);
        let last = CancellationToken::new();
        let services = Table::default().with(PodSocketsServer::new(self.clone()));
        tokio::spawn(Server::bind("a test", socket, services, Arc::default()).unwrap().run(last.clone()));
        last
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lies_of_an_agent_touch_no_volume_of_another_driver() {
    let node = Node::new(&certificate("1h")).await;
    node.start_helper().await;
    let (cart, other) = (node.pod("cart").await, node.pod("other").await);
    let refusal = Status::permission_denied(format!("no\n\u{1b}[31m{}", "x".repeat(4000)));
    let last = Liar { refusal: Some(refusal), ..Liar::default() }.start(&node);
    let status = node.publish_quickly(&cart).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().len() < 1000 && !status.message().chars().any(char::is_control), "{status:?}");
    last.cancel();
    node.assert_nothing_left();

    let last = Liar::default().start(&node);
    node.publish_quickly(&cart).await.unwrap();
    last.cancel();
    // The volume of another driver, which a pod uses. A directory of this name makes the helper ask about it.
    let data = node.kubelet.target(&other.uid, "data");
    fs::create_dir_all(&data).unwrap();
    let words = node.host.words();
    let mount = format!("mount -t tmpfs none '{}' && touch '{}/kept'", data.display(), data.display());
    let words: Vec<_> = words.iter().map(String::as_str).chain(["sh", "-c", &mount]).collect();
    child::succeed(Path::new(words[0]), &words[1..], PROMPT).await;
    fs::create_dir_all(node.sockets().join(&other.uid).join("data")).unwrap();

    let foreign = PodVolume { pod_uid: other.uid.clone(), name: "another".into() };
    let liar = Liar { ended: vec![foreign, PodVolume::default()], ..Liar::default() };
    let last = liar.start(&node);
    node.take_helper().kill().await;
    node.start_helper().await;
    eventually("the mount helper asks which pods have ended", PATIENCE, async || {
        let asked = liar.asked.lock().unwrap().clone();
        if asked.contains("data") && asked.contains("sds") { Ok(()) } else { Err(format!("{asked:?}")) }
    })
    .await;
    // It removes its own volume, and leaves the other one.
    eventually("the volume of the driver is removed", PATIENCE, async || match node.host.mounts() {
        mounts if mounts.iter().any(|mount| mount.target.ends_with("sds/mount")) => Err(format!("{mounts:?}")),
        mounts => Ok(mounts),
    })
    .await
    .iter()
    .find(|mount| mount.target == data)
    .expect("the volume of the other driver is mounted");
    eventually("the log says why", PATIENCE, async || match node.helper_output() {
        log if log.contains("has a mount that is not of this driver") => Ok(()),
        log => Err(log),
    })
    .await;
    last.cancel();
}
