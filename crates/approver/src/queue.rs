//! Queue of undecided requests. No I/O, no clock.
//!
//! At most one worker handles a request at a time. A request that changes meanwhile is queued again. A request whose decision failed is
//! queued again after a backoff.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use cert_manager::Request;
use tokio::time::Instant;

/// Backoff after the first failure of a request. It doubles with each further failure.
const MIN_BACKOFF: Duration = Duration::from_millis(500);
/// Upper bound of the backoff. An operator has to add a missing permission; an unavailable server usually recovers sooner.
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// Namespace and name of a request.
pub type Key = (String, String);

/// One request to decide.
#[derive(Debug, Clone)]
pub struct WorkItem {
    /// The request as the watch last reported it.
    pub request: Arc<Request>,
    /// Time at which the watch first reported it.
    pub since: Instant,
}

#[derive(Debug)]
struct Entry {
    item: WorkItem,
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
        let works = matches!(self.state, State::Working { .. } | State::Leaving);
        if works {
            self.state = State::Leaving;
        }
        works
    }
}

/// Undecided requests, each of them ready, at a worker, or resting.
#[derive(Debug, Default)]
pub struct Queue {
    entries: HashMap<Key, Entry>,
    ready: VecDeque<Key>,
    list: HashSet<Key>,
}

/// Returns the key of a request.
pub fn key(request: &Request) -> Key {
    let metadata = &request.metadata;
    (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default())
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

    /// Notes the current state of a request that needs a decision.
    pub fn seen(&mut self, request: Request, now: Instant) {
        let key = key(&request);
        let request = Arc::new(request);
        match self.entries.get_mut(&key) {
            Some(entry) => {
                entry.item.request = request;
                match &mut entry.state {
                    State::Working { changed } => *changed = true,
                    State::Leaving => (entry.item.since, entry.state) = (now, State::Working { changed: true }),
                    State::Ready | State::Resting => {}
                }
            }
            None => {
                self.entries.insert(key.clone(), Entry { item: WorkItem { request, since: now }, state: State::Ready, failures: 0 });
                self.ready.push_back(key);
            }
        }
    }

    /// Notes that a request was decided or deleted.
    pub fn gone(&mut self, key: &Key) {
        if let Some(entry) = self.entries.get_mut(key)
            && entry.stays()
        {
            return;
        }
        self.entries.remove(key);
    }

    /// Begins a complete list of requests.
    pub fn list_begins(&mut self) {
        self.list.clear();
    }

    /// Notes a request of the list.
    pub fn listed(&mut self, key: Key) {
        self.list.insert(key);
    }

    /// Ends the list, and removes requests that it did not contain.
    pub fn list_ends(&mut self) {
        let list = std::mem::take(&mut self.list);
        self.entries.retain(|key, entry| list.contains(key) || entry.stays());
    }

    /// Returns the next request to work on, in FIFO order.
    pub fn pop(&mut self) -> Option<(Key, WorkItem)> {
        while let Some(key) = self.ready.pop_front() {
            // Skips a key whose request was removed, or whose entry is not ready.
            if let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.state == State::Ready) {
                entry.state = State::Working { changed: false };
                return Some((key, entry.item.clone()));
            }
        }
        None
    }

    /// Notes that the worker is done with a request.
    pub fn settled(&mut self, key: &Key) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        match entry.state {
            State::Working { changed: true } => {
                (entry.state, entry.failures) = (State::Ready, 0);
                self.ready.push_back(key.clone());
            }
            // The entry was removed and created again: it is not this worker's.
            State::Ready | State::Resting => {}
            State::Working { changed: false } | State::Leaving => drop(self.entries.remove(key)),
        }
    }

    /// Notes that the worker failed. Returns the backoff, 500 ms to 30 s, or `None` if the request was removed. The caller reduces the
    /// backoff by up to half at random, waits, and calls [`rested`](Self::rested).
    pub fn failed(&mut self, key: &Key) -> Option<Duration> {
        if self.entries.get(key)?.state == State::Leaving {
            self.entries.remove(key);
        }
        let entry = self.entries.get_mut(key).filter(|entry| matches!(entry.state, State::Working { .. }))?;
        let pause = (MIN_BACKOFF * 2_u32.pow(entry.failures.min(10))).min(MAX_BACKOFF);
        entry.failures += 1;
        entry.state = State::Resting;
        Some(pause)
    }

    /// Notes that the worker defers the decision. Returns true if the request has to rest. Returns false if it changed meanwhile and is
    /// ready again, or needs no decision.
    pub fn waits(&mut self, key: &Key) -> bool {
        let Some(entry) = self.entries.get_mut(key) else { return false };
        match entry.state {
            State::Working { changed: false } => {
                entry.state = State::Resting;
                true
            }
            State::Working { changed: true } => {
                entry.state = State::Ready;
                self.ready.push_back(key.clone());
                false
            }
            State::Leaving => {
                self.entries.remove(key);
                false
            }
            State::Ready | State::Resting => false,
        }
    }

    /// Notes that the worker returns a request undecided. The request is the next to be worked on.
    pub fn given_back(&mut self, key: &Key) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        match entry.state {
            State::Working { .. } => {
                entry.state = State::Ready;
                self.ready.push_front(key.clone());
            }
            State::Leaving => drop(self.entries.remove(key)),
            State::Ready | State::Resting => {}
        }
    }

    /// Returns whether a request is ready.
    pub fn has_ready(&mut self) -> bool {
        while let Some(key) = self.ready.front() {
            if self.entries.get(key).is_some_and(|entry| entry.state == State::Ready) {
                return true;
            }
            self.ready.pop_front();
        }
        false
    }

    /// Notes a change of the rules: resting requests are ready immediately, and requests at a worker are queued again afterwards.
    pub fn wake(&mut self) {
        for (key, entry) in &mut self.entries {
            match &mut entry.state {
                State::Resting => {
                    entry.state = State::Ready;
                    self.ready.push_back(key.clone());
                }
                State::Working { changed } => *changed = true,
                State::Ready | State::Leaving => {}
            }
        }
    }

    /// Notes that the rest of a request is over.
    pub fn rested(&mut self, key: &Key) {
        if let Some(entry) = self.entries.get_mut(key).filter(|entry| entry.state == State::Resting) {
            entry.state = State::Ready;
            self.ready.push_back(key.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(name: &str, version: &str) -> Request {
        let mut request = Request::new(name, cert_manager::CertificateRequestSpec::default());
        request.metadata.namespace = Some("n".into());
        request.metadata.resource_version = Some(version.into());
        request
    }

    fn next(queue: &mut Queue) -> Option<(String, String)> {
        queue.pop().map(|(key, item)| (key.1, item.request.metadata.resource_version.clone().unwrap()))
    }

    #[test]
    fn one_worker_at_a_time_and_what_changed_meanwhile_is_looked_at_again() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.seen(request("a", "1"), now);
        queue.seen(request("b", "1"), now);
        queue.seen(request("a", "2"), now);
        assert_eq!(next(&mut queue), Some(("a".into(), "2".into())));
        queue.seen(request("a", "3"), now);
        assert_eq!(next(&mut queue), Some(("b".into(), "1".into())));
        assert_eq!(next(&mut queue), None);
        let (a, b) = (("n".to_owned(), "a".to_owned()), ("n".to_owned(), "b".to_owned()));
        queue.settled(&a);
        queue.settled(&b);
        assert_eq!(next(&mut queue), Some(("a".into(), "3".into())));
        queue.settled(&a);
        assert!(queue.is_empty() && queue.ready.is_empty());
    }

    #[test]
    fn failures_rest_ever_longer_and_what_is_gone_does_not_come_back() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        let a = ("n".to_owned(), "a".to_owned());
        queue.seen(request("a", "1"), now);
        let mut pauses = Vec::new();
        for _ in 0..9 {
            queue.pop().unwrap();
            pauses.push(queue.failed(&a).unwrap().as_millis());
            queue.seen(request("a", "2"), now);
            assert_eq!(next(&mut queue), None, "a change does not end the backoff");
            queue.rested(&a);
        }
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]);
        queue.gone(&a);
        assert_eq!(next(&mut queue), None);
        assert_eq!(queue.failed(&a), None);
        queue.rested(&a);
        assert!(queue.is_empty());
    }

    #[test]
    fn waiting_requests_are_judged_again_when_the_rules_change() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        let [a, b] = ["a", "b"].map(|name| ("n".to_owned(), name.to_owned()));
        queue.seen(request("a", "1"), now);
        queue.seen(request("b", "1"), now);
        let first = (next(&mut queue), next(&mut queue));
        assert!(first.0.is_some() && first.1.is_some() && queue.waits(&a) && next(&mut queue).is_none());
        queue.wake();
        assert_eq!((next(&mut queue), next(&mut queue)), (Some(("a".into(), "1".into())), None));
        assert!(!queue.waits(&b), "the rules changed while the worker had it");
        assert_eq!(next(&mut queue), Some(("b".into(), "1".into())));
        queue.gone(&a);
        assert!(!queue.waits(&a), "the request was removed");
    }

    #[test]
    fn what_is_given_back_is_the_next_and_what_is_gone_meanwhile_is_not() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        assert!(!queue.has_ready());
        for name in ["a", "b", "c"] {
            queue.seen(request(name, "1"), now);
        }
        let a = ("n".to_owned(), "a".to_owned());
        assert!(next(&mut queue).is_some());
        queue.seen(request("a", "2"), now);
        queue.given_back(&a);
        assert_eq!(next(&mut queue), Some(("a".into(), "2".into())));
        queue.gone(&a);
        queue.given_back(&a);
        queue.gone(&("n".to_owned(), "b".to_owned()));
        assert!(queue.has_ready());
        assert_eq!(next(&mut queue), Some(("c".into(), "1".into())));
        assert!(!queue.has_ready() && queue.len() == 1, "a worker has c");
    }

    /// Rules that remove an issuer and add it again have this effect.
    #[test]
    fn a_request_that_returns_during_its_work_is_queued_again() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        let a = ("n".to_owned(), "a".to_owned());
        let begun = |queue: &mut Queue| {
            queue.seen(request("a", "1"), now);
            assert!(next(queue).is_some());
            queue.gone(&a);
        };
        begun(&mut queue);
        queue.seen(request("a", "2"), now);
        assert_eq!(next(&mut queue), None, "at most one worker at a time");
        queue.settled(&a);
        assert_eq!(next(&mut queue), Some(("a".into(), "2".into())));
        assert!(queue.failed(&a).is_some(), "a failure of the second worker counts");
        queue.gone(&a);

        begun(&mut queue);
        queue.wake();
        queue.settled(&a);
        begun(&mut queue);
        assert_eq!(queue.failed(&a), None);
        begun(&mut queue);
        assert!(!queue.waits(&a));
        begun(&mut queue);
        queue.list_begins();
        queue.list_ends();
        queue.settled(&a);
        assert!(queue.is_empty() && next(&mut queue).is_none());
    }

    #[test]
    fn a_list_takes_away_what_it_lacks() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.seen(request("a", "1"), now);
        queue.seen(request("b", "1"), now);
        queue.list_begins();
        queue.listed(("n".into(), "b".into()));
        queue.seen(request("b", "1"), now);
        queue.list_ends();
        assert_eq!((next(&mut queue), next(&mut queue)), (Some(("b".into(), "1".into())), None));
        assert_eq!(queue.len(), 1);
    }
}
