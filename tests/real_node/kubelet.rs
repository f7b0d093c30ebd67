//! A real kubelet with a real containerd uses the agent, and behaves as the tests with a simulated kubelet (`csi`) and with cgroups of
//! their own (`attest`) assume.

use std::{fs, path::PathBuf, time::Duration};

use serde_json::{Value, json};
use tempfile::TempDir;
use test_harness::{
    agent,
    agent::Launch,
    agent_pod::AgentPod,
    cluster::{Cluster, Pod},
    eventually,
    node::DRIVER,
    node::{Image, Node, PAUSE},
    plane::Plane,
};
use tokio::time::Instant;

const PATIENCE: Duration = Duration::from_secs(60);
/// The paths in every pod: its own socket, and the socket shared by all pods.
const OWN: &str = "/run/sds/socket";
const SHARED: &str = "/run/sds-agent/sds.sock";
const SOCKETS: &str = "/run/sds-agent-pods";
const PODS: &str = "/var/lib/kubelet/pods";
/// The image with the agent's program, for `fetch`.
const IMAGE: &str = "sds-agent.test/sds-agent:1";
/// The flags of a mount on the host.
const GUARDED: [&str; 4] = ["ro", "nosuid", "nodev", "noexec"];

/// A node with an agent and a mount helper on its host, at the default paths.
struct Scene {
    launch: Launch,
    helper_launch: Launch,
    namespace: String,
    node: Node,
    cluster: Cluster,
    _plane: Plane,
    _dir: TempDir,
}

impl Scene {
    async fn new() -> Self {
        let (cluster, plane) = Cluster::own(&[]).await;
        let dir = tempfile::tempdir().unwrap();
        let image = Image::of_programs(IMAGE, &dir.path().join("image"), &[agent::program()]).await;
        let node = Node::start(&cluster, dir.path(), &[image]).await;
        cluster.create("/apis/storage.k8s.io/v1/csidrivers", &driver()).await;
        // The agent runs on the host here. Of its pod it has only the cgroup and the account's token.
        let pause = json!({"containers": [{"name": "main", "image": PAUSE, "command": ["/pause"]}]});
        let pod = node.pod(&cluster.namespace().await, "sds-agent", &pause).await;
        let agent_pod = AgentPod::of(&cluster, dir.path(), node.name(), pod).await;
        let launch = agent_pod.launch_on(dir.path(), "{ perPod: { enabled: true } }", "certificate: { lifetime: 1h }");
        assert!(node.run(&["mkdir", "-p", "/run/sds-agent"]).await.status.success());
        let helper_launch = launch.mount_helper().under(node.words());
        let launch = launch.under(node.words_as(&agent_pod.pod).await);
        Self { launch, helper_launch, namespace: cluster.namespace().await, node, cluster, _plane: plane, _dir: dir }
    }

    /// The drivers that the kubelet has registered with the API server.
    async fn drivers(&self) -> Value {
        let path = format!("/apis/storage.k8s.io/v1/csinodes/{}", self.node.name());
        self.cluster.try_get(&path).await.map_or(Value::Null, |mut seen| seen["spec"]["drivers"].take())
    }

    /// Runs `fetch` in the pod's container, in which the runtime starts another program.
    async fn fetch(&self, pod: &Pod, socket: &str, name: &str) -> Result<Value, String> {
        let program = ["/sds-agent", "fetch", "--socket", socket, "--name", name, "-o", "json", "--timeout", "10s"];
        let output = self.node.exec(pod, &program).await;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())
    }

    async fn assert_served(&self, pod: &Pod) {
        for socket in [OWN, SHARED] {
            let certificate = self.fetch(pod, socket, "default").await.unwrap_or_else(|e| panic!("{}, {socket}: {e}", pod.name));
            assert_eq!(certificate["spiffe_id"], pod.spiffe_id(), "{socket}");
        }
    }

    /// The files of a pod that are left on the node.
    fn left_of(&self, pod: &Pod) -> Vec<String> {
        let mut left: Vec<_> = self.node.mounts(PODS).into_iter().map(|mount| mount.target.display().to_string()).collect();
        left.extend([SOCKETS, PODS].map(|place| format!("{place}/{}", pod.uid)).into_iter().filter(|path| self.node.path(path).exists()));
        left.extend(fs::read_to_string("/proc/net/unix").unwrap().lines().map(str::to_owned));
        left.retain(|line| line.contains(&pod.uid));
        left
    }
}

/// A workload that watches its certificate on its own socket and also has the shared socket.
fn workload() -> Value {
    let command = ["/sds-agent", "fetch", "--watch", "--socket", OWN, "--name", "default", "-o", "json"];
    json!({
        "containers": [{
            "name": "main", "image": IMAGE, "command": command,
            "volumeMounts": [
                {"name": "sds", "mountPath": "/run/sds", "readOnly": true},
                {"name": "shared", "mountPath": "/run/sds-agent", "readOnly": true},
            ],
        }],
        "volumes": [
            {"name": "sds", "csi": {"driver": DRIVER, "readOnly": true}},
            {"name": "shared", "hostPath": {"path": "/run/sds-agent"}},
        ],
    })
}

/// The CSIDriver of `docs/per-pod-sockets.md`.
fn driver() -> Value {
    json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", "metadata": {"name": DRIVER},
        "spec": {
            "attachRequired": false, "podInfoOnMount": true, "volumeLifecycleModes": ["Ephemeral"], "requiresRepublish": true,
            "fsGroupPolicy": "None",
        },
    })
}

#[tokio::test]
async fn a_real_kubelet_gives_pods_their_sockets_and_takes_them_away() {
    let _turn = test_harness::turn().await;
    let begun = Instant::now();
    let scene = Scene::new().await;
    println!("figure: control plane, containerd and kubelet took {:.1} s to a first running pod", begun.elapsed().as_secs_f64());
    let helper = scene.helper_launch.start().await;
    let agent = scene.launch.start().await;
    assert!(helper.metric("sds_agent_csi_registered").await > 0.5);
    eventually("the kubelet registers the driver", PATIENCE, async || {
        let drivers = scene.drivers().await;
        if drivers[0]["name"] == DRIVER { Ok(()) } else { Err(drivers.to_string()) }
    })
    .await;

    // The real cert-manager's certificate reaches a real pod on its own socket, which the kubelet has mounted, and on the shared one.
    let begun = Instant::now();
    let cart = scene.node.pod(&scene.namespace, "cart", &workload()).await;
    println!("figure: a pod with a volume took {:.1} s to run", begun.elapsed().as_secs_f64());
    let other = scene.node.pod(&scene.namespace, "other", &workload()).await;
    for pod in [&cart, &other] {
        scene.assert_served(pod).await;
    }
    eventually("the workload's own program has it", PATIENCE, async || {
        let log = scene.node.container_log(&cart, "main");
        if log.contains(&cart.spiffe_id()) { Ok(()) } else { Err(log) }
    })
    .await;
    for socket in [OWN, SHARED] {
        let others = scene.fetch(&cart, socket, &other.spiffe_id()).await;
        assert!(others.as_ref().map_or(true, |answer| !answer.to_string().contains("chain_pem")), "{socket}: {others:?}");
    }
    let mounts: Vec<_> =
        scene.node.mounts(PODS).into_iter().filter(|mount| mount.target.ends_with("kubernetes.io~csi/sds/mount")).collect();
    assert_eq!(mounts.len(), 2, "{mounts:?}");
    for mount in mounts {
        assert!(GUARDED.iter().all(|flag| mount.options.split(',').any(|option| option == *flag)), "{mount:?}");
    }

    // The agent is killed: a pod that starts in between runs, and its client waits for the socket.
    agent.kill().await;
    let late = scene.node.pod(&scene.namespace, "late", &workload()).await;
    assert!(helper.metric("sds_agent_csi_agent_unavailable_total").await > 0.5);
    // The mount helper is killed as well: a pod that starts in between waits, and running pods need no action.
    helper.kill().await;
    let later = scene.node.bound_pod(&scene.namespace, "later", &workload()).await;
    eventually("the kubelet makes the pod's place", PATIENCE, async || {
        let place: PathBuf = scene.node.path(&format!("{PODS}/{}", later.uid));
        if place.exists() { Ok(()) } else { Err(scene.node.log("kubelet")) }
    })
    .await;
    let _agent = scene.launch.start().await;
    for pod in [&cart, &other] {
        scene.assert_served(pod).await;
    }
    // The client of this pod ends without a socket, and the kubelet starts it again.
    eventually("the late pod is served", PATIENCE, async || {
        for socket in [OWN, SHARED] {
            scene.fetch(&late, socket, "default").await?;
        }
        Ok(())
    })
    .await;
    scene.assert_served(&late).await;
    let helper = scene.helper_launch.start().await;
    scene.node.until_running(&later).await;
    scene.assert_served(&later).await;
    for pod in [&cart, &other, &late] {
        scene.assert_served(pod).await;
    }
    eventually("the workload is connected again", PATIENCE, async || {
        let log = scene.node.container_log(&cart, "main");
        if log.contains("connected again") { Ok(()) } else { Err(log) }
    })
    .await;

    // The end of a pod removes all its files, and no files of another pod.
    assert!(scene.left_of(&cart).len() >= 4, "{:?}", scene.left_of(&cart));
    scene.node.delete(&cart).await;
    eventually("nothing is left of the pod", PATIENCE, async || match scene.left_of(&cart) {
        left if left.is_empty() => Ok(()),
        left => Err(left.join("\n")),
    })
    .await;
    scene.assert_served(&other).await;
    let unpublished = helper.metric_of("sds_agent_csi_calls_total", &["call=\"unpublish\"", "code=\"Ok\""]).await;
    assert!(unpublished > 0.0, "the kubelet has called unpublish");
}

/// A user who can change the CSIDriver object can turn off the kubelet's pod information; then a pod's own attributes replace it.
#[tokio::test]
async fn a_pod_that_speaks_for_the_kubelet_does_not_start() {
    let _turn = test_harness::turn().await;
    let scene = Scene::new().await;
    let helper = scene.helper_launch.start().await;
    let _agent = scene.launch.start().await;
    let victim = scene.node.pod(&scene.namespace, "victim", &workload()).await;
    let driver = format!("/apis/storage.k8s.io/v1/csidrivers/{DRIVER}");
    scene.cluster.patch(&driver, &json!({"spec": {"podInfoOnMount": false}})).await;

    let mut forged = workload();
    forged["volumes"][0]["csi"]["volumeAttributes"] = json!({
        "csi.storage.k8s.io/pod.name": victim.name, "csi.storage.k8s.io/pod.namespace": victim.namespace,
        "csi.storage.k8s.io/pod.uid": victim.uid, "csi.storage.k8s.io/serviceAccount.name": victim.service_account,
        "csi.storage.k8s.io/ephemeral": "true",
    });
    let forger = scene.node.bound_pod(&scene.namespace, "forger", &forged).await;
    let events = format!("/api/v1/namespaces/{}/events?fieldSelector=involvedObject.uid%3D{}", scene.namespace, forger.uid);
    eventually("the pod's events name the cause", PATIENCE, async || {
        let events = scene.cluster.get(&events).await["items"].to_string();
        if events.contains("FailedMount") && events.contains("is not the pod of target_path") { Ok(()) } else { Err(events) }
    })
    .await;
    assert!(helper.metric_of("sds_agent_csi_calls_total", &["call=\"publish\"", "code=\"PermissionDenied\""]).await > 0.0);
    let left = scene.left_of(&forger);
    assert_eq!(left, [format!("{PODS}/{}", forger.uid)], "nothing but what the kubelet makes for every pod");

    // With the kubelet's pod information, the same pod gets its identity.
    scene.cluster.patch(&driver, &json!({"spec": {"podInfoOnMount": true}})).await;
    scene.node.until_running(&forger).await;
    scene.assert_served(&forger).await;
    scene.assert_served(&victim).await;
}
