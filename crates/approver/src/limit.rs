//! How many decisions may be on their way to the API server at once: a pure function of the answers so far.
//!
//! cert-manager's webhook asks the API server two questions for each decision (may this user approve for all issuers, and for this one). Its
//! client asks at most five questions a second after a burst of ten, and an answer is remembered for a second. Decisions one after another
//! share the answers. Decisions at once miss the memory together in the moment in which it ends, and each of them asks; beyond five
//! questions a second they wait for each other for as long as there is a backlog, and a few a second is all that is approved.
//!
//! So one decision at a time is the rule. Where the network or the storage takes most of the time, up to four at once are approved that much
//! faster. The limit grows while answers come quickly, and falls to one with the first slow answer; each fall doubles the number of quick
//! answers until it grows again.

use std::time::Duration;

use tokio::time::Instant;

/// An answer that takes longer has waited for the webhook's client, whose questions are 200 ms apart, or the API server is busy.
const MAX_FAST_ANSWER: Duration = Duration::from_millis(200);
/// Decisions on their way at once, however quick the answers are.
pub const MAX_IN_FLIGHT: usize = 4;
/// Quick answers in a row before one more decision may be on its way; it doubles with each fall.
const MIN_STREAK: u32 = 32;
/// The same after many falls: at fifty decisions a second, one more is tried every 20 s.
const MAX_STREAK: u32 = 1024;
/// After a pause as long as the webhook's memory, the first answer needs fresh questions.
const WEBHOOK_CACHE: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub struct Limit {
    allowed: usize,
    /// Quick answers in a row.
    fast: u32,
    /// Quick answers in a row that it takes to grow.
    streak: u32,
    /// The last answer.
    last: Option<Instant>,
}

impl Default for Limit {
    fn default() -> Self {
        Self { allowed: 1, fast: 0, streak: MIN_STREAK, last: None }
    }
}

impl Limit {
    /// How many may be on their way.
    pub fn allowed(&self) -> usize {
        self.allowed
    }

    /// A decision that was sent at `begun` was answered `now`; `written` where it counts.
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
            // Where the most is borne, falls of long ago do not count.
            if self.allowed == MAX_IN_FLIGHT {
                self.streak = MIN_STREAK;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A limit, and answers one after another.
    struct Answers {
        limit: Limit,
        now: Instant,
    }

    impl Answers {
        fn new() -> Self {
            Self { limit: Limit::default(), now: Instant::now() }
        }

        /// So many answers, each after this time; what is allowed then.
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
        assert_eq!(answers.come(MIN_STREAK, 20), 1, "it was too many before: it takes longer now");
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
        assert_eq!(answers.come(MIN_STREAK, 20), 2, "what fell from one says nothing about two");
    }

    /// The webhook has forgotten the answers: that the first decision asks anew is no sign of trouble.
    #[test]
    fn the_first_answer_after_a_pause_may_be_slow() {
        let mut answers = Answers::new();
        assert_eq!(answers.come(MIN_STREAK, 20), 2);
        answers.pause();
        assert_eq!(answers.come(1, 900), 2);
        assert_eq!(answers.come(1, 900), 1, "the second one may not");
    }
}
