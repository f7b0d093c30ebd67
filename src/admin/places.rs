//! The places of a listener's connections, and the connection that ends when all places are taken.
//!
//! A new connection always gets a place. If all are taken, it replaces, in this order:
//!
//! 1. the oldest connection of its own peer address whose request is incomplete, if that address has several of them,
//!    [`Size::incomplete_per_peer`] or more. One peer therefore cannot evict the connections of all others;
//! 2. the oldest connection of any address whose request is incomplete;
//! 3. if all requests are complete, the oldest connection of the address that has the most. A client that does not read its answer
//!    therefore holds its place only until another client needs it.
//!
//! A request that becomes complete replaces another complete one by the third rule if there are [`Size::answers`] already: an answer can
//! be large, a connection without an answer is small.
//!
//! The replaced connection looks again for its request before it ends ([`Place::evicted`]). A request that has arrived in time is
//! answered, however busy the process is, and another connection is replaced instead.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// How many connections there can be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    /// Connections of all peers.
    pub(super) connections: usize,
    /// Those of them whose request is complete, so that they hold an answer.
    pub(super) answers: usize,
    /// Connections with an incomplete request from which on a peer replaces its own ones.
    pub(super) incomplete_per_peer: usize,
}

/// The places of one listener. Only one task at a time may [`take`](Self::take) a place.
#[derive(Debug)]
pub(super) struct Places(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    size: Size,
    table: Mutex<Table>,
    /// A place has become free, or a connection that was to end has a complete request.
    changed: Notify,
}

/// A connection's number: older connections have lower numbers.
type Number = u64;

#[derive(Debug, Default)]
struct Table {
    next: Number,
    connections: HashMap<Number, Connection>,
    /// The connections that can be replaced: those that were not chosen already.
    candidates: Candidates,
    peers: HashMap<IpAddr, Candidates>,
    /// The connection whose end makes room for the next one.
    awaited: Option<Number>,
}

#[derive(Debug, Default)]
struct Candidates {
    incomplete: BTreeSet<Number>,
    complete: BTreeSet<Number>,
}

#[derive(Debug)]
struct Connection {
    peer: IpAddr,
    end: Option<End>,
    notice: Arc<Notify>,
}

/// The condition on which a connection that was chosen ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Its request is still incomplete.
    IfIncomplete,
    /// None: its request was complete.
    Always,
}

impl Places {
    /// No connections yet.
    pub(super) fn new(size: Size) -> Self {
        Self(Arc::new(Shared { size, table: Mutex::default(), changed: Notify::new() }))
    }

    /// Takes a place for a connection of `peer`. If all are taken, waits until the task of the connection that is replaced has run, which
    /// takes no longer than any other task.
    ///
    /// # Cancel safety
    ///
    /// A cancelled call may have replaced a connection without taking its place.
    pub(super) async fn take(&self, peer: IpAddr) -> Place {
        loop {
            if let Some(place) = self.try_take(peer) {
                return place;
            }
            self.0.changed.notified().await;
        }
    }

    fn try_take(&self, peer: IpAddr) -> Option<Place> {
        let mut table = self.0.table.lock();
        if table.connections.len() < self.0.size.connections {
            let (number, notice) = table.add(peer);
            return Some(Place { shared: self.0.clone(), number, notice });
        }
        if table.awaited.is_none() {
            let incomplete = table.oldest_incomplete(peer, self.0.size.incomplete_per_peer).map(|number| (number, End::IfIncomplete));
            let chosen = incomplete.or_else(|| table.oldest_answer().map(|number| (number, End::Always)));
            table.awaited = chosen.map(|(number, end)| table.end(number, end));
        }
        None
    }
}

impl Table {
    fn add(&mut self, peer: IpAddr) -> (Number, Arc<Notify>) {
        let (number, notice) = (self.next, Arc::<Notify>::default());
        self.next += 1;
        self.connections.insert(number, Connection { peer, end: None, notice: notice.clone() });
        self.candidates.incomplete.insert(number);
        self.peers.entry(peer).or_default().incomplete.insert(number);
        (number, notice)
    }

    fn oldest_incomplete(&self, peer: IpAddr, incomplete_per_peer: usize) -> Option<Number> {
        let own = self.peers.get(&peer).map(|own| &own.incomplete).filter(|own| own.len() >= incomplete_per_peer);
        own.unwrap_or(&self.candidates.incomplete).first().copied()
    }

    /// The oldest complete request of the address that has the most; of several such addresses, the oldest of all.
    fn oldest_answer(&self) -> Option<Number> {
        let of_peers = self.peers.values().filter_map(|of| Some((of.complete.len(), Reverse(*of.complete.first()?))));
        of_peers.max().map(|(_, Reverse(oldest))| oldest)
    }

    /// Makes a connection end.
    fn end(&mut self, number: Number, end: End) -> Number {
        self.forget_candidate(number);
        if let Some(connection) = self.connections.get_mut(&number) {
            connection.end = Some(end);
            connection.notice.notify_one();
        }
        number
    }

    fn forget_candidate(&mut self, number: Number) {
        let Some(connection) = self.connections.get(&number) else { return };
        self.candidates.remove(number);
        if let Some(of_peer) = self.peers.get_mut(&connection.peer) {
            of_peer.remove(number);
            if of_peer.incomplete.is_empty() && of_peer.complete.is_empty() {
                self.peers.remove(&connection.peer);
            }
        }
    }

    /// Records that the request of a connection is complete. Returns whether the connection was to end and does not.
    fn complete(&mut self, number: Number, answers: usize) -> bool {
        self.forget_candidate(number);
        let Some(connection) = self.connections.get_mut(&number) else { return false };
        if connection.end == Some(End::Always) {
            return false;
        }
        let is_saved = connection.end.take().is_some();
        let peer = connection.peer;
        if self.candidates.complete.len() >= answers
            && let Some(oldest) = self.oldest_answer()
        {
            self.end(oldest, End::Always);
        }
        self.candidates.complete.insert(number);
        self.peers.entry(peer).or_default().complete.insert(number);
        is_saved
    }
}

impl Candidates {
    fn remove(&mut self, number: Number) {
        self.incomplete.remove(&number);
        self.complete.remove(&number);
    }
}

/// The place of a connection. Dropping it frees the place.
#[derive(Debug)]
pub(super) struct Place {
    shared: Arc<Shared>,
    number: Number,
    notice: Arc<Notify>,
}

impl Place {
    /// Records that the request is complete.
    pub(super) fn complete(&self) {
        let mut table = self.shared.table.lock();
        if table.complete(self.number, self.shared.size.answers) {
            self.shared.no_longer_awaits(&mut table, self.number);
        }
    }

    /// Returns when the connection has to end. The caller polls the connection first, in the same task: a request that has arrived then
    /// calls [`complete`](Self::complete), and this future stays pending.
    pub(super) async fn evicted(&self) {
        loop {
            self.notice.notified().await;
            if self.shared.table.lock().connections.get(&self.number).is_some_and(|connection| connection.end.is_some()) {
                return;
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut table = self.shared.table.lock();
        table.forget_candidate(self.number);
        table.connections.remove(&self.number);
        self.shared.no_longer_awaits(&mut table, self.number);
    }
}

impl Shared {
    fn no_longer_awaits(&self, table: &mut Table, number: Number) {
        table.awaited.take_if(|awaited| *awaited == number);
        self.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use futures::FutureExt;

    use super::*;

    fn peer(number: u8) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, number).into()
    }

    /// Places for `connections`, of which a peer with two incomplete ones replaces its own.
    fn places(connections: usize) -> Places {
        Places::new(Size { connections, answers: connections, incomplete_per_peer: 2 })
    }

    fn has_to_end(place: &Place) -> bool {
        place.evicted().now_or_never().is_some()
    }

    /// Takes a place for `newcomer` after all are taken, and returns the position of the one that ends.
    fn replaced(places: &Places, taken: &mut Vec<Place>, newcomer: IpAddr) -> usize {
        assert!(places.try_take(newcomer).is_none());
        let position = taken.iter().position(has_to_end).expect("one ends");
        drop(taken.remove(position));
        taken.push(places.take(newcomer).now_or_never().expect("its place is free"));
        position
    }

    #[test]
    fn the_oldest_incomplete_connection_is_replaced() {
        let places = places(3);
        let mut taken: Vec<_> = (1..4).map(|number| places.try_take(peer(number)).unwrap()).collect();
        taken[0].complete();
        assert_eq!(replaced(&places, &mut taken, peer(4)), 1);
        assert_eq!(replaced(&places, &mut taken, peer(5)), 1);
    }

    #[test]
    fn a_peer_with_several_incomplete_connections_replaces_its_own() {
        let places = places(4);
        let mut taken: Vec<_> = [1, 2, 9, 9].into_iter().map(|number| places.try_take(peer(number)).unwrap()).collect();
        for _ in 0..100 {
            assert_eq!(replaced(&places, &mut taken, peer(9)), 2);
        }
        // Another peer replaces the oldest of all.
        assert_eq!(replaced(&places, &mut taken, peer(3)), 0);
    }

    #[test]
    fn of_complete_requests_the_address_with_the_most_loses_its_oldest() {
        let places = places(4);
        let mut taken: Vec<_> = [1, 9, 9, 2].into_iter().map(|number| places.try_take(peer(number)).unwrap()).collect();
        taken.iter().for_each(Place::complete);
        assert_eq!(replaced(&places, &mut taken, peer(3)), 1);
        taken.iter().for_each(Place::complete);
        assert_eq!(replaced(&places, &mut taken, peer(4)), 0, "each has one: the oldest");
    }

    #[test]
    fn a_further_answer_replaces_one_although_places_are_free() {
        let places = Places::new(Size { connections: 10, answers: 2, incomplete_per_peer: 2 });
        let taken: Vec<_> = [9, 1, 9, 2, 3].into_iter().map(|number| places.try_take(peer(number)).unwrap()).collect();
        let ends = || taken.iter().map(has_to_end).collect::<Vec<_>>();
        taken[..2].iter().for_each(Place::complete);
        assert_eq!(ends(), [false; 5]);
        taken[2].complete();
        assert_eq!(ends(), [true, false, false, false, false], "each address has one answer: the oldest");
        taken[3].complete();
        assert_eq!(ends(), [false, true, false, false, false], "each is told once");
        drop(taken);
        let table = places.0.table.lock();
        assert!(table.connections.is_empty() && table.peers.is_empty() && table.candidates.complete.is_empty(), "{table:?}");
    }

    #[test]
    fn a_request_that_arrives_in_time_saves_its_connection() {
        let places = places(2);
        let taken: Vec<_> = (1..3).map(|number| places.try_take(peer(number)).unwrap()).collect();
        assert!(places.try_take(peer(3)).is_none());
        // The first one was chosen, and finds that its request has arrived.
        taken[0].complete();
        assert!(!has_to_end(&taken[0]));
        assert!(places.try_take(peer(3)).is_none());
        assert!(!has_to_end(&taken[0]) && has_to_end(&taken[1]), "another one ends instead");
    }

    #[test]
    fn only_one_connection_ends_for_each_that_comes() {
        let places = places(3);
        let taken: Vec<_> = (1..4).map(|number| places.try_take(peer(number)).unwrap()).collect();
        for _ in 0..10 {
            assert!(places.try_take(peer(4)).is_none());
        }
        assert_eq!(taken.iter().filter(|place| has_to_end(place)).count(), 1);
    }
}
