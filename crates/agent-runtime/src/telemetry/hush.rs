//! One line for each cause and minute: a caller that does the same wrong thing in a loop does not fill the log.
//!
//! The caller logs when it is given a number, and puts that number into the line: how many like it were left out before. Metrics count
//! them all. The number of causes is bounded, too. A quarter of it is kept for causes that are [proven](Cause::is_proven), so that callers
//! that invent causes do not silence the others; and one line a minute tells that lines about further causes are left out.

use std::{collections::HashMap, hash::Hash, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::{callsite::Identifier, warn};

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::telemetry::hush";

/// Between two lines about the same.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// After this time a cause is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(600);
/// Causes at once. Lines about further ones are left out.
const MAX_CAUSES: usize = 4096;
/// Of these, the ones that only proven causes may take.
const RESERVED_FOR_PROVEN: usize = MAX_CAUSES / 4;

/// What makes two lines the same.
pub trait Cause: Hash + Eq {
    /// Whether it is about an object that is known, and not only about what a caller says of itself or can make up.
    fn is_proven(&self) -> bool {
        true
    }
}

impl Cause for &'static str {}
impl Cause for Identifier {}
impl Cause for (&'static str, String, String) {}

/// What has been told, by cause.
#[derive(Debug)]
pub struct LogLimiter<K>(Mutex<Told<K>>);

#[derive(Debug)]
struct Told<K> {
    causes: HashMap<K, Record>,
    swept: Option<Instant>,
    further: Further,
}

#[derive(Debug)]
struct Record {
    told: Instant,
    left_out: u64,
}

/// Lines about causes for which there was no place.
#[derive(Debug, Default)]
struct Further {
    told: Option<Instant>,
    left_out: u64,
}

impl<K> Default for LogLimiter<K> {
    fn default() -> Self {
        Self(Mutex::new(Told { causes: HashMap::new(), swept: None, further: Further::default() }))
    }
}

impl<K: Cause> LogLimiter<K> {
    /// Whether to tell of `cause` now, and how many like it were left out since the last line about it.
    pub fn permit(&self, cause: K, now: Instant) -> Option<u64> {
        let mut told = self.0.lock();
        let answer = told.permit(cause, now);
        let further = told.further.due(now);
        drop(told);
        if let Some(left_out) = further {
            warn!(target: LOG_TARGET, causes = MAX_CAUSES, left_out, "too many different causes in the log: lines about further ones are left out");
        }
        answer
    }
}

impl<K: Cause> Told<K> {
    fn permit(&mut self, cause: K, now: Instant) -> Option<u64> {
        self.sweep(now);
        if let Some(known) = self.causes.get_mut(&cause) {
            if now.duration_since(known.told) < LOG_INTERVAL {
                known.left_out += 1;
                return None;
            }
            known.told = now;
            return Some(std::mem::take(&mut known.left_out));
        }
        let places = if cause.is_proven() { MAX_CAUSES } else { MAX_CAUSES - RESERVED_FOR_PROVEN };
        if self.causes.len() >= places {
            self.further.left_out += 1;
            return None;
        }
        self.causes.insert(cause, Record { told: now, left_out: 0 });
        Some(0)
    }

    fn sweep(&mut self, now: Instant) {
        if self.swept.is_some_and(|at| now.duration_since(at) < LOG_INTERVAL) {
            return;
        }
        self.swept = Some(now);
        // One that owes a number is kept a while longer, for the next line to pay.
        self.causes.retain(|_, cause| now.duration_since(cause.told) < if cause.left_out > 0 { FORGET_AFTER } else { LOG_INTERVAL });
    }
}

impl Further {
    /// The number of lines that were left out, where it is time to tell it: at once, and then once a minute.
    fn due(&mut self, now: Instant) -> Option<u64> {
        if self.left_out == 0 || self.told.is_some_and(|at| now.duration_since(at) < LOG_INTERVAL) {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{Format, capture, captured::Captured};

    #[test]
    fn a_loop_is_told_once_a_minute_with_what_was_left_out() {
        let (hush, start) = (LogLimiter::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(hush.permit("a", at(0)), Some(0));
        assert_eq!((hush.permit("a", at(1)), hush.permit("a", at(59))), (None, None));
        assert_eq!(hush.permit("b", at(59)), Some(0), "another cause is another line");
        assert_eq!(hush.permit("a", at(60)), Some(2));
        assert_eq!(hush.permit("a", at(119)), None);
        assert_eq!(hush.permit("a", at(400)), Some(1), "a number is owed for a while");
        assert_eq!(hush.permit("a", at(2000)), Some(0));
    }

    /// A number that is made up, or proven.
    #[derive(Debug, PartialEq, Eq, Hash)]
    struct Number(usize, bool);

    impl Cause for Number {
        fn is_proven(&self) -> bool {
            self.1
        }
    }

    #[test]
    fn causes_that_are_made_up_leave_places_for_those_that_are_proven() {
        let (hush, start) = (LogLimiter::default(), Instant::now());
        let told = |proven| (0..10_000).filter(|number| hush.permit(Number(*number, proven), start).is_some()).count();
        assert_eq!(told(false), MAX_CAUSES - RESERVED_FOR_PROVEN);
        assert_eq!(told(true), RESERVED_FOR_PROVEN);
        assert_eq!(hush.permit(Number(20_000, false), start + LOG_INTERVAL), Some(0));
        assert_eq!(hush.0.lock().causes.len(), 1, "they are forgotten");
    }

    #[test]
    fn lines_about_further_causes_are_counted_and_told_once_a_minute() {
        let log = Captured::default();
        let (_guard, _filter) = capture("info", Format::Json, log.clone()).unwrap();
        let (hush, start) = (LogLimiter::default(), Instant::now());
        for number in 0..MAX_CAUSES + 100 {
            hush.permit(Number(number, true), start);
        }
        let left_out = |log: &Captured| -> Vec<_> {
            log.lines("too many different causes").iter().map(|line| line["left_out"].as_u64().unwrap()).collect()
        };
        assert_eq!(left_out(&log), [1], "at once");
        // Whatever comes next pays the rest.
        hush.permit(Number(0, true), start + LOG_INTERVAL);
        assert_eq!(left_out(&log), [1, 99]);
    }
}
