//! What the approver decides by: the part of the configuration that it shares with the agents, and who those are.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use agent_kube::pod::Pod;
use cert_manager::{IssuerRef, RequestNamespace};
use workload_identity::{Error, Identity, IssuerName, KeyType, Pattern, Profile, Resolver};

/// The group of an issuer that names none.
const GROUP: &str = cert_manager::GROUP;

/// One issuer whose requests are judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guarded {
    /// The name that profiles use.
    pub name: IssuerName,
    /// As requests name it.
    pub issuer: IssuerRef,
    /// Where the agents' requests are.
    pub namespace: RequestNamespace,
}

impl Guarded {
    /// Whether a request in `namespace` that names `issuer` is this issuer's. An Issuer is another one in each namespace.
    fn takes(&self, issuer: &IssuerRef, namespace: &str) -> bool {
        let here = match &self.namespace {
            RequestNamespace::Fixed(own) if self.issuer.kind == "Issuer" && self.issuer.group == GROUP => own == namespace,
            _ => true,
        };
        here && self.issuer == *issuer
    }
}

/// The configuration of an approver.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// The user names of agents.
    pub agents: BTreeSet<String>,
    /// The issuers. Requests of others are not looked at.
    pub issuers: Vec<Guarded>,
    /// From pods to identities and profiles, as the agents do it.
    pub resolver: Resolver,
    /// Annotations of others that a request may carry.
    pub annotations: Vec<Pattern>,
    /// How long the rules that these replace count beside them.
    pub overlap: Duration,
}

/// What a pod may ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expectation {
    /// The profile by which.
    pub profile: Arc<str>,
    /// The URI name.
    pub spiffe_id: String,
    /// The DNS names.
    pub dns_names: Vec<String>,
    /// The kind of key.
    pub key: KeyType,
    /// The lifetime.
    pub lifetime: Duration,
    /// From whom.
    pub issuer: IssuerRef,
    /// By a request in which namespace.
    pub namespace: String,
}

impl Rules {
    /// Whether requests of `issuer` in `namespace` are the approver's to judge.
    pub fn guard(&self, issuer: &IssuerRef, namespace: &str) -> bool {
        self.issuers.iter().any(|guarded| guarded.takes(issuer, namespace))
    }

    /// All that `pod` may ask for, on whatever socket: the one place where the approver derives what the agents derive. An error where
    /// there is nothing; the pod has a service account.
    pub fn expected(&self, pod: &Pod) -> Result<Vec<Expectation>, Error> {
        let (mut expected, mut refused) = (Vec::new(), None);
        for workload in pod.workloads() {
            match self.resolver.resolve(&workload) {
                Ok(Identity { spiffe_id, dns_names, profile, .. }) => {
                    expected.extend(self.expectation(pod, &spiffe_id.to_string(), &dns_names, &profile));
                }
                Err(error) => drop(refused.get_or_insert(error)),
            }
        }
        match refused {
            Some(error) if expected.is_empty() => Err(error),
            _ => Ok(expected),
        }
    }

    fn expectation(&self, pod: &Pod, spiffe_id: &str, dns_names: &[String], profile: &Profile) -> Option<Expectation> {
        let guarded = self.issuers.iter().find(|guarded| guarded.name == profile.issuer)?;
        let namespace = match &guarded.namespace {
            RequestNamespace::Fixed(namespace) => namespace.clone(),
            RequestNamespace::Workload => pod.pod.namespace.to_string(),
        };
        Some(Expectation {
            profile: profile.name.clone(),
            spiffe_id: spiffe_id.to_owned(),
            dns_names: dns_names.to_vec(),
            key: profile.key,
            lifetime: profile.lifetime,
            issuer: guarded.issuer.clone(),
            namespace,
        })
    }
}
