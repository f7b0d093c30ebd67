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

impl Call {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::publish => "publish",
            Self::unpublish => "unpublish",
        }
    }
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
    registered: Gauge,
    published: Gauge,
    agent_unavailable: Counter,
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("csi_calls", "Calls of the kubelet to the CSI driver", metrics.calls.clone());
        registry.register("csi_registered", "1 if the kubelet has registered the CSI driver, else 0", metrics.registered.clone());
        registry.register("csi_volumes", "Volumes of pods that are published", metrics.published.clone());
        registry.register(
            "csi_agent_unavailable",
            "Publish calls during which the agent did not serve the socket: the pod started and waits for it",
            metrics.agent_unavailable.clone(),
        );
        metrics
    }

    /// Registers and counts one of everything, for the reference.
    #[cfg(test)]
    pub(crate) fn sample(registry: &mut Registry) {
        let metrics = Self::register(registry);
        for call in agent_runtime::metrics::every!(Call: publish, unpublish) {
            (0..=16).for_each(|code| metrics.called(call, Code::from(code)));
        }
        metrics.agent_unavailable();
    }

    pub(super) fn called(&self, call: Call, code: Code) {
        // The names of gRPC's codes are a closed set.
        self.calls.get_or_create(&Labels { call, code: format!("{code:?}") }).inc();
    }

    pub(super) fn registered(&self, is_registered: bool) {
        self.registered.set(is_registered.into());
    }

    pub(super) fn published(&self, count: usize) {
        self.published.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    pub(super) fn agent_unavailable(&self) {
        self.agent_unavailable.inc();
    }
}
