//! Identities of workloads: SPIFFE IDs, trust domains, profiles, and the rules that map an attested [`Workload`] to an [`Identity`].
//!
//! This crate owns the naming rules of the SPIFFE ID specification (section 2: a trust domain of at most 255 bytes, an ID of at most 2,048
//! bytes), the operator's templates, and the choice of a profile. A [`TrustDomain`] or [`SpiffeId`] is always valid. The crate reads no
//! clock and does no I/O, so the approver derives the same identities as the agent.

use std::{
    fmt,
    hash::{Hash, Hasher},
    sync::Arc,
};

mod labels;
mod profile;
mod resolver;
mod rule;
#[cfg(any(test, feature = "testing"))]
pub mod samples;
mod spiffe;
pub mod version;

pub use labels::Labels;
pub use profile::{IssuerName, KeyType, Profile};
pub use resolver::{Decision, Reason, Resolver, placeholder, render};
pub use rule::{Match, Mismatch, Pattern, Rule};
pub use spiffe::{SpiffeId, TrustDomain};

/// A string is not a SPIFFE name, or a workload has no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The trust domain violates section 2.1 of the SPIFFE ID specification.
    #[error("trust domain {0:?} is not valid: use 1 to 255 lower-case letters, digits, '.', '-' or '_'")]
    TrustDomain(String),
    /// The SPIFFE ID violates section 2 of the SPIFFE ID specification.
    #[error("SPIFFE ID {id:?} is not valid: {why}")]
    SpiffeId {
        /// The rejected text.
        id: String,
        /// Cause of the rejection.
        why: &'static str,
    },
    /// A template names a field that this kind of workload does not have.
    #[error("template {template:?} uses {{{field}}}, which a workload of this kind does not have")]
    Template {
        /// The template as configured.
        template: String,
        /// The unknown placeholder.
        field: String,
    },
    /// The pod picks a profile that it is not allowed to have.
    #[error("pod {pod} picks profile {profile:?} by its volume: {why}")]
    Pick {
        /// `namespace/name`.
        pod: String,
        /// Name of the picked profile.
        profile: String,
        /// Cause of the rejection.
        why: String,
    },
    /// The workload runs without a service account (a static pod).
    #[error("pod {pod} has no service account and therefore no identity")]
    NoServiceAccount {
        /// `namespace/name`.
        pod: String,
    },
}

/// Reference to one pod, the evidence of a request.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PodRef {
    /// Namespace of the pod.
    pub namespace: Arc<str>,
    /// Name of the pod.
    pub name: Arc<str>,
    /// UID of the pod. A pod that is recreated with the same name has another UID.
    pub uid: Arc<str>,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The agent's node and pod, from environment variables of the downward API.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeEnvironment {
    /// `NODE_NAME`: the node whose pods the agent serves.
    pub node_name: Option<Arc<str>>,
    /// The agent's own pod, the owner of its CertificateRequests.
    pub pod: Option<PodRef>,
}

/// A caller as attestation has identified it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Workload {
    /// A pod on this node.
    Pod {
        /// The pod itself.
        pod: PodRef,
        /// The service account of the pod. Static pods have none.
        service_account: Option<Arc<str>>,
        /// Labels of the pod object.
        labels: Labels,
        /// The profile that the pod picks in the CSI volume of the socket on which it calls. `None` on the shared socket.
        picked: Option<Arc<str>>,
    },
    /// A process of a local user, for development and machines without Kubernetes.
    Unix {
        /// Effective user ID at connect time.
        uid: u32,
    },
}

impl Workload {
    /// Returns the service account of a pod that has one.
    pub fn account(&self) -> Option<Account> {
        match self {
            Self::Pod { pod, service_account: Some(name), .. } => Some(Account { namespace: pod.namespace.clone(), name: name.clone() }),
            Self::Pod { .. } | Self::Unix { .. } => None,
        }
    }

    /// Returns the pod, or `None` for a local process.
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

/// Subject and profile of one certificate: the key of the certificate store. Callers with equal identities share a certificate.
#[derive(Debug, Clone)]
pub struct Identity {
    /// URI SAN.
    pub spiffe_id: SpiffeId,
    /// DNS SANs.
    pub dns_names: Arc<[String]>,
    /// Profile by which the certificate is issued.
    pub profile: Arc<Profile>,
    /// UID of the pod, if the profile is per pod.
    pub pod_uid: Option<Arc<str>>,
    /// Service account for metrics. If several accounts have the same names, it is the first that requested. Not compared by `==`.
    pub account: Option<Account>,
}

/// A service account.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Account {
    /// Namespace of the service account.
    pub namespace: Arc<str>,
    /// Name of the service account.
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
