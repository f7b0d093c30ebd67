//! What the sockets count.

use agent_runtime::metrics::every;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::sds::metrics::{Api, ApiLabel};

/// Why a connection was not taken, or was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Rejection {
    /// `limits.connections`
    connection_limit,
    /// `limits.connectionsPerPod`
    pod_connection_limit,
    /// `limits.newConnectionsPerSecondPerPod`
    pod_connection_rate,
    /// It went on opening streams that were refused.
    refused_streams,
    /// The kernel gave no credentials.
    no_credentials,
    /// `accept` failed: mostly for want of file descriptors.
    accept_error,
    /// It connected and said nothing.
    silent,
}

const REJECTIONS: [Rejection; 7] = every!(
    Rejection: connection_limit, pod_connection_limit, pod_connection_rate, refused_streams, no_credentials, accept_error, silent
);

/// Why a stream was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Refusal {
    /// `limits.streams`
    stream_limit,
    /// `limits.streamsPerPod`
    pod_stream_limit,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabel {
    reason: Refusal,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: Rejection,
}

/// The sockets' metrics.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    open: Gauge,
    accepted: Counter,
    rejected: Family<ReasonLabel, Counter>,
    refused: Family<RefusalLabel, Counter>,
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let (open, accepted) = (Family::<ApiLabel, Gauge>::default(), Family::<ApiLabel, Counter>::default());
        let (rejected, refused) = (Family::<ReasonLabel, Counter>::default(), Family::<RefusalLabel, Counter>::default());
        registry.register("connections", "Open connections", open.clone());
        registry.register("connections_accepted", "Connections accepted", accepted.clone());
        registry.register("connections_rejected", "Connections that were not taken, or dropped", rejected.clone());
        registry.register("streams_rejected", "Streams and other calls that were refused for want of a place", refused.clone());
        // From zero on, or the first one would be no increase.
        for reason in REJECTIONS {
            drop(rejected.get_or_create(&ReasonLabel { reason }));
        }
        for reason in every!(Refusal: stream_limit, pod_stream_limit) {
            drop(refused.get_or_create(&RefusalLabel { reason }));
        }
        let label = ApiLabel { api: Api::sds };
        Self { open: open.get_or_create(&label).clone(), accepted: accepted.get_or_create(&label).clone(), rejected, refused }
    }

    /// Registers and shows them all, for the reference: registering makes every series.
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
    /// How many were refused for this reason.
    pub fn refusals(&self, reason: Refusal) -> u64 {
        self.refused.get_or_create(&RefusalLabel { reason }).get()
    }

    #[cfg(any(test, feature = "testing"))]
    /// How many were closed for this reason.
    pub fn rejections(&self, reason: Rejection) -> u64 {
        self.rejected.get_or_create(&ReasonLabel { reason }).get()
    }

    /// Counts a connection as open until the answer is dropped.
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
