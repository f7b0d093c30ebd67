//! The metrics of the driver.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tonic::Code;

/// A call of the kubelet, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Call {
    /// `NodePublishVolume`.
    publish,
    /// `NodeUnpublishVolume`.
    unpublish,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    call: Call,
    code: String,
}

/// The driver's metrics.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    calls: Family<Labels, Counter>,
    sockets: Gauge,
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("csi_calls", "Calls of the kubelet to the CSI driver", metrics.calls.clone());
        registry.register("pod_sockets", "Sockets of pods that are served", metrics.sockets.clone());
        metrics
    }

    /// Registers and counts one of everything, for the reference.
    #[cfg(test)]
    pub(crate) fn sample(registry: &mut Registry) {
        let metrics = Self::register(registry);
        for call in agent_runtime::metrics::every!(Call: publish, unpublish) {
            (0..=16).for_each(|code| metrics.called(call, Code::from(code)));
        }
    }

    pub(super) fn called(&self, call: Call, code: Code) {
        // The names of gRPC's codes are a closed set.
        self.calls.get_or_create(&Labels { call, code: format!("{code:?}") }).inc();
    }

    pub(super) fn sockets(&self, count: usize) {
        self.sockets.set(i64::try_from(count).unwrap_or(i64::MAX));
    }
}
