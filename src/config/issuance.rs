//! The sections that say what is issued and by whom: `identity`, `certificate`, `issuer`, `profiles`, `authorityEpoch`.
//!
//! Owns their rules: templates fit the attestation, a certificate is renewed before it expires, an issuer is named completely.

use std::{collections::BTreeMap, ops::RangeInclusive, sync::Arc, time::Duration};

use serde_json::Value;

use super::{
    Attestation, CertManager, IssuerConfig, IssuerRef, RequestNamespace,
    environment::{PodEnvironment, snippet},
    error::Wrong,
    reader::Section,
    template, values,
};
use crate::identity::{IssuerName, KeyType, Profile, TrustDomain};

/// The group of cert-manager's own issuers.
const CERT_MANAGER: &str = "cert-manager.io";
/// Shorter lives are spent on renewing; longer ones are beyond use, and the bound keeps every sum of times in range.
pub const LIFETIMES: RangeInclusive<Duration> = Duration::from_secs(10)..=Duration::from_secs(3650 * 86_400);
/// From here on somebody should ask whether this is meant.
const LONG_LIFETIME: Duration = Duration::from_secs(366 * 86_400);
/// Below this a cluster's renewals are a load worth a thought.
const SHORT_LIFETIME: Duration = Duration::from_secs(3600);
/// A renewal later than this share of a certificate's life leaves no time to try again.
const LATEST_RENEWAL: f64 = 0.95;

/// What the sections are checked against; `None` where it is wrong itself.
pub struct Context<'a> {
    /// How callers are known.
    pub attestation: Option<Attestation>,
    /// The agent's trust domain.
    pub trust_domain: Option<&'a TrustDomain>,
    /// What the environment tells.
    pub pod: Option<&'a PodEnvironment>,
}

/// The default profile, and the issuers by name.
pub type Issuance = (Arc<Profile>, BTreeMap<IssuerName, IssuerConfig>);

/// Walks the sections.
pub fn walk(root: &Section<'_>, context: &Context<'_>) -> Option<Issuance> {
    let identity = root.section("identity", |section| identity(section, context));
    let certificate = root.section("certificate", |section| certificate(section, context));
    let issuer = issuer(root, context);
    let profiles = root.read("profiles", (), |value| match value {
        Value::Array(list) if list.is_empty() => Ok(()),
        _ => Err(Wrong::new("is more than this version does: it has one profile", "remove it, and run an agent for each issuer")),
    });
    let epoch = root.read("authorityEpoch", 0, values::integer(0..=u64::MAX));

    let (identity, certificate, issuer) = (identity?, certificate?, issuer?);
    if let (IssuerConfig::CertManager(_), true) = (&issuer, certificate.lifetime < SHORT_LIFETIME) {
        let rate = renewals_per_second(certificate.lifetime, certificate.renew_at, 1000);
        let lifetime = humantime::format_duration(certificate.lifetime);
        let load = format!("{lifetime} means {rate:.1} requests per second for each 1,000 identities of the cluster");
        root.warn("certificate.lifetime", format!("{load}; see that cert-manager and its issuer keep up, or use 1h or more"));
    }
    profiles?;
    let name = IssuerName("default".into());
    let profile = Profile {
        name: "default".into(),
        issuer: name.clone(),
        key: certificate.key,
        lifetime: certificate.lifetime,
        renew_at: certificate.renew_at,
        jitter: certificate.jitter,
        spiffe_id: identity.spiffe_id.into(),
        dns_names: identity.dns_names.into_iter().map(Into::into).collect(),
        per_pod: certificate.per_pod,
        epoch: epoch?,
    };
    Some((Arc::new(profile), BTreeMap::from([(name, issuer)])))
}

/// Renewals per second of `identities` in the long run.
pub fn renewals_per_second(lifetime: Duration, renew_at: f64, identities: u32) -> f64 {
    f64::from(identities) / (lifetime.as_secs_f64() * renew_at)
}

struct Identity {
    spiffe_id: String,
    dns_names: Vec<String>,
}

fn identity(section: &Section<'_>, context: &Context<'_>) -> Option<Identity> {
    let known = context.attestation.zip(context.trust_domain);
    let default = context.attestation.map(template::default_spiffe_id).unwrap_or_default().to_owned();
    let spiffe_id = section.read("spiffeId", default, |value| {
        let text = values::text(value)?;
        if let Some((attestation, domain)) = known {
            template::spiffe_id(text, attestation, domain)?;
            if !template::distinguishes(text, attestation) {
                section.warn("spiffeId", format!("{text:?} gives different workloads the same identity, and so the same key"));
            }
        }
        Ok(text.to_owned())
    });
    let dns_names = section.list("dnsNames", |value| {
        let text = values::text(value)?;
        if let Some((attestation, domain)) = known {
            template::dns_name(text, attestation, domain)?;
        }
        Ok(text.to_owned())
    });
    Some(Identity { spiffe_id: spiffe_id?, dns_names: dns_names? })
}

struct Certificate {
    lifetime: Duration,
    key: KeyType,
    renew_at: f64,
    jitter: f64,
    per_pod: bool,
}

fn certificate(section: &Section<'_>, context: &Context<'_>) -> Option<Certificate> {
    let day = Duration::from_secs(86_400);
    let lifetime = section.read("lifetime", day, values::duration(LIFETIMES));
    let key = section.read("key", KeyType::EcdsaP256, key);
    let renew_at = section.read("renewAt", 0.5, values::fraction(0.1..=0.9));
    let jitter = section.read("jitter", 0.1, values::fraction(0.0..=0.3));
    let per_pod = section.read("perPod", false, values::boolean);

    if lifetime.is_some_and(|lifetime| lifetime > LONG_LIFETIME) {
        section.warn("lifetime", "is longer than a year, and nothing but its end takes a stolen key out of use; 24h is common");
    }
    if key == Some(KeyType::EcdsaP384) {
        let message = "ecdsa-p384 works between Envoys only with tls_maximum_protocol_version: TLSv1_3 on the upstream; \
                       use ecdsa-p256 unless that is set everywhere";
        section.warn("key", message);
    }
    if let Some((renew_at, jitter)) = renew_at.zip(jitter)
        && renew_at * (1.0 + jitter) > LATEST_RENEWAL
    {
        let latest = renew_at * (1.0 + jitter);
        let what = format!("with renewAt {renew_at} puts a renewal as late as {latest:.2} of the lifetime");
        section.wrong("jitter", what, format!("keep renewAt × (1 + jitter) at or below {LATEST_RENEWAL}"));
    }
    if per_pod == Some(true) && context.attestation == Some(Attestation::Unix) {
        section.wrong("perPod", "needs pods, which `attestation: unix` does not know", "set it to false");
    }
    Some(Certificate { lifetime: lifetime?, key: key?, renew_at: renew_at?, jitter: jitter?, per_pod: per_pod? })
}

fn key(value: &Value) -> Result<KeyType, Wrong> {
    let text = value.as_str().unwrap_or_default();
    KeyType::ALL.into_iter().find(|key| key.as_str() == text).ok_or_else(|| {
        let remedy = format!("use {}", values::one_of(&KeyType::ALL.map(KeyType::as_str)));
        match text {
            "ed25519" => Wrong::new("is not supported for SDS: Envoy refuses it", remedy),
            _ => Wrong::new("is not a key type", remedy),
        }
    })
}

fn issuer(root: &Section<'_>, context: &Context<'_>) -> Option<IssuerConfig> {
    let example = "write, for example, `issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }`";
    let present = root.has("issuer");
    root.section("issuer", |issuer| {
        // `embedded:` with nothing after it is as good as `embedded: {}`.
        let embedded = issuer.has("embedded").then(|| issuer.section("embedded", |_| ()));
        let cert_manager = issuer.has("certManager").then(|| issuer.section("certManager", |section| cert_manager(section, context)));
        match (cert_manager, embedded) {
            (Some(cert_manager), None) => cert_manager.map(IssuerConfig::CertManager),
            (None, Some(())) => {
                let message = "is an authority in this process's memory, for development and tests only: no other node trusts it, \
                               and a restart replaces it; use issuer.certManager";
                issuer.warn("embedded", message);
                Some(IssuerConfig::Embedded)
            }
            (Some(_), Some(())) => {
                issuer.wrong_here("names both certManager and embedded", "keep one of them");
                None
            }
            (None, None) => {
                let what = if present { "names no certificate authority" } else { "is missing: it says who signs the certificates" };
                issuer.wrong_here(what, example);
                None
            }
        }
    })
}

fn cert_manager(section: &Section<'_>, context: &Context<'_>) -> Option<CertManager> {
    let issuer_ref = section.section("issuerRef", issuer_ref);
    let agents_own = context.pod.and_then(|pod| pod.namespace.clone()).unwrap_or_else(|| "sds-agent".to_owned());
    let namespace = section.read("namespace", RequestNamespace::Fixed(agents_own), |value| match value.as_str() {
        Some("workload") => Ok(RequestNamespace::Workload),
        _ => values::namespace(value).map(RequestNamespace::Fixed),
    });
    let trust_status_ca = section.read("trustStatusCA", false, values::boolean);

    if namespace == Some(RequestNamespace::Workload) {
        if context.attestation == Some(Attestation::Unix) {
            section.wrong("namespace", "needs pods, which `attestation: unix` does not know", "name one namespace");
            return None;
        }
        if let Some(issuer_ref) = issuer_ref.as_ref().filter(|issuer| issuer.kind == "Issuer") {
            let message = format!("workload: every workload's namespace needs an Issuer {:?} of its own", issuer_ref.name);
            section.warn("namespace", message);
        }
    }
    if context.attestation == Some(Attestation::Kubernetes) && context.pod.is_some_and(|pod| pod.node.pod.is_none()) {
        let message = format!(
            "is not set with POD_NAMESPACE and POD_UID: requests are not owned by the agent's pod, and stay behind when it is deleted; \
             add to the container {} and the like for metadata.namespace and metadata.uid",
            snippet("POD_NAME", "metadata.name")
        );
        section.warn_outside("POD_NAME", message);
    }
    Some(CertManager { issuer_ref: issuer_ref?, namespace: namespace?, trust_status_ca: trust_status_ca? })
}

fn issuer_ref(section: &Section<'_>) -> Option<IssuerRef> {
    let name = section.require("name", || Wrong::new("is missing", "name the Issuer or ClusterIssuer that signs"), values::object_name);
    let group = section.read("group", CERT_MANAGER.to_owned(), values::object_name);
    let own_group = group.as_deref() == Some(CERT_MANAGER);
    let absent = || {
        let what = "is missing, and without it cert-manager looks for an Issuer in the namespace of the request, never for a ClusterIssuer";
        Wrong::new(what, "write kind: ClusterIssuer for one that serves the whole cluster, or kind: Issuer")
    };
    let kind = section.require("kind", absent, |value| {
        let kind = values::text(value)?;
        if own_group && !matches!(kind, "Issuer" | "ClusterIssuer") {
            let remedy = "use ClusterIssuer or Issuer, or set issuerRef.group to the group of an external issuer";
            return Err(Wrong::new(format!("is not a kind of {CERT_MANAGER}"), remedy));
        }
        Ok(kind.to_owned())
    });
    Some(IssuerRef { name: name?, kind: kind?, group: group? })
}

/// Whether the issuer brings no roots of its own.
pub fn tells_no_roots(issuer: &IssuerConfig) -> bool {
    matches!(issuer, IssuerConfig::CertManager(CertManager { trust_status_ca: false, .. }))
}
