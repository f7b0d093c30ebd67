//! Metrics of the approver.

use cert_manager::denied;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// Value of the label `decision`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Decided {
    /// The request was approved.
    approved,
    /// The request was denied.
    denied,
}

/// Value of the label `step`: the operation that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Step {
    /// Reading the pod.
    read_pod,
    /// Reading a request again after a conflict.
    read_request,
    /// Writing the decision.
    write,
    /// Creating the Event of a denial.
    event,
    /// Deleting an ended request.
    remove,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Decision {
    decision: Decided,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Error {
    step: Step,
}

/// Metrics of one replica. Clones share the values.
#[derive(Debug, Clone)]
pub struct Metrics {
    decisions: Family<Decision, Counter>,
    duration: Histogram,
    errors: Family<Error, Counter>,
    pub(super) pending: Gauge,
    pub(super) active: Gauge,
    pub(super) denied_nodes: Gauge,
    pub(super) conflicts: Counter,
    pub(super) live_reads: Counter,
    pub(super) foreign: Counter,
    pub(super) by_superseded: Counter,
    pub(super) removed: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            decisions: Family::default(),
            duration: Histogram::new([0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]),
            errors: Family::default(),
            pending: Gauge::default(),
            active: Gauge::default(),
            denied_nodes: Gauge::default(),
            conflicts: Counter::default(),
            live_reads: Counter::default(),
            foreign: Counter::default(),
            by_superseded: Counter::default(),
            removed: Counter::default(),
        }
    }
}

impl Metrics {
    /// Creates the metrics and registers them in `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        // Every reason has a series from the start, so that an alert sees the first denial as an increase.
        for reason in denied::ALL {
            drop(metrics.decisions.get_or_create(&Decision { decision: Decided::denied, reason }));
        }
        registry.register(
            "approver_decisions",
            "Requests that this replica has decided, by the denial's reason",
            metrics.decisions.clone(),
        );
        registry.register(
            "approver_decision_duration_seconds",
            "From a request's first sight to the written decision",
            metrics.duration.clone(),
        );
        registry.register(
            "approver_errors",
            "Failed requests to the API server; all but the creation of Events are retried",
            metrics.errors.clone(),
        );
        registry.register(
            "approver_pending",
            "Requests that wait for a decision; a replica on standby counts the same requests",
            metrics.pending.clone(),
        );
        registry.register(
            "approver_denied_nodes",
            "Nodes in deniedNodes of the ConfigMap, whose agents get no certificate",
            metrics.denied_nodes.clone(),
        );
        registry.register("approver_active", "1 while this replica decides, 0 while it is on standby", metrics.active.clone());
        registry.register(
            "approver_conflicts",
            "Decisions of this replica that were not written, because another replica had decided first",
            metrics.conflicts.clone(),
        );
        registry.register(
            "approver_pod_reads",
            "Live reads of pods, because the data of the watch was not sufficient",
            metrics.live_reads.clone(),
        );
        registry.register(
            "approver_foreign_approvals",
            "Requests of the agents' issuers that another approver has approved; after no manual approval, any value but 0 is a security problem",
            metrics.foreign.clone(),
        );
        registry.register(
            "approver_former_approvals",
            "Requests approved by a configuration that was replaced less than approver.overlap ago",
            metrics.by_superseded.clone(),
        );
        registry.register(
            "approver_requests_removed",
            "Requests that were denied, invalid, failed or signed, and that the approver has deleted",
            metrics.removed.clone(),
        );
        metrics
    }

    /// Registers the metrics and sets one series of each, for the reference of metrics.
    #[cfg(any(test, feature = "testing"))]
    pub fn sample(registry: &mut Registry) {
        use agent_runtime::metrics::every;
        let metrics = Self::register(registry);
        metrics.decided(Decided::approved, "none", 1.0);
        for step in every!(Step: read_pod, read_request, write, event, remove) {
            metrics.failed(step);
        }
    }

    pub(super) fn decided(&self, decision: Decided, reason: &'static str, seconds: f64) {
        self.decisions.get_or_create(&Decision { decision, reason }).inc();
        self.duration.observe(seconds);
    }

    pub(super) fn failed(&self, step: Step) {
        self.errors.get_or_create(&Error { step }).inc();
    }

    #[cfg(test)]
    pub(super) fn count(&self, decision: Decided, reason: &'static str) -> u64 {
        self.decisions.get_or_create(&Decision { decision, reason }).get()
    }

    #[cfg(test)]
    pub(super) fn errors(&self, step: Step) -> u64 {
        self.errors.get_or_create(&Error { step }).get()
    }
}
