//! What waits for a decision: bookkeeping without I/O or clock.
//!
//! Each request is worked on by one worker at a time. What changed meanwhile is looked at again; what failed rests first.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use cert_manager::Request;
use tokio::time::Instant;

/// After the first trouble with a request; it doubles.
const MIN_BACKOFF: Duration = Duration::from_millis(500);
/// A right that is missing comes back by a person's hand; a server that is away, sooner than that.
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// Namespace and name.
pub type Key = (String, String);

/// One request to decide about.
#[derive(Debug, Clone)]
pub struct WorkItem {
    /// As it was last seen.
    pub request: Arc<Request>,
    /// When it was first seen.
    pub since: Instant,
}

#[derive(Debug)]
struct Entry {
    item: WorkItem,
    state: State,
    /// In a row.
    failures: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ready,
    Working {
        changed: bool,
    },
    /// Being worked on, and gone meanwhile: it stays until its worker is done, so that what comes back has no second one beside it.
    Leaving,
    Resting,
}

impl Entry {
    /// Notes that it is gone; true where its worker has to be awaited.
    fn stays(&mut self) -> bool {
        let works = matches!(self.state, State::Working { .. } | State::Leaving);
        if works {
            self.state = State::Leaving;
        }
        works
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Queue {
    entries: HashMap<Key, Entry>,
    ready: VecDeque<Key>,
    list: HashSet<Key>,
}

/// The key of a request.
pub fn key(request: &Request) -> Key {
    let metadata = &request.metadata;
    (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default())
}

impl Queue {
    /// How many wait, are being worked on, or rest.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A request that has to be decided, as it is now.
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

    /// A request that needs no decision any more, or is not there any more.
    pub fn gone(&mut self, key: &Key) {
        if let Some(entry) = self.entries.get_mut(key)
            && entry.stays()
        {
            return;
        }
        self.entries.remove(key);
    }

    /// A whole list is about to be told.
    pub fn list_begins(&mut self) {
        self.list.clear();
    }

    /// One of the list.
    pub fn listed(&mut self, key: Key) {
        self.list.insert(key);
    }

    /// What the list lacked is gone.
    pub fn list_ends(&mut self) {
        let list = std::mem::take(&mut self.list);
        self.entries.retain(|key, entry| list.contains(key) || entry.stays());
    }

    /// The next to work on, oldest first.
    pub fn pop(&mut self) -> Option<(Key, WorkItem)> {
        while let Some(key) = self.ready.pop_front() {
            // Others were gone before it was their turn, or came back meanwhile and stand in the line again.
            if let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.state == State::Ready) {
                entry.state = State::Working { changed: false };
                return Some((key, entry.item.clone()));
            }
        }
        None
    }

    /// Its worker has settled it.
    pub fn settled(&mut self, key: &Key) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        match entry.state {
            State::Working { changed: true } => {
                (entry.state, entry.failures) = (State::Ready, 0);
                self.ready.push_back(key.clone());
            }
            // A request that was forgotten and made anew meanwhile is another's.
            State::Ready | State::Resting => {}
            State::Working { changed: false } | State::Leaving => drop(self.entries.remove(key)),
        }
    }

    /// Its worker could not settle it: how long it is to rest, before half of it is taken off at random.
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

    /// Its worker leaves it undecided; true where it is to rest now, and false where it changed meanwhile and is looked at again at once.
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

    /// Its worker gives it back undecided: it is the next to be worked on.
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

    /// Whether there is one to work on.
    pub fn has_ready(&mut self) -> bool {
        while let Some(key) = self.ready.front() {
            if self.entries.get(key).is_some_and(|entry| entry.state == State::Ready) {
                return true;
            }
            self.ready.pop_front();
        }
        false
    }

    /// The rules have changed: what rests is looked at again at once, and what is being worked on once more.
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

    /// It has rested.
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
            assert_eq!(next(&mut queue), None, "it rests, whatever is told of it");
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
        assert!(!queue.waits(&b), "the rules changed while it was looked at");
        assert_eq!(next(&mut queue), Some(("b".into(), "1".into())));
        queue.gone(&a);
        assert!(!queue.waits(&a), "it is gone");
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
        assert!(!queue.has_ready() && queue.len() == 1, "c is being worked on");
    }

    /// Such as by rules that leave its issuer out and take it in again.
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
        assert_eq!(next(&mut queue), None, "one worker at a time");
        queue.settled(&a);
        assert_eq!(next(&mut queue), Some(("a".into(), "2".into())));
        assert!(queue.failed(&a).is_some(), "the second one's trouble is not forgotten");
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
