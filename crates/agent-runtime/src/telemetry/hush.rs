//! Log limiter: one line for each cause and minute, so that a caller that repeats the same mistake does not fill the log.
//!
//! A line is logged if [`LogLimiter::permit`] returns a number, and contains that number: the similar lines that were left out before it.
//! Metrics count all of them. The number of causes is limited to 4,096. A quarter of them is reserved for [proven](Cause::is_proven)
//! causes, so that callers that invent causes do not suppress the others. One line a minute reports that lines about further causes are
//! left out.

use std::{collections::HashMap, hash::Hash, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::{callsite::Identifier, warn};

/// Target of this module's log lines.
const LOG_TARGET: &str = "sds_agent::telemetry::hush";

/// Minimum interval between two lines about one cause.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Time after which a cause with a pending number is removed.
const FORGET_AFTER: Duration = Duration::from_secs(600);
/// Maximum number of causes. Lines about further causes are left out.
const MAX_CAUSES: usize = 4096;
/// Share of the causes that is reserved for proven ones.
const RESERVED_FOR_PROVEN: usize = MAX_CAUSES / 4;

/// Key of a log line: two lines with equal causes are similar.
pub trait Cause: Hash + Eq {
    /// Whether the cause concerns a known object, and not only data that a caller can invent. Default: true.
    fn is_proven(&self) -> bool {
        true
    }
}

impl Cause for &'static str {}
impl Cause for Identifier {}
impl Cause for (&'static str, String, String) {}

/// Limits log lines by cause.
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

/// Lines about causes beyond the maximum.
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
    /// Returns the number of similar lines left out since the last one if a line about `cause` may be logged now, and `None` otherwise.
    pub fn permit(&self, cause: K, now: Instant) -> Option<u64> {
        let mut told = self.0.lock();
        let answer = told.permit(cause, now);
        let further = told.further.due(now);
        drop(told);
        if let Some(left_out) = further {
            warn!(target: LOG_TARGET, causes = MAX_CAUSES, left_out, "too many different causes in the log: lines about further causes are left out");
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
        // A cause with left out lines is kept for 600 s, so that its next line can report their number.
        self.causes.retain(|_, cause| now.duration_since(cause.told) < if cause.left_out > 0 { FORGET_AFTER } else { LOG_INTERVAL });
    }
}

impl Further {
    /// Returns the number of lines that were left out if it is due: at once for the first, and then once a minute.
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
        assert_eq!(hush.permit("a", at(400)), Some(1), "the number is kept for 600 s");
        assert_eq!(hush.permit("a", at(2000)), Some(0));
    }

    /// A cause, invented or proven.
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
        assert_eq!(hush.0.lock().causes.len(), 1, "old causes are removed");
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
        // The next line of any cause reports the rest.
        hush.permit(Number(0, true), start + LOG_INTERVAL);
        assert_eq!(left_out(&log), [1, 99]);
    }
}
