//! Attestation of this process, with a scripted `/proc` and API server.

use std::{fs, os::unix::net::UnixStream, path::Path, time::Duration};

use agent_kube::fake::FakeApi;
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};
use workload_identity::Workload;

use super::*;

const UID: &str = "2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4e";
const CONTAINER: &str = "b3cd3e5f7a9b1c3d5e7f9a1b3c5d7e9fb3cd3e5f7a9b1c3d5e7f9a1b3c5d7e9f";

/// A peer (this process), and the content of `/proc` about it.
struct World {
    api: FakeApi,
    attestor: KubernetesAttestor,
    peer: Peer,
    proc: tempfile::TempDir,
    _running: DropGuard,
    socket: UnixStream,
}

impl World {
    fn new(cgroup: &str, pods: &[Value]) -> Self {
        let (api, metrics) = (FakeApi::new(), agent_kube::Metrics::default());
        for pod in pods {
            api.put("pods", pod.clone());
        }
        let index = Pods::new(api.client(&metrics), "n1", metrics).with_containers();
        let shutdown = CancellationToken::new();
        tokio::spawn({
            let (index, shutdown) = (index.clone(), shutdown.clone());
            async move { index.run(shutdown).await }
        });
        let (socket, _other) = UnixStream::pair().unwrap();
        let peer = Peer::of(&socket).unwrap();
        let proc = tempfile::tempdir().unwrap();
        for (name, content) in [("self", "0::/"), (peer.pid.to_string().as_str(), cgroup)] {
            fs::create_dir(proc.path().join(name)).unwrap();
            fs::write(proc.path().join(name).join("cgroup"), content).unwrap();
        }
        let attestor = KubernetesAttestor::new(index, proc.path().to_owned(), None).unwrap();
        Self { api, attestor, peer, proc, _running: shutdown.drop_guard(), socket }
    }

    fn allowing(mut self, containers: &[&str], uids: &[u32]) -> Self {
        let containers = containers.iter().map(|name| (*name).into()).collect();
        self.attestor = self.attestor.with_policy(AttestationPolicy { containers, uids: uids.to_vec() });
        self
    }

    async fn attest(&self) -> Result<Attested, Error> {
        timeout(Duration::from_secs(20), self.attestor.attest(&self.peer)).await.expect("no verdict")
    }

    async fn refusal(&self) -> (Reason, bool) {
        let error = self.attest().await.unwrap_err();
        (error.reason, error.temporary)
    }
}

fn cgroup(uid: &str) -> String {
    format!("0::/kubepods/burstable/pod{uid}/f00")
}

fn pod(uid: &str, account: Option<&str>) -> Value {
    json!({"metadata": {"name": "cart-1", "namespace": "shop", "uid": uid}, "spec": {"nodeName": "n1", "serviceAccountName": account}})
}

#[tokio::test]
async fn a_process_in_a_pods_cgroup_is_that_pod_until_the_pod_goes() {
    let world = World::new(&cgroup(UID), &[pod(UID, Some("cart"))]);
    let attested = world.attest().await.unwrap();
    let Workload::Pod { pod, service_account, .. } = &attested.workload else { panic!("{:?}", attested.workload) };
    assert_eq!((pod.to_string().as_str(), service_account.as_deref()), ("shop/cart-1", Some("cart")));
    let other = world.attest().await.unwrap();
    other.terminated.cancel();
    assert!(!attested.terminated.is_cancelled(), "each connection has its own token");
    world.api.remove("pods", "shop", "cart-1");
    timeout(Duration::from_secs(20), attested.terminated.cancelled()).await.unwrap();
}

#[tokio::test]
async fn an_attested_caller_follows_the_labels_of_its_pod() {
    let world = World::new(&cgroup(UID), &[pod(UID, Some("cart"))]);
    let attested = world.attest().await.unwrap();
    let mut facts = attested.facts.clone().unwrap();
    let role = |workload: &Workload| match workload {
        Workload::Pod { labels, .. } => labels.get("role").map(str::to_owned),
        Workload::Unix { .. } => None,
    };
    assert_eq!(role(&attested.current()), None);
    world.api.change("pods", "shop", "cart-1", |pod| pod["metadata"]["labels"] = json!({"role": "canary"}));
    timeout(Duration::from_secs(20), facts.changed()).await.unwrap().unwrap();
    assert_eq!((role(&attested.current()).as_deref(), role(&attested.workload)), (Some("canary"), None));
}

#[tokio::test]
async fn a_pod_that_the_api_tells_later_is_awaited() {
    let world = World::new(&cgroup(UID), &[]);
    timeout(Duration::from_secs(20), world.attestor.pods.synced().wait_for(|s| *s)).await.unwrap().unwrap();
    world.api.fail("list", "pods", agent_kube::fake::Fault::Hang, 1);
    let (attested, ()) = tokio::join!(world.attest(), async {
        world.api.until("the live read", |api| (api.count("list", "pods") == 2).then_some(())).await;
        world.api.put("pods", pod(UID, Some("cart")));
    });
    assert_eq!(&*attested.unwrap().workload.pod().unwrap().name, "cart-1");
}

#[tokio::test]
async fn who_cannot_be_proven_is_refused_with_the_reason() {
    let broken = World::new("0::/user.slice", &[]);
    assert_eq!(broken.refusal().await, (Reason::not_in_pod, false));
    let other = UID.replace('2', "3");
    let conflicting = World::new(&format!("1:cpu:/kubepods/pod{UID}\n0::/kubepods/pod{other}"), &[]);
    assert_eq!(conflicting.refusal().await, (Reason::conflicting_cgroups, false));
    let accountless = World::new(&cgroup(UID), &[pod(UID, None)]);
    assert_eq!(accountless.refusal().await, (Reason::no_service_account, false));
    let unknown = World::new(&cgroup(UID), &[]);
    assert_eq!(unknown.refusal().await, (Reason::unknown_pod, true));

    let mut terminated = World::new(&cgroup(UID), &[pod(UID, Some("cart"))]);
    fs::remove_dir_all(terminated.proc.path().join(terminated.peer.pid.to_string())).unwrap();
    assert_eq!(terminated.refusal().await, (Reason::process_gone, false));
    terminated.peer.pid = 0;
    let invisible = terminated.attest().await.unwrap_err();
    assert_eq!(invisible.reason, Reason::pid_invisible);
    assert!(invisible.detail.contains("hostPID: true"));
}
/// A pod with containers of every kind that the kubelet has reported.
fn pod_of_containers() -> Value {
    let status = |name: &str, id: &str| json!([{"name": name, "containerID": format!("containerd://{id}")}]);
    let mut pod = pod(UID, Some("cart"));
    pod["status"] = json!({
        "phase": "Running",
        "containerStatuses": [{"name": "starting"}, {"name": "proxy", "containerID": format!("containerd://{CONTAINER}")}],
        "initContainerStatuses": status("init", &CONTAINER.replace('b', "1")),
        "ephemeralContainerStatuses": status("debug", &CONTAINER.replace('b', "2")),
    });
    pod
}

fn in_container(id: &str) -> String {
    format!("0::/kubepods/burstable/pod{UID}/{id}")
}

#[tokio::test]
async fn only_the_containers_that_are_named_may_fetch_of_whatever_kind_they_are() {
    let (init, debug) = (CONTAINER.replace('b', "1"), CONTAINER.replace('b', "2"));
    for (id, name) in [(CONTAINER, "proxy"), (&init, "init"), (&debug, "debug")] {
        let world = World::new(&in_container(id), &[pod_of_containers()]);
        world.allowing(&["other", name], &[]).attest().await.unwrap();
        let world = World::new(&in_container(id), &[pod_of_containers()]).allowing(&["other"], &[]);
        let error = world.attest().await.unwrap_err();
        assert_eq!((error.reason, error.temporary), (Reason::container_not_allowed, false));
        assert!(error.detail.contains(&format!("is in container {name} of pod shop/cart-1")), "{error}");
    }
    let pods_own = World::new(&format!("0::/kubepods/burstable/pod{UID}"), &[pod_of_containers()]).allowing(&["proxy"], &[]);
    assert_eq!(pods_own.refusal().await, (Reason::container_not_allowed, false));
}

#[tokio::test]
async fn a_container_that_the_kubelet_tells_of_later_is_awaited() {
    let world = World::new(&in_container(CONTAINER), &[pod(UID, Some("cart"))]).allowing(&["proxy"], &[]);
    let waiting = world.attest();
    let mut waiting = std::pin::pin!(waiting);
    assert!(timeout(Duration::from_millis(100), &mut waiting).await.is_err());
    world.api.put("pods", pod_of_containers());
    waiting.await.unwrap();
}

#[tokio::test]
async fn only_the_users_that_are_given_may_fetch() {
    let me = nix::unistd::geteuid().as_raw();
    let world = || World::new(&in_container(CONTAINER), &[pod_of_containers()]);
    world().allowing(&[], &[me + 1, me]).attest().await.unwrap();
    let error = world().allowing(&[], &[me + 1]).attest().await.unwrap_err();
    assert_eq!((error.reason, error.temporary), (Reason::uid_not_allowed, false));
    assert!(error.detail.contains(&format!("runs as user {me}, who is not among attestationPolicy.uids")), "{error}");
    assert_eq!(world().allowing(&["proxy"], &[me + 1]).refusal().await, (Reason::uid_not_allowed, false), "both lists apply");
    assert_eq!(world().allowing(&["other"], &[me]).refusal().await, (Reason::container_not_allowed, false));
}

#[tokio::test]
async fn a_caller_without_a_pidfd_is_refused_unless_pid_reuse_is_accepted() {
    let mut world = World::new(&cgroup(UID), &[pod(UID, Some("cart"))]);
    world.peer = Peer::recorded(&world.socket, Path::new("/proc")).unwrap();
    assert_eq!(world.refusal().await, (Reason::no_pidfd, false));
    world.attestor = world.attestor.accepting_pid_reuse(true);
    // The evidence is read through the directory that was opened with the connection, and this process is in no pod.
    assert_eq!(world.refusal().await, (Reason::not_in_pod, false));
    let nowhere = tempfile::tempdir().unwrap();
    world.peer = Peer::recorded(&world.socket, nowhere.path()).unwrap();
    assert_eq!(world.refusal().await, (Reason::process_gone, false));
}

#[tokio::test]
async fn what_was_proven_holds_for_as_long_as_the_process_runs() {
    let world = World::new(&cgroup(UID), &[pod(UID, Some("cart"))]);
    assert!(world.attestor.still_holds(&world.peer));
    let nowhere = tempfile::tempdir().unwrap();
    let terminated = Peer::recorded(&world.socket, nowhere.path()).unwrap();
    assert!(!world.attestor.still_holds(&terminated));
}

#[tokio::test]
async fn the_account_of_a_process_outlives_its_pod() {
    let world = World::new(&cgroup(UID), &[pod(UID, Some("cart"))]);
    let account = async || timeout(Duration::from_secs(20), world.attestor.account_of(&world.peer)).await.expect("no verdict");
    let is_cart = |found: Result<(PodUid, Option<Account>), Error>| {
        let (uid, account) = found.unwrap();
        let account = account.unwrap();
        assert_eq!((uid.as_str(), &*account.namespace, &*account.name), (UID, "shop", "cart"));
    };
    is_cart(account().await);
    let mut ended = pod(UID, Some("cart"));
    ended["status"]["phase"] = json!("Failed");
    let known = world.attestor.pods.wait_for(UID).await.unwrap();
    world.api.put("pods", ended);
    timeout(Duration::from_secs(20), known.terminated.cancelled()).await.unwrap();
    assert_eq!(world.refusal().await.0, Reason::pod_ended, "it is served no more");
    is_cart(account().await);
    world.api.remove("pods", "shop", "cart-1");
    timeout(Duration::from_secs(20), async {
        while !world.attestor.pods.workloads().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    is_cart(account().await);

    let accountless = World::new(&cgroup(UID), &[pod(UID, None)]);
    assert_eq!(accountless.attestor.account_of(&accountless.peer).await.unwrap().1, None);
    let unknown = World::new(&cgroup(UID), &[]);
    assert_eq!(unknown.attestor.account_of(&unknown.peer).await.unwrap_err().reason, Reason::unknown_pod);
    let outside = World::new("0::/user.slice", &[]);
    assert_eq!(outside.attestor.account_of(&outside.peer).await.unwrap_err().reason, Reason::not_in_pod);
}

#[test]
fn a_cgroup_file_is_read_whole_or_not_at_all_and_need_not_be_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cgroup");
    let below = |length: usize| [cgroup(UID).as_bytes(), b"/\xff\xfe", &vec![b'x'; length]].concat();
    fs::write(&path, below(10)).unwrap();
    let text = cgroup::read(File::open(&path)).unwrap();
    assert_eq!(cgroup::pod_uid(&text, &HostPrefix::default()).unwrap().as_str(), UID);
    fs::write(&path, below(64 << 10)).unwrap();
    assert_eq!(cgroup::read(File::open(&path)).unwrap_err().kind(), io::ErrorKind::InvalidData);
}
