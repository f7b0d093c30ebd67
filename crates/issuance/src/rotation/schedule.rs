//! Times of renewals and retries: pure arithmetic on a validity, the current time and a random number.

use std::time::{Duration, SystemTime};

use sds_server::material::Validity;
use workload_identity::Profile;

/// Maximum wait between two attempts: 5 min. [`backoff`] exceeds it if a certificate in use has long to live.
pub const MAX_BACKOFF: Duration = Duration::from_secs(300);
/// Maximum wait in any case: 1 h.
const MAX_BACKOFF_WITH_CERTIFICATE: Duration = Duration::from_secs(3600);
/// Minimum number of attempts at a renewal before the certificate in use ends. On average, there are twice as many.
const MIN_ATTEMPTS_BEFORE_EXPIRY: u32 = 24;
/// Latest planned renewal, as a share of the lifetime. It limits any configuration and any random number.
const MAX_RENEWAL_SHARE: f64 = 0.9;
/// Earliest planned first renewal, as a share of the configured one.
const MIN_FIRST_RENEWAL_SHARE: f64 = 0.2;

/// Jitter of a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RenewalJitter {
    /// For an identity's first certificate, and the first after a failure or a delay: drawn over the whole time between two renewals.
    /// Otherwise a fleet that starts or recovers at the same time would renew at the same time.
    FullCycle,
    /// For any other certificate: the configured share and jitter.
    Configured,
}

/// Returns when to replace a certificate of this `validity` that was received at `now`. `draw` is a random number in 0..1, drawn once for
/// each certificate.
///
/// The result is later than `now` by at least a tenth of the remaining lifetime. Therefore an issuer that backdates, or that limits
/// lifetimes near its own end, does not make the agent order in a loop.
pub fn renew_at(validity: &Validity, now: SystemTime, profile: &Profile, renewal_jitter: RenewalJitter, draw: f64) -> SystemTime {
    let low = (profile.renew_at * (1.0 - profile.jitter)).min(MAX_RENEWAL_SHARE);
    let high = (profile.renew_at * (1.0 + profile.jitter)).min(MAX_RENEWAL_SHARE);
    let share = match renewal_jitter {
        RenewalJitter::Configured => low + (high - low) * draw,
        RenewalJitter::FullCycle => (profile.renew_at * MIN_FIRST_RENEWAL_SHARE).min(MAX_RENEWAL_SHARE - high) + spread(low, high, draw),
    };
    let planned = validity.not_before + validity.lifetime().mul_f64(share);
    let remaining = validity.remaining(now);
    let earliest = now + remaining.mul_f64(0.1).max(Duration::from_secs(1)).min(remaining.mul_f64(0.8));
    planned.max(earliest)
}

/// Draws the time from a random moment to the next renewal, if the time between renewals is uniform in `low..high` (the residual life of a
/// renewal process). With this draw, the renewals of a fleet are even from the first one on. A uniform draw over the same width leaves a
/// wave in every cycle, and a narrower one a larger wave (`examples/fleet` shows it).
fn spread(low: f64, high: f64, draw: f64) -> f64 {
    let mean = f64::midpoint(low, high);
    if draw * mean <= low { draw * mean } else { high - (2.0 * mean * (high - low) * (1.0 - draw)).max(0.0).sqrt() }
}

/// Returns when peers whose clocks are behind accept a new certificate: after its [`settling_time`](Validity::settling_time). Issuers such as
/// cert-manager do not backdate.
pub fn settled_at(validity: &Validity) -> SystemTime {
    validity.not_before + validity.settling_time()
}

/// Returns the wait after `failures` consecutive failures, at least one. The backoff is exponential with full jitter: below 2 s, 4 s, 8 s
/// and so on, but at least 500 ms.
///
/// The maximum is 5 min. If the certificate in use lives for another `left`, the maximum is `left` / 24, but at least 5 min and at most
/// 1 h. In an outage of an hour, a fleet therefore retries little more than what is due, and does not keep the issuer overloaded.
pub fn backoff(failures: u32, left: Option<Duration>, draw: f64) -> Duration {
    let most = left.map_or(MAX_BACKOFF, |left| (left / MIN_ATTEMPTS_BEFORE_EXPIRY).clamp(MAX_BACKOFF, MAX_BACKOFF_WITH_CERTIFICATE));
    let ceiling = Duration::from_secs(1 << failures.clamp(1, 12)).min(most);
    ceiling.mul_f64(draw).max(Duration::from_millis(500))
}

/// Returns the wait before another request is made for pending ones, after `unanswered` such requests: between 4 and 5 min, 8 and 10 min and
/// so on, at most 1 h.
pub fn further_request(unanswered: u32, draw: f64) -> Duration {
    (MAX_BACKOFF * (1 << unanswered.min(4))).min(MAX_BACKOFF_WITH_CERTIFICATE).mul_f64(1.0 - draw / 5.0)
}

/// Limits a wait, so that a certificate in use does not end during it: to a quarter of its remaining lifetime, but at least 1 s.
pub fn capped_by_expiry(wait: Duration, remaining: Option<Duration>) -> Duration {
    match remaining {
        Some(left) if !left.is_zero() => wait.min((left / 4).max(Duration::from_secs(1))),
        _ => wait,
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use proptest::prelude::*;
    use workload_identity::samples::identity;

    use super::*;

    const START: SystemTime = UNIX_EPOCH;

    fn validity(seconds: u64) -> Validity {
        Validity { not_before: START, not_after: START + Duration::from_secs(seconds) }
    }

    fn share(at: SystemTime) -> f64 {
        at.duration_since(START).unwrap().as_secs_f64() / 86_400.0
    }

    #[test]
    fn a_first_renewal_is_spread_and_a_later_one_is_jittered() {
        let id = identity("a");
        let draw = |renewal_jitter, draw| share(renew_at(&validity(86_400), START, &id.profile, renewal_jitter, draw));
        let close = |a: f64, b: f64| (a - b).abs() < 1e-6;
        assert!(
            close(draw(RenewalJitter::FullCycle, 0.0), 0.1)
                && close(draw(RenewalJitter::FullCycle, 0.5), 0.35)
                && close(draw(RenewalJitter::FullCycle, 1.0), 0.65)
        );
        assert!(close(draw(RenewalJitter::Configured, 0.0), 0.45) && close(draw(RenewalJitter::Configured, 1.0), 0.55));
    }

    #[test]
    fn settling_takes_a_minute_or_a_twentieth() {
        assert_eq!(settled_at(&validity(86_400)), START + Duration::from_secs(60));
        assert_eq!(settled_at(&validity(30)), START + Duration::from_millis(1500));
    }

    #[test]
    fn backoff_grows_to_five_minutes_and_never_spins() {
        assert_eq!(backoff(1, None, 1.0), Duration::from_secs(2));
        assert_eq!(backoff(100, None, 1.0), MAX_BACKOFF);
        assert_eq!(backoff(100, None, 0.0), Duration::from_millis(500));
    }

    #[test]
    fn backoff_grows_further_where_a_certificate_has_long_to_live() {
        let after = |failures, hours: u64| backoff(failures, Some(Duration::from_secs(hours * 3600)), 1.0).as_secs();
        assert_eq!([1, 5, 9, 10, 100].map(|failures| after(failures, 12)), [2, 32, 512, 1024, 1800]);
        assert_eq!((after(100, 1), after(100, 24 * 365), after(100, 0)), (300, 3600, 300));
    }

    #[test]
    fn a_wait_never_outlasts_what_is_left_of_a_certificate() {
        let wait = Duration::from_secs(300);
        assert_eq!(capped_by_expiry(wait, Some(Duration::from_secs(30))), Duration::from_millis(7500));
        assert_eq!(capped_by_expiry(wait, Some(Duration::from_secs(2))), Duration::from_secs(1));
        assert_eq!(capped_by_expiry(wait, None), wait);
        assert_eq!(capped_by_expiry(wait, Some(Duration::ZERO)), wait, "an ended certificate does not shorten the wait");
    }

    proptest! {
        #[test]
        fn a_renewal_lies_after_now_and_before_the_end(
            life in 2u64..10_000_000, age in 0.0..0.99f64, share in 0.1..0.95f64, jitter in 0.0..0.5f64, draw in 0.0..1.0f64, first in any::<bool>(),
        ) {
            let profile = Profile { renew_at: share, jitter, ..(*identity("a").profile).clone() };
            let renewal_jitter = if first { RenewalJitter::FullCycle } else { RenewalJitter::Configured };
            let validity = validity(life);
            let now = START + validity.lifetime().mul_f64(age);
            let at = renew_at(&validity, now, &profile, renewal_jitter, draw);
            prop_assert!(at > now && at < validity.not_after, "{at:?}");
        }
    }
}
