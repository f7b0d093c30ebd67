//! What the approver counts.

use cert_manager::denied;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// What was decided, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Decided {
    /// Yes.
    approved,
    /// No.
    denied,
}

/// What failed, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Step {
    /// Reading the pod.
    read_pod,
    /// Reading a request again that somebody else had changed.
    read_request,
    /// Writing the decision.
    write,
    /// Telling of a denial by an Event.
    event,
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

/// See the module.
#[derive(Debug, Clone)]
pub struct Metrics {
    decisions: Family<Decision, Counter>,
    duration: Histogram,
    errors: Family<Error, Counter>,
    pub(super) pending: Gauge,
    pub(super) active: Gauge,
    pub(super) conflicts: Counter,
    pub(super) live_reads: Counter,
    pub(super) foreign: Counter,
    pub(super) by_superseded: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            decisions: Family::default(),
            duration: Histogram::new([0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]),
            errors: Family::default(),
            pending: Gauge::default(),
            active: Gauge::default(),
            conflicts: Counter::default(),
            live_reads: Counter::default(),
            foreign: Counter::default(),
            by_superseded: Counter::default(),
        }
    }
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        // The first denial is the one to be woken for.
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
        registry.register("approver_errors", "Calls to the API that failed, and are made again (Events are not)", metrics.errors.clone());
        registry.register(
            "approver_pending",
            "Requests that wait for a decision; a replica on standby counts those that wait for the other",
            metrics.pending.clone(),
        );
        registry.register("approver_active", "1 while this replica decides, 0 while it is on standby", metrics.active.clone());
        registry.register(
            "approver_conflicts",
            "Decisions of this replica that were not written, because another one had decided",
            metrics.conflicts.clone(),
        );
        registry.register(
            "approver_pod_reads",
            "Pods that were read live, because the watch did not tell enough",
            metrics.live_reads.clone(),
        );
        registry.register(
            "approver_foreign_approvals",
            "Requests of the agents' issuers that somebody else has approved; anything but 0 is a hole",
            metrics.foreign.clone(),
        );
        registry.register(
            "approver_former_approvals",
            "Requests that were approved by a configuration which has been replaced, within approver.overlap",
            metrics.by_superseded.clone(),
        );
        metrics
    }

    /// Registers and counts one of everything, for the reference.
    #[cfg(any(test, feature = "testing"))]
    pub fn sample(registry: &mut Registry) {
        use agent_runtime::metrics::every;
        let metrics = Self::register(registry);
        metrics.decided(Decided::approved, "none", 1.0);
        for step in every!(Step: read_pod, read_request, write, event) {
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
