//! Checks of name templates against the kind of attestation.
//!
//! A template that passes renders for every workload whose own names are valid. An invalid template is reported at the start, not at
//! the first call.

use workload_identity::{Labels, PodRef, SpiffeId, TrustDomain, Workload, placeholder, render};

mod collision;

use super::{
    Attestation,
    error::FieldError,
    values::{DNS_NAME_RULE, is_dns_name, one_of},
};

/// The workload for which checks and examples render templates.
pub fn sample(attestation: Attestation) -> Workload {
    match attestation {
        Attestation::Kubernetes => Workload::Pod {
            pod: PodRef {
                namespace: "shop".into(),
                name: "cart-5d89c7b6f4-x2v9k".into(),
                uid: "0b9a4e52-6a2c-4f0c-9f3e-6f1d2f5d7c11".into(),
            },
            service_account: Some("cart".into()),
            labels: Labels::default(),
            picked: None,
        },
        Attestation::Unix => Workload::Unix { uid: 1000 },
    }
}

/// The default template of the SPIFFE ID.
pub(super) fn default_spiffe_id(attestation: Attestation) -> &'static str {
    match attestation {
        Attestation::Kubernetes => "spiffe://{trustDomain}/ns/{namespace}/sa/{serviceAccount}",
        Attestation::Unix => "spiffe://{trustDomain}/uid/{uid}",
    }
}

fn placeholders(attestation: Attestation) -> &'static [&'static str] {
    match attestation {
        Attestation::Kubernetes => &["trustDomain", "namespace", "serviceAccount", "podName", "podUid"],
        Attestation::Unix => &["trustDomain", "uid"],
    }
}

/// Checks a SPIFFE ID's template.
pub(super) fn spiffe_id(template: &str, attestation: Attestation, trust_domain: &TrustDomain) -> Result<(), FieldError> {
    let example = default_spiffe_id(attestation);
    let id = filled(template, attestation, trust_domain)?;
    let domain = trust_domain.id();
    if !id.strip_prefix(&domain).is_some_and(|rest| rest.starts_with('/')) {
        return Err(FieldError::new(format!("does not begin with {domain}/"), format!("write, for example, {example}")));
    }
    match SpiffeId::new(&id) {
        Ok(_) => unambiguous(template, trust_domain, example),
        Err(workload_identity::Error::SpiffeId { why, .. }) => {
            Err(FieldError::new(format!("renders to an invalid SPIFFE ID: {why}"), format!("write, for example, {example}")))
        }
        Err(error) => Err(FieldError::new(format!("renders to an invalid SPIFFE ID: {error}"), format!("write, for example, {example}"))),
    }
}

/// Checks a DNS name's template.
pub(super) fn dns_name(template: &str, attestation: Attestation, trust_domain: &TrustDomain) -> Result<(), FieldError> {
    let name = filled(template, attestation, trust_domain)?;
    if !is_dns_name(&name) {
        return Err(FieldError::new("renders to an invalid DNS name", DNS_NAME_RULE));
    }
    unambiguous(template, trust_domain, "{serviceAccount}.{namespace}.svc")
}

/// Checks that no two workloads can have one name by a valid template.
fn unambiguous(template: &str, trust_domain: &TrustDomain, example: &str) -> Result<(), FieldError> {
    match collision::find(template, trust_domain) {
        None => Ok(()),
        Some(collision) => Err(FieldError::new(collision.to_string(), format!("write, for example, {example}"))),
    }
}

/// Whether the template gives different workloads different names.
pub(super) fn distinguishes(template: &str, attestation: Attestation) -> bool {
    let has = |field: &str| template.contains(&format!("{{{field}}}"));
    match attestation {
        Attestation::Kubernetes => has("podUid") || has("namespace") && (has("serviceAccount") || has("podName")),
        Attestation::Unix => has("uid"),
    }
}

fn filled(template: &str, attestation: Attestation, trust_domain: &TrustDomain) -> Result<String, FieldError> {
    let names = placeholders(attestation);
    let offered: Vec<String> = names.iter().map(|name| format!("{{{name}}}")).collect();
    let remedy = || format!("use {}", one_of(&offered));
    if !balanced(template) {
        return Err(FieldError::new("has an unmatched brace", remedy()));
    }
    let workload = sample(attestation);
    render(template, |field| placeholder(field, trust_domain, &workload)).map_err(|error| match error {
        workload_identity::Error::Template { field, .. } => {
            let kind = match attestation {
                Attestation::Kubernetes => "kubernetes",
                Attestation::Unix => "unix",
            };
            FieldError::new(format!("has the placeholder {{{field}}}, which `attestation: {kind}` does not know"), remedy())
        }
        other => FieldError::new(other.to_string(), remedy()),
    })
}

/// Whether each `{` is closed before the next one, and each `}` has a `{`.
fn balanced(template: &str) -> bool {
    let mut open = false;
    for c in template.chars() {
        match (c, open) {
            ('{', true) | ('}', false) => return false,
            ('{', false) => open = true,
            ('}', true) => open = false,
            _ => {}
        }
    }
    !open
}
