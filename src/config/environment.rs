//! The environment: the variables of the process, among them those that the downward API sets.
//!
//! Only this module reads the environment. Other modules receive a function, so that tests do not change the process.

use serde_json::Value;
use workload_identity::PodRef;

use super::{
    Attestation, NodeEnvironment,
    error::{FieldError, shown},
    reader::Report,
    values,
};

/// The value of an environment variable; an empty one counts as unset.
pub type Env<'a> = &'a (dyn Fn(&str) -> Option<String> + Sync);

/// This process's environment.
pub fn process(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The variables of the downward API. `namespace` is set even if the rest of the pod is not known.
#[derive(Debug, Clone, Default)]
pub(super) struct PodEnvironment {
    pub node: NodeEnvironment,
    pub namespace: Option<String>,
}

/// Reads the variables of the downward API. `attestation` decides which of them are required; with `None`, none is.
pub(super) fn pod(report: &Report, attestation: Option<Attestation>, env: Env<'_>) -> Option<PodEnvironment> {
    let read = |name: &str, check: fn(&Value) -> Result<String, FieldError>| -> Result<Option<String>, ()> {
        let Some(text) = env(name).filter(|text| !text.is_empty()) else { return Ok(None) };
        let value = Value::String(text);
        check(&value).map(Some).map_err(|wrong| report.problem(name, Some(shown(&value)), wrong))
    };
    let node_name = read("NODE_NAME", values::object_name);
    let namespace = read("POD_NAMESPACE", values::namespace);
    let name = read("POD_NAME", values::object_name);
    let uid = read("POD_UID", |value| values::text(value).map(str::to_owned));

    if attestation == Some(Attestation::Kubernetes) && node_name == Ok(None) {
        let what = "is not set, and `attestation: kubernetes` serves the pods of one node";
        report.problem("NODE_NAME", None, FieldError::new(what, format!("add to the container {}", snippet("NODE_NAME", "spec.nodeName"))));
    }
    let (node_name, namespace, name, uid) = (node_name.ok()?, namespace.ok()?, name.ok()?, uid.ok()?);
    let pod = match (namespace.clone(), name, uid) {
        (Some(namespace), Some(name), Some(uid)) => Some(PodRef { namespace: namespace.into(), name: name.into(), uid: uid.into() }),
        _ => None,
    };
    Some(PodEnvironment { node: NodeEnvironment { node_name: node_name.map(Into::into), pod }, namespace })
}

/// The YAML that sets an environment variable of a container from a field of its pod.
pub(super) fn snippet(name: &str, field: &str) -> String {
    format!("`env: [{{ name: {name}, valueFrom: {{ fieldRef: {{ fieldPath: {field} }} }} }}]`")
}
