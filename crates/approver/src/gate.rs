//! Limits concurrent writes: requests are judged in parallel, and decisions are written [1 to 4 at a time](Limit), in FIFO order.
//!
//! A slot permits one write. If a write has no response after 5 s (`STUCK_WRITE_AFTER`), the gate adds an extra slot until the response
//! arrives, so one stuck write does not block the others. The gate is closed while the replica is on standby.

use std::{future::Future, pin::pin, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{Semaphore, SemaphorePermit, watch},
    time::{Instant, sleep},
};

use super::limit::Limit;

/// Time without a response after which a write no longer blocks the next one. cert-manager's webhook may take up to 30 s.
const STUCK_WRITE_AFTER: Duration = Duration::from_secs(5);
/// Maximum number of extra slots at the same time.
const MAX_EXTRA_SLOTS: usize = 3;

/// Hands out [`Slot`]s for writes to the API server. Open by default.
#[derive(Debug)]
pub struct WriteGate {
    permits: Semaphore,
    state: Mutex<State>,
    open: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    limit: Limit,
    extra: usize,
    /// Permits to forget when their slots are dropped.
    surplus: usize,
}

/// Permission to write one decision. Dropping it returns the permit.
#[derive(Debug)]
pub struct Slot<'a> {
    gate: &'a WriteGate,
    permit: Option<SemaphorePermit<'a>>,
    /// Whether the caller waited for the slot: a judgement made before the wait may be out of date.
    pub waited: bool,
}

impl Default for WriteGate {
    fn default() -> Self {
        let state = State::default();
        Self { permits: Semaphore::new(state.limit.allowed()), state: Mutex::new(state), open: watch::Sender::new(true) }
    }
}

impl WriteGate {
    /// Opens or closes the gate. Closing makes every waiting [`slot`](Self::slot) return `None`; writes that have begun continue.
    pub fn set_open(&self, open: bool) {
        self.open.send_if_modified(|was| std::mem::replace(was, open) != open);
    }

    /// Waits for a slot. Returns `None` if the gate is closed, or closes during the wait.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses the place in the queue, and no slot.
    pub async fn slot(&self) -> Option<Slot<'_>> {
        let mut open = self.open.subscribe();
        if !*open.borrow() {
            return None;
        }
        if let Ok(permit) = self.permits.try_acquire() {
            return Some(Slot { gate: self, permit: Some(permit), waited: false });
        }
        tokio::select! {
            biased;
            _ = open.wait_for(|open| !open) => None,
            permit = self.permits.acquire() => Some(Slot { gate: self, permit: permit.ok(), waited: true }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Adds an extra slot, up to [`MAX_EXTRA_SLOTS`]. Returns whether it was added.
    fn add_extra(&self) -> bool {
        let mut state = self.state();
        let has_room = state.extra < MAX_EXTRA_SLOTS;
        if has_room {
            state.extra += 1;
            self.permits.add_permits(1);
        }
        has_room
    }

    fn answered(&self, begun: Instant, written: bool, has_extra: bool) {
        let mut state = self.state();
        if has_extra {
            state.extra -= 1;
            state.surplus += 1;
        }
        let before = state.limit.allowed();
        state.limit.answered(begun, Instant::now(), written);
        let allowed = state.limit.allowed();
        if allowed > before {
            self.permits.add_permits(allowed - before);
        } else {
            state.surplus += before - allowed;
        }
    }
}

impl Slot<'_> {
    /// Runs `write`. `counts` returns whether the response means a written decision, which the [`Limit`] needs.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future returns the slot. An extra slot that was added because this write is stuck is not taken back.
    pub async fn write<T>(self, write: impl Future<Output = T>, counts: impl Fn(&T) -> bool) -> T {
        let begun = Instant::now();
        let mut write = pin!(write);
        let mut has_extra = false;
        let answer = tokio::select! {
            biased;
            answer = &mut write => answer,
            () = sleep(STUCK_WRITE_AFTER) => {
                has_extra = self.gate.add_extra();
                write.await
            }
        };
        self.gate.answered(begun, counts(&answer), has_extra);
        answer
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        if state.surplus > 0
            && let Some(permit) = self.permit.take()
        {
            state.surplus -= 1;
            permit.forget();
        }
        drop(state);
    }
}
