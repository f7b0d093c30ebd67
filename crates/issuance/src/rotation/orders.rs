//! One order, from its start to its verified answer. Each order runs in a task of its own.

use std::{collections::HashMap, sync::Arc};

use agent_runtime::clock::Clock;
use sds_server::trust::BundleSet;
use tokio::{
    sync::{mpsc, watch},
    task::AbortHandle,
    time::Instant,
};
use tracing::{debug, warn};
use workload_identity::{Identity, PodRef};

use super::{Id, Rotation, roots::bundle_moved_on};
use crate::issuer::{Error, Issued, Order, Pending, Progress, Retry, verify};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::rotation::orders";

/// A report of an order. The reports of an order arrive in order.
pub(super) struct Report {
    id: Id,
    /// Number of the order. An entry may have several orders, and an abandoned one may still report.
    attempt: u64,
    event: OrderEvent,
}

enum OrderEvent {
    /// The upstream has the request, in this state.
    Submitted(Pending),
    /// The answer, verified or not. It is boxed because it is much larger than the other variants.
    Ended(Box<Ended>),
    /// The task ended without an answer.
    Lost,
}

type Ended = Result<(Issued, verify::Verified), (Error, Option<Issued>)>;

/// Sends the reports of an order. If it is dropped before the order has ended, it reports the order as lost.
struct Reporter {
    id: Id,
    attempt: u64,
    reports: mpsc::UnboundedSender<Report>,
    has_ended: bool,
}

impl Reporter {
    fn end(mut self, result: Ended) {
        self.has_ended = true;
        self.report(OrderEvent::Ended(Box::new(result)));
    }

    fn report(&self, event: OrderEvent) {
        // Sending fails only after rotation has ended, when no report is needed.
        let _ = self.reports.send(Report { id: self.id, attempt: self.attempt, event });
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        if !self.has_ended {
            self.report(OrderEvent::Lost);
        }
    }
}

/// An order in progress.
pub(super) struct Running {
    task: AbortHandle,
    attempt: u64,
    pub(super) started: Instant,
    pub(super) evidence: Option<PodRef>,
    /// The last report of its request.
    pending: Option<Pending>,
}

impl Running {
    /// Name of its request, if the upstream has it.
    pub(super) fn request(&self) -> Option<&str> {
        self.pending.as_ref().map(|pending| &*pending.request)
    }
}

/// The orders in progress, by entry.
#[derive(Default)]
pub(super) struct Orders {
    latest: HashMap<Id, Running>,
    /// Pending orders that were set aside because another one starts beside them, the oldest first. The planner limits their number.
    aside: HashMap<Id, Vec<Running>>,
}

impl Orders {
    /// Number of orders.
    pub(super) fn len(&self) -> usize {
        self.latest.len() + self.aside.values().map(Vec::len).sum::<usize>()
    }

    /// Whether the entry has an order.
    pub(super) fn has(&self, id: Id) -> bool {
        self.latest.contains_key(&id) || self.aside.contains_key(&id)
    }

    /// Ends the latest order of an entry, and returns it.
    pub(super) fn abort_latest(&mut self, id: Id) -> Option<Running> {
        self.latest.remove(&id).inspect(|order| order.task.abort())
    }

    /// Ends all orders of an entry.
    pub(super) fn abort_all(&mut self, id: Id) {
        let orders = self.latest.remove(&id).into_iter().chain(self.aside.remove(&id).unwrap_or_default());
        orders.for_each(|order| order.task.abort());
    }

    /// Sets the latest order of an entry aside.
    pub(super) fn set_aside(&mut self, id: Id) {
        if let Some(order) = self.latest.remove(&id) {
            self.aside.entry(id).or_default().push(order);
        }
    }

    /// Ends the youngest order of an entry that was set aside.
    pub(super) fn withdraw(&mut self, id: Id) {
        if let Some(order) = self.aside.get_mut(&id).and_then(Vec::pop) {
            order.task.abort();
        }
        self.aside.retain(|_, orders| !orders.is_empty());
    }

    /// The request of an entry to show to operators: that of the latest order, or else the youngest one set aside.
    pub(super) fn pending(&self, id: Id) -> Option<&Pending> {
        let aside = self.aside.get(&id).into_iter().flatten().rev();
        self.latest.get(&id).into_iter().chain(aside).find_map(|order| order.pending.as_ref())
    }

    /// Returns the order of this number. The position is that among the orders set aside, `None` for the latest order.
    fn find(&mut self, id: Id, attempt: u64) -> Option<(&mut Running, Option<usize>)> {
        let aside = self.aside.get_mut(&id).into_iter().flatten().enumerate().map(|(index, order)| (order, Some(index)));
        self.latest.get_mut(&id).map(|order| (order, None)).into_iter().chain(aside).find(|(order, _)| order.attempt == attempt)
    }

    fn take(&mut self, id: Id, index: Option<usize>) -> Option<Running> {
        let Some(index) = index else { return self.latest.remove(&id) };
        let order = self.aside.get_mut(&id).filter(|orders| index < orders.len()).map(|orders| orders.remove(index));
        self.aside.retain(|_, orders| !orders.is_empty());
        order
    }
}

impl Rotation {
    pub(super) fn start(&mut self, id: Id) {
        let (Some(entry), Some(identity)) = (self.entries.get(&id), self.identity_of(id)) else {
            // The planner starts no order for a retired entry, but the plan may have changed since.
            return self.release(self.now(), id, None);
        };
        let issuer = self.parts.plan.borrow().issuer(&identity.profile.issuer).cloned();
        let Some(issuer) = issuer else {
            let error = Error::Configuration(format!(
                "profile {} names issuer {}, which is not configured",
                identity.profile.name, identity.profile.issuer
            ));
            return self.failed(id, None, &error);
        };
        let evidence = entry.evidence(self.rejected_evidence.get(&id));
        self.attempts += 1;
        let (attempt, reports) = (self.attempts, self.reports.0.clone());
        let progress = Progress::reporting({
            let reports = reports.clone();
            move |pending| drop(reports.send(Report { id, attempt, event: OrderEvent::Submitted(pending) }))
        });
        let order = Order { identity: identity.clone(), evidence: evidence.clone(), progress };
        debug!(target: LOG_TARGET, %identity, issuer = %identity.profile.issuer, "certificate ordered");
        if let Some(pending) = self.orders.pending(id) {
            let left = entry.current().map(|svid| svid.chain.validity.remaining(self.parts.clock.now()).as_secs());
            warn!(
                target: LOG_TARGET, %identity,
                issuer = %identity.profile.issuer,
                request = %pending.request,
                valid_for_seconds = left,
                "the request is not answered in time; another one is made beside it"
            );
        }
        let judge =
            Judge { identity, trust: self.parts.trust.clone(), await_bundle: self.parts.await_bundle, clock: self.parts.clock.clone() };
        let reporter = Reporter { id, attempt, reports, has_ended: false };
        let task = self.tasks.spawn(async move {
            let result = match issuer.issue(order).await {
                Ok(issued) => judge.judge(issued).await,
                Err(error) => Err((error, None)),
            };
            reporter.end(result);
        });
        self.awaiting_anchor.remove(&id);
        self.orders.latest.insert(id, Running { task, attempt, started: Instant::now(), evidence, pending: None });
    }

    /// Handles a report, unless its order was abandoned.
    pub(super) fn reported(&mut self, Report { id, attempt, event }: Report) {
        let Some((order, index)) = self.orders.find(id, attempt) else { return };
        if let OrderEvent::Submitted(pending) = event {
            order.pending = Some(pending.clone());
            return self.submitted(id, index, &pending);
        }
        let Some(order) = self.orders.take(id, index) else { return };
        match event {
            OrderEvent::Ended(result) => self.answered(id, &order, index, *result),
            OrderEvent::Lost | OrderEvent::Submitted(_) => self.lost(id, order, index),
        }
    }

    fn submitted(&mut self, id: Id, index: Option<usize>, pending: &Pending) {
        if index.is_none() {
            self.planner.submitted(self.now(), id);
        }
        let Some(entry) = self.entries.get(&id) else { return };
        if let (true, Some(observer), Some(why)) = (pending.is_late, &self.parts.observer, &pending.waits_for) {
            observer.waits(entry, &pending.request, why);
        }
        self.show_pending(id);
    }

    /// Shows the request of the entry in its status.
    pub(super) fn show_pending(&self, id: Id) {
        let Some(entry) = self.entries.get(&id) else { return };
        let (request, waits_for) = self.orders.pending(id).map(|pending| (pending.request.clone(), pending.waits_for.clone())).unzip();
        entry.set_status(|status| (status.request, status.waits_for) = (request, waits_for.flatten()));
    }

    fn answered(&mut self, id: Id, order: &Running, index: Option<usize>, result: Ended) {
        let evidence = order.evidence.clone();
        match result {
            Ok((issued, verified)) if self.is_current(id, verified.anchor.as_ref()) => {
                self.orders.abort_all(id);
                self.issued(id, issued, &verified, Some(order), index);
            }
            Ok((issued, _)) => {
                self.awaiting_anchor.insert(id, issued);
                self.order_failed(id, evidence, index, &bundle_moved_on());
            }
            Err((error, issued)) => {
                if let (Error::InvalidCertificate(verify::Error::Path { .. }), Some(issued)) = (&error, issued) {
                    self.awaiting_anchor.insert(id, issued);
                }
                self.order_failed(id, evidence, index, &error);
            }
        }
    }

    fn lost(&mut self, id: Id, order: Running, index: Option<usize>) {
        let message = "the order's task ended without an answer".to_owned();
        let error = Error::Api { action: "issuing a certificate".into(), message, retry: Retry::Backoff };
        self.order_failed(id, order.evidence, index, &error);
    }
}

/// Verifies an answer in the task of its order.
struct Judge {
    identity: Arc<Identity>,
    trust: watch::Receiver<Arc<BundleSet>>,
    await_bundle: bool,
    clock: Arc<dyn Clock>,
}

impl Judge {
    async fn judge(mut self, mut issued: Issued) -> Result<(Issued, verify::Verified), (Error, Option<Issued>)> {
        if self.await_bundle && self.trust.wait_for(|set| set.own.is_some()).await.is_err() {
            return Err((Error::Configuration("the trust bundle's owner has ended".into()), None));
        }
        issued.chain = issued.chain.in_order(self.clock.now());
        let set = self.trust.borrow().clone();
        let bundle = set.own.as_ref().map(|bundle| &bundle.roots);
        let now = self.clock.now();
        let verified = verify::verify(&self.identity, &issued.key, &issued.chain, bundle, now);
        match verified.and_then(|verified| verify::not_revoked(&issued.chain, &set, now).map(|()| verified)) {
            Ok(verified) => Ok((issued, verified)),
            Err(error) => Err((error.into(), Some(issued))),
        }
    }
}
