//! The optional NetworkPolicy: its ports are those of the pods, and the API server admits it with other clients of the metrics.

use serde_json::{Value, json};
use test_harness::{
    cluster::Cluster,
    manifests::{NAMESPACE, helm, install, named, rendered_with},
    world::GUARDED,
};

const POLICY: &str = "NetworkPolicy";

/// The numbers of the ports of a pod template whose names end with this word.
fn ports(object: &Value, name: &str) -> Vec<u64> {
    let containers = object["spec"]["template"]["spec"]["containers"].as_array().unwrap().iter();
    let ports = containers.flat_map(|container| container["ports"].as_array().unwrap());
    let mut ports: Vec<_> =
        ports.filter(|port| port["name"].as_str().unwrap().ends_with(name)).map(|port| &port["containerPort"]).collect();
    ports.sort_by_key(|port| port.as_u64());
    ports.into_iter().map(|port| port.as_u64().unwrap()).collect()
}

/// The ports of each rule of ingress, and its clients. `null`: all clients.
fn rules(policy: &Value) -> Vec<(Vec<u64>, &Value)> {
    let rules = policy["spec"]["ingress"].as_array().unwrap().iter();
    let ports = |rule: &Value| rule["ports"].as_array().unwrap().iter().map(|port| port["port"].as_u64().unwrap()).collect();
    rules.map(|rule| (ports(rule), &rule["from"])).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_are_for_prometheus_and_probes_for_everybody() {
    let (cluster, _plane) = Cluster::own(GUARDED).await;
    let objects = rendered_with("both", &["network-policy"]).await;
    let monitoring = json!([{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]);
    for (kind, name) in [("DaemonSet", "sds-agent"), ("Deployment", "sds-agent-approver")] {
        let (object, policy) = (named(&objects, kind, name), named(&objects, POLICY, name));
        assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress"]), "egress is not limited");
        assert_eq!(policy["metadata"]["namespace"], object["metadata"]["namespace"]);
        assert_eq!(policy["spec"]["podSelector"]["matchLabels"], object["spec"]["template"]["metadata"]["labels"]);
        assert_eq!(rules(policy), [(ports(object, "metrics"), &monitoring), (ports(object, "probes"), &Value::Null)], "{name}");
    }

    let peers = json!([{"namespaceSelector": {"matchLabels": {"team": "ops"}}}, {"ipBlock": {"cidr": "10.0.0.0/8"}}]);
    let values = ["--set", "networkPolicy.enabled=true", "--set-json", &format!("networkPolicy.metricsFrom={peers}")];
    let chart = helm(NAMESPACE, &values).await;
    let policy = named(&chart, POLICY, "sds-agent");
    let clients = |name: &str| rules(named(&chart, POLICY, name)).into_iter().map(|(_, from)| from.clone()).collect::<Vec<_>>();
    assert_eq!(clients("sds-agent-approver"), clients("sds-agent"));
    assert_eq!(rules(policy).iter().map(|(_, from)| *from).collect::<Vec<_>>(), [&peers, &Value::Null]);
    assert!(!helm(NAMESPACE, &[]).await.iter().any(|object| object["kind"] == POLICY), "it is optional");
    let namespace = named(&objects, "Namespace", NAMESPACE).clone();
    let made = install(&cluster, &[namespace, policy.clone()]).await;
    assert_eq!(made[1]["spec"]["ingress"][0]["from"], peers);
}
