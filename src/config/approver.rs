//! The section `approver`: what `sds-agent approver` needs beside what it shares with the agents.

use std::time::Duration;

use serde_json::Value;
use workload_identity::Pattern;

use super::{
    environment::PodEnvironment,
    error::FieldError,
    reader::Section,
    values::{self, is_dns_name},
};

/// What the user name of a service account begins with.
const SERVICE_ACCOUNT: &str = "system:serviceaccount:";
/// Kubelets bring a new ConfigMap within a minute or two, and agents that are restarted for it come back within a roll-out.
const OVERLAP: Duration = Duration::from_secs(600);

/// `approver`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Approver {
    /// `agents`: the user names of the agents' service accounts. Nobody else's requests are approved.
    pub agents: Vec<String>,
    /// `annotations`: those of others that a request may carry.
    pub annotations: Vec<Pattern>,
    /// `overlap`: how long after a change the former configuration counts, too.
    pub overlap: Duration,
}

impl Approver {
    /// The agents of one namespace under their usual name.
    pub fn of_namespace(namespace: &str) -> Self {
        Self { agents: vec![format!("{SERVICE_ACCOUNT}{namespace}:sds-agent")], annotations: Vec::new(), overlap: OVERLAP }
    }
}

/// Walks the section.
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
                "names nobody, so that every request would be denied",
                "name the agents' account, or leave the field out",
            );
            None
        }
    }
}

fn annotation(value: &Value) -> Result<Pattern, FieldError> {
    let remedy = "write a key such as example.com/owner, or a part of one with '*' at its beginning or at its end";
    let pattern =
        Pattern::parse(values::text(value)?).ok_or_else(|| FieldError::new("has a '*' elsewhere than at one end of it", remedy))?;
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
