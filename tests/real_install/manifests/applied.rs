//! The real API server validates and admits every rendered object, and a second apply changes nothing.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use test_harness::{
    cluster::Cluster,
    manifests::{self, MODES, NAMESPACE, apply_all, helm, install, install_operator_kinds, named, rendered, try_helm},
    world::GUARDED,
};

/// The API versions in use. Kubernetes 1.30 has all of them; ValidatingAdmissionPolicy is the newest.
const VERSIONS: [&str; 6] =
    ["admissionregistration.k8s.io/v1", "apps/v1", "policy/v1", "rbac.authorization.k8s.io/v1", "storage.k8s.io/v1", "v1"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_object_is_admitted_and_stays_as_it_is() {
    let (cluster, _plane) = Cluster::own(GUARDED).await;
    println!("figure: {} objects applied", apply_all(&cluster).await);
}

#[tokio::test]
async fn nothing_newer_than_kubernetes_1_30_is_used() {
    let mut seen = BTreeSet::new();
    for (folder, _) in MODES {
        for object in rendered(folder).await {
            seen.insert(object["apiVersion"].as_str().unwrap().to_owned());
        }
    }
    assert_eq!(seen, VERSIONS.map(str::to_owned).into());
    for (version, fits) in [("1.29.14", false), ("1.30.0", true), ("1.36.0-eks-1", true)] {
        let output = try_helm(manifests::NAMESPACE, &["--kube-version", version]).await;
        assert_eq!(output.status.success(), fits, "{version}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// For an installation that first observes what the policies would reject, and for a compromised node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_policies_actions_and_the_denied_nodes_are_values_of_the_chart() {
    let (cluster, _plane) = Cluster::own(GUARDED).await;
    let values = ["--set-json", r#"policy.validationActions=["Audit","Warn"]"#, "--set-json", r#"deniedNodes=["n1","n2.example"]"#];
    let objects = helm(NAMESPACE, &values).await;
    let bindings: Vec<_> = objects.iter().filter(|object| object["kind"] == "ValidatingAdmissionPolicyBinding").collect();
    assert_eq!(bindings.len(), 6);
    for binding in bindings {
        assert_eq!(binding["spec"]["validationActions"], json!(["Audit", "Warn"]), "{}", binding["metadata"]["name"]);
    }
    assert_eq!(named(&objects, "ConfigMap", "sds-agent")["data"]["deniedNodes"], "n1\nn2.example");
    install_operator_kinds(&cluster).await;
    install(&cluster, &objects).await;
    for values in [r#"policy.validationActions=["Deny","Warn"]"#, "policy.validationActions=[]", r#"deniedNodes=["Node 1"]"#] {
        let output = try_helm(NAMESPACE, &["--set-json", values]).await;
        assert!(!output.status.success(), "{values} is accepted, and the API server rejects it");
    }
}

/// Workloads keep the pod security level of their namespace: with per-pod sockets they need no hostPath.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restricted_namespace_admits_csi_and_rejects_host_path_volumes() {
    let cluster = Cluster::connect().await;
    let namespace = cluster.namespace().await;
    let level = json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
    cluster.patch(&format!("/api/v1/namespaces/{namespace}"), &level).await;
    let driver = manifests::documents(&manifests::read("per-pod/csidriver.yaml")).remove(0);
    let pod = |volume: Value| {
        let strict = json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}});
        json!({
            "metadata": {"name": "app"},
            "spec": {
                "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
                "automountServiceAccountToken": false,
                "containers": [{
                    "name": "main", "image": "none", "securityContext": strict, "volumeMounts": [{"name": "sds", "mountPath": "/run/sds"}],
                }],
                "volumes": [volume],
            },
        })
    };
    let pods = format!("/api/v1/namespaces/{namespace}/pods?dryRun=All");
    cluster.create(&format!("/api/v1/namespaces/{namespace}/serviceaccounts"), &json!({"metadata": {"name": "app"}})).await;
    let own = pod(json!({"name": "sds", "csi": {"driver": driver["metadata"]["name"], "readOnly": true}}));
    cluster.create(&pods, &own).await;
    let shared = pod(json!({"name": "sds", "hostPath": {"path": "/run/sds-agent"}}));
    let refusal = cluster.try_create(&pods, &shared).await.expect_err("a path of the host").to_string();
    assert!(refusal.contains("restricted") && refusal.contains("hostPath"), "{refusal}");
}
