//! One order from its start to its answer: in a task of its own, with the issuer, and verified there.

use std::sync::Arc;

use agent_runtime::clock::Clock;
use sds_server::trust::BundleSet;
use tokio::{sync::watch, task::AbortHandle, time::Instant};
use tracing::debug;
use workload_identity::{Identity, PodRef};

use super::{Id, Rotation, roots::bundle_moved_on};
use crate::issuer::{Error, Issued, Order, Pending, Progress, Retry, Stage, verify};

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::rotation::orders";

/// An order that its upstream has, and how far it is there.
pub(super) type Submitted = (Id, Pending);

/// An order under way.
pub(super) struct Running {
    pub(super) task: AbortHandle,
    pub(super) started: Instant,
    pub(super) evidence: Option<PodRef>,
}

/// What an order came to.
pub(super) struct Answer {
    pub(super) id: Id,
    pub(super) result: Result<(Issued, verify::Verified), (Error, Option<Issued>)>,
}

impl Rotation {
    pub(super) fn start(&mut self, id: Id) {
        let Some(entry) = self.entries.get(&id) else { return };
        // The planner starts nothing that is not in force.
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
        let (progress, stage) = Progress::new();
        let order = Order { identity: identity.clone(), evidence: evidence.clone(), progress };
        debug!(target: LOG_TARGET, %identity, issuer = %identity.profile.issuer, "certificate ordered");
        let judge =
            Judge { identity, trust: self.parts.trust.clone(), await_bundle: self.parts.await_bundle, clock: self.parts.clock.clone() };
        let submitted = self.submitted.0.clone();
        let task = self.tasks.spawn(async move {
            let tell = async move {
                let mut stage = stage;
                while stage.changed().await.is_ok() {
                    if let Stage::Submitted(pending) = &*stage.borrow_and_update() {
                        let _ = submitted.send((id, pending.clone()));
                    }
                }
                std::future::pending().await
            };
            let work = async move {
                let issued = issuer.issue(order).await.map_err(|error| (error, None))?;
                judge.judge(issued).await
            };
            tokio::select! {
                biased;
                result = work => Answer { id, result },
                answer = tell => answer,
            }
        });
        self.awaiting_anchor.remove(&id);
        self.orders.insert(id, Running { task, started: Instant::now(), evidence });
    }

    pub(super) fn submitted(&mut self, id: Id, pending: Pending) {
        if self.orders.contains_key(&id) {
            let now = self.now();
            self.planner.submitted(now, id);
            let Some(entry) = self.entries.get(&id) else { return };
            let Pending { request, waits_for, is_late } = pending;
            if let (true, Some(observer), Some(why)) = (is_late, &self.parts.observer, &waits_for) {
                observer.waits(entry, &request, why);
            }
            entry.set_status(|status| (status.request, status.waits_for) = (Some(request), waits_for));
        }
    }

    pub(super) fn answered(&mut self, answer: Answer) {
        let id = answer.id;
        // What the order told before it ended is not taken for its successor's.
        while let Ok((id, pending)) = self.submitted.1.try_recv() {
            self.submitted(id, pending);
        }
        // An abandoned order may still have answered.
        let Some(order) = self.orders.remove(&id) else { return };
        match answer.result {
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

    pub(super) fn lost(&mut self, error: &tokio::task::JoinError) {
        let Some(id) = self.orders.iter().find(|(_, order)| order.task.id() == error.id()).map(|(id, _)| *id) else { return };
        let evidence = self.orders.remove(&id).and_then(|order| order.evidence);
        let error = Error::Api {
            action: "issuing a certificate".into(),
            message: format!("the order's task ended: {error}"),
            retry: Retry::Backoff,
        };
        self.failed(id, evidence, &error);
    }
}

/// Judges an answer in the order's own task.
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
