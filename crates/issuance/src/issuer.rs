//! The upstream: something that turns an [`Order`] into a signed chain.
//!
//! Owns the trait, the key and CSR of each order, and the checks before publish ([`verify`]). An issuer knows neither the store nor
//! the streams. Dropping the future of [`Issuer::issue`] abandons the order: the issuer cleans up behind itself.

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

/// One certificate, please.
#[derive(Debug, Clone)]
pub struct Order {
    /// For whom, and (by its profile) how.
    pub identity: Arc<Identity>,
    /// The pod in whose name an approver may judge the request. It changes when the pod goes.
    pub evidence: Option<PodRef>,
    /// Where the issuer tells how far it is.
    pub progress: Progress,
}

/// A request that its upstream has not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// Its name there.
    pub request: Arc<str>,
    /// What it waits for, for people, where that is known.
    pub waits_for: Option<Arc<str>>,
    /// Whether it has waited for so long that somebody should look.
    pub is_late: bool,
}

/// The issuer's end of what an order reports before its answer. Until the first report the key and the request are being made; after it the
/// upstream may take its time, and the order can be parked.
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
    /// A handle that calls `report` for each change, in order. It must not block.
    pub fn reporting(report: impl Fn(Pending) + Send + Sync + 'static) -> Self {
        Self { last: Arc::default(), report: Arc::new(report) }
    }

    /// A handle, and what it reported last.
    pub fn new() -> (Self, watch::Receiver<Option<Pending>>) {
        let (sender, receiver) = watch::channel(None);
        (Self::reporting(move |pending| drop(sender.send_replace(Some(pending)))), receiver)
    }

    /// The upstream has the request, under `name`. Said once: an order whose request is lost fails and is ordered again.
    pub fn submitted(&self, name: &str) {
        self.change(&mut self.last(), Pending { request: name.into(), waits_for: None, is_late: false });
    }

    /// What the request waits for, and whether it has done so for long. Nothing is reported where nothing has changed.
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

    /// Reports under the lock, so that reports keep their order.
    fn change(&self, last: &mut Option<Pending>, pending: Pending) {
        *last = Some(pending.clone());
        (self.report)(pending);
    }
}

/// A signed chain and its key: claims of the upstream, not yet verified.
pub struct Issued {
    /// The key whose CSR was signed.
    pub key: PrivateKey,
    /// The chain, read and not judged.
    pub chain: CertificateChain,
    /// How long the parts took, for the metrics: (phase, seconds).
    pub phases: Vec<(Phase, Duration)>,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").field("key", &self.key).finish_non_exhaustive()
    }
}

/// A part of an issue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Key, CSR and the request's creation.
    Create,
    /// From creation to approval.
    Approve,
    /// From approval to the signed chain.
    Sign,
}

/// When to try again after an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// At once: the error was about evidence that has been replaced.
    Now,
    /// By the identity's own backoff.
    Backoff,
    /// Not before this time has passed.
    After(Duration),
    /// Only a change of configuration can help; until then at the longest backoff.
    Configuration,
}

/// Why an order failed. The text is for the operator; it never holds key, token or CSR.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The approver said no.
    #[error("request {request} was denied: {reason}: {message}")]
    Denied {
        /// The request's name.
        request: String,
        /// The condition's reason.
        reason: String,
        /// The condition's message.
        message: String,
        /// When to ask again.
        retry: Retry,
    },
    /// The issuer tried and failed.
    #[error("request {request} failed: {reason}: {message}")]
    Failed {
        /// The request's name.
        request: String,
        /// The condition's reason.
        reason: String,
        /// The condition's message.
        message: String,
        /// When to ask again.
        retry: Retry,
    },
    /// The upstream's interface refused or did not answer.
    #[error("{action}: {message}")]
    Api {
        /// What was tried, such as `create CertificateRequest in namespace sds-agent`.
        action: String,
        /// What came back and what to do about it.
        message: String,
        /// When to ask again.
        retry: Retry,
    },
    /// No answer in time.
    #[error("{action}: no answer within {} s", after.as_secs())]
    Timeout {
        /// What was waited for.
        action: String,
        /// How long.
        after: Duration,
    },
    /// The upstream's answer must not be served.
    #[error("the issuer returned a certificate that must not be served: {0}")]
    InvalidCertificate(#[from] verify::Error),
    /// The key or its CSR could not be made.
    #[error("cannot make a key and its CSR: {0}")]
    Csr(#[from] csr::Error),
    /// The configuration asks for an issuer that cannot serve.
    #[error("{0}")]
    Configuration(String),
}

/// An issue's result as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Verified and published.
    Ok,
    /// Denied by the approver.
    Denied,
    /// Failed by the issuer.
    Failed,
    /// No answer in time.
    Timeout,
    /// The API refused or broke.
    ApiError,
    /// An answer that must not be served.
    InvalidCertificate,
}

impl Error {
    /// When to try again.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Denied { retry, .. } | Self::Failed { retry, .. } | Self::Api { retry, .. } => *retry,
            Self::Timeout { .. } | Self::InvalidCertificate(_) | Self::Csr(_) => Retry::Backoff,
            Self::Configuration(_) => Retry::Configuration,
        }
    }

    /// The metric label.
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

/// A certificate authority, seen from the node.
pub trait Issuer: fmt::Debug + Send + Sync + 'static {
    /// Makes a key and a CSR and has it signed. Single-flight is the caller's duty; so are retries.
    fn issue(&self, order: Order) -> BoxFuture<'static, Result<Issued, Error>>;
}
