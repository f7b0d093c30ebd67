//! `identity` and `certificate`, at the top level and in a profile: names, key and lifetime of a certificate, and its renewal.

use std::time::Duration;

use serde_json::Value;
use workload_identity::KeyType;

use super::{Context, LIFETIMES};
use crate::config::{Attestation, error::FieldError, reader::Section, template, values};

/// Above this lifetime, the configuration warns.
const LONG_LIFETIME: Duration = Duration::from_secs(366 * 86_400);
/// A renewal later than this share of a certificate's lifetime leaves no time for retries.
const MAX_RENEW_AT: f64 = 0.95;

/// `identity`
#[derive(Debug, Clone)]
pub(super) struct Identity {
    /// `spiffeId`
    pub spiffe_id: String,
    /// `dnsNames`
    pub dns_names: Vec<String>,
}

impl Identity {
    /// The defaults.
    pub(super) fn of(attestation: Option<Attestation>) -> Self {
        let spiffe_id = attestation.map(template::default_spiffe_id).unwrap_or_default().to_owned();
        Self { spiffe_id, dns_names: Vec::new() }
    }
}

/// Reads `identity`; absent fields have the values of `base`.
pub(super) fn identity(section: &Section<'_>, context: &Context<'_>, base: Option<&Identity>) -> Option<Identity> {
    let known = context.attestation.zip(context.trust_domain);
    let base = base.cloned().unwrap_or_else(|| Identity::of(context.attestation));
    let spiffe_id = section.read("spiffeId", base.spiffe_id, |value| {
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
    let dns_names = if section.is_set("dnsNames") { dns_names } else { Some(base.dns_names) };
    Some(Identity { spiffe_id: spiffe_id?, dns_names: dns_names? })
}

/// `certificate`
#[derive(Debug, Clone, Copy)]
pub(super) struct Certificate {
    /// `lifetime`
    pub lifetime: Duration,
    /// `key`
    pub key: KeyType,
    /// `renewAt`
    pub renew_at: f64,
    /// `jitter`
    pub jitter: f64,
    /// `perPod`
    pub per_pod: bool,
}

impl Default for Certificate {
    fn default() -> Self {
        Self { lifetime: Duration::from_secs(86_400), key: KeyType::EcdsaP256, renew_at: 0.5, jitter: 0.1, per_pod: false }
    }
}

/// Reads `certificate`; absent fields have the values of `base`.
pub(super) fn certificate(section: &Section<'_>, context: &Context<'_>, base: Certificate) -> Option<Certificate> {
    let lifetime = section.read("lifetime", base.lifetime, values::duration(LIFETIMES));
    let key = section.read("key", base.key, key);
    let renew_at = section.read("renewAt", base.renew_at, values::fraction(0.1..=0.9));
    let jitter = section.read("jitter", base.jitter, values::fraction(0.0..=0.3));
    let per_pod = section.read("perPod", base.per_pod, values::boolean);

    if section.is_set("lifetime") && lifetime.is_some_and(|lifetime| lifetime > LONG_LIFETIME) {
        section.warn("lifetime", "is longer than a year, and a compromised key stays usable until the certificate expires; 24h is common");
    }
    if section.is_set("key") && key == Some(KeyType::EcdsaP384) {
        let message = "ecdsa-p384 works between Envoys only with tls_maximum_protocol_version: TLSv1_3 on the upstream; \
                       use ecdsa-p256 unless that is set everywhere";
        section.warn("key", message);
    }
    if let Some((renew_at, jitter)) = renew_at.zip(jitter)
        && renew_at * (1.0 + jitter) > MAX_RENEW_AT
    {
        let latest = renew_at * (1.0 + jitter);
        let (what, field) = if section.is_set("jitter") || !section.is_set("renewAt") {
            (format!("with renewAt {renew_at} puts a renewal as late as {latest:.2} of the lifetime"), "jitter")
        } else {
            (format!("with jitter {jitter} puts a renewal as late as {latest:.2} of the lifetime"), "renewAt")
        };
        section.wrong(field, what, format!("keep renewAt × (1 + jitter) at or below {MAX_RENEW_AT}"));
    }
    if per_pod == Some(true) && context.attestation == Some(Attestation::Unix) {
        section.wrong("perPod", "needs pods, which `attestation: unix` does not know", "set it to false");
    }
    Some(Certificate { lifetime: lifetime?, key: key?, renew_at: renew_at?, jitter: jitter?, per_pod: per_pod? })
}

fn key(value: &Value) -> Result<KeyType, FieldError> {
    let text = value.as_str().unwrap_or_default();
    KeyType::ALL.into_iter().find(|key| key.as_str() == text).ok_or_else(|| {
        let remedy = format!("use {}", values::one_of(&KeyType::ALL.map(KeyType::as_str)));
        match text {
            "ed25519" => FieldError::new("is not supported for SDS: Envoy refuses it", remedy),
            _ => FieldError::new("is not a key type", remedy),
        }
    })
}
