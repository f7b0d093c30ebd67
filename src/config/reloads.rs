//! What reading the configuration file again counts, in the agent and in the approver alike.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// What a reading came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Outcome {
    /// What it says is in force.
    ok,
    /// It is wrong, and changed nothing.
    invalid,
    /// It says what was in force already.
    unchanged,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    result: Outcome,
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    reloads: Family<OutcomeLabel, Counter>,
    valid: Gauge,
    restart_required: Gauge,
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        for result in [Outcome::ok, Outcome::invalid, Outcome::unchanged] {
            drop(metrics.reloads.get_or_create(&OutcomeLabel { result }));
        }
        metrics.valid.set(1);
        registry.register("configuration_reloads", "Times that the configuration file was read again, by result", metrics.reloads.clone());
        registry.register("configuration_valid", "1 where the configuration file is good, as last read", metrics.valid.clone());
        registry.register(
            "configuration_restart_required",
            "Fields of the configuration file that come into force with the next start",
            metrics.restart_required.clone(),
        );
        metrics
    }

    /// The file was read.
    pub fn read(&self, result: Outcome) {
        self.reloads.get_or_create(&OutcomeLabel { result }).inc();
        self.valid.set(i64::from(result != Outcome::invalid));
    }

    /// So many fields wait for a restart.
    pub fn waiting(&self, fields: usize) {
        self.restart_required.set(i64::try_from(fields).unwrap_or(i64::MAX));
    }

    /// (readings with this result, whether the last one was good, fields that wait for a restart)
    #[cfg(test)]
    pub(crate) fn counts(&self, result: Outcome) -> (u64, i64, i64) {
        (self.reloads.get_or_create(&OutcomeLabel { result }).get(), self.valid.get(), self.restart_required.get())
    }

    /// Registers one of everything, for the reference.
    #[cfg(test)]
    pub(crate) fn sample(registry: &mut Registry) {
        Self::register(registry);
    }
}
