//! The node-aware approver: it decides about the CertificateRequests of the agents' issuers, and nobody else does.
//!
//! An agent may ask cert-manager for any name; what keeps a stolen node from other nodes' identities is that the approver derives every
//! name anew from the pod, and asks where that pod runs ([`judge`]). Of several replicas one decides and the others are on standby ([`role`]); a
//! decision is written with the version of the request that was judged, so that of two the first counts. The caller runs
//! [`Approver::run`] and [`Pods::run`] side by side.

use std::{collections::VecDeque, fmt, sync::Arc};

use agent_kube::{
    self, RequestRate,
    labels::Resource,
    watch::{Selection, Signal},
};
use agent_runtime::{clock::Clock, text};
use cert_manager::{REQUESTS_PER_PAGE, Request};
use futures::{Stream, StreamExt};
use kube::{Api, Client, runtime::watcher};
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
pub mod role;
pub mod rules;

pub use active_rules::ActiveRules;
pub use metrics::Metrics;
pub use pods::Pods;

use queue::{Key, Queue, key};
use reconciler::{Outcome, Reconciler};
use replicas::Standing;
use role::{Cause, Role};

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::approver";

/// Requests to the API: one approver works for a thousand agents, and what an agent may do is no measure for it.
pub const RATE: RequestRate = RequestRate { per_second: 200, burst: 400 };
/// Requests that are worked on at once.
const WORKERS: usize = 16;
/// Requests that are left undecided at once, because a newer file may allow them. What comes beyond them is decided at once.
const MAX_DEFERRED: usize = 512;
/// Requests approved by others that are remembered, so that each is told once.
const MAX_REPORTED: usize = 1024;

/// What an approver is made of.
pub struct Parts {
    /// The way to the API.
    pub client: Client,
    /// The rules, the newest of which count. When they change, undecided requests are looked at again, even those that were none of theirs.
    pub active_rules: watch::Receiver<Arc<ActiveRules>>,
    /// The cluster's pods.
    pub pods: Pods,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// The name of this replica, for Events.
    pub instance: String,
    /// What the client counts.
    pub kube_metrics: agent_kube::Metrics,
    /// What the approver counts.
    pub metrics: Metrics,
}

/// One replica.
pub struct Approver {
    client: Client,
    active_rules: watch::Receiver<Arc<ActiveRules>>,
    reconciler: Arc<Reconciler>,
    standing: watch::Receiver<Standing>,
    may_have_others: bool,
    kube_metrics: agent_kube::Metrics,
    metrics: Metrics,
    /// The UIDs of requests that others have approved, as far as the log has told of them.
    reported: Mutex<VecDeque<String>>,
    synced: watch::Sender<bool>,
}

impl fmt::Debug for Approver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Approver").field("reconciler", &self.reconciler).finish_non_exhaustive()
    }
}

impl Approver {
    /// An approver that does nothing before it [runs](Self::run).
    pub fn new(parts: Parts) -> Self {
        let Parts { client, active_rules, pods, clock, instance, kube_metrics, metrics } = parts;
        let (standing, may_have_others) = (pods.standing(), pods.may_have_replicas());
        let reconciler = Arc::new(Reconciler::new(client.clone(), active_rules.clone(), pods, clock, instance, metrics.clone()));
        Self {
            client,
            active_rules,
            reconciler,
            standing,
            may_have_others,
            kube_metrics,
            metrics,
            reported: Mutex::default(),
            synced: watch::Sender::new(false),
        }
    }

    /// Becomes true when every request there is has been seen once, and stays so.
    pub fn synced(&self) -> watch::Receiver<bool> {
        self.synced.subscribe()
    }

    /// Decides for ever, or is on standby.
    pub async fn run(self) {
        let (mut signals, mut changes, mut standing) = (Box::pin(self.watch()), self.active_rules.clone(), self.standing.clone());
        let (mut queue, mut workers, mut resting) = (Queue::default(), JoinSet::<(Key, Outcome)>::new(), DelayQueue::<Key>::new());
        let mut issuers = changes.borrow_and_update().rules.issuers.clone();
        let mut role = Role::new(self.may_have_others);
        loop {
            role.stands_at(*standing.borrow_and_update(), Instant::now());
            let takeover = role.next(queue.has_ready(), Instant::now(), fastrand::f64());
            self.apply_role(role.decides());
            while role.decides().is_some()
                && workers.len() < WORKERS
                && let Some((key, item)) = queue.pop()
            {
                let (reconciler, may_defer) = (self.reconciler.clone(), resting.len() < MAX_DEFERRED);
                workers.spawn(async move { (key, reconciler.reconcile(item, may_defer).await) });
            }
            self.metrics.pending.set(i64::try_from(queue.len()).unwrap_or(i64::MAX));
            tokio::select! {
                signal = signals.next() => match signal {
                    Some(Signal::Event(event)) => self.note(&mut queue, &mut role, event),
                    Some(Signal::Trouble(..)) => {}
                    None => return,
                },
                Some(done) = workers.join_next(), if !workers.is_empty() => match done {
                    Ok((key, Outcome::Settled)) => queue.settled(&key),
                    Ok((key, Outcome::Conflict)) => {
                        queue.settled(&key);
                        self.metrics.conflicts.inc();
                        role.lost_conflict(Instant::now());
                    }
                    Ok((key, Outcome::Yielded)) => queue.given_back(&key),
                    Ok((key, Outcome::Failed)) => {
                        if let Some(pause) = queue.failed(&key) {
                            resting.insert(key, pause.mul_f64(0.5 + 0.5 * fastrand::f64()));
                        }
                    }
                    Ok((key, Outcome::Deferred(pause))) => {
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
                () = sleep_until(takeover.unwrap_or_else(Instant::now)), if takeover.is_some() => {}
                Ok(()) = standing.changed() => {}
                Ok(()) = changes.changed() => {
                    resting.clear();
                    queue.wake();
                    let newer = changes.borrow_and_update().rules.issuers.clone();
                    if newer != issuers {
                        // Requests that were nobody's business are not remembered: all are listed again.
                        (issuers, signals) = (newer, Box::pin(self.watch()));
                    }
                }
            }
        }
    }

    /// The requests of everywhere: an issuer of the whole cluster can be asked from any namespace, by anybody who may create requests.
    fn watch(&self) -> impl Stream<Item = Signal<Request>> + Send + use<> {
        let api: Api<Request> = Api::all(self.client.clone());
        let selection = Selection {
            resource: Resource::certificaterequests,
            name: "certificaterequests.cert-manager.io".to_owned(),
            namespace: None,
            config: watcher::Config::default().page_size(REQUESTS_PER_PAGE),
        };
        agent_kube::watch::watch(api, selection, self.kube_metrics.clone())
    }

    /// Opens or shuts the gate for writes, and logs a change of the role.
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

    fn note(&self, queue: &mut Queue, role: &mut Role, event: watcher::Event<Request>) {
        match event {
            watcher::Event::Init => queue.list_begins(),
            watcher::Event::InitApply(request) => {
                queue.listed(key(&request));
                self.seen(queue, request);
            }
            watcher::Event::InitDone => {
                queue.list_ends();
                if !self.synced.send_replace(true) {
                    tracing::info!(target: LOG_TARGET, undecided = queue.len(), "every request has been seen once");
                }
            }
            watcher::Event::Apply(request) => {
                self.look_for_others(&request);
                if judge::decided_by_a_replica(&request) {
                    role.other_decided();
                }
                self.seen(queue, request);
            }
            watcher::Event::Delete(request) => queue.gone(&key(&request)),
        }
    }

    /// Whoever else approves makes all of this worth nothing: the operator has to know. Approvals of before the start are not told.
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
            "somebody else has approved a request of the agents' issuer: take the issuer out of cert-manager's own approver \
             (approveSignerNames of its chart)"
        );
    }

    fn seen(&self, queue: &mut Queue, request: Request) {
        if judge::is_ours(&request, &self.active_rules.borrow().rules) {
            queue.seen(request, Instant::now());
        } else {
            queue.gone(&key(&request));
        }
    }
}

#[cfg(test)]
mod tests;
