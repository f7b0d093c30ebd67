//! Who a workload is: SPIFFE IDs, trust domains, profiles, and the rules that turn an attested [`Workload`] into an [`Identity`].
//!
//! Owns the naming rules of the SPIFFE ID specification (a trust domain of at most 255 bytes, an ID of at most 2,048 bytes), the
//! operator's templates, and the choice among profiles. A caller owes nothing: a value of these types has been checked. Nothing here
//! reads a clock or does I/O, so that the approver comes to the same as the agent.

use std::{
    collections::BTreeMap,
    fmt,
    hash::{Hash, Hasher},
    sync::Arc,
};

mod profile;
mod resolver;
mod rule;
#[cfg(any(test, feature = "testing"))]
pub mod samples;
mod spiffe;
pub mod version;

pub use profile::{IssuerName, KeyType, Profile};
pub use resolver::{Decision, Reason, Resolver, placeholder, render};
pub use rule::{Match, Mismatch, Pattern, Rule};
pub use spiffe::{SpiffeId, TrustDomain};

/// Why a string is no SPIFFE name, or a workload has no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The trust domain breaks the SPIFFE ID specification, section 2.1.
    #[error("trust domain {0:?} is not valid: use 1 to 255 lower-case letters, digits, '.', '-' or '_'")]
    TrustDomain(String),
    /// The SPIFFE ID breaks the specification, section 2.
    #[error("SPIFFE ID {id:?} is not valid: {why}")]
    SpiffeId {
        /// The rejected text.
        id: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A template names a field that this kind of workload does not have.
    #[error("template {template:?} asks for {{{field}}}, which a workload of this kind does not have")]
    Template {
        /// The template as configured.
        template: String,
        /// The unknown placeholder.
        field: String,
    },
    /// The pod picks a profile that it may not have.
    #[error("pod {pod} picks profile {profile:?} by its volume: {why}")]
    Pick {
        /// `namespace/name`.
        pod: String,
        /// What it picks.
        profile: String,
        /// Why it may not.
        why: String,
    },
    /// The workload runs without a service account (a static pod).
    #[error("pod {pod} has no service account and therefore no identity")]
    NoServiceAccount {
        /// `namespace/name`.
        pod: String,
    },
}

/// One pod, as the evidence for a request.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PodRef {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its UID: a pod recreated under the same name is another pod.
    pub uid: Arc<str>,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What the downward API tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeEnvironment {
    /// `NODE_NAME`: whose pods are served.
    pub node_name: Option<Arc<str>>,
    /// The agent's own pod, which owns its requests.
    pub pod: Option<PodRef>,
}

/// What attestation proved about a caller.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Workload {
    /// A pod on this node.
    Pod {
        /// The pod itself.
        pod: PodRef,
        /// The service account it runs as; static pods have none.
        service_account: Option<Arc<str>>,
        /// Its labels: what the pod's object says, whatever the process says.
        labels: Arc<BTreeMap<String, String>>,
        /// The profile that it picks by the volume through which it calls, the `picks` of its pod; none on the shared socket.
        picked: Option<Arc<str>>,
    },
    /// A process of a local user, for development and bare machines.
    Unix {
        /// The effective user id at connect time.
        uid: u32,
    },
}

impl Workload {
    /// The service account, where there is one.
    pub fn account(&self) -> Option<Account> {
        match self {
            Self::Pod { pod, service_account: Some(name), .. } => Some(Account { namespace: pod.namespace.clone(), name: name.clone() }),
            Self::Pod { .. } | Self::Unix { .. } => None,
        }
    }

    /// The pod, where there is one.
    pub fn pod(&self) -> Option<&PodRef> {
        match self {
            Self::Pod { pod, .. } => Some(pod),
            Self::Unix { .. } => None,
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod { pod, .. } => write!(f, "pod {pod}"),
            Self::Unix { uid } => write!(f, "uid {uid}"),
        }
    }
}

/// What one certificate is for: the key of the store. Callers with equal identities share a certificate.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The URI SAN.
    pub spiffe_id: SpiffeId,
    /// The DNS SANs.
    pub dns_names: Arc<[String]>,
    /// How to issue.
    pub profile: Arc<Profile>,
    /// The pod, where the profile gives every pod a certificate of its own.
    pub pod_uid: Option<Arc<str>>,
    /// Whose it is, for metrics: of accounts that come to the same names, the first that asked. No part of what makes identities equal.
    pub account: Option<Account>,
}

/// A service account.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Account {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        self.spiffe_id == other.spiffe_id
            && self.pod_uid == other.pod_uid
            && self.dns_names == other.dns_names
            && (Arc::ptr_eq(&self.profile, &other.profile) || self.profile.fingerprint() == other.profile.fingerprint())
    }
}

impl Eq for Identity {}

impl Hash for Identity {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.spiffe_id.hash(state);
        self.pod_uid.hash(state);
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.spiffe_id.fmt(f)
    }
}
