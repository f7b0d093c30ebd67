//! The sections about certificates and issuers: `identity`, `certificate`, `issuer`, `profiles`, `authorityEpoch`.
//!
//! Owns their rules: templates fit the attestation, a certificate is renewed before it expires, an issuer is named completely, a profile
//! can be reached. A profile inherits the fields that it does not set from the top-level sections of the same name.

use std::{collections::BTreeMap, ops::RangeInclusive, sync::Arc, time::Duration};

use workload_identity::{IssuerName, Profile, Rule, TrustDomain};

use super::{Attestation, IssuerConfig, certificate_request, environment::PodEnvironment, reader::Section, values};

mod certificate;
mod issuer;
mod profiles;

use certificate::{Certificate, Identity};
use profiles::UnresolvedProfile;

/// The name of the default profile and of its issuer.
pub(super) const DEFAULT: &str = "default";
/// Below the minimum, an agent would renew continuously. The maximum keeps every sum of times in range.
pub(super) const LIFETIMES: RangeInclusive<Duration> = Duration::from_secs(10)..=Duration::from_secs(3650 * 86_400);
/// Below this lifetime, the configuration warns about the load of renewals.
const SHORT_LIFETIME: Duration = Duration::from_secs(3600);

/// The values that the sections are checked against; `None` for a value that is invalid itself.
pub(super) struct Context<'a> {
    /// How callers are identified.
    pub attestation: Option<Attestation>,
    /// The agent's trust domain.
    pub trust_domain: Option<&'a TrustDomain>,
    /// The environment of the pod.
    pub pod: Option<&'a PodEnvironment>,
}

/// The decoded profiles and issuers.
#[derive(Debug)]
pub(super) struct Issuance {
    /// The profile of workloads that no rule matches.
    pub default_profile: Arc<Profile>,
    /// `profiles`
    pub rules: Vec<Rule>,
    /// Each issuer once, under the name of the first profile that uses it. The issuer of the default profile is `default`.
    pub issuers: BTreeMap<IssuerName, IssuerConfig>,
}

/// Decodes the sections.
pub(super) fn decode(root: &Section<'_>, context: &Context<'_>) -> Option<Issuance> {
    let identity = root.section("identity", |section| certificate::identity(section, context, None));
    let certificate = root.section("certificate", |section| certificate::certificate(section, context, Certificate::default()));
    let issuer = issuer::issuer(root, context);
    // An invalid default has been reported already; the profiles are checked all the same.
    let base = profiles::Base {
        identity: identity.clone().unwrap_or_else(|| Identity::of(context.attestation)),
        certificate: certificate.unwrap_or_default(),
        issuer: issuer.as_ref(),
    };
    let drafts = profiles::decode(root, context, &base);
    let epoch = root.read("authorityEpoch", 0, values::integer(0..=u64::MAX));

    let (identity, certificate, issuer) = (identity?, certificate?, issuer?);
    warn_of_load(root, &certificate, &issuer);
    Some(joined(UnresolvedProfile::default_of(identity, certificate, issuer), drafts?, epoch?))
}

/// Names each distinct issuer and turns drafts into profiles. A profile's epoch is the sum of the global epoch and its own.
fn joined(default: UnresolvedProfile, drafts: Vec<UnresolvedProfile>, epoch: u64) -> Issuance {
    let mut issuers: BTreeMap<IssuerName, IssuerConfig> = BTreeMap::new();
    let mut rule = |draft: UnresolvedProfile| {
        let known = issuers.iter().find(|(_, issuer)| **issuer == draft.issuer).map(|(name, _)| name.clone());
        let name = known.unwrap_or_else(|| IssuerName(draft.name.as_str().into()));
        let authority = issuer::authority(&draft.issuer).into();
        issuers.entry(name.clone()).or_insert(draft.issuer);
        let profile = Profile {
            name: draft.name.into(),
            issuer: name,
            authority,
            key: draft.certificate.key,
            lifetime: draft.certificate.lifetime,
            renew_at: draft.certificate.renew_at,
            jitter: draft.certificate.jitter,
            spiffe_id: draft.identity.spiffe_id.into(),
            dns_names: draft.identity.dns_names.into_iter().map(Into::into).collect(),
            per_pod: draft.certificate.per_pod,
            epoch: epoch.wrapping_add(draft.epoch),
        };
        Rule { matches: draft.matches, profile: Arc::new(profile), selectable: draft.selectable }
    };
    let default_profile = rule(default).profile;
    let rules = drafts.into_iter().map(rule).collect();
    Issuance { default_profile, rules, issuers }
}

fn warn_of_load(section: &Section<'_>, certificate: &Certificate, issuer: &IssuerConfig) {
    if let (IssuerConfig::CertManager(_), true) = (issuer, certificate.lifetime < SHORT_LIFETIME) {
        let rate = renewals_per_second(certificate.lifetime, certificate.renew_at, 1000);
        let lifetime = humantime::format_duration(certificate.lifetime);
        let load = format!("{lifetime} means {rate:.1} requests per second for each 1,000 identities of the cluster");
        section
            .warn("certificate.lifetime", format!("{load}; check that cert-manager and its issuer can sign this many, or use 1h or more"));
    }
}

/// Renewals per second of `identities`, on average.
pub fn renewals_per_second(lifetime: Duration, renew_at: f64, identities: u32) -> f64 {
    f64::from(identities) / (lifetime.as_secs_f64() * renew_at)
}

/// Whether the issuer provides no roots.
pub(super) fn tells_no_roots(issuer: &IssuerConfig) -> bool {
    matches!(issuer, IssuerConfig::CertManager(certificate_request::Settings { trust_status_ca: false, .. }))
}
