//! Whether the agent has the shared socket, and how often an impostor had it.

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};

/// The metrics of the shared socket's name.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// 1 while the agent has the name.
    pub(super) bound: Gauge,
    /// Times at which the agent displaced an impostor.
    pub(super) impostors: Counter,
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("socket_bound", "1 while the path of the shared socket leads to this agent", metrics.bound.clone());
        let help = "Times the agent took the shared socket back from a process that is no agent of its service account";
        registry.register("socket_taken_by_strangers", help, metrics.impostors.clone());
        metrics
    }

    /// Registers one of everything, for the reference.
    #[cfg(test)]
    pub(crate) fn sample(registry: &mut Registry) {
        Self::register(registry);
    }
}
