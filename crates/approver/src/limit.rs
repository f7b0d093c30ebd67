//! Adaptive limit of concurrent writes of decisions, 1 to 4: a pure function of the response times so far.
//!
//! For each decision, cert-manager's webhook sends two SubjectAccessReviews (may this user approve for all signers, and for this one). Its
//! client is limited to 5 requests per second with a burst of 10, and caches an answer for 1 s. Sequential decisions share the cached
//! answers. Concurrent decisions all miss the cache when it expires, and each sends its own reviews. Above 5 reviews per second the
//! webhook's client queues them, and throughput drops to a few decisions per second while the backlog lasts.
//!
//! So the limit starts at 1. If most of the time is spent in the network or in etcd, concurrent writes are faster. The limit grows by 1
//! after a streak of fast responses, and falls to 1 at the first slow response. Each fall doubles the streak that the next growth needs.

use std::time::Duration;

use tokio::time::Instant;

/// A slower response has waited for the webhook's client, whose requests are 200 ms apart, or the API server is busy.
const MAX_FAST_ANSWER: Duration = Duration::from_millis(200);
/// Maximum number of concurrent writes.
pub const MAX_IN_FLIGHT: usize = 4;
/// Consecutive fast responses before the limit grows by 1. The number doubles with each fall, up to [`MAX_STREAK`].
const MIN_STREAK: u32 = 32;
/// Upper bound of the streak: at 50 decisions per second the limit tries to grow every 20 s.
const MAX_STREAK: u32 = 1024;
/// Time for which the webhook caches an answer. After a longer pause the first response is slow, because the cache is empty.
const WEBHOOK_CACHE: Duration = Duration::from_secs(1);

/// Number of concurrent writes that are allowed, adapted to response times. Starts at 1.
#[derive(Debug)]
pub struct Limit {
    allowed: usize,
    /// Consecutive fast responses.
    fast: u32,
    /// Consecutive fast responses that the next growth needs.
    streak: u32,
    /// Time of the last response.
    last: Option<Instant>,
}

impl Default for Limit {
    fn default() -> Self {
        Self { allowed: 1, fast: 0, streak: MIN_STREAK, last: None }
    }
}

impl Limit {
    /// Returns the number of allowed concurrent writes, 1 to [`MAX_IN_FLIGHT`].
    pub fn allowed(&self) -> usize {
        self.allowed
    }

    /// Notes the response at `now` to a write that was sent at `begun`. A response without a written decision resets the limit to 1.
    pub fn answered(&mut self, begun: Instant, now: Instant, written: bool) {
        let after_pause = self.last.is_none_or(|last| begun.saturating_duration_since(last) >= WEBHOOK_CACHE);
        self.last = Some(now);
        if !written || (now.duration_since(begun) > MAX_FAST_ANSWER && !after_pause) {
            if self.allowed > 1 {
                self.streak = (self.streak * 2).min(MAX_STREAK);
            }
            (self.allowed, self.fast) = (1, 0);
            return;
        }
        self.fast += 1;
        if self.fast >= self.streak {
            self.allowed = (self.allowed + 1).min(MAX_IN_FLIGHT);
            self.fast = 0;
            // At the maximum, earlier falls no longer count.
            if self.allowed == MAX_IN_FLIGHT {
                self.streak = MIN_STREAK;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A limit that gets sequential responses.
    struct Answers {
        limit: Limit,
        now: Instant,
    }

    impl Answers {
        fn new() -> Self {
            Self { limit: Limit::default(), now: Instant::now() }
        }

        /// Notes `count` responses of `milliseconds` each, and returns the limit.
        fn come(&mut self, count: u32, milliseconds: u64) -> usize {
            for _ in 0..count {
                let begun = self.now;
                self.now += Duration::from_millis(milliseconds);
                self.limit.answered(begun, self.now, true);
            }
            self.limit.allowed()
        }

        fn pause(&mut self) {
            self.now += WEBHOOK_CACHE;
        }
    }

    #[test]
    fn the_limit_grows_with_quick_answers_and_drops_on_a_slow_one() {
        let mut answers = Answers::new();
        assert_eq!(answers.come(MIN_STREAK - 1, 20), 1);
        assert_eq!(answers.come(1, 20), 2);
        assert_eq!(answers.come(MIN_STREAK, 20), 3);
        assert_eq!(answers.come(10 * MIN_STREAK, 20), MAX_IN_FLIGHT);
        assert_eq!(answers.come(1, 201), 1);
        assert_eq!(answers.come(MIN_STREAK, 20), 1, "a fall doubles the streak that the next growth needs");
        assert_eq!(answers.come(MIN_STREAK, 20), 2);
    }

    #[test]
    fn where_it_falls_again_and_again_it_is_tried_ever_less_often() {
        let mut answers = Answers::new();
        for streak in [32, 64, 128, 256, 512, 1024, 1024] {
            assert_eq!(answers.come(streak - 1, 20), 1);
            assert_eq!(answers.come(1, 20), 2);
            assert_eq!(answers.come(1, 500), 1);
        }
    }

    #[test]
    fn slow_answers_keep_it_at_one_and_so_do_refusals() {
        let mut answers = Answers::new();
        assert_eq!(answers.come(1000, 400), 1);
        for _ in 0..1000 {
            answers.come(MIN_STREAK - 1, 20);
            answers.limit.answered(answers.now, answers.now, false);
        }
        assert_eq!(answers.limit.allowed(), 1);
        assert_eq!(answers.come(MIN_STREAK, 20), 2, "a slow response at limit 1 does not lengthen the streak");
    }

    /// The webhook's cache is empty after a pause, so a slow first response is expected.
    #[test]
    fn the_first_answer_after_a_pause_may_be_slow() {
        let mut answers = Answers::new();
        assert_eq!(answers.come(MIN_STREAK, 20), 2);
        answers.pause();
        assert_eq!(answers.come(1, 900), 2);
        assert_eq!(answers.come(1, 900), 1, "a slow second response lowers the limit");
    }
}
