//! `doctor --authority`: the ways to a certificate of the mesh's authority that do not lead through the approver. It needs an
//! administrator's access, and reads no Secret.
//!
//! The policies guard CertificateRequests that name a guarded issuer. The same key can sign for other objects: another issuer that uses it,
//! a CertificateSigningRequest, a Certificate that is a CA itself, and any account that can read the Secret.

use std::collections::BTreeSet;

use agent_kube::{Call, Cause, Failure};
use agent_runtime::text;
use cert_manager::{GROUP, RequestNamespace};
use issuance::issuer::certificate_request::Settings;
use k8s_openapi::api::apps::v1::Deployment;
use kube::{
    Api, Client, ResourceExt,
    api::ListParams,
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use self::rbac::{Rbac, Wanted};
use super::report::Step;
use crate::cli::Exit;

mod rbac;

/// Names in one step.
const SHOWN: usize = 10;
/// Objects in one page of a list.
const PAGE: u32 = 500;
/// Namespace of the Secrets of ClusterIssuers, if cert-manager's Deployment does not show another one.
const DEFAULT_NAMESPACE: &str = "cert-manager";
/// The policy that limits who sets a certificate.
const POLICY: &str = "sds-agent-requests";
/// Feature gate of cert-manager's controllers for CertificateSigningRequests.
const CSR_GATE: &str = "ExperimentalCertificateSigningRequestControllers";

/// Where an issuer's signing key is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Key {
    Secret { namespace: String, name: String },
    Vault { server: String, namespace: String, mount: String },
    Other(String),
}

impl Key {
    fn shown(&self) -> String {
        match self {
            Self::Secret { namespace, name } => format!("Secret {namespace}/{name}"),
            Self::Vault { server, mount, .. } => format!("mount {mount} of Vault at {server}"),
            Self::Other(kind) => kind.clone(),
        }
    }
}

/// An issuer of the cluster. Its namespace is `None` for a ClusterIssuer.
#[derive(Debug, Clone)]
struct Found {
    namespace: Option<String>,
    name: String,
    key: Key,
}

impl Found {
    fn shown(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("Issuer {namespace}/{}", self.name),
            None => format!("ClusterIssuer {}", self.name),
        }
    }

    /// The name of the issuer in CertificateSigningRequests and in the resource `signers`.
    fn signer_name(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("issuers.{GROUP}/{namespace}.{}", self.name),
            None => format!("clusterissuers.{GROUP}/{}", self.name),
        }
    }
}

/// Checks the authorities of `issuers`.
pub(super) async fn look(client: &Client, issuers: &[&Settings]) -> Vec<Step> {
    match steps(client, issuers).await {
        Ok(steps) => steps,
        Err(failure) if matches!(failure.cause, Cause::Rbac | Cause::Policy) => {
            vec![Step::unknown("authority", failure.to_string(), Some("run it with the access of an administrator: set KUBECONFIG"))]
        }
        Err(failure) => vec![Step::failed(
            "authority",
            Exit::Unavailable,
            failure.to_string(),
            "check that the API server runs and can be reached from here, with KUBECONFIG",
        )],
    }
}

async fn steps(client: &Client, configured: &[&Settings]) -> Result<Vec<Step>, Failure> {
    let managers = list(&Api::<Deployment>::all(client.clone()), "deployments.apps", "app.kubernetes.io/name=cert-manager").await?;
    let namespace = secrets_namespace(&managers);
    let mut all = Vec::new();
    for kind in ["ClusterIssuer", "Issuer"] {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(GROUP, "v1", kind));
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        let objects = list(&api, &format!("{}.{GROUP}", resource.plural), "").await?;
        all.extend(objects.iter().map(|object| found(object, &namespace)));
    }
    let (own, mut steps) = configured_ones(&all, configured);
    steps.extend(signer(client, &managers).await?);
    let rbac = Rbac::read(client).await?;
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(GROUP, "v1", "Certificate"));
    let certificates = list(&Api::<DynamicObject>::all_with(client.clone(), &resource), &format!("certificates.{GROUP}"), "").await?;
    for issuer in &own {
        steps.push(same_key(issuer, &all, &own));
        steps.push(subordinates(issuer, &certificates));
        steps.push(signing_requests(issuer, &managers, &rbac));
        steps.extend(secret_readers(issuer, &rbac));
    }
    Ok(steps)
}

async fn list<K>(api: &Api<K>, resource: &str, labels: &str) -> Result<Vec<K>, Failure>
where
    K: Clone + DeserializeOwned + std::fmt::Debug,
{
    let call = Call { verb: "list", resource, name: None, namespace: None };
    let (mut all, mut parameters) = (Vec::new(), ListParams::default().limit(PAGE));
    if !labels.is_empty() {
        parameters = parameters.labels(labels);
    }
    loop {
        let page = api.list(&parameters).await.map_err(|error| Failure::of(&error, &call))?;
        all.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters.continue_token = Some(token),
            None => return Ok(all),
        }
    }
}

/// The arguments of the containers of cert-manager's Deployments.
fn arguments(managers: &[Deployment]) -> impl Iterator<Item = (&Deployment, &str)> {
    managers.iter().flat_map(|deployment| {
        let containers = deployment.spec.iter().flat_map(|spec| &spec.template.spec).flat_map(|pod| &pod.containers);
        let arguments = containers.flat_map(|container| container.args.iter().chain(&container.command).flatten());
        arguments.map(move |argument| (deployment, argument.as_str()))
    })
}

/// The value of a flag of cert-manager, as one argument or as two.
fn flag<'a>(managers: &'a [Deployment], name: &str) -> Option<(&'a Deployment, &'a str)> {
    let all: Vec<(&Deployment, &str)> = arguments(managers).collect();
    all.iter().enumerate().find_map(|(place, (deployment, argument))| {
        let rest = argument.strip_prefix("--")?.strip_prefix(name)?;
        match rest.strip_prefix('=') {
            Some(value) => Some((*deployment, value)),
            None if rest.is_empty() => all.get(place + 1).map(|(_, value)| (*deployment, *value)),
            None => None,
        }
    })
}

/// The namespace of the Secrets of ClusterIssuers: `--cluster-resource-namespace`, or cert-manager's own namespace.
fn secrets_namespace(managers: &[Deployment]) -> String {
    let set = flag(managers, "cluster-resource-namespace")
        .and_then(|(deployment, value)| if value == "$(POD_NAMESPACE)" { deployment.namespace() } else { Some(value.to_owned()) });
    set.or_else(|| managers.first()?.namespace()).unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned())
}

/// Whether the policy names the account of cert-manager's controller.
async fn signer(client: &Client, managers: &[Deployment]) -> Result<Option<Step>, Failure> {
    let is_controller =
        |deployment: &&Deployment| deployment.labels().get("app.kubernetes.io/component").is_none_or(|component| component == "controller");
    let Some(controller) = managers.iter().find(is_controller) else { return Ok(None) };
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("admissionregistration.k8s.io", "v1", "ValidatingAdmissionPolicy"));
    let resource = ApiResource { plural: "validatingadmissionpolicies".to_owned(), ..resource };
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
    let resource = "validatingadmissionpolicies.admissionregistration.k8s.io";
    let call = Call { verb: "get", resource, name: Some(POLICY), namespace: None };
    let policy = api.get_opt(POLICY).await.map_err(|error| Failure::of(&error, &call))?;
    let variables = policy.as_ref().and_then(|policy| policy.data["spec"]["variables"].as_array());
    let may_sign = variables.and_then(|all| all.iter().find(|variable| variable["name"] == "maySign"));
    let account = controller.spec.as_ref().and_then(|spec| spec.template.spec.as_ref()?.service_account_name.clone());
    let user = format!("system:serviceaccount:{}:{}", controller.namespace().unwrap_or_default(), account.as_deref().unwrap_or("default"));
    let name = "signer";
    Ok(Some(match may_sign.map(|variable| variable["expression"].as_str().unwrap_or_default()) {
        None => Step::warning(
            name,
            format!("the policy {POLICY} is missing, or limits no signer"),
            "install daemonset/approver of this version",
        ),
        Some(expression) if expression.contains(&format!("\"{user}\"")) => {
            Step::ok(name, format!("the policy {POLICY} accepts certificates of {user}"))
        }
        Some(_) => Step::failed(
            name,
            Exit::Failed,
            format!("the policy {POLICY} rejects certificates of {user}, cert-manager's account"),
            "add it to policy.signers of the chart, or to maySign in approver/policy.yaml",
        ),
    }))
}

fn found(object: &DynamicObject, secrets: &str) -> Found {
    let spec = &object.data["spec"];
    let text = |value: &Value| value.as_str().unwrap_or_default().trim_matches('/').to_owned();
    let key = if let Some(ca) = spec.get("ca") {
        let namespace = object.namespace().unwrap_or_else(|| secrets.to_owned());
        Key::Secret { namespace, name: text(&ca["secretName"]) }
    } else if let Some(vault) = spec.get("vault") {
        // `pki/sign/role` and `pki/issue/other` sign with the key of the mount `pki`.
        let path = text(&vault["path"]);
        let mount = path.find("/sign").or_else(|| path.find("/issue")).map_or(path.as_str(), |end| &path[..end]).to_owned();
        Key::Vault { server: text(&vault["server"]), namespace: text(&vault["namespace"]), mount }
    } else {
        let kind = spec.as_object().and_then(|kinds| kinds.keys().next()).map_or("of no known type", String::as_str);
        Key::Other(format!("an authority of the type {}", text::excerpt(kind, text::MAX_NAME_CHARS)))
    };
    Found { namespace: object.namespace(), name: object.name_any(), key }
}

/// The issuers of the configuration among `all`, and a step for each that is missing or external.
fn configured_ones(all: &[Found], configured: &[&Settings]) -> (Vec<Found>, Vec<Step>) {
    let (mut own, mut steps) = (Vec::new(), Vec::new());
    for settings in configured {
        let reference = &settings.issuer_ref;
        let is_cluster = reference.kind == "ClusterIssuer";
        if !reference.group.is_empty() && reference.group != GROUP {
            let detail = format!("{} {} of group {} is an external issuer", reference.kind, reference.name, reference.group);
            steps.push(Step::unknown("authority", detail, Some("see its documentation for other ways to its key")));
            continue;
        }
        let is_it = |found: &&Found| {
            let namespace = match (&settings.namespace, is_cluster) {
                (_, true) => found.namespace.is_none(),
                (RequestNamespace::Fixed(namespace), false) => found.namespace.as_ref() == Some(namespace),
                // Each workload's namespace has its own.
                (RequestNamespace::Workload, false) => found.namespace.is_some(),
            };
            namespace && found.name == reference.name
        };
        let before = own.len();
        own.extend(all.iter().filter(is_it).cloned());
        if own.len() == before {
            let detail = format!("{} {} does not exist", reference.kind, reference.name);
            steps.push(Step::failed("authority", Exit::Unavailable, detail, "create it, or correct issuer.certManager.issuerRef"));
        }
    }
    (own, steps)
}

/// Lists at most [`SHOWN`] names.
fn listed(names: &BTreeSet<String>) -> String {
    let mut lines: Vec<String> = names.iter().take(SHOWN).map(|name| text::excerpt(name, text::MAX_MESSAGE_CHARS)).collect();
    if names.len() > SHOWN {
        lines.push(format!("and {} more", names.len() - SHOWN));
    }
    lines.join("\n")
}

fn same_key(issuer: &Found, all: &[Found], own: &[Found]) -> Step {
    let (name, title) = ("other issuers", format!("{}: {}", issuer.shown(), issuer.key.shown()));
    if matches!(issuer.key, Key::Other(_)) {
        return Step::unknown(name, format!("{title}, whose other users are not known here"), None);
    }
    let is_own = |other: &Found| own.iter().any(|own| own.namespace == other.namespace && own.name == other.name);
    let others: BTreeSet<String> = all.iter().filter(|other| other.key == issuer.key && !is_own(other)).map(Found::shown).collect();
    if others.is_empty() {
        return Step::ok(name, format!("{title}; no other issuer uses it"));
    }
    let remedy = "delete these issuers, or add them to the configuration: requests for them are not guarded";
    Step::warning(name, format!("{title} is also used by\n{}", listed(&others)), remedy)
}

fn subordinates(issuer: &Found, certificates: &[DynamicObject]) -> Step {
    let (name, title) = ("certificates", issuer.shown());
    let is_for = |certificate: &&DynamicObject| {
        let reference = &certificate.data["spec"]["issuerRef"];
        let kind = reference["kind"].as_str().unwrap_or("Issuer");
        let here = match &issuer.namespace {
            None => kind == "ClusterIssuer",
            Some(namespace) => kind == "Issuer" && certificate.namespace().as_ref() == Some(namespace),
        };
        here && reference["name"].as_str() == Some(&issuer.name)
    };
    let shown = |certificate: &DynamicObject| {
        let ca = if certificate.data["spec"]["isCA"] == Value::Bool(true) { ", a CA: its key signs names of the mesh too" } else { "" };
        format!("Certificate {}/{}{ca}", certificate.namespace().unwrap_or_default(), certificate.name_any())
    };
    let found: BTreeSet<String> = certificates.iter().filter(is_for).map(shown).collect();
    if found.is_empty() {
        return Step::ok(name, format!("no Certificate names {title}"));
    }
    let remedy = "use another issuer: the policies reject their requests from now on, and what was signed before stays valid";
    Step::warning(name, format!("{title} is named by\n{}", listed(&found)), remedy)
}

/// Kubernetes' own CertificateSigningRequests, which cert-manager signs if a feature gate is on.
fn signing_requests(issuer: &Found, managers: &[Deployment], rbac: &Rbac) -> Step {
    let (name, signer) = ("signing requests", issuer.signer_name());
    let gates = flag(managers, "feature-gates").map_or("", |(_, gates)| gates);
    let is_enabled = gates.split(',').any(|gate| gate == format!("{CSR_GATE}=true") || gate == "AllAlpha=true");
    let has_file = flag(managers, "config").is_some();
    if !managers.is_empty() && !is_enabled && !has_file {
        return Step::ok(name, format!("cert-manager does not sign CertificateSigningRequests ({CSR_GATE} is off)"));
    }
    let wildcard = signer.split_once('/').map_or_else(String::new, |(kind, _)| format!("{kind}/*"));
    let wanted = Wanted { group: "certificates.k8s.io", resource: "signers", verbs: &["approve"], names: &[&signer, &wildcard] };
    let approvers = rbac.subjects(&wanted, None);
    let state = match (managers.is_empty(), is_enabled) {
        (true, _) => "cert-manager's Deployment was not found",
        (false, true) => "cert-manager signs CertificateSigningRequests",
        (false, false) => "cert-manager's configuration is in a file, which is not read here: it may sign CertificateSigningRequests",
    };
    let detail = format!("{state}; for the signer {signer} these may approve one:\n{}", listed(&approvers));
    let remedy = format!("turn the feature gate {CSR_GATE} of cert-manager off: the policies do not see CertificateSigningRequests");
    Step::warning(name, detail, remedy)
}

fn secret_readers(issuer: &Found, rbac: &Rbac) -> Option<Step> {
    let Key::Secret { namespace, name: secret } = &issuer.key else { return None };
    let name = "secret";
    let wanted = Wanted { group: "", resource: "secrets", verbs: &["get", "list", "watch"], names: &[secret] };
    let mut readers = rbac.subjects(&wanted, Some(namespace));
    let writes = ["create", "update", "patch"];
    let ways: [(&str, &str, &[&str], &str); 12] = [
        ("", "pods", &["create"], "by a pod that mounts it"),
        ("", "replicationcontrollers", &writes, "by a pod that mounts it"),
        ("apps", "deployments", &writes, "by a pod that mounts it"),
        ("apps", "daemonsets", &writes, "by a pod that mounts it"),
        ("apps", "statefulsets", &writes, "by a pod that mounts it"),
        ("apps", "replicasets", &writes, "by a pod that mounts it"),
        ("batch", "jobs", &writes, "by a pod that mounts it"),
        ("batch", "cronjobs", &writes, "by a pod that mounts it"),
        ("", "pods/exec", &["create", "get"], "in a pod that mounts it"),
        ("", "serviceaccounts/token", &["create"], "with the token of an account that reads it"),
        ("", "serviceaccounts", &["impersonate"], "as an account that reads it"),
        ("rbac.authorization.k8s.io", "roles", &["bind", "escalate"], "by a role that it grants"),
    ];
    for (group, resource, verbs, way) in ways {
        let wanted = Wanted { group, resource, verbs, names: &[] };
        let direct: BTreeSet<String> = readers.iter().filter(|reader| !reader.contains(", ")).cloned().collect();
        let subjects = rbac.subjects(&wanted, Some(namespace)).into_iter().filter(|subject| !direct.contains(subject));
        readers.extend(subjects.map(|subject| format!("{subject}, {way}")));
    }
    let detail = format!("{namespace}/{secret}: these can obtain the key of {}\n{}", issuer.shown(), listed(&readers));
    let remedy = "leave this access to cert-manager and to administrators of the authority";
    Some(Step::warning(name, detail, remedy))
}

#[cfg(test)]
mod tests;
