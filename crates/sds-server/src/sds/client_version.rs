//! The version that a reconnecting client reports for its certificate. The certificate may be from before a restart of the server.
//!
//! A reported version is a scheduling hint and authorises nothing. It is used only if every part is plausible and its authority is current;
//! otherwise the certificate is issued at once.

use std::time::{Duration, SystemTime};

use agent_runtime::clock;
use workload_identity::{Identity, Profile, version::Version};

use crate::material::{self, TrustBundle};

/// The latest plausible end of a certificate is twice the requested lifetime plus this time: 1 h.
const LIFETIME_SLACK: Duration = Duration::from_secs(3600);

/// Previous epochs of a profile that are recognised.
const MAX_PREVIOUS_EPOCHS: u64 = 16;

/// The authority that issued a reported certificate, compared with the current profile and bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provenance {
    /// The current profile and a root of the bundle. Also returned while there is no bundle to compare with.
    Current,
    /// The current profile, apart from its epoch, which was lower. The certificate is valid and has to be replaced.
    PreviousEpoch,
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

    /// Compares the authority of the version with the profile of `identity` and the roots of `bundle`.
    pub fn provenance(&self, identity: &Identity, bundle: Option<&TrustBundle>) -> Provenance {
        let is_of = |profile: &Profile| material::is_current_authority(&self.version.authority, &profile.fingerprint(), bundle);
        let profile = &identity.profile;
        if bundle.is_none() || is_of(profile) {
            return Provenance::Current;
        }
        let former = profile.epoch.saturating_sub(MAX_PREVIOUS_EPOCHS)..profile.epoch;
        if former.rev().any(|epoch| is_of(&Profile { epoch, ..(**profile).clone() })) {
            Provenance::PreviousEpoch
        } else {
            Provenance::Unknown
        }
    }

    /// The first three parts of the version, for responses that leave the certificate with the client.
    pub fn version_prefix(&self) -> String {
        self.version.prefix()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use workload_identity::samples::identity;

    use super::*;

    const NOW: i64 = 1_700_000_000;

    #[test]
    fn only_a_plausible_version_is_believed() {
        let id = identity("a");
        let now = clock::from_unix_seconds(NOW);
        let read = |version: &str| ClientVersion::read(version, &id, now);
        let tail = "0123456789abcdef-fedcba9876543210";

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
            format!("{}--{tail}", NOW + 3600),
        ] {
            assert_eq!(read(&bad), None, "{bad}");
        }
    }

    #[test]
    fn another_authority_is_not_current_once_there_is_a_bundle() {
        let id = identity("a");
        let now = clock::from_unix_seconds(NOW);
        let bundle = |name: &str| {
            let key = rcgen::KeyPair::generate().unwrap();
            let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            TrustBundle::from_certificates(vec![params.self_signed(&key).unwrap().der().clone()]).unwrap()
        };
        let (ours, theirs) = (bundle("ours"), bundle("theirs"));
        let authority = material::authority_digest(&id.profile.fingerprint(), Some(&ours.roots()[0]));
        let held = ClientVersion::read(&format!("{}-{}-{authority}-fedcba9876543210", NOW + 3600, NOW + 1800), &id, now).unwrap();
        assert_eq!(held.provenance(&id, Some(&ours)), Provenance::Current);
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
