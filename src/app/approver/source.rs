//! Where an approver reads its configuration and the denied nodes: from files, or from a ConfigMap through the API server.
//!
//! In a cluster, the ConfigMap belongs to the agents' namespace, and the approver has a namespace of its own, in which it cannot mount it.

use std::{fmt, io, path::PathBuf};

use k8s_openapi::api::core::v1::ConfigMap;

use super::{
    denied_nodes::{self, DeniedNodes},
    settings::{Refused, Settings},
};
use crate::{
    app::config_map::{ConfigMapName, ConfigMapWatch},
    config::Env,
};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::app::approver::source";
/// The key of the configuration in the ConfigMap.
const KEY: &str = "config.yaml";

/// Where the configuration is.
#[derive(Debug, Clone)]
pub enum Source {
    /// A file. The denied nodes are in a file beside it.
    File(PathBuf),
    /// The keys of a ConfigMap. Its namespace is that of the agents and of their requests.
    ConfigMap(ConfigMapName),
}

/// For messages: the file, or the ConfigMap.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::ConfigMap(name) => write!(f, "ConfigMap {name}"),
        }
    }
}

impl Source {
    /// For messages: the file or the key with the denied nodes.
    pub(super) fn of_denied_nodes(&self) -> String {
        match self {
            Self::File(path) => denied_nodes::beside(path).display().to_string(),
            Self::ConfigMap(name) => format!("ConfigMap {name}, key {}", denied_nodes::NAME),
        }
    }
}

/// The configuration and the denied nodes with which an approver starts.
#[derive(Debug)]
pub struct Start {
    /// The configuration.
    pub settings: Settings,
    pub(super) source: Source,
    pub(super) denied: DeniedNodes,
}

/// Why an approver cannot start.
#[derive(Debug, thiserror::Error)]
pub enum CannotStart {
    /// The configuration cannot be used.
    #[error("{0} cannot be used:\n{1}")]
    Refused(Source, Refused),
    /// The denied nodes cannot be read. No request is decided without them.
    #[error("{0} {1}")]
    DeniedNodes(String, String),
    /// The client of the API server cannot be created.
    #[error(transparent)]
    Client(#[from] agent_kube::Error),
    /// The watch of the ConfigMap has ended.
    #[error("the watch of the ConfigMap {0} has ended")]
    WatchEnded(ConfigMapName),
}

impl Start {
    /// Reads the files.
    ///
    /// # Errors
    ///
    /// The configuration cannot be used, or the file of the denied nodes exists and cannot be read.
    pub fn of_file(path: PathBuf, env: Env<'_>) -> Result<Self, CannotStart> {
        let settings = Settings::load(&path, env);
        let denied = denied_nodes::load(&path);
        Self::new(Source::File(path), settings, denied)
    }

    /// Waits until the ConfigMap exists and reads it. Retries without an end while the API server does not answer.
    ///
    /// # Errors
    ///
    /// The configuration cannot be used, or no client of the API server can be created.
    pub async fn of_config_map(name: ConfigMapName, env: Env<'_>) -> Result<Self, CannotStart> {
        let metrics = agent_kube::Metrics::default();
        let client = agent_kube::connect(&metrics, approver::RATE).await?;
        let mut watch = ConfigMapWatch::new(client, &name.namespace, &name.name, metrics);
        let map = loop {
            match watch.next().await {
                Some(Some(map)) => break map,
                Some(None) => tracing::warn!(target: LOG_TARGET, config_map = %name, "the ConfigMap does not exist; waiting for it"),
                None => return Err(CannotStart::WatchEnded(name)),
            }
        };
        let (settings, denied) = read(&name, Some(&map), env);
        Self::new(Source::ConfigMap(name), settings, denied)
    }

    fn new(source: Source, settings: Result<Settings, Refused>, denied: Result<DeniedNodes, String>) -> Result<Self, CannotStart> {
        match (settings, denied) {
            (Ok(settings), Ok(denied)) => Ok(Self { settings, source, denied }),
            (Err(refused), _) => Err(CannotStart::Refused(source, refused)),
            (_, Err(error)) => Err(CannotStart::DeniedNodes(source.of_denied_nodes(), error)),
        }
    }
}

/// Reads both keys of the ConfigMap; `None` if it does not exist. A ConfigMap without the key of the denied nodes denies no node.
pub(super) fn read(
    name: &ConfigMapName,
    map: Option<&ConfigMap>,
    env: Env<'_>,
) -> (Result<Settings, Refused>, Result<DeniedNodes, String>) {
    let Some(map) = map else {
        let error = || format!("the ConfigMap {name} does not exist");
        return (Err(Refused::Missing(error())), Err(error()));
    };
    let value = |key: &str| map.data.as_ref().and_then(|data| data.get(key)).map(String::as_bytes);
    // The defaults that come from the namespace are those of the agents.
    let agents = |variable: &str| if variable == "POD_NAMESPACE" { Some(name.namespace.clone()) } else { env(variable) };
    let settings = match value(KEY) {
        Some(content) => Settings::of_content(KEY.as_ref(), Ok(content), &agents).map(|settings| settings.of_pod_in(env("POD_NAMESPACE"))),
        None => Err(Refused::Missing(format!("the ConfigMap {name} has no key {KEY}"))),
    };
    let missing = io::Error::from(io::ErrorKind::NotFound);
    (settings, denied_nodes::of_content(value(denied_nodes::NAME).ok_or(&missing)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const CONFIG: &str = "issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }\n";

    fn map(keys: &[(&str, &str)]) -> ConfigMap {
        let data: BTreeMap<_, _> = keys.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        ConfigMap { data: Some(data), ..ConfigMap::default() }
    }

    fn name() -> ConfigMapName {
        "mesh/sds-agent".parse().unwrap()
    }

    fn env(name: &str) -> Option<String> {
        match name {
            "POD_NAMESPACE" => Some("mesh-approver".to_owned()),
            "POD_NAME" => Some("approver-1".to_owned()),
            "POD_UID" => Some("u-1".to_owned()),
            _ => None,
        }
    }

    #[test]
    fn agents_and_requests_are_in_the_namespace_of_the_config_map() {
        let (settings, denied) = read(&name(), Some(&map(&[("config.yaml", CONFIG), ("deniedNodes", "n1\n")])), &env);
        let settings = settings.unwrap();
        assert_eq!(settings.rules.agents.iter().collect::<Vec<_>>(), ["system:serviceaccount:mesh:sds-agent"]);
        let cert_manager::RequestNamespace::Fixed(namespace) = &settings.rules.issuers[0].namespace else { panic!("not fixed") };
        assert_eq!(namespace, "mesh");
        let pod = settings.config.node.pod.unwrap();
        assert_eq!((&*pod.namespace, &*pod.name), ("mesh-approver", "approver-1"), "replicas are counted in the approver's own namespace");
        assert_eq!(denied.unwrap().nodes, ["n1".to_owned()].into());
    }

    #[test]
    fn what_is_missing_is_named_and_only_a_missing_key_denies_no_node() {
        let (settings, denied) = read(&name(), None, &env);
        assert_eq!(settings.unwrap_err().to_string(), "the ConfigMap mesh/sds-agent does not exist");
        assert!(denied.is_err(), "the former nodes stay denied");
        let (settings, denied) = read(&name(), Some(&map(&[("config", CONFIG)])), &env);
        assert_eq!(settings.unwrap_err().to_string(), "the ConfigMap mesh/sds-agent has no key config.yaml");
        assert_eq!(denied, Ok(DeniedNodes::default()));
        let (settings, _) = read(&name(), Some(&map(&[("config.yaml", "attestation: unix\nissuer: { embedded: {} }\n")])), &env);
        assert!(matches!(settings, Err(Refused::Unfit(_))));
    }
}
