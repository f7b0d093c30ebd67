//! The version that a reconnecting client reports for its certificate. The certificate may be from before a restart of the server.
//!
//! A reported version is a scheduling hint and authorises nothing. It is used only if every part is plausible and its authority is current;
//! otherwise the certificate is issued at once.

use std::time::{Duration, SystemTime};

use agent_runtime::clock;
use workload_identity::{
    Identity, Profile,
    version::{self, Authority, Digest, Version},
};

use crate::material::{self, TrustBundle};

/// The latest plausible end of a certificate is twice the requested lifetime plus this time: 1 h.
const LIFETIME_SLACK: Duration = Duration::from_secs(3600);

/// Previous epochs of a profile that are recognised.
const MAX_PREVIOUS_EPOCHS: u64 = 16;

/// The authority that issued a reported certificate, compared with the current profile, trust domain and bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provenance {
    /// The current profile and trust domain, and a root of the bundle. The root is not compared while there is no bundle.
    Current,
    /// The current profile, apart from its epoch, which was lower. The certificate is valid and has to be replaced.
    PreviousEpoch,
    /// Another trust domain; otherwise like one of the above. The certificate is valid and has to be replaced.
    OtherTrustDomain,
    /// Any other profile or root.
    Unknown,
}

/// The version of a certificate, with its times; see [`material::Svid::version`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientVersion {
    /// The planned renewal of the certificate.
    pub renew_at: SystemTime,
    /// The end of the certificate.
    pub not_after: SystemTime,
    version: Version,
}

impl ClientVersion {
    /// Parses `version`. Returns `None` unless it is well-formed and plausible for `identity` at `now`.
    pub fn read(version: &str, identity: &Identity, now: SystemTime) -> Option<Self> {
        let version: Version = version.parse().ok()?;
        let [not_after, renew_at] = [version.not_after, version.renew_at].map(|seconds| clock::from_unix_seconds(seconds.cast_signed()));
        let latest = now + identity.profile.lifetime * 2 + LIFETIME_SLACK;
        let plausible = now < not_after && renew_at < not_after && not_after <= latest;
        plausible.then_some(Self { renew_at, not_after, version })
    }

    /// Compares the authority of the version with `identity` and the roots of `bundle`. A certificate whose intermediate was replaced is
    /// current: it leads to a root of the bundle.
    pub fn provenance(&self, identity: &Identity, bundle: Option<&TrustBundle>) -> Provenance {
        match &self.version.authority {
            Authority::Path { levels, .. } if !leads_to(levels, bundle) => Provenance::Unknown,
            Authority::Path { trust_domain, profile, .. } => {
                match by_epoch(identity, |candidate| Digest::first_bytes(&candidate.fingerprint()) == *profile) {
                    Provenance::Unknown => Provenance::Unknown,
                    _ if *trust_domain != version::trust_domain(identity) => Provenance::OtherTrustDomain,
                    provenance => provenance,
                }
            }
            // Its digest shows nothing without a root.
            Authority::Former(_) if bundle.is_none() => Provenance::Current,
            Authority::Former(digest) => {
                let digest = digest.to_string();
                by_epoch(identity, |profile| material::is_current_authority(&digest, &profile.fingerprint(), bundle))
            }
        }
    }

    /// The first three parts of the version, for responses that leave the certificate with the client.
    pub fn version_prefix(&self) -> String {
        self.version.prefix()
    }
}

/// Whether an authority of the path is a root of `bundle`. The certificates below it are in the chain of the client.
fn leads_to(path: &[Digest], bundle: Option<&TrustBundle>) -> bool {
    bundle.is_none_or(|bundle| path.iter().any(|level| bundle.has_authority(*level)))
}

/// Compares with the profile of `identity`, and with its previous epochs.
fn by_epoch(identity: &Identity, is_of: impl Fn(&Profile) -> bool) -> Provenance {
    let profile = &identity.profile;
    if is_of(profile) {
        return Provenance::Current;
    }
    let previous = profile.epoch.saturating_sub(MAX_PREVIOUS_EPOCHS)..profile.epoch;
    if previous.rev().any(|epoch| is_of(&Profile { epoch, ..(**profile).clone() })) {
        Provenance::PreviousEpoch
    } else {
        Provenance::Unknown
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use workload_identity::{
        Resolver, TrustDomain,
        samples::{identity, pod},
    };

    use super::*;

    const NOW: i64 = 1_700_000_000;

    #[test]
    fn only_a_plausible_version_is_believed() {
        let id = identity("a");
        let now = clock::from_unix_seconds(NOW);
        let read = |version: &str| ClientVersion::read(version, &id, now);
        let tail = "0123456789abcdef-fedcba9876543210";

        let path = "v2.0123456789abcdef.0123456789abcdef.0123456789abcdef";
        assert_eq!(
            read(&format!("{}-{}-{path}-fedcba9876543210", NOW + 3600, NOW + 1800)).unwrap().version_prefix(),
            format!("{}-{}-{path}", NOW + 3600, NOW + 1800)
        );
        let good = read(&format!("{}-{}-{tail}", NOW + 3600, NOW + 1800)).unwrap();
        assert_eq!(good.renew_at, clock::from_unix_seconds(NOW + 1800));
        assert_eq!(good.version_prefix(), format!("{}-{}-0123456789abcdef", NOW + 3600, NOW + 1800));
        assert!(read(&format!("{}-{}-{tail}", NOW + 60, NOW - 60)).is_some(), "the renewal is overdue, and the certificate is valid");

        for bad in [
            String::new(),
            "v1".into(),
            tail.into(),
            format!("{}-{}-{tail}", NOW - 1, NOW - 60),
            format!("{}-{}-{tail}", NOW, NOW - 60),
            format!("{}-{}-{tail}", NOW + 3600, NOW + 3600),
            format!("{}-{}-{tail}", NOW + 3600, NOW + 7200),
            format!("{}-{}-{tail}", NOW + 4 * 3600, NOW + 1800),
            format!("{}-{}-{tail}", "99999999999999999999", NOW + 1800),
            format!("+{}-{}-{tail}", NOW + 3600, NOW + 1800),
            format!("{}-{}-{tail}-x", NOW + 3600, NOW + 1800),
            format!("{}-{}-0123456789ABCDEF-fedcba9876543210", NOW + 3600, NOW + 1800),
            format!("{}-{}-0123-fedcba9876543210", NOW + 3600, NOW + 1800),
            format!("{}-{}-{path}-fedcba9876543210", NOW - 1, NOW - 60),
            format!("{}-{}-{path}-fedcba9876543210", NOW + 4 * 3600, NOW + 1800),
            format!("{}--{tail}", NOW + 3600),
        ] {
            assert_eq!(read(&bad), None, "{bad}");
        }
    }

    /// A bundle with one root of this name.
    fn bundle(name: &str) -> TrustBundle {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        TrustBundle::from_certificates(vec![params.self_signed(&key).unwrap().der().clone()]).unwrap()
    }

    fn both(one: &TrustBundle, other: &TrustBundle) -> TrustBundle {
        TrustBundle::from_certificates([one.roots(), other.roots()].concat()).unwrap()
    }

    fn held(authority: impl std::fmt::Display, id: &Identity) -> ClientVersion {
        let version = format!("{}-{}-{authority}-fedcba9876543210", NOW + 3600, NOW + 1800);
        ClientVersion::read(&version, id, clock::from_unix_seconds(NOW)).unwrap()
    }

    /// A certificate for `id` whose path has these authorities.
    fn of_path(id: &Identity, path: &[&TrustBundle]) -> ClientVersion {
        let path: Vec<_> = path.iter().map(|bundle| material::authority_of_certificate(&bundle.roots()[0]).unwrap()).collect();
        held(Authority::new(id, &path), id)
    }

    /// A certificate for `id` from `root`, as a former release reports it.
    fn of_former(id: &Identity, root: &TrustBundle) -> ClientVersion {
        held(material::authority_digest(&id.profile.fingerprint(), Some(&root.roots()[0])), id)
    }

    #[test]
    fn a_version_of_either_format_shows_profile_epoch_and_root() {
        let id = identity("a");
        let (ours, theirs) = (bundle("ours"), bundle("theirs"));
        for held in [of_path(&id, &[&ours]), of_former(&id, &ours)] {
            assert_eq!(held.provenance(&id, Some(&ours)), Provenance::Current);
            assert_eq!(held.provenance(&id, Some(&both(&theirs, &ours))), Provenance::Current);
            assert_eq!(held.provenance(&id, Some(&theirs)), Provenance::Unknown);
            assert_eq!(held.provenance(&id, None), Provenance::Current, "there is no bundle to compare with");

            let raised = |by: u64| Identity { profile: Arc::new(Profile { epoch: by, ..(*id.profile).clone() }), ..(*id).clone() };
            for (by, expected) in [
                (1, Provenance::PreviousEpoch),
                (MAX_PREVIOUS_EPOCHS, Provenance::PreviousEpoch),
                (MAX_PREVIOUS_EPOCHS + 1, Provenance::Unknown),
            ] {
                assert_eq!(held.provenance(&raised(by), Some(&ours)), expected, "{by}");
                assert_eq!(held.provenance(&raised(by), Some(&theirs)), Provenance::Unknown, "{by}");
            }
            let other = Identity { profile: Arc::new(Profile { epoch: 1, per_pod: true, ..(*id.profile).clone() }), ..(*id).clone() };
            assert_eq!(held.provenance(&other, Some(&ours)), Provenance::Unknown);
        }
    }

    #[test]
    fn another_trust_domain_is_foreign_except_in_a_former_version() {
        let (id, ours, theirs) = (identity("a"), bundle("ours"), bundle("theirs"));
        let resolver = Resolver::single(TrustDomain::new("other.example").unwrap(), id.profile.clone());
        let other = resolver.resolve(&pod(Some("a"), "u1")).unwrap();
        let held = of_path(&id, &[&ours]);
        for bundle in [Some(&ours), None] {
            assert_eq!(held.provenance(&other, bundle), Provenance::OtherTrustDomain);
        }
        let raised = Identity { profile: Arc::new(Profile { epoch: 1, ..(*id.profile).clone() }), ..other.clone() };
        assert_eq!(held.provenance(&raised, Some(&ours)), Provenance::OtherTrustDomain);
        assert_eq!(held.provenance(&other, Some(&theirs)), Provenance::Unknown);
        // Its digest has the template of the SPIFFE ID, and not the trust domain.
        assert_eq!(of_former(&id, &ours).provenance(&other, Some(&ours)), Provenance::Current);
    }

    #[test]
    fn a_replaced_intermediate_leaves_its_certificates_current() {
        let id = identity("a");
        let [root, intermediate, next, stranger] = ["root", "intermediate", "next", "stranger"].map(bundle);
        let held = of_path(&id, &[&intermediate, &root]);
        for current in [&both(&intermediate, &root), &both(&next, &root), &root, &intermediate] {
            assert_eq!(held.provenance(&id, Some(current)), Provenance::Current);
        }
        for foreign in [&both(&next, &stranger), &stranger] {
            assert_eq!(held.provenance(&id, Some(foreign)), Provenance::Unknown);
        }
        assert_eq!(of_path(&id, &[]).provenance(&id, Some(&root)), Provenance::Unknown, "a path that is not known");
    }
}
