//! Metrics of the client. All labels have closed sets of values, so no path and no name becomes a label.

use std::time::Duration;

use agent_runtime::metrics::every;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use tokio::time::Instant;

use crate::labels::{Code, Ended, Resource, Verb, Wait};

/// Labels of `kube_requests_total` and `kube_request_duration_seconds`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Labels {
    verb: Verb,
    resource: Resource,
    code: Code,
}

/// Labels of `watch_restarts_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct WatchLabels {
    resource: Resource,
    reason: Ended,
}

/// Labels of `watches_broken`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ResourceLabel {
    resource: Resource,
}

/// Counts a watch as broken until it is dropped.
#[derive(Debug)]
pub(super) struct Broken(Gauge);

impl Drop for Broken {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Labels of `kube_request_wait_seconds`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct WaitLabels {
    cause: Wait,
}

/// Metrics of the client. Clones count together.
#[derive(Debug, Clone)]
pub struct Metrics {
    requests: Family<Labels, Counter>,
    duration: Family<Labels, Histogram>,
    waits: Family<WaitLabels, Histogram>,
    restarts: Family<WatchLabels, Counter>,
    broken: Family<ResourceLabel, Gauge>,
    skipped: Family<ResourceLabel, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let buckets = || Histogram::new([0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]);
        let waits = || Histogram::new([0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]);
        Self {
            requests: Family::default(),
            duration: Family::new_with_constructor(buckets),
            waits: Family::new_with_constructor(waits),
            restarts: Family::default(),
            broken: Family::default(),
            skipped: Family::default(),
        }
    }
}

impl Metrics {
    /// Registers the metrics in `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("kube_requests", "Requests to the Kubernetes API", metrics.requests.clone());
        registry.register(
            "kube_request_duration_seconds",
            "Time until the complete response was received; for a watch, until its headers",
            metrics.duration.clone(),
        );
        registry.register(
            "kube_request_wait_seconds",
            "Time that requests to the Kubernetes API waited before they were sent; requests that did not wait are not counted",
            metrics.waits.clone(),
        );
        registry.register("watch_restarts", "Watches that failed and were started again", metrics.restarts.clone());
        registry.register("watches_broken", "Watches that have failed and are being retried", metrics.broken.clone());
        registry.register(
            "kube_objects_skipped",
            "Objects that were left out of a list because one of them alone is too large to be read",
            metrics.skipped.clone(),
        );
        // The series start at zero, so that the first wait is an increase.
        for cause in every!(Wait: rate_limit, retry_after) {
            drop(metrics.waits.get_or_create(&WaitLabels { cause }));
        }
        metrics
    }

    /// Registers the metrics with one sample of each label value, for the reference.
    #[cfg(any(test, feature = "testing"))]
    pub fn sample(registry: &mut Registry) {
        let metrics = Self::register(registry);
        let codes = [Code::Status(200), Code::Timeout, Code::Error];
        for verb in every!(Verb: get, list, watch, create, patch, delete, other) {
            codes.into_iter().for_each(|code| metrics.observe(verb, Resource::pods, code, Instant::now()));
        }
        for resource in every!(Resource: certificaterequests, issuers, clusterissuers, pods, configmaps, clustertrustbundles, events, other)
        {
            metrics.observe(Verb::get, resource, Code::Error, Instant::now());
            metrics.watch_ended(resource, Ended::broken);
            metrics.watch_begun(resource);
            metrics.object_skipped(resource);
        }
        for reason in every!(Ended: list_failed, start_failed, broken, expired) {
            metrics.watch_ended(Resource::pods, reason);
        }
    }

    /// Creates the series of broken watches of `resource`, which starts at zero.
    pub(super) fn watch_begun(&self, resource: Resource) {
        drop(self.broken.get_or_create(&ResourceLabel { resource }));
    }

    /// Counts an object that was left out of a list.
    pub(super) fn object_skipped(&self, resource: Resource) {
        self.skipped.get_or_create(&ResourceLabel { resource }).inc();
    }

    /// Number of objects that were left out of lists, for tests.
    #[cfg(any(test, feature = "testing"))]
    pub fn skipped(&self, resource: Resource) -> u64 {
        self.skipped.get_or_create(&ResourceLabel { resource }).get()
    }

    /// Counts a watch as broken until the returned value is dropped.
    pub(super) fn watch_broken(&self, resource: Resource) -> Broken {
        let count = self.broken.get_or_create_owned(&ResourceLabel { resource });
        count.inc();
        Broken(count)
    }

    /// Counts a watch that failed and is started again.
    pub fn watch_ended(&self, resource: Resource, reason: Ended) {
        self.restarts.get_or_create(&WatchLabels { resource, reason }).inc();
    }

    /// Records the time that a request waited before it was sent; zero is not recorded.
    pub(super) fn waited(&self, cause: Wait, time: Duration) {
        if !time.is_zero() {
            self.waits.get_or_create(&WaitLabels { cause }).observe(time.as_secs_f64());
        }
    }

    /// Records a response, or a request that failed.
    pub(super) fn observe(&self, verb: Verb, resource: Resource, code: Code, since: Instant) {
        let labels = Labels { verb, resource, code };
        self.requests.get_or_create(&labels).inc();
        self.duration.get_or_create(&labels).observe(since.elapsed().as_secs_f64());
    }

    /// Number of watches that failed, for tests.
    #[cfg(any(test, feature = "testing"))]
    pub fn restarts(&self, resource: Resource, reason: Ended) -> u64 {
        self.restarts.get_or_create(&WatchLabels { resource, reason }).get()
    }

    /// Number of watches that are broken now, for tests.
    #[cfg(test)]
    pub(super) fn broken(&self, resource: Resource) -> i64 {
        self.broken.get_or_create(&ResourceLabel { resource }).get()
    }

    /// Number of requests with this result, for tests.
    #[cfg(any(test, feature = "testing"))]
    pub fn requests(&self, verb: Verb, resource: Resource, code: Code) -> u64 {
        self.requests.get_or_create(&Labels { verb, resource, code }).get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resource_is_read_from_the_path() {
        for (path, resource) in [
            ("/api/v1/pods", Resource::pods),
            ("/api/v1/namespaces/a/configmaps", Resource::configmaps),
            ("/apis/cert-manager.io/v1/namespaces/pods/certificaterequests/x", Resource::certificaterequests),
            ("/apis/cert-manager.io/v1/clusterissuers/x", Resource::clusterissuers),
            ("/apis/cert-manager.io/v1/certificaterequests", Resource::certificaterequests),
            ("/apis/cert-manager.io", Resource::other),
            ("/version", Resource::other),
            ("", Resource::other),
        ] {
            assert_eq!(Resource::of(path), resource, "{path}");
        }
    }
}
