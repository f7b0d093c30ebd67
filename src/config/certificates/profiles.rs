//! `profiles`: which workloads get which certificates from which issuer.

use std::cell::RefCell;

use agent_kube::pod::picks;
use serde_json::Value;
use workload_identity::{Match, Pattern};

use super::{
    Context, DEFAULT,
    certificate::{self, Certificate, Identity},
    issuer, warn_of_load,
};
use crate::config::{Attestation, IssuerConfig, error::FieldError, reader::Section, values};

/// The values of the top-level sections.
pub(super) struct Base<'a> {
    /// `identity`
    pub identity: Identity,
    /// `certificate`
    pub certificate: Certificate,
    /// `issuer`; `None` if it is invalid.
    pub issuer: Option<&'a IssuerConfig>,
}

/// A profile whose issuer has no name yet.
#[derive(Debug)]
pub(super) struct UnresolvedProfile {
    /// `name`
    pub name: String,
    /// `match`
    pub matches: Match,
    /// `selectable`
    pub selectable: bool,
    /// `identity`
    pub identity: Identity,
    /// `certificate`
    pub certificate: Certificate,
    /// `issuerRef`, `namespace` and `trustStatusCA`
    pub issuer: IssuerConfig,
    /// `authorityEpoch`
    pub epoch: u64,
}

impl UnresolvedProfile {
    /// The profile of workloads that no other profile matches.
    pub(super) fn default_of(identity: Identity, certificate: Certificate, issuer: IssuerConfig) -> Self {
        Self { name: DEFAULT.to_owned(), matches: Match::default(), selectable: false, identity, certificate, issuer, epoch: 0 }
    }
}

/// An earlier profile of the list: its name and its match, if they are valid, and whether it is selectable.
type Seen = (Option<String>, Option<Match>, bool);

/// Reads the list.
pub(super) fn decode(root: &Section<'_>, context: &Context<'_>, base: &Base<'_>) -> Option<Vec<UnresolvedProfile>> {
    let seen = RefCell::new(Vec::new());
    let drafts = root.sections("profiles", |section| profile(section, context, base, &seen));
    if context.attestation == Some(Attestation::Unix) && drafts.as_ref().is_none_or(|drafts| !drafts.is_empty()) {
        root.wrong("profiles", "needs pods, which `attestation: unix` does not know", "remove it");
        return None;
    }
    drafts
}

fn profile(section: &Section<'_>, context: &Context<'_>, base: &Base<'_>, seen: &RefCell<Vec<Seen>>) -> Option<UnresolvedProfile> {
    let absent =
        || FieldError::new("is missing: metrics, requests and volumes refer to the profile by its name", "give it a name such as payments");
    let name = section.require("name", absent, name);
    let has_match = section.has("match");
    let matches = section.section("match", matches);
    if !has_match {
        let example = "write, for example, `match: { namespaces: [payments] }`, or `match: {}` for every pod";
        section.wrong("match", "is missing: it says whose profile this is", example);
    }
    let selectable = section.read("selectable", false, values::boolean);
    let identity = section.section("identity", |section| certificate::identity(section, context, Some(&base.identity)));
    let certificate = section.section("certificate", |section| certificate::certificate(section, context, base.certificate));
    let issuer = issuer::of_profile(section, context, base.issuer);
    let epoch = section.read("authorityEpoch", 0, values::integer(0..=u64::MAX));

    compare(section, name.as_deref(), matches.as_ref().filter(|_| selectable == Some(false)), &seen.borrow());
    seen.borrow_mut().push((name.clone(), matches.clone(), selectable.unwrap_or(false)));

    let (certificate, issuer) = (certificate?, issuer?);
    let is_own = certificate.lifetime != base.certificate.lifetime || certificate.renew_at.to_bits() != base.certificate.renew_at.to_bits();
    if is_own {
        warn_of_load(section, &certificate, &issuer);
    }
    let (name, matches, selectable) = (name?, matches.filter(|_| has_match)?, selectable?);
    Some(UnresolvedProfile { name, matches, selectable, identity: identity?, certificate, issuer, epoch: epoch? })
}

/// Reports a duplicate name, and a profile that an earlier one always precedes.
fn compare(section: &Section<'_>, name: Option<&str>, matches: Option<&Match>, seen: &[Seen]) {
    if let Some(place) = name.and_then(|name| seen.iter().position(|(known, ..)| known.as_deref() == Some(name))) {
        section.wrong("name", format!("is the name of profiles[{place}] too"), "give each profile a name of its own");
    }
    let takes_all = |matches: &Match| {
        seen.iter().position(|(_, known, selectable)| !selectable && known.as_ref().is_some_and(|known| known.covers(matches)))
    };
    if let Some(place) = matches.and_then(takes_all) {
        let what = format!("is never used: profiles[{place}] comes first and matches every pod that this one matches");
        section.wrong_here(what, format!("put it before profiles[{place}], or narrow the match of that one"));
    }
}

fn name(value: &Value) -> Result<String, FieldError> {
    match values::text(value)? {
        DEFAULT => Err(FieldError::new("is the name of the default profile", "choose another name")),
        name if picks::is_name(name) => Ok(name.to_owned()),
        _ => Err(FieldError::new("is not the name of a profile", values::DNS_LABEL_RULE)),
    }
}

fn matches(section: &Section<'_>) -> Option<Match> {
    let patterns = |field: &'static str, kind: &'static str, is_part: fn(u8) -> bool| {
        let patterns = section.list(field, |value| pattern(value, kind, is_part));
        if section.is_set(field) && patterns.as_ref().is_some_and(Vec::is_empty) {
            section.wrong(field, "is empty and matches no pod", "name some, or leave it out for all");
            return None;
        }
        patterns
    };
    let namespaces = patterns("namespaces", "namespaces", |b| b != b'.' && in_names(b));
    let service_accounts = patterns("serviceAccounts", "service accounts", in_names);
    let pod_labels = section.map("podLabels", values::object_label);
    Some(Match { namespaces: namespaces?, service_accounts: service_accounts?, pod_labels: pod_labels? })
}

fn in_names(b: u8) -> bool {
    b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.')
}

fn pattern(value: &Value, kind: &str, is_part: fn(u8) -> bool) -> Result<Pattern, FieldError> {
    let text = values::text(value)?;
    let remedy = "write a name, or a part of one with '*' at its beginning or at its end";
    let pattern = Pattern::parse(text).ok_or_else(|| FieldError::new("has a '*' that is not at its beginning or end", remedy))?;
    if pattern.part().len() > 253 || !pattern.part().bytes().all(is_part) {
        return Err(FieldError::new(format!("can match no {kind}"), "use lower-case letters, digits and '-', as such names have"));
    }
    Ok(pattern)
}
