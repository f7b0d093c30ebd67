//! Orders certificates, verifies them, publishes them into the store, and renews them.
//!
//! The [`planner`] decides, and this module performs its actions in one task. Each order runs in a task of its own, because an upstream
//! has no time limit. An order is dropped when its identity is forgotten, no profile issues it, or another one is answered first. A
//! failed renewal does not change the published certificate: it is counted, logged with its cause, and retried.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use agent_runtime::{
    clock::{self, Clock},
    telemetry::hush::LogLimiter,
};
use sds_server::{
    material::Svid,
    store::{Entry, Event, Status, Store},
    trust::{BundleSet, Trust},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use workload_identity::{Identity, IssuerName, PodRef};

use self::{
    metrics::Metrics,
    orders::{Orders, Report},
    plan::Plan,
    planner::{Action, Authority, Class, Id, Now, Planner},
    reissue::{Mark, Reissue},
};
use crate::issuer::{Error, Issued};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::rotation";

mod answers;
pub mod metrics;
mod orders;
pub mod plan;
pub mod planner;
pub mod reissue;
mod roots;
pub mod schedule;

/// Minimum difference between the two clocks that counts as a step. A smaller difference is drift.
const MIN_CLOCK_STEP: Duration = Duration::from_secs(2);

/// The workloads that may use an identity. A key stays for the retention after its last subscriber, but not after its last workload.
pub trait IdentityUsers: fmt::Debug + Send + Sync {
    /// Whether a workload on this node has `identity`.
    fn is_used(&self, identity: &Identity) -> bool;

    /// A counter that changes when a pod has ended.
    fn pod_terminations(&self) -> watch::Receiver<u64>;
}

/// Observes the results of issuance, in order to report them. Implementations must not block.
pub trait IssuanceObserver: fmt::Debug + Send + Sync {
    /// An order for the entry failed.
    fn failed(&self, entry: &Entry, error: &Error);

    /// The request of the entry is late at its upstream. `request` is its name, `why` the cause.
    fn waits(&self, entry: &Entry, request: &str, why: &str);

    /// After a step of the clock, the certificate of the entry is not valid and is withheld.
    fn withheld(&self, entry: &Entry);

    /// The entry has a new certificate, or a withheld one is served again.
    fn issued(&self, entry: &Entry, svid: &Svid);

    /// The entry was forgotten.
    fn forgotten(&self, entry: &Entry);
}

/// Inputs of rotation.
#[derive(Debug)]
pub struct Parts {
    /// The store into which certificates are published.
    pub store: Arc<Store>,
    /// Events of the store.
    pub events: mpsc::UnboundedReceiver<Event>,
    /// The plan in force.
    pub plan: watch::Receiver<Arc<Plan>>,
    /// Calls to reissue certificates.
    pub reissues: mpsc::Receiver<Reissue>,
    /// The trust bundles against which chains are verified.
    pub trust: watch::Receiver<Arc<BundleSet>>,
    /// Records the authorities in issued chains. `None` if they are not needed.
    pub authorities: Option<Trust>,
    /// Whether a trust bundle comes from elsewhere than the issuers. If so, no chain is verified before the bundle has arrived.
    pub await_bundle: bool,
    /// The wall clock.
    pub clock: Arc<dyn Clock>,
    /// The workloads that may use an identity. `None` if they are not known.
    pub identity_users: Option<Arc<dyn IdentityUsers>>,
    /// Observes the results. `None` if they are not observed.
    pub observer: Option<Arc<dyn IssuanceObserver>>,
    /// Metrics of rotation.
    pub metrics: Metrics,
}

/// State of the task.
struct Rotation {
    parts: Parts,
    planner: Planner,
    entries: HashMap<Id, Arc<Entry>>,
    orders: Orders,
    tasks: JoinSet<()>,
    /// Number of orders that were started. It identifies an order.
    attempts: u64,
    /// Channel for the reports of orders.
    reports: (mpsc::UnboundedSender<Report>, mpsc::UnboundedReceiver<Report>),
    /// Verified certificates that are not yet published.
    verified: HashMap<Id, Arc<Svid>>,
    /// Evidence pods that an approver rejected. The next order names another pod of the identity.
    rejected_evidence: HashMap<Id, PodRef>,
    /// Results of recent calls to reissue.
    reissue_marks: HashMap<Id, Mark>,
    /// Limits the lines about calls to reissue.
    reissue_lines: LogLimiter<&'static str>,
    /// Answers whose chain leads to no known root. They are verified again when the bundle changes.
    awaiting_anchor: HashMap<Id, Issued>,
    /// The issuers of which a certificate was renewed early for its chain.
    has_looked: BTreeSet<IssuerName>,
    /// Unresponsive issuers, with the name under which each was logged.
    unresponsive: BTreeMap<Authority, IssuerName>,
    /// Issuers that have series in the metrics.
    counted: BTreeSet<IssuerName>,
    last_seen: Now,
}

/// Runs rotation until `shutdown` is cancelled or the store is dropped. Orders in progress are then abandoned.
///
/// # Cancel safety
///
/// Dropping the future abandons all orders, and loses verified certificates that are not yet published.
pub async fn run(parts: Parts, shutdown: CancellationToken) {
    let clock = parts.clock.clone();
    let mut pod_terminations = parts.identity_users.as_ref().map(|identity_users| identity_users.pod_terminations());
    let mut rotation = Rotation::new(parts);
    rotation.count_issuers();
    let mut wall_at = rotation.last_seen.wall;
    let mut wall_sleep = clock.sleep_until(wall_at);
    loop {
        let (wall, mono) = rotation.advance();
        // Without a planned time, the present timer stays if it is in the future, because a new one for each event has a cost. One day
        // stands for "never". The clock wakes the task every minute in any case.
        let now = rotation.last_seen.wall;
        let wall = wall.unwrap_or(if wall_at > now { wall_at } else { now + Duration::from_secs(86_400) });
        if wall != wall_at {
            (wall_at, wall_sleep) = (wall, clock.sleep_until(wall));
        }
        let mono_sleep = async {
            match mono {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => break,
            event = rotation.parts.events.recv() => match event {
                Some(event) => rotation.event(event),
                None => break,
            },
            Some(report) = rotation.reports.1.recv() => rotation.reported(report),
            // The order has already reported its end.
            Some(_) = rotation.tasks.join_next() => {}
            Ok(()) = rotation.parts.trust.changed() => rotation.bundle_changed(),
            Ok(()) = rotation.parts.plan.changed() => rotation.reconfigured(),
            Some(call) = rotation.parts.reissues.recv() => rotation.reissue(call),
            () = pod_termination(pod_terminations.as_mut()) => rotation.purge(),
            () = &mut wall_sleep => wall_sleep = clock.sleep_until(wall_at),
            () = mono_sleep => {}
        }
    }
    rotation.tasks.shutdown().await;
}

/// Returns when a pod has ended. Never returns if the pods are not known.
async fn pod_termination(pod_terminations: Option<&mut watch::Receiver<u64>>) {
    let told = match pod_terminations {
        Some(pod_terminations) => pod_terminations.changed().await.is_ok(),
        None => false,
    };
    if !told {
        std::future::pending::<()>().await;
    }
}

impl Rotation {
    fn new(parts: Parts) -> Self {
        let last_seen = Now { wall: parts.clock.now(), mono: Instant::now() };
        let planner = Planner::new(parts.plan.borrow().retention(), fastrand::u64(..));
        Self {
            parts,
            planner,
            entries: HashMap::new(),
            orders: Orders::default(),
            tasks: JoinSet::new(),
            attempts: 0,
            reports: mpsc::unbounded_channel(),
            verified: HashMap::new(),
            rejected_evidence: HashMap::new(),
            reissue_marks: HashMap::new(),
            reissue_lines: LogLimiter::default(),
            awaiting_anchor: HashMap::new(),
            has_looked: BTreeSet::new(),
            unresponsive: BTreeMap::new(),
            counted: BTreeSet::new(),
            last_seen,
        }
    }

    fn now(&self) -> Now {
        Now { wall: self.parts.clock.now(), mono: Instant::now() }
    }

    /// Performs all actions that are due. Returns the times, of either clock, at which to call it again.
    fn advance(&mut self) -> (Option<SystemTime>, Option<Instant>) {
        self.notice_steps();
        while let Some(action) = self.planner.poll(self.now()) {
            match action {
                Action::Start(id) => self.start(id),
                Action::Publish(id) => self.publish(id),
                Action::Abandon(id) => {
                    // Without an order, the plan had no profile for the entry when the planner started it. The planner tries again.
                    let order = self.orders.abort_latest(id);
                    let after = order.as_ref().map_or(planner::PREPARING, |order| order.started.elapsed());
                    let error = Error::Timeout { action: "reaching the issuer".into(), after };
                    self.failed(id, order.and_then(|order| order.evidence), &error);
                }
                Action::SetAside(id) => self.orders.set_aside(id),
                Action::Withdraw(id) => self.orders.withdraw(id),
                Action::Forget(id) => {
                    let retention = self.parts.plan.borrow().retention();
                    self.forget(id, retention);
                }
            }
        }
        let metrics = &self.parts.metrics;
        metrics.in_flight(self.orders.len(), self.planner.parked());
        for class in [Class::Ending, Class::Waiting, Class::Routine] {
            metrics.queued(class, self.planner.queued(class));
        }
        self.log_unresponsive();
        self.planner.next_wake()
    }

    /// Logs each unresponsive issuer once, under the name that a profile uses, and logs its recovery.
    fn log_unresponsive(&mut self) {
        let now = self.now();
        let unresponsive: BTreeSet<Authority> = self.planner.unresponsive(now).cloned().collect();
        self.unresponsive.retain(|authority, issuer| {
            let stays = unresponsive.contains(authority);
            if !stays {
                info!(target: LOG_TARGET, %issuer, "the issuer gets requests as usual again");
            }
            stays
        });
        for authority in unresponsive {
            if self.unresponsive.contains_key(&authority) {
                continue;
            }
            let profiles = self.entries.values().map(|entry| &entry.identity.profile);
            let Some(issuer) = profiles.filter(|profile| profile.authority == authority.0).map(|profile| profile.issuer.clone()).next()
            else {
                continue;
            };
            warn!(target: LOG_TARGET, %issuer, "the issuer is unresponsive: its pending requests stay, and it gets one more request a minute");
            self.unresponsive.insert(authority, issuer);
        }
    }

    /// Compares the clocks. A difference means that the wall clock was stepped, or that the machine was suspended.
    fn notice_steps(&mut self) {
        let now = self.now();
        let expected = self.last_seen.wall + now.mono.duration_since(self.last_seen.mono);
        self.last_seen = now;
        let (forward, by) = match now.wall.duration_since(expected) {
            Ok(by) => (true, by),
            Err(error) => (false, error.duration()),
        };
        if by < MIN_CLOCK_STEP {
            return;
        }
        warn!(
            target: LOG_TARGET, seconds = by.as_secs(),
            direction = if forward { "forward" } else { "backward" },
            "the clock was stepped; every certificate is judged again"
        );
        self.parts.metrics.clock_jump(forward);
        self.planner.clock_stepped(now);
        for entry in self.entries.values() {
            entry.reconsider();
            let Some(svid) = entry.current().filter(|_| entry.is_leased()) else { continue };
            let (was_good, is_good) = (svid.chain.validity.is_live(expected), svid.chain.validity.is_live(now.wall));
            let (identity, serial) = (&entry.identity, &svid.chain.serial);
            if was_good && !is_good {
                warn!(target: LOG_TARGET, %identity, %serial, not_after = %clock::rfc3339(svid.chain.validity.not_after), "certificate withheld: by the clock it is not valid now");
                if let Some(observer) = &self.parts.observer {
                    observer.withheld(entry);
                }
            } else if is_good && !was_good {
                info!(target: LOG_TARGET, %identity, %serial, "certificate served again: by the clock it is valid now");
                if let Some(observer) = &self.parts.observer {
                    observer.issued(entry, &svid);
                }
            }
        }
    }

    fn event(&mut self, event: Event) {
        let now = self.now();
        let (Event::Wanted(entry, _) | Event::Idle(entry)) = &event;
        let (id, is_leased) = (entry.id, entry.is_leased());
        if let Event::Wanted(entry, asked) = event {
            // Each authority has one queue, because the name of an issuer may move to another one.
            let authority = Authority(entry.identity.profile.authority.clone());
            // A client that fetches may have left again. The planner then still starts the order that it found due.
            let demand = if is_leased { entry.demand() } else { Some(asked).filter(|_| entry.current().is_none()) };
            self.planner.wanted(now, id, &authority, demand);
            if self.entries.insert(id, entry).is_none() && self.identity_of(id).is_none() {
                self.planner.retire(now, id, true);
            }
        }
        self.look_for_a_chain([id]);
        // The subscriber may have left, or another one may have come: the state of the entry counts, not the event.
        if !is_leased {
            self.planner.idle(now, id);
            self.forget_orphan(id);
        }
    }

    fn publish(&mut self, id: Id) {
        let (Some(entry), Some(svid)) = (self.entries.get(&id), self.verified.remove(&id)) else { return };
        let now = self.now();
        let old = entry.current();
        if let Some(old) = &old {
            self.parts.metrics.renewed(now.wall.duration_since(old.renew_at).unwrap_or_default());
        }
        debug!(
            target: LOG_TARGET, identity = %entry.identity, serial = %svid.chain.serial, version = svid.version(), renewal = old.is_some(), "certificate published"
        );
        if let Some(observer) = &self.parts.observer {
            observer.issued(entry, &svid);
        }
        let next_attempt = Some(svid.renew_at);
        entry.publish(svid);
        entry.set_status(|status| *status = Status { next_attempt, ..Status::default() });
        self.replaced(id);
    }

    /// Forgets the entries that no workload may use. A pod ends before its streams do: the store reports their entries as idle later.
    fn purge(&mut self) {
        for id in self.entries.keys().copied().collect::<Vec<_>>() {
            self.forget_orphan(id);
        }
    }

    /// Forgets an entry that has a key, but neither a subscriber nor a workload that may use it. A record of failures without a key stays
    /// for the retention.
    fn forget_orphan(&mut self, id: Id) {
        let (Some(identity_users), Some(entry)) = (&self.parts.identity_users, self.entries.get(&id)) else { return };
        let has_key =
            entry.current().is_some() || self.orders.has(id) || self.verified.contains_key(&id) || self.awaiting_anchor.contains_key(&id);
        if has_key && !entry.is_leased() && !identity_users.is_used(&entry.identity) {
            self.forget(id, Duration::ZERO);
        }
    }

    fn forget(&mut self, id: Id, retention: Duration) {
        let Some(entry) = self.entries.get(&id) else { return self.planner.forgotten(id) };
        if self.parts.store.forget(entry, retention) {
            debug!(target: LOG_TARGET, identity = %entry.identity, ?retention, "certificate forgotten: no client uses it");
            self.planner.forgotten(id);
            let forgotten = self.entries.remove(&id);
            if let (Some(observer), Some(entry)) = (&self.parts.observer, forgotten) {
                observer.forgotten(&entry);
            }
            self.verified.remove(&id);
            self.awaiting_anchor.remove(&id);
            self.rejected_evidence.remove(&id);
            self.reissue_marks.remove(&id);
            self.orders.abort_all(id);
        } else if !entry.is_leased() {
            let now = self.now();
            self.planner.idle(now, id);
        }
    }
}

#[cfg(test)]
mod tests;
