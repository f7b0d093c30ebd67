//! Writes Kubernetes Events on pods that get no certificate, for `kubectl describe pod`.
//!
//! A pod gets one Warning when issuance for its identity begins to fail and one Normal when it succeeds again. Retries in between write no
//! event ([`ledger`] decides). A pod whose callers are refused gets a Warning and a Normal too ([`refusals`]).
//!
//! The observers never block. An event that exceeds the limits, or that the API server does not accept, is counted and dropped. An event
//! contains no key, and only text that the log has too.

use std::{
    collections::BTreeMap,
    fmt,
    mem::{Discriminant, discriminant},
    sync::Arc,
    time::Duration,
};

use agent_kube::{Call, Failure};
use agent_runtime::{
    clock,
    telemetry::hush::{self, LogLimiter},
    text,
};
use issuance::{issuer::Error, rotation::IssuanceObserver};
use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff,
};
use kube::{Api, Client, api::PostParams};
use parking_lot::Mutex;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use sds_server::{attest, material::Svid, store::Entry};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use workload_identity::{NodeEnvironment, PodRef};

use self::{
    ledger::{PodEvent, PodTransitions, Reason},
    refusals::Refusals,
};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::events";

pub mod ledger;
pub mod refusals;

/// The reporting controller of the events.
const CONTROLLER: &str = "sds-agent.io/agent";
/// Maximum of events that wait to be written; further ones are dropped.
const QUEUE: usize = 64;
/// Maximum of events that one agent writes in a minute.
const MAX_EVENTS_PER_MINUTE: u32 = 30;
/// Maximum length of a note that the API server accepts.
const MAX_NOTE_BYTES: usize = 1024;

/// Creates an observer of issuance and of callers, and the writer of its events.
pub fn new(client: Client, node: &NodeEnvironment, metrics: Metrics) -> (Reporter, Writer) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let instance = node.pod.as_ref().map(|pod| pod.name.clone()).or_else(|| node.node_name.clone());
    let reporter = Reporter { ledger: Mutex::default(), refusals: Mutex::default(), notes: sender, metrics: metrics.clone() };
    let instance = instance.unwrap_or_else(|| "sds-agent".into());
    (reporter, Writer { client, instance, notes: receiver, metrics, budget: Budget::default(), hush: LogLimiter::default() })
}

/// The metrics of events.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Family<ResultLabel, Counter>);

/// The label of `pod_events_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: Written,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
enum Written {
    written,
    failed,
    dropped,
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("pod_events", "Kubernetes Events about pods, by result", metrics.0.clone());
        metrics
    }

    /// Registers and counts one of everything, for the reference.
    #[cfg(test)]
    pub(crate) fn sample(registry: &mut Registry) {
        let metrics = Self::register(registry);
        agent_runtime::metrics::every!(Written: written, failed, dropped).into_iter().for_each(|result| metrics.count(result));
    }

    fn count(&self, result: Written) {
        self.0.get_or_create(&ResultLabel { result }).inc();
    }
}

/// Observes issuance and callers, and queues events about pods.
pub struct Reporter {
    ledger: Mutex<PodTransitions>,
    refusals: Mutex<Refusals>,
    notes: mpsc::Sender<PodEvent>,
    metrics: Metrics,
}

impl fmt::Debug for Reporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reporter")
    }
}

impl Reporter {
    fn tell(&self, judge: impl FnOnce(&mut PodTransitions) -> Vec<PodEvent>) {
        let notes = judge(&mut self.ledger.lock());
        notes.into_iter().for_each(|note| self.send(note));
    }

    fn send(&self, note: PodEvent) {
        if self.notes.try_send(note).is_err() {
            self.metrics.count(Written::dropped);
        }
    }
}

impl attest::CallerObserver for Reporter {
    fn refused(&self, pod: &PodRef, error: &attest::Error) {
        if self.refusals.lock().refused(&pod.uid, error.reason) {
            let message = format!("A process of this pod requested a certificate and was refused: {error}");
            self.send(PodEvent { pod: pod.clone(), reason: Reason::CallerRefused, message });
        }
    }

    fn served(&self, pod: &PodRef) {
        if self.refusals.lock().served(&pod.uid) {
            let message = "Processes of this pod are served now".to_owned();
            self.send(PodEvent { pod: pod.clone(), reason: Reason::CallerServed, message });
        }
    }
}

impl IssuanceObserver for Reporter {
    fn failed(&self, entry: &Entry, error: &Error) {
        let (reason, at_once) = match error {
            Error::Denied { .. } => (Reason::CertificateDenied, true),
            Error::Configuration(_) => (Reason::CertificateNotIssued, true),
            _ => (Reason::CertificateNotIssued, false),
        };
        let left = entry.current().map(|svid| clock::rfc3339(svid.chain.validity.not_after));
        let rest = left.map_or_else(|| "its clients wait".to_owned(), |end| format!("the one in use ends {end}"));
        let message = format!("No new certificate for {}: {error}; {rest}", entry.identity);
        self.tell(|ledger| ledger.failed(Instant::now(), entry.id, &entry.pods(), reason, at_once, &message));
    }

    fn waits(&self, entry: &Entry, request: &str, why: &str) {
        let message = format!("CertificateRequest {request} for {} still waits for {why}", entry.identity);
        self.tell(|ledger| ledger.failed(Instant::now(), entry.id, &entry.pods(), Reason::CertificatePending, true, &message));
    }

    fn withheld(&self, entry: &Entry) {
        let message =
            format!("The certificate of {} is withheld: this node's clock was set, and by it the certificate is not valid", entry.identity);
        self.tell(|ledger| ledger.failed(Instant::now(), entry.id, &entry.pods(), Reason::CertificateWithheld, true, &message));
    }

    fn issued(&self, entry: &Entry, svid: &Svid) {
        let message = format!("{} has a certificate: serial {}, until {}", entry.identity, svid.chain.serial, {
            clock::rfc3339(svid.chain.validity.not_after)
        });
        self.tell(|ledger| ledger.issued(entry.id, &message));
    }

    fn forgotten(&self, entry: &Entry) {
        self.tell(|ledger| {
            ledger.forgotten(entry.id);
            Vec::new()
        });
    }
}

/// Writes the events of the reporter.
pub struct Writer {
    client: Client,
    instance: Arc<str>,
    notes: mpsc::Receiver<PodEvent>,
    metrics: Metrics,
    budget: Budget,
    hush: LogLimiter<NotWritten>,
}

/// The cause of an event that is not written. The log limits lines by this cause, because their texts name different events.
#[derive(Debug, PartialEq, Eq, Hash)]
enum NotWritten {
    /// The agent has written too many events.
    OverBudget,
    /// The API server did not accept the event.
    Failed(Discriminant<agent_kube::failure::Cause>),
}

impl hush::Cause for NotWritten {}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").field("instance", &self.instance).finish_non_exhaustive()
    }
}

impl Writer {
    /// Writes events until `end`. Events that are queued then are not written.
    pub async fn run(mut self, end: CancellationToken) {
        let running = async {
            while let Some(note) = self.notes.recv().await {
                if self.budget.take(Instant::now()) {
                    self.write(&note).await;
                } else {
                    self.metrics.count(Written::dropped);
                    if let Some(left_out) = self.hush.permit(NotWritten::OverBudget, Instant::now()) {
                        tracing::warn!(target: LOG_TARGET, pod = %note.pod, left_out, "an event on a pod is dropped: there are too many");
                    }
                }
            }
            // The reporter has ended, so there are no more events.
            std::future::pending::<()>().await;
        };
        end.run_until_cancelled(running).await;
    }

    async fn write(&self, note: &PodEvent) {
        let namespace = &*note.pod.namespace;
        let event = event(note, &self.instance, jiff::Timestamp::now());
        let call = Call { verb: "create", resource: "events.events.k8s.io", name: None, namespace: Some(namespace) };
        let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        match api.create(&PostParams::default(), &event).await {
            Ok(_) => self.metrics.count(Written::written),
            Err(error) => {
                self.metrics.count(Written::failed);
                let failure = Failure::of(&error, &call);
                if let Some(left_out) = self.hush.permit(NotWritten::Failed(discriminant(&failure.cause)), Instant::now()) {
                    tracing::warn!(target: LOG_TARGET, pod = %note.pod, cause = %failure, left_out, "cannot write an event on a pod");
                }
            }
        }
    }
}

fn event(note: &PodEvent, instance: &str, now: jiff::Timestamp) -> Event {
    let PodRef { namespace, name, uid } = &note.pod;
    let kind = if matches!(note.reason, Reason::CertificateIssued | Reason::CallerServed) { "Normal" } else { "Warning" };
    // The excerpt is sanitised, because more users may read events than the log.
    let mut message = text::excerpt(&note.message, MAX_NOTE_BYTES);
    if message.len() > MAX_NOTE_BYTES {
        let mut end = MAX_NOTE_BYTES - '…'.len_utf8();
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        message.truncate(end);
        message.push('…');
    }
    Event {
        metadata: ObjectMeta {
            // A pod's name may be as long as that of an event, so it is cut to leave room for the suffix.
            name: Some(format!("{}.{:016x}", &name[..name.len().min(200)], fastrand::u64(..))),
            namespace: Some(namespace.to_string()),
            labels: Some(BTreeMap::from([("app.kubernetes.io/managed-by".to_owned(), "sds-agent".to_owned())])),
            ..ObjectMeta::default()
        },
        action: Some("IssueCertificate".to_owned()),
        event_time: Some(MicroTime(now)),
        note: Some(message),
        reason: Some(note.reason.as_str().to_owned()),
        regarding: Some(ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(namespace.to_string()),
            name: Some(name.to_string()),
            uid: Some(uid.to_string()),
            ..ObjectReference::default()
        }),
        reporting_controller: Some(CONTROLLER.to_owned()),
        reporting_instance: Some(instance.chars().take(128).collect()),
        type_: Some(kind.to_owned()),
        ..Event::default()
    }
}

/// The rate limit of events: a token bucket of [`MAX_EVENTS_PER_MINUTE`].
#[derive(Debug, Default)]
struct Budget {
    full_at: Option<Instant>,
}

impl Budget {
    fn take(&mut self, now: Instant) -> bool {
        let minute = Duration::from_secs(60);
        let full_at = self.full_at.map_or(now, |at| at.max(now)) + minute / MAX_EVENTS_PER_MINUTE;
        let has_one = full_at <= now + minute;
        if has_one {
            self.full_at = Some(full_at);
        }
        has_one
    }
}

#[cfg(test)]
mod tests;
