//! What `daemonset/` installs: the chart against kustomize, the objects against the real API server, the pods on the real kubelet.
//!
//! Everything here is rendered by the real programs and applied as it is. Where a pod cannot be as it is on a test's node, `site` says in
//! one place what is changed.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::{
    cluster::Cluster,
    eventually,
    manifests::{self, path},
};

mod applied;
mod equal;
mod istio;
mod node;
mod oldest;
mod parameters;
mod readme;
mod rights;
mod rollout;
mod site;

/// cert-manager's own approver keeps away from the ClusterIssuers, of which the mesh's is one: what is approved, ours approves.
const GUARDED: &[&str] = &["--approve-signers", "issuers.cert-manager.io/*"];
/// The folders of kustomize and what the chart calls them.
const MODES: [(&str, &str); 3] = [("shared", "shared"), ("per-pod", "perPod"), ("both", "both")];

/// What kustomize makes of a mode's folder.
async fn rendered(mode: &str) -> Vec<Value> {
    manifests::kustomize(&manifests::folder().join(mode)).await
}

/// The same with components, as somebody else's kustomization adds them.
async fn rendered_with(mode: &str, components: &[&str]) -> Vec<Value> {
    // Below the repository: kustomize takes no absolute paths.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let up = up_from(folder.path());
    let components: Vec<_> = components.iter().map(|component| format!("{up}/daemonset/{component}")).collect();
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": [format!("{up}/daemonset/{mode}")], "components": components,
    });
    std::fs::write(folder.path().join("kustomization.yaml"), kustomization.to_string()).unwrap();
    manifests::kustomize(folder.path()).await
}

/// The way from a folder to the repository's.
fn up_from(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).canonicalize().unwrap();
    let common = folder.ancestors().find(|ancestor| root.starts_with(ancestor)).expect("/ at least");
    let steps = folder.strip_prefix(common).unwrap().components().map(|_| "..".to_owned());
    let down = root.strip_prefix(common).unwrap().components().map(|part| part.as_os_str().to_str().unwrap().to_owned());
    steps.chain(down).collect::<Vec<_>>().join("/")
}

/// Applies all of it by the API server, in order; gives what the API server made of it.
async fn install(cluster: &Cluster, objects: &[Value]) -> Vec<Value> {
    let mut made = Vec::new();
    for object in objects {
        made.push(cluster.apply(&path(object), object).await);
    }
    made
}

/// The Prometheus operator's kinds, as far as the API server has to know of them.
async fn install_operator_kinds(cluster: &Cluster) {
    for (kind, plural) in [("PodMonitor", "podmonitors"), ("PrometheusRule", "prometheusrules")] {
        let name = format!("{plural}.monitoring.coreos.com");
        let schema = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        let definition = json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": name},
            "spec": {
                "group": "monitoring.coreos.com", "scope": "Namespaced", "names": {"kind": kind, "plural": plural},
                "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}}],
            },
        });
        cluster.apply(&path(&definition), &definition).await;
        let list = format!("/apis/monitoring.coreos.com/v1/{plural}");
        eventually("the kind is served", site::PATIENCE, async || cluster.try_get(&list).await.map(drop).map_err(|e| e.to_string())).await;
    }
}
