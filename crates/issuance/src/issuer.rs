//! Issuers: an [`Issuer`] turns an [`Order`] into a signed certificate chain.
//!
//! The module owns the trait, the key and CSR of each order, and the checks before a certificate is published ([`verify`]). An issuer has
//! no access to the store or to streams. Dropping the future of [`Issuer::issue`] abandons the order, and the issuer deletes its request.

use std::{fmt, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use parking_lot::{Mutex, MutexGuard};
use sds_server::material::{CertificateChain, PrivateKey};
use tokio::sync::watch;
use workload_identity::{Identity, PodRef};

pub mod certificate_request;
pub mod csr;
pub mod embedded;
pub mod verify;

/// An order for one certificate.
#[derive(Debug, Clone)]
pub struct Order {
    /// The identity that needs the certificate. Its profile has the type of the key and the lifetime.
    pub identity: Arc<Identity>,
    /// The pod in whose name the certificate is requested. An approver decides by it. After the pod has ended, orders name another pod.
    pub evidence: Option<PodRef>,
    /// Handle by which the issuer reports progress.
    pub progress: Progress,
}

/// A request that the upstream has not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// Name of the request at the upstream.
    pub request: Arc<str>,
    /// Cause of the wait, as text for operators. `None` while it is unknown.
    pub waits_for: Option<Arc<str>>,
    /// Whether an operator should investigate the wait. The issuer for cert-manager sets it after 60 s.
    pub is_late: bool,
}

/// Reports the progress of one order from its issuer. Before the first report, the issuer generates the key and creates the request. After
/// the first report, the upstream has no time limit, and the planner can park the order.
#[derive(Clone)]
pub struct Progress {
    last: Arc<Mutex<Option<Pending>>>,
    report: Arc<dyn Fn(Pending) + Send + Sync>,
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress").field("last", &self.last).finish_non_exhaustive()
    }
}

impl Progress {
    /// Creates a handle that calls `report` for each change, in order. `report` must not block.
    pub fn reporting(report: impl Fn(Pending) + Send + Sync + 'static) -> Self {
        Self { last: Arc::default(), report: Arc::new(report) }
    }

    /// Creates a handle, and a receiver of the last report. The value is `None` until the first report.
    pub fn new() -> (Self, watch::Receiver<Option<Pending>>) {
        let (sender, receiver) = watch::channel(None);
        (Self::reporting(move |pending| drop(sender.send_replace(Some(pending)))), receiver)
    }

    /// Reports that the upstream has the request `name`. Call it once: an order whose request is lost fails, and is ordered again.
    pub fn submitted(&self, name: &str) {
        self.change(&mut self.last(), Pending { request: name.into(), waits_for: None, is_late: false });
    }

    /// Reports the cause of a wait, and whether the request is late. Does nothing without a change, or before
    /// [`submitted`](Self::submitted).
    pub fn waits(&self, why: &str, late: bool) {
        let mut last = self.last();
        if let Some(pending) = &*last
            && (pending.waits_for.as_deref() != Some(why) || pending.is_late != late)
        {
            let now = Pending { waits_for: Some(why.into()), is_late: late, ..pending.clone() };
            self.change(&mut last, now);
        }
    }

    fn last(&self) -> MutexGuard<'_, Option<Pending>> {
        self.last.lock()
    }

    /// Calls `report` under the lock, so that reports keep their order.
    fn change(&self, last: &mut Option<Pending>, pending: Pending) {
        *last = Some(pending.clone());
        (self.report)(pending);
    }
}

/// A signed chain and its key, as the upstream returned them. Not verified.
pub struct Issued {
    /// The key of the CSR.
    pub key: PrivateKey,
    /// The chain, parsed and not verified.
    pub chain: CertificateChain,
    /// Duration of each phase, for the metrics.
    pub phases: Vec<(Phase, Duration)>,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").field("key", &self.key).finish_non_exhaustive()
    }
}

/// A phase of an issuance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Key, CSR, and creation of the request.
    Create,
    /// From creation to approval of the request.
    Approve,
    /// From approval to the signed chain.
    Sign,
}

/// When to retry after an error. A wait is shorter if a certificate in use would end during it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// At once, in the name of another pod: the error concerns the evidence pod.
    Now,
    /// After the backoff of the identity, see [`backoff`](crate::rotation::schedule::backoff).
    Backoff,
    /// After this duration, of which the planner uses at most 300 s.
    After(Duration),
    /// After 240 s to 300 s, or after a change of the configuration: only that can help.
    Configuration,
}

/// Why an order failed. The text is for operators. It contains no key, token or CSR.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// An approver denied the request.
    #[error("request {request} was denied: {reason}: {message}")]
    Denied {
        /// Name of the request.
        request: String,
        /// Reason of the condition.
        reason: String,
        /// Message of the condition.
        message: String,
        /// When to retry.
        retry: Retry,
    },
    /// The issuer failed to sign the request, or the request was lost.
    #[error("request {request} failed: {reason}: {message}")]
    Failed {
        /// Name of the request.
        request: String,
        /// Reason of the condition.
        reason: String,
        /// Message of the condition.
        message: String,
        /// When to retry.
        retry: Retry,
    },
    /// A call to the upstream's API failed.
    #[error("{action}: {message}")]
    Api {
        /// The operation, such as `create CertificateRequest in namespace sds-agent`.
        action: String,
        /// The error and its fix.
        message: String,
        /// When to retry.
        retry: Retry,
    },
    /// The upstream did not answer in time.
    #[error("{action}: no answer within {} s", after.as_secs())]
    Timeout {
        /// The operation.
        action: String,
        /// Duration of the wait.
        after: Duration,
    },
    /// The upstream returned a certificate that must not be served.
    #[error("the issuer returned a certificate that must not be served: {0}")]
    InvalidCertificate(#[from] verify::Error),
    /// Generating the key or its CSR failed.
    #[error("cannot make a key and its CSR: {0}")]
    Csr(#[from] csr::Error),
    /// The configuration names an issuer that cannot serve.
    #[error("{0}")]
    Configuration(String),
}

/// Result of an issuance, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The certificate is verified.
    Ok,
    /// An approver denied the request.
    Denied,
    /// The issuer failed, or the key could not be generated.
    Failed,
    /// The upstream did not answer in time.
    Timeout,
    /// An API call failed, or the configured issuer cannot serve.
    ApiError,
    /// The certificate must not be served.
    InvalidCertificate,
}

impl Error {
    /// When to retry after this error.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Denied { retry, .. } | Self::Failed { retry, .. } | Self::Api { retry, .. } => *retry,
            Self::Timeout { .. } | Self::InvalidCertificate(_) | Self::Csr(_) => Retry::Backoff,
            Self::Configuration(_) => Retry::Configuration,
        }
    }

    /// The value of the metric label.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Denied { .. } => Outcome::Denied,
            Self::Failed { .. } | Self::Csr(_) => Outcome::Failed,
            Self::Api { .. } | Self::Configuration(_) => Outcome::ApiError,
            Self::Timeout { .. } => Outcome::Timeout,
            Self::InvalidCertificate(_) => Outcome::InvalidCertificate,
        }
    }
}

/// A certificate authority, as the agent uses it.
pub trait Issuer: fmt::Debug + Send + Sync + 'static {
    /// Generates a key and a CSR, and has the CSR signed. The caller verifies the chain, and retries by [`Error::retry`]. If an order is
    /// pending for too long, the caller may run another one of the identity beside it.
    ///
    /// # Errors
    ///
    /// Returns an [`Error`] if the key or CSR cannot be generated, if the upstream denies the request, fails or does not answer, or if the
    /// answer is not a certificate chain in PEM.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future abandons the order: the key is lost, and the issuer deletes the request at the upstream.
    fn issue(&self, order: Order) -> BoxFuture<'static, Result<Issued, Error>>;
}
