//! What `daemonset/` installs: its files, and what kustomize and helm make of them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
    time::Duration,
};

use serde_json::Value;
use tokio::process::Command;

use super::{child, tools};

/// Of a program that renders, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where everything is installed.
pub const NAMESPACE: &str = "sds-agent";

/// The folder.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset")
}

/// A file of it.
pub fn read(file: &str) -> String {
    let path = folder().join(file);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The objects of a file with several. What holds nothing but comments is none.
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

/// The memory limit of the first container of the first object of a kind in a file of the folder, in bytes.
pub fn memory_limit(file: &str, kind: &str) -> u64 {
    let objects = documents(&read(file));
    let object = objects.iter().find(|object| object["kind"] == kind).unwrap_or_else(|| panic!("no {kind} in {file}"));
    let text = &object["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"];
    let mebibytes: Option<u64> = text.as_str().and_then(|text| text.strip_suffix("Mi")?.parse().ok());
    mebibytes.unwrap_or_else(|| panic!("{file}: a limit in Mi: {text}")) << 20
}

/// What kustomize builds of a folder.
pub async fn kustomize(folder: &Path) -> Vec<Value> {
    documents(&child::succeed(&tools::kustomize(), &["build", plain(folder)], PATIENCE).await)
}

/// What helm renders in a namespace, with arguments such as `--set`; the namespace's object is part of it.
pub async fn helm(namespace: &str, arguments: &[&str]) -> Vec<Value> {
    let output = try_helm(namespace, arguments).await;
    assert!(output.status.success(), "helm: {}", String::from_utf8_lossy(&output.stderr));
    documents(&String::from_utf8_lossy(&output.stdout))
}

/// The same, where it may refuse.
pub async fn try_helm(namespace: &str, arguments: &[&str]) -> Output {
    let chart = folder().join("chart");
    let mut command = Command::new(tools::helm());
    command.args(["template", "sds-agent", plain(&chart), "--namespace", namespace, "--set", "createNamespace=true"]);
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

/// Where the API server has an object.
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
