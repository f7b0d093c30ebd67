//! The manifests of `daemonset/`: its files, the output of kustomize and helm for them, and their installation into a cluster.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::process::Command;

use crate::{child, cluster::Cluster, eventually, paths, tools};

/// Limit for a program that renders, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Limit until the API server serves a new kind.
const SERVED: Duration = Duration::from_secs(60);
/// The namespace of the installation.
pub const NAMESPACE: &str = "sds-agent";
/// The directories of kustomize and the chart's names for them.
pub const MODES: [(&str, &str); 3] = [("shared", "shared"), ("per-pod", "perPod"), ("both", "both")];

/// The directory `daemonset`.
pub fn folder() -> PathBuf {
    paths::root().join("daemonset")
}

/// Reads a file of that directory.
pub fn read(file: &str) -> String {
    let path = folder().join(file);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The objects of a file with several documents. A document with comments only is skipped.
pub fn documents(text: &str) -> Vec<Value> {
    let mut documents = vec![String::new()];
    for line in text.lines() {
        match documents.last_mut() {
            Some(document) if line.trim_end() != "---" => {
                document.push_str(line);
                document.push('\n');
            }
            _ => documents.push(String::new()),
        }
    }
    let blank = |line: &str| line.trim().is_empty() || line.starts_with('#');
    let documents = documents.iter().filter(|document| !document.lines().all(blank));
    documents.map(|document| serde_saphyr::from_str(document).unwrap_or_else(|e| panic!("{e}:\n{document}"))).collect()
}

/// The container of a pod's spec with this name.
pub fn container<'a>(spec: &'a Value, name: &str) -> &'a Value {
    let all = spec["containers"].as_array().into_iter().flatten();
    all.clone().find(|container| container["name"] == name).unwrap_or_else(|| panic!("no container {name} in {spec}"))
}

/// The memory limit, in bytes, of the first container of the first object of a kind in a file of the directory.
pub fn memory_limit(file: &str, kind: &str) -> u64 {
    let objects = documents(&read(file));
    let object = objects.iter().find(|object| object["kind"] == kind).unwrap_or_else(|| panic!("no {kind} in {file}"));
    let text = &object["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"];
    let bytes = text.as_str().and_then(|text| {
        let (number, shift) = text.strip_suffix("Gi").map(|number| (number, 30)).or_else(|| Some((text.strip_suffix("Mi")?, 20)))?;
        Some(number.parse::<u64>().ok()? << shift)
    });
    bytes.unwrap_or_else(|| panic!("{file}: a limit in Mi or Gi: {text}"))
}

/// The objects that kustomize builds from a directory.
pub async fn kustomize(folder: &Path) -> Vec<Value> {
    documents(&child::succeed(&tools::kustomize(), &["build", plain(folder)], PATIENCE).await)
}

/// The objects that helm renders in a namespace, with arguments such as `--set`. The Namespace object is one of them.
pub async fn helm(namespace: &str, arguments: &[&str]) -> Vec<Value> {
    let output = try_helm(namespace, arguments).await;
    assert!(output.status.success(), "helm: {}", String::from_utf8_lossy(&output.stderr));
    documents(&String::from_utf8_lossy(&output.stdout))
}

/// Runs helm and returns its output, also when it fails.
pub async fn try_helm(namespace: &str, arguments: &[&str]) -> Output {
    run_helm(&folder().join("chart"), namespace, arguments).await
}

/// The objects of the chart of another version, with its default values.
pub async fn helm_of(chart: &Path, namespace: &str) -> Vec<Value> {
    let output = run_helm(chart, namespace, &[]).await;
    assert!(output.status.success(), "helm: {}", String::from_utf8_lossy(&output.stderr));
    documents(&String::from_utf8_lossy(&output.stdout))
}

async fn run_helm(chart: &Path, namespace: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(tools::helm());
    command.args(["template", "sds-agent", plain(chart), "--namespace", namespace, "--set", "createNamespace=true"]);
    command.args(arguments);
    child::finish(command, PATIENCE).await
}

fn plain(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// The first object of a kind and a name.
pub fn named<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = objects.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}"))
}

/// The path of an object in the API.
pub fn path(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (version, kind, name) = (text(&object["apiVersion"]), text(&object["kind"]), text(&object["metadata"]["name"]));
    let plural = match kind.to_lowercase() {
        kind if kind.ends_with('y') => format!("{}ies", kind.trim_end_matches('y')),
        kind => format!("{kind}s"),
    };
    let group = if version.contains('/') { format!("/apis/{version}") } else { format!("/api/{version}") };
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{group}/namespaces/{namespace}/{plural}/{name}"),
        None => format!("{group}/{plural}/{name}"),
    }
}

/// The objects that kustomize builds for a mode.
pub async fn rendered(mode: &str) -> Vec<Value> {
    kustomize(&folder().join(mode)).await
}

/// The objects for a mode with components, as a user's kustomization adds them.
pub async fn rendered_with(mode: &str, components: &[&str]) -> Vec<Value> {
    // In the repository: kustomize accepts no absolute paths.
    let folder = tempfile::tempdir_in(paths::tmp()).unwrap();
    let up = up_from(folder.path());
    let components: Vec<_> = components.iter().map(|component| format!("{up}/daemonset/{component}")).collect();
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": [format!("{up}/daemonset/{mode}")], "components": components,
    });
    fs::write(folder.path().join("kustomization.yaml"), kustomization.to_string()).unwrap();
    kustomize(folder.path()).await
}

/// The relative path from a directory to the repository.
pub fn up_from(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap();
    let root = paths::root();
    let common = folder.ancestors().find(|ancestor| root.starts_with(ancestor)).expect("/ at least");
    let steps = folder.strip_prefix(common).unwrap().components().map(|_| "..".to_owned());
    let down = root.strip_prefix(common).unwrap().components().map(|part| part.as_os_str().to_str().unwrap().to_owned());
    steps.chain(down).collect::<Vec<_>>().join("/")
}

/// The objects for a mode with these lines in a user's kustomization.
pub async fn patched(mode: &str, lines: &str) -> Vec<Value> {
    let folder = tempfile::tempdir_in(paths::tmp()).unwrap();
    let kustomization = format!("resources: [ {}/daemonset/{mode} ]\n{lines}", up_from(folder.path()));
    fs::write(folder.path().join("kustomization.yaml"), kustomization).unwrap();
    kustomize(folder.path()).await
}

/// Applies all objects in order; returns them as the API server completed them.
pub async fn install(cluster: &Cluster, objects: &[Value]) -> Vec<Value> {
    let mut made = Vec::new();
    for object in objects {
        made.push(cluster.apply(&path(object), object).await);
    }
    made
}

/// The kinds of the Prometheus operator, as far as the API server has to know them.
pub async fn install_operator_kinds(cluster: &Cluster) {
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
        eventually("the kind is served", SERVED, async || cluster.try_get(&list).await.map(drop).map_err(|e| e.to_string())).await;
    }
}

/// Applies every object of every mode and of the example, by kustomize and by helm; returns the number of objects.
pub async fn apply_all(cluster: &Cluster) -> usize {
    install_operator_kinds(cluster).await;
    let mut count = 0;
    for (folder, mode) in MODES {
        let objects = rendered_with(folder, &["workload-requests", "cluster-trust-bundles", "monitoring", "network-policy"]).await;
        install(cluster, &objects).await;
        // An object that the API server completes differently from the manifest would change at each apply.
        for (first, object) in install(cluster, &objects).await.iter().zip(&objects) {
            let second = cluster.apply(&path(object), object).await;
            assert_eq!(first["metadata"]["resourceVersion"], second["metadata"]["resourceVersion"], "{folder}: {}", path(object));
        }
        // A change from kustomize to helm and back leaves no object that the other tool does not own.
        install(cluster, &helm(NAMESPACE, &["--set", &format!("mode={mode}")]).await).await;
        count += objects.len();
    }
    let example = documents(&read("example/authority.yaml"));
    // The control plane of the tests has this ClusterIssuer with another Secret, so it stays unchanged.
    install(cluster, &example[..2]).await;
    cluster.patch(&format!("{}?dryRun=All", path(&example[2])), &example[2]).await;
    count + example.len()
}
