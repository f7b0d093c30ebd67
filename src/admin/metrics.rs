//! Metrics of the HTTP listeners.

use agent_runtime::metrics::every;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// An HTTP listener, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub(super) enum Listener {
    /// `admin.address`
    admin,
    /// `metrics.address`
    metrics,
    /// `probes.address`
    probes,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    listener: Listener,
}

/// The metrics of the listeners. Clones share the counts.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    evicted: Family<Labels, Counter>,
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        for listener in every!(Listener: admin, metrics, probes) {
            drop(metrics.evicted(listener));
        }
        registry.register(
            "http_connections_evicted",
            "HTTP connections that were closed because a newer one needed their place, by listener",
            metrics.evicted.clone(),
        );
        metrics
    }

    /// Registers all series, for the reference.
    #[cfg(test)]
    pub(crate) fn sample(registry: &mut Registry) {
        Self::register(registry);
    }

    /// The count of one listener.
    pub(super) fn evicted(&self, listener: Listener) -> Counter {
        self.evicted.get_or_create(&Labels { listener }).clone()
    }
}
