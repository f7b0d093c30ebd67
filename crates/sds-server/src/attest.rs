//! Who is calling: the trait, its errors, and the attestors.
//!
//! One attestor per listener; two ways to know a caller are never mixed on one socket. An attestor may wait (for a pod that the index
//! does not know yet); it never guesses, and conflicting evidence is an error.

use std::fmt;

use futures::future::BoxFuture;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};
use tokio_util::sync::CancellationToken;
use unix_peer::peer::Peer;
use workload_identity::{PodRef, Workload};

pub mod origin;
pub mod unix;

/// A proven caller.
#[derive(Debug, Clone)]
pub struct Attested {
    /// Who it is.
    pub workload: Workload,
    /// Cancelled when the workload has ended: its streams end, and no key leaves any more.
    pub terminated: CancellationToken,
}

/// Why a caller is not served, as a metric label and for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Reason {
    /// No trouble.
    none,
    /// The peer's PID namespace is not visible: the agent needs `hostPID`.
    pid_invisible,
    /// The kernel gives no pidfd.
    no_pidfd,
    /// The process ended while it was being attested.
    process_gone,
    /// The process belongs to no pod.
    not_in_pod,
    /// Its cgroups contradict each other.
    conflicting_cgroups,
    /// No pod with this UID runs on this node.
    unknown_pod,
    /// The pod has ended.
    pod_ended,
    /// The pod is not whom its volume was published for.
    other_pod,
    /// The pod has no service account.
    no_service_account,
    /// The policy does not let this user id fetch.
    uid_not_allowed,
    /// The policy does not let this container fetch.
    container_not_allowed,
    /// The policy asks for the container, and the kubelet has not told of this one.
    unknown_container,
    /// The pod's facts do not make a name.
    no_identity,
    /// `/proc` or the Kubernetes API could not be read.
    unreadable,
}

impl Reason {
    /// The label's value.
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

/// Why a caller is not served. The text is for the log; the caller gets a flat sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// The cause as a label.
    pub reason: Reason,
    /// The evidence and the remedy, for the operator.
    pub detail: String,
    /// Whether asking again later can help (UNAVAILABLE) or never (PERMISSION_DENIED).
    pub temporary: bool,
    /// Whose process it was, where that was proven before it was refused.
    pub pod: Option<PodRef>,
}

impl Error {
    /// A caller that can never be served.
    pub fn refused(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into(), temporary: false, pod: None }
    }

    /// A caller that cannot be judged now.
    pub fn temporary(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into(), temporary: true, pod: None }
    }

    /// The same, by a process of this pod.
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

/// Hears which pods are not served, and which are after all. It never waits.
pub trait CallerObserver: fmt::Debug + Send + Sync {
    /// A process of the pod got nothing.
    fn refused(&self, pod: &PodRef, error: &Error);

    /// A process of the pod has been given a name.
    fn served(&self, pod: &PodRef);
}

/// Tells who a peer is.
pub trait Attestor: fmt::Debug + Send + Sync + 'static {
    /// The metric label of this way.
    fn method(&self) -> Method;

    /// How connections are grouped before anybody is proven: by user id, unless an attestor knows better.
    fn origins(&self) -> origin::Origins {
        origin::Origins::ByUser
    }

    /// Proves who `peer` is; waits while the answer can still come.
    fn attest<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Result<Attested, Error>>;

    /// Whether what was proven of `peer` still holds. Asked whenever a key is about to leave: [`Attested::terminated`] tells a moment later.
    fn still_holds(&self, _peer: &Peer) -> bool {
        true
    }
}

/// A way of attestation, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Method {
    /// By user id.
    unix,
    /// By peer, cgroup and pod.
    kubernetes,
    /// By the mount that leads to the socket.
    mount,
}

/// Whether an attestation served, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Verdict {
    /// Proven.
    ok,
    /// Never.
    refused,
    /// Not now.
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

/// What attestation counts.
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
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("attestations", "Callers judged", metrics.attestations.clone());
        registry.register(
            "attestation_duration_seconds",
            "Time from a connection's first request to the verdict about its caller",
            metrics.duration.clone(),
        );
        metrics
    }

    /// Registers and counts one of everything, for the reference.
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

    /// Counts one verdict.
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
