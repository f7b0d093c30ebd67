//! The templates for Istio's injector, merged as the injector does: by a strategic merge patch, which the API server applies too.

use serde_json::{Value, json};
use test_harness::{cluster::Cluster, manifests, node::DRIVER};

/// The variable that names the socket. A proxy with this variable and without the socket ends.
const VARIABLE: &str = "WORKLOAD_IDENTITY_SOCKET_FILE";
/// The path at which istio-proxy looks for the socket.
const PLACE: &str = "/var/run/secrets/workload-spiffe-uds";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_templates_replace_the_socket_of_sidecars_and_gateways() {
    let cluster = Cluster::connect().await;
    let namespace = cluster.namespace().await;
    let values: Value = serde_saphyr::from_str(&manifests::read("istio/values.yaml")).unwrap();
    for (template, list, other) in [("sds-agent", "initContainers", "containers"), ("sds-agent-container", "containers", "initContainers")]
    {
        let text = values["sidecarInjectorWebhook"]["templates"][template].as_str().unwrap();
        let overlay: Value = serde_saphyr::from_str(text).unwrap();
        // The result of the injector's own templates: a proxy with the volume (an emptyDir), a writable mount, and variables.
        let mut spec = json!({
            "containers": [{"name": "app", "image": "none"}],
            "initContainers": [{"name": "istio-init", "image": "none"}],
            "volumes": [{"name": "workload-socket", "emptyDir": {}}, {"name": "istio-data", "emptyDir": {}}],
        });
        let mut proxy = json!({
            "name": "istio-proxy", "image": "none", "volumeMounts": [{"name": "workload-socket", "mountPath": PLACE}],
            "env": [{"name": "CA_ADDR", "value": "istiod.istio-system.svc:15012"}],
        });
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
        let proxy = named(&spec[list], "istio-proxy").unwrap();
        let socket = named(&proxy["env"], VARIABLE).unwrap_or_else(|| panic!("{template}: no {VARIABLE}: {proxy}"))["value"].clone();
        assert_ne!(socket, "socket", "with Istio's own name a proxy that starts too early requests from another authority");
        assert!(named(&proxy["env"], "CA_ADDR").is_some(), "{template}: {proxy}");
        let volume = named(&spec["volumes"], "workload-socket").unwrap();
        let attributes = json!({"sds-agent.io/socket-name": socket});
        assert_eq!(volume["csi"], json!({"driver": DRIVER, "readOnly": true, "volumeAttributes": attributes}), "{template}");
        assert!(volume["emptyDir"].is_null(), "{template}: {volume}");
        assert_eq!(proxy["volumeMounts"], json!([{"name": "workload-socket", "mountPath": PLACE, "readOnly": true}]), "{template}");
        assert_eq!(named(&spec[other], "istio-proxy"), None, "{template} makes no second proxy");
    }
}

/// Every proxy gets the settings in `meshConfig`, with or without one of these templates. They must not make a proxy without the agent's
/// volume fail. Of the values, only the templates and the trust domain are set.
#[test]
fn a_pod_that_chooses_no_template_is_left_as_it_is() {
    let values: Value = serde_saphyr::from_str(&manifests::read("istio/values.yaml")).unwrap();
    assert_eq!(values["meshConfig"], json!({"trustDomain": "cluster.local"}));
    let injector = values["sidecarInjectorWebhook"].as_object().unwrap();
    assert_eq!(injector.keys().collect::<Vec<_>>(), ["templates"]);
    let templates = injector["templates"].as_object().unwrap();
    // A template with another name than Istio's own affects only pods that name it.
    assert_eq!(templates.keys().collect::<Vec<_>>(), ["sds-agent", "sds-agent-container"]);
    assert_eq!(values.as_object().unwrap().len(), 2);
}
