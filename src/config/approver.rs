//! The section `approver`: settings of `sds-agent approver` beside those that it shares with the agents.

use std::time::Duration;

use serde_json::Value;
use workload_identity::Pattern;

use super::{
    environment::PodEnvironment,
    error::FieldError,
    reader::Section,
    values::{self, is_dns_name},
};

/// The prefix of a service account's user name.
const SERVICE_ACCOUNT: &str = "system:serviceaccount:";
/// Covers the one to two minutes in which kubelets update a mounted ConfigMap, and a roll-out that restarts the agents.
const OVERLAP: Duration = Duration::from_secs(600);

/// `approver`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Approver {
    /// `agents`: the user names of the agents' service accounts. Requests of other accounts are denied.
    pub agents: Vec<String>,
    /// `annotations`: keys of annotations that a request may carry beside the agents' own.
    pub annotations: Vec<Pattern>,
    /// `overlap`: how long the previous configuration still applies after a change.
    pub overlap: Duration,
}

impl Approver {
    /// The service account `sds-agent` of one namespace.
    pub fn of_namespace(namespace: &str) -> Self {
        Self { agents: vec![format!("{SERVICE_ACCOUNT}{namespace}:sds-agent")], annotations: Vec::new(), overlap: OVERLAP }
    }
}

/// Decodes the section.
pub(super) fn decode(section: &Section<'_>, pod: Option<&PodEnvironment>) -> Option<Approver> {
    let namespace = pod.and_then(|pod| pod.namespace.as_deref()).unwrap_or("sds-agent");
    let told = section.has("agents");
    let agents = section.list("agents", agent);
    let overlap = section.read("overlap", OVERLAP, values::duration(Duration::ZERO..=Duration::from_secs(86_400)));
    let annotations = section.list("annotations", annotation);
    let (agents, annotations, overlap) = (agents?, annotations?, overlap?);
    match (told, agents.is_empty()) {
        (false, _) => Some(Approver { annotations, overlap, ..Approver::of_namespace(namespace) }),
        (true, false) => Some(Approver { agents, annotations, overlap }),
        (true, true) => {
            section.wrong(
                "agents",
                "names no account, so every request would be denied",
                "name the agents' account, or leave the field out",
            );
            None
        }
    }
}

fn annotation(value: &Value) -> Result<Pattern, FieldError> {
    let remedy = "write a key such as example.com/owner, or a part of one with '*' at its beginning or at its end";
    let pattern =
        Pattern::parse(values::text(value)?).ok_or_else(|| FieldError::new("has a '*' that is not at its beginning or end", remedy))?;
    let is_part = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/');
    if pattern.part().len() > 317 || !pattern.part().bytes().all(is_part) {
        return Err(FieldError::new("can match no key of an annotation", remedy));
    }
    Ok(pattern)
}

fn agent(value: &Value) -> Result<String, FieldError> {
    let name = values::text(value)?;
    let account = name.strip_prefix(SERVICE_ACCOUNT).and_then(|rest| rest.split_once(':'));
    match account {
        Some((namespace, account)) if is_dns_name(namespace) && is_dns_name(account) => Ok(name.to_owned()),
        _ => {
            let remedy = format!("write {SERVICE_ACCOUNT}<namespace>:<name>: only the tokens of service accounts name a node");
            Err(FieldError::new("is not the user name of a service account", remedy))
        }
    }
}
