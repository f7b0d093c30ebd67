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
use k8s_openapi::api::{
    apps::v1::Deployment,
    rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, Subject},
};
use kube::{
    Api, Client, ResourceExt,
    api::ListParams,
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::report::Step;
use crate::cli::Exit;

/// Names in one step.
const SHOWN: usize = 10;
/// Objects in one page of a list.
const PAGE: u32 = 500;
/// Namespace of the Secrets of ClusterIssuers, if cert-manager's Deployment does not show another one.
const DEFAULT_NAMESPACE: &str = "cert-manager";
/// The policy that limits who sets a certificate.
const POLICY: &str = "sds-agent-requests";
/// Controllers of Kubernetes in kube-system that read every Secret or create pods.
const CONTROLLERS: [&str; 14] = [
    "bootstrap-signer",
    "cronjob-controller",
    "daemon-set-controller",
    "deployment-controller",
    "expand-controller",
    "generic-garbage-collector",
    "job-controller",
    "namespace-controller",
    "persistent-volume-binder",
    "replicaset-controller",
    "replication-controller",
    "statefulset-controller",
    "token-cleaner",
    "ttl-after-finished-controller",
];
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

/// Roles and bindings of the cluster.
struct Rbac {
    cluster_roles: Vec<ClusterRole>,
    cluster_bindings: Vec<ClusterRoleBinding>,
    roles: Vec<Role>,
    bindings: Vec<RoleBinding>,
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
    let rbac = Rbac {
        cluster_roles: list(&Api::all(client.clone()), "clusterroles.rbac.authorization.k8s.io", "").await?,
        cluster_bindings: list(&Api::all(client.clone()), "clusterrolebindings.rbac.authorization.k8s.io", "").await?,
        roles: list(&Api::all(client.clone()), "roles.rbac.authorization.k8s.io", "").await?,
        bindings: list(&Api::all(client.clone()), "rolebindings.rbac.authorization.k8s.io", "").await?,
    };
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
    let policies = list(&api, "validatingadmissionpolicies.admissionregistration.k8s.io", "").await?;
    let policy = policies.iter().find(|policy| policy.name_any() == POLICY);
    let variables = policy.and_then(|policy| policy.data["spec"]["variables"].as_array());
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

/// A permission.
struct Wanted<'a> {
    group: &'a str,
    resource: &'a str,
    verbs: &'a [&'a str],
    /// Names of objects, any of which suffices. Empty: a permission for all objects.
    names: &'a [&'a str],
}

impl Wanted<'_> {
    fn is_in(&self, rule: &PolicyRule) -> bool {
        let has =
            |list: Option<&Vec<String>>, wanted: &[&str]| list.into_iter().flatten().any(|item| item == "*" || wanted.contains(&&**item));
        let limited = rule.resource_names.as_ref().is_some_and(|names| !names.is_empty());
        has(rule.api_groups.as_ref(), &[self.group])
            && has(rule.resources.as_ref(), &[self.resource])
            && has(Some(&rule.verbs), self.verbs)
            && (!limited || has(rule.resource_names.as_ref(), self.names))
    }
}

impl Rbac {
    /// The subjects that have the permission in this namespace, or in the whole cluster. Accounts of Kubernetes' own components are left
    /// out.
    fn subjects(&self, wanted: &Wanted<'_>, namespace: Option<&str>) -> BTreeSet<String> {
        let grants = |rules: Option<&Vec<PolicyRule>>| rules.into_iter().flatten().any(|rule| wanted.is_in(rule));
        let cluster_role = |name: &str| self.cluster_roles.iter().any(|role| role.name_any() == name && grants(role.rules.as_ref()));
        let mut out = BTreeSet::new();
        let mut add = |subjects: Option<&Vec<Subject>>, role: &str| {
            for subject in subjects.into_iter().flatten().filter(|subject| !is_of_kubernetes(subject)) {
                let place = subject.namespace.as_ref().map_or_else(String::new, |namespace| format!("{namespace}/"));
                out.insert(format!("{} {place}{} by {role}", subject.kind, subject.name));
            }
        };
        for binding in self.cluster_bindings.iter().filter(|binding| cluster_role(&binding.role_ref.name)) {
            add(binding.subjects.as_ref(), &format!("ClusterRole {}", binding.role_ref.name));
        }
        for binding in self.bindings.iter().filter(|binding| namespace.is_some() && binding.namespace().as_deref() == namespace) {
            let reference = &binding.role_ref;
            let own = |role: &&Role| role.namespace().as_deref() == namespace && role.name_any() == reference.name;
            let granted = match &*reference.kind {
                "ClusterRole" => cluster_role(&reference.name),
                _ => self.roles.iter().find(own).is_some_and(|role| grants(role.rules.as_ref())),
            };
            if granted {
                add(binding.subjects.as_ref(), &format!("{} {}", reference.kind, reference.name));
            }
        }
        out
    }
}

fn is_of_kubernetes(subject: &Subject) -> bool {
    match &*subject.kind {
        "ServiceAccount" => subject.namespace.as_deref() == Some("kube-system") && CONTROLLERS.contains(&&*subject.name),
        _ => subject.name.starts_with("system:kube-") || subject.name == "system:masters",
    }
}

#[cfg(test)]
mod tests {
    use agent_kube::{Metrics, fake::FakeApi};
    use cert_manager::IssuerRef;
    use serde_json::json;

    use super::*;
    use crate::cli::doctor::report::Outcome;

    fn settings() -> Settings {
        Settings {
            issuer_ref: IssuerRef { name: "mesh-ca".into(), kind: "ClusterIssuer".into(), group: GROUP.into() },
            namespace: RequestNamespace::Fixed("sds-agent".into()),
            trust_status_ca: false,
        }
    }

    fn cluster() -> FakeApi {
        let api = FakeApi::new();
        api.put("clusterissuers", json!({"metadata": {"name": "mesh-ca"}, "spec": {"ca": {"secretName": "mesh-ca"}}}));
        api.put("clusterissuers", json!({"metadata": {"name": "public"}, "spec": {"acme": {}}}));
        let labels = json!({"app.kubernetes.io/name": "cert-manager"});
        api.put(
            "deployments",
            json!({
                "metadata": {"namespace": "pki", "name": "cert-manager", "labels": labels},
                "spec": {"selector": {}, "template": {"spec": {"serviceAccountName": "controller", "containers": [
                    {"name": "controller", "args": ["--v=2", "--cluster-resource-namespace=$(POD_NAMESPACE)"]},
                ]}}},
            }),
        );
        let variable = json!({"name": "maySign", "expression": "request.userInfo.username in [\"system:serviceaccount:pki:controller\"]"});
        api.put("validatingadmissionpolicies", json!({"metadata": {"name": POLICY}, "spec": {"variables": [variable]}}));
        api
    }

    async fn look_at(api: &FakeApi) -> Vec<Step> {
        look(&api.client(&Metrics::default()), &[&settings()]).await
    }

    fn step<'a>(steps: &'a [Step], name: &str) -> &'a Step {
        steps.iter().find(|step| step.name == name).unwrap_or_else(|| panic!("no {name}: {steps:?}"))
    }

    fn bind(api: &FakeApi, kind: &str, name: &str, rule: &Value, namespace: Option<&str>) {
        let mut binding = json!({
            "metadata": {"name": name}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name},
            "subjects": [{"kind": "User", "name": format!("user-of-{name}")}],
        });
        let mut role = json!({"metadata": {"name": name}, "rules": [rule]});
        if let Some(namespace) = namespace {
            binding["metadata"]["namespace"] = json!(namespace);
            if kind == "Role" {
                role["metadata"]["namespace"] = json!(namespace);
            }
        }
        api.put(if kind == "Role" { "roles" } else { "clusterroles" }, role);
        api.put(if namespace.is_some() { "rolebindings" } else { "clusterrolebindings" }, binding);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cluster_without_other_ways_shows_none() {
        let steps = look_at(&cluster()).await;
        let found: Vec<_> = steps.iter().map(|step| (step.name, step.result)).collect();
        let (ok, warning) = (Outcome::Ok, Outcome::Warning);
        assert_eq!(found, [("signer", ok), ("other issuers", ok), ("certificates", ok), ("signing requests", ok), ("secret", warning)]);
        assert!(step(&steps, "other issuers").detail.contains("Secret pki/mesh-ca; no other issuer uses it"), "{steps:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn other_issuers_with_the_same_key_are_named() {
        let api = cluster();
        api.put("clusterissuers", json!({"metadata": {"name": "second"}, "spec": {"ca": {"secretName": "mesh-ca"}}}));
        api.put("issuers", json!({"metadata": {"namespace": "pki", "name": "third"}, "spec": {"ca": {"secretName": "mesh-ca"}}}));
        // A Secret of this name in another namespace is another key.
        api.put("issuers", json!({"metadata": {"namespace": "shop", "name": "own"}, "spec": {"ca": {"secretName": "mesh-ca"}}}));
        let steps = look_at(&api).await;
        let step = step(&steps, "other issuers");
        assert_eq!(
            (step.result, step.detail.ends_with("is also used by\nClusterIssuer second\nIssuer pki/third")),
            (Outcome::Warning, true)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn issuers_of_one_mount_of_vault_share_its_key() {
        let api = cluster();
        let vault = |path: &str| json!({"vault": {"server": "https://vault:8200/", "path": path}});
        for (name, path) in [("mesh-ca", "pki/mesh/sign/mesh"), ("second", "pki/mesh/issue/other"), ("third", "pki/other/sign/mesh")] {
            api.put("clusterissuers", json!({"metadata": {"name": name}, "spec": vault(path)}));
        }
        let steps = look_at(&api).await;
        let detail = &step(&steps, "other issuers").detail;
        assert!(detail.ends_with("mount pki/mesh of Vault at https://vault:8200 is also used by\nClusterIssuer second"), "{detail}");
        assert!(steps.iter().all(|step| step.name != "secret"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_signer_that_the_policy_does_not_name_fails() {
        let api = cluster();
        api.change("deployments", "pki", "cert-manager", |deployment| {
            deployment["spec"]["template"]["spec"]["serviceAccountName"] = json!("cm-cert-manager");
        });
        let steps = look_at(&api).await;
        let step = step(&steps, "signer");
        assert_eq!(step.result, Outcome::Failed);
        assert!(step.detail.contains("rejects certificates of system:serviceaccount:pki:cm-cert-manager"), "{}", step.detail);
    }

    #[tokio::test(start_paused = true)]
    async fn flags_have_two_forms_and_a_file_is_not_taken_for_off() {
        for (arguments, is_known_off) in [
            (json!(["--feature-gates", format!("{CSR_GATE}=true")]), false),
            (json!(["--feature-gates", "X=true"]), true),
            (json!(["--config=/etc/cert-manager/config.yaml"]), false),
        ] {
            let api = cluster();
            api.change("deployments", "pki", "cert-manager", |deployment| {
                deployment["spec"]["template"]["spec"]["containers"][0]["args"] = arguments.clone();
            });
            let steps = look_at(&api).await;
            assert_eq!(step(&steps, "signing requests").result == Outcome::Ok, is_known_off, "{arguments}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn certificates_and_signing_requests_are_named() {
        let api = cluster();
        let certificate = |name: &str, kind: &str, is_ca: bool| {
            let reference = json!({"name": "mesh-ca", "kind": kind});
            api.put(
                "certificates",
                json!({"metadata": {"namespace": "shop", "name": name}, "spec": {"issuerRef": reference, "isCA": is_ca}}),
            );
        };
        certificate("intermediate", "ClusterIssuer", true);
        certificate("of-another", "Issuer", true);
        api.change("deployments", "pki", "cert-manager", |deployment| {
            deployment["spec"]["template"]["spec"]["containers"][0]["args"] = json!([format!("--feature-gates=X=false,{CSR_GATE}=true")]);
        });
        let approve = |names: Value| json!({"apiGroups": ["certificates.k8s.io"], "resources": ["signers"], "verbs": ["approve"], "resourceNames": names});
        bind(&api, "ClusterRole", "exact", &approve(json!(["clusterissuers.cert-manager.io/mesh-ca"])), None);
        bind(&api, "ClusterRole", "all-issuers", &approve(json!(["clusterissuers.cert-manager.io/*"])), None);
        bind(&api, "ClusterRole", "another", &approve(json!(["clusterissuers.cert-manager.io/public"])), None);
        let steps = look_at(&api).await;
        let detail = &step(&steps, "certificates").detail;
        assert!(detail.ends_with("named by\nCertificate shop/intermediate, a CA: its key signs names of the mesh too"), "{detail}");
        let detail = &step(&steps, "signing requests").detail;
        assert!(
            detail.ends_with("one:\nUser user-of-all-issuers by ClusterRole all-issuers\nUser user-of-exact by ClusterRole exact"),
            "{detail}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn accounts_that_can_read_the_secret_are_named() {
        let api = cluster();
        let secrets =
            |names: Value, verb: &str| json!({"apiGroups": [""], "resources": ["secrets"], "verbs": [verb], "resourceNames": names});
        bind(&api, "ClusterRole", "everywhere", &secrets(json!([]), "list"), None);
        bind(&api, "ClusterRole", "wildcards", &json!({"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}), None);
        bind(&api, "Role", "named", &secrets(json!(["mesh-ca"]), "get"), Some("pki"));
        bind(&api, "Role", "another-secret", &secrets(json!(["other"]), "get"), Some("pki"));
        bind(&api, "Role", "another-namespace", &secrets(json!(["mesh-ca"]), "get"), Some("shop"));
        bind(&api, "Role", "writer", &secrets(json!(["mesh-ca"]), "create"), Some("pki"));
        bind(&api, "ClusterRole", "editor", &json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["create"]}), Some("pki"));
        let steps = look_at(&api).await;
        let detail = &step(&steps, "secret").detail;
        let expected = "can obtain the key of ClusterIssuer mesh-ca\n\
                        User user-of-editor by ClusterRole editor, by a pod that mounts it\n\
                        User user-of-everywhere by ClusterRole everywhere\n\
                        User user-of-named by Role named\n\
                        User user-of-wildcards by ClusterRole wildcards";
        assert!(detail.ends_with(expected), "{detail}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_missing_access_is_unknown_and_a_missing_issuer_fails() {
        let api = FakeApi::new();
        assert_eq!(look_at(&api).await[0].result, Outcome::Failed);
        let forbidden = json!({"kind": "Status", "code": 403, "reason": "Forbidden", "message": "User \"x\" cannot list resource"});
        api.fail("list", "deployments", agent_kube::fake::Fault::Status(403, forbidden), 1);
        let steps = look_at(&api).await;
        assert_eq!((steps.len(), steps[0].result), (1, Outcome::Unknown), "{steps:?}");
    }
}
