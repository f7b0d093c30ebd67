//! Quotas: connections, calls and memory of one caller and of all callers, and the rate of new connections of one caller.
//!
//! A caller is an [`Origin`], before attestation. All sockets share one [`Quotas`]. An eighth of all connections, streams and memory is
//! reserved for callers that hold little of it. A new caller is then admitted even while others use all that is not reserved. The account of
//! a caller is removed after its last connection, when its rate limit has recovered. Decisions take the current time as an argument. Calls
//! and memory are counted without a lock.
//!
//! Memory has two parts. Each connection and each call reserves what the HTTP/2 implementation can hold for it at most, as measured. The
//! agent's own buffers for a call are charged as they grow ([`Charge`]).

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
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;

use super::metrics::{Metrics, Refusal, Rejection};
use crate::{attest::origin::Origin, limits::Limits};

/// Callers that hold fewer than this may use the reserve. An Envoy has one connection, and a stream for each secret.
const RESERVE_ELIGIBLE_BELOW: usize = 4;
/// Callers that hold at most this many bytes may use the reserve: an Envoy with its streams.
const MEMORY_ELIGIBLE_BELOW: usize = 4 * (CONNECTION_BYTES + 4 * CALL_BYTES);
/// Bytes that a connection can hold at most, without its calls: buffers of the HTTP/2 implementation and of the socket's wrapper, and one
/// batch of received frames. The long test group `memory` measures it.
pub const CONNECTION_BYTES: usize = 44 << 10;
/// Bytes that a call can hold at most besides what is charged: the states of its HTTP/2 stream and of its service.
pub const CALL_BYTES: usize = 10 << 10;
/// As [`CALL_BYTES`], for a call of another service. tonic keeps two buffers of 8 KiB for a streaming call.
pub const OTHER_CALL_BYTES: usize = 20 << 10;
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
    memory: Capacity,
    rate: Rate,
    /// Calls of all callers.
    calls: AtomicUsize,
    /// Bytes of all callers.
    bytes: Gauge,
    metrics: Metrics,
    counts: Mutex<Counts>,
}

/// The limits of one kind: connections, calls or bytes.
#[derive(Debug, Clone, Copy)]
struct Capacity {
    all: usize,
    of_one: usize,
    /// A caller that has less may use the reserve.
    eligible_below: usize,
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
    bytes: Arc<AtomicUsize>,
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

    /// As [`of_connections`](Self::of_connections), for a connection for which the memory does not suffice.
    pub fn of_connection_memory(self) -> (Rejection, &'static str) {
        match self {
            Self::Own | Self::Rate => (Rejection::pod_memory_limit, "limits.memoryBytesPerPod"),
            Self::All => (Rejection::memory_limit, "limits.memoryBytes"),
        }
    }

    /// Returns the metric label and the configuration field of the limit, for memory of a stream.
    pub fn of_memory(self) -> (Refusal, &'static str) {
        match self {
            Self::Own | Self::Rate => (Refusal::pod_memory_limit, "limits.memoryBytesPerPod"),
            Self::All => (Refusal::memory_limit, "limits.memoryBytes"),
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
    fn of(all: usize, of_one: usize, eligible_below: usize) -> Self {
        Self { all, of_one: of_one.min(all - all / RESERVE_DIVISOR).max(1), eligible_below }
    }

    /// Checks whether a caller that holds `own` of the `taken` units may have `more`.
    fn admit(self, own: usize, taken: usize, more: usize) -> Result<(), Exceeded> {
        if own + more > self.of_one {
            return Err(Exceeded::Own);
        }
        let open_to = if own < self.eligible_below { self.all } else { self.all - self.all / RESERVE_DIVISOR };
        if taken + more <= open_to { Ok(()) } else { Err(Exceeded::All) }
    }
}

impl Quotas {
    /// Quotas without connections and calls.
    pub fn new(limits: &Limits) -> Self {
        Self::measured(limits, Metrics::default())
    }

    /// As [`new`](Self::new), with the metrics of memory.
    pub fn measured(limits: &Limits, metrics: Metrics) -> Self {
        Self(Arc::new(Shared {
            connections: Capacity::of(limits.connections, limits.connections_per_pod, RESERVE_ELIGIBLE_BELOW),
            streams: Capacity::of(limits.streams, limits.streams_per_pod, RESERVE_ELIGIBLE_BELOW),
            memory: Capacity::of(limits.memory_bytes, limits.memory_bytes_per_pod, MEMORY_ELIGIBLE_BELOW),
            rate: Rate::new(limits.new_connections_per_second_per_pod, limits.new_connections_burst_per_pod),
            calls: AtomicUsize::new(0),
            bytes: metrics.memory.clone(),
            metrics,
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
                self.0.connections.admit(0, taken, 1)?;
                counts.accounts.entry(origin.clone()).or_insert_with(|| Account::new(now))
            }
        };
        self.0.connections.admit(account.connections, taken, 1)?;
        account.bucket.take(rate, now).map_err(|_| Exceeded::Rate)?;
        account.connections += 1;
        let (calls, bytes) = (account.calls.clone(), account.bytes.clone());
        counts.connections += 1;
        drop(counts);
        let charge = Charge { quotas: self.clone(), own: bytes, bytes: 0 };
        Ok(ConnectionSlot { quotas: self.clone(), origin: origin.clone(), calls, charge })
    }

    /// A charge to a caller without a connection.
    #[cfg(any(test, feature = "testing"))]
    pub fn charge(&self) -> Charge {
        Charge { quotas: self.clone(), own: Arc::default(), bytes: 0 }
    }

    /// Bytes that are reserved and charged for all callers.
    pub fn memory(&self) -> usize {
        usize::try_from(self.0.bytes.get()).unwrap_or(0)
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
        Self { connections: 0, bucket: TokenBucket::full(now), calls: Arc::default(), bytes: Arc::default() }
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
    charge: Charge,
}

impl ConnectionSlot {
    /// The origin of the connection.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Reserves the memory of the connection.
    ///
    /// # Errors
    ///
    /// The limit that the caller has reached.
    pub fn reserve(&mut self) -> Result<(), Exceeded> {
        self.charge.try_set(CONNECTION_BYTES)
    }

    /// A charge to the caller, of no bytes yet.
    pub fn charge(&self) -> Charge {
        self.charge.another()
    }

    /// Takes a slot for a call on this connection. Its memory is reserved by the charge that the caller of this method takes.
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
        shared.streams.admit(own, taken, 1).map(|()| slot)
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

/// Bytes that are charged to a caller. Dropping it gives them back.
#[derive(Debug)]
pub struct Charge {
    quotas: Quotas,
    own: Arc<AtomicUsize>,
    bytes: usize,
}

fn gauged(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

impl Charge {
    /// A charge to the same caller, of no bytes yet.
    pub fn another(&self) -> Self {
        Self { quotas: self.quotas.clone(), own: self.own.clone(), bytes: 0 }
    }

    /// Changes the charge to `bytes`. If the limit does not allow an increase, the charge stays as it was, and the refusal is counted. A
    /// decrease does not fail.
    ///
    /// # Errors
    ///
    /// The limit that the caller has reached.
    pub fn set(&mut self, bytes: usize) -> Result<(), Exceeded> {
        self.try_set(bytes).inspect_err(|exceeded| self.quotas.0.metrics.refused(exceeded.of_memory().0))
    }

    /// As [`set`](Self::set), without counting a refusal.
    pub(super) fn try_set(&mut self, bytes: usize) -> Result<(), Exceeded> {
        if bytes == self.bytes {
            // Most calls change nothing, and the counters are shared by all threads.
            return Ok(());
        }
        let shared = &self.quotas.0;
        let Some(more) = bytes.checked_sub(self.bytes) else {
            let less = self.bytes - bytes;
            self.own.fetch_sub(less, Ordering::Relaxed);
            shared.bytes.dec_by(gauged(less));
            self.bytes = bytes;
            return Ok(());
        };
        // Counts first and checks afterwards, so that two concurrent increases never both take the last bytes.
        let own = self.own.fetch_add(more, Ordering::Relaxed);
        let taken = usize::try_from(shared.bytes.inc_by(gauged(more))).unwrap_or(0);
        if let Err(exceeded) = shared.memory.admit(own, taken, more) {
            self.own.fetch_sub(more, Ordering::Relaxed);
            shared.bytes.dec_by(gauged(more));
            return Err(exceeded);
        }
        self.bytes = bytes;
        Ok(())
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let _ = self.try_set(0);
    }
}

#[cfg(test)]
mod tests;
