//! The policy against writable mounts of the sockets' directories: a table of pods that it rejects and admits, and pods of a generator,
//! which it admits as the API server does without it.

use std::collections::BTreeSet;

use futures::{StreamExt, stream};
use serde_json::{Value, json};
use test_harness::{
    cluster::{Cluster, Write},
    eventually,
    manifests::{NAMESPACE, helm, install, named, rendered_with, try_helm},
    plane::Plane,
    world::{GUARDED, PATIENCE},
};

const POLICY: &str = "sds-agent-socket-mounts";
/// Pods of the generator.
const PODS: u32 = 1000;
const SEED: u64 = 20;

/// A cluster with the objects of a mode and the policy, which rejects pods.
struct Scene {
    cluster: Cluster,
    namespace: String,
    _plane: Plane,
}

impl Scene {
    async fn start() -> Self {
        let (cluster, plane) = Cluster::own(GUARDED).await;
        let namespace = cluster.namespace().await;
        account(&cluster, &namespace, "app").await;
        Self { cluster, namespace, _plane: plane }
    }

    /// Installs the policy with `validationActions: [Deny]`, and waits until the API server enforces it.
    async fn enforce(&self) {
        let mut objects = rendered_with("shared", &["socket-mounts"]).await;
        let binding = objects.iter_mut().find(|o| o["kind"] == "ValidatingAdmissionPolicyBinding" && o["metadata"]["name"] == POLICY);
        let actions = &mut binding.expect("the policy's binding")["spec"]["validationActions"];
        assert_eq!(*actions, json!(["Audit", "Warn"]));
        *actions = json!(["Deny"]);
        install(&self.cluster, &objects).await;
        let status = format!("/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/{POLICY}");
        let pod = pod(&[("sds", "/run/sds-agent")], &json!([{"name": "sds", "mountPath": "/s"}]));
        eventually("the policy is enforced", PATIENCE, async || match self.try_pod(&pod).await {
            Err(error) if error.contains("readOnly: true") => Ok(()),
            answer => Err(format!("{answer:?}")),
        })
        .await;
        let policy = self.cluster.get(&status).await;
        assert!(policy["status"]["typeChecking"]["expressionWarnings"].is_null(), "{}", policy["status"]);
    }

    /// Creates the pod without storing it. Returns the message of a rejection.
    async fn try_pod(&self, pod: &Value) -> Result<(), String> {
        let path = format!("/api/v1/namespaces/{}/pods?dryRun=All", self.namespace);
        self.cluster.try_create(&path, pod).await.map(drop).map_err(|error| error.to_string())
    }
}

async fn account(cluster: &Cluster, namespace: &str, name: &str) {
    cluster.create(&format!("/api/v1/namespaces/{namespace}/serviceaccounts"), &json!({"metadata": {"name": name}})).await;
}

/// A pod with these (name, path) of hostPath volumes, and these mounts of its container.
fn pod(volumes: &[(&str, &str)], mounts: &Value) -> Value {
    let volumes: Vec<_> = volumes.iter().map(|(name, path)| json!({"name": name, "hostPath": {"path": path}})).collect();
    json!({
        "metadata": {"name": "app"},
        "spec": {
            "serviceAccountName": "app", "automountServiceAccountToken": false,
            "containers": [{"name": "main", "image": "none", "volumeMounts": mounts}],
            "volumes": volumes,
        },
    })
}

fn mount(name: &str, is_read_only: bool) -> Value {
    json!({"name": name, "mountPath": format!("/mnt/{name}"), "readOnly": is_read_only})
}

/// Paths that lead to the sockets.
const LEADING: [&str; 20] = [
    "/run/sds-agent",
    "/run/sds-agent/",
    "/run//sds-agent",
    "//run/./sds-agent/.",
    "/run/sds-agent/sds.sock",
    "/run/sds-agent/deeper/x\ny",
    "/var/run/sds-agent",
    "/var/./run//sds-agent/",
    "/run",
    "/run/",
    "/var/run",
    "/",
    "//",
    "/.",
    "/proc/1/root/run/sds-agent",
    "/proc/self/root",
    "/proc/1/root/",
    "/proc/1/task/1/root/var/run",
    "/proc/1/cwd/run",
    "/proc/1/root/proc/2/root/run/sds-agent/root/x",
];
/// Paths that do not.
const OTHERS: [&str; 14] = [
    "/run/sds-agents",
    "/run/sds-agent.sock",
    "/run/containerd",
    "/var",
    "/var/lib/kubelet",
    "/var/run/docker.sock",
    "/srv/run/sds-agent",
    "/home/run",
    "/proc",
    "/proc/1/ns",
    "/proc/1/root/etc",
    "/etc/..data",
    "/root/run/sds-agent",
    "/runs",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writable_mounts_of_the_sockets_are_rejected() {
    let scene = Scene::start().await;
    scene.enforce().await;
    let rejected = async |pod: Value, words: &str, what: &str| {
        let message = scene.try_pod(&pod).await.expect_err(what);
        assert!(message.contains(POLICY) && message.contains(words), "{what}: {message}");
    };
    let writable = "need readOnly: true in every mount: sds";
    for path in LEADING {
        let of = |mounts: Value| pod(&[("sds", path), ("etc", "/etc")], &mounts);
        rejected(of(json!([mount("sds", false)])), writable, path).await;
        rejected(of(json!([{"name": "sds", "mountPath": "/s"}])), writable, path).await;
        rejected(of(json!([mount("etc", false), mount("sds", true), {"name": "sds", "mountPath": "/again"}])), writable, path).await;
        rejected(of(json!([{"name": "sds", "mountPath": "/s", "subPath": "x"}])), writable, path).await;
        let mut init = of(json!([mount("sds", true)]));
        init["spec"]["initContainers"] = json!([{"name": "init", "image": "none", "volumeMounts": [mount("sds", false)]}]);
        rejected(init, writable, path).await;
        scene.try_pod(&of(json!([mount("etc", false), mount("sds", true)]))).await.unwrap_or_else(|e| panic!("{path:?}: {e}"));
        scene.try_pod(&of(json!([mount("etc", false)]))).await.unwrap_or_else(|e| panic!("{path:?}, not mounted: {e}"));
    }
    for path in OTHERS {
        scene.try_pod(&pod(&[("sds", path)], &json!([mount("sds", false)]))).await.unwrap_or_else(|e| panic!("{path:?}: {e}"));
    }
    // The API server itself rejects these.
    let message = scene.try_pod(&pod(&[("sds", "/etc/../run/sds-agent")], &json!([mount("sds", false)]))).await.unwrap_err();
    assert!(message.contains("'..'"), "{message}");
    // The sockets of other pods are mounted by no pod, also not read-only.
    for path in ["/run/sds-agent-pods", "/var/run/sds-agent-pods/x", "/proc/1/root/run//sds-agent-pods/"] {
        let pods = pod(&[("sds", path)], &json!([mount("sds", true)]));
        rejected(pods, "/run/sds-agent-pods has the sockets of other pods, do not mount it: sds", path).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ephemeral_containers_and_large_pods_do_not_bypass_the_policy() {
    let scene = Scene::start().await;
    let pods = format!("/api/v1/namespaces/{}/pods", scene.namespace);
    // A pod that is older than the policy, with a writable mount.
    let mut old = pod(&[("sds", "/run/sds-agent")], &json!([mount("sds", false)]));
    old["metadata"]["finalizers"] = json!(["example.com/kept"]);
    scene.cluster.create(&pods, &old).await;
    scene.enforce().await;
    let debug =
        |name: &str, mounts: Value| json!({"spec": {"ephemeralContainers": [{"name": name, "image": "none", "volumeMounts": mounts}]}});
    let path = format!("{pods}/app/ephemeralcontainers");
    let field = ["spec", "ephemeralContainers"];
    let add = async |change: Value| {
        let value = change["spec"]["ephemeralContainers"].clone();
        scene.cluster.try_set(Write::MergePatch, &path, &field, &value).await.map(drop).map_err(|error| error.to_string())
    };
    let message = add(debug("debug", json!([{"name": "sds", "mountPath": "/s"}]))).await.unwrap_err();
    assert!(message.contains("need readOnly: true in every mount: sds"), "{message}");
    add(debug("debug", json!([mount("sds", true)]))).await.expect("it mounts the volume read-only");
    // Updates that add no container pass, so that a pod from before the policy can be labelled and ends.
    scene.cluster.patch(&format!("{pods}/app"), &json!({"metadata": {"labels": {"a": "b"}, "finalizers": null}})).await;
    scene.cluster.delete_now(&format!("{pods}/app")).await;

    // The expressions never cost more than the API server allows: it would ignore the policy.
    let long = format!("/run/sds-agent/{}", "x/".repeat(2000));
    let names: Vec<_> = (0..100).map(|index| format!("v{index}")).collect();
    let volumes: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), long.as_str())).collect();
    let mounts: Vec<_> = (0..1000)
        .map(|index| json!({"name": names[index % 100], "mountPath": format!("/mnt/{index}"), "readOnly": index != 999}))
        .collect();
    let message = scene.try_pod(&pod(&volumes, &json!(mounts))).await.unwrap_err();
    assert!(message.contains("need readOnly: true in every mount: v0, v1"), "{message}");
    let full = "/proc/1/root/".to_owned() + &"proc/1/root/".repeat(84);
    assert!((1000..=1024).contains(&full.len()));
    let volumes: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), full.as_str())).collect();
    let message = scene.try_pod(&pod(&volumes, &json!(mounts))).await.unwrap_err();
    assert!(message.contains("need readOnly: true in every mount: v0, v1"), "{message}");
    let more: Vec<_> = mounts.iter().cloned().chain([json!({"name": "v0", "mountPath": "/mnt/x", "readOnly": true})]).collect();
    let message = scene.try_pod(&pod(&volumes, &json!(more))).await.unwrap_err();
    assert!(message.contains("at most 1000 mounts"), "{message}");
    let names: Vec<_> = (0..5000).map(|index| format!("v{index}")).collect();
    let volumes: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "/run/sds-agent")).collect();
    let message = scene.try_pod(&pod(&volumes, &json!([mount("v0", false)]))).await.unwrap_err();
    assert!(message.contains("at most 100 hostPath volumes"), "{message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_of_agents_may_mount_the_sockets_writable() {
    let scene = Scene::start().await;
    scene.enforce().await;
    let mut agent = pod(&[("sds", "/run/sds-agent")], &json!([mount("sds", false)]));
    agent["spec"]["serviceAccountName"] = json!("sds-agent");
    let pods = |namespace: &str| format!("/api/v1/namespaces/{namespace}/pods?dryRun=All");
    scene.cluster.try_create(&pods("sds-agent"), &agent).await.expect("an agent's pod");
    // An account of the same name elsewhere, another account of that namespace, and an administrator's are none.
    for (namespace, name) in [(&*scene.namespace, "sds-agent"), ("sds-agent", "app"), (&*scene.namespace, "admin")] {
        account(&scene.cluster, namespace, name).await;
        agent["spec"]["serviceAccountName"] = json!(name);
        if name == "admin" {
            let binding = json!({
                "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "test-admin"},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
                "subjects": [{"kind": "ServiceAccount", "namespace": namespace, "name": name}],
            });
            scene.cluster.create("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &binding).await;
        }
        let message = scene.cluster.try_create(&pods(namespace), &agent).await.expect_err(name).to_string();
        assert!(message.contains(POLICY), "{namespace}/{name}: {message}");
    }
}

/// A pod with volumes and mounts of many kinds, none of which is a writable mount of the sockets.
fn odd_pod(random: &mut fastrand::Rng) -> Value {
    let name = |index: usize| format!("v{index}");
    let count = random.usize(0..12);
    let mut is_guarded = Vec::new();
    let volumes: Vec<_> = (0..count)
        .map(|index| {
            let guarded = random.choice(LEADING).unwrap();
            let other = random.choice(OTHERS).unwrap();
            is_guarded.push(false);
            let source = match random.u8(0..36) / 5 {
                0 => json!({"emptyDir": {}}),
                1 => json!({"configMap": {"name": "missing", "optional": true}}),
                2 => json!({"csi": {"driver": "example.com", "readOnly": random.bool()}}),
                3 => json!({"projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}),
                4 => json!({"persistentVolumeClaim": {"claimName": "data"}}),
                5 => {
                    is_guarded[index] = true;
                    json!({"hostPath": {"path": guarded, "type": random.choice(["", "Directory", "DirectoryOrCreate"]).unwrap()}})
                }
                6 => json!({"hostPath": {"path": format!("{other}/{}", random.u32(..))}}),
                // Also paths that the API server rejects.
                _ => {
                    let path = *random.choice(["", "relative", "../..", "/a/../b", "/tmp/é", other].iter()).unwrap();
                    json!({"hostPath": {"path": path}})
                }
            };
            let mut volume = source;
            volume["name"] = json!(name(index));
            volume
        })
        .collect();
    let container = |random: &mut fastrand::Rng, prefix: &str, index: usize| {
        let mounts: Vec<_> = (0..random.usize(0..if count == 0 { 1 } else { 8 }))
            .map(|at| {
                // Rarely a volume that does not exist.
                let volume = if count == 0 || random.u8(0..100) == 0 { count } else { random.usize(0..count) };
                let mut mount = json!({"name": name(volume), "mountPath": format!("/mnt/{at}")});
                if is_guarded.get(volume) == Some(&true) || random.bool() {
                    mount["readOnly"] = json!(true);
                }
                if random.u8(0..4) == 0 {
                    mount["subPath"] = json!("sub/path");
                }
                mount
            })
            .collect();
        let mut container = json!({"name": format!("{prefix}{index}"), "image": "none"});
        if random.bool() || !mounts.is_empty() {
            container["volumeMounts"] = json!(mounts);
        }
        container
    };
    let at_least = usize::from(random.u8(0..20) > 0);
    let containers: Vec<_> = (0..random.usize(at_least..4)).map(|index| container(random, "c", index)).collect();
    let mut pod = json!({
        "metadata": {"name": "odd"},
        "spec": {"serviceAccountName": "app", "containers": containers, "hostPID": random.bool(), "hostNetwork": random.bool()},
    });
    if random.bool() {
        pod["spec"]["initContainers"] = (0..random.usize(0..3)).map(|index| container(random, "i", index)).collect();
    }
    if count > 0 || random.bool() {
        pod["spec"]["volumes"] = json!(volumes);
    }
    pod
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_other_pods_are_admitted_as_without_the_policy() {
    let scene = Scene::start().await;
    let mut random = fastrand::Rng::with_seed(SEED);
    let pods: Vec<_> = (0..PODS).map(|_| odd_pod(&mut random)).collect();
    let answers = async || stream::iter(&pods).map(|pod| scene.try_pod(pod)).buffered(8).collect::<Vec<_>>().await;
    let before = answers().await;
    scene.enforce().await;
    let after = answers().await;
    for ((pod, before), after) in pods.iter().zip(&before).zip(&after) {
        assert_eq!(before, after, "{pod}");
    }
    let admitted = before.iter().filter(|answer| answer.is_ok()).count();
    let mounting = |pod: &&Value| pod["spec"]["volumes"].to_string().contains("hostPath");
    let of_these = pods.iter().zip(&before).filter(|(pod, answer)| answer.is_ok() && mounting(pod)).count();
    println!("figure: {admitted} of {PODS} odd pods admitted, {of_these} of them with hostPath, as without the policy");
    assert!(admitted > 300 && of_these > 100 && admitted < 1000, "{admitted} admitted, {of_these} with hostPath");
}

#[tokio::test]
async fn the_chart_renders_the_policy_only_on_request() {
    let is_it = |object: &&Value| object["metadata"]["name"] == POLICY;
    assert_eq!(helm(NAMESPACE, &[]).await.iter().filter(is_it).count(), 0);
    let objects = helm(NAMESPACE, &["--set", "policy.socketMounts.enabled=true"]).await;
    let kustomized = rendered_with("shared", &["socket-mounts"]).await;
    for kind in ["ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"] {
        assert_eq!(named(&objects, kind, POLICY), named(&kustomized, kind, POLICY));
    }
    let deny = r#"policy.socketMounts={"enabled":true,"validationActions":["Deny"]}"#;
    let denying = helm(NAMESPACE, &["--set-json", deny]).await;
    assert_eq!(named(&denying, "ValidatingAdmissionPolicyBinding", POLICY)["spec"]["validationActions"], json!(["Deny"]));
    let names: BTreeSet<_> = objects.iter().filter(is_it).map(|object| object["kind"].to_string()).collect();
    assert_eq!(names.len(), 2);
    let wrong = r#"policy.socketMounts={"enabled":true,"validationActions":["Deny","Warn"]}"#;
    assert!(!try_helm(NAMESPACE, &["--set-json", wrong]).await.status.success());
}
