//! Metrics of the secret discovery service. The handles for the hot path are created once.

use std::time::Duration;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

/// The kind of a resource, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Kind {
    /// A certificate with its key.
    certificate,
    /// A trust bundle.
    bundle,
}

/// The trigger of a response, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Trigger {
    /// A request of the client.
    subscribe,
    /// A new version of the resource.
    rotate,
}

/// Whether the first secret of a stream was available at its first request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
enum Cache {
    hit,
    miss,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResponseLabels {
    kind: Kind,
    trigger: Trigger,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CacheLabel {
    cache: Cache,
}

/// Labels of metrics that are counted for each interface of a socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ApiLabel {
    pub(crate) api: Api,
}

/// An interface of a socket, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub(crate) enum Api {
    sds,
}

/// Metrics of the service.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Open streams.
    pub streams: Gauge,
    responses: [[Counter; 2]; 2],
    acks: [Counter; 2],
    nacks: [Counter; 2],
    ack_duration: [Histogram; 2],
    first_secret: [Histogram; 2],
    unknown_certificate_names: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::register(&mut Registry::default())
    }
}

impl Metrics {
    /// Registers the metrics of this module.
    pub fn register(registry: &mut Registry) -> Self {
        let quick = || Histogram::new([0.000_25, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0]);
        let responses = Family::<ResponseLabels, Counter>::default();
        let acks = Family::<KindLabel, Counter>::default();
        let nacks = Family::<KindLabel, Counter>::default();
        let ack_duration: Family<KindLabel, Histogram, fn() -> Histogram> = Family::new_with_constructor(quick);
        let first_secret: Family<CacheLabel, Histogram, fn() -> Histogram> = Family::new_with_constructor(quick);
        let streams = Family::<ApiLabel, Gauge>::default();
        registry.register("streams", "Open streams", streams.clone());
        registry.register("sds_responses", "Resources sent", responses.clone());
        registry.register("sds_acks", "Resources that clients accepted", acks.clone());
        registry.register("sds_nacks", "Resources that clients rejected", nacks.clone());
        registry.register_with_unit("sds_ack_duration", "Time from a response to its acknowledgement", Unit::Seconds, ack_duration.clone());
        registry.register_with_unit(
            "first_secret_duration",
            "Time from a stream's first request to its first resource",
            Unit::Seconds,
            first_secret.clone(),
        );
        let unknown_certificate_names = Counter::default();
        registry.register(
            "sds_unknown_certificate_names",
            "Streams with an unknown name and without a certificate, such as one that asks by a former SPIFFE ID",
            unknown_certificate_names.clone(),
        );
        let kinds = [Kind::certificate, Kind::bundle];
        let response = |kind, trigger| responses.get_or_create(&ResponseLabels { kind, trigger }).clone();
        Self {
            streams: streams.get_or_create(&ApiLabel { api: Api::sds }).clone(),
            responses: kinds.map(|kind| [response(kind, Trigger::subscribe), response(kind, Trigger::rotate)]),
            acks: kinds.map(|kind| acks.get_or_create(&KindLabel { kind }).clone()),
            nacks: kinds.map(|kind| nacks.get_or_create(&KindLabel { kind }).clone()),
            ack_duration: kinds.map(|kind| ack_duration.get_or_create(&KindLabel { kind }).clone()),
            first_secret: [Cache::hit, Cache::miss].map(|cache| first_secret.get_or_create(&CacheLabel { cache }).clone()),
            unknown_certificate_names,
        }
    }

    /// Registers the metrics, for the metrics reference. Registering makes every series.
    #[cfg(any(test, feature = "testing"))]
    pub fn sample(registry: &mut Registry) {
        Self::register(registry);
    }

    /// Counts a resource that was sent.
    pub fn sent(&self, kind: Kind, trigger: Trigger) {
        self.responses[kind as usize][trigger as usize].inc();
    }

    /// Counts a resource that the client accepted, `after` it was sent.
    pub fn acked(&self, kind: Kind, after: Duration) {
        self.acks[kind as usize].inc();
        self.ack_duration[kind as usize].observe(after.as_secs_f64());
    }

    /// Counts a resource that the client rejected.
    pub fn nacked(&self, kind: Kind) {
        self.nacks[kind as usize].inc();
    }

    /// Resources of this kind that clients rejected.
    #[cfg(any(test, feature = "testing"))]
    pub fn nacks(&self, kind: Kind) -> u64 {
        self.nacks[kind as usize].get()
    }

    /// Counts a stream that watches an unknown name and no certificate.
    pub fn unknown_certificate_name(&self) {
        self.unknown_certificate_names.inc();
    }

    /// Streams that watched an unknown name and no certificate.
    #[cfg(any(test, feature = "testing"))]
    pub fn unknown_certificate_names(&self) -> u64 {
        self.unknown_certificate_names.get()
    }

    /// Observes the time to the first resource of a stream. `hit` is `true` if the resource was available at the first request.
    pub fn first_secret(&self, hit: bool, after: Duration) {
        self.first_secret[usize::from(!hit)].observe(after.as_secs_f64());
    }
}
