//! The certificate that the client of one stream holds, and the time of its replacement. A state machine without I/O or clock.
//!
//! A client holds the certificate that was sent last, or the one that it reports from before a restart of the server. The identity of the
//! caller may change while the stream is open. The client then keeps the certificate of the previous identity, until the certificate of the
//! new identity is issued and peers with slow clocks accept it.

use std::{sync::Arc, time::SystemTime};

use workload_identity::{Identity, version};

use crate::{
    material::{Svid, TrustBundle},
    sds::client_version::{ClientVersion, Provenance},
    store::Demand,
};

/// A valid certificate that the client holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldCertificate {
    /// The time of its replacement.
    pub renew_at: SystemTime,
    /// The end of its validity.
    pub not_after: SystemTime,
    /// The first three parts of its version, for responses that leave the certificate with the client.
    pub version_prefix: String,
}

impl HeldCertificate {
    /// The certificate of `identity` that the client reports with `version`. `None` if the version is not plausible at `now`, or its
    /// authority is not current according to `roots`. A certificate of a previous epoch or of another trust domain is replaced by `due_at`
    /// at the latest.
    pub fn reported(
        version: &str,
        identity: &Identity,
        roots: Option<&TrustBundle>,
        due_at: impl FnOnce() -> SystemTime,
        now: SystemTime,
    ) -> Option<Self> {
        let held = ClientVersion::read(version, identity, now)?;
        let renew_at = match held.provenance(identity, roots) {
            Provenance::Current => held.renew_at,
            Provenance::PreviousEpoch | Provenance::OtherTrustDomain => held.renew_at.min(due_at()),
            Provenance::Unknown => return None,
        };
        Some(Self { renew_at, not_after: held.not_after, version_prefix: held.version_prefix() })
    }

    fn of(svid: &Svid) -> Self {
        let version_prefix = version::prefix(svid.version()).to_owned();
        Self { renew_at: svid.renew_at, not_after: svid.chain.validity.not_after, version_prefix }
    }
}

/// Returns the demand on the store, for a client that holds `held`.
pub fn demand(held: Option<&HeldCertificate>) -> Demand {
    held.map_or(Demand::Now, |held| Demand::Held { renew_at: held.renew_at, not_after: held.not_after })
}

/// The certificate of a previous identity of the caller. It is served until the certificate of the current identity is available, and is
/// not renewed.
#[derive(Debug)]
struct Previous {
    identity: Arc<Identity>,
    /// `None` if the client has the certificate from before a restart.
    svid: Option<Arc<Svid>>,
    held: HeldCertificate,
}

impl Previous {
    /// Describes `svid`. `kept` is the same certificate if it is to be served, and `None` if its key must not be kept.
    fn of(svid: &Svid, kept: Option<Arc<Svid>>) -> Self {
        Self { identity: svid.identity.clone(), svid: kept, held: HeldCertificate::of(svid) }
    }
}

/// The certificate to serve now.
#[derive(Debug)]
pub struct Choice {
    /// `None` if no certificate is available.
    pub svid: Option<Arc<Svid>>,
    /// A newer certificate is withheld until this time. The client holds a valid certificate, and peers with slow clocks reject the newer
    /// one.
    pub withheld_until: Option<SystemTime>,
}

/// The certificates that the client of one stream holds. Owns the references to the previous certificate and to the last one sent.
#[derive(Debug, Default)]
pub struct Holdings {
    previous: Option<Previous>,
    /// The last certificate that was sent. `None` if the client has rejected it.
    last_sent: Option<Arc<Svid>>,
    /// The certificate that was sent before the last one; the client keeps it if it rejects the last one. Its key is not kept.
    sent_before: Option<Previous>,
}

impl Holdings {
    /// Records that the caller gets another identity at `now`. `identity` is the one until now; the client may have
    /// `reported` a certificate of it.
    pub fn identity_changes(&mut self, identity: &Arc<Identity>, reported: Option<HeldCertificate>, now: SystemTime) {
        let of_sent = match &self.last_sent {
            Some(svid) => svid.chain.validity.is_live(now).then(|| Previous::of(svid, Some(svid.clone()))),
            None => self.sent_before.take().filter(|sent| now < sent.held.not_after),
        };
        let of_reported = || reported.map(|held| Previous { identity: identity.clone(), svid: None, held });
        // Without either, the client still holds the certificate of an earlier identity.
        self.previous = of_sent.or_else(of_reported).or_else(|| self.previous.take());
    }

    /// Returns the valid certificate that the client of `identity` holds at `now`: that of the previous identity, or else the `reported`
    /// one. A certificate of another identity is replaced by `due_at` at the latest.
    pub fn held(
        &self,
        identity: &Arc<Identity>,
        reported: impl FnOnce() -> Option<HeldCertificate>,
        due_at: impl FnOnce() -> SystemTime,
        now: SystemTime,
    ) -> Option<HeldCertificate> {
        let Some(previous) = self.previous.as_ref().filter(|previous| now < previous.held.not_after) else { return reported() };
        let mut held = previous.held.clone();
        // The identities are equal if the configuration was changed back.
        if *previous.identity != **identity {
            held.renew_at = held.renew_at.min(due_at());
        }
        Some(held)
    }

    /// Chooses the certificate to serve at `now`. A `current` certificate that peers with slow clocks still reject is withheld from a
    /// client that holds a valid one. The previous certificate is served instead, if there is one.
    pub fn choose(&self, current: Option<Arc<Svid>>, held: Option<&HeldCertificate>, now: SystemTime) -> Choice {
        let is_live = |svid: &Arc<Svid>| svid.chain.validity.is_live(now);
        let current = current.filter(is_live);
        let withheld_until = current.as_ref().zip(held).and_then(|(svid, held)| {
            let margin = held.not_after.duration_since(now).unwrap_or_default() / 2;
            (now < svid.settled_at && svid.settled_at < now + margin).then_some(svid.settled_at)
        });
        let previous = || self.previous.as_ref()?.svid.clone().filter(is_live);
        let svid = current.filter(|_| withheld_until.is_none()).or_else(previous);
        Choice { svid, withheld_until }
    }

    /// Records that `svid` is sent to the client, whose identity is `identity`.
    pub fn sent(&mut self, svid: Option<&Arc<Svid>>, identity: &Arc<Identity>) {
        if let Some(before) = std::mem::replace(&mut self.last_sent, svid.cloned()) {
            self.sent_before = Some(Previous::of(&before, None));
        }
        if svid.is_some_and(|svid| svid.identity == *identity) {
            self.previous = None;
        }
    }

    /// Records that the client has rejected the last certificate, and keeps the one before it.
    pub fn rejected(&mut self) {
        self.last_sent = None;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use agent_runtime::clock;
    use workload_identity::{
        Profile, Resolver, TrustDomain,
        samples::{identity, pod},
        version::Authority,
    };

    use super::*;
    use crate::material::{authority_digest, authority_of_certificate, samples};

    const HOUR: Duration = Duration::from_secs(3600);

    /// Returns the current time, a certificate for `name`, and the same certificate as a client holds it.
    fn world(name: &str) -> (SystemTime, Arc<Svid>, HeldCertificate) {
        let (svid, _) = samples::svid(identity(name));
        let held = HeldCertificate::of(&svid);
        (SystemTime::now(), Arc::new(svid), held)
    }

    fn never() -> SystemTime {
        panic!("every certificate is of the current identity")
    }

    #[test]
    fn a_new_client_wants_a_certificate_now_and_gets_the_current_one() {
        let (now, svid, _) = world("a");
        let holdings = Holdings::default();
        assert_eq!(demand(holdings.held(&svid.identity, || None, never, now).as_ref()), Demand::Now);
        let Choice { svid: chosen, withheld_until } = holdings.choose(Some(svid.clone()), None, now);
        assert!(Arc::ptr_eq(&chosen.unwrap(), &svid));
        assert_eq!(withheld_until, None);
        assert!(
            holdings.choose(Some(svid.clone()), None, svid.chain.validity.not_after + HOUR).svid.is_none(),
            "an expired certificate is not served"
        );
    }

    #[test]
    fn what_the_client_reports_delays_the_order() {
        let (now, svid, held) = world("a");
        let held = Holdings::default().held(&svid.identity, || Some(held.clone()), never, now).unwrap();
        assert_eq!(demand(Some(&held)), Demand::Held { renew_at: svid.renew_at, not_after: svid.chain.validity.not_after });
    }

    #[test]
    fn versions_of_either_release_wait_and_foreign_ones_do_not() {
        let (svid, roots) = samples::svid(identity("a"));
        let (now, id) = (SystemTime::now(), svid.identity.clone());
        let second = Duration::from_secs(1);
        let due_at = now + Duration::from_secs(60);
        let times = format!("{}-{}", clock::unix_seconds(now + HOUR), clock::unix_seconds(now + HOUR / 2));
        let of_release = |authority: &dyn std::fmt::Display| format!("{times}-{authority}-fedcba9876543210");
        let former = of_release(&authority_digest(&id.profile.fingerprint(), Some(&roots.roots()[0])));
        let path = [authority_of_certificate(&roots.roots()[0]).unwrap()];
        let new = of_release(&Authority::new(&id, &path));
        let reported = |version: &str, id: &Identity| HeldCertificate::reported(version, id, Some(&roots), || due_at, now);

        for version in [&former, &new] {
            let held = reported(version, &id).unwrap();
            assert!(held.renew_at > now + HOUR / 2 - second, "not before its renewal: {version}");
            assert_eq!(held.version_prefix, version::prefix(version), "the client reports the same format again");
            let other = Profile { lifetime: HOUR * 2, ..(*id.profile).clone() };
            assert_eq!(reported(version, &Identity { profile: Arc::new(other), ..(*id).clone() }), None, "another profile: {version}");
        }
        let resolver = Resolver::single(TrustDomain::new("other.example").unwrap(), id.profile.clone());
        let moved = resolver.resolve(&pod(Some("a"), "u1")).unwrap();
        assert_eq!(reported(&new, &moved).unwrap().renew_at, due_at, "another trust domain, within the reissue window");
        assert_eq!(reported(&former, &moved), reported(&former, &id), "a former version does not show it");
    }

    #[test]
    fn a_new_identity_keeps_the_old_certificate_until_its_own_is_sent() {
        let (now, old, _) = world("a");
        let (_, new, _) = world("b");
        let due_at = now + HOUR;
        let mut holdings = Holdings::default();
        holdings.sent(Some(&old), &old.identity);
        holdings.identity_changes(&old.identity, None, now);
        let held = holdings.held(&new.identity, || panic!("the certificate was sent"), || due_at, now).unwrap();
        assert_eq!((held.renew_at, held.not_after), (due_at.min(old.renew_at), old.chain.validity.not_after));
        assert!(Arc::ptr_eq(&holdings.choose(None, Some(&held), now).svid.unwrap(), &old));

        holdings.sent(Some(&new), &new.identity);
        assert_eq!(holdings.held(&new.identity, || None, never, now), None);
        assert!(holdings.choose(None, None, now).svid.is_none(), "the previous certificate is dropped");
    }

    #[test]
    fn a_certificate_that_the_client_rejected_is_not_held() {
        let (now, svid, _) = world("a");
        let (_, newer, _) = world("a");
        let other = identity("b");
        let mut holdings = Holdings::default();
        holdings.sent(Some(&svid), &svid.identity);
        holdings.rejected();
        holdings.identity_changes(&svid.identity, None, now);
        assert_eq!(demand(holdings.held(&other, || None, || now + HOUR, now).as_ref()), Demand::Now, "the client holds no certificate");

        let mut holdings = Holdings::default();
        holdings.sent(Some(&svid), &svid.identity);
        holdings.sent(Some(&newer), &svid.identity);
        holdings.rejected();
        holdings.identity_changes(&svid.identity, None, now);
        let kept = holdings.held(&other, || None, || now + HOUR, now).unwrap();
        assert_eq!(kept.version_prefix, version::prefix(svid.version()), "the client keeps the certificate before it");
        assert!(Arc::strong_count(&svid) == 1, "the server keeps no key for it");
    }

    #[test]
    fn a_way_back_to_the_same_identity_is_no_reason_to_hurry() {
        let (now, svid, held) = world("a");
        let mut holdings = Holdings::default();
        holdings.sent(Some(&svid), &svid.identity);
        holdings.identity_changes(&svid.identity, None, now);
        assert_eq!(holdings.held(&svid.identity, || None, never, now), Some(held));
    }

    #[test]
    fn a_reported_certificate_is_held_through_identity_changes() {
        let (now, svid, held) = world("a");
        let (_, other, _) = world("b");
        let mut holdings = Holdings::default();
        holdings.identity_changes(&svid.identity, Some(held.clone()), now);
        holdings.identity_changes(&other.identity, None, now);
        let kept = holdings.held(&other.identity, || None, || now + HOUR, now).unwrap();
        assert_eq!((kept.not_after, &kept.version_prefix), (held.not_after, &held.version_prefix));
        assert!(holdings.choose(None, Some(&held), now).svid.is_none(), "only the client has the certificate");
        assert_eq!(holdings.held(&other.identity, || None, never, held.not_after), None, "the certificate has expired");
    }

    #[test]
    fn a_settling_certificate_is_withheld_while_a_good_one_is_held() {
        let (now, svid, held) = world("a");
        let fresh = |settled_at| {
            let (svid, _) = samples::svid(identity("a"));
            let Svid { identity, chain, key, renew_at, authority, .. } = svid;
            Arc::new(Svid::new(identity, chain, key, renew_at, settled_at, authority))
        };
        let settled_at = now + Duration::from_secs(60);
        let holdings = Holdings::default();
        let choice = holdings.choose(Some(fresh(settled_at)), Some(&held), now);
        assert!(choice.svid.is_none() && choice.withheld_until == Some(settled_at));
        assert!(holdings.choose(Some(fresh(settled_at)), None, now).svid.is_some(), "a client without one cannot wait");
        let ends_soon = HeldCertificate { not_after: now + Duration::from_secs(90), ..held };
        assert!(
            holdings.choose(Some(fresh(settled_at)), Some(&ends_soon), now).svid.is_some(),
            "the held certificate expires too soon to wait"
        );
        assert!(holdings.choose(Some(svid), Some(&ends_soon), now).svid.is_some());
    }
}
