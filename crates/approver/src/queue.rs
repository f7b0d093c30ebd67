//! Queue of undecided requests, fair between nodes. No I/O, no clock.
//!
//! Requests are ready [in turn by node](turns). At most one worker handles a request at a time, and a node occupies at most
//! [`MAX_WORKERS_PER_NODE`] workers. A request that changes meanwhile is queued again. A request whose decision failed is queued again
//! after a backoff.
//!
//! The memory that requests of one node can occupy is bounded: the queue holds the objects of [`MAX_OBJECTS_PER_NODE`] requests, and the
//! names of further ones up to [`MAX_TRACKED_PER_NODE`]. Requests beyond [`MAX_REQUESTS_PER_NODE`] are to be denied. Requests beyond
//! [`MAX_TRACKED_PER_NODE`] are not tracked, and [`Queue::needs_list`] reports when a list can bring them back.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use cert_manager::{Request, claims};
use tokio::time::Instant;

use turns::{Kind, Node, Position, Turns};

#[cfg(test)]
mod tests;
pub mod turns;

/// Backoff after the first failure of a request. It doubles with each further failure.
const MIN_BACKOFF: Duration = Duration::from_millis(500);
/// Upper bound of the backoff. An operator has to add a missing permission; an unavailable server usually recovers sooner.
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// Requests of a node whose objects are held. Further ones are read when it is their turn.
pub const MAX_OBJECTS_PER_NODE: usize = 256;
/// Undecided requests of a node that are judged. An agent has one for each identity of its node; a node has at most some hundred pods.
pub const MAX_REQUESTS_PER_NODE: usize = 10 * MAX_OBJECTS_PER_NODE;
/// Undecided requests of a node whose names are held.
pub const MAX_TRACKED_PER_NODE: usize = 4 * MAX_REQUESTS_PER_NODE;
/// Size of the largest object that is held, in bytes of its texts. An agent's request is less than 4 KiB.
const MAX_HELD_BYTES: usize = 16 << 10;
/// Requests of a node that rest, after a failure or because the agent's configuration may be newer than the approver's. Further ones are not
/// deferred. An agent whose configuration is newer than the approver's may reissue all certificates of its node.
pub const MAX_RESTING_PER_NODE: usize = 256;
/// Workers that requests of one node may occupy, so that a node whose pods cannot be read leaves workers to the others.
pub const MAX_WORKERS_PER_NODE: usize = 8;

/// Namespace and name of a request.
pub type Key = (String, String);

/// One request to decide.
#[derive(Debug, Clone)]
pub struct WorkItem {
    /// The request as the watch last reported it. `None` if it has to be read.
    pub request: Option<Arc<Request>>,
    /// UID of the request.
    pub uid: Arc<str>,
    /// Time at which the watch first reported it.
    pub since: Instant,
    /// Whether its node has more than [`MAX_REQUESTS_PER_NODE`] undecided requests, and this is one of the last that arrived.
    pub is_beyond: bool,
    /// Whether one more request of its node may rest.
    pub may_rest: bool,
}

#[derive(Debug)]
struct Entry {
    item: WorkItem,
    node: Node,
    position: Position,
    state: State,
    /// Consecutive failures.
    failures: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ready,
    Working {
        changed: bool,
    },
    /// A worker has the request, which needs no decision anymore. The entry stays until the worker is done, so that a request that
    /// returns does not get a second worker.
    Leaving,
    Resting,
}

impl Entry {
    /// Notes that the request needs no decision. Returns true if the entry has to wait for its worker.
    fn stays(&mut self) -> bool {
        let works = self.works();
        if works {
            self.state = State::Leaving;
        }
        works
    }

    fn works(&self) -> bool {
        matches!(self.state, State::Working { .. } | State::Leaving)
    }

    fn kind(&self) -> Kind {
        if self.item.is_beyond { Kind::Beyond } else { Kind::Within }
    }
}

/// The counts of a node.
#[derive(Debug, Default)]
struct Share {
    /// Entries.
    tracked: usize,
    /// Entries with an object.
    objects: usize,
    /// Entries at a worker.
    working: usize,
    /// Entries that rest.
    resting: usize,
    /// Whether requests are not tracked.
    has_untracked: bool,
}

/// Undecided requests, each of them ready, at a worker, or resting.
#[derive(Debug, Default)]
pub struct Queue {
    entries: HashMap<Key, Entry>,
    ready: Turns,
    shares: HashMap<Node, Share>,
    arrived: u64,
    /// Whether untracked requests of a node fit now.
    needs_list: bool,
}

/// Returns the key of a request.
pub fn key(request: &Request) -> Key {
    let metadata = &request.metadata;
    (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default())
}

/// Returns the node that the requester's token claims. All requesters that are no agents share one turn, whichever node they run on.
pub fn node(request: &Request, by_an_agent: bool) -> Node {
    if !by_an_agent {
        return Node::default();
    }
    request.spec.extra.get(claims::NODE_NAME).and_then(|names| names.first()).map_or_else(Node::default, |name| Node::from(name.as_str()))
}

/// Returns whether the object is small enough to be held.
fn is_small(request: &Request) -> bool {
    let (metadata, spec) = (&request.metadata, &request.spec);
    let map = |map: &Option<BTreeMap<String, String>>| map.iter().flatten().map(|(key, value)| key.len() + value.len()).sum::<usize>();
    let list = |list: &[String]| list.iter().map(String::len).sum::<usize>();
    let extra: usize = spec.extra.iter().map(|(key, values)| key.len() + list(values)).sum();
    let texts = [Some(&spec.issuer_ref.name), spec.duration.as_ref(), spec.username.as_ref(), spec.uid.as_ref()];
    let texts: usize = texts.into_iter().flatten().map(String::len).sum();
    let conditions = request.status.iter().flat_map(|status| &status.conditions);
    let conditions: usize = conditions.map(|c| c.message.as_ref().map_or(0, String::len) + c.reason.as_ref().map_or(0, String::len)).sum();
    let bytes = map(&metadata.annotations) + map(&metadata.labels) + spec.request.encoded_len() + texts;
    bytes + list(&spec.usages) + list(&spec.groups) + extra + conditions <= MAX_HELD_BYTES
}

impl Queue {
    /// Returns the number of requests that are ready, at a worker, or resting.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns whether the queue has no request.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Notes the current state of a request that needs a decision. `node` is its node, and `approved` the number of this node's
    /// approved requests that wait for their signer: they count towards the node's limit.
    pub fn seen(&mut self, request: Request, node: Node, approved: usize, now: Instant) {
        let key = key(&request);
        match self.entries.get_mut(&key) {
            Some(entry) => {
                entry.item.uid = request.metadata.uid.as_deref().unwrap_or_default().into();
                if entry.item.request.is_some() && is_small(&request) {
                    entry.item.request = Some(Arc::new(request));
                } else if entry.item.request.take().is_some()
                    && let Some(share) = self.shares.get_mut(&entry.node)
                {
                    share.objects -= 1;
                }
                match &mut entry.state {
                    State::Working { changed } => *changed = true,
                    State::Leaving => (entry.item.since, entry.state) = (now, State::Working { changed: true }),
                    State::Ready | State::Resting => {}
                }
            }
            None => self.track(key, request, node, approved, now),
        }
    }

    fn track(&mut self, key: Key, request: Request, node: Node, approved: usize, now: Instant) {
        let share = self.shares.entry(node.clone()).or_default();
        if share.tracked >= MAX_TRACKED_PER_NODE {
            share.has_untracked = true;
            return;
        }
        let created = request.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second());
        let position = Position { created, arrived: self.arrived };
        self.arrived += 1;
        let uid = request.metadata.uid.as_deref().unwrap_or_default().into();
        let holds = share.objects < MAX_OBJECTS_PER_NODE && is_small(&request);
        let is_beyond = share.tracked + approved >= MAX_REQUESTS_PER_NODE;
        let item = WorkItem { request: holds.then(|| Arc::new(request)), uid, since: now, is_beyond, may_rest: true };
        share.tracked += 1;
        share.objects += usize::from(holds);
        let entry = Entry { item, node, position, state: State::Ready, failures: 0 };
        self.ready.add(&entry.node, entry.kind(), position, key.clone());
        self.entries.insert(key, entry);
    }

    /// Removes an entry that no worker has.
    fn remove(&mut self, key: &Key) {
        let Some(entry) = self.entries.remove(key) else { return };
        if entry.state == State::Ready {
            self.ready.remove(&entry.node, entry.kind(), entry.position);
        }
        let Some(share) = self.shares.get_mut(&entry.node) else { return };
        share.tracked -= 1;
        share.objects -= usize::from(entry.item.request.is_some());
        share.resting -= usize::from(entry.state == State::Resting);
        if share.has_untracked && share.tracked <= MAX_REQUESTS_PER_NODE {
            (share.has_untracked, self.needs_list) = (false, true);
        }
        if share.tracked == 0 {
            self.shares.remove(&entry.node);
        }
    }

    /// Returns once whether a list of all requests would bring requests that were not tracked.
    pub fn needs_list(&mut self) -> bool {
        std::mem::take(&mut self.needs_list)
    }

    /// Notes that a request was decided or deleted.
    pub fn gone(&mut self, key: &Key) {
        if self.entries.get_mut(key).is_some_and(|entry| !entry.stays()) {
            self.remove(key);
        }
    }

    /// Removes the requests for which `keeps` returns false.
    pub fn retain(&mut self, keeps: impl Fn(&Key) -> bool) {
        let surplus: Vec<Key> = self.entries.keys().filter(|key| !keeps(key)).cloned().collect();
        for key in surplus {
            self.gone(&key);
        }
    }

    /// Returns the next request to work on: one of each node in turn, and the oldest of its node. `approved` returns the number of a node's
    /// approved requests that wait for their signer now.
    pub fn pop(&mut self, approved: impl Fn(&Node) -> usize) -> Option<(Key, WorkItem)> {
        let shares = &self.shares;
        let key = self.ready.take(|node| shares.get(node).is_none_or(|share| share.working < MAX_WORKERS_PER_NODE))?;
        let entry = self.entries.get_mut(&key)?;
        entry.state = State::Working { changed: false };
        let share = self.shares.entry(entry.node.clone()).or_default();
        share.working += 1;
        // A node that is at its limit no longer has its newest requests denied.
        let is_beyond = entry.item.is_beyond && share.tracked + approved(&entry.node) > MAX_REQUESTS_PER_NODE;
        let may_rest = share.resting < MAX_RESTING_PER_NODE;
        Some((key, WorkItem { is_beyond, may_rest, ..entry.item.clone() }))
    }

    /// Notes that no worker has a request anymore: it rests. Returns the state in which the worker left it.
    fn back(&mut self, key: &Key) -> Option<State> {
        let entry = self.entries.get_mut(key).filter(|entry| entry.works())?;
        let state = entry.state;
        if let Some(share) = self.shares.get_mut(&entry.node) {
            share.working -= 1;
            share.resting += 1;
        }
        entry.state = State::Resting;
        Some(state)
    }

    /// Makes a resting request ready.
    fn make_ready(&mut self, key: &Key, first: bool) {
        let Some(entry) = self.entries.get_mut(key).filter(|entry| entry.state == State::Resting) else { return };
        if let Some(share) = self.shares.get_mut(&entry.node) {
            share.resting -= 1;
        }
        entry.state = State::Ready;
        let add = if first { Turns::add_first } else { Turns::add };
        add(&mut self.ready, &entry.node, entry.kind(), entry.position, key.clone());
    }

    /// Notes that the worker has written the decision about the request with this UID. A change that was reported meanwhile is that decision,
    /// or came before it.
    pub fn decided(&mut self, key: &Key, uid: &str) {
        if self.entries.get(key).is_some_and(|entry| entry.works() && *entry.item.uid == *uid) {
            self.back(key);
            self.remove(key);
        } else {
            self.settled(key);
        }
    }

    /// Notes that the worker is done with a request.
    pub fn settled(&mut self, key: &Key) {
        match self.back(key) {
            Some(State::Working { changed: true }) => {
                if let Some(entry) = self.entries.get_mut(key) {
                    entry.failures = 0;
                }
                self.make_ready(key, false);
            }
            Some(_) => self.remove(key),
            // The entry was removed and created again: it is not this worker's.
            None => {}
        }
    }

    /// Notes that the worker failed. Returns the backoff, 500 ms to 30 s, or `None` if the request was removed. The caller reduces the
    /// backoff by up to half at random, waits, and calls [`rested`](Self::rested).
    pub fn failed(&mut self, key: &Key) -> Option<Duration> {
        if self.back(key)? == State::Leaving {
            self.remove(key);
            return None;
        }
        let entry = self.entries.get_mut(key)?;
        let pause = (MIN_BACKOFF * 2_u32.pow(entry.failures.min(10))).min(MAX_BACKOFF);
        entry.failures += 1;
        Some(pause)
    }

    /// Notes that the worker defers the decision. Returns true if the request has to rest. Returns false if it changed meanwhile and is
    /// ready again, or needs no decision.
    pub fn waits(&mut self, key: &Key) -> bool {
        match self.back(key) {
            Some(State::Working { changed: false }) => true,
            Some(State::Working { changed: true }) => {
                self.make_ready(key, false);
                false
            }
            Some(_) => {
                self.remove(key);
                false
            }
            None => false,
        }
    }

    /// Notes that the worker returns a request undecided. The request is the next to be worked on.
    pub fn given_back(&mut self, key: &Key) {
        match self.back(key) {
            Some(State::Working { .. }) => self.make_ready(key, true),
            Some(_) => self.remove(key),
            None => {}
        }
    }

    /// Returns whether a request is ready.
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Notes a change of the rules: resting requests are ready immediately, and requests at a worker are queued again afterwards.
    pub fn wake(&mut self) {
        let mut resting = Vec::new();
        for (key, entry) in &mut self.entries {
            match &mut entry.state {
                State::Resting => resting.push((entry.position, key.clone())),
                State::Working { changed } => *changed = true,
                State::Ready | State::Leaving => {}
            }
        }
        resting.sort_unstable();
        for (_, key) in resting {
            self.make_ready(&key, false);
        }
    }

    /// Notes that the rest of a request is over.
    pub fn rested(&mut self, key: &Key) {
        self.make_ready(key, false);
    }
}
