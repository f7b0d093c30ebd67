//! Rules of the approver: the agents' user names, and the part of the configuration that the approver shares with the agents.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use agent_kube::pod::Pod;
use cert_manager::{IssuerRef, RequestNamespace};
use workload_identity::{Error, Identity, IssuerName, KeyType, Pattern, Profile, Resolver};

/// API group of an issuer reference that names no group.
const GROUP: &str = cert_manager::GROUP;

/// One issuer whose requests the approver decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guarded {
    /// Name by which profiles refer to the issuer.
    pub name: IssuerName,
    /// Reference to the issuer in requests.
    pub issuer: IssuerRef,
    /// Namespace of the agents' requests.
    pub namespace: RequestNamespace,
}

impl Guarded {
    /// Returns whether a request in `namespace` that names `issuer` is for this issuer. An `Issuer` is namespaced, so the namespace of
    /// the request selects the issuer too.
    fn takes(&self, issuer: &IssuerRef, namespace: &str) -> bool {
        let here = match &self.namespace {
            RequestNamespace::Fixed(own) if self.issuer.kind == "Issuer" && self.issuer.group == GROUP => own == namespace,
            _ => true,
        };
        here && self.issuer == *issuer
    }
}

/// Configuration of an approver. Owned by [`ActiveRules`](crate::ActiveRules), immutable.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// User names of the agents' service accounts. Requests of other users are denied.
    pub agents: BTreeSet<String>,
    /// Guarded issuers. The approver ignores requests of other issuers.
    pub issuers: Vec<Guarded>,
    /// Maps pods to identities and profiles, with the agents' configuration.
    pub resolver: Resolver,
    /// Allowed annotation keys besides the agent's own (`approver.annotations`).
    pub annotations: Vec<Pattern>,
    /// Time for which superseded rules still approve requests (`approver.overlap`, default 10 min). 0 ends them immediately.
    pub overlap: Duration,
}

/// One certificate that a pod is allowed to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expectation {
    /// Name of the profile.
    pub profile: Arc<str>,
    /// URI SAN.
    pub spiffe_id: String,
    /// DNS SANs.
    pub dns_names: Vec<String>,
    /// Key type.
    pub key: KeyType,
    /// Requested lifetime.
    pub lifetime: Duration,
    /// Issuer that signs.
    pub issuer: IssuerRef,
    /// Namespace of the request.
    pub namespace: String,
}

impl Rules {
    /// Returns whether the approver decides requests of `issuer` in `namespace`.
    pub fn guard(&self, issuer: &IssuerRef, namespace: &str) -> bool {
        self.issuers.iter().any(|guarded| guarded.takes(issuer, namespace))
    }

    /// Returns every certificate that `pod` is allowed to have, over the shared socket or a per-pod socket. The caller passes a pod with
    /// a service account.
    ///
    /// # Errors
    ///
    /// The first error of [`Resolver::resolve`], if the pod has no certificate on any of its sockets.
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
