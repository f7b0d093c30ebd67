//! The pace of this process towards the API server: so many requests a second, and none of a kind that the server has asked to wait with.
//!
//! Owns a token bucket, the order in which requests that wait for a token are let through, and the holds. A request waits where it is,
//! without a task and without a lock held meanwhile; whoever gives up while waiting takes no token along.
//!
//! The order: first come, first served within a class, and shares between the classes, so that a thousand leftovers to delete delay a
//! new certificate by a fifth and not by a minute, and a flood of new certificates does not keep the watch from coming back that shows
//! them.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use agent_runtime::token_bucket::{Rate, TokenBucket};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::{
    RequestRate,
    labels::{Resource, Verb},
};

/// A request that would be held back for longer than this in all is answered in the server's stead, so that who asks can do something
/// else meanwhile: an order gives back its slot.
pub(super) const MAX_QUEUE_TIME: Duration = Duration::from_secs(30);
/// Nobody is held back for longer, whatever a server or a proxy asks for: the agent would be blind.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// What a hold is about. The server does not tell how far its own trouble reaches: a webhook or a cache that is being filled concerns one
/// kind; its fair queues concern every kind, and each finds that out for the price of one request.
pub(super) type Kind = (Verb, Resource);

/// What a request waited for before it was let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Waits {
    pub(super) rate_limit: Duration,
    pub(super) retry_after: Duration,
}

/// The server has asked for more time than a request waits here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RetryAfter {
    /// How long it goes on.
    pub(super) left: Duration,
    pub(super) waits: Waits,
}

/// Who goes first. The higher the stride, the smaller the share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Somebody waits for a certificate.
    Create,
    /// Reads and watches, without which no answer is seen.
    Read,
    /// Nobody waits for it.
    Rest,
}

const STRIDES: [u64; 3] = [3, 6, 12];

impl Class {
    fn of((verb, resource): Kind) -> Self {
        match verb {
            // Nobody waits for an event.
            Verb::create if resource == Resource::events => Self::Rest,
            Verb::create | Verb::patch => Self::Create,
            Verb::get | Verb::list | Verb::watch => Self::Read,
            Verb::delete | Verb::other => Self::Rest,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Throttle {
    rate: Rate,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    bucket: TokenBucket,
    queues: [Queue; 3],
    /// The pass of the last request that had to wait.
    served: u64,
    tickets: u64,
    holds: HashMap<Kind, Instant>,
    /// Kinds whose hold was told and that have not been answered otherwise since.
    announced: HashSet<Kind>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<(u64, Arc<Notify>)>,
    /// The queue with the lowest is next; each turn adds the class's stride.
    pass: u64,
}

impl Throttle {
    pub(super) fn new(rate: RequestRate) -> Self {
        let state = State {
            bucket: TokenBucket::full(Instant::now()),
            queues: Default::default(),
            served: 0,
            tickets: 0,
            holds: HashMap::new(),
            announced: HashSet::new(),
        };
        Self { rate: Rate::new(rate.per_second, rate.burst), state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Returns when a request of this kind may be sent.
    pub(super) async fn admit(&self, kind: Kind) -> Result<Waits, RetryAfter> {
        let mut waits = Waits::default();
        let deadline = Instant::now() + MAX_QUEUE_TIME;
        loop {
            let begun = Instant::now();
            while let Some(until) = self.held_until(kind) {
                if until > deadline {
                    waits.retry_after += begun.elapsed();
                    return Err(RetryAfter { left: until.saturating_duration_since(Instant::now()), waits });
                }
                sleep_until(until).await;
            }
            waits.retry_after += begun.elapsed();
            let begun = Instant::now();
            self.token(Class::of(kind)).await;
            waits.rate_limit += begun.elapsed();
            if self.held_until(kind).is_none() {
                return Ok(waits);
            }
            // The server has asked for time while this one stood in the queue.
            self.give_back();
        }
    }

    /// The server has asked to wait for `after`. Returns whether that is news.
    pub(super) fn hold(&self, kind: Kind, after: Duration) -> bool {
        // A little longer than asked: the server told the same to all nodes.
        let until = Instant::now() + after.min(MAX_RETRY_AFTER).mul_f64(1.0 + fastrand::f64() / 2.0);
        let mut state = self.lock();
        let hold = state.holds.entry(kind).or_insert(until);
        *hold = until.max(*hold);
        state.announced.insert(kind)
    }

    /// The server has answered a request of this kind. Returns whether that is news, after a hold.
    pub(super) fn answered(&self, kind: Kind) -> bool {
        self.lock().announced.remove(&kind)
    }

    fn held_until(&self, kind: Kind) -> Option<Instant> {
        let mut state = self.lock();
        let until = state.holds.get(&kind).copied()?;
        if until > Instant::now() {
            return Some(until);
        }
        state.holds.remove(&kind);
        None
    }

    async fn token(&self, class: Class) {
        let Some(ticket_in_queue) = self.enter(class) else { return };
        // Only the first of all looks at the clock; it wakes the next one when it goes, whichever way.
        loop {
            match self.slot(&ticket_in_queue) {
                Slot::Ready => return,
                Slot::At(at) => tokio::select! {
                    () = sleep_until(at) => {}
                    () = ticket_in_queue.wake.notified() => {}
                },
                Slot::Behind => ticket_in_queue.wake.notified().await,
            }
        }
    }

    /// A token at once, where nobody waits and there is one; or a place in the queue.
    fn enter(&self, class: Class) -> Option<QueueTicket<'_>> {
        let mut state = self.lock();
        if state.first().is_none() && state.bucket.take(self.rate, Instant::now()).is_ok() {
            return None;
        }
        state.tickets += 1;
        let (ticket, served, wake) = (state.tickets, state.served, Arc::new(Notify::new()));
        let queue = &mut state.queues[class as usize];
        if queue.waiting.is_empty() {
            // Who was not here has saved up nothing.
            queue.pass = queue.pass.max(served);
        }
        queue.waiting.push_back((ticket, wake.clone()));
        Some(QueueTicket { throttle: self, class, ticket, wake })
    }

    fn slot(&self, ticket_in_queue: &QueueTicket<'_>) -> Slot {
        let mut state = self.lock();
        if state.first().map(|(_, ticket, _)| ticket) != Some(ticket_in_queue.ticket) {
            return Slot::Behind;
        }
        if let Err(at) = state.bucket.take(self.rate, Instant::now()) {
            return Slot::At(at);
        }
        let queue = &mut state.queues[ticket_in_queue.class as usize];
        let pass = queue.pass;
        queue.waiting.pop_front();
        queue.pass += STRIDES[ticket_in_queue.class as usize];
        state.served = pass;
        state.wake_first();
        Slot::Ready
    }

    fn give_back(&self) {
        let mut state = self.lock();
        state.bucket.give_back(self.rate);
        state.wake_first();
    }
}

impl State {
    /// Class and ticket of who is next.
    fn first(&self) -> Option<(usize, u64, &Arc<Notify>)> {
        let waiting = self.queues.iter().enumerate().filter_map(|(class, queue)| {
            let (ticket, wake) = queue.waiting.front()?;
            Some((queue.pass, class, *ticket, wake))
        });
        waiting.min_by_key(|(pass, class, ..)| (*pass, *class)).map(|(_, class, ticket, wake)| (class, ticket, wake))
    }

    fn wake_first(&self) {
        if let Some((_, _, wake)) = self.first() {
            wake.notify_one();
        }
    }
}

enum Slot {
    Ready,
    At(Instant),
    Behind,
}

/// A place in the queue. Dropping it gives it up.
struct QueueTicket<'a> {
    throttle: &'a Throttle,
    class: Class,
    ticket: u64,
    wake: Arc<Notify>,
}

impl Drop for QueueTicket<'_> {
    fn drop(&mut self) {
        let mut state = self.throttle.lock();
        let waiting = &mut state.queues[self.class as usize].waiting;
        if let Ok(at) = waiting.binary_search_by_key(&self.ticket, |(ticket, _)| *ticket) {
            waiting.remove(at);
            state.wake_first();
        }
    }
}

#[cfg(test)]
mod tests;
