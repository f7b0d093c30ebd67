//! The settings of an approver, read from the agents' configuration file.

use std::{io, path::Path};

use approver::rules::{Guarded, Rules};
use workload_identity::IssuerName;

use crate::config::{Attestation, Config, Env, Errors, IssuerConfig, Loaded, Warning};

/// A configuration that an approver can use.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The whole configuration.
    pub config: Config,
    /// The rules of approval.
    pub rules: Rules,
    /// The warnings about `approver` fields; agents log the others.
    pub warnings: Vec<Warning>,
}

/// Why an approver cannot use a valid configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// An issuer does not use cert-manager.
    #[error("issuer {0}: an approver decides on CertificateRequests, and this issuer creates none; use issuer.certManager")]
    NoRequests(IssuerName),
    /// The identities are not those of pods.
    #[error("attestation: an approver derives identities from pods, and `attestation: unix` has no pods; use kubernetes")]
    NoPods,
}

/// Why a configuration cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is no configuration.
    #[error("{0}")]
    Missing(String),
    /// The file is invalid.
    #[error(transparent)]
    Invalid(#[from] Errors),
    /// The file is valid, but an approver cannot use it.
    #[error(transparent)]
    Unfit(#[from] Unfit),
}

impl Settings {
    /// Reads the file at `path` and the variables of `env`.
    pub fn load(path: &Path, env: Env<'_>) -> Result<Self, Refused> {
        Self::of(Config::load(path, &anywhere(env))?)
    }

    /// As [`load`](Self::load), with the content or the error that was read from `path`.
    pub fn of_content(path: &Path, content: Result<&[u8], &io::Error>, env: Env<'_>) -> Result<Self, Refused> {
        Self::of(Config::of_content(path, content, &anywhere(env))?)
    }

    fn of(loaded: Loaded) -> Result<Self, Refused> {
        let Loaded { config, warnings } = loaded;
        let rules = rules(&config)?;
        let warnings = warnings.into_iter().filter(|warning| warning.path.starts_with("approver")).collect();
        Ok(Self { config, rules, warnings })
    }

    /// The same settings for a pod in this namespace, if the configuration was read for another one.
    pub(super) fn of_pod_in(mut self, namespace: Option<String>) -> Self {
        if let (Some(pod), Some(namespace)) = (&mut self.config.node.pod, namespace) {
            pod.namespace = namespace.into();
        }
        self
    }

    /// The fields that the approver reads only at its start, and that differ from the configuration with which it started.
    pub(super) fn needing_restart(&self, started: &Config) -> Vec<&'static str> {
        let (one, other) = (&self.config, started);
        let driver = |config: &Config| config.per_pod.as_ref().map(|per_pod| per_pod.driver_name.clone());
        let fields = [
            ("sockets.perPod.driverName", driver(one) != driver(other)),
            ("drain", one.drain != other.drain),
            ("admin.address", one.admin != other.admin),
            ("metrics.address", one.metrics != other.metrics),
            ("probes.address", one.probes != other.probes),
            ("workerThreads", one.worker_threads != other.worker_threads),
        ];
        fields.into_iter().filter_map(|(field, differs)| differs.then_some(field)).collect()
    }
}

/// The environment, with values for the variables that only an agent needs: an approver runs for no single node and owns no requests.
fn anywhere<'a>(env: Env<'a>) -> impl Fn(&str) -> Option<String> + Sync + 'a {
    move |name| match name {
        "NODE_NAME" => Some("none".to_owned()),
        "POD_NAME" | "POD_UID" => env(name).or_else(|| Some("sds-agent-approver".to_owned())),
        _ => env(name),
    }
}

/// The rules of a configuration.
pub fn rules(config: &Config) -> Result<Rules, Unfit> {
    if config.attestation == Attestation::Unix {
        return Err(Unfit::NoPods);
    }
    let guarded = |(name, issuer): (&IssuerName, &IssuerConfig)| match issuer {
        IssuerConfig::CertManager(asked) => {
            Ok(Guarded { name: name.clone(), issuer: asked.issuer_ref.clone(), namespace: asked.namespace.clone() })
        }
        IssuerConfig::Embedded => Err(Unfit::NoRequests(name.clone())),
    };
    Ok(Rules {
        agents: config.approver.agents.iter().cloned().collect(),
        issuers: config.issuers.iter().map(guarded).collect::<Result<_, _>>()?,
        resolver: config.resolver(),
        annotations: config.approver.annotations.clone(),
        overlap: config.approver.overlap,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use cert_manager::USAGES;
    use serde_json::Value;

    use super::*;

    /// The documents of a manifest.
    fn objects(text: &str) -> Vec<Value> {
        text.split("\n---\n").map(|document| serde_saphyr::from_str(document).unwrap()).collect()
    }

    /// Four manifests in `daemonset/` repeat the same values, because neither RBAC nor a policy reads the agents' configuration.
    #[test]
    fn what_is_installed_says_the_same_in_all_places() {
        let map = objects(include_str!("../../../daemonset/base/config.yaml")).remove(0);
        let told = |key: &str| map["data"][key].as_str().unwrap();
        let env = |name: &str| match name {
            "POD_NAMESPACE" => map["metadata"]["namespace"].as_str().map(str::to_owned),
            "NODE_NAME" | "POD_NAME" | "POD_UID" => Some("x".to_owned()),
            _ => None,
        };
        let loaded = Config::parse(told("config.yaml"), &env).unwrap();
        assert_eq!(loaded.warnings, []);
        let rules = rules(&loaded.config).unwrap();
        assert_eq!(told("agentUsernames").lines().map(str::to_owned).collect::<BTreeSet<_>>(), rules.agents);
        let [guarded] = &rules.issuers[..] else { panic!("{:?}", rules.issuers) };
        assert_eq!(told("issuers").lines().collect::<Vec<_>>(), [format!("{}/{}", guarded.issuer.kind, guarded.issuer.name)]);
        assert!(humantime::parse_duration(told("maxDuration")).unwrap() >= rules.resolver.default_profile.lifetime);

        let roles = objects(include_str!("../../../daemonset/approver/rbac.yaml"));
        let signers =
            roles.iter().flat_map(|role| role["rules"].as_array().into_iter().flatten()).find(|rule| rule["resources"][0] == "signers");
        let signer = format!("{}s.{}/{}", guarded.issuer.kind.to_lowercase(), guarded.issuer.group, guarded.issuer.name);
        assert_eq!(signers.unwrap()["resourceNames"], serde_json::json!([signer]));

        let usages = format!("[{}]", USAGES.map(|usage| format!("'{usage}'")).join(", "));
        assert!(include_str!("../../../daemonset/approver/policy.yaml").contains(&usages), "{usages}");
    }
}
