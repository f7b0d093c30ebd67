//! Renders a resource as a block of text, as one line, as JSON in its stable form, or as PEM. The output never contains the key.

use std::{
    fmt::Write,
    time::{Duration, SystemTime},
};

use agent_runtime::clock::{from_unix_seconds, rfc3339};
use sds_server::{
    material::{CertificateChain, TrustBundle},
    trust::crl::RevocationList,
};
use serde::Serialize;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::resource::{Material, Resource};
use crate::cli::output::printable;

/// The stable form: every resource has the same keys in the same order, except the last keys, which depend on the kind.
#[derive(Serialize)]
struct Object<'a> {
    name: &'a str,
    kind: &'static str,
    version: &'a str,
    spiffe_id: Option<&'a str>,
    dns_names: &'a [String],
    serial: Option<&'a str>,
    fingerprint_sha256: Option<&'a str>,
    not_before: Option<String>,
    /// For a bundle, the earliest expiry of its roots.
    not_after: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    chain_pem: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trusted_ca_pem: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    crl_pem: Option<String>,
}

/// One object on one line.
pub(super) fn json(resource: &Resource) -> String {
    let (name, version) = (resource.name.as_str(), resource.version.as_str());
    let object = match &resource.material {
        Material::Certificate { chain, .. } => Object {
            name,
            kind: "certificate",
            version,
            spiffe_id: spiffe_id(chain),
            dns_names: &chain.dns_names,
            serial: Some(&chain.serial),
            fingerprint_sha256: Some(&chain.fingerprint),
            not_before: Some(rfc3339(chain.validity.not_before)),
            not_after: rfc3339(chain.validity.not_after),
            chain_pem: Some(text(chain.to_pem())),
            trusted_ca_pem: None,
            crl_pem: None,
        },
        Material::Bundle(bundle) => Object {
            name,
            kind: "bundle",
            version,
            spiffe_id: None,
            dns_names: &[],
            serial: None,
            fingerprint_sha256: None,
            not_before: None,
            not_after: rfc3339(bundle.roots.earliest_expiry),
            chain_pem: None,
            trusted_ca_pem: Some(text(bundle.roots.to_pem())),
            crl_pem: bundle.crls_pem().map(text),
        },
    };
    // Serialisation does not fail, because the object contains only strings and lists.
    let mut line = serde_json::to_string(&object).unwrap_or_default();
    line.push('\n');
    line
}

/// The certificates.
pub(super) fn pem(resource: &Resource) -> String {
    match &resource.material {
        Material::Certificate { chain, .. } => text(chain.to_pem()),
        Material::Bundle(bundle) => text(bundle.roots.to_pem()),
    }
}

/// The resource as a block of text.
pub(super) fn block(resource: &Resource, now: SystemTime) -> String {
    let mut fields: Vec<(&str, String)> = Vec::new();
    let kind = match &resource.material {
        Material::Certificate { chain, .. } => {
            fields.push(("SPIFFE ID", printable(spiffe_id(chain).unwrap_or("(none)"))));
            if !chain.dns_names.is_empty() {
                fields.push(("DNS names", printable(&chain.dns_names.join(", "))));
            }
            let validity = chain.validity;
            let (from, to) = (rfc3339(validity.not_before), rfc3339(validity.not_after));
            fields.push(("serial", chain.serial.clone()));
            fields.push(("valid", format!("{from} to {to} ({})", expiry(validity.not_after, now))));
            fields.push(("fingerprint", format!("sha256 {}", chain.fingerprint)));
            fields.push(("chain", count(chain.certificates().len(), "certificate")));
            "certificate"
        }
        Material::Bundle(bundle) => {
            fields.extend(roots(&bundle.roots).map(|root| ("root", root.in_words(now))));
            fields.extend(bundle.crls().iter().map(|list| ("revoked", in_words(list, now))));
            "trust bundle"
        }
    };
    fields.push(("version", printable(&resource.version)));
    let mut out = format!("{}: {kind}\n", printable(&resource.name));
    for (label, value) in fields {
        // Writing to a string does not fail.
        let _ = writeln!(out, "  {label:<12} {value}");
    }
    out
}

/// The resource as one line of text, for `--watch`.
pub(super) fn line(resource: &Resource, now: SystemTime) -> String {
    let (time, name) = (rfc3339(now), printable(&resource.name));
    match &resource.material {
        Material::Certificate { chain, .. } => {
            let id = printable(spiffe_id(chain).unwrap_or("(no SPIFFE ID)"));
            let not_after = chain.validity.not_after;
            format!("{time} {name} {id} serial {} until {} ({})\n", chain.serial, rfc3339(not_after), expiry(not_after, now))
        }
        Material::Bundle(bundle) => {
            let roots: Vec<String> = roots(&bundle.roots).map(|root| root.in_words(now)).collect();
            let lists: String = bundle.crls().iter().map(|list| format!("; revoked {}", in_words(list, now))).collect();
            format!("{time} {name} {}: {}{lists}\n", count(roots.len(), "root"), roots.join("; "))
        }
    }
}

struct Root {
    subject: String,
    not_after: SystemTime,
}

impl Root {
    fn in_words(&self, now: SystemTime) -> String {
        format!("{}, until {} ({})", self.subject, rfc3339(self.not_after), expiry(self.not_after, now))
    }
}

fn in_words(list: &RevocationList, now: SystemTime) -> String {
    let number = count(list.revoked, "certificate");
    list.next_update.map_or_else(|| number.clone(), |end| format!("{number}, by a list until {} ({})", rfc3339(end), expiry(end, now)))
}

fn roots(bundle: &TrustBundle) -> impl Iterator<Item = Root> + '_ {
    // Each was parsed when the bundle was made.
    let parsed = bundle.roots().iter().filter_map(|der| X509Certificate::from_der(der).ok());
    parsed.map(|(_, root)| {
        let subject = printable(&root.subject().to_string());
        let subject = if subject.is_empty() { "(no subject)".to_owned() } else { subject };
        Root { subject, not_after: from_unix_seconds(root.validity().not_after.timestamp()) }
    })
}

fn spiffe_id(chain: &CertificateChain) -> Option<&str> {
    chain.uris.iter().map(String::as_str).find(|uri| uri.starts_with("spiffe://"))
}

fn text(pem: Vec<u8>) -> String {
    // PEM is ASCII.
    String::from_utf8(pem).unwrap_or_default()
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn expiry(at: SystemTime, now: SystemTime) -> String {
    match at.duration_since(now) {
        Ok(left) => format!("expires in {}", roughly(left)),
        Err(past) => format!("EXPIRED {} ago", roughly(past.duration())),
    }
}

/// The two largest units, such as `23h 59m`.
fn roughly(time: Duration) -> String {
    let seconds = time.as_secs();
    let parts = [(seconds / 86_400, "d"), (seconds / 3600 % 24, "h"), (seconds / 60 % 60, "m"), (seconds % 60, "s")];
    let start = parts.iter().position(|(n, _)| *n > 0).unwrap_or(parts.len() - 1);
    let shown = parts[start..].iter().take(2).filter(|(n, _)| *n > 0 || start == parts.len() - 1);
    shown.map(|(n, unit)| format!("{n}{unit}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_in_two_units() {
        for (seconds, expected) in
            [(0, "0s"), (59, "59s"), (60, "1m"), (61, "1m 1s"), (86_399, "23h 59m"), (86_400, "1d"), (90_000, "1d 1h"), (3_600, "1h")]
        {
            assert_eq!(roughly(Duration::from_secs(seconds)), expected);
        }
    }
}
