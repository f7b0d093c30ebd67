//! The templates for Istio's injector, merged as it merges them: by a strategic merge patch, which is the API server's too.

use serde_json::{Value, json};

use crate::support::{cluster::Cluster, kubelet::DRIVER, manifests};

/// Where istio-proxy looks for the socket.
const PLACE: &str = "/var/run/secrets/workload-spiffe-uds";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_templates_replace_the_socket_of_sidecars_and_gateways() {
    let cluster = Cluster::connect().await;
    let namespace = cluster.namespace().await;
    let values: Value = serde_saphyr::from_str(&manifests::read("istio/values.yaml")).unwrap();
    let socket = &values["meshConfig"]["defaultConfig"]["proxyMetadata"]["WORKLOAD_IDENTITY_SOCKET_FILE"];
    assert_ne!(socket, "socket", "with Istio's own name a proxy that comes too early asks another authority");

    for (template, list, other) in [("sds-agent", "initContainers", "containers"), ("sds-agent-container", "containers", "initContainers")]
    {
        let text = values["sidecarInjectorWebhook"]["templates"][template].as_str().unwrap();
        let overlay: Value = serde_saphyr::from_str(text).unwrap();
        // What the injector's own templates leave: a proxy with the volume, an emptyDir, mounted where it can write.
        let mut spec = json!({
            "containers": [{"name": "app", "image": "none"}],
            "initContainers": [{"name": "istio-init", "image": "none"}],
            "volumes": [{"name": "workload-socket", "emptyDir": {}}, {"name": "istio-data", "emptyDir": {}}],
        });
        let mut proxy = json!({"name": "istio-proxy", "image": "none", "volumeMounts": [{"name": "workload-socket", "mountPath": PLACE}]});
        if list == "initContainers" {
            proxy["restartPolicy"] = json!("Always");
        }
        spec[list].as_array_mut().unwrap().push(proxy);
        let labels = json!({"app": template});
        let deployment = json!({
            "metadata": {"name": template},
            "spec": {"replicas": 0, "selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": spec}},
        });
        let deployments = format!("/apis/apps/v1/namespaces/{namespace}/deployments");
        cluster.create(&deployments, &deployment).await;
        let merged = cluster.merge(&format!("{deployments}/{template}"), &json!({"spec": {"template": overlay}})).await;
        let spec = &merged["spec"]["template"]["spec"];

        let named = |list: &Value, name: &str| list.as_array().unwrap().iter().find(|item| item["name"] == name).cloned();
        let volume = named(&spec["volumes"], "workload-socket").unwrap();
        let attributes = json!({"sds-agent.io/socket-name": socket});
        assert_eq!(volume["csi"], json!({"driver": DRIVER, "readOnly": true, "volumeAttributes": attributes}), "{template}");
        assert!(volume["emptyDir"].is_null(), "{template}: {volume}");
        let proxy = named(&spec[list], "istio-proxy").unwrap();
        assert_eq!(proxy["volumeMounts"], json!([{"name": "workload-socket", "mountPath": PLACE, "readOnly": true}]), "{template}");
        assert_eq!(named(&spec[other], "istio-proxy"), None, "{template} makes no second proxy");
    }
}
