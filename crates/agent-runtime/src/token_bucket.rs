//! A rate limit with a burst, as a token bucket whose state is one instant.

use std::time::Duration;

use tokio::time::Instant;

/// A sustained rate, and a burst after a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Interval between two tokens.
    interval: Duration,
    /// Time by which a full bucket returns tokens ahead of the sustained rate.
    tolerance: Duration,
}

impl Rate {
    /// Creates a rate of `per_second` tokens per second with bursts of `burst` tokens. Both are at least 1.
    pub fn new(per_second: u32, burst: u32) -> Self {
        let interval = Duration::from_secs(1) / per_second.max(1);
        Self { interval, tolerance: interval * burst.saturating_sub(1) }
    }
}

/// State of a token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenBucket {
    /// Time at which the bucket is full if no token is taken.
    full_at: Instant,
}

impl TokenBucket {
    /// Creates a full bucket.
    pub fn full(now: Instant) -> Self {
        Self { full_at: now }
    }

    /// Takes a token.
    ///
    /// # Errors
    ///
    /// If no token is available: the time at which the next one is.
    pub fn take(&mut self, rate: Rate, now: Instant) -> Result<(), Instant> {
        if self.full_at > now + rate.tolerance {
            return Err(self.full_at.checked_sub(rate.tolerance).unwrap_or(now + rate.interval));
        }
        self.full_at = self.full_at.max(now) + rate.interval;
        Ok(())
    }

    /// Returns an unused token to the bucket.
    pub fn give_back(&mut self, rate: Rate) {
        self.full_at = self.full_at.checked_sub(rate.interval).unwrap_or(self.full_at);
    }

    /// Returns whether the bucket is full, and so equal to a new one.
    pub fn is_full(&self, now: Instant) -> bool {
        self.full_at <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_followed_by_the_rate_and_a_pause_restores_it() {
        let (rate, start) = (Rate::new(10, 3), Instant::now());
        let mut bucket = TokenBucket::full(start);
        let at = |millis| start + Duration::from_millis(millis);
        assert!(bucket.is_full(start));
        for _ in 0..3 {
            bucket.take(rate, start).unwrap();
        }
        assert_eq!(bucket.take(rate, start), Err(at(100)));
        assert_eq!(bucket.take(rate, at(99)), Err(at(100)));
        bucket.take(rate, at(100)).unwrap();
        bucket.give_back(rate);
        bucket.take(rate, at(100)).unwrap();
        assert!(!bucket.is_full(at(399)) && bucket.is_full(at(400)));
        for _ in 0..3 {
            bucket.take(rate, at(1000)).unwrap();
        }
        assert!(bucket.take(rate, at(1000)).is_err(), "a pause saves up no more than a burst");
    }

    #[test]
    fn a_rate_of_nothing_is_one_a_second() {
        let (rate, now) = (Rate::new(0, 0), Instant::now());
        let mut bucket = TokenBucket::full(now);
        bucket.take(rate, now).unwrap();
        assert_eq!(bucket.take(rate, now), Err(now + Duration::from_secs(1)));
    }
}
