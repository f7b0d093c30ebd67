//! The certificate that the client of one stream holds, and the time of its replacement. A state machine without I/O or clock.
//!
//! A client holds the certificate that it was sent last, or the one that it reports from before a restart of the server. Its identity may
//! change while the stream is open: then it keeps the certificate of its previous identity until that of the new one is there and peers
//! with slow clocks accept it.

use std::{sync::Arc, time::SystemTime};

use workload_identity::{Identity, version};

use crate::{
    material::{Svid, TrustBundle},
    sds::client_version::{ClientVersion, Provenance},
    store::Demand,
};

/// A certificate that the client holds, and that is still good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldCertificate {
    /// When it is to be replaced.
    pub renew_at: SystemTime,
    /// When it ends.
    pub not_after: SystemTime,
    /// Its version's first three parts, for responses that leave it with the client.
    pub version_prefix: String,
}

impl HeldCertificate {
    /// The certificate of `identity` that the client reports by its `version`. None where the version is not plausible at `now`, or its
    /// authority is not current by `roots`. A certificate of a previous epoch is to be replaced by `due_at`.
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
            Provenance::PreviousEpoch => held.renew_at.min(due_at()),
            Provenance::Unknown => return None,
        };
        Some(Self { renew_at, not_after: held.not_after, version_prefix: held.version_prefix() })
    }

    fn of(svid: &Svid) -> Self {
        let version_prefix = version::prefix(svid.version()).to_owned();
        Self { renew_at: svid.renew_at, not_after: svid.chain.validity.not_after, version_prefix }
    }
}

/// The demand on the store of a client that holds `held`.
pub fn demand(held: Option<&HeldCertificate>) -> Demand {
    held.map_or(Demand::Now, |held| Demand::Held { renew_at: held.renew_at, not_after: held.not_after })
}

/// The certificate of an identity that the caller had before. It is served until that of its identity is there, and not renewed.
#[derive(Debug)]
struct Previous {
    identity: Arc<Identity>,
    /// None where the client has it from before a restart.
    svid: Option<Arc<Svid>>,
    held: HeldCertificate,
}

impl Previous {
    /// The certificate of `svid`. `kept` is `svid` where it is to be served, and none where its key must not be kept for this.
    fn of(svid: &Svid, kept: Option<Arc<Svid>>) -> Self {
        Self { identity: svid.identity.clone(), svid: kept, held: HeldCertificate::of(svid) }
    }
}

/// The certificate to serve now.
#[derive(Debug)]
pub struct Choice {
    /// The certificate; none where there is none yet.
    pub svid: Option<Arc<Svid>>,
    /// A newer certificate is withheld until then, because the client still holds a good one and peers with slow clocks refuse the newer.
    pub withheld_until: Option<SystemTime>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Holdings {
    previous: Option<Previous>,
    /// The last one that was sent; none where the client has rejected it.
    last_sent: Option<Arc<Svid>>,
    /// The one before, which the client keeps where it rejects the last one. Without the key, which is not kept for this.
    sent_before: Option<Previous>,
}

impl Holdings {
    /// The identity of the caller changes at `now`; until then it is `identity`, whose certificate the client may have `reported`.
    pub fn identity_changes(&mut self, identity: &Arc<Identity>, reported: Option<HeldCertificate>, now: SystemTime) {
        let of_sent = match &self.last_sent {
            Some(svid) => svid.chain.validity.is_live(now).then(|| Previous::of(svid, Some(svid.clone()))),
            None => self.sent_before.take().filter(|sent| now < sent.held.not_after),
        };
        let of_reported = || reported.map(|held| Previous { identity: identity.clone(), svid: None, held });
        // Where neither is there, the client keeps that of an identity from before the last one.
        self.previous = of_sent.or_else(of_reported).or_else(|| self.previous.take());
    }

    /// The good certificate that the client of `identity` holds at `now`: that of its previous identity, or the `reported` one. A
    /// certificate of another identity is to be replaced by `due_at`.
    pub fn held(
        &self,
        identity: &Arc<Identity>,
        reported: impl FnOnce() -> Option<HeldCertificate>,
        due_at: impl FnOnce() -> SystemTime,
        now: SystemTime,
    ) -> Option<HeldCertificate> {
        let Some(previous) = self.previous.as_ref().filter(|previous| now < previous.held.not_after) else { return reported() };
        let mut held = previous.held.clone();
        // Where the configuration went back meanwhile, it is simply its own.
        if *previous.identity != **identity {
            held.renew_at = held.renew_at.min(due_at());
        }
        Some(held)
    }

    /// Serves `current` at `now`. A `current` one that is too fresh is withheld from a client that holds a good one; the previous one, if
    /// any, is served in its place.
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

    /// `svid` is sent to the client, whose identity is `identity`.
    pub fn sent(&mut self, svid: Option<&Arc<Svid>>, identity: &Arc<Identity>) {
        if let Some(before) = std::mem::replace(&mut self.last_sent, svid.cloned()) {
            self.sent_before = Some(Previous::of(&before, None));
        }
        if svid.is_some_and(|svid| svid.identity == *identity) {
            self.previous = None;
        }
    }

    /// The client has rejected the certificate that was sent last, and keeps the one before.
    pub fn rejected(&mut self) {
        self.last_sent = None;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use workload_identity::samples::identity;

    use super::*;
    use crate::material::samples;

    const HOUR: Duration = Duration::from_secs(3600);

    /// The time, a certificate for `name`, and the same as a client holds it.
    fn world(name: &str) -> (SystemTime, Arc<Svid>, HeldCertificate) {
        let (svid, _) = samples::svid(identity(name));
        let held = HeldCertificate::of(&svid);
        (SystemTime::now(), Arc::new(svid), held)
    }

    fn never() -> SystemTime {
        panic!("nothing is foreign")
    }

    #[test]
    fn a_new_client_wants_a_certificate_now_and_gets_the_current_one() {
        let (now, svid, _) = world("a");
        let holdings = Holdings::default();
        assert_eq!(demand(holdings.held(&svid.identity, || None, never, now).as_ref()), Demand::Now);
        let Choice { svid: chosen, withheld_until } = holdings.choose(Some(svid.clone()), None, now);
        assert!(Arc::ptr_eq(&chosen.unwrap(), &svid));
        assert_eq!(withheld_until, None);
        assert!(holdings.choose(Some(svid.clone()), None, svid.chain.validity.not_after + HOUR).svid.is_none(), "one that has ended");
    }

    #[test]
    fn what_the_client_reports_delays_the_order() {
        let (now, svid, held) = world("a");
        let held = Holdings::default().held(&svid.identity, || Some(held.clone()), never, now).unwrap();
        assert_eq!(demand(Some(&held)), Demand::Held { renew_at: svid.renew_at, not_after: svid.chain.validity.not_after });
    }

    #[test]
    fn a_new_identity_keeps_the_old_certificate_until_its_own_is_sent() {
        let (now, old, _) = world("a");
        let (_, new, _) = world("b");
        let due_at = now + HOUR;
        let mut holdings = Holdings::default();
        holdings.sent(Some(&old), &old.identity);
        holdings.identity_changes(&old.identity, None, now);
        let held = holdings.held(&new.identity, || panic!("it was sent"), || due_at, now).unwrap();
        assert_eq!((held.renew_at, held.not_after), (due_at.min(old.renew_at), old.chain.validity.not_after));
        assert!(Arc::ptr_eq(&holdings.choose(None, Some(&held), now).svid.unwrap(), &old));

        holdings.sent(Some(&new), &new.identity);
        assert_eq!(holdings.held(&new.identity, || None, never, now), None);
        assert!(holdings.choose(None, None, now).svid.is_none(), "the previous one is gone");
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
        assert_eq!(demand(holdings.held(&other, || None, || now + HOUR, now).as_ref()), Demand::Now, "it has none at all");

        let mut holdings = Holdings::default();
        holdings.sent(Some(&svid), &svid.identity);
        holdings.sent(Some(&newer), &svid.identity);
        holdings.rejected();
        holdings.identity_changes(&svid.identity, None, now);
        let kept = holdings.held(&other, || None, || now + HOUR, now).unwrap();
        assert_eq!(kept.version_prefix, version::prefix(svid.version()), "it keeps the one before");
        assert!(Arc::strong_count(&svid) == 1, "and the server keeps no key for that");
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
        assert!(holdings.choose(None, Some(&held), now).svid.is_none(), "the client has it, and the server has not");
        assert_eq!(holdings.held(&other.identity, || None, never, held.not_after), None, "it has ended");
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
        assert!(holdings.choose(Some(fresh(settled_at)), Some(&ends_soon), now).svid.is_some(), "there is no time to wait");
        assert!(holdings.choose(Some(svid), Some(&ends_soon), now).svid.is_some());
    }
}
