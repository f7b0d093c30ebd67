//! The gate before the writes: requests are judged in parallel, and decisions are written [a few at a time](Limit), first come, first served.
//!
//! A slot is held for one write. A write without an answer does not block the others: after `STUCK_WRITE_AFTER` an extra slot is given out
//! for as long as it takes. The gate is shut while the replica is on standby.

use std::{future::Future, pin::pin, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{Semaphore, SemaphorePermit, watch},
    time::{Instant, sleep},
};

use super::limit::Limit;

/// A write without an answer for so long does not block the next one. cert-manager's webhook may take 30 s for an answer.
const STUCK_WRITE_AFTER: Duration = Duration::from_secs(5);
/// Extra slots at once.
const MAX_EXTRA_SLOTS: usize = 3;

/// See the module.
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
    /// Permits to be taken away as they come back.
    surplus: usize,
}

/// The right to write one decision.
#[derive(Debug)]
pub struct Slot<'a> {
    gate: &'a WriteGate,
    permit: Option<SemaphorePermit<'a>>,
    /// Whether it was waited for: a judgement from before the wait may be out of date.
    pub waited: bool,
}

impl Default for WriteGate {
    fn default() -> Self {
        let state = State::default();
        Self { permits: Semaphore::new(state.limit.allowed()), state: Mutex::new(state), open: watch::Sender::new(true) }
    }
}

impl WriteGate {
    /// Opens or shuts the gate. Whatever waits when it is shut gets no slot; a write that has begun goes on.
    pub fn set_open(&self, open: bool) {
        self.open.send_if_modified(|was| std::mem::replace(was, open) != open);
    }

    /// Waits for a slot; none where the gate is shut.
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

    /// Gives out one more slot; whether there is room for it.
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
    /// Makes the write; `counts` says whether its answer is a decision that was written.
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
