//! State of the node's requests. The watch writes it; waiting orders and the sweep read it.
//!
//! The tracker owns the link between a request and the order that holds its key. A request of this process that has no order is deleted
//! when the watch shows it, unless it is kept for operators. No lock is held across an await.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use agent_kube::{
    labels::Ended,
    object::{Kind, Observed},
};
use cert_manager::{RequestKind, Status, keys, naming::identity_digest, verdict::Verdict};
use kube::core::NotUsed;
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};
use workload_identity::Identity;

/// Time for which a refused request is kept for operators.
pub(super) const KEPT_FOR: Duration = Duration::from_secs(600);
/// Maximum number of refused requests that are kept.
const MAX_KEPT: usize = 32;

/// A request as the watch reads it: without its spec.
pub(super) type Watched = Observed<WatchedKind, NotUsed, Status>;

/// Selects the metadata of a request that the agent keeps: the labels that name its owner.
#[derive(Debug, Clone)]
pub(super) struct WatchedKind;

impl Kind for WatchedKind {
    const GROUP: &'static str = RequestKind::GROUP;
    const VERSION: &'static str = RequestKind::VERSION;
    const KIND: &'static str = RequestKind::KIND;
    const PLURAL: &'static str = RequestKind::PLURAL;

    fn keeps_label(key: &str) -> bool {
        matches!(key, keys::AGENT | keys::INSTANCE)
    }

    fn keeps_annotation(_key: &str) -> bool {
        false
    }
}

/// Namespace and name of a request.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
}

/// A request to delete.
#[derive(Debug, Clone)]
pub(super) struct Deletion {
    pub(super) key: Key,
    /// UID of the object to delete. `None` if the create was never answered.
    pub(super) uid: Option<String>,
    /// Whether the request is of an agent that no longer runs.
    pub(super) orphan: bool,
}

/// One observation of a request.
#[derive(Debug)]
pub(super) struct Observation {
    pub(super) uid: String,
    pub(super) status: Option<Status>,
}

/// The part of a request that the sweep needs.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) uid: String,
    /// Value of [`keys::AGENT`].
    pub(super) agent: String,
    /// Value of [`keys::INSTANCE`].
    pub(super) instance: String,
    /// Time of creation, in seconds since the Unix epoch.
    pub(super) created: i64,
    /// Whether the request is denied, failed or invalid.
    pub(super) refused: bool,
}

/// State of the watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Watching {
    /// The first list is not complete.
    Starting,
    /// The watch runs.
    Running,
    /// The watch does not run, for this reason.
    Trouble(Arc<str>),
}

#[derive(Debug, Default)]
struct State {
    records: HashMap<Key, Record>,
    orders: HashMap<Key, Waiter>,
    kept: HashMap<String, Kept>,
    deleting: HashSet<Key>,
    list: HashMap<Key, (Record, Observation)>,
}

#[derive(Debug)]
struct Waiter {
    /// `None` until the watch has shown the request. The channel is closed when the request is lost.
    sightings: watch::Sender<Option<Arc<Observation>>>,
    created: bool,
    /// The request was created before the current list was requested, so that the list must contain it.
    expected: bool,
}

#[derive(Debug)]
struct Kept {
    key: Key,
    uid: Option<String>,
    until: Instant,
}

/// Tracks the node's requests, and the orders that wait for them.
#[derive(Debug)]
pub(super) struct RequestTracker {
    instance: String,
    state: Mutex<State>,
    deletions: mpsc::UnboundedSender<Deletion>,
    watching: watch::Sender<Watching>,
    kept_changed: Notify,
}

impl RequestTracker {
    pub(super) fn new(instance: String, deletions: mpsc::UnboundedSender<Deletion>) -> Self {
        let watching = watch::Sender::new(Watching::Starting);
        Self { instance, state: Mutex::default(), deletions, watching, kept_changed: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    pub(super) fn watching(&self) -> watch::Receiver<Watching> {
        self.watching.subscribe()
    }

    /// Registers the request of an order before it is created, so that no event is missed.
    pub(super) fn open(self: &Arc<Self>, namespace: &Arc<str>, name: &Arc<str>) -> RequestHandle {
        let key = Key { namespace: namespace.clone(), name: name.clone() };
        let (sightings, receiver) = watch::channel(None);
        self.lock().orders.insert(key.clone(), Waiter { sightings, created: false, expected: false });
        RequestHandle { tracker: self.clone(), key, receiver, uid: None, on_drop: OnDrop::Delete }
    }

    /// The watch is about to request a list.
    pub(super) fn list_begins(&self) {
        let mut state = self.lock();
        state.list.clear();
        state.orders.values_mut().for_each(|waiter| waiter.expected = waiter.created);
    }

    /// The list contains `object`.
    pub(super) fn listed(&self, object: &Watched) {
        if let Some((key, record, observation)) = read(object) {
            self.lock().list.insert(key, (record, observation));
        }
    }

    /// The list is complete. A request that is not in it no longer exists.
    pub(super) fn list_ends(&self) {
        let mut state = self.lock();
        let list = std::mem::take(&mut state.list);
        state.records.retain(|key, _| list.contains_key(key));
        state.deleting.retain(|key| list.contains_key(key));
        state.kept.retain(|_, kept| list.contains_key(&kept.key));
        state.orders.retain(|key, waiter| !waiter.expected || list.contains_key(key));
        for (key, (record, observation)) in list {
            self.seen(&mut state, key, record, observation);
        }
        drop(state);
        self.watching.send_replace(Watching::Running);
    }

    /// The watch shows a new or changed request.
    pub(super) fn applied(&self, object: &Watched) {
        if let Some((key, record, observation)) = read(object) {
            self.seen(&mut self.lock(), key, record, observation);
        }
    }

    /// A request has left the selection of the watch: it was deleted or relabelled.
    pub(super) fn deleted(&self, object: &Watched) {
        let Some((key, record, _)) = read(object) else { return };
        let mut state = self.lock();
        state.records.remove(&key);
        state.deleting.remove(&key);
        state.kept.retain(|_, kept| kept.key != key);
        if state.orders.remove(&key).is_some() {
            // A relabelled request still exists, and no other agent deletes it.
            self.delete(&mut state, Deletion { key, uid: Some(record.uid), orphan: false });
        }
    }

    /// The watch has failed. Waiting orders go on waiting. After a failed list, or without permission, orders create no requests, because
    /// they would not see the answers.
    pub(super) fn trouble(&self, ended: Ended, why: &str, lacks_right: bool) {
        if ended == Ended::list_failed || lacks_right {
            self.watching.send_replace(Watching::Trouble(why.into()));
        }
    }

    fn seen(&self, state: &mut State, key: Key, record: Record, observation: Observation) {
        let uid = observation.uid.clone();
        let ours = record.instance == self.instance;
        state.records.insert(key.clone(), record);
        if let Some(waiter) = state.orders.get(&key) {
            waiter.sightings.send_replace(Some(Arc::new(observation)));
        } else if ours && !state.kept.values().any(|kept| kept.key == key) {
            self.delete(state, Deletion { key, uid: Some(uid), orphan: false });
        }
    }

    /// Sends a request to the deleter, once.
    fn delete(&self, state: &mut State, deletion: Deletion) {
        if state.deleting.insert(deletion.key.clone()) {
            // The receiver ends with the process. The sweep of the next agent deletes the requests that are left.
            let _ = self.deletions.send(deletion);
        }
    }

    /// Sends orphans to the deleter.
    pub(super) fn delete_orphans(&self, orphans: Vec<(Key, Record)>) {
        let mut state = self.lock();
        for (key, record) in orphans {
            self.delete(&mut state, Deletion { key, uid: Some(record.uid), orphan: true });
        }
    }

    /// The deleter has finished with a request: it no longer exists (`gone`), or is left to the next sweep. A deleted request stays marked
    /// until the watch shows the deletion, so that an older event does not delete it again.
    pub(super) fn done(&self, key: &Key, gone: bool) {
        let mut state = self.lock();
        if !gone || !state.records.contains_key(key) {
            state.deleting.remove(key);
        }
    }

    /// Whether orders hold requests.
    pub(super) fn has_orders(&self) -> bool {
        !self.lock().orders.is_empty()
    }

    /// Returns the requests of the node that no order holds and that are not kept for operators.
    pub(super) fn unclaimed(&self) -> Vec<(Key, Record)> {
        let state = self.lock();
        let claimed = |key: &Key| state.orders.contains_key(key) || state.kept.values().any(|kept| kept.key == *key);
        state.records.iter().filter(|(key, _)| !claimed(key)).map(|(key, record)| (key.clone(), record.clone())).collect()
    }

    /// Deletes kept requests after [`KEPT_FOR`]. Never returns.
    pub(super) async fn expire_kept(&self) {
        loop {
            let next = self.lock().kept.values().map(|kept| kept.until).min();
            match next {
                None => self.kept_changed.notified().await,
                Some(until) => tokio::select! {
                    () = tokio::time::sleep_until(until) => self.drop_kept(until),
                    () = self.kept_changed.notified() => {}
                },
            }
        }
    }

    fn drop_kept(&self, until: Instant) {
        let mut state = self.lock();
        let over: Vec<_> = state.kept.extract_if(|_, kept| kept.until <= until).map(|(_, kept)| kept).collect();
        for kept in over {
            self.delete(&mut state, Deletion { key: kept.key, uid: kept.uid, orphan: false });
        }
    }

    fn close(&self, handle: &mut RequestHandle) {
        let key = handle.key.clone();
        let uid = handle.uid.take().or_else(|| handle.receiver.borrow().as_ref().map(|s| s.uid.clone()));
        let mut state = self.lock();
        let lost = state.orders.remove(&key).is_none();
        match std::mem::take(&mut handle.on_drop) {
            OnDrop::Leave => {}
            // The deleter has it already, or has deleted it.
            OnDrop::Delete if lost && state.deleting.contains(&key) => {}
            OnDrop::Delete => self.delete(&mut state, Deletion { key, uid, orphan: false }),
            OnDrop::Keep(identity) => {
                let kept = Kept { key, uid, until: Instant::now() + KEPT_FOR };
                let mut surplus: Vec<Kept> = state.kept.insert(identity, kept).into_iter().collect();
                if state.kept.len() > MAX_KEPT {
                    let oldest = state.kept.iter().min_by_key(|(_, kept)| kept.until).map(|(identity, _)| identity.clone());
                    surplus.extend(oldest.and_then(|identity| state.kept.remove(&identity)));
                }
                for kept in surplus {
                    self.delete(&mut state, Deletion { key: kept.key, uid: kept.uid, orphan: false });
                }
                drop(state);
                self.kept_changed.notify_one();
            }
        }
    }
}

#[derive(Debug, Default)]
enum OnDrop {
    #[default]
    Delete,
    Keep(String),
    Leave,
}

/// An order's handle of its request. Dropping it deletes the request, unless it is kept for operators or was never created.
#[derive(Debug)]
pub(super) struct RequestHandle {
    tracker: Arc<RequestTracker>,
    key: Key,
    receiver: watch::Receiver<Option<Arc<Observation>>>,
    uid: Option<String>,
    on_drop: OnDrop,
}

impl RequestHandle {
    pub(super) fn key(&self) -> &Key {
        &self.key
    }

    /// The API server has confirmed the request.
    pub(super) fn created(&mut self, uid: Option<String>) {
        self.uid = uid;
        if let Some(waiter) = self.tracker.lock().orders.get_mut(&self.key) {
            waiter.created = true;
        }
    }

    /// Returns the next observation of the request. `None` if the request is lost.
    pub(super) async fn next(&mut self) -> Option<Arc<Observation>> {
        loop {
            self.receiver.changed().await.ok()?;
            let observation = self.receiver.borrow_and_update().clone();
            if observation.is_some() {
                return observation;
            }
        }
    }

    /// Returns when the watch has shown the request, or its loss.
    pub(super) async fn shown(&self) {
        let mut receiver = self.receiver.clone();
        let _ = receiver.wait_for(Option::is_some).await;
    }

    /// Keeps the request for operators, in place of an earlier one of this identity.
    pub(super) fn keep(&mut self, identity: &Identity) {
        self.on_drop = OnDrop::Keep(identity_digest(identity));
    }

    /// The agent has no request of this name to delete.
    pub(super) fn leave(&mut self) {
        self.on_drop = OnDrop::Leave;
    }
}

impl Drop for RequestHandle {
    fn drop(&mut self) {
        let tracker = self.tracker.clone();
        tracker.close(self);
    }
}

/// Returns the key and the record of a request that the watch does not select.
pub(super) fn record(object: &Watched) -> Option<(Key, Record)> {
    read(object).map(|(key, record, _)| (key, record))
}

fn read(object: &Watched) -> Option<(Key, Record, Observation)> {
    let metadata = &object.metadata;
    let key = Key { namespace: metadata.namespace.as_deref()?.into(), name: metadata.name.as_deref()?.into() };
    let label = |key: &str| metadata.labels.as_ref().and_then(|l| l.get(key)).cloned().unwrap_or_default();
    let uid = metadata.uid.clone().unwrap_or_default();
    let record = Record {
        uid: uid.clone(),
        agent: label(keys::AGENT),
        instance: label(keys::INSTANCE),
        created: metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
        refused: Verdict::of(object.status.as_ref()).is_refusal(),
    };
    Some((key, record, Observation { uid, status: object.status.clone() }))
}
