//! The calls of one connection: how many are in progress, since when there are none, and how many were refused.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::quotas::{CallSlot, ConnectionSlot, Exceeded};
use crate::attest::origin::Origin;

/// Calls that are refused in a row on one connection before it is closed: who goes on is made to come back, and that has a rate.
pub const MAX_REFUSED_STREAMS: usize = 32;

/// The calls of one connection, and its slot.
#[derive(Debug)]
pub(super) struct Calls {
    slot: ConnectionSlot,
    in_progress: Mutex<(usize, Instant)>,
    refused: AtomicUsize,
    too_many: CancellationToken,
}

impl Calls {
    /// None, on the connection with this slot.
    pub(super) fn new(slot: ConnectionSlot) -> Self {
        let in_progress = Mutex::new((0, Instant::now()));
        Self { slot, in_progress, refused: AtomicUsize::new(0), too_many: CancellationToken::new() }
    }

    /// Whose they are.
    pub(super) fn origin(&self) -> &Origin {
        self.slot.origin()
    }

    /// Begins one, where there is a slot for it.
    pub(super) fn begin(self: &Arc<Self>) -> Result<Call, Exceeded> {
        let slot = self.slot.call().inspect_err(|_| {
            if self.refused.fetch_add(1, Ordering::Relaxed) + 1 >= MAX_REFUSED_STREAMS {
                self.too_many.cancel();
            }
        })?;
        self.refused.store(0, Ordering::Relaxed);
        self.in_progress().0 += 1;
        Ok(Call { calls: self.clone(), _slot: slot })
    }

    /// Returns when too many calls have been refused.
    pub(super) async fn too_many_refused(&self) {
        self.too_many.cancelled().await;
    }

    /// Since when there has been none; nothing while there is one.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let (calls, since) = *self.in_progress();
        (calls == 0).then_some(since)
    }

    fn in_progress(&self) -> MutexGuard<'_, (usize, Instant)> {
        self.in_progress.lock()
    }
}

/// A call in progress, until its response has been sent or dropped.
#[derive(Debug)]
pub(super) struct Call {
    calls: Arc<Calls>,
    _slot: CallSlot,
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut calls = self.calls.in_progress();
        *calls = (calls.0 - 1, Instant::now());
    }
}
