//! The calls of one connection: calls in progress, the idle time, and refused calls.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::quotas::{CallSlot, Charge, ConnectionSlot, Exceeded};
use crate::attest::origin::Origin;

/// Refused calls in a row after which a connection is closed. The client then has to connect again, and the rate of new connections is
/// limited.
pub const MAX_REFUSED_STREAMS: usize = 32;

/// The calls of one connection, and its quota slot.
#[derive(Debug)]
pub(super) struct Calls {
    slot: ConnectionSlot,
    in_progress: Mutex<(usize, Instant)>,
    refused: AtomicUsize,
    too_many: CancellationToken,
}

impl Calls {
    /// No calls yet, on the connection with this slot.
    pub(super) fn new(slot: ConnectionSlot) -> Self {
        let in_progress = Mutex::new((0, Instant::now()));
        Self { slot, in_progress, refused: AtomicUsize::new(0), too_many: CancellationToken::new() }
    }

    /// The origin of the connection.
    pub(super) fn origin(&self) -> &Origin {
        self.slot.origin()
    }

    /// Begins a call that can hold `bytes`, if the quota has a slot and the memory for it.
    pub(super) fn begin(self: &Arc<Self>, bytes: usize) -> Result<Call, Refused> {
        let mut reserved = self.slot.charge();
        let slot = self.slot.call().map_err(Refused::Streams);
        let slot = slot.and_then(|slot| reserved.try_set(bytes).map(|()| slot).map_err(Refused::Memory)).inspect_err(|_| {
            if self.refused.fetch_add(1, Ordering::Relaxed) + 1 >= MAX_REFUSED_STREAMS {
                self.too_many.cancel();
            }
        })?;
        self.refused.store(0, Ordering::Relaxed);
        self.in_progress().0 += 1;
        Ok(Call { calls: self.clone(), _slot: slot, _reserved: reserved })
    }

    /// A charge to the caller, for what the agent buffers for a call.
    pub(super) fn charge(&self) -> Charge {
        self.slot.charge()
    }

    /// Returns when [`MAX_REFUSED_STREAMS`] calls in a row have been refused.
    pub(super) async fn too_many_refused(&self) {
        self.too_many.cancelled().await;
    }

    /// The time since which no call is in progress. `None` during a call.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let (calls, since) = *self.in_progress();
        (calls == 0).then_some(since)
    }

    fn in_progress(&self) -> MutexGuard<'_, (usize, Instant)> {
        self.in_progress.lock()
    }
}

/// The quota that has no room for a call.
#[derive(Debug, Clone, Copy)]
pub(super) enum Refused {
    Streams(Exceeded),
    Memory(Exceeded),
}

/// A call in progress. It ends when its response has been sent or dropped.
#[derive(Debug)]
pub(super) struct Call {
    calls: Arc<Calls>,
    _slot: CallSlot,
    _reserved: Charge,
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut calls = self.calls.in_progress();
        *calls = (calls.0 - 1, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        limits::Limits,
        session::quotas::{CALL_BYTES, CONNECTION_BYTES, Quotas},
    };

    #[tokio::test]
    async fn a_call_reserves_memory_until_it_ends_and_is_refused_without() {
        const CALLS: usize = 3;
        let most = CONNECTION_BYTES + CALLS * CALL_BYTES;
        let quotas = Quotas::new(&Limits { memory_bytes_per_pod: most, ..Limits::default() });
        let mut slot = quotas.admit(&Origin::User(1), Instant::now()).unwrap();
        slot.reserve().unwrap();
        let (calls, idle) = (Arc::new(Calls::new(slot)), quotas.memory());
        let begun: Vec<_> = (0..CALLS).map(|_| calls.begin(CALL_BYTES).unwrap()).collect();
        assert_eq!(quotas.memory(), idle + CALLS * CALL_BYTES);
        assert!(matches!(calls.begin(CALL_BYTES), Err(Refused::Memory(_))));
        drop(begun);
        assert_eq!(quotas.memory(), idle);
    }
}
