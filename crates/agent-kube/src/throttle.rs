//! Rate limit of this process towards the API server, and the delays that the server has asked for.
//!
//! Owns a token bucket, the queues of requests that wait for a token, and the holds: a hold delays all requests of one [`Kind`] that the
//! server has asked to retry later. A request waits in its own future, without a task and without a lock. A request that is dropped while
//! it waits takes no token.
//!
//! Requests of one class are served first come, first served. The classes share the tokens: 1,000 waiting deletions take a fifth of the
//! tokens from new certificate requests, and do not delay them by a minute. In the same way, many new certificate requests do not block the
//! restart of the watch that reports their results.

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

/// A request whose hold ends later than this after its arrival, 30 s, gets a local 429 at once, so that its caller can do other work
/// meanwhile: an order frees its slot.
pub(super) const MAX_QUEUE_TIME: Duration = Duration::from_secs(30);
/// Upper bound of a delay that a server or a proxy asks for, 300 s: without list and watch the agent cannot see any result.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// The requests that one hold applies to. The server does not report the scope of its problem. A webhook or a cache that is being filled
/// affects one kind. The server's fair queues affect every kind, and each kind finds that out with one request.
pub(super) type Kind = (Verb, Resource);

/// Time that a request waited before it was admitted, by cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Waits {
    pub(super) rate_limit: Duration,
    pub(super) retry_after: Duration,
}

/// The server has asked for a longer delay than a request waits here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RetryAfter {
    /// Remaining time of the hold.
    pub(super) left: Duration,
    pub(super) waits: Waits,
}

/// Class of a request. The higher its stride, the smaller its share of the tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// A client waits for the certificate.
    Create,
    /// Reads and watches, without which the agent sees no result.
    Read,
    /// No client waits for the result.
    Rest,
}

const STRIDES: [u64; 3] = [3, 6, 12];

impl Class {
    fn of((verb, resource): Kind) -> Self {
        match verb {
            // No client waits for an Event.
            Verb::create if resource == Resource::events => Self::Rest,
            Verb::create | Verb::patch => Self::Create,
            Verb::get | Verb::list | Verb::watch => Self::Read,
            Verb::delete | Verb::other => Self::Rest,
        }
    }
}

/// Rate limiter and holds of one process.
#[derive(Debug)]
pub(super) struct Throttle {
    rate: Rate,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    bucket: TokenBucket,
    queues: [Queue; 3],
    /// Pass of the last request that was served from a queue.
    served: u64,
    tickets: u64,
    holds: HashMap<Kind, Instant>,
    /// Kinds whose hold was logged, and that the server has not answered normally since.
    announced: HashSet<Kind>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<(u64, Arc<Notify>)>,
    /// The queue with the lowest pass is next; each request from it adds the class's stride.
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

    /// Waits until a request of this kind may be sent, and returns the time that it waited.
    ///
    /// # Errors
    ///
    /// [`RetryAfter`] if the hold of this kind lasts for longer than [`MAX_QUEUE_TIME`].
    ///
    /// # Cancel safety
    ///
    /// A dropped future leaves its queue, takes no token, and does not delay the requests behind it.
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
            // A hold began while this request was in the queue.
            self.give_back();
        }
    }

    /// Records that the server has asked to wait for `after`. Returns whether the kind was not on hold before: such a hold is logged.
    pub(super) fn hold(&self, kind: Kind, after: Duration) -> bool {
        // Extended by up to half at random, because the server asks all nodes for the same delay.
        let until = Instant::now() + after.min(MAX_RETRY_AFTER).mul_f64(1.0 + fastrand::f64() / 2.0);
        let mut state = self.lock();
        let hold = state.holds.entry(kind).or_insert(until);
        *hold = until.max(*hold);
        state.announced.insert(kind)
    }

    /// Records a normal response. Returns whether it is the first one after a hold.
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
        // Only the first request of all queues sets a timer. When it leaves, served or dropped, it wakes the next one.
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

    /// Takes a token at once if no request waits and a token is available; otherwise joins a queue.
    fn enter(&self, class: Class) -> Option<QueueTicket<'_>> {
        let mut state = self.lock();
        if state.first().is_none() && state.bucket.take(self.rate, Instant::now()).is_ok() {
            return None;
        }
        state.tickets += 1;
        let (ticket, served, wake) = (state.tickets, state.served, Arc::new(Notify::new()));
        let queue = &mut state.queues[class as usize];
        if queue.waiting.is_empty() {
            // An idle class accumulates no credit.
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
    /// Class, ticket and waker of the next request.
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

/// A place in a queue. Dropping it leaves the queue.
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
