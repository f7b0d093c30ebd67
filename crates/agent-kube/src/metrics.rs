//! What the client counts, and the labels by which it does: closed sets, so that no path and no name becomes a label.

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

/// A watch that does not work.
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

/// What the client counts.
#[derive(Debug, Clone)]
pub struct Metrics {
    requests: Family<Labels, Counter>,
    duration: Family<Labels, Histogram>,
    waits: Family<WaitLabels, Histogram>,
    restarts: Family<WatchLabels, Counter>,
    broken: Family<ResourceLabel, Gauge>,
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
        }
    }
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("kube_requests", "Requests to the Kubernetes API", metrics.requests.clone());
        registry.register(
            "kube_request_duration_seconds",
            "Time to the whole answer; for a watch, to its headers",
            metrics.duration.clone(),
        );
        registry.register(
            "kube_request_wait_seconds",
            "Time that requests to the Kubernetes API waited before they were sent; those that did not wait are not in it",
            metrics.waits.clone(),
        );
        registry.register("watch_restarts", "Watches that broke and were started again", metrics.restarts.clone());
        registry.register("watches_broken", "Watches that do not work now and are tried again", metrics.broken.clone());
        // From zero on, or the first one would be no increase.
        for cause in every!(Wait: rate_limit, retry_after) {
            drop(metrics.waits.get_or_create(&WaitLabels { cause }));
        }
        metrics
    }

    /// Registers and counts one of everything, for the reference.
    #[cfg(any(test, feature = "testing"))]
    pub fn sample(registry: &mut Registry) {
        let metrics = Self::register(registry);
        let codes = [Code::Status(200), Code::Timeout, Code::Error];
        for verb in every!(Verb: get, list, watch, create, patch, delete, other) {
            codes.into_iter().for_each(|code| metrics.observe(verb, Resource::pods, code, Instant::now()));
        }
        for resource in every!(Resource: certificaterequests, issuers, clusterissuers, pods, configmaps, events, other) {
            metrics.observe(Verb::get, resource, Code::Error, Instant::now());
            metrics.watch_ended(resource, Ended::broken);
            metrics.watch_begun(resource);
        }
        for reason in every!(Ended: list_failed, start_failed, broken, expired) {
            metrics.watch_ended(Resource::pods, reason);
        }
    }

    /// There is a watch of this: how many of them are broken is told from now on.
    pub(super) fn watch_begun(&self, resource: Resource) {
        drop(self.broken.get_or_create(&ResourceLabel { resource }));
    }

    /// Counts a watch as not working until the answer is dropped.
    pub(super) fn watch_broken(&self, resource: Resource) -> Broken {
        let count = self.broken.get_or_create_owned(&ResourceLabel { resource });
        count.inc();
        Broken(count)
    }

    /// Counts a watch that broke.
    pub fn watch_ended(&self, resource: Resource, reason: Ended) {
        self.restarts.get_or_create(&WatchLabels { resource, reason }).inc();
    }

    /// A request was held back.
    pub(super) fn waited(&self, cause: Wait, time: Duration) {
        if !time.is_zero() {
            self.waits.get_or_create(&WaitLabels { cause }).observe(time.as_secs_f64());
        }
    }

    /// An answer is there, or will not come.
    pub(super) fn observe(&self, verb: Verb, resource: Resource, code: Code, since: Instant) {
        let labels = Labels { verb, resource, code };
        self.requests.get_or_create(&labels).inc();
        self.duration.get_or_create(&labels).observe(since.elapsed().as_secs_f64());
    }

    /// How many watches broke, for tests.
    #[cfg(any(test, feature = "testing"))]
    pub fn restarts(&self, resource: Resource, reason: Ended) -> u64 {
        self.restarts.get_or_create(&WatchLabels { resource, reason }).get()
    }

    /// How many watches do not work, for tests.
    #[cfg(test)]
    pub(super) fn broken(&self, resource: Resource) -> i64 {
        self.broken.get_or_create(&ResourceLabel { resource }).get()
    }

    /// How many requests had this end, for tests.
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
