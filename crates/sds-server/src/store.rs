//! The certificates of this node, by identity, and their subscribers.
//!
//! Owns one [`Entry`] for each [`Identity`] that has a subscriber or had one within the retention. A subscriber holds a [`Lease`].
//! `rotation` receives an [`Event`] for each change, and publishes certificates into the entry. The retention starts with the end of the
//! last lease. After it the entry is removed, and its key is wiped with the last reference. The lock of the
//! map is taken before the lock of an entry, and neither is held across an await.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use workload_identity::{Identity, PodRef};

use crate::material::Svid;

/// The time at which a subscriber needs a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// At once.
    Now,
    /// Later: the subscriber still holds a valid certificate. The certificate is from before a restart of the agent, or of an identity from
    /// before a change of the configuration.
    Held {
        /// The planned renewal of the held certificate.
        renew_at: SystemTime,
        /// The expiry of the held certificate.
        not_after: SystemTime,
    },
}

impl Demand {
    /// Whether `other` needs a certificate earlier.
    fn is_exceeded_by(self, other: Self) -> bool {
        match (self, other) {
            (Self::Now, _) => false,
            (Self::Held { .. }, Self::Now) => true,
            (Self::Held { renew_at: mine, .. }, Self::Held { renew_at: theirs, .. }) => theirs < mine,
        }
    }
}

/// A change that the store reports to `rotation`. The entry may have changed again when the event is received, so the receiver must read
/// the entry. Each further change has its own event.
#[derive(Debug)]
pub enum Event {
    /// The entry has its first subscriber, or a subscriber that needs the certificate earlier. The demand is that of this subscriber, which
    /// may have left again.
    Wanted(Arc<Entry>, Demand),
    /// The last lease of the entry has ended.
    Idle(Arc<Entry>),
}

/// The status of issuance for an entry.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// The next planned attempt.
    pub next_attempt: Option<SystemTime>,
    /// The last error. Cleared when a certificate is issued.
    pub last_error: Option<String>,
    /// The name of the request in progress, from the issuer.
    pub request: Option<Arc<str>>,
    /// The condition that the request waits for, as a text.
    pub waits_for: Option<Arc<str>>,
}

/// The state of one identity: its certificate, subscribers and status.
#[derive(Debug)]
pub struct Entry {
    /// Distinguishes successive entries of one identity.
    pub id: u64,
    /// The identity of the certificate.
    pub identity: Arc<Identity>,
    material: watch::Sender<Option<Arc<Svid>>>,
    book: Mutex<Book>,
    status: Mutex<Status>,
}

#[derive(Debug)]
struct Book {
    next: u64,
    leases: HashMap<u64, Option<PodRef>>,
    demand: Option<Demand>,
    idle_since: Instant,
    /// The pod of the lease that ended last.
    last_pod: Option<PodRef>,
}

impl Entry {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock()
    }

    /// Returns the current certificate.
    pub fn current(&self) -> Option<Arc<Svid>> {
        self.material.borrow().clone()
    }

    /// Publishes a verified certificate to all subscribers and clears their demand.
    pub fn publish(&self, svid: Arc<Svid>) {
        self.book().demand = None;
        self.material.send_replace(Some(svid));
    }

    /// Wakes the subscribers without a new certificate, so that they check its validity again after a step of the clock.
    pub fn reconsider(&self) {
        self.material.send_modify(|_| {});
    }

    /// The earliest demand of the subscribers. `None` without subscribers, or after a certificate was published.
    pub fn demand(&self) -> Option<Demand> {
        let book = self.book();
        if book.leases.is_empty() { None } else { book.demand }
    }

    /// Whether all subscribers still hold a valid certificate, so that no certificate is requested yet.
    pub fn is_held(&self) -> bool {
        matches!(self.demand(), Some(Demand::Held { .. }))
    }

    /// Brings the replacement of held certificates forward to `at`.
    pub fn hurry(&self, at: SystemTime) {
        if let Some(Demand::Held { renew_at, .. }) = &mut self.book().demand {
            *renew_at = (*renew_at).min(at);
        }
    }

    /// Whether the entry has a subscriber.
    pub fn is_leased(&self) -> bool {
        !self.book().leases.is_empty()
    }

    /// The number of subscribers.
    pub fn subscribers(&self) -> usize {
        self.book().leases.len()
    }

    /// The pod of a current subscriber, as the evidence for a request. Prefers a pod other than `but`. Without subscribers, the pod of the
    /// subscriber that left last: a caller that fetches leaves before its request starts.
    pub fn evidence(&self, but: Option<&PodRef>) -> Option<PodRef> {
        let book = self.book();
        if book.leases.is_empty() {
            return book.last_pod.clone();
        }
        let mut pods = book.leases.values().flatten();
        pods.clone().find(|pod| Some(*pod) != but).or_else(|| pods.next()).cloned()
    }

    /// The pods of all current subscribers, without duplicates.
    pub fn pods(&self) -> Vec<PodRef> {
        let mut pods: Vec<PodRef> = self.book().leases.values().flatten().cloned().collect();
        pods.sort_unstable_by(|a, b| a.uid.cmp(&b.uid));
        pods.dedup_by(|a, b| a.uid == b.uid);
        pods
    }

    fn is_at_rest(&self, now: SystemTime) -> bool {
        self.status.lock().next_attempt.is_some_and(|at| now < at)
    }

    /// Changes the status of issuance.
    pub fn set_status(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock());
    }

    /// Returns the status of issuance.
    pub fn status(&self) -> Status {
        self.status.lock().clone()
    }
}

/// The entries of all identities.
#[derive(Debug)]
pub struct Store {
    entries: Mutex<HashMap<Arc<Identity>, Arc<Entry>>>,
    events: mpsc::UnboundedSender<Event>,
    next_id: AtomicU64,
}

impl Store {
    /// An empty store, and the receiver of its events for `rotation`.
    pub fn new() -> (Arc<Self>, mpsc::UnboundedReceiver<Event>) {
        let (events, receiver) = mpsc::unbounded_channel();
        (Arc::new(Self { entries: Mutex::default(), events, next_id: AtomicU64::new(1) }), receiver)
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<Arc<Identity>, Arc<Entry>>> {
        self.entries.lock()
    }

    /// Subscribes to the certificate of `identity`. `pod` is the pod of the subscriber, as the evidence for a request.
    pub fn lease(self: &Arc<Self>, identity: &Arc<Identity>, demand: Demand, pod: Option<PodRef>) -> Lease {
        let mut entries = self.entries();
        let entry = match entries.get(identity) {
            Some(entry) => entry.clone(),
            None => {
                let entry = Arc::new(Entry {
                    id: self.next_id.fetch_add(1, Ordering::Relaxed),
                    identity: identity.clone(),
                    material: watch::Sender::new(None),
                    book: Mutex::new(Book { next: 0, leases: HashMap::new(), demand: None, idle_since: Instant::now(), last_pod: None }),
                    status: Mutex::default(),
                });
                entries.insert(identity.clone(), entry.clone());
                entry
            }
        };
        // The book is locked before the map is released: `forget` then removes no entry that has a lease.
        let mut book = entry.book();
        drop(entries);
        book.next += 1;
        let key = book.next;
        let first = book.leases.is_empty();
        book.leases.insert(key, pod);
        let more = strengthen(&mut book, demand);
        drop(book);
        if first || more {
            self.tell(Event::Wanted(entry.clone(), demand));
        }
        Lease { entry, key, store: self.clone() }
    }

    /// Returns the certificate of `identity` if it is valid at `now` for longer than its settling time and no attempt to replace it is due.
    /// For a caller that does not subscribe: `rotation` gets no event, but the retention starts again.
    pub fn at_rest(&self, identity: &Identity, now: SystemTime) -> Option<Arc<Svid>> {
        let entries = self.entries();
        let entry = entries.get(identity)?;
        let svid = entry.current().filter(|svid| !svid.chain.validity.ends_soon(now) && entry.is_at_rest(now))?;
        entry.book().idle_since = Instant::now();
        Some(svid)
    }

    /// Removes `entry` if it has had no subscriber for `retention`. Returns whether it has been removed.
    pub fn forget(&self, entry: &Arc<Entry>, retention: Duration) -> bool {
        let mut entries = self.entries();
        let book = entry.book();
        if !book.leases.is_empty() || book.idle_since.elapsed() < retention {
            return false;
        }
        drop(book);
        if entries.get(&entry.identity).is_some_and(|current| current.id == entry.id) {
            entries.remove(&entry.identity);
        }
        true
    }

    /// Returns all entries, for metrics and status pages.
    pub fn snapshot(&self) -> Vec<Arc<Entry>> {
        self.entries().values().cloned().collect()
    }

    fn tell(&self, event: Event) {
        // The receiver may be dropped at shutdown.
        let _ = self.events.send(event);
    }
}

fn strengthen(book: &mut Book, demand: Demand) -> bool {
    let more = book.demand.is_none_or(|current| current.is_exceeded_by(demand));
    if more {
        book.demand = Some(demand);
    }
    more
}

/// A subscription. Dropping it ends the subscription.
#[derive(Debug)]
pub struct Lease {
    entry: Arc<Entry>,
    key: u64,
    store: Arc<Store>,
}

impl Lease {
    /// Returns a receiver for the current certificate and its changes.
    pub fn watch(&self) -> watch::Receiver<Option<Arc<Svid>>> {
        self.entry.material.subscribe()
    }

    /// Returns the current certificate.
    pub fn current(&self) -> Option<Arc<Svid>> {
        self.entry.current()
    }

    /// Replaces the demand if `demand` is earlier and no certificate is published.
    pub fn demand(&self, demand: Demand) {
        if self.entry.current().is_none() && strengthen(&mut self.entry.book(), demand) {
            self.store.tell(Event::Wanted(self.entry.clone(), demand));
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut book = self.entry.book();
        let pod = book.leases.remove(&self.key).flatten();
        book.last_pod = pod.or_else(|| book.last_pod.take());
        if !book.leases.is_empty() {
            return;
        }
        // The demand ends with the last subscriber.
        book.demand = None;
        book.idle_since = Instant::now();
        drop(book);
        self.store.tell(Event::Idle(self.entry.clone()));
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use workload_identity::samples::identity;

    use super::*;

    fn told(events: &mut mpsc::UnboundedReceiver<Event>) -> Vec<&'static str> {
        std::iter::from_fn(|| events.try_recv().ok())
            .map(|event| match event {
                Event::Wanted(..) => "wanted",
                Event::Idle(_) => "idle",
            })
            .collect()
    }

    fn at(seconds: u64) -> Demand {
        Demand::Held { renew_at: UNIX_EPOCH + Duration::from_secs(seconds), not_after: UNIX_EPOCH + Duration::from_secs(2 * seconds) }
    }

    #[tokio::test]
    async fn equal_identities_share_an_entry_and_rotation_hears_of_it_once() {
        let (store, mut events) = Store::new();
        let a = store.lease(&identity("a"), Demand::Now, None);
        let b = store.lease(&identity("a"), Demand::Now, None);
        assert_eq!(a.entry.id, b.entry.id);
        assert_eq!(told(&mut events), ["wanted"]);
        let c = store.lease(&identity("c"), Demand::Now, None);
        assert_ne!(a.entry.id, c.entry.id);
        assert_eq!(store.snapshot().len(), 2);
    }

    #[tokio::test]
    async fn only_a_stronger_demand_is_news() {
        let (store, mut events) = Store::new();
        let id = identity("a");
        let first = store.lease(&id, at(100), None);
        assert_eq!(told(&mut events), ["wanted"]);
        let _later = store.lease(&id, at(200), None);
        assert_eq!(told(&mut events), [""; 0], "a later demand changes nothing");
        let _earlier = store.lease(&id, at(50), None);
        assert_eq!(told(&mut events), ["wanted"]);
        first.demand(Demand::Now);
        assert_eq!(told(&mut events), ["wanted"]);
        assert_eq!(first.entry.demand(), Some(Demand::Now));
    }

    #[tokio::test(start_paused = true)]
    async fn an_entry_is_forgotten_only_when_it_was_idle_for_the_retention() {
        let (store, mut events) = Store::new();
        let id = identity("a");
        let retention = Duration::from_secs(300);
        let lease = store.lease(&id, Demand::Now, None);
        let entry = lease.entry.clone();
        drop(lease);
        assert_eq!(told(&mut events), ["wanted", "idle"]);
        assert!(!store.forget(&entry, retention));

        tokio::time::advance(Duration::from_secs(200)).await;
        let again = store.lease(&id, Demand::Now, None);
        assert_eq!(again.entry.id, entry.id, "the entry is kept for the retention");
        drop(again);
        assert_eq!(
            told(&mut events),
            ["wanted", "idle"],
            "each end of the last lease is an event, because a new lease has cancelled the retention"
        );
        tokio::time::advance(Duration::from_secs(200)).await;
        assert!(!store.forget(&entry, retention), "idle for 200 s only");
        tokio::time::advance(Duration::from_secs(100)).await;
        assert!(store.forget(&entry, retention));
        assert!(store.snapshot().is_empty());
        assert_ne!(store.lease(&id, Demand::Now, None).entry.id, entry.id);
    }

    #[tokio::test]
    async fn what_was_needed_ends_with_the_last_subscriber() {
        let (store, mut events) = Store::new();
        let id = identity("a");
        drop(store.lease(&id, Demand::Now, None));
        let lease = store.lease(&id, at(100), None);
        assert_eq!(lease.entry.demand(), Some(at(100)));
        assert_eq!(told(&mut events), ["wanted", "idle", "wanted"]);
    }

    #[tokio::test]
    async fn an_entry_with_a_returned_subscriber_is_not_forgotten() {
        let (store, mut events) = Store::new();
        let id = identity("a");
        drop(store.lease(&id, Demand::Now, None));
        let lease = store.lease(&id, Demand::Now, None);
        assert!(!store.forget(&lease.entry, Duration::ZERO));
        told(&mut events);
        drop(lease);
        assert_eq!(told(&mut events), ["idle"]);
    }

    #[tokio::test]
    async fn the_evidence_is_a_living_subscribers_pod_and_a_sibling_stands_in() {
        let (store, _events) = Store::new();
        let id = identity("a");
        let pod = |name: &str| PodRef { namespace: "ns".into(), name: name.into(), uid: name.into() };
        let a = store.lease(&id, Demand::Now, Some(pod("a")));
        let b = store.lease(&id, Demand::Now, Some(pod("b")));
        assert_eq!(a.entry.evidence(Some(&pod("a"))), Some(pod("b")));
        drop(b);
        assert_eq!(a.entry.evidence(Some(&pod("a"))), Some(pod("a")), "there is no other pod");
        let entry = a.entry.clone();
        drop(a);
        assert_eq!(entry.evidence(None), Some(pod("a")), "the pod of the last subscriber");
        assert!(entry.pods().is_empty(), "it no longer subscribes");
    }
}
