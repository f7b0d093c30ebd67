//! Ready requests, served in turn by node: one request of each node, then the next one of each.
//!
//! The oldest request of a node is the first. Requests beyond a node's limit are apart from the others, and alternate with them in the
//! node's turns, so that neither kind delays the other.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use super::Key;

/// Name of a node, as the requester's token claims it. Empty for requesters without that claim, which share one turn.
pub type Node = Arc<str>;

/// Position of a request among those of its node: by the time of creation in Unix seconds, then by arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// `creationTimestamp`, in Unix seconds.
    pub created: i64,
    /// Number of requests that arrived before.
    pub arrived: u64,
}

/// Kind of a ready request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Within the limit of its node.
    Within,
    /// Beyond the limit of its node.
    Beyond,
}

/// The ready requests of all nodes.
#[derive(Debug, Default)]
pub struct Turns {
    /// Nodes with a ready request, the next one first.
    order: VecDeque<Node>,
    nodes: HashMap<Node, Ready>,
}

#[derive(Debug, Default)]
struct Ready {
    within: BTreeMap<Position, Key>,
    beyond: BTreeMap<Position, Key>,
    /// Whether the last turn was for a request beyond the limit.
    beyond_was_last: bool,
}

impl Ready {
    fn of(&mut self, kind: Kind) -> &mut BTreeMap<Position, Key> {
        match kind {
            Kind::Within => &mut self.within,
            Kind::Beyond => &mut self.beyond,
        }
    }

    fn is_empty(&self) -> bool {
        self.within.is_empty() && self.beyond.is_empty()
    }

    fn take(&mut self) -> Option<Key> {
        let beyond_first = !self.beyond_was_last;
        let first = if beyond_first { self.beyond.pop_first() } else { self.within.pop_first() };
        let (key, is_beyond) = match first {
            Some((_, key)) => (key, beyond_first),
            None => (if beyond_first { self.within.pop_first() } else { self.beyond.pop_first() }?.1, !beyond_first),
        };
        self.beyond_was_last = is_beyond;
        Some(key)
    }
}

impl Turns {
    /// Adds a request. A node that had none gets the last turn.
    pub fn add(&mut self, node: &Node, kind: Kind, position: Position, key: Key) {
        let ready = self.nodes.entry(node.clone()).or_default();
        if ready.is_empty() {
            self.order.push_back(node.clone());
        }
        ready.of(kind).insert(position, key);
    }

    /// Adds a request whose node gets the next turn.
    pub fn add_first(&mut self, node: &Node, kind: Kind, position: Position, key: Key) {
        self.add(node, kind, position, key);
        if let Some(at) = self.order.iter().position(|other| other == node)
            && let Some(node) = self.order.remove(at)
        {
            self.order.push_front(node);
        }
    }

    /// Removes a request.
    pub fn remove(&mut self, node: &Node, kind: Kind, position: Position) {
        let Some(ready) = self.nodes.get_mut(node) else { return };
        ready.of(kind).remove(&position);
        if ready.is_empty() {
            self.nodes.remove(node);
            self.order.retain(|other| other != node);
        }
    }

    /// Takes the request whose turn it is, of the first node that `may_work`.
    pub fn take(&mut self, may_work: impl Fn(&Node) -> bool) -> Option<Key> {
        let at = self.order.iter().position(may_work)?;
        let node = self.order.remove(at)?;
        let ready = self.nodes.get_mut(&node)?;
        let key = ready.take();
        if ready.is_empty() {
            self.nodes.remove(&node);
        } else {
            self.order.push_back(node);
        }
        key
    }

    /// Whether no request is ready.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        ("n".to_owned(), name.to_owned())
    }

    fn position(created: i64, arrived: u64) -> Position {
        Position { created, arrived }
    }

    fn names(turns: &mut Turns) -> Vec<String> {
        std::iter::from_fn(|| turns.take(|_| true)).map(|(_, name)| name).collect()
    }

    #[test]
    fn nodes_take_turns_and_the_oldest_request_of_a_node_is_first() {
        let (mut turns, [a, b]) = (Turns::default(), ["a", "b"].map(Node::from));
        for (arrived, created) in [30, 10, 20].into_iter().enumerate() {
            turns.add(&a, Kind::Within, position(created, arrived as u64), key(&format!("a{created}")));
        }
        turns.add(&b, Kind::Within, position(40, 3), key("b40"));
        turns.add(&b, Kind::Within, position(40, 4), key("b40-later"));
        assert_eq!(names(&mut turns), ["a10", "b40", "a20", "b40-later", "a30"]);
        assert!(turns.is_empty() && turns.nodes.is_empty());
    }

    #[test]
    fn requests_beyond_the_limit_alternate_with_the_others_of_their_node() {
        let (mut turns, [a, b]) = (Turns::default(), ["a", "b"].map(Node::from));
        for n in 0..2 {
            turns.add(&a, Kind::Within, position(n, 0), key(&format!("a{n}")));
            turns.add(&a, Kind::Beyond, position(n, 1), key(&format!("a{n}-beyond")));
            turns.add(&b, Kind::Within, position(n, 2), key(&format!("b{n}")));
        }
        assert_eq!(names(&mut turns), ["a0-beyond", "b0", "a0", "b1", "a1-beyond", "a1"]);
    }

    #[test]
    fn a_removed_request_and_a_busy_node_are_skipped() {
        let (mut turns, [a, b]) = (Turns::default(), ["a", "b"].map(Node::from));
        turns.add(&a, Kind::Within, position(0, 0), key("a0"));
        turns.add(&b, Kind::Within, position(0, 1), key("b0"));
        turns.add(&b, Kind::Within, position(0, 2), key("b1"));
        turns.remove(&b, Kind::Within, position(0, 1));
        assert_eq!(turns.take(|node| node != &a), Some(key("b1")));
        assert_eq!(turns.take(|node| node != &a), None);
        assert!(!turns.is_empty());
        turns.add_first(&b, Kind::Within, position(0, 2), key("b1"));
        assert_eq!(names(&mut turns), ["b1", "a0"]);
        turns.remove(&a, Kind::Within, position(0, 0));
        assert!(turns.is_empty());
    }
}
