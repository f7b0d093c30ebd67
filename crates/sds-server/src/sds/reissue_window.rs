//! The time at which a certificate is reissued after a change of the configuration or of a pod's facts. The times are spread over a window,
//! so that a raised epoch does not overload the issuer. All streams of an identity have the same time after a change of the configuration.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::{Duration, SystemTime},
};

use workload_identity::Identity;

/// The window in which certificates are reissued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReissueWindow {
    since: SystemTime,
    over: Duration,
    seed: u64,
}

impl ReissueWindow {
    /// A window that begins at `since` and lasts `over`. Agents with different seeds choose different times.
    pub fn new(since: SystemTime, over: Duration, seed: u64) -> Self {
        Self { since, over, seed }
    }

    /// The same window, but it begins at `since` if that is later: for a change of one workload, long after the last change of the
    /// configuration.
    pub fn from(self, since: SystemTime) -> Self {
        Self { since: self.since.max(since), ..self }
    }

    /// The time at which the certificate of `identity` is reissued.
    pub fn due_at(&self, identity: &Identity) -> SystemTime {
        let mut hash = DefaultHasher::new();
        (self.seed, identity).hash(&mut hash);
        self.since + self.over.mul_f64(fastrand::Rng::with_seed(hash.finish()).f64())
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use workload_identity::samples::identity;

    use super::*;

    #[test]
    fn an_identity_has_one_moment_and_many_are_spread_evenly() {
        let over = Duration::from_secs(1000);
        let reissue_window = ReissueWindow::new(UNIX_EPOCH, over, 7);
        let moments: Vec<_> = (0..1000).map(|n| reissue_window.due_at(&identity(&format!("sa-{n}")))).collect();
        for tenth in 0..10_u32 {
            let begin = UNIX_EPOCH + over / 10 * tenth;
            let within = moments.iter().filter(|m| **m >= begin && **m < begin + over / 10).count();
            assert!((60..140).contains(&within), "{within} in tenth {tenth}");
        }
        assert_eq!(reissue_window.due_at(&identity("sa-3")), moments[3]);
        assert_ne!(ReissueWindow::new(UNIX_EPOCH, over, 8).due_at(&identity("sa-3")), moments[3]);
        assert_eq!(reissue_window.from(UNIX_EPOCH + over).due_at(&identity("sa-3")), moments[3] + over);
        assert_eq!(reissue_window.from(UNIX_EPOCH - over), reissue_window, "the window begins at the later change");
    }
}
