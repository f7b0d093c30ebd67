//! When: pure arithmetic on (validity, now, a number drawn at random).

use std::time::{Duration, SystemTime};

use sds_server::material::Validity;
use workload_identity::Profile;

/// The longest wait between two attempts, unless a certificate is in use that has long to live.
pub const MAX_BACKOFF: Duration = Duration::from_secs(300);
/// The longest in any case.
const MAX_BACKOFF_WITH_CERTIFICATE: Duration = Duration::from_secs(3600);
/// So many times at the least, on the average twice as often, a renewal is tried again before the certificate in use ends.
const MIN_ATTEMPTS_BEFORE_EXPIRY: u32 = 24;
/// No renewal is planned later than this share of the lifetime, whatever was configured and drawn.
const MAX_RENEWAL_SHARE: f64 = 0.9;
/// No first renewal is planned earlier than this share of the usual one.
const MIN_FIRST_RENEWAL_SHARE: f64 = 0.2;

/// Which draw a renewal gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RenewalJitter {
    /// The identity's first certificate, or the first after trouble: drawn as wide as the time between two renewals, because a fleet that
    /// starts or recovers together would otherwise stay in lockstep.
    FullCycle,
    /// Any other: the configured share and jitter.
    Configured,
}

/// When the replacement of a certificate of this `validity`, received at `now`, is due. `draw` lies in 0..1 and is drawn once per
/// certificate.
///
/// Whatever the certificate says, the answer lies after `now` by at least a tenth of what is left: an issuer that backdates, or that
/// caps lifetimes near its own end, does not make the agent order in a loop.
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

/// The time to the next renewal, as seen from any moment, of something that is renewed again and again after `low` to `high`: drawn so, a
/// fleet's renewals are even from the first on. A plain draw over the same width leaves a wave in every cycle, a narrower one a larger
/// wave (`examples/fleet` shows it).
fn spread(low: f64, high: f64, draw: f64) -> f64 {
    let mean = f64::midpoint(low, high);
    if draw * mean <= low { draw * mean } else { high - (2.0 * mean * (high - low) * (1.0 - draw)).max(0.0).sqrt() }
}

/// From when on a new certificate is taken by peers whose clocks run behind: issuers such as cert-manager do not backdate.
pub fn settled_at(validity: &Validity) -> SystemTime {
    validity.not_before + Duration::from_secs(60).min(validity.lifetime() / 20)
}

/// The wait after `failures` failures in a row (at least one): full jitter below 2 s, 4 s, 8 s …, and never below half a second. The most is
/// five minutes; or an hour at most where the certificate in use has so long to live (`left`) that there are attempts enough all the same.
/// A fleet whose issuer is down for an hour then asks for little more than what is due: it is not what keeps the issuer down.
pub fn backoff(failures: u32, left: Option<Duration>, draw: f64) -> Duration {
    let most = left.map_or(MAX_BACKOFF, |left| (left / MIN_ATTEMPTS_BEFORE_EXPIRY).clamp(MAX_BACKOFF, MAX_BACKOFF_WITH_CERTIFICATE));
    let ceiling = Duration::from_secs(1 << failures.clamp(1, 12)).min(most);
    ceiling.mul_f64(draw).max(Duration::from_millis(500))
}

/// A wait, shortened where a certificate that is in use would end meanwhile: a quarter of what is left, and at least a second.
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
        assert_eq!(capped_by_expiry(wait, Some(Duration::ZERO)), wait, "what has ended hurries nobody");
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
