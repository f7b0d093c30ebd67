//! Certificates before the first call, with the real API server and cert-manager: for a pod that starts, and not for pods that ran before
//! the agent.

use serde_json::json;
use test_harness::{
    agent::Agent,
    cluster::{Cluster, Pod},
    eventually,
    scene::{PATIENCE, Scene, Workload},
};

/// The number of streams whose first certificate was ready, and of those that had to wait.
async fn first_secrets(agent: &Agent) -> [f64; 2] {
    let count = async |cache| agent.metric_of("sds_agent_first_secret_duration_seconds_count", &[cache]).await;
    [count("cache=\"hit\"").await, count("cache=\"miss\"").await]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_starting_pod_finds_its_certificate_at_its_first_call() {
    let scene = Scene::new(&Cluster::connect().await).await;
    let pods = format!("/api/v1/namespaces/{}/pods", scene.namespace);
    let path = |name: &str| format!("{pods}/{name}");
    // Does the work of the kubelet and the scheduler; the directory is that of the socket.
    let start = async |name: &str| {
        let account = json!({"metadata": {"name": name}});
        scene.cluster.create(&format!("/api/v1/namespaces/{}/serviceaccounts", scene.namespace), &account).await;
        let spec = json!({
            "serviceAccountName": name, "nodeName": scene.node, "automountServiceAccountToken": false,
            "tolerations": [{"operator": "Exists"}], "containers": [{"name": "main", "image": "none"}],
            "volumes": [{"name": "sds", "hostPath": {"path": scene.dir.path()}}],
        });
        let pod = scene.cluster.create(&pods, &json!({"metadata": {"name": name}, "spec": spec})).await;
        let uid = pod["metadata"]["uid"].as_str().unwrap().to_owned();
        let (namespace, service_account) = (scene.namespace.clone(), name.to_owned());
        Workload::of(Pod { namespace, name: name.to_owned(), uid, service_account })
    };
    let run = async |name: &str| {
        let container =
            json!({"name": "main", "image": "none", "imageID": "", "ready": true, "restartCount": 0, "containerID": "containerd://1"});
        let status = json!({"status": {"phase": "Running", "containerStatuses": [container]}});
        scene.cluster.patch(&format!("{}/status", path(name)), &status).await;
    };

    let before = start("before").await;
    run("before").await;
    let agent = scene.agent_pod.launch(scene.dir.path(), "warmUp: { enabled: true }").start().await;
    let app = start("app").await;
    let row = eventually("the certificate is ready before the first call", PATIENCE, async || {
        let row = agent.certificate(&app.id()).await.ok_or("no identity")?;
        if row["serial"].is_null() && row["not_after"].is_null() { Err(row.to_string()) } else { Ok(row) }
    })
    .await;
    assert_eq!(row["subscribers"], 1, "{row}");
    assert_eq!((agent.certificate(&before.id()).await, first_secrets(&agent).await), (None, [0.0, 0.0]));

    run("app").await;
    let stream = app.watch(agent.socket());
    assert_eq!(stream.update(1, PATIENCE).await["spiffe_id"], app.id());
    let old = before.watch(agent.socket());
    assert_eq!(old.update(1, PATIENCE).await["spiffe_id"], before.id());
    eventually("one found it, the other waited", PATIENCE, async || {
        let counted = first_secrets(&agent).await;
        if counted == [1.0, 1.0] { Ok(()) } else { Err(format!("{counted:?}")) }
    })
    .await;
    eventually("the stream alone holds it", PATIENCE, async || {
        let row = agent.certificate(&app.id()).await.ok_or("no identity")?;
        let called = agent.metric_of("sds_agent_warm_ups_total", &["result=\"called\""]).await;
        if row["subscribers"] == 1 && called > 0.5 { Ok(()) } else { Err(format!("{called} {row}")) }
    })
    .await;
}
