//! A watch that recovers: a stream of the changes of selected objects, with an explanation of each failure.
//!
//! It lists once and then watches. After a failure it resumes at the last resource version, and lists again if the server no longer has
//! that version. Nothing polls. Each failure is counted, and logged if it differs from the one before.

use std::{fmt, pin::Pin, time::Duration};

use futures::{Stream, StreamExt, stream};
use kube::{
    Api, Resource as KubeResource,
    runtime::watcher::{self, Event, watcher},
};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::{
    ANSWER_TIMEOUT,
    failure::{Call, Cause, Failure},
    labels::{Ended, Resource},
    metrics::{Broken, Metrics},
    throttle::MAX_QUEUE_TIME,
};

/// Target of this module's log lines.
const LOG_TARGET: &str = "sds_agent::kubernetes::watch";

/// Pause after the first failure, 500 ms. Each further failure doubles it. Up to half of a pause is removed at random.
const MIN_BACKOFF: Duration = Duration::from_millis(500);
/// Maximum pause, 10 s: certificates may wait for the watch, so it resumes soon after the server recovers.
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// Maximum pause while a permission is missing, 30 s.
const MAX_BACKOFF_WITHOUT_PERMISSION: Duration = Duration::from_secs(30);
/// Objects in a page, after a list without pages was too large to be read.
const FIRST_PAGE: u32 = 64;
/// A watch that failed counts as healthy when it reports a change, or after this time without a failure. The time exceeds the longest hold
/// of its start plus the time-out of the response.
const HEALTHY_AFTER: Duration = ANSWER_TIMEOUT.saturating_add(MAX_QUEUE_TIME).saturating_add(Duration::from_secs(5));

/// An item of the watch's stream.
#[derive(Debug)]
pub enum Signal<K> {
    /// An object or a change.
    Event(Event<K>),
    /// The watch has failed, and is retried automatically. After [`Ended::list_failed`], and after a missing permission, the stream resumes
    /// with a complete list.
    Trouble(Ended, Failure),
}

/// The objects to watch.
#[derive(Debug, Clone)]
pub struct Selection {
    /// Label of the metrics.
    pub resource: Resource,
    /// For messages: the plural, with its group.
    pub name: String,
    /// For messages: the namespace, if the watch is limited to one.
    pub namespace: Option<String>,
    /// Selectors and list options.
    pub config: watcher::Config,
}

struct State<K> {
    api: Api<K>,
    selection: Selection,
    metrics: Metrics,
    events: Pin<Box<dyn Stream<Item = watcher::Result<Event<K>>> + Send>>,
    /// Pause before the next attempt.
    pause: Option<Duration>,
    next_pause: Duration,
    announced: Option<Failure>,
    /// Counts the watch as broken.
    broken: Option<Broken>,
    /// The watch itself has failed, and not its list: a successful list does not prove that the watch works.
    recovering: bool,
}

/// Watches `selection` of `api`, as long as the returned stream is polled. The stream does not end.
///
/// # Cancel safety
///
/// Dropping the future of `next()` loses no event. Dropping the stream ends the watch; a new one begins with a complete list.
pub fn watch<K>(api: Api<K>, selection: Selection, metrics: Metrics) -> impl Stream<Item = Signal<K>> + Send
where
    K: KubeResource + Clone + DeserializeOwned + fmt::Debug + Send + 'static,
{
    metrics.watch_begun(selection.resource);
    let events = Box::pin(watcher(api.clone(), selection.config.clone()));
    let state =
        State { api, selection, metrics, events, pause: None, next_pause: MIN_BACKOFF, announced: None, broken: None, recovering: false };
    stream::unfold(state, |mut state| async move {
        if let Some(pause) = state.pause.take() {
            tokio::time::sleep(pause).await;
        }
        let signal = match state.next().await? {
            Ok(event) => {
                match event {
                    // It only announces that a list will be requested.
                    Event::Init => {}
                    Event::InitApply(_) | Event::InitDone if state.recovering => {}
                    _ => state.recovered(),
                }
                Signal::Event(event)
            }
            Err(error) => {
                let (reason, failure) = state.trouble(&error);
                Signal::Trouble(reason, failure)
            }
        };
        Some((signal, state))
    })
}

impl<K> State<K>
where
    K: KubeResource + Clone + DeserializeOwned + fmt::Debug + Send + 'static,
{
    async fn next(&mut self) -> Option<watcher::Result<Event<K>>> {
        if self.recovering {
            match timeout(HEALTHY_AFTER, self.events.next()).await {
                Ok(next) => return next,
                Err(_) => self.recovered(),
            }
        }
        self.events.next().await
    }

    fn recovered(&mut self) {
        self.next_pause = MIN_BACKOFF;
        self.recovering = false;
        self.broken = None;
        if self.announced.take().is_some() {
            tracing::info!(target: LOG_TARGET, resource = %self.selection.name, "the watch works again");
        }
    }

    fn trouble(&mut self, error: &watcher::Error) -> (Ended, Failure) {
        let call = |verb| Call { verb, resource: &self.selection.name, name: None, namespace: self.selection.namespace.as_deref() };
        let (reason, failure) = match error {
            watcher::Error::InitialListFailed(e) => (Ended::list_failed, Failure::of(e, &call("list"))),
            watcher::Error::WatchStartFailed(e) => (Ended::start_failed, Failure::of(e, &call("watch"))),
            watcher::Error::WatchFailed(e) => (Ended::broken, Failure::of(e, &call("watch"))),
            watcher::Error::WatchError(status) => (Ended::broken, Failure::of_status(status, &call("watch"))),
            watcher::Error::NoResourceVersion => {
                (Ended::broken, Failure { cause: Cause::Other, message: "the server gave no resource version".to_owned() })
            }
        };
        let expired = failure.cause == Cause::Expired;
        self.metrics.watch_ended(self.selection.resource, if expired { Ended::expired } else { reason });
        let too_large = failure.cause == Cause::TooLarge;
        if too_large {
            self.selection.config = smaller(&self.selection.config);
            tracing::warn!(
                target: LOG_TARGET, resource = %self.selection.name,
                error = %failure,
                page_size = self.selection.config.page_size,
                "the list is too large to be read; requesting smaller pages from now on"
            );
        }
        let stuck = reason == Ended::start_failed && matches!(failure.cause, Cause::Expired | Cause::Rbac);
        let skipped = matches!(error, watcher::Error::WatchFailed(kube::Error::SerdeError(_)));
        let refused = matches!(error, watcher::Error::WatchError(_)) && !expired;
        if stuck || skipped || refused || too_large {
            // A new `watcher` is needed in these cases. After a failed start, the old one would request the same resource version again
            // (kube-rs/kube#1042), while only a new list shows that a permission was granted. It would continue after an event that it
            // could not read. It would keep a stream on which the server has reported an error. It would request a page of the same size
            // again.
            self.events = Box::pin(watcher(self.api.clone(), self.selection.config.clone()));
        }
        self.recovering = reason != Ended::list_failed && !expired;
        if expired || too_large {
            // The server responds, so a new list restores everything at once.
            self.next_pause = MIN_BACKOFF;
        }
        let asked = if let Cause::TooManyRequests(Some(after)) = failure.cause { after } else { Duration::ZERO };
        self.pause = Some(self.next_pause.mul_f64(0.5 + 0.5 * fastrand::f64()).max(asked));
        // An operator has to grant a missing permission, so frequent attempts are of no use.
        let longest = if failure.cause == Cause::Rbac { MAX_BACKOFF_WITHOUT_PERMISSION } else { MAX_BACKOFF };
        self.next_pause = (self.next_pause * 2).min(longest);
        if !expired && !too_large && self.announced.as_ref() != Some(&failure) {
            tracing::warn!(target: LOG_TARGET, resource = %self.selection.name, error = %failure, "the watch does not work; trying again");
            self.announced = Some(failure.clone());
        }
        if !expired && self.broken.is_none() {
            self.broken = Some(self.metrics.watch_broken(self.selection.resource));
        }
        (reason, failure)
    }
}

/// Returns `config` with smaller pages, after a response that was too large to be read. Older API servers do not page a list from their
/// cache, so the list becomes a consistent read.
fn smaller(config: &watcher::Config) -> watcher::Config {
    let page_size = config.page_size.map_or(FIRST_PAGE, |size| (size / 2).max(1));
    watcher::Config { page_size: Some(page_size), list_semantic: watcher::ListSemantic::MostRecent, ..config.clone() }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use serde_json::json;
    use tokio::time::Instant;

    use super::*;
    use crate::fake::{FakeApi, Fault};

    fn signals(api: &FakeApi, metrics: &Metrics) -> Pin<Box<dyn Stream<Item = Signal<ConfigMap>> + Send>> {
        let selection = Selection {
            resource: Resource::configmaps,
            name: "configmaps".into(),
            namespace: Some("a".into()),
            config: watcher::Config::default(),
        };
        Box::pin(watch(Api::namespaced(api.client(metrics), "a"), selection, metrics.clone()))
    }

    fn put(api: &FakeApi, name: &str) {
        api.put("configmaps", json!({"metadata": {"name": name, "namespace": "a"}}));
    }

    /// Reads signals until an object with this name is reported.
    async fn announced(signals: &mut (impl Stream<Item = Signal<ConfigMap>> + Unpin), name: &str) {
        let reading = async {
            while let Some(signal) = signals.next().await {
                if let Signal::Event(Event::Apply(object) | Event::InitApply(object)) = signal
                    && object.metadata.name.as_deref() == Some(name)
                {
                    return;
                }
            }
        };
        timeout(Duration::from_secs(600), reading).await.expect("not reported");
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_ends_every_watch_at_once_is_asked_once_a_second() {
        let (api, metrics) = (FakeApi::new(), Metrics::default());
        api.fail("watch", "configmaps", Fault::Text(200, ""), 60);
        let (start, mut signals) = (Instant::now(), signals(&api, &metrics));
        put(&api, "x");
        announced(&mut signals, "x").await;
        put(&api, "y");
        announced(&mut signals, "y").await;
        assert_eq!(start.elapsed().as_secs(), 60);
        assert_eq!((api.count("list", "configmaps"), api.count("watch", "configmaps")), (1, 61));
    }

    #[tokio::test(start_paused = true)]
    async fn an_expired_resource_version_leads_to_a_new_list() {
        let (api, metrics) = (FakeApi::new(), Metrics::default());
        let gone = json!({"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"});
        api.fail("watch", "configmaps", Fault::Status(410, gone), 3);
        let mut signals = signals(&api, &metrics);
        put(&api, "x");
        announced(&mut signals, "x").await;
        put(&api, "y");
        announced(&mut signals, "y").await;
        let restarts = metrics.restarts(Resource::configmaps, Ended::expired);
        assert!(restarts >= 1 && api.count("list", "configmaps") as u64 == 1 + restarts, "{restarts}");
        assert_eq!(metrics.broken(Resource::configmaps), 0, "an expired version is not a failure");
    }

    /// A page is larger than the client reads, until the page size is small enough.
    #[tokio::test(start_paused = true)]
    async fn a_list_that_is_too_large_to_be_read_is_asked_for_in_smaller_pages() {
        for (page_size, first) in [(Some(500), Some("500")), (None, None)] {
            let (api, metrics) = (FakeApi::new(), Metrics::default());
            for n in 0..100 {
                put(&api, &format!("n{n:03}"));
            }
            api.fail("list", "configmaps", Fault::LargeAbove(40), usize::MAX);
            let config = watcher::Config { page_size, ..watcher::Config::default().any_semantic() };
            let selection = Selection { resource: Resource::configmaps, name: "configmaps".into(), namespace: Some("a".into()), config };
            let start = Instant::now();
            let mut signals = Box::pin(watch::<ConfigMap>(Api::namespaced(api.client(&metrics), "a"), selection, metrics.clone()));
            let (mut listed, mut failures) = (Vec::new(), Vec::new());
            loop {
                match timeout(Duration::from_secs(60), signals.next()).await.unwrap().unwrap() {
                    Signal::Event(Event::InitApply(object)) => listed.push(object.metadata.name.unwrap()),
                    Signal::Event(Event::InitDone) => break,
                    Signal::Event(_) => {}
                    Signal::Trouble(ended, failure) => failures.push((ended, failure.cause, failure.message)),
                }
            }
            let expected = (Ended::list_failed, Cause::TooLarge, "the answer is larger than 32 MiB".to_owned());
            // Only the list without pages fails; its successor has pages, which the client divides.
            assert_eq!(failures, if page_size.is_none() { vec![expected] } else { Vec::new() });
            assert_eq!((listed.len(), listed.first().map(String::as_str)), (100, Some("n000")), "{listed:?}");
            assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
            let queries = api.queries("list", "configmaps");
            assert_eq!(queries[0].get("limit").map(String::as_str), first);
            let last = queries.last().unwrap();
            assert!(last["limit"].parse::<u64>().unwrap() <= 40 && !last.contains_key("resourceVersion"), "{last:?}");
        }
    }

    /// Pages become smaller within one list, and one object that is too large alone is left out of it.
    #[tokio::test(start_paused = true)]
    async fn large_objects_shrink_the_pages_and_one_that_is_too_large_is_skipped() {
        let (api, metrics) = (FakeApi::new(), Metrics::default());
        let sized = |name: String, mebibytes: usize| {
            api.put("configmaps", json!({"metadata": {"name": name, "namespace": "a"}, "data": {"x": "x".repeat(mebibytes << 20)}}));
        };
        (0..20).for_each(|n| sized(format!("a{n:02}"), 1));
        sized("b-too-large".into(), 9);
        (0..40).for_each(|n| put(&api, &format!("c{n:02}")));
        let config = watcher::Config::default().page_size(20);
        let selection = Selection { resource: Resource::configmaps, name: "configmaps".into(), namespace: Some("a".into()), config };
        let mut signals = Box::pin(watch::<ConfigMap>(Api::namespaced(api.client(&metrics), "a"), selection, metrics.clone()));
        let mut listed = Vec::new();
        loop {
            match timeout(Duration::from_secs(60), signals.next()).await.unwrap().unwrap() {
                Signal::Event(Event::InitApply(object)) => listed.push(object.metadata.name.unwrap()),
                Signal::Event(Event::InitDone) => break,
                Signal::Event(_) => {}
                Signal::Trouble(ended, failure) => panic!("{ended:?}, {failure:?}"),
            }
        }
        let expected = (0..20).map(|n| format!("a{n:02}")).chain((0..40).map(|n| format!("c{n:02}")));
        assert_eq!(listed, expected.collect::<Vec<_>>(), "all others, each once and in order");
        assert_eq!(metrics.skipped(Resource::configmaps), 1);
        let queries = api.queries("list", "configmaps");
        let limits: Vec<&str> = queries.iter().map(|query| query["limit"].as_str()).collect();
        // 20 and 10 MiB are too large, 5 MiB is read, and 1 MiB is the metadata of the skipped one. Then the pages grow.
        assert_eq!(limits[..7], ["20", "10", "5", "5", "5", "5", "5"]);
        assert_eq!(limits[7..], ["2", "1", "1", "1", "2", "4", "8", "16", "20"], "{queries:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_right_that_comes_back_is_noticed_by_a_list() {
        let (api, metrics) = (FakeApi::new(), Metrics::default());
        let forbidden = json!({"kind": "Status", "code": 403, "reason": "Forbidden", "message": "User \"x\" cannot watch resource"});
        api.fail("watch", "configmaps", Fault::Status(403, forbidden), 2);
        let mut signals = signals(&api, &metrics);
        let mut lists = 0;
        while lists < 3 {
            match timeout(Duration::from_secs(60), signals.next()).await.unwrap().unwrap() {
                Signal::Event(Event::InitDone) => lists += 1,
                Signal::Trouble(_, failure) => {
                    assert_eq!(failure.cause, Cause::Rbac);
                    assert_eq!(metrics.broken(Resource::configmaps), 1, "a successful list does not prove that the watch works");
                }
                Signal::Event(_) => {}
            }
        }
        put(&api, "x");
        announced(&mut signals, "x").await;
        assert_eq!(metrics.broken(Resource::configmaps), 0);
        assert_eq!(metrics.restarts(Resource::configmaps, Ended::start_failed), 2);
    }

    /// Lists succeed while the watch is forbidden: complete lists must not be requested all the time.
    #[tokio::test(start_paused = true)]
    async fn a_watch_that_is_forbidden_is_tried_ever_less_though_lists_work() {
        let (api, metrics) = (FakeApi::new(), Metrics::default());
        let forbidden = json!({"kind": "Status", "code": 403, "reason": "Forbidden", "message": "User \"x\" cannot watch resource"});
        api.fail("watch", "configmaps", Fault::Status(403, forbidden), 20);
        let (start, mut signals) = (Instant::now(), signals(&api, &metrics));
        let mut tries = 0;
        while tries < 20 {
            if let Signal::Trouble(..) = timeout(Duration::from_secs(60), signals.next()).await.unwrap().unwrap() {
                tries += 1;
            }
        }
        assert!(start.elapsed() > 14 * MAX_BACKOFF / 2, "20 lists in {:?}", start.elapsed());

        // The watch is then allowed, and has no failure for longer than `HEALTHY_AFTER`. The pauses start again at the minimum.
        assert!(timeout(HEALTHY_AFTER * 2, async { while signals.next().await.is_some() {} }).await.is_err());
        let resumed = Instant::now();
        api.fail("watch", "configmaps", Fault::Refuse, 1);
        api.cut_watches(true);
        put(&api, "y");
        announced(&mut signals, "y").await;
        assert!(resumed.elapsed() < Duration::from_secs(4), "after {:?}", resumed.elapsed());

        // A watch that was dropped does not count as broken.
        api.fail("watch", "configmaps", Fault::Refuse, 1);
        api.cut_watches(true);
        while !matches!(timeout(Duration::from_secs(60), signals.next()).await.unwrap().unwrap(), Signal::Trouble(Ended::start_failed, _)) {
        }
        assert_eq!(metrics.broken(Resource::configmaps), 1);
        drop(signals);
        assert_eq!(metrics.broken(Resource::configmaps), 0);
    }
}
