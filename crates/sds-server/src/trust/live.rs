//! The roots of a bundle that are served at a time.

use std::time::SystemTime;

use agent_runtime::{clock, text};
use envoy_x509::Certificate;
use rustls::pki_types::CertificateDer;

/// The roots to serve.
#[derive(Debug)]
pub(super) struct LiveRoots {
    /// The roots, in their order.
    pub(super) roots: Vec<CertificateDer<'static>>,
    /// The next time at which the selection has another result.
    pub(super) changes_at: Option<SystemTime>,
}

/// Returns the roots without those that have ended, and without those that begin later and have the name of a live one or of its issuer.
///
/// Envoy takes one of several roots with one name, in an order that depends on its release, and never tries another one. An ended root beside
/// its renewal therefore ends the trust in both (envoyproxy/envoy#38302). Envoy also continues a path from a live root to the issuer of that.
pub(super) fn select(certificates: &[CertificateDer<'static>], now: SystemTime) -> LiveRoots {
    let now = i64::try_from(clock::unix_seconds(now)).unwrap_or(i64::MAX);
    let parsed: Vec<_> = certificates.iter().filter_map(|der| Some((der, Certificate::from_der(der).ok()?))).collect();
    let begins = |root: &Certificate<'_>| root.not_before.seconds().unwrap_or(i64::MIN);
    let ends = |root: &Certificate<'_>| root.not_after.seconds().unwrap_or(i64::MAX);
    let is_live = |root: &Certificate<'_>| begins(root) <= now && now < ends(root);
    let any_is_live = parsed.iter().any(|(_, root)| is_live(root));
    let is_served = |root: &Certificate<'_>| {
        let waits = || parsed.iter().any(|(_, other)| is_live(other) && (other.subject == root.subject || other.issuer == root.subject));
        is_live(root) || any_is_live && now < begins(root) && !waits()
    };
    let roots = parsed.iter().filter(|(_, root)| is_served(root)).map(|(der, _)| (*der).clone()).collect();
    let times = parsed.iter().flat_map(|(_, root)| [begins(root), ends(root)]).filter(|at| now < *at && *at < i64::MAX);
    LiveRoots { roots, changes_at: times.min().map(clock::from_unix_seconds) }
}

/// Returns the name of two roots with different keys that clients cannot distinguish, because one of them has no key identifier. With a
/// certificate of one of these authorities, it depends on the client which root it takes.
pub(super) fn ambiguous(roots: &[CertificateDer<'static>]) -> Option<String> {
    let parsed: Vec<_> = roots.iter().filter_map(|der| Certificate::from_der(der).ok()).collect();
    let has_id = |root: &Certificate<'_>| root.extensions().is_ok_and(|own| own.key_id.is_some());
    let mut nameless = parsed.iter().filter(|root| !has_id(root));
    let root =
        nameless.find(|root| parsed.iter().any(|other| other.subject == root.subject && other.public_key.der != root.public_key.der))?;
    Some(text::excerpt(&root.subject.to_string(), text::MAX_NAME_CHARS))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    fn root(name: &str, key: &KeyPair, from: SystemTime, until: SystemTime) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        (params.not_before, params.not_after) = (from.into(), until.into());
        params.self_signed(key).unwrap().der().clone()
    }

    #[test]
    fn roots_of_one_name_without_key_identifiers_are_ambiguous() {
        let (now, hour) = (clock::from_unix_seconds(1_800_000_000), Duration::from_secs(3600));
        let with_id = |name: &str| {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
        };
        let key = KeyPair::generate().unwrap();
        let without = |key: &KeyPair| root("a", key, now, now + hour);
        assert_eq!(ambiguous(&[with_id("a"), with_id("a"), with_id("b")]), None);
        assert_eq!(ambiguous(&[without(&key), root("a", &key, now, now + 2 * hour)]), None, "a renewal with the same key");
        for pair in [[without(&key), without(&KeyPair::generate().unwrap())], [with_id("a"), without(&key)]] {
            assert_eq!(ambiguous(&pair).as_deref(), Some("CN=a"));
        }
    }

    #[test]
    fn ended_roots_and_renewals_that_have_not_begun_are_left_out() {
        let (now, hour) = (clock::from_unix_seconds(1_800_000_000), Duration::from_secs(3600));
        let key = KeyPair::generate().unwrap();
        let ended = root("a", &key, now - 2 * hour, now - hour);
        let live = root("a", &key, now - hour, now + 2 * hour);
        let next = root("a", &key, now + hour, now + 5 * hour);
        let other = root("b", &key, now + hour, now + 5 * hour);
        let all = [ended.clone(), next.clone(), live.clone(), other.clone()];
        let at = |time| {
            let selected = select(&all, time);
            (selected.roots, selected.changes_at)
        };
        assert_eq!(at(now), (vec![live.clone(), other.clone()], Some(now + hour)));
        assert_eq!(at(now + hour), (vec![next.clone(), live.clone(), other.clone()], Some(now + 2 * hour)));
        assert_eq!(at(now + 2 * hour), (vec![next, other.clone()], Some(now + 5 * hour)), "the end is no longer part of the validity");
        assert_eq!(at(now + 5 * hour), (vec![], None));
        assert_eq!(at(now - 2 * hour).0, [ended, other], "the others have its name");
    }
}
