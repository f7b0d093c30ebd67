//! The metrics of per-pod sockets.

use prometheus_client::{metrics::gauge::Gauge, registry::Registry};

/// The agent's metrics of per-pod sockets.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    sockets: Gauge,
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("pod_sockets", "Sockets of pods that are served", metrics.sockets.clone());
        metrics
    }

    /// Registers and sets one of everything, for the reference.
    #[cfg(test)]
    pub(crate) fn sample(registry: &mut Registry) {
        Self::register(registry).sockets(1);
    }

    pub(super) fn sockets(&self, count: usize) {
        self.sockets.set(i64::try_from(count).unwrap_or(i64::MAX));
    }
}
