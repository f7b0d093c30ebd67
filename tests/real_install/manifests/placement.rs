//! The nodes of the approver as the real scheduler chooses them, and the Pod Security level of its namespace.

use serde_json::{Value, json};
use test_harness::{
    cluster::{Cluster, name_of},
    eventually,
    manifests::{self, helm, install, named, rendered},
    world::GUARDED,
};

use super::site::PATIENCE;

const NAMESPACE: &str = "sds-agent-approver";
/// The label and the taint of a control plane.
const CONTROL_PLANE: &str = "node-role.kubernetes.io/control-plane";
/// The label and the taint of the page for managed control planes.
const POOL: &str = "sds-agent.io/approver";

/// Creates a node that can run pods, with this label and a taint of the same key.
async fn node(cluster: &Cluster, role: Option<&str>) -> String {
    let mut labels: Value = role.map_or(json!({}), |role| json!({role: "true"}));
    let taints: Vec<_> = role.iter().map(|role| json!({"key": role, "value": "true", "effect": "NoSchedule"})).collect();
    labels["kubernetes.io/os"] = json!("linux");
    let node = json!({"metadata": {"generateName": "test-", "labels": labels}, "spec": {"taints": taints}});
    let name = name_of(&cluster.create("/api/v1/nodes", &node).await);
    labels["kubernetes.io/hostname"] = json!(name);
    // The API server adds a taint to a node that no kubelet has reported as ready.
    cluster.merge(&format!("/api/v1/nodes/{name}"), &json!({"metadata": {"labels": labels}, "spec": {"taints": taints}})).await;
    let room = json!({"cpu": "4", "memory": "8Gi", "pods": "100"});
    let ready = json!({"type": "Ready", "status": "True", "reason": "KubeletReady"});
    let status = json!({"status": {"capacity": room, "allocatable": room, "conditions": [ready]}});
    cluster.merge(&format!("/api/v1/nodes/{name}/status"), &status).await;
    name
}

/// Waits until the replicas are on these nodes; `None` stands for a replica that no node can run.
async fn until_placed(cluster: &Cluster, case: &str, nodes: &[Option<&String>]) {
    let mut expected: Vec<_> = nodes.iter().map(|node| node.cloned()).collect();
    expected.sort();
    let pods = format!("/api/v1/namespaces/{NAMESPACE}/pods");
    eventually(&format!("the replicas are placed: {case}"), PATIENCE, async || {
        let list = cluster.get(&pods).await["items"].take();
        let node = |pod: &Value| match pod["spec"]["nodeName"].as_str() {
            Some(node) => Some(Some(node.to_owned())),
            None if pod["status"]["conditions"][0]["reason"] == "Unschedulable" => Some(None),
            None => None,
        };
        let placed: Option<Vec<_>> = list.as_array().unwrap().iter().map(node).collect();
        let mut placed = placed.ok_or("the scheduler has not decided yet")?;
        placed.sort();
        if placed == expected { Ok(()) } else { Err(format!("{placed:?} instead of {expected:?}: {list}")) }
    })
    .await;
}

async fn replace_deployment(cluster: &Cluster, objects: &[Value]) {
    let deployment = named(objects, "Deployment", "sds-agent-approver");
    let path = manifests::path(deployment);
    let _ = cluster.try_delete(&path).await;
    eventually("the former replicas are gone", PATIENCE, async || {
        let pods = cluster.get(&format!("/api/v1/namespaces/{NAMESPACE}/pods")).await["items"].take();
        for pod in pods.as_array().unwrap() {
            // No kubelet ends a pod of these nodes. The garbage collector may have been faster.
            let _ = cluster.try_delete_now(&format!("/api/v1/namespaces/{NAMESPACE}/pods/{}", name_of(pod))).await;
        }
        if pods == json!([]) { Ok(()) } else { Err(pods.to_string()) }
    })
    .await;
    cluster.apply(&path, deployment).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_are_on_different_nodes_and_prefer_the_control_plane() {
    let (cluster, _plane) = Cluster::own(&[GUARDED, &["--workloads"]].concat()).await;
    let objects = rendered("shared").await;
    let others: Vec<_> =
        objects.iter().filter(|object| !["DaemonSet", "Deployment"].iter().any(|kind| object["kind"] == *kind)).cloned().collect();
    install(&cluster, &others).await;

    let worker = node(&cluster, None).await;
    replace_deployment(&cluster, &objects).await;
    until_placed(&cluster, "one node", &[None, Some(&worker)]).await;

    let control = [node(&cluster, Some(CONTROL_PLANE)).await, node(&cluster, Some(CONTROL_PLANE)).await];
    replace_deployment(&cluster, &objects).await;
    until_placed(&cluster, "a control plane", &[Some(&control[0]), Some(&control[1])]).await;

    // The values of the page for managed control planes.
    let pool = [node(&cluster, Some(POOL)).await, node(&cluster, Some(POOL)).await];
    let page = manifests::read("README.md");
    let of_page =
        |start: &str| page.split("```yaml\n").find(|block| block.starts_with(start)).and_then(|block| block.split("```").next()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("values.yaml");
    std::fs::write(&file, of_page("approver:\n  nodeSelector")).unwrap();
    let by_helm = helm(manifests::NAMESPACE, &["--values", file.to_str().unwrap()]).await;
    replace_deployment(&cluster, &by_helm).await;
    until_placed(&cluster, "a pool, by Helm", &[Some(&pool[0]), Some(&pool[1])]).await;
    let by_kustomize = manifests::patched("shared", of_page("patches:\n- target: { kind: Deployment")).await;
    replace_deployment(&cluster, &by_kustomize).await;
    until_placed(&cluster, "a pool, by kustomize", &[Some(&pool[0]), Some(&pool[1])]).await;
}

/// The other tests relax the level, because the pods of their nodes have no network of their own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_approvers_namespace_admits_its_pod_and_no_privileged_one() {
    let (cluster, _plane) = Cluster::own(GUARDED).await;
    let objects = rendered("shared").await;
    install(&cluster, &objects).await;
    let pods = format!("/api/v1/namespaces/{NAMESPACE}/pods?dryRun=All");
    let template = |kind: &str, name: &str| {
        let mut pod = named(&objects, kind, name)["spec"]["template"].clone();
        pod["metadata"]["name"] = json!("pod");
        pod
    };
    let approver = template("Deployment", "sds-agent-approver");
    cluster.create(&pods, &approver).await;
    let mut agent = template("DaemonSet", "sds-agent");
    agent["spec"]["serviceAccountName"] = approver["spec"]["serviceAccountName"].clone();
    let refusal = cluster.try_create(&pods, &agent).await.expect_err("a pod with the host's processes").to_string();
    assert!(refusal.contains("restricted") && refusal.contains("hostPID"), "{refusal}");
}
