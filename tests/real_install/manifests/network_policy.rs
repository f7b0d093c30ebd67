//! The optional NetworkPolicy: its ports are those of the pods, and the API server admits it with other clients of the metrics.

use serde_json::{Value, json};
use test_harness::{
    cluster::Cluster,
    manifests::{NAMESPACE, helm, install, named, rendered_with},
    world::GUARDED,
};

const POLICY: &str = "NetworkPolicy";

/// The number of a named port of a pod template.
fn port(object: &Value, name: &str) -> Value {
    let ports = object["spec"]["template"]["spec"]["containers"][0]["ports"].as_array().unwrap();
    ports.iter().find(|port| port["name"] == name).unwrap()["containerPort"].clone()
}

/// The port of each rule of ingress, and its clients. `null`: all clients.
fn rules(policy: &Value) -> Vec<(&Value, &Value)> {
    let rules = policy["spec"]["ingress"].as_array().unwrap().iter();
    let one = |ports: &Value| assert_eq!(ports.as_array().map(Vec::len), Some(1));
    rules.inspect(|rule| one(&rule["ports"])).map(|rule| (&rule["ports"][0]["port"], &rule["from"])).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_are_for_prometheus_and_probes_for_everybody() {
    let (cluster, _plane) = Cluster::own(GUARDED).await;
    let objects = rendered_with("shared", &["network-policy"]).await;
    let monitoring = json!([{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]);
    for (kind, name) in [("DaemonSet", "sds-agent"), ("Deployment", "sds-agent-approver")] {
        let (object, policy) = (named(&objects, kind, name), named(&objects, POLICY, name));
        assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress"]), "egress is not limited");
        assert_eq!(policy["metadata"]["namespace"], object["metadata"]["namespace"]);
        assert_eq!(policy["spec"]["podSelector"]["matchLabels"], object["spec"]["template"]["metadata"]["labels"]);
        assert_eq!(rules(policy), [(&port(object, "metrics"), &monitoring), (&port(object, "probes"), &Value::Null)], "{name}");
    }

    let peers = json!([{"namespaceSelector": {"matchLabels": {"team": "ops"}}}, {"ipBlock": {"cidr": "10.0.0.0/8"}}]);
    let values = ["--set", "networkPolicy.enabled=true", "--set-json", &format!("networkPolicy.metricsFrom={peers}")];
    let chart = helm(NAMESPACE, &values).await;
    let policy = named(&chart, POLICY, "sds-agent");
    assert_eq!(rules(named(&chart, POLICY, "sds-agent-approver")), rules(policy));
    assert_eq!(rules(policy).iter().map(|(_, from)| *from).collect::<Vec<_>>(), [&peers, &Value::Null]);
    assert!(!helm(NAMESPACE, &[]).await.iter().any(|object| object["kind"] == POLICY), "it is optional");
    let namespace = named(&objects, "Namespace", NAMESPACE).clone();
    let made = install(&cluster, &[namespace, policy.clone()]).await;
    assert_eq!(made[1]["spec"]["ingress"][0]["from"], peers);
}
