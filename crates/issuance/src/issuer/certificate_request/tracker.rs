//! What is known of the node's requests: fed by the one watch, read by the orders that wait, asked by the sweep.
//!
//! Owns the link between a request and the order that holds its key. A request of this process that no order claims, whatever lost it,
//! is deleted when it is seen. No lock here is held across an await.

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

/// A refused request stays so long for people to read.
pub(super) const KEPT_FOR: Duration = Duration::from_secs(600);
/// No more refused requests than this stay.
const MAX_KEPT: usize = 32;

/// A request as the watch reads it: without its CSR.
pub(super) type Watched = Observed<WatchedKind, NotUsed, Status>;

/// What the agent keeps of a request's metadata: the labels that say whose it is.
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

/// Namespace and name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
}

/// One request to delete.
#[derive(Debug, Clone)]
pub(super) struct Deletion {
    pub(super) key: Key,
    /// The object that is meant; none where the create was never answered.
    pub(super) uid: Option<String>,
    /// Whether it belongs to an agent that has gone.
    pub(super) orphan: bool,
}

/// One look at a request.
#[derive(Debug)]
pub(super) struct Observation {
    pub(super) uid: String,
    pub(super) status: Option<Status>,
}

/// What the sweep needs of a request.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) uid: String,
    /// [`keys::AGENT`].
    pub(super) agent: String,
    /// [`keys::INSTANCE`].
    pub(super) instance: String,
    /// Seconds since the epoch.
    pub(super) created: i64,
    /// Denied, failed or invalid.
    pub(super) refused: bool,
}

/// Whether the watch runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Watching {
    /// Not yet.
    Starting,
    /// It does.
    Running,
    /// It does not, and this is why.
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
    /// None: nothing seen yet. A closed channel: lost.
    sightings: watch::Sender<Option<Arc<Observation>>>,
    created: bool,
    /// Created before the list that is being read was asked for: it must be in it.
    expected: bool,
}

#[derive(Debug)]
struct Kept {
    key: Key,
    uid: Option<String>,
    until: Instant,
}

/// See the module.
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

    /// Announces an order's request before it is created, so that no event can be missed.
    pub(super) fn open(self: &Arc<Self>, namespace: &Arc<str>, name: &Arc<str>) -> RequestHandle {
        let key = Key { namespace: namespace.clone(), name: name.clone() };
        let (sightings, receiver) = watch::channel(None);
        self.lock().orders.insert(key.clone(), Waiter { sightings, created: false, expected: false });
        RequestHandle { tracker: self.clone(), key, receiver, uid: None, on_drop: OnDrop::Delete }
    }

    /// A list is about to be asked for.
    pub(super) fn list_begins(&self) {
        let mut state = self.lock();
        state.list.clear();
        state.orders.values_mut().for_each(|waiter| waiter.expected = waiter.created);
    }

    /// One object of the list.
    pub(super) fn listed(&self, object: &Watched) {
        if let Some((key, record, observation)) = read(object) {
            self.lock().list.insert(key, (record, observation));
        }
    }

    /// The list is complete: what is not in it has gone.
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

    /// A request is new or has changed.
    pub(super) fn applied(&self, object: &Watched) {
        if let Some((key, record, observation)) = read(object) {
            self.seen(&mut self.lock(), key, record, observation);
        }
    }

    /// A request has gone from the selection: deleted, or relabelled.
    pub(super) fn deleted(&self, object: &Watched) {
        let Some((key, record, _)) = read(object) else { return };
        let mut state = self.lock();
        state.records.remove(&key);
        state.deleting.remove(&key);
        state.kept.retain(|_, kept| kept.key != key);
        if state.orders.remove(&key).is_some() {
            // Where it was relabelled it still exists, and nobody else will delete it.
            self.delete(&mut state, Deletion { key, uid: Some(record.uid), orphan: false });
        }
    }

    /// The watch does not run. What was created before may have to wait; nothing new is created where no answer could be seen.
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

    /// Hands a request to the deleter, once.
    fn delete(&self, state: &mut State, deletion: Deletion) {
        if state.deleting.insert(deletion.key.clone()) {
            // The receiver ends with the process; what is left then is swept by the successor.
            let _ = self.deletions.send(deletion);
        }
    }

    /// Hands requests of others to the deleter.
    pub(super) fn delete_orphans(&self, orphans: Vec<(Key, Record)>) {
        let mut state = self.lock();
        for (key, record) in orphans {
            self.delete(&mut state, Deletion { key, uid: Some(record.uid), orphan: true });
        }
    }

    /// The deleter is done with a request: it has gone, or it is left to the next sweep. What has gone stays marked until the watch
    /// says so too: an older event that is still on its way must not delete it again.
    pub(super) fn done(&self, key: &Key, gone: bool) {
        let mut state = self.lock();
        if !gone || !state.records.contains_key(key) {
            state.deleting.remove(key);
        }
    }

    /// Whether orders still hold requests.
    pub(super) fn has_orders(&self) -> bool {
        !self.lock().orders.is_empty()
    }

    /// Everything on the node that neither an order nor a person needs.
    pub(super) fn unclaimed(&self) -> Vec<(Key, Record)> {
        let state = self.lock();
        let claimed = |key: &Key| state.orders.contains_key(key) || state.kept.values().any(|kept| kept.key == *key);
        state.records.iter().filter(|(key, _)| !claimed(key)).map(|(key, record)| (key.clone(), record.clone())).collect()
    }

    /// Deletes refused requests when their time is over; never returns.
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
            // Already with the deleter, or gone.
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

/// An order's hold on its request. Dropping it lets the request be deleted, unless it is kept for people or was never made.
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

    /// The API server has answered that the request exists.
    pub(super) fn created(&mut self, uid: Option<String>) {
        self.uid = uid;
        if let Some(waiter) = self.tracker.lock().orders.get_mut(&self.key) {
            waiter.created = true;
        }
    }

    /// The next look at the request; none when it has been lost.
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

    /// Leaves the request for a person to read, in the place of an earlier one of this identity.
    pub(super) fn keep(&mut self, identity: &Identity) {
        self.on_drop = OnDrop::Keep(identity_digest(identity));
    }

    /// There is nothing of ours to delete.
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
