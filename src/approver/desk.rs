//! One request, from its first sight to the written decision.
//!
//! The decision is written together with the version of the request that was judged: who changed it meanwhile makes the write fail, and
//! the request is judged again. So several replicas may work on the same request, and the first one counts.

use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::Event;
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::{sync::watch, time::Instant};

use crate::{
    approver::{
        judge::{Decision, Denial, Sight, evidence, judge},
        metrics::{Decided, Metrics, Step},
        pods::Pods,
        queue::Case,
        rules::Rules,
    },
    cert_manager::{CertificateRequest, Condition, GROUP, PLURAL, denied},
    clock::{self, Clock},
    kubernetes::{Call, Cause, Failure},
};

/// The reason of the condition `Approved`, and who reports Events.
pub const APPROVER: &str = "approver.sds-agent.io";
/// The plural with its group, for people.
const RESOURCE: &str = "certificaterequests.cert-manager.io";
/// How often a request that others keep changing is judged in one go.
const ROUNDS: usize = 4;
/// The API server refuses longer messages of Events.
const EVENT_MESSAGE: usize = 1000;

/// How a worker's attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is left to do.
    Settled,
    /// It is to be tried again.
    Failed,
}

/// What the workers share.
pub struct Desk {
    client: Client,
    rules: watch::Receiver<Arc<Rules>>,
    pods: Pods,
    clock: Arc<dyn Clock>,
    /// The name of the approver's pod, for Events.
    instance: String,
    metrics: Metrics,
    /// The trouble that the log has been told of.
    told: Mutex<Option<String>>,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").field("instance", &self.instance).finish_non_exhaustive()
    }
}

impl Desk {
    /// Decides by the newest of `rules`.
    pub fn new(
        client: Client,
        rules: watch::Receiver<Arc<Rules>>,
        pods: Pods,
        clock: Arc<dyn Clock>,
        instance: String,
        metrics: Metrics,
    ) -> Self {
        Self { client, rules, pods, clock, instance, metrics, told: Mutex::default() }
    }

    /// Decides about one request, and writes it.
    pub async fn settle(&self, case: Case) -> Outcome {
        let mut request = case.request;
        for _ in 0..ROUNDS {
            let decision = match self.decide(&request).await {
                Ok(decision) => decision,
                Err(outcome) => return outcome,
            };
            let condition = match &decision {
                Decision::Approve(sentence) => self.condition("Approved", APPROVER, sentence),
                Decision::Deny(denial) => self.condition("Denied", denial.code, &denial.sentence),
                // A live read leaves nothing to look at.
                Decision::Ignore | Decision::Look(_) => return Outcome::Settled,
            };
            match self.write(&request, condition).await {
                Ok(()) => {
                    self.decided(&request, &decision, case.since).await;
                    return Outcome::Settled;
                }
                Err(failure) if failure.cause == Cause::Conflict => match self.again(&request).await {
                    Ok(Some(newer)) => request = Arc::new(newer),
                    Ok(None) => return Outcome::Settled,
                    Err(outcome) => return outcome,
                },
                Err(failure) if failure.cause == Cause::NotFound => return Outcome::Settled,
                Err(failure) => return self.trouble(Step::write, &call("patch", &request), &failure),
            }
        }
        Outcome::Failed
    }

    async fn decide(&self, request: &CertificateRequest) -> Result<Decision, Outcome> {
        let rules = self.rules.borrow().clone();
        let watched = evidence(request).and_then(|pod| self.pods.watched(&pod.uid));
        match judge(request, Sight::Watched(watched.as_deref()), &rules) {
            Decision::Look(pod) => {
                self.metrics.live_reads.inc();
                let live = self.pods.read(&pod).await.map_err(|failure| {
                    let call = Call { verb: "get", resource: "pods", name: Some(&pod.name), namespace: Some(&pod.namespace) };
                    self.trouble(Step::read_pod, &call, &failure)
                })?;
                Ok(judge(request, Sight::Live(live.as_ref()), &rules))
            }
            decision => Ok(decision),
        }
    }

    fn condition(&self, kind: &str, reason: &str, message: &str) -> Condition {
        Condition {
            kind: kind.to_owned(),
            status: "True".to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_transition_time: Some(clock::rfc3339(self.clock.now())),
        }
    }

    async fn write(&self, request: &CertificateRequest, condition: Condition) -> Result<(), Failure> {
        let call = call("patch", request);
        let mut conditions = request.status.as_ref().map(|status| status.conditions.clone()).unwrap_or_default();
        conditions.push(condition);
        // A merge replaces lists as a whole; the version is what makes that safe.
        let patch = json!({
            "metadata": {"resourceVersion": request.metadata.resource_version, "uid": request.metadata.uid},
            "status": {"conditions": conditions},
        });
        let name = call.name.unwrap_or_default();
        let written = self.api(request).patch_status(name, &PatchParams::default(), &Patch::Merge(&patch)).await;
        written.map(drop).map_err(|error| Failure::of(&error, &call))
    }

    /// The request as it is now; none where it is another one, or gone.
    async fn again(&self, request: &CertificateRequest) -> Result<Option<CertificateRequest>, Outcome> {
        let call = call("get", request);
        match self.api(request).get(call.name.unwrap_or_default()).await {
            Ok(newer) => Ok(Some(newer).filter(|newer| newer.metadata.uid == request.metadata.uid)),
            Err(error) => match Failure::of(&error, &call) {
                failure if failure.cause == Cause::NotFound => Ok(None),
                failure => Err(self.trouble(Step::read_request, &call, &failure)),
            },
        }
    }

    async fn decided(&self, request: &CertificateRequest, decision: &Decision, since: Instant) {
        if let Some(trouble) = self.told.lock().unwrap_or_else(PoisonError::into_inner).take() {
            tracing::info!(trouble, "decisions can be written again");
        }
        let (namespace, name) = place(request);
        let seconds = since.elapsed().as_secs_f64();
        match decision {
            Decision::Approve(why) => {
                self.metrics.decided(Decided::approved, "none", seconds);
                tracing::info!(namespace, request = name, why, "approved");
            }
            Decision::Deny(denial) => {
                self.metrics.decided(Decided::denied, denial.code, seconds);
                tracing::warn!(namespace, request = name, reason = denial.code, why = denial.sentence, "denied");
                self.tell(request, denial).await;
            }
            Decision::Ignore | Decision::Look(_) => {}
        }
    }

    /// An Event on the request, once. It is for people: one that cannot be written is counted, not written again.
    async fn tell(&self, request: &CertificateRequest, denial: &Denial) {
        let (namespace, name) = place(request);
        let now = clock::rfc3339(self.clock.now());
        let pod = evidence(request)
            .map(|pod| json!({"apiVersion": "v1", "kind": "Pod", "namespace": &*pod.namespace, "name": &*pod.name, "uid": &*pod.uid}));
        let event = json!({
            "metadata": {"generateName": "sds-agent-", "namespace": namespace},
            "involvedObject": {
                "apiVersion": format!("{GROUP}/v1"), "kind": "CertificateRequest", "namespace": namespace, "name": name,
                "uid": request.metadata.uid, "resourceVersion": request.metadata.resource_version,
            },
            "related": pod,
            "type": if denial.code == denied::POD_GONE { "Normal" } else { "Warning" },
            "reason": denial.code,
            "message": denial.sentence.chars().take(EVENT_MESSAGE).collect::<String>(),
            "action": "Deny",
            "source": {"component": APPROVER},
            "reportingComponent": APPROVER,
            "reportingInstance": self.instance,
            "firstTimestamp": now, "lastTimestamp": now, "count": 1,
        });
        let Ok(event) = serde_json::from_value::<Event>(event) else { return };
        let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        if let Err(error) = api.create(&PostParams::default(), &event).await {
            self.metrics.failed(Step::event);
            let call = Call { verb: "create", resource: "events", name: None, namespace: Some(namespace) };
            let failure = Failure::of(&error, &call);
            tracing::debug!(call = %call, error = %failure, "no Event tells of the denial");
        }
    }

    /// Counts trouble, and tells the log of it when it is another one than before.
    fn trouble(&self, step: Step, call: &Call<'_>, failure: &Failure) -> Outcome {
        self.metrics.failed(step);
        // Without the request's name: the same trouble meets all of them.
        let text = format!("{} {}: {failure}", call.verb, call.resource);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.as_ref() != Some(&text) {
            tracing::error!(call = %call, error = %failure, "cannot decide about a request; trying again");
            *told = Some(text);
        }
        Outcome::Failed
    }

    fn api(&self, request: &CertificateRequest) -> Api<CertificateRequest> {
        Api::namespaced(self.client.clone(), place(request).0)
    }
}

fn place(request: &CertificateRequest) -> (&str, &str) {
    let metadata = &request.metadata;
    (metadata.namespace.as_deref().unwrap_or_default(), metadata.name.as_deref().unwrap_or_default())
}

fn call<'a>(verb: &'static str, request: &'a CertificateRequest) -> Call<'a> {
    debug_assert!(RESOURCE.starts_with(PLURAL));
    let (namespace, name) = place(request);
    Call {
        verb,
        resource: if verb == "patch" { "certificaterequests.cert-manager.io/status" } else { RESOURCE },
        name: Some(name),
        namespace: Some(namespace),
    }
}
