//! One order, from its start to its verified answer. Each order runs in a task of its own.

use std::sync::Arc;

use agent_runtime::clock::Clock;
use sds_server::trust::BundleSet;
use tokio::{
    sync::{mpsc, watch},
    task::AbortHandle,
    time::Instant,
};
use tracing::debug;
use workload_identity::{Identity, PodRef};

use super::{Id, Rotation, roots::bundle_moved_on};
use crate::issuer::{Error, Issued, Order, Pending, Progress, Retry, verify};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::rotation::orders";

/// A report of an order. The reports of an order arrive in order.
pub(super) struct Report {
    id: Id,
    /// Number of the order. The orders of an entry follow each other, and an abandoned one may still report.
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
    pub(super) task: AbortHandle,
    attempt: u64,
    pub(super) started: Instant,
    pub(super) evidence: Option<PodRef>,
}

impl Rotation {
    pub(super) fn start(&mut self, id: Id) {
        let Some(entry) = self.entries.get(&id) else { return };
        // The planner starts no order for a retired entry.
        let Some(identity) = self.identity_of(id) else { return };
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
        self.orders.insert(id, Running { task, attempt, started: Instant::now(), evidence });
    }

    /// Handles a report, unless its order was abandoned.
    pub(super) fn reported(&mut self, Report { id, attempt, event }: Report) {
        if self.orders.get(&id).is_none_or(|order| order.attempt != attempt) {
            return;
        }
        match event {
            OrderEvent::Submitted(pending) => self.submitted(id, pending),
            OrderEvent::Ended(result) => self.answered(id, *result),
            OrderEvent::Lost => self.lost(id),
        }
    }

    fn submitted(&mut self, id: Id, pending: Pending) {
        self.planner.submitted(self.now(), id);
        let Some(entry) = self.entries.get(&id) else { return };
        let Pending { request, waits_for, is_late } = pending;
        if let (true, Some(observer), Some(why)) = (is_late, &self.parts.observer, &waits_for) {
            observer.waits(entry, &request, why);
        }
        entry.set_status(|status| (status.request, status.waits_for) = (Some(request), waits_for));
    }

    fn answered(&mut self, id: Id, result: Ended) {
        let Some(order) = self.orders.remove(&id) else { return };
        match result {
            Ok((issued, verified)) if self.is_current(id, verified.anchor.as_ref()) => {
                self.issued(id, issued, &verified, order.started.elapsed());
            }
            Ok((issued, _)) => {
                self.awaiting_anchor.insert(id, issued);
                self.failed(id, order.evidence, &bundle_moved_on());
            }
            Err((error, issued)) => {
                if let (Error::InvalidCertificate(verify::Error::Path { .. }), Some(issued)) = (&error, issued) {
                    self.awaiting_anchor.insert(id, issued);
                }
                self.failed(id, order.evidence, &error);
            }
        }
    }

    fn lost(&mut self, id: Id) {
        let evidence = self.orders.remove(&id).and_then(|order| order.evidence);
        let message = "the order's task ended without an answer".to_owned();
        let error = Error::Api { action: "issuing a certificate".into(), message, retry: Retry::Backoff };
        self.failed(id, evidence, &error);
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
    async fn judge(mut self, issued: Issued) -> Result<(Issued, verify::Verified), (Error, Option<Issued>)> {
        if self.await_bundle && self.trust.wait_for(|set| set.own.is_some()).await.is_err() {
            return Err((Error::Configuration("the trust bundle's owner has ended".into()), None));
        }
        let set = self.trust.borrow().clone();
        let bundle = set.own.as_ref().map(|bundle| &bundle.roots);
        match verify::verify(&self.identity, &issued.key, &issued.chain, bundle, self.clock.now()) {
            Ok(verified) => Ok((issued, verified)),
            Err(error) => Err((error.into(), Some(issued))),
        }
    }
}
