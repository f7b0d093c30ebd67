//! One line for each cause and minute: who does the same wrong thing in a loop does not fill the log.
//!
//! The caller logs when it is given a number, and puts that number into the line: how many like it were left out before. Metrics count
//! them all.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Between two lines about the same.
const PACE: Duration = Duration::from_secs(60);
/// After this time a cause is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(600);
/// Causes at once. What comes beyond them is not told.
const CAUSES: usize = 4096;

/// What has been told, by cause.
#[derive(Debug)]
pub struct Hush<K>(Mutex<Told<K>>);

#[derive(Debug)]
struct Told<K> {
    causes: HashMap<K, Cause>,
    swept: Option<Instant>,
}

#[derive(Debug)]
struct Cause {
    told: Instant,
    left_out: u64,
}

impl<K> Default for Hush<K> {
    fn default() -> Self {
        Self(Mutex::new(Told { causes: HashMap::new(), swept: None }))
    }
}

impl<K: Hash + Eq> Hush<K> {
    /// Whether to tell of `cause` now, and how many like it were left out since the last line about it.
    pub fn tells(&self, cause: K, now: Instant) -> Option<u64> {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        told.sweep(now);
        if let Some(known) = told.causes.get_mut(&cause) {
            if now.duration_since(known.told) < PACE {
                known.left_out += 1;
                return None;
            }
            known.told = now;
            return Some(std::mem::take(&mut known.left_out));
        }
        if told.causes.len() >= CAUSES {
            return None;
        }
        told.causes.insert(cause, Cause { told: now, left_out: 0 });
        Some(0)
    }
}

impl<K: Hash + Eq> Told<K> {
    fn sweep(&mut self, now: Instant) {
        if self.swept.is_some_and(|at| now.duration_since(at) < PACE) {
            return;
        }
        self.swept = Some(now);
        // One that owes a number is kept a while longer, for the next line to pay.
        self.causes.retain(|_, cause| now.duration_since(cause.told) < if cause.left_out > 0 { FORGOTTEN } else { PACE });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_is_told_once_a_minute_with_what_was_left_out() {
        let (hush, start) = (Hush::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(hush.tells("a", at(0)), Some(0));
        assert_eq!((hush.tells("a", at(1)), hush.tells("a", at(59))), (None, None));
        assert_eq!(hush.tells("b", at(59)), Some(0), "another cause is another line");
        assert_eq!(hush.tells("a", at(60)), Some(2));
        assert_eq!(hush.tells("a", at(119)), None);
        assert_eq!(hush.tells("a", at(400)), Some(1), "a number is owed for a while");
        assert_eq!(hush.tells("a", at(2000)), Some(0));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (hush, start) = (Hush::default(), Instant::now());
        let told = (0..10_000).filter(|number| hush.tells(*number, start).is_some()).count();
        assert_eq!(told, CAUSES);
        assert_eq!(hush.tells(20_000, start + PACE), Some(0));
        assert_eq!(hush.0.lock().unwrap().causes.len(), 1);
    }
}
