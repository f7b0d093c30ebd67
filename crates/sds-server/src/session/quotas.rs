//! Quotas: connections and calls of one caller and of all callers, and the rate of new connections of one caller.
//!
//! A caller is an [`Origin`], before attestation. All sockets share one [`Quotas`]. An eighth of all connections and streams is reserved
//! for callers that hold fewer than 4 of them. A new caller is then admitted even while others use all that is not reserved. The account of
//! a caller is removed after its last connection, when its rate limit has recovered. Decisions take the current time as an argument. Calls
//! are counted without a lock.

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

/// Callers that hold fewer than this may use the reserve. An Envoy has one connection, and a stream for each secret.
const RESERVE_ELIGIBLE_BELOW: usize = 4;
/// The reserve is the total divided by this.
const RESERVE_DIVISOR: usize = 8;
/// The interval between two searches for accounts to remove.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// The quotas of a process. Clones share the counts.
#[derive(Debug, Clone)]
pub struct Quotas(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    connections: Capacity,
    streams: Capacity,
    rate: Rate,
    /// Calls of all callers.
    calls: AtomicUsize,
    counts: Mutex<Counts>,
}

/// The limits of one kind: connections or calls.
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

/// The limit that a caller has reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exceeded {
    /// The limit of this caller.
    Own,
    /// The limit of all callers. For a caller that may not use the reserve, this is the limit without the reserve.
    All,
    /// The rate of new connections of this caller.
    Rate,
}

impl Exceeded {
    /// Returns the metric label and the configuration field of the limit, for a connection.
    pub fn of_connections(self) -> (Rejection, &'static str) {
        match self {
            Self::Own => (Rejection::pod_connection_limit, "limits.connectionsPerPod"),
            Self::All => (Rejection::connection_limit, "limits.connections"),
            Self::Rate => (Rejection::pod_connection_rate, "limits.newConnectionsPerSecondPerPod"),
        }
    }

    /// Returns the metric label and the configuration field of the limit, for a stream. Streams have no rate limit.
    pub fn of_streams(self) -> (Refusal, &'static str) {
        match self {
            Self::Own | Self::Rate => (Refusal::pod_stream_limit, "limits.streamsPerPod"),
            Self::All => (Refusal::stream_limit, "limits.streams"),
        }
    }
}

impl Capacity {
    /// The limit of one caller is at most the total without the reserve.
    fn of(all: usize, of_one: usize) -> Self {
        Self { all, of_one: of_one.min(all - all / RESERVE_DIVISOR).max(1) }
    }

    /// Checks whether a caller that holds `own` of the `taken` slots may have one more.
    fn admit_one(self, own: usize, taken: usize) -> Result<(), Exceeded> {
        if own >= self.of_one {
            return Err(Exceeded::Own);
        }
        let open_to = if own < RESERVE_ELIGIBLE_BELOW { self.all } else { self.all - self.all / RESERVE_DIVISOR };
        if taken < open_to { Ok(()) } else { Err(Exceeded::All) }
    }
}

impl Quotas {
    /// Quotas without connections and calls.
    pub fn new(limits: &Limits) -> Self {
        Self(Arc::new(Shared {
            connections: Capacity::of(limits.connections, limits.connections_per_pod),
            streams: Capacity::of(limits.streams, limits.streams_per_pod),
            rate: Rate::new(limits.new_connections_per_second_per_pod, limits.new_connections_burst_per_pod),
            calls: AtomicUsize::new(0),
            counts: Mutex::default(),
        }))
    }

    /// Whether all connections are in use. The cheapest check, for floods.
    pub fn are_exhausted(&self) -> bool {
        self.counts().connections >= self.0.connections.all
    }

    /// Takes a slot for a connection from `origin` at `now`. A refused attempt does not count against the rate.
    ///
    /// # Errors
    ///
    /// The limit that the caller has reached.
    pub fn admit(&self, origin: &Origin, now: Instant) -> Result<ConnectionSlot, Exceeded> {
        let rate = self.0.rate;
        let mut counts = self.counts();
        counts.sweep(now);
        let taken = counts.connections;
        let account = match counts.accounts.get_mut(origin) {
            Some(account) => account,
            // A caller that is refused because all connections are in use gets no account.
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

    /// The number of callers that have an account.
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

/// The slot of a connection. Dropping it releases the slot.
#[derive(Debug)]
pub struct ConnectionSlot {
    quotas: Quotas,
    origin: Origin,
    calls: Arc<AtomicUsize>,
}

impl ConnectionSlot {
    /// The origin of the connection.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Takes a slot for a call on this connection.
    ///
    /// # Errors
    ///
    /// The limit that the caller has reached.
    pub fn call(&self) -> Result<CallSlot, Exceeded> {
        let shared = &self.quotas.0;
        // Counts first and checks afterwards, so that two concurrent calls never both take the last slot.
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

/// The slot of a call. Dropping it releases the slot.
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
