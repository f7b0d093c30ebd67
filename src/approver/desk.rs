//! One request, from its first sight to the written decision.
//!
//! The decision is written together with the version of the request that was judged: who changed it meanwhile makes the write fail, and
//! the request is judged again. So several replicas may work on the same request, and the first one counts.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::{sync::watch, time::Instant};

use crate::{
    approver::{
        events::Events,
        force::InForce,
        judge::{Decision, Denial, Sight, decide, evidence},
        metrics::{Decided, Metrics, Step},
        pods::Pods,
        queue::Case,
    },
    cert_manager::{Condition, PLURAL, Request, claims, denied},
    clock::{self, Clock},
    kubernetes::{Call, Cause, Failure},
    telemetry::hush::Hush,
};

/// The reason of the condition `Approved`, and who reports Events.
pub const APPROVER: &str = "approver.sds-agent.io";
/// The plural with its group, for people.
const RESOURCE: &str = "certificaterequests.cert-manager.io";
/// How often a request that others keep changing is judged in one go.
const ROUNDS: usize = 4;

/// How a worker's attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is left to do.
    Settled,
    /// It is to be tried again.
    Failed,
    /// It is left undecided for so long: it differs from the configuration, and the agent's file may be newer than the approver's.
    Hesitates(Duration),
}

/// A decision and what it rests on.
struct Judged {
    decision: Decision,
    by_former: bool,
    in_force: Arc<InForce>,
}

/// What the workers share.
pub struct Desk {
    client: Client,
    in_force: watch::Receiver<Arc<InForce>>,
    pods: Pods,
    clock: Arc<dyn Clock>,
    events: Events,
    metrics: Metrics,
    /// Denials that the log has been told of, by reason, requester and node.
    denials: Hush<(&'static str, String, String)>,
    /// The same of those that are put off.
    hesitations: Hush<(&'static str, String, String)>,
    /// The trouble that the log has been told of.
    told: Mutex<Option<String>>,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").field("pods", &self.pods).finish_non_exhaustive()
    }
}

impl Desk {
    /// Decides by what is `in_force`.
    pub fn new(
        client: Client,
        in_force: watch::Receiver<Arc<InForce>>,
        pods: Pods,
        clock: Arc<dyn Clock>,
        instance: String,
        metrics: Metrics,
    ) -> Self {
        let events = Events::new(client.clone(), instance, metrics.clone());
        let (denials, hesitations) = (Hush::default(), Hush::default());
        Self { client, in_force, pods, clock, events, metrics, denials, hesitations, told: Mutex::default() }
    }

    /// Decides about one request, and writes it. `may_hesitate` is whether there is room for one more that is left undecided.
    pub async fn settle(&self, case: Case, may_hesitate: bool) -> Outcome {
        let mut request = case.request;
        for _ in 0..ROUNDS {
            let Judged { decision, by_former, in_force } = match self.decide(&request).await {
                Ok(judged) => judged,
                Err(outcome) => return outcome,
            };
            if !Arc::ptr_eq(&in_force, &self.in_force.borrow()) {
                continue;
            }
            if let Decision::Deny(denial) = &decision
                && may_hesitate
                && matches!(denial.code, denied::PROFILE_MISMATCH | denied::WRONG_IDENTITY)
                && let left = in_force.hesitation().saturating_sub(case.since.elapsed())
                && !left.is_zero()
            {
                self.put_off(&request, denial, left);
                return Outcome::Hesitates(left);
            }
            let condition = match &decision {
                Decision::Approve(sentence) => self.condition("Approved", APPROVER, sentence),
                Decision::Deny(denial) => self.condition("Denied", denial.code, &denial.sentence),
                // A live read leaves nothing to look at.
                Decision::Ignore | Decision::Look(_) => return Outcome::Settled,
            };
            match self.write(&request, condition).await {
                Ok(()) => {
                    if by_former {
                        self.metrics.by_former.inc();
                    }
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

    async fn decide(&self, request: &Request) -> Result<Judged, Outcome> {
        let in_force = self.in_force.borrow().clone();
        let watched = evidence(request).and_then(|pod| self.pods.watched(&pod.uid));
        let (decision, by_former) = match decide(request, Sight::Watched(watched.as_deref()), &in_force, Instant::now()) {
            (Decision::Look(pod), _) => {
                self.metrics.live_reads.inc();
                let live = self.pods.read(&pod).await.map_err(|failure| {
                    let call = Call { verb: "get", resource: "pods", name: Some(&pod.name), namespace: Some(&pod.namespace) };
                    self.trouble(Step::read_pod, &call, &failure)
                })?;
                decide(request, Sight::Live(live.as_ref()), &in_force, Instant::now())
            }
            decided => decided,
        };
        Ok(Judged { decision, by_former, in_force })
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

    async fn write(&self, request: &Request, condition: Condition) -> Result<(), Failure> {
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
    async fn again(&self, request: &Request) -> Result<Option<Request>, Outcome> {
        let call = call("get", request);
        match self.api(request).get(call.name.unwrap_or_default()).await {
            Ok(newer) => Ok(Some(newer).filter(|newer| newer.metadata.uid == request.metadata.uid)),
            Err(error) => match Failure::of(&error, &call) {
                failure if failure.cause == Cause::NotFound => Ok(None),
                failure => Err(self.trouble(Step::read_request, &call, &failure)),
            },
        }
    }

    async fn decided(&self, request: &Request, decision: &Decision, since: Instant) {
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
                self.log(request, denial);
                self.events.tell(request, denial, &clock::rfc3339(self.clock.now())).await;
            }
            Decision::Ignore | Decision::Look(_) => {}
        }
    }

    /// Tells the log of a request that is left undecided for now.
    fn put_off(&self, request: &Request, denial: &Denial, left: Duration) {
        let Some(left_out) = self.hesitations.tells(cause(request, denial), Instant::now()) else { return };
        let ((namespace, name), seconds) = (place(request), left.as_secs());
        let (reason, why) = (denial.code, &denial.sentence);
        tracing::warn!(
            namespace,
            request = name,
            reason,
            why,
            seconds,
            left_out,
            "a request differs from the configuration; it is denied after this time, unless a newer file comes that allows it"
        );
    }

    /// One line a minute for each reason, requester and node.
    fn log(&self, request: &Request, denial: &Denial) {
        let (namespace, request_name) = place(request);
        let Some(left_out) = self.denials.tells(cause(request, denial), Instant::now()) else { return };
        let (reason, why) = (denial.code, &denial.sentence);
        if reason == denied::POD_GONE {
            tracing::info!(namespace, request = request_name, reason, why, left_out, "denied");
        } else {
            tracing::warn!(namespace, request = request_name, reason, why, left_out, "denied");
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

    fn api(&self, request: &Request) -> Api<Request> {
        Api::namespaced(self.client.clone(), place(request).0)
    }
}

/// What makes two denials the same for the log: reason, requester and node.
fn cause(request: &Request, denial: &Denial) -> (&'static str, String, String) {
    let spec = &request.spec;
    let node = spec.extra.get(claims::NODE_NAME).and_then(|names| names.first()).cloned().unwrap_or_default();
    (denial.code, spec.username.clone().unwrap_or_default(), node)
}

/// Namespace and name.
pub(super) fn place(request: &Request) -> (&str, &str) {
    let metadata = &request.metadata;
    (metadata.namespace.as_deref().unwrap_or_default(), metadata.name.as_deref().unwrap_or_default())
}

fn call<'a>(verb: &'static str, request: &'a Request) -> Call<'a> {
    debug_assert!(RESOURCE.starts_with(PLURAL));
    let (namespace, name) = place(request);
    Call {
        verb,
        resource: if verb == "patch" { "certificaterequests.cert-manager.io/status" } else { RESOURCE },
        name: Some(name),
        namespace: Some(namespace),
    }
}
