//! Who may take how much: connections and calls of one caller and in all, and how often a caller may connect.
//!
//! A caller is an [`Origin`]: a pod, before anybody has attested it. One [`Quotas`] counts for all sockets. An eighth of what there is in
//! all is kept for callers that hold next to nothing, so that however many pods flood, another one still finds a place. What is known of
//! a caller is forgotten with its last connection, once its rate has recovered. The decisions are functions of the time that they are
//! given; only the counting of calls is without a lock.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::metrics::{Refusal, Rejection};
use crate::{attest::origin::Origin, config::Limits};

/// Who holds fewer is served from the reserve. An Envoy has one connection, and a stream for each secret.
const LITTLE: usize = 4;
/// The reserve is so large a part of all.
const RESERVE: usize = 8;
/// Between two looks for what can be forgotten.
const SWEEP: Duration = Duration::from_secs(1);

/// The quotas of an agent. Clones share the counts.
#[derive(Debug, Clone)]
pub struct Quotas(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    connections: Share,
    streams: Share,
    rate: Rate,
    /// Calls of everybody.
    calls: AtomicUsize,
    book: Mutex<Book>,
}

/// How much there is of something.
#[derive(Debug, Clone, Copy)]
struct Share {
    all: usize,
    of_one: usize,
}

#[derive(Debug, Default)]
struct Book {
    connections: usize,
    accounts: HashMap<Origin, Account>,
    swept: Option<Instant>,
}

#[derive(Debug)]
struct Account {
    connections: usize,
    bucket: Bucket,
    calls: Arc<AtomicUsize>,
}

/// Why there is nothing left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// This caller has its share.
    Own,
    /// Others have all that is not kept for callers with little.
    All,
    /// This caller connects too often.
    Rate,
}

impl Over {
    /// What it is called where it was about a connection: in metrics, and in the configuration.
    pub fn of_connections(self) -> (Rejection, &'static str) {
        match self {
            Self::Own => (Rejection::pod_connection_limit, "limits.connectionsPerPod"),
            Self::All => (Rejection::connection_limit, "limits.connections"),
            Self::Rate => (Rejection::pod_connection_rate, "limits.newConnectionsPerSecondPerPod"),
        }
    }

    /// The same about a stream, which has no rate.
    pub fn of_streams(self) -> (Refusal, &'static str) {
        match self {
            Self::Own | Self::Rate => (Refusal::pod_stream_limit, "limits.streamsPerPod"),
            Self::All => (Refusal::stream_limit, "limits.streams"),
        }
    }
}

impl Share {
    /// One caller never has all of it, whatever it is allowed.
    fn of(all: usize, of_one: usize) -> Self {
        Self { all, of_one: of_one.min(all - all / RESERVE).max(1) }
    }

    /// Whether a caller that holds `own` of the `taken` may have one more.
    fn one_more(self, own: usize, taken: usize) -> Result<(), Over> {
        if own >= self.of_one {
            return Err(Over::Own);
        }
        let open_to = if own < LITTLE { self.all } else { self.all - self.all / RESERVE };
        if taken < open_to { Ok(()) } else { Err(Over::All) }
    }
}

impl Quotas {
    /// Fresh counts.
    pub fn new(limits: &Limits) -> Self {
        Self(Arc::new(Shared {
            connections: Share::of(limits.connections, limits.connections_per_pod),
            streams: Share::of(limits.streams, limits.streams_per_pod),
            rate: Rate { per_second: limits.new_connections_per_second_per_pod.into(), burst: limits.new_connections_burst_per_pod.into() },
            calls: AtomicUsize::new(0),
            book: Mutex::default(),
        }))
    }

    /// Whether there is no place for anybody: the answer that costs least.
    pub fn are_used_up(&self) -> bool {
        self.book().connections >= self.0.connections.all
    }

    /// Takes a place for a connection from `origin`. A caller that is refused pays nothing for having asked.
    pub fn admit(&self, origin: &Origin, now: Instant) -> Result<Place, Over> {
        let rate = self.0.rate;
        let mut book = self.book();
        book.sweep(rate, now);
        let taken = book.connections;
        let account = match book.accounts.get_mut(origin) {
            Some(account) => account,
            // Nobody is remembered for having been refused by a full house.
            None => {
                self.0.connections.one_more(0, taken)?;
                book.accounts.entry(origin.clone()).or_insert_with(|| Account::new(rate, now))
            }
        };
        self.0.connections.one_more(account.connections, taken)?;
        if !account.bucket.take(rate, now) {
            return Err(Over::Rate);
        }
        account.connections += 1;
        let calls = account.calls.clone();
        book.connections += 1;
        drop(book);
        Ok(Place { quotas: self.clone(), origin: origin.clone(), calls })
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many callers are remembered.
    #[cfg(test)]
    pub(super) fn remembered(&self) -> usize {
        self.book().accounts.len()
    }
}

impl Book {
    fn sweep(&mut self, rate: Rate, now: Instant) {
        if self.swept.is_none_or(|at| now.duration_since(at) >= SWEEP) {
            self.swept = Some(now);
            self.accounts.retain(|_, account| !account.is_forgettable(rate, now));
        }
    }
}

impl Account {
    fn new(rate: Rate, now: Instant) -> Self {
        Self { connections: 0, bucket: Bucket { tokens: rate.burst, at: now }, calls: Arc::default() }
    }

    fn is_forgettable(&self, rate: Rate, now: Instant) -> bool {
        self.connections == 0 && self.bucket.tokens_at(rate, now) >= rate.burst
    }
}

/// A connection's place. Dropping it frees it.
#[derive(Debug)]
pub struct Place {
    quotas: Quotas,
    origin: Origin,
    calls: Arc<AtomicUsize>,
}

impl Place {
    /// Whose it is.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Takes a place for a call on this connection.
    pub fn call(&self) -> Result<CallPlace, Over> {
        let shared = &self.quotas.0;
        // Counted first and looked at afterwards: two that come at once never both take the last.
        let own = self.calls.fetch_add(1, Ordering::Relaxed);
        let place = CallPlace { quotas: self.quotas.clone(), calls: self.calls.clone() };
        let taken = shared.calls.fetch_add(1, Ordering::Relaxed);
        shared.streams.one_more(own, taken).map(|()| place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut book = self.quotas.book();
        book.connections -= 1;
        let (rate, now) = (self.quotas.0.rate, Instant::now());
        if let Some(account) = book.accounts.get_mut(&self.origin) {
            account.connections -= 1;
            if account.is_forgettable(rate, now) {
                book.accounts.remove(&self.origin);
            }
        }
    }
}

/// A call's place. Dropping it frees it.
#[derive(Debug)]
pub struct CallPlace {
    quotas: Quotas,
    calls: Arc<AtomicUsize>,
}

impl Drop for CallPlace {
    fn drop(&mut self) {
        self.calls.fetch_sub(1, Ordering::Relaxed);
        self.quotas.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How often a caller may connect.
#[derive(Debug, Clone, Copy)]
struct Rate {
    per_second: f64,
    burst: f64,
}

/// What is left of a burst.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn tokens_at(&self, rate: Rate, now: Instant) -> f64 {
        (self.tokens + now.saturating_duration_since(self.at).as_secs_f64() * rate.per_second).min(rate.burst)
    }

    fn take(&mut self, rate: Rate, now: Instant) -> bool {
        let tokens = self.tokens_at(rate, now);
        let enough = tokens >= 1.0;
        *self = Self { tokens: if enough { tokens - 1.0 } else { tokens }, at: now };
        enough
    }
}

#[cfg(test)]
mod tests;
