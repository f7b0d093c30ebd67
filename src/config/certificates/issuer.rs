//! The issuer: `issuer`, and the fields of it that a profile may set.

use cert_manager::{IssuerRef, RequestNamespace};
use issuance::issuer::certificate_request;

use super::Context;
use crate::config::{Attestation, IssuerConfig, environment::snippet, error::FieldError, reader::Section, values};

/// The group of cert-manager's own issuers.
const CERT_MANAGER: &str = "cert-manager.io";

/// Reads `issuer`.
pub(super) fn issuer(root: &Section<'_>, context: &Context<'_>) -> Option<IssuerConfig> {
    let example = "write, for example, `issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }`";
    let present = root.has("issuer");
    root.section("issuer", |issuer| {
        // `embedded:` without a value means `embedded: {}`.
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

fn cert_manager(section: &Section<'_>, context: &Context<'_>) -> Option<certificate_request::Settings> {
    let issuer_ref = section.section("issuerRef", issuer_ref);
    let agents_own = context.pod.and_then(|pod| pod.namespace.clone()).unwrap_or_else(|| "sds-agent".to_owned());
    let namespace = namespace(section, context, RequestNamespace::Fixed(agents_own), issuer_ref.as_ref());
    let trust_status_ca = section.read("trustStatusCA", false, values::boolean);

    if context.attestation == Some(Attestation::Kubernetes) && context.pod.is_some_and(|pod| pod.node.pod.is_none()) {
        let message = format!(
            "is not set with POD_NAMESPACE and POD_UID: requests are not owned by the agent's pod and remain when it is deleted; \
             add to the container {} and the like for metadata.namespace and metadata.uid",
            snippet("POD_NAME", "metadata.name")
        );
        section.warn_outside("POD_NAME", message);
    }
    Some(certificate_request::Settings { issuer_ref: issuer_ref?, namespace: namespace?, trust_status_ca: trust_status_ca? })
}

/// Reads the `issuerRef`, `namespace` and `trustStatusCA` of a profile; absent fields have the values of `base`. A profile's reference
/// replaces the whole reference, because the kind and group of one name do not apply to another.
pub(super) fn of_profile(section: &Section<'_>, context: &Context<'_>, base: Option<&IssuerConfig>) -> Option<IssuerConfig> {
    let named = section.is_set("issuerRef").then(|| section.section("issuerRef", issuer_ref));
    let fields = [named.is_some(), section.is_set("namespace"), section.is_set("trustStatusCA")];
    let base = match base {
        Some(IssuerConfig::CertManager(base)) => Some(base),
        Some(IssuerConfig::Embedded) => {
            let set = ["issuerRef", "namespace", "trustStatusCA"].into_iter().zip(fields).filter(|(_, is_set)| *is_set);
            set.for_each(|(field, _)| section.wrong(field, "needs cert-manager, and `issuer` is the embedded authority", "remove it"));
            return Some(IssuerConfig::Embedded);
        }
        None => None,
    };
    let issuer_ref = named.unwrap_or_else(|| base.map(|base| base.issuer_ref.clone()));
    // If the default is invalid, the result is discarded.
    let inherited = base.map_or_else(|| RequestNamespace::Fixed(String::new()), |base| base.namespace.clone());
    // Inherited values were checked in their own section.
    let judged = issuer_ref.as_ref().filter(|_| fields[0] || fields[1]);
    let namespace = namespace(section, context, inherited, judged);
    let trust_status_ca = section.read("trustStatusCA", base.is_some_and(|base| base.trust_status_ca), values::boolean);
    Some(IssuerConfig::CertManager(certificate_request::Settings {
        issuer_ref: issuer_ref?,
        namespace: namespace?,
        trust_status_ca: trust_status_ca?,
    }))
}

fn namespace(
    section: &Section<'_>,
    context: &Context<'_>,
    default: RequestNamespace,
    issuer_ref: Option<&IssuerRef>,
) -> Option<RequestNamespace> {
    let namespace = section.read("namespace", default, |value| match value.as_str() {
        Some("workload") => Ok(RequestNamespace::Workload),
        _ => values::namespace(value).map(RequestNamespace::Fixed),
    });
    if namespace == Some(RequestNamespace::Workload) {
        if section.is_set("namespace") && context.attestation == Some(Attestation::Unix) {
            section.wrong("namespace", "needs pods, which `attestation: unix` does not know", "name one namespace");
            return None;
        }
        if let Some(issuer_ref) = issuer_ref.filter(|issuer| issuer.kind == "Issuer") {
            let message = format!("workload: every workload's namespace needs an Issuer {:?} of its own", issuer_ref.name);
            section.warn("namespace", message);
        }
    }
    namespace
}

/// Reads an `issuerRef`.
pub(super) fn issuer_ref(section: &Section<'_>) -> Option<IssuerRef> {
    let name =
        section.require("name", || FieldError::new("is missing", "name the Issuer or ClusterIssuer that signs"), values::object_name);
    let group = section.read("group", CERT_MANAGER.to_owned(), values::object_name);
    let own_group = group.as_deref() == Some(CERT_MANAGER);
    let absent = || {
        let what = "is missing, and without it cert-manager looks for an Issuer in the namespace of the request, never for a ClusterIssuer";
        FieldError::new(what, "write kind: ClusterIssuer for one that serves the whole cluster, or kind: Issuer")
    };
    let kind = section.require("kind", absent, |value| {
        let kind = values::text(value)?;
        if own_group && !matches!(kind, "Issuer" | "ClusterIssuer") {
            let remedy = "use ClusterIssuer or Issuer, or set issuerRef.group to the group of an external issuer";
            return Err(FieldError::new(format!("is not a kind of {CERT_MANAGER}"), remedy));
        }
        Ok(kind.to_owned())
    });
    Some(IssuerRef { name: name?, kind: kind?, group: group? })
}

/// The issuer and the namespace of its requests, as a stable text for comparisons. The namespace is part of it for ClusterIssuers too:
/// pods of two profiles with different namespaces must not share a request, because the approver expects each request in the namespace
/// of its profile.
pub(super) fn authority(issuer: &IssuerConfig) -> String {
    match issuer {
        IssuerConfig::Embedded => "embedded".to_owned(),
        IssuerConfig::CertManager(certificate_request::Settings { issuer_ref: IssuerRef { name, kind, group }, namespace, .. }) => {
            let reference = format!("{kind} {name} of {group}");
            match namespace {
                RequestNamespace::Fixed(namespace) => format!("{reference} in namespace {namespace}"),
                RequestNamespace::Workload => format!("{reference} in the namespace of the workload"),
            }
        }
    }
}
