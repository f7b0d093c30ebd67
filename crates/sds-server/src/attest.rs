//! Attestation: the [`Attestor`] trait, its errors, and the attestor for user IDs.
//!
//! Each listener has one attestor; a socket never mixes two methods of attestation. An attestor may wait, for example for a pod that is not
//! in its index yet. It never guesses: conflicting evidence is an error.

use std::fmt;

use futures::future::BoxFuture;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use unix_peer::peer::Peer;
use workload_identity::{PodRef, Workload};

pub mod origin;
pub mod unix;

/// An attested caller.
#[derive(Debug, Clone)]
pub struct Attested {
    /// The workload of the caller, with the facts at the time of its attestation.
    pub workload: Workload,
    /// The facts about the workload and their changes, such as changed labels of a pod. `None` if they never change. The profile that the
    /// pod picks is not among them: it belongs to the socket, and `workload` has it.
    pub facts: Option<watch::Receiver<Workload>>,
    /// Cancelled when the workload has ended. Its streams then end, and no further key is sent.
    pub terminated: CancellationToken,
}

impl Attested {
    /// Returns the workload with its current facts.
    pub fn current(&self) -> Workload {
        let Some(facts) = &self.facts else { return self.workload.clone() };
        let mut current = facts.borrow().clone();
        if let (Workload::Pod { picked, .. }, Workload::Pod { picked: by_socket, .. }) = (&mut current, &self.workload) {
            picked.clone_from(by_socket);
        }
        current
    }
}

/// The reason for refusing a caller, as a metric label and for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Reason {
    /// The caller is served.
    none,
    /// The peer's PID namespace is not visible: the agent needs `hostPID`.
    pid_invisible,
    /// The kernel returned no pidfd for the peer.
    no_pidfd,
    /// The process ended while it was being attested.
    process_gone,
    /// The process belongs to no pod.
    not_in_pod,
    /// The cgroups of the process contradict each other.
    conflicting_cgroups,
    /// No pod with this UID runs on this node.
    unknown_pod,
    /// The pod has ended.
    pod_ended,
    /// The pod of the caller is not the pod for which the volume was published.
    other_pod,
    /// The pod has no service account.
    no_service_account,
    /// The policy does not allow this user ID.
    uid_not_allowed,
    /// The policy does not allow this container.
    container_not_allowed,
    /// The policy names containers, and the kubelet has not reported this one.
    unknown_container,
    /// The resolver cannot make an identity from the facts about the pod.
    no_identity,
    /// `/proc` or the Kubernetes API could not be read.
    unreadable,
}

impl Reason {
    /// The value of the metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::none => "none",
            Self::pid_invisible => "pid_invisible",
            Self::no_pidfd => "no_pidfd",
            Self::process_gone => "process_gone",
            Self::not_in_pod => "not_in_pod",
            Self::conflicting_cgroups => "conflicting_cgroups",
            Self::unknown_pod => "unknown_pod",
            Self::pod_ended => "pod_ended",
            Self::other_pod => "other_pod",
            Self::no_service_account => "no_service_account",
            Self::uid_not_allowed => "uid_not_allowed",
            Self::container_not_allowed => "container_not_allowed",
            Self::unknown_container => "unknown_container",
            Self::no_identity => "no_identity",
            Self::unreadable => "unreadable",
        }
    }
}

/// A caller is not served. The text is for the log; the caller gets a generic message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// The cause, as a label.
    pub reason: Reason,
    /// The evidence and the fix, for the operator.
    pub detail: String,
    /// Whether a retry can succeed (UNAVAILABLE) or not (PERMISSION_DENIED).
    pub temporary: bool,
    /// The pod of the caller, if it was proven before the caller was refused.
    pub pod: Option<PodRef>,
}

impl Error {
    /// A permanent refusal: a retry cannot succeed.
    pub fn refused(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into(), temporary: false, pod: None }
    }

    /// A temporary refusal: the attestor cannot decide now.
    pub fn temporary(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into(), temporary: true, pod: None }
    }

    /// Adds the proven pod of the caller.
    pub fn by(self, pod: &PodRef) -> Self {
        Self { pod: Some(pod.clone()), ..self }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason.as_str(), self.detail)
    }
}

impl std::error::Error for Error {}

/// Observes which pods are refused and which are served. Implementations must not block.
pub trait CallerObserver: fmt::Debug + Send + Sync {
    /// A process of `pod` was refused.
    fn refused(&self, pod: &PodRef, error: &Error);

    /// A process of `pod` got an identity.
    fn served(&self, pod: &PodRef);
}

/// Proves which workload a peer is.
pub trait Attestor: fmt::Debug + Send + Sync + 'static {
    /// The method of attestation, as a metric label.
    fn method(&self) -> Method;

    /// How connections are assigned to an origin before attestation. Default: by user ID.
    fn origins(&self) -> origin::Origins {
        origin::Origins::ByUser
    }

    /// Proves which workload `peer` is. Waits while the evidence may still arrive.
    ///
    /// # Errors
    ///
    /// If the peer is not to be served, or cannot be attested now; see [`Error::temporary`].
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any await point. The next call on the connection attests again.
    fn attest<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Result<Attested, Error>>;

    /// Whether the attestation of the peer still holds. Called before a key is sent, because [`Attested::terminated`] may be cancelled a
    /// moment late. Default: `true`.
    fn still_holds(&self, _peer: &Peer) -> bool {
        true
    }
}

/// A method of attestation, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Method {
    /// By user id.
    unix,
    /// By process, cgroup and pod.
    kubernetes,
    /// By the volume mount that contains the socket.
    mount,
}

/// The result of an attestation, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Verdict {
    /// The caller is attested.
    ok,
    /// The caller is refused permanently.
    refused,
    /// The caller is refused for now.
    unavailable,
}

/// Labels of `attestations_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Labels {
    method: Method,
    result: Verdict,
    reason: Reason,
}

/// Labels of `attestation_duration_seconds`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct MethodLabel {
    method: Method,
}

/// Metrics of attestation.
#[derive(Debug, Clone)]
pub struct Metrics {
    attestations: Family<Labels, Counter>,
    duration: Family<MethodLabel, Histogram>,
}

impl Default for Metrics {
    fn default() -> Self {
        let buckets = || Histogram::new([0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0]);
        Self { attestations: Family::default(), duration: Family::new_with_constructor(buckets) }
    }
}

impl Metrics {
    /// Registers the metrics of this module.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("attestations", "Attestations of callers, by result", metrics.attestations.clone());
        registry.register(
            "attestation_duration_seconds",
            "Time from the first request of a connection to the result of its attestation",
            metrics.duration.clone(),
        );
        metrics
    }

    /// Registers the metrics and makes every series, for the metrics reference.
    #[cfg(any(test, feature = "testing"))]
    pub fn sample(registry: &mut Registry) {
        use agent_runtime::metrics::every;

        let metrics = Self::register(registry);
        for method in every!(Method: unix, kubernetes, mount) {
            metrics.observe(method, Ok(()), 0.001);
        }
        let result = Verdict::ok;
        for reason in every!(Reason: none, pid_invisible, no_pidfd, process_gone, not_in_pod, conflicting_cgroups, unknown_pod, pod_ended,
            other_pod, no_service_account, uid_not_allowed, container_not_allowed, unknown_container, no_identity, unreadable)
        {
            metrics.attestations.get_or_create(&Labels { method: Method::unix, result, reason }).inc();
        }
        for result in every!(Verdict: ok, refused, unavailable) {
            metrics.attestations.get_or_create(&Labels { method: Method::unix, result, reason: Reason::none }).inc();
        }
    }

    /// Counts one attestation and its duration in seconds.
    pub fn observe(&self, method: Method, verdict: Result<(), &Error>, seconds: f64) {
        let (result, reason) = match verdict {
            Ok(()) => (Verdict::ok, Reason::none),
            Err(error) if error.temporary => (Verdict::unavailable, error.reason),
            Err(error) => (Verdict::refused, error.reason),
        };
        self.attestations.get_or_create(&Labels { method, result, reason }).inc();
        self.duration.get_or_create(&MethodLabel { method }).observe(seconds);
    }
}
