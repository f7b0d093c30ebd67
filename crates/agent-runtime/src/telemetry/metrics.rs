//! Metrics of the log.

use prometheus_client::{metrics::counter::Counter, registry::Registry};

/// Metrics of the log. Clones count together.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    pub(super) lines_dropped: Counter,
}

impl Metrics {
    /// Registers the metrics in `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "log_lines_dropped",
            "Lines of the log that were not written: the reader of standard error was too slow, or writing failed",
            metrics.lines_dropped.clone(),
        );
        metrics
    }

    /// Registers all metrics, for the reference.
    #[cfg(any(test, feature = "testing"))]
    pub fn sample(registry: &mut Registry) {
        Self::register(registry);
    }
}
