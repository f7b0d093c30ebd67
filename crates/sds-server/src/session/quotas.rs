//! Who may take how much: connections and calls of one caller and in all, and how often a caller may connect.
//!
//! A caller is an [`Origin`]: a pod, before anybody has attested it. One [`Quotas`] counts for all sockets. An eighth of what there is in
//! all is kept for callers that hold next to nothing, so that however many pods flood, another one still finds a place. What is known of
//! a caller is forgotten with its last connection, once its rate has recovered. The decisions are functions of the time that they are
//! given; only the counting of calls is without a lock.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use agent_runtime::token_bucket::{Rate, TokenBucket};
use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;

use super::metrics::{Refusal, Rejection};
use crate::{attest::origin::Origin, limits::Limits};

/// Who holds fewer is served from the reserve. An Envoy has one connection, and a stream for each secret.
const RESERVE_ELIGIBLE_BELOW: usize = 4;
/// The reserve is so large a part of all.
const RESERVE_DIVISOR: usize = 8;
/// Between two looks for what can be forgotten.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// The quotas of an agent. Clones share the counts.
#[derive(Debug, Clone)]
pub struct Quotas(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    connections: Capacity,
    streams: Capacity,
    rate: Rate,
    /// Calls of everybody.
    calls: AtomicUsize,
    counts: Mutex<Counts>,
}

/// How much there is of something.
#[derive(Debug, Clone, Copy)]
struct Capacity {
    all: usize,
    of_one: usize,
}

#[derive(Debug, Default)]
struct Counts {
    connections: usize,
    accounts: HashMap<Origin, Account>,
    swept: Option<Instant>,
}

#[derive(Debug)]
struct Account {
    connections: usize,
    bucket: TokenBucket,
    calls: Arc<AtomicUsize>,
}

/// Why there is nothing left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exceeded {
    /// This caller has its share.
    Own,
    /// Others have all that is not kept for callers with little.
    All,
    /// This caller connects too often.
    Rate,
}

impl Exceeded {
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

impl Capacity {
    /// One caller never has all of it, whatever it is allowed.
    fn of(all: usize, of_one: usize) -> Self {
        Self { all, of_one: of_one.min(all - all / RESERVE_DIVISOR).max(1) }
    }

    /// Whether a caller that holds `own` of the `taken` may have one more.
    fn admit_one(self, own: usize, taken: usize) -> Result<(), Exceeded> {
        if own >= self.of_one {
            return Err(Exceeded::Own);
        }
        let open_to = if own < RESERVE_ELIGIBLE_BELOW { self.all } else { self.all - self.all / RESERVE_DIVISOR };
        if taken < open_to { Ok(()) } else { Err(Exceeded::All) }
    }
}

impl Quotas {
    /// Fresh counts.
    pub fn new(limits: &Limits) -> Self {
        Self(Arc::new(Shared {
            connections: Capacity::of(limits.connections, limits.connections_per_pod),
            streams: Capacity::of(limits.streams, limits.streams_per_pod),
            rate: Rate::new(limits.new_connections_per_second_per_pod, limits.new_connections_burst_per_pod),
            calls: AtomicUsize::new(0),
            counts: Mutex::default(),
        }))
    }

    /// Whether there is no place for anybody: the answer that costs least.
    pub fn are_exhausted(&self) -> bool {
        self.counts().connections >= self.0.connections.all
    }

    /// Takes a place for a connection from `origin`. A caller that is refused pays nothing for having asked.
    pub fn admit(&self, origin: &Origin, now: Instant) -> Result<ConnectionSlot, Exceeded> {
        let rate = self.0.rate;
        let mut counts = self.counts();
        counts.sweep(now);
        let taken = counts.connections;
        let account = match counts.accounts.get_mut(origin) {
            Some(account) => account,
            // Nobody is remembered for having been refused by a full house.
            None => {
                self.0.connections.admit_one(0, taken)?;
                counts.accounts.entry(origin.clone()).or_insert_with(|| Account::new(now))
            }
        };
        self.0.connections.admit_one(account.connections, taken)?;
        account.bucket.take(rate, now).map_err(|_| Exceeded::Rate)?;
        account.connections += 1;
        let calls = account.calls.clone();
        counts.connections += 1;
        drop(counts);
        Ok(ConnectionSlot { quotas: self.clone(), origin: origin.clone(), calls })
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.counts.lock()
    }

    /// How many callers are remembered.
    #[cfg(any(test, feature = "testing"))]
    pub fn remembered(&self) -> usize {
        self.counts().accounts.len()
    }
}

impl Counts {
    fn sweep(&mut self, now: Instant) {
        if self.swept.is_none_or(|at| now.duration_since(at) >= SWEEP_INTERVAL) {
            self.swept = Some(now);
            self.accounts.retain(|_, account| !account.is_forgettable(now));
        }
    }
}

impl Account {
    fn new(now: Instant) -> Self {
        Self { connections: 0, bucket: TokenBucket::full(now), calls: Arc::default() }
    }

    fn is_forgettable(&self, now: Instant) -> bool {
        self.connections == 0 && self.bucket.is_full(now)
    }
}

/// A connection's place. Dropping it frees it.
#[derive(Debug)]
pub struct ConnectionSlot {
    quotas: Quotas,
    origin: Origin,
    calls: Arc<AtomicUsize>,
}

impl ConnectionSlot {
    /// Whose it is.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Takes a place for a call on this connection.
    pub fn call(&self) -> Result<CallSlot, Exceeded> {
        let shared = &self.quotas.0;
        // Counted first and looked at afterwards: two that come at once never both take the last.
        let own = self.calls.fetch_add(1, Ordering::Relaxed);
        let slot = CallSlot { quotas: self.quotas.clone(), calls: self.calls.clone() };
        let taken = shared.calls.fetch_add(1, Ordering::Relaxed);
        shared.streams.admit_one(own, taken).map(|()| slot)
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        let mut counts = self.quotas.counts();
        counts.connections -= 1;
        let now = Instant::now();
        if let Some(account) = counts.accounts.get_mut(&self.origin) {
            account.connections -= 1;
            if account.is_forgettable(now) {
                counts.accounts.remove(&self.origin);
            }
        }
    }
}

/// A call's place. Dropping it frees it.
#[derive(Debug)]
pub struct CallSlot {
    quotas: Quotas,
    calls: Arc<AtomicUsize>,
}

impl Drop for CallSlot {
    fn drop(&mut self) {
        self.calls.fetch_sub(1, Ordering::Relaxed);
        self.quotas.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
