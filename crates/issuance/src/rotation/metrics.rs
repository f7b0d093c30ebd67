//! Metrics of rotation.

use std::time::Duration;

use agent_runtime::metrics::every;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use workload_identity::IssuerName;

use super::planner::Class;
use crate::issuer::{Outcome, Phase};

/// Labels of `issuances_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct IssuanceLabels {
    issuer: String,
    result: IssuanceResult,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
enum IssuanceResult {
    ok,
    denied,
    failed,
    timeout,
    api_error,
    invalid_certificate,
}

const RESULTS: [IssuanceResult; 6] = every!(IssuanceResult: ok, denied, failed, timeout, api_error, invalid_certificate);

impl From<Outcome> for IssuanceResult {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Ok => Self::ok,
            Outcome::Denied => Self::denied,
            Outcome::Failed => Self::failed,
            Outcome::Timeout => Self::timeout,
            Outcome::ApiError => Self::api_error,
            Outcome::InvalidCertificate => Self::invalid_certificate,
        }
    }
}

/// Labels of `issuance_duration_seconds`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabels {
    issuer: String,
    phase: PhaseName,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
enum PhaseName {
    create,
    approve,
    sign,
}

const PHASES: [PhaseName; 3] = every!(PhaseName: create, approve, sign);

/// Labels of `issuance_queue_length`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PriorityLabel {
    priority: Priority,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
enum Priority {
    ending,
    waiting,
    routine,
}

/// Labels of `renewals_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RenewalLabel {
    result: RenewalResult,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
enum RenewalResult {
    ok,
    error,
}

/// Labels of `clock_jumps_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabel {
    direction: Direction,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
enum Direction {
    forward,
    backward,
}

/// Rotation's metrics.
#[derive(Debug, Clone)]
pub struct Metrics {
    issuances: Family<IssuanceLabels, Counter>,
    durations: Family<PhaseLabels, Histogram>,
    in_flight: Gauge,
    parked: Gauge,
    queued: Family<PriorityLabel, Gauge>,
    renewals: Family<RenewalLabel, Counter>,
    lag: Histogram,
    jumps: Family<DirectionLabel, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            issuances: Family::default(),
            durations: Family::new_with_constructor(|| {
                Histogram::new([0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0])
            }),
            in_flight: Gauge::default(),
            parked: Gauge::default(),
            queued: Family::default(),
            renewals: Family::default(),
            lag: Histogram::new([0.1, 1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 28_800.0]),
            jumps: Family::default(),
        }
    }
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        registry.register("issuances", "Orders answered, by issuer and result", m.issuances.clone());
        registry.register_with_unit("issuance_duration", "Duration of the phases of an issuance", Unit::Seconds, m.durations.clone());
        registry.register("issuances_in_flight", "Orders under way, parked ones included", m.in_flight.clone());
        registry.register("issuances_parked", "Orders that are pending at their issuer and occupy no slot", m.parked.clone());
        registry.register("issuance_queue_length", "Orders that wait for a slot", m.queued.clone());
        registry.register("renewals", "Attempts to replace a certificate that is in use", m.renewals.clone());
        registry.register_with_unit(
            "renewal_lag",
            "How long after its planned moment a replacement was published",
            Unit::Seconds,
            m.lag.clone(),
        );
        registry.register("clock_jumps", "Steps of the wall clock, suspended time included", m.jumps.clone());
        // The series begin at zero. Otherwise the first event would not be an increase.
        for result in every!(RenewalResult: ok, error) {
            drop(m.renewals.get_or_create(&RenewalLabel { result }));
        }
        for direction in every!(Direction: forward, backward) {
            drop(m.jumps.get_or_create(&DirectionLabel { direction }));
        }
        m
    }

    /// Adds the series of an issuer, which begin at zero. Otherwise its first failure would not be an increase.
    pub fn add_issuer(&self, issuer: &IssuerName) {
        for result in RESULTS {
            drop(self.issuances.get_or_create(&IssuanceLabels { issuer: issuer.to_string(), result }));
        }
    }

    /// Removes the series of an issuer that is no longer configured.
    pub fn remove_issuer(&self, issuer: &IssuerName) {
        for result in RESULTS {
            self.issuances.remove(&IssuanceLabels { issuer: issuer.to_string(), result });
        }
        for phase in PHASES {
            self.durations.remove(&PhaseLabels { issuer: issuer.to_string(), phase });
        }
    }

    /// Registers all metrics and counts one event of each, for the reference of metrics.
    #[cfg(any(test, feature = "testing"))]
    pub fn sample(registry: &mut Registry) {
        let metrics = Self::register(registry);
        let issuer = IssuerName(agent_runtime::metrics::ANY.into());
        metrics.issued(&issuer, &every!(Phase: Create, Approve, Sign).map(|phase| (phase, Duration::from_secs(1))));
        for outcome in every!(Outcome: Ok, Denied, Failed, Timeout, ApiError, InvalidCertificate) {
            metrics.failed(&issuer, outcome, true);
        }
        every!(Class: Ending, Waiting, Routine).into_iter().for_each(|class| metrics.queued(class, 1));
    }

    pub(super) fn issued(&self, issuer: &IssuerName, phases: &[(Phase, Duration)]) {
        self.issuances.get_or_create(&IssuanceLabels { issuer: issuer.to_string(), result: IssuanceResult::ok }).inc();
        for (phase, took) in phases {
            let phase = match phase {
                Phase::Create => PhaseName::create,
                Phase::Approve => PhaseName::approve,
                Phase::Sign => PhaseName::sign,
            };
            self.durations.get_or_create(&PhaseLabels { issuer: issuer.to_string(), phase }).observe(took.as_secs_f64());
        }
    }

    pub(super) fn failed(&self, issuer: &IssuerName, outcome: Outcome, renewal: bool) {
        self.issuances.get_or_create(&IssuanceLabels { issuer: issuer.to_string(), result: outcome.into() }).inc();
        if renewal {
            self.renewals.get_or_create(&RenewalLabel { result: RenewalResult::error }).inc();
        }
    }

    pub(super) fn renewed(&self, lag: Duration) {
        self.renewals.get_or_create(&RenewalLabel { result: RenewalResult::ok }).inc();
        self.lag.observe(lag.as_secs_f64());
    }

    pub(super) fn in_flight(&self, count: usize, parked: usize) {
        let gauge = |count| i64::try_from(count).unwrap_or(i64::MAX);
        self.in_flight.set(gauge(count));
        self.parked.set(gauge(parked));
    }

    pub(super) fn queued(&self, class: Class, count: usize) {
        let priority = match class {
            Class::Ending => Priority::ending,
            Class::Waiting => Priority::waiting,
            Class::Routine => Priority::routine,
        };
        self.queued.get_or_create(&PriorityLabel { priority }).set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    pub(super) fn clock_jump(&self, forward: bool) {
        let direction = if forward { Direction::forward } else { Direction::backward };
        self.jumps.get_or_create(&DirectionLabel { direction }).inc();
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text;

    use super::*;

    #[test]
    fn a_removed_issuer_takes_all_its_series_along_and_leaves_the_others() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let page = |registry| {
            let mut page = String::new();
            text::encode(&mut page, registry).unwrap();
            page
        };
        let [stays, goes] = ["stays", "goes"].map(|name| IssuerName(name.into()));
        for issuer in [&stays, &goes] {
            metrics.add_issuer(issuer);
            let failures = format!("issuances_total{{issuer=\"{issuer}\",result=\"failed\"}} 0");
            assert!(page(&registry).contains(&failures), "a failure is an increase from zero");
            let outcomes = [Outcome::Denied, Outcome::Failed, Outcome::Timeout, Outcome::ApiError, Outcome::InvalidCertificate];
            outcomes.into_iter().for_each(|outcome| metrics.failed(issuer, outcome, false));
            metrics.issued(issuer, &[Phase::Create, Phase::Approve, Phase::Sign].map(|phase| (phase, Duration::from_secs(1))));
        }
        metrics.remove_issuer(&goes);
        let page = page(&registry);
        assert!(!page.contains("goes"), "{page}");
        let left = page.lines().filter(|line| line.contains("issuer=\"stays\"") && line.contains("_total") || line.contains("_count{"));
        assert_eq!(left.count(), 6 + 3, "{page}");
    }
}
