//! Metrics of the sockets.

use agent_runtime::metrics::every;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::sds::metrics::{Api, ApiLabel};

/// The reason for rejecting or dropping a connection, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Rejection {
    /// `limits.connections`
    connection_limit,
    /// `limits.connectionsPerPod`
    pod_connection_limit,
    /// `limits.newConnectionsPerSecondPerPod`
    pod_connection_rate,
    /// The client kept opening streams that were refused.
    refused_streams,
    /// The kernel returned no peer credentials.
    no_credentials,
    /// `accept` failed, most often because the process has no free file descriptor.
    accept_error,
    /// The client connected and sent nothing.
    silent,
    /// `limits.memoryBytes`
    memory_limit,
    /// `limits.memoryBytesPerPod`
    pod_memory_limit,
    /// The process that connected has ended, so that no request of the connection could be served.
    caller_ended,
    /// No request of the connection was attested in time.
    unattested,
}

const REJECTIONS: [Rejection; 11] = every!(
    Rejection: connection_limit, pod_connection_limit, pod_connection_rate, refused_streams, no_credentials, accept_error, silent,
    memory_limit, pod_memory_limit, caller_ended, unattested
);

/// The reason for refusing a stream, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Refusal {
    /// `limits.streams`
    stream_limit,
    /// `limits.streamsPerPod`
    pod_stream_limit,
    /// `limits.memoryBytes`
    memory_limit,
    /// `limits.memoryBytesPerPod`
    pod_memory_limit,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabel {
    reason: Refusal,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: Rejection,
}

/// Metrics of the sockets.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    open: Gauge,
    accepted: Counter,
    rejected: Family<ReasonLabel, Counter>,
    refused: Family<RefusalLabel, Counter>,
    /// For [`Quotas`](super::quotas::Quotas).
    pub(super) memory: Gauge,
}

impl Metrics {
    /// Registers the metrics of this module.
    pub fn register(registry: &mut Registry) -> Self {
        let (open, accepted) = (Family::<ApiLabel, Gauge>::default(), Family::<ApiLabel, Counter>::default());
        let (rejected, refused) = (Family::<ReasonLabel, Counter>::default(), Family::<RefusalLabel, Counter>::default());
        registry.register("connections", "Open connections", open.clone());
        registry.register("connections_accepted", "Connections accepted", accepted.clone());
        registry.register("connections_rejected", "Connections that were rejected or dropped", rejected.clone());
        registry.register("streams_rejected", "Streams and unary calls that were refused because a limit was reached", refused.clone());
        let memory = Gauge::default();
        registry.register(
            "caller_memory_bytes",
            "Bytes that are reserved for connections and calls, and bytes of requests",
            memory.clone(),
        );
        // Starts at zero: otherwise the first count would not be an increase for Prometheus.
        for reason in REJECTIONS {
            drop(rejected.get_or_create(&ReasonLabel { reason }));
        }
        for reason in every!(Refusal: stream_limit, pod_stream_limit, memory_limit, pod_memory_limit) {
            drop(refused.get_or_create(&RefusalLabel { reason }));
        }
        let label = ApiLabel { api: Api::sds };
        Self { open: open.get_or_create(&label).clone(), accepted: accepted.get_or_create(&label).clone(), rejected, refused, memory }
    }

    /// Registers the metrics, for the metrics reference. Registering makes every series.
    #[cfg(any(test, feature = "testing"))]
    pub fn sample(registry: &mut Registry) {
        Self::register(registry);
    }

    pub(super) fn rejected(&self, reason: Rejection) {
        self.rejected.get_or_create(&ReasonLabel { reason }).inc();
    }

    pub(super) fn refused(&self, reason: Refusal) {
        self.refused.get_or_create(&RefusalLabel { reason }).inc();
    }

    #[cfg(any(test, feature = "testing"))]
    /// Streams that were refused for this reason.
    pub fn refusals(&self, reason: Refusal) -> u64 {
        self.refused.get_or_create(&RefusalLabel { reason }).get()
    }

    #[cfg(any(test, feature = "testing"))]
    /// Connections that were rejected or dropped for this reason.
    pub fn rejections(&self, reason: Rejection) -> u64 {
        self.rejected.get_or_create(&ReasonLabel { reason }).get()
    }

    /// Counts a connection as open until the returned guard is dropped.
    pub(super) fn connected(&self) -> Open {
        self.accepted.inc();
        self.open.inc();
        Open(self.open.clone())
    }
}

/// An open connection.
pub(super) struct Open(Gauge);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}
