//! The node-aware approver: the only approver of the CertificateRequests of the agents' issuers.
//!
//! RBAC allows an agent to request a certificate for any name. The approver derives the permitted names from the pod object and compares
//! the pod's node with the agent's ([`judge`]), so a compromised node cannot obtain identities of pods on other nodes. One replica
//! decides and the others are on standby ([`role`]). A decision is written with the `resourceVersion` of the request that was judged, so
//! the first of two concurrent writes wins. The caller runs [`Approver::run`] and [`Pods::run`] concurrently.

use std::{collections::VecDeque, fmt, sync::Arc, time::Duration};

use agent_kube::{self, RequestRate};
use agent_runtime::{clock::Clock, text};
use cert_manager::Request;
use futures::StreamExt;
use kube::Client;
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_util::time::DelayQueue;

pub mod active_rules;
pub mod events;
pub mod gate;
pub mod judge;
pub mod limit;
pub mod metrics;
pub mod pods;
pub mod queue;
pub mod reconciler;
pub mod replicas;
pub mod requests;
pub mod retention;
pub mod role;
pub mod rules;

pub use active_rules::ActiveRules;
pub use metrics::Metrics;
pub use pods::Pods;

use queue::{Key, Queue, key};
use reconciler::{Outcome, Reconciler, Removal};
use replicas::Standing;
use requests::{Namespaces, RequestWatch, Update};
use retention::Retention;
use role::{Cause, Role};
use rules::Guarded;

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::approver";

/// Rate limit of requests to the API server: 200 per second with a burst of 400. It is higher than an agent's, because one approver serves
/// the agents of up to a thousand nodes.
pub const RATE: RequestRate = RequestRate { per_second: 200, burst: 400 };
/// CertificateRequests that are reconciled concurrently, of which one node has at most half ([`queue::MAX_WORKERS_PER_NODE`]).
const WORKERS: usize = 16;
/// Requests that stay undecided at the same time because a newer configuration may allow them. Further requests are denied immediately.
const MAX_DEFERRED: usize = 512;
/// Time after which requests are decided although the first list is not complete.
const MAX_LIST_TIME: Duration = Duration::from_secs(30);
/// Minimum interval between lists for requests that were not tracked.
const LIST_INTERVAL: Duration = Duration::from_secs(60);
/// Ended requests that are removed concurrently. Removals are not urgent, and share the rate limit with decisions.
const MAX_REMOVALS: usize = 2;
/// Pause of all removals after one has failed.
const REMOVAL_RETRY_INTERVAL: Duration = Duration::from_secs(60);
/// Remembered UIDs of requests that another approver approved, so that each is logged once. The oldest is forgotten first.
const MAX_REPORTED: usize = 1024;

/// Dependencies of an [`Approver`].
pub struct Parts {
    /// Client of the API server, limited to [`RATE`].
    pub client: Client,
    /// The rules in force. When they change, undecided requests are judged again. A change of the issuers or of their namespaces lists all
    /// requests again.
    pub active_rules: watch::Receiver<Arc<ActiveRules>>,
    /// Index of the cluster's pods.
    pub pods: Pods,
    /// Wall clock for the times in conditions and Events.
    pub clock: Arc<dyn Clock>,
    /// Name of this replica, reported as the `reportingInstance` of Events.
    pub instance: String,
    /// Metrics of the Kubernetes client.
    pub kube_metrics: agent_kube::Metrics,
    /// Metrics of the approver.
    pub metrics: Metrics,
}

/// One replica of the approver. It owns the queue of undecided requests and the workers that decide them.
pub struct Approver {
    client: Client,
    active_rules: watch::Receiver<Arc<ActiveRules>>,
    reconciler: Arc<Reconciler>,
    standing: watch::Receiver<Standing>,
    may_have_others: bool,
    kube_metrics: agent_kube::Metrics,
    metrics: Metrics,
    /// UIDs of requests whose approval by another approver has been logged, oldest first.
    reported: Mutex<VecDeque<String>>,
    clock: Arc<dyn Clock>,
    synced: watch::Sender<bool>,
}

impl fmt::Debug for Approver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Approver").field("reconciler", &self.reconciler).finish_non_exhaustive()
    }
}

impl Approver {
    /// Creates an approver. It sends no request before [`run`](Self::run).
    pub fn new(parts: Parts) -> Self {
        let Parts { client, active_rules, pods, clock, instance, kube_metrics, metrics } = parts;
        let (standing, may_have_others) = (pods.standing(), pods.may_have_replicas());
        let reconciler = Arc::new(Reconciler::new(client.clone(), active_rules.clone(), pods, clock.clone(), instance, metrics.clone()));
        Self {
            client,
            active_rules,
            reconciler,
            standing,
            may_have_others,
            kube_metrics,
            metrics,
            reported: Mutex::default(),
            clock,
            synced: watch::Sender::new(false),
        }
    }

    /// Becomes true when the first list of requests is complete, and stays true.
    pub fn synced(&self) -> watch::Receiver<bool> {
        self.synced.subscribe()
    }

    /// Watches CertificateRequests. While this replica is the deciding one, it decides them, and removes ended ones. Returns only if a
    /// worker panics.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future aborts the workers. A decision that is being written may or may not reach the API server; another replica or
    /// the next start sees the result in the request.
    pub async fn run(self) {
        let (mut changes, mut standing) = (self.active_rules.clone(), self.standing.clone());
        let (mut queue, mut workers, mut resting) =
            (Queue::default(), JoinSet::<(Key, Arc<str>, Outcome)>::new(), DelayQueue::<Key>::new());
        let (mut retention, mut removals, mut remove_at) = (Retention::default(), JoinSet::<(Key, Removal)>::new(), Instant::now());
        let mut selection = self.note_rules(&mut changes);
        let mut requests = self.watch(&selection.1);
        let mut role = Role::new(self.may_have_others);
        let begin_at = Instant::now() + MAX_LIST_TIME;
        let (mut untracked, mut wants_list, mut list_at) = (None, false, Instant::now());
        loop {
            role.stands_at(*standing.borrow_and_update(), Instant::now());
            // The first requests of a list are those of some nodes only: all are seen before the first turn.
            let may_begin = requests.is_complete() || begin_at <= Instant::now();
            let takeover = role.next(may_begin && queue.has_ready(), Instant::now(), fastrand::f64());
            self.apply_role(role.decides());
            while may_begin
                && role.decides().is_some()
                && workers.len() < WORKERS
                && let Some((key, item)) = queue.pop(|node| retention.waiting(node))
            {
                let (reconciler, may_defer, uid) = (self.reconciler.clone(), resting.len() < MAX_DEFERRED, item.uid.clone());
                workers.spawn(async move {
                    let outcome = reconciler.reconcile(&key, item, may_defer).await;
                    (key, uid, outcome)
                });
            }
            let mut removal = None;
            if role.decides().is_some() && removals.len() < MAX_REMOVALS {
                if remove_at <= Instant::now()
                    && let Some((key, uid)) = retention.take(Instant::now())
                {
                    let reconciler = self.reconciler.clone();
                    removals.spawn(async move {
                        let removed = reconciler.remove(&key, &uid).await;
                        (key, removed)
                    });
                    continue;
                }
                removal = retention.next().map(|at| at.max(remove_at));
            }
            wants_list |= queue.needs_list();
            if wants_list && untracked.is_none() && list_at <= Instant::now() {
                (untracked, wants_list, list_at) = (Some(self.watch(&selection.1)), false, Instant::now() + LIST_INTERVAL);
            }
            self.metrics.pending.set(i64::try_from(queue.len()).unwrap_or(i64::MAX));
            tokio::select! {
                update = requests.next() => {
                    self.note(&mut queue, &mut retention, &mut role, update);
                    if requests.is_complete() && !self.synced.send_replace(true) {
                        tracing::info!(target: LOG_TARGET, undecided = queue.len(), "every request has been seen once");
                    }
                }
                // A list beside the watch, for requests that were not tracked: the watch goes on.
                update = next_of(&mut untracked), if untracked.is_some() => {
                    // The watch reports decided requests, and may have reported their deletion since this list began.
                    if let Update::Listed(request) = update
                        && judge::is_ours(&request, &self.active_rules.borrow().rules)
                    {
                        self.seen(&mut queue, &mut retention, request);
                    }
                    untracked = untracked.filter(|requests| !requests.is_complete());
                }
                () = sleep_until(begin_at), if !may_begin => {}
                () = sleep_until(list_at), if wants_list && untracked.is_none() => {}
                Some(done) = workers.join_next(), if !workers.is_empty() => match done {
                    Ok((key, _, Outcome::Settled)) => queue.settled(&key),
                    Ok((key, uid, Outcome::Decided)) => queue.decided(&key, &uid),
                    Ok((key, _, Outcome::Conflict)) => {
                        queue.settled(&key);
                        self.metrics.conflicts.inc();
                        role.lost_conflict(Instant::now());
                    }
                    Ok((key, _, Outcome::Yielded)) => queue.given_back(&key),
                    Ok((key, _, Outcome::Failed)) => {
                        if let Some(pause) = queue.failed(&key) {
                            resting.insert(key, pause.mul_f64(0.5 + 0.5 * fastrand::f64()));
                        }
                    }
                    Ok((key, _, Outcome::Deferred(pause))) => {
                        if queue.waits(&key) {
                            resting.insert(key, pause);
                        }
                    }
                    Err(error) => {
                        tracing::error!(target: LOG_TARGET, %error, "a worker of the approver has failed");
                        return;
                    }
                },
                Some(rested) = resting.next(), if !resting.is_empty() => queue.rested(rested.get_ref()),
                Some(done) = removals.join_next(), if !removals.is_empty() => match done {
                    Ok((key, Removal::Gone)) => retention.gone(&key),
                    Ok((_, Removal::Refused)) => {}
                    Ok((_, Removal::Failed)) => remove_at = Instant::now() + REMOVAL_RETRY_INTERVAL,
                    Err(error) => {
                        tracing::error!(target: LOG_TARGET, %error, "the removal of a request has failed");
                        return;
                    }
                },
                () = sleep_until(removal.unwrap_or_else(Instant::now)), if removal.is_some() => {}
                () = sleep_until(takeover.unwrap_or_else(Instant::now)), if takeover.is_some() => {}
                Ok(()) = standing.changed() => {}
                Ok(()) = changes.changed() => {
                    resting.clear();
                    queue.wake();
                    let newer = self.note_rules(&mut changes);
                    if newer != selection {
                        // The queue does not hold requests of unguarded issuers, so all requests are listed again.
                        (requests, untracked) = (self.watch(&newer.1), None);
                        queue.retain(|(namespace, _)| newer.1.contains(namespace));
                        retention = Retention::default();
                        selection = newer;
                    }
                }
            }
        }
    }

    /// Notes the current rules. Returns their issuers, and the namespaces of their requests.
    fn note_rules(&self, changes: &mut watch::Receiver<Arc<ActiveRules>>) -> (Vec<Guarded>, Namespaces) {
        let active_rules = changes.borrow_and_update();
        self.metrics.denied_nodes.set(i64::try_from(active_rules.denied_nodes.len()).unwrap_or(i64::MAX));
        (active_rules.rules.issuers.clone(), active_rules.namespaces())
    }

    fn watch(&self, namespaces: &Namespaces) -> RequestWatch {
        RequestWatch::new(&self.client, namespaces, &self.kube_metrics)
    }

    /// Opens or closes the write gate, and logs a change of the role.
    fn apply_role(&self, decides: Option<Cause>) {
        self.reconciler.set_deciding(decides.is_some());
        if self.metrics.active.set(decides.is_some().into()) == i64::from(decides.is_some()) {
            return;
        }
        match decides {
            Some(cause) => tracing::info!(target: LOG_TARGET, cause = cause.as_str(), "this replica decides now"),
            None => tracing::info!(target: LOG_TARGET, "another replica decides; this one is on standby"),
        }
    }

    fn note(&self, queue: &mut Queue, retention: &mut Retention, role: &mut Role, update: Update) {
        match update {
            Update::Listed(request) => self.seen(queue, retention, request),
            Update::Complete(list) => {
                queue.retain(|key| !list.lacks(key));
                retention.retain(|key| !list.lacks(key));
            }
            Update::Applied(request) => {
                self.look_for_others(&request);
                if judge::decided_by_a_replica(&request) {
                    role.other_decided();
                }
                self.seen(queue, retention, request);
            }
            Update::Deleted(request) => {
                let key = key(&request);
                queue.gone(&key);
                retention.gone(&key);
            }
        }
    }

    /// Counts and logs an approval by another approver, which bypasses every check of this crate. Approvals in the initial list are not
    /// reported.
    fn look_for_others(&self, request: &Request) {
        let Some(by) =
            judge::approved_by_another(request, &self.active_rules.borrow().rules).map(|by| text::excerpt(by, text::MAX_NAME_CHARS))
        else {
            return;
        };
        let Some(uid) = request.metadata.uid.clone() else { return };
        let mut reported = self.reported.lock();
        if reported.contains(&uid) {
            return;
        }
        if reported.len() == MAX_REPORTED {
            reported.pop_front();
        }
        reported.push_back(uid);
        self.metrics.foreign.inc();
        let (namespace, name) = key(request);
        tracing::error!(
            target: LOG_TARGET, namespace,
            request = name,
            by,
            "another approver has approved a request of the agents' issuer: remove the issuer from cert-manager's own approver \
             (approveSignerNames of its chart)"
        );
    }

    fn seen(&self, queue: &mut Queue, retention: &mut Retention, request: Request) {
        let active_rules = self.active_rules.borrow();
        let by_an_agent = request.spec.username.as_ref().is_some_and(|name| active_rules.rules.agents.contains(name));
        let (key, node) = (key(&request), queue::node(&request, by_an_agent));
        if judge::is_ours(&request, &active_rules.rules) {
            retention.gone(&key);
            let approved = retention.waiting(&node);
            queue.seen(request, node, approved, Instant::now());
            return;
        }
        queue.gone(&key);
        match judge::settled(&request, &active_rules.rules, self.clock.now()) {
            Some(state) => retention.seen(&key, request.metadata.uid.as_deref().unwrap_or_default(), &node, state, Instant::now()),
            None => retention.gone(&key),
        }
    }
}

/// Returns the next change of a watch that is there, and waits forever without one.
async fn next_of(watch: &mut Option<RequestWatch>) -> Update {
    match watch {
        Some(watch) => watch.next().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
