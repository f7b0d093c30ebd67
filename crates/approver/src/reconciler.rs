//! Reconciles one request, from the first sight to the written decision.
//!
//! A decision is written with the `resourceVersion` of the request that was judged. If the request has changed meanwhile, the API server
//! rejects the write with a conflict, and the request is judged again. So two replicas may handle the same request
//! during a takeover, and the first write wins.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use agent_kube::{Call, Cause, Failure, pod::Pod};
use agent_runtime::{
    clock::{self, Clock},
    telemetry::hush::LogLimiter,
};
use cert_manager::{APPROVER, Condition, PLURAL, Request, claims, denied, place};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use parking_lot::Mutex;
use serde_json::json;
use tokio::{sync::watch, time::Instant};
use workload_identity::PodRef;

use crate::{
    active_rules::ActiveRules,
    events::Events,
    gate::{Slot, WriteGate},
    judge::{self, Decision, Denial, PodView, decide, evidence},
    metrics::{Decided, Metrics, Step},
    pods::Pods,
    queue::{Key, MAX_REQUESTS_PER_NODE, WorkItem},
};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::approver::desk";

/// Plural of the resource with its group, for the log.
const RESOURCE: &str = "certificaterequests.cert-manager.io";
/// Maximum number of attempts for a request that other clients keep changing, before it is retried with a backoff.
const MAX_ROUNDS: usize = 4;

/// Number of own decisions that are remembered: those of the time that a list takes.
const MAX_OWN_DECISIONS: usize = 4096;
/// Maximum age of a live read of a pod when it is reused for a second judgement. An older read is repeated.
const MAX_LIVE_READ_AGE: Duration = Duration::from_secs(1);

/// How a worker's attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The request needs no further work.
    Settled,
    /// The decision is written.
    Decided,
    /// The attempt failed and has to be retried.
    Failed,
    /// Another replica has decided the request first.
    Conflict,
    /// The request stays undecided, because this replica is on standby.
    Yielded,
    /// The request stays undecided for this time: it differs from the configuration, and the agent's file may be newer than the
    /// approver's.
    Deferred(Duration),
}

/// How a removal ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// The request does not exist any longer.
    Gone,
    /// A policy or webhook rejects the deletion of this request.
    Refused,
    /// The attempt failed, and so would the next one.
    Failed,
}

/// A decision and the rules that led to it.
struct Judged {
    decision: Decision,
    by_superseded: bool,
    active_rules: Arc<ActiveRules>,
}

/// Result of a live read of a pod.
struct LiveRead {
    asked: PodRef,
    begun: Instant,
    found: Option<Pod>,
}

/// Judges requests and writes the decisions. Shared by all workers; owns the write gate and the log limiters.
pub struct Reconciler {
    client: Client,
    active_rules: watch::Receiver<Arc<ActiveRules>>,
    pods: Pods,
    clock: Arc<dyn Clock>,
    events: Events,
    gate: WriteGate,
    metrics: Metrics,
    /// Log limiter of denials, by reason, requester and node.
    denials: LogLimiter<(&'static str, String, String)>,
    /// Log limiter of deferred denials, by reason, requester and node.
    deferrals: LogLimiter<(&'static str, String, String)>,
    /// The last logged failure, until a decision is written again.
    logged_trouble: Mutex<Option<String>>,
    /// UIDs of requests that this replica decided last, oldest first.
    own_decisions: Mutex<VecDeque<Arc<str>>>,
    /// The last logged failure of a removal.
    logged_removal: Mutex<Option<Failure>>,
}

impl std::fmt::Debug for Reconciler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reconciler").field("pods", &self.pods).finish_non_exhaustive()
    }
}

impl Reconciler {
    /// Creates a reconciler that judges by the current value of `active_rules`. `instance` is the name of this replica in Events.
    pub fn new(
        client: Client,
        active_rules: watch::Receiver<Arc<ActiveRules>>,
        pods: Pods,
        clock: Arc<dyn Clock>,
        instance: String,
        metrics: Metrics,
    ) -> Self {
        let events = Events::new(client.clone(), instance, metrics.clone());
        let (denials, deferrals) = (LogLimiter::default(), LogLimiter::default());
        Self {
            client,
            active_rules,
            pods,
            clock,
            events,
            gate: WriteGate::default(),
            metrics,
            denials,
            deferrals,
            logged_trouble: Mutex::default(),
            own_decisions: Mutex::default(),
            logged_removal: Mutex::default(),
        }
    }

    /// Sets whether decisions are written. On standby, decisions that wait for the gate end as [`Outcome::Yielded`].
    pub fn set_deciding(&self, deciding: bool) {
        self.gate.set_open(deciding);
    }

    /// Decides the request `key` and writes the decision. `may_defer` is whether one more request may stay undecided.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped during the write, the decision may or may not be in the request; it is not logged and not counted.
    pub async fn reconcile(&self, key: &Key, item: WorkItem, may_defer: bool) -> Outcome {
        let mut live = None;
        let mut request = match &item.request {
            Some(request) => request.clone(),
            None => match self.read(key, &item.uid).await {
                Ok(Some(request)) => Arc::new(request),
                Ok(None) => return Outcome::Settled,
                Err(outcome) => return outcome,
            },
        };
        for _ in 0..MAX_ROUNDS {
            let (judged, slot) = match self.judge_for_writing(&request, &mut live, &item, may_defer).await {
                Ok(ready) => ready,
                Err(outcome) => return outcome,
            };
            let Judged { decision, by_superseded, active_rules } = judged;
            if !Arc::ptr_eq(&active_rules, &self.active_rules.borrow()) {
                continue;
            }
            let condition = match &decision {
                Decision::Approve(sentence) => self.condition("Approved", APPROVER, sentence),
                Decision::Deny(denial) => self.condition("Denied", denial.code, &denial.sentence),
                // No decision asks for a second live read.
                Decision::Ignore | Decision::NeedsLiveRead(_) => return Outcome::Settled,
            };
            match slot.write(self.write(&request, condition), Result::is_ok).await {
                Ok(()) => {
                    if by_superseded {
                        self.metrics.by_superseded.inc();
                    }
                    self.note_decided(item.uid.clone());
                    self.decided(&request, &decision, item.since).await;
                    return Outcome::Decided;
                }
                Err(failure) if failure.cause == Cause::Conflict => match self.reread(&request).await {
                    // An older list can show a request undecided that this replica has decided.
                    Ok(Some(newer)) if self.has_decided(&item.uid) && judge::decided_by_a_replica(&newer) => return Outcome::Settled,
                    Ok(Some(newer)) if judge::decided_by_a_replica(&newer) => return Outcome::Conflict,
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

    fn note_decided(&self, uid: Arc<str>) {
        let mut own = self.own_decisions.lock();
        if own.len() == MAX_OWN_DECISIONS {
            own.pop_front();
        }
        own.push_back(uid);
    }

    fn has_decided(&self, uid: &str) -> bool {
        self.own_decisions.lock().iter().any(|own| **own == *uid)
    }

    /// Returns a decision and the slot to write it. After a wait for the slot, the request is judged again, because its pod may have been
    /// deleted meanwhile. The slot is held during that judgement: otherwise a decision based on a live read could be out of date each
    /// time a slot becomes free.
    async fn judge_for_writing(
        &self,
        request: &Request,
        live: &mut Option<LiveRead>,
        item: &WorkItem,
        may_defer: bool,
    ) -> Result<(Judged, Slot<'_>), Outcome> {
        let judged = self.judge(request, live, item).await?;
        self.is_to_be_written(request, &judged, item, may_defer)?;
        let slot = self.gate.slot().await.ok_or(Outcome::Yielded)?;
        if !slot.waited {
            return Ok((judged, slot));
        }
        let judged = self.judge(request, live, item).await?;
        self.is_to_be_written(request, &judged, item, may_defer)?;
        Ok((judged, slot))
    }

    /// Checks that the decision has to be written now.
    ///
    /// # Errors
    ///
    /// The outcome of the attempt, if the decision is deferred or the request is ignored.
    fn is_to_be_written(&self, request: &Request, judged: &Judged, item: &WorkItem, may_defer: bool) -> Result<(), Outcome> {
        match &judged.decision {
            Decision::Deny(denial)
                if may_defer
                    && item.may_rest
                    && matches!(denial.code, denied::PROFILE_MISMATCH | denied::WRONG_IDENTITY)
                    && Arc::ptr_eq(&judged.active_rules, &self.active_rules.borrow())
                    && let left = judged.active_rules.deferral().saturating_sub(item.since.elapsed())
                    && !left.is_zero() =>
            {
                self.defer(request, denial, left);
                Err(Outcome::Deferred(left))
            }
            Decision::Ignore => Err(Outcome::Settled),
            Decision::Approve(_) | Decision::Deny(_) | Decision::NeedsLiveRead(_) => Ok(()),
        }
    }

    /// Judges by the watch's data, and if that is insufficient, by a live read: the one in `live`, if it is fresh, or a new one.
    ///
    /// A request beyond the limit of its node is denied without a read.
    async fn judge(&self, request: &Request, live: &mut Option<LiveRead>, item: &WorkItem) -> Result<Judged, Outcome> {
        let active_rules = self.active_rules.borrow().clone();
        if item.is_beyond && judge::is_ours(request, &active_rules.rules) {
            let sentence = format!("its node has more than {MAX_REQUESTS_PER_NODE} undecided requests: an agent has one for each identity");
            let decision = Decision::Deny(Denial { code: denied::TOO_MANY_REQUESTS, sentence });
            return Ok(Judged { decision, by_superseded: false, active_rules });
        }
        let watched = evidence(request).and_then(|pod| self.pods.watched(&pod.uid));
        let (decision, by_superseded) = match decide(request, PodView::Cached(watched.as_deref()), &active_rules, Instant::now()) {
            (Decision::NeedsLiveRead(asked), _) => {
                let fresh = live.take().filter(|read| read.asked == asked && read.begun.elapsed() < MAX_LIVE_READ_AGE);
                let read = match fresh {
                    Some(read) => read,
                    None => self.read_live(asked).await?,
                };
                let decision = decide(request, PodView::Live(read.found.as_ref()), &active_rules, Instant::now());
                *live = Some(read);
                decision
            }
            decided => decided,
        };
        Ok(Judged { decision, by_superseded, active_rules })
    }

    async fn read_live(&self, asked: PodRef) -> Result<LiveRead, Outcome> {
        self.metrics.live_reads.inc();
        let begun = Instant::now();
        match self.pods.read(&asked).await {
            Ok(found) => Ok(LiveRead { asked, begun, found }),
            Err(failure) => {
                let call = Call { verb: "get", resource: "pods", name: Some(&asked.name), namespace: Some(&asked.namespace) };
                Err(self.trouble(Step::read_pod, &call, &failure))
            }
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

    async fn write(&self, request: &Request, condition: Condition) -> Result<(), Failure> {
        let call = call("patch", request);
        let mut conditions = request.status.as_ref().map(|status| status.conditions.clone()).unwrap_or_default();
        conditions.push(condition);
        // A merge patch replaces the whole list. The resourceVersion makes the API server reject the patch if the list has changed.
        let patch = json!({
            "metadata": {"resourceVersion": request.metadata.resource_version, "uid": request.metadata.uid},
            "status": {"conditions": conditions},
        });
        let name = call.name.unwrap_or_default();
        let written = self.api(request).patch_status(name, &PatchParams::default(), &Patch::Merge(&patch)).await;
        written.map(drop).map_err(|error| Failure::of(&error, &call))
    }

    /// Reads the request again. Returns `None` if it was deleted or recreated.
    async fn reread(&self, request: &Request) -> Result<Option<Request>, Outcome> {
        let (namespace, name) = place(request);
        self.read(&(namespace.to_owned(), name.to_owned()), request.metadata.uid.as_deref().unwrap_or_default()).await
    }

    /// Reads a request. Returns `None` if it was deleted or recreated.
    async fn read(&self, (namespace, name): &Key, uid: &str) -> Result<Option<Request>, Outcome> {
        let call = Call { verb: "get", resource: RESOURCE, name: Some(name), namespace: Some(namespace) };
        let api: Api<Request> = Api::namespaced(self.client.clone(), namespace);
        match api.get(name).await {
            Ok(newer) => Ok(Some(newer).filter(|newer| newer.metadata.uid.as_deref().unwrap_or_default() == uid)),
            Err(error) => match Failure::of(&error, &call) {
                failure if failure.cause == Cause::NotFound => Ok(None),
                failure => Err(self.trouble(Step::read_request, &call, &failure)),
            },
        }
    }

    /// Deletes an ended request, if it still has this UID.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the request may or may not be deleted.
    pub async fn remove(&self, (namespace, name): &Key, uid: &str) -> Removal {
        let call = Call { verb: "delete", resource: RESOURCE, name: Some(name), namespace: Some(namespace) };
        let api: Api<Request> = Api::namespaced(self.client.clone(), namespace);
        let only = Preconditions { uid: Some(uid.to_owned()), resource_version: None };
        match api.delete(name, &DeleteParams { preconditions: Some(only), ..DeleteParams::default() }).await {
            Ok(_) => {
                self.metrics.removed.inc();
                tracing::debug!(target: LOG_TARGET, namespace, request = name, "an ended request is removed");
                Removal::Gone
            }
            Err(error) => match Failure::of(&error, &call) {
                // Another client has deleted it, or it is another request.
                failure if matches!(failure.cause, Cause::NotFound | Cause::Conflict) => Removal::Gone,
                failure => {
                    self.metrics.failed(Step::remove);
                    let mut logged_removal = self.logged_removal.lock();
                    if logged_removal.as_ref() != Some(&failure) {
                        tracing::warn!(target: LOG_TARGET, call = %call, error = %failure, "cannot remove an ended request; trying again");
                        *logged_removal = Some(failure.clone());
                    }
                    if failure.cause == Cause::Policy { Removal::Refused } else { Removal::Failed }
                }
            },
        }
    }

    async fn decided(&self, request: &Request, decision: &Decision, since: Instant) {
        if let Some(trouble) = self.logged_trouble.lock().take() {
            tracing::info!(target: LOG_TARGET, trouble, "decisions can be written again");
        }
        let (namespace, name) = place(request);
        let seconds = since.elapsed().as_secs_f64();
        match decision {
            Decision::Approve(why) => {
                self.metrics.decided(Decided::approved, "none", seconds);
                tracing::info!(target: LOG_TARGET, namespace, request = name, why, "approved");
            }
            Decision::Deny(denial) => {
                self.metrics.decided(Decided::denied, denial.code, seconds);
                self.log(request, denial);
                self.events.tell(request, denial, &clock::rfc3339(self.clock.now())).await;
            }
            Decision::Ignore | Decision::NeedsLiveRead(_) => {}
        }
    }

    /// Logs a deferred denial.
    fn defer(&self, request: &Request, denial: &Denial, left: Duration) {
        let Some(left_out) = self.deferrals.permit(cause(request, denial), Instant::now()) else { return };
        let ((namespace, name), seconds) = (place(request), left.as_secs());
        let (reason, why) = (denial.code, &denial.sentence);
        tracing::warn!(
            target: LOG_TARGET, namespace,
            request = name,
            reason,
            why,
            seconds,
            left_out,
            "a request differs from the configuration; it is denied after this number of seconds, unless a newer file allows it"
        );
    }

    /// Logs a denial, at most once a minute for each reason, requester and node.
    fn log(&self, request: &Request, denial: &Denial) {
        let (namespace, request_name) = place(request);
        let Some(left_out) = self.denials.permit(cause(request, denial), Instant::now()) else { return };
        let (reason, why) = (denial.code, &denial.sentence);
        if reason == denied::POD_GONE {
            tracing::info!(target: LOG_TARGET, namespace, request = request_name, reason, why, left_out, "denied");
        } else {
            tracing::warn!(target: LOG_TARGET, namespace, request = request_name, reason, why, left_out, "denied");
        }
    }

    /// Counts a failure, and logs it if it differs from the last logged one.
    fn trouble(&self, step: Step, call: &Call<'_>, failure: &Failure) -> Outcome {
        self.metrics.failed(step);
        // Without the name of the request: one failure usually affects all requests.
        let text = format!("{} {}: {failure}", call.verb, call.resource);
        let mut logged_trouble = self.logged_trouble.lock();
        if logged_trouble.as_ref() != Some(&text) {
            tracing::error!(target: LOG_TARGET, call = %call, error = %failure, "cannot decide about a request; trying again");
            *logged_trouble = Some(text);
        }
        Outcome::Failed
    }

    fn api(&self, request: &Request) -> Api<Request> {
        Api::namespaced(self.client.clone(), place(request).0)
    }
}

/// Returns the key of a log limiter: reason, requester and node.
fn cause(request: &Request, denial: &Denial) -> (&'static str, String, String) {
    let spec = &request.spec;
    let node = spec.extra.get(claims::NODE_NAME).and_then(|names| names.first()).cloned().unwrap_or_default();
    (denial.code, spec.username.clone().unwrap_or_default(), node)
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
