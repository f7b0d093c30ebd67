//! A watch that recovers: the changes of a selection of objects, for ever, with words for what goes wrong.
//!
//! One list, then one long request; after trouble it resumes where it was, and lists again where the server has forgotten. Nothing
//! polls. Trouble is counted, and logged when it changes.

use std::{fmt, pin::Pin, time::Duration};

use futures::{Stream, StreamExt, stream};
use kube::{
    Api, Resource as KubeResource,
    runtime::{
        utils::Backoff,
        watcher::{self, DefaultBackoff, Event, watcher},
    },
};
use prometheus_client::encoding::EncodeLabelValue;
use serde::de::DeserializeOwned;

use crate::kubernetes::{
    failure::{Call, Cause, Failure},
    layer::{Metrics, Resource},
};

/// Why a watch broke, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
pub enum Ended {
    /// The list failed.
    list_failed,
    /// The watch could not be started.
    start_failed,
    /// It broke while it ran.
    broken,
    /// The server has forgotten the version to continue from: everything is listed again.
    expired,
}

/// What a watch tells.
#[derive(Debug)]
pub enum Signal<K> {
    /// The objects and their changes.
    Event(Event<K>),
    /// The watch does not run; it is tried again by itself. After [`Ended::list_failed`], and where a right was missing, the next good
    /// news is a whole list.
    Trouble(Ended, Failure),
}

/// What to watch.
#[derive(Debug, Clone)]
pub struct Selection {
    /// For the metrics.
    pub resource: Resource,
    /// For people: the plural, with its group.
    pub name: String,
    /// For people: the namespace, where the watch is bound to one.
    pub namespace: Option<String>,
    /// Selectors and the way to list.
    pub config: watcher::Config,
}

struct State<K> {
    api: Api<K>,
    selection: Selection,
    metrics: Metrics,
    events: Pin<Box<dyn Stream<Item = watcher::Result<Event<K>>> + Send>>,
    backoff: DefaultBackoff,
    pause: Option<Duration>,
    last: Option<Ended>,
    told: Option<Failure>,
}

/// Watches `selection` of `api`, for as long as the stream is polled.
pub fn watch<K>(api: Api<K>, selection: Selection, metrics: Metrics) -> impl Stream<Item = Signal<K>> + Send
where
    K: KubeResource + Clone + DeserializeOwned + fmt::Debug + Send + 'static,
{
    let events = Box::pin(watcher(api.clone(), selection.config.clone()));
    let state = State { api, selection, metrics, events, backoff: DefaultBackoff::default(), pause: None, last: None, told: None };
    stream::unfold(state, |mut state| async move {
        if let Some(pause) = state.pause.take() {
            tokio::time::sleep(pause).await;
        }
        let signal = match state.events.next().await? {
            Ok(event) => {
                let mended = match event {
                    // It only says that a list is about to be asked for.
                    Event::Init => false,
                    // A list shows nothing of a watch that could not be started: who may list and not watch would list without a pause.
                    Event::InitApply(_) | Event::InitDone => state.last == Some(Ended::list_failed),
                    Event::Apply(_) | Event::Delete(_) => true,
                };
                if mended {
                    state.recovered();
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
    fn recovered(&mut self) {
        self.backoff.reset();
        self.last = None;
        if self.told.take().is_some() {
            tracing::info!(resource = %self.selection.name, "the watch works again");
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
        if reason == Ended::start_failed && matches!(failure.cause, Cause::Expired | Cause::Rbac) {
            // The library would ask for the same version for ever; and only a new list can show that a right has come back.
            self.events = Box::pin(watcher(self.api.clone(), self.selection.config.clone()));
        }
        self.pause = self.backoff.next();
        self.last = Some(reason);
        // A forgotten version is the ordinary end of a quiet watch, and is answered by a list.
        if !expired && self.told.as_ref() != Some(&failure) {
            tracing::warn!(resource = %self.selection.name, error = %failure, "the watch does not work; trying again");
            self.told = Some(failure.clone());
        }
        (reason, failure)
    }
}
