//! Counts warm-ups by result.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// How a warm-up ended, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Ended {
    /// The pod has called.
    called,
    /// The pod has not called within the time limit.
    unused,
    /// The pod ended before its first call.
    gone,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    result: Ended,
}

/// The metrics of warm-ups.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    ended: Family<Labels, Counter>,
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        for result in [Ended::called, Ended::unused, Ended::gone] {
            drop(metrics.ended.get_or_create(&Labels { result }));
        }
        registry.register("warm_ups", "Pods whose certificate was ordered ahead of their first call, by result", metrics.ended.clone());
        metrics
    }

    /// Registers one of everything, for the reference.
    #[cfg(test)]
    pub(crate) fn sample(registry: &mut Registry) {
        Self::register(registry);
    }

    pub(super) fn ended(&self, result: Ended) {
        self.ended.get_or_create(&Labels { result }).inc();
    }

    #[cfg(test)]
    pub(super) fn count(&self, result: Ended) -> u64 {
        self.ended.get_or_create(&Labels { result }).get()
    }
}
