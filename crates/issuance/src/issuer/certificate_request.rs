//! The issuer for cert-manager. Each order creates one CertificateRequest, waits for its answer through the node's watch, and deletes it.
//!
//! An order owns its state from the key to the signed chain. [`Requests`] owns the state that all orders share. The caller runs
//! [`Requests::run`], verifies the chain, and retries as the error says. Dropping the future of an order deletes its request. A pending
//! request has no time limit while its order lives. An identity may have several orders at a time, each with a request of its own.

use std::{fmt, sync::Arc, time::Duration};

use agent_kube::{Call, Cause, Failure};
use agent_runtime::text;
use cert_manager::{
    CertificateRequest, CertificateRequestSpec, Csr, IssuerRef, Reference, RequestNamespace, Status, USAGES, decode_pem, denied,
    verdict::{Verdict, Why},
};
use futures::future::BoxFuture;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use sds_server::{
    material::{self, CertificateChain},
    trust,
};
use tokio::time::{Instant, sleep_until};
use workload_identity::PodRef;

use crate::issuer::{Error, Issued, Issuer, Order, Phase, Retry, csr, verify};

mod create;
mod deleter;
mod preflight;
mod requests;
mod status_roots;
mod sweep;
mod tracker;
pub mod vault;

pub use preflight::check;
pub use requests::{LivePods, Metrics, Requests};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::issuer::cert_manager";

/// Wait after a denial, unless its reason has another rule.
const DENIAL_BACKOFF: Duration = Duration::from_secs(300);
/// Time after which a pending request is reported as late.
const PENDING_LOG_AFTER: Duration = Duration::from_secs(60);
/// Plural with API group, for messages.
const RESOURCE: &str = "certificaterequests.cert-manager.io";

/// Settings of one issuer: `issuer.certManager` in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `issuerRef`: the issuer that signs.
    pub issuer_ref: IssuerRef,
    /// `namespace`: where requests are created.
    pub namespace: RequestNamespace,
    /// `trustStatusCA`: whether `status.ca` of issued requests is a source of the trust bundle. Default: `false`.
    pub trust_status_ca: bool,
}

/// One configured issuer. Issuers of an agent can share its [`Requests`].
pub struct CertManager {
    inner: Arc<Inner>,
}

struct Inner {
    requests: Requests,
    config: Settings,
    status_roots: Option<status_roots::StatusRoots>,
    preflight: preflight::Memo,
}

impl CertManager {
    /// Creates the issuer of `config`. `status_ca` receives `status.ca` of each issued request, if the operator enables it.
    pub fn new(requests: Requests, config: Settings, status_ca: Option<trust::Source>) -> Self {
        let (status_roots, preflight) = (status_ca.map(status_roots::StatusRoots::new), preflight::Memo::default());
        Self { inner: Arc::new(Inner { requests, config, status_roots, preflight }) }
    }

    /// Checks whether the configured issuer can serve. Each order checks it too; a call at start logs a mistake early.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Configuration`] if `issuerRef` is wrong or names an issuer that cannot sign CSRs of the agent. Returns
    /// [`Error::Api`] or [`Error::Timeout`] if the issuer does not exist or cannot be read.
    pub fn preflight(&self) -> BoxFuture<'static, Result<(), Error>> {
        let inner = self.inner.clone();
        Box::pin(async move { inner.checked().await })
    }
}

impl fmt::Debug for CertManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertManager").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

impl Issuer for CertManager {
    fn issue(&self, order: Order) -> BoxFuture<'static, Result<Issued, Error>> {
        let inner = self.inner.clone();
        Box::pin(async move {
            let result = inner.order(&order).await;
            if let Err(Error::Failed { .. } | Error::Denied { .. }) = &result {
                inner.preflight.doubt();
            }
            result
        })
    }
}

/// Why one request did not lead to a certificate.
enum Attempt {
    /// Another client deleted or relabelled the request.
    Lost(Arc<str>),
    /// Any other error.
    Error(Error),
}

impl From<Error> for Attempt {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl Inner {
    async fn order(&self, order: &Order) -> Result<Issued, Error> {
        self.requests.ready().await?;
        self.checked().await?;
        // The caller orders again after a backoff. If a client deletes all requests, they are not all created again at once.
        self.request(order).await.map_err(|miss| match miss {
            Attempt::Error(error) => error,
            Attempt::Lost(request) => Error::Failed {
                request: request.to_string(),
                reason: "Lost".into(),
                message: "another client deleted or relabelled the request".into(),
                retry: Retry::Backoff,
            },
        })
    }

    async fn checked(&self) -> Result<(), Error> {
        let namespace = match &self.config.namespace {
            RequestNamespace::Fixed(namespace) => Some(namespace.clone()),
            RequestNamespace::Workload => None,
        };
        self.preflight.check(self.requests.client(), &self.config.issuer_ref, namespace).await
    }

    /// Runs one request, from the key to the result.
    async fn request(&self, order: &Order) -> Result<Issued, Attempt> {
        let start = Instant::now();
        let namespace = self.namespace(order)?;
        let made = csr::generate(&order.identity).await.map_err(Error::Csr)?;
        let object = self.object(order, &namespace, &made.csr_der);
        let name: Arc<str> = object.metadata.name.as_deref().unwrap_or_default().into();
        let mut handle = self.requests.tracker().open(&namespace, &name);
        create::create(&self.requests, &mut handle, &object).await?;
        let created = Instant::now();
        order.progress.submitted(&name);
        let pod = order.evidence.as_ref().map(tracing::field::display);
        tracing::info!(target: LOG_TARGET, identity = %order.identity, pod, request = %name, "certificate requested");

        let (mut approved, mut told) = (None, None);
        let (mut waits_for, mut late) = (pending_reason(false, ""), false);
        order.progress.waits(&waits_for, late);
        loop {
            let next = tokio::select! {
                next = handle.next() => next,
                () = sleep_until(created + PENDING_LOG_AFTER), if !late => {
                    late = true;
                    order.progress.waits(&waits_for, late);
                    tracing::warn!(
                        target: LOG_TARGET, identity = %order.identity, pod, request = %name, %namespace, cause = waits_for, seconds = PENDING_LOG_AFTER.as_secs(),
                        "the request still waits"
                    );
                    continue;
                }
            };
            let Some(observation) = next else { return Err(Attempt::Lost(name)) };
            let verdict = Verdict::of(observation.status.as_ref());
            if let Verdict::Pending { approved, message } = &verdict {
                let finding = vault::explain(message, order.identity.spiffe_id.trust_domain());
                waits_for = pending_reason(*approved, finding.as_ref().map_or(message, |finding| &finding.said));
                order.progress.waits(&waits_for, late);
            }
            match verdict {
                Verdict::Pending { approved: false, .. } => {}
                Verdict::Pending { approved: true, message } => {
                    approved.get_or_insert_with(Instant::now);
                    // The signer retries by itself, and reports the same problem at each attempt, often with other numbers.
                    if let Some(finding) = vault::explain(&message, order.identity.spiffe_id.trust_domain())
                        && told.as_ref() != Some(&finding.remedy)
                    {
                        tracing::warn!(target: LOG_TARGET, identity = %order.identity, request = %name, cause = %finding, "the request waits for its issuer");
                        told = Some(finding.remedy);
                    }
                }
                Verdict::Issued => {
                    let chain = self.take(observation.status.as_ref())?;
                    let approved = approved.unwrap_or_else(Instant::now);
                    tracing::info!(target: LOG_TARGET, identity = %order.identity, pod, request = %name, uid = %observation.uid, serial = chain.serial.as_str(), "certificate signed");
                    let phases =
                        vec![(Phase::Create, created - start), (Phase::Approve, approved - created), (Phase::Sign, approved.elapsed())];
                    return Ok(Issued { key: made.key, chain, phases });
                }
                refusal => {
                    handle.keep(&order.identity);
                    return Err(refused(order, &namespace, &name, refusal).into());
                }
            }
        }
    }

    fn namespace(&self, order: &Order) -> Result<Arc<str>, Error> {
        match (&self.config.namespace, &order.evidence) {
            (RequestNamespace::Fixed(namespace), _) => Ok(namespace.as_str().into()),
            (RequestNamespace::Workload, Some(pod)) => Ok(pod.namespace.clone()),
            (RequestNamespace::Workload, None) => Err(Error::Configuration(format!(
                "issuer.certManager.namespace is \"workload\", but no pod is known for {}: configure a namespace",
                order.identity
            ))),
        }
    }

    fn object(&self, order: &Order, namespace: &str, csr_der: &[u8]) -> CertificateRequest {
        let agent = self.requests.agent();
        let spec = CertificateRequestSpec {
            issuer_ref: Reference::from(&self.config.issuer_ref),
            request: Csr::from_der(csr_der),
            duration: Some(format!("{}s", order.identity.profile.lifetime.as_secs())),
            usages: USAGES.map(String::from).to_vec(),
            ..CertificateRequestSpec::default()
        };
        let mut object = CertificateRequest::new(&agent.request_name(&order.identity), spec);
        object.metadata.namespace = Some(namespace.to_owned());
        object.metadata.labels = Some(agent.labels());
        object.metadata.annotations = Some(agent.annotations(&order.identity, order.evidence.as_ref()));
        // The key ends with the agent's pod, so the request may end with it too. An owner must be in the namespace of the request. In
        // another namespace, the evidence pod is the owner. No agent sweeps the requests of a removed node: the garbage collector deletes
        // its pods, and the requests with them. The cost is that a request is lost with its evidence pod, even if another pod of the
        // identity could use it. The next order then creates another request in the name of that pod.
        let owners = [agent.pod.as_ref(), order.evidence.as_ref()];
        let within = owners.into_iter().flatten().find(|pod| &*pod.namespace == namespace);
        object.metadata.owner_references = within.map(|pod| vec![owner(pod)]);
        object
    }

    /// Returns the chain of an issued request. If `trustStatusCA` is set, `status.ca` is a source of the trust bundle.
    fn take(&self, status: Option<&Status>) -> Result<CertificateChain, Error> {
        let field = |field: fn(&Status) -> Option<&String>| status.and_then(field).map(String::as_str).unwrap_or_default();
        let pem = decode_pem(field(|s| s.certificate.as_ref())).ok_or(verify::Error::Chain(material::Error::Base64))?;
        let now = self.requests.now();
        let chain = CertificateChain::from_pem(&pem).map_err(verify::Error::from)?.in_order(now);
        if let Some(roots) = &self.status_roots {
            roots.answered(decode_pem(field(|s| s.ca.as_ref())).as_deref(), &chain, now);
        }
        Ok(chain)
    }
}

/// Returns the cause of a wait, as text.
fn pending_reason(approved: bool, message: &str) -> String {
    let said = text::excerpt(message, text::MAX_MESSAGE_CHARS);
    match (approved, said.as_str()) {
        (false, _) => "an approver: it is neither approved nor denied".to_owned(),
        (true, "") => "the issuer: it is approved and not signed".to_owned(),
        (true, said) => format!("the issuer: {said}"),
    }
}

fn owner(pod: &PodRef) -> OwnerReference {
    OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Pod".to_owned(),
        name: pod.name.to_string(),
        uid: pod.uid.to_string(),
        // Blocking the deletion of the owner requires permissions on pods/finalizers.
        block_owner_deletion: None,
        controller: None,
    }
}

/// Returns the error for a request that will never be issued. The request is kept for 10 minutes, so that the operator can read it.
fn refused(order: &Order, namespace: &str, request: &str, verdict: Verdict) -> Error {
    let more = format!("(more by: kubectl describe certificaterequest -n {namespace} {request})");
    let request = request.to_owned();
    let excerpt = |message: &str| text::excerpt(message, text::MAX_MESSAGE_CHARS);
    match verdict {
        Verdict::Denied(Why { reason, message }) => {
            let retry = after_denial(&reason);
            Error::Denied { request, reason, message: format!("{} {more}", excerpt(&message)), retry }
        }
        Verdict::Invalid(Why { reason, message }) => {
            let message = format!("cert-manager does not accept the request: {} {more}", excerpt(&message));
            Error::Failed { request, reason, message, retry: Retry::Configuration }
        }
        Verdict::Failed(Why { reason, message }) => {
            // An unknown failure may come from the network. cert-manager does not retry a failed request, but another request may succeed.
            let finding = vault::explain(&message, order.identity.spiffe_id.trust_domain());
            let retry = finding.as_ref().map_or(Retry::Backoff, |finding| finding.retry);
            let message = finding.map_or_else(|| excerpt(&message), |finding| finding.to_string());
            Error::Failed { request, reason, message: format!("{message} {more}"), retry }
        }
        // These verdicts are no refusals. The caller does not pass them.
        Verdict::Pending { message, .. } => {
            Error::Failed { request, reason: "Pending".into(), message: excerpt(&message), retry: Retry::Backoff }
        }
        Verdict::Issued => {
            Error::Failed { request, reason: "Issued".into(), message: "issued without a certificate".into(), retry: Retry::Backoff }
        }
    }
}

/// When to retry after a denial. A difference of configurations ends with a rollout, so that a long wait has no use.
fn after_denial(reason: &str) -> Retry {
    match reason {
        denied::POD_GONE => Retry::Now,
        denied::PROFILE_MISMATCH | denied::WRONG_IDENTITY | denied::TOO_MANY_REQUESTS => Retry::Backoff,
        _ => Retry::After(DENIAL_BACKOFF),
    }
}

/// Converts a failed API call to an error of an issuance.
fn api_error(call: &Call<'_>, failure: Failure) -> Error {
    let retry = match failure.cause {
        Cause::TooManyRequests(Some(after)) => Retry::After(after),
        Cause::Invalid => Retry::Configuration,
        Cause::Timeout => return Error::Timeout { action: call.to_string(), after: agent_kube::ANSWER_TIMEOUT },
        _ => Retry::Backoff,
    };
    Error::Api { action: call.to_string(), message: failure.message, retry }
}

#[cfg(test)]
mod tests;
