//! Metrics of reloads of the configuration file, for the agent and the approver.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// The result of a reload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Outcome {
    /// The new configuration is in use.
    ok,
    /// The file is invalid; the previous configuration stays in use.
    invalid,
    /// The file has the configuration that is in use already.
    unchanged,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    result: Outcome,
}

/// The metrics of reloads.
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
        registry.register("configuration_reloads", "Reloads of the configuration file, by result", metrics.reloads.clone());
        registry.register(
            "configuration_valid",
            "1 if the configuration file was valid when it was last read, otherwise 0",
            metrics.valid.clone(),
        );
        registry.register(
            "configuration_restart_required",
            "Changed fields of the configuration file that take effect at the next start",
            metrics.restart_required.clone(),
        );
        metrics
    }

    /// Counts a reload.
    pub fn read(&self, result: Outcome) {
        self.reloads.get_or_create(&OutcomeLabel { result }).inc();
        self.valid.set(i64::from(result != Outcome::invalid));
    }

    /// Sets the number of fields that wait for a restart.
    pub fn waiting(&self, fields: usize) {
        self.restart_required.set(i64::try_from(fields).unwrap_or(i64::MAX));
    }

    /// (reloads with this result, whether the last one was valid, fields that wait for a restart)
    #[cfg(test)]
    pub(crate) fn counts(&self, result: Outcome) -> (u64, i64, i64) {
        (self.reloads.get_or_create(&OutcomeLabel { result }).get(), self.valid.get(), self.restart_required.get())
    }

    /// Registers all series, for the reference.
    #[cfg(test)]
    pub(crate) fn sample(registry: &mut Registry) {
        Self::register(registry);
    }
}
