//! Decided requests: how many of each node exist, and when they are removed. No I/O, no clock.
//!
//! An agent deletes its requests itself. It does not if it was killed, or is hostile. So the approver removes each request
//! [`KEEP_FOR`] after its end, and the oldest of a node immediately if more than [`MAX_ENDED_PER_NODE`] of the node have ended. A
//! request has ended if it is denied, invalid, failed or signed. An approved request that waits for its signer is only counted, because
//! an agent has one for each identity while the signer is down.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use crate::queue::{Key, turns::Node};

/// Time after the end of a request for which an operator can read it.
pub const KEEP_FOR: Duration = Duration::from_secs(600);
/// Ended requests of a node that exist at the same time.
pub const MAX_ENDED_PER_NODE: usize = 256;
/// Ended requests of a node that are tracked, kept or not.
const MAX_TRACKED_PER_NODE: usize = 16 * MAX_ENDED_PER_NODE;
/// Pause after a removal that failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(60);

/// State of a decided request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// Approved, and the signer has not finished.
    WaitsForSigner,
    /// Denied, invalid, failed or signed, for this time.
    Ended(Duration),
}

/// Identifies an ended request; ordered by the end.
type Number = (Instant, u64);

#[derive(Debug)]
struct Entry {
    uid: Arc<str>,
    node: Node,
    /// `None` while the request waits for its signer.
    ended: Option<Number>,
}

/// The counts of a node.
#[derive(Debug, Default)]
struct Share {
    waiting: usize,
    /// Entries that have ended.
    ended: usize,
    /// Ended requests whose removal has not begun.
    kept: BTreeSet<Number>,
}

/// The decided requests.
#[derive(Debug, Default)]
pub struct Retention {
    entries: HashMap<Key, Entry>,
    nodes: HashMap<Node, Share>,
    /// Ended requests by the time of their removal.
    due: BTreeMap<Number, Key>,
    seen: u64,
}

impl Retention {
    /// Notes the current state of a decided request.
    pub fn seen(&mut self, key: &Key, uid: &str, node: &Node, state: Settled, now: Instant) {
        let known = self.entries.get(key).filter(|entry| *entry.uid == *uid);
        match (known, state) {
            // An end is noted once, and a request does not return from it.
            (Some(Entry { ended: Some(_), .. }), _) | (Some(Entry { ended: None, .. }), Settled::WaitsForSigner) => return,
            (Some(_), Settled::Ended(_)) | (None, _) => {}
        }
        self.gone(key);
        let share = self.nodes.entry(node.clone()).or_default();
        let ended = match state {
            Settled::WaitsForSigner => {
                share.waiting += 1;
                None
            }
            // Without the permission to remove requests, the entries would accumulate. The next complete list shows them again.
            Settled::Ended(_) if share.ended >= MAX_TRACKED_PER_NODE => return,
            Settled::Ended(since) => {
                self.seen += 1;
                share.ended += 1;
                let number = (now + KEEP_FOR.saturating_sub(since), self.seen);
                share.kept.insert(number);
                self.due.insert(number, key.clone());
                Some(number)
            }
        };
        self.entries.insert(key.clone(), Entry { uid: uid.into(), node: node.clone(), ended });
        self.shorten(node, now);
    }

    /// Makes the oldest ended requests of a node due, so that at most [`MAX_ENDED_PER_NODE`] are kept.
    fn shorten(&mut self, node: &Node, now: Instant) {
        while let Some(share) = self.nodes.get(node).filter(|share| share.kept.len() > MAX_ENDED_PER_NODE)
            && let Some(oldest) = share.kept.first().copied()
        {
            self.due_at(oldest, now);
        }
    }

    /// Sets the time at which an ended request is removed. The request does not count as kept any longer.
    fn due_at(&mut self, number: Number, at: Instant) {
        let Some(key) = self.due.remove(&number) else { return };
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let moved = (at, number.1);
        entry.ended = Some(moved);
        if let Some(share) = self.nodes.get_mut(&entry.node) {
            share.kept.remove(&number);
        }
        self.due.insert(moved, key);
    }

    /// Notes that a request was deleted, or is undecided.
    pub fn gone(&mut self, key: &Key) {
        let Some(entry) = self.entries.remove(key) else { return };
        let Some(share) = self.nodes.get_mut(&entry.node) else { return };
        match entry.ended {
            Some(number) => {
                self.due.remove(&number);
                share.kept.remove(&number);
                share.ended -= 1;
            }
            None => share.waiting -= 1,
        }
        if share.waiting == 0 && share.ended == 0 {
            self.nodes.remove(&entry.node);
        }
    }

    /// Removes the entries for which `keeps` returns false.
    pub fn retain(&mut self, keeps: impl Fn(&Key) -> bool) {
        let surplus: Vec<Key> = self.entries.keys().filter(|key| !keeps(key)).cloned().collect();
        surplus.iter().for_each(|key| self.gone(key));
    }

    /// Returns the number of the node's approved requests that wait for their signer.
    pub fn waiting(&self, node: &Node) -> usize {
        self.nodes.get(node).map_or(0, |share| share.waiting)
    }

    /// Returns when the next request is to be removed.
    pub fn next(&self) -> Option<Instant> {
        self.due.first_key_value().map(|((at, _), _)| *at)
    }

    /// Returns a request that is to be removed at `now`, with its UID. It is returned again after a minute, unless it is
    /// [`gone`](Self::gone) by then.
    pub fn take(&mut self, now: Instant) -> Option<(Key, Arc<str>)> {
        let (number, key) = self.due.first_key_value().filter(|((at, _), _)| *at <= now)?;
        let (number, key) = (*number, key.clone());
        let uid = self.entries.get(&key)?.uid.clone();
        self.due_at(number, now + RETRY_INTERVAL);
        Some((key, uid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JUST: Settled = Settled::Ended(Duration::ZERO);

    fn key(number: usize) -> Key {
        ("n".to_owned(), format!("r{number}"))
    }

    fn node(name: &str) -> Node {
        name.into()
    }

    #[test]
    fn an_ended_request_is_removed_after_ten_minutes() {
        let (mut retention, now) = (Retention::default(), Instant::now());
        retention.seen(&key(1), "u1", &node("a"), JUST, now);
        retention.seen(&key(2), "u2", &node("a"), Settled::Ended(Duration::from_secs(500)), now);
        retention.seen(&key(3), "u3", &node("a"), Settled::Ended(Duration::from_secs(5000)), now);
        assert_eq!(retention.take(now), Some((key(3), "u3".into())));
        assert_eq!((retention.take(now), retention.next()), (None, Some(now + RETRY_INTERVAL)), "the removal may fail");
        retention.gone(&key(3));
        assert_eq!(retention.next(), Some(now + Duration::from_secs(100)));
        retention.seen(&key(2), "u2", &node("a"), JUST, now + Duration::from_secs(50));
        assert_eq!(retention.take(now + Duration::from_secs(100)), Some((key(2), "u2".into())), "a change does not prolong it");
        retention.gone(&key(2));
        assert_eq!(retention.take(now + KEEP_FOR).unwrap().0, key(1));
        retention.gone(&key(1));
        assert!(retention.next().is_none() && retention.nodes.is_empty() && retention.entries.is_empty());
    }

    #[test]
    fn a_request_that_waits_for_its_signer_is_counted_and_kept() {
        let (mut retention, now) = (Retention::default(), Instant::now());
        for number in 0..3 {
            retention.seen(&key(number), "u", &node("a"), Settled::WaitsForSigner, now);
            retention.seen(&key(number), "u", &node("a"), Settled::WaitsForSigner, now);
        }
        assert_eq!((retention.waiting(&node("a")), retention.waiting(&node("b")), retention.next()), (3, 0, None));
        retention.seen(&key(0), "u", &node("a"), JUST, now);
        retention.gone(&key(1));
        assert_eq!(retention.waiting(&node("a")), 1);
        // A request of the same name is another one.
        retention.seen(&key(0), "v", &node("b"), Settled::WaitsForSigner, now);
        assert_eq!((retention.waiting(&node("b")), retention.next()), (1, None));
        retention.retain(|key| key.1 == "r2");
        assert_eq!((retention.waiting(&node("a")), retention.waiting(&node("b")), retention.entries.len()), (1, 0, 1));
    }

    #[test]
    fn a_node_with_many_ended_requests_keeps_the_newest() {
        let (mut retention, start) = (Retention::default(), Instant::now());
        let at = |number: usize| start + Duration::from_millis(number as u64);
        retention.seen(&("n".into(), "other".into()), "u", &node("b"), JUST, start);
        for number in 0..MAX_ENDED_PER_NODE + 10 {
            retention.seen(&key(number), "u", &node("a"), JUST, at(number));
        }
        let removed: Vec<Key> = std::iter::from_fn(|| retention.take(at(1000))).map(|(key, _)| key).collect();
        assert_eq!(removed, (0..10).map(key).collect::<Vec<_>>());
        removed.iter().for_each(|key| retention.gone(key));
        assert_eq!(retention.take(at(1000)), None);
        assert_eq!(retention.entries.len(), MAX_ENDED_PER_NODE + 1);
    }
}
