//! The steps about the issuer: its state, and the requests of this node that it refused or has not answered.
//!
//! Refused requests exist for about ten minutes. The agent's own functions explain their messages.

use agent_kube::{Call, Cause, Failure};
use agent_runtime::{
    clock::{self, Clock, SystemClock},
    text,
};
use cert_manager::{CertificateRequest, GROUP, IssuerRef, RequestNamespace, Status, keys, naming::Agent, verdict::Verdict};
use issuance::issuer::{
    Error,
    certificate_request::{self, Settings, vault},
};
use kube::{
    Api, Client,
    api::{ListParams, Object},
    core::{ApiResource, DynamicObject, GroupVersionKind, NotUsed},
};
use serde_json::Value;

use super::report::Step;
use crate::{
    cli::Exit,
    config::{Config, IssuerConfig},
};

/// Maximum number of requests in a report.
const SHOWN: usize = 5;
/// Seconds after which an undecided request is a failure.
const UNDECIDED: i64 = 30;
/// Maximum number of requests that are read.
const READ: u32 = 500;

type Request = Object<NotUsed, Status>;

/// Checks each issuer of cert-manager in the configuration, and this node's requests.
pub(super) async fn look(config: &Config) -> Vec<Step> {
    let issuers: Vec<&Settings> = config.issuers.values().filter_map(of_cert_manager).collect();
    if issuers.is_empty() {
        return Vec::new();
    }
    // An earlier step has reported that the cluster is not reachable.
    let Ok(client) = agent_kube::connect(&agent_kube::Metrics::default(), config.kubernetes).await else { return Vec::new() };
    let mut steps = Vec::new();
    let mut namespaces: Vec<&RequestNamespace> = Vec::new();
    for issuer in issuers {
        steps.push(self::issuer(config, &client, issuer).await);
        if !namespaces.contains(&&issuer.namespace) {
            namespaces.push(&issuer.namespace);
        }
    }
    for namespace in namespaces {
        steps.extend(requests(config, &client, namespace).await);
    }
    steps
}

pub(super) fn of_cert_manager(issuer: &IssuerConfig) -> Option<&Settings> {
    match issuer {
        IssuerConfig::CertManager(issuer) => Some(issuer),
        IssuerConfig::Embedded => None,
    }
}

async fn issuer(config: &Config, client: &Client, issuer: &Settings) -> Step {
    let (name, reference) = ("issuer", &issuer.issuer_ref);
    let title = format!("{} {}", reference.kind, reference.name);
    let namespace = match &issuer.namespace {
        RequestNamespace::Fixed(namespace) => Some(namespace.as_str()),
        RequestNamespace::Workload => None,
    };
    if let Err(error) = certificate_request::check(client, reference, namespace).await {
        let exit = if matches!(error, Error::Configuration(_)) { Exit::Usage } else { Exit::Unavailable };
        return Step::failed(name, exit, error.to_string(), "correct issuer.certManager.issuerRef, or what the message names");
    }
    if !reference.group.is_empty() && reference.group != GROUP {
        return Step::ok(name, format!("{title} of group {}: an external issuer, which is not checked", reference.group));
    }
    let of_cluster = reference.kind == "ClusterIssuer";
    if !of_cluster && namespace.is_none() {
        return Step::ok(name, format!("{title}: each workload's namespace has its own issuer"));
    }
    match get(client, reference, namespace.filter(|_| !of_cluster)).await {
        Ok(found) => judge(&title, &found.data, config.trust_domain.as_str()),
        Err(failure) if matches!(failure.cause, Cause::Rbac | Cause::Policy) => {
            Step::unknown(name, failure.to_string(), Some("grant the agent's service account the verb get on its issuers"))
        }
        Err(failure) => {
            Step::failed(name, Exit::Unavailable, failure.to_string(), "check that the API server runs and that this node can reach it")
        }
    }
}

async fn get(client: &Client, reference: &IssuerRef, namespace: Option<&str>) -> Result<DynamicObject, Failure> {
    let kind = if namespace.is_none() { "ClusterIssuer" } else { "Issuer" };
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(GROUP, "v1", kind));
    let api: Api<DynamicObject> = match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    let plural = if namespace.is_none() { "clusterissuers.cert-manager.io" } else { "issuers.cert-manager.io" };
    let call = Call { verb: "get", resource: plural, name: Some(&reference.name), namespace };
    api.get(&reference.name).await.map_err(|error| Failure::of(&error, &call))
}

/// Checks the object of an issuer.
fn judge(title: &str, issuer: &Value, trust_domain: &str) -> Step {
    let name = "issuer";
    let detail = format!("{title}: {}", authority(&issuer["spec"]));
    let conditions = issuer["status"]["conditions"].as_array();
    let ready = conditions.and_then(|all| all.iter().find(|condition| condition["type"] == "Ready"));
    let Some(ready) = ready else {
        return Step::failed(name, Exit::Unavailable, format!("{detail}; it has no Ready condition yet"), "check that cert-manager runs");
    };
    if ready["status"] == "True" {
        return Step::ok(name, format!("{detail}; Ready"));
    }
    let message = ready["message"].as_str().unwrap_or_default();
    let (said, remedy) = match vault::explain(message, trust_domain) {
        Some(finding) => (finding.said, finding.remedy),
        None => (one_line(message), format!("correct the issuer; for details run: kubectl describe {}", title.to_lowercase())),
    };
    Step::failed(name, Exit::Unavailable, format!("{detail}; not Ready: {said}"), remedy)
}

/// The certificate authority of the issuer, in words.
fn authority(spec: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    if let Some(vault) = spec.get("vault") {
        let auth = &vault["auth"];
        let auth = if auth["kubernetes"].is_object() {
            format!("Kubernetes auth as role {}", text(&auth["kubernetes"]["role"]))
        } else {
            let other = auth.as_object().and_then(|methods| methods.keys().next());
            other.map_or_else(|| "no auth".to_owned(), |method| format!("auth by {method}"))
        };
        return format!("Vault at {}, path {}, {auth}", text(&vault["server"]), text(&vault["path"]));
    }
    if let Some(ca) = spec.get("ca") {
        return format!("a CA in Secret {}", text(&ca["secretName"]));
    }
    let other = spec.as_object().and_then(|kinds| kinds.keys().next());
    other.map_or_else(|| "of no known type".to_owned(), |kind| format!("of type {kind}"))
}

async fn requests(config: &Config, client: &Client, namespace: &RequestNamespace) -> Vec<Step> {
    let name = "requests";
    let resource = ApiResource::erase::<CertificateRequest>(&());
    let (api, place): (Api<Request>, _) = match namespace {
        RequestNamespace::Fixed(namespace) => (Api::namespaced_with(client.clone(), namespace, &resource), Some(namespace.as_str())),
        RequestNamespace::Workload => (Api::all_with(client.clone(), &resource), None),
    };
    let agent = Agent::new(&config.node, agent_kube::token::node_uid().await, 0);
    let parameters = ListParams::default().labels(&agent.selector()).limit(READ);
    match api.list(&parameters).await {
        Ok(list) => {
            let now = i64::try_from(clock::unix_seconds(SystemClock.now())).unwrap_or(i64::MAX);
            vec![weigh(&list.items, config.trust_domain.as_str()), approver(&list.items, now)]
        }
        Err(error) => {
            let call = Call { verb: "list", resource: "certificaterequests.cert-manager.io", name: None, namespace: place };
            let failure = Failure::of(&error, &call);
            let exit = if matches!(failure.cause, Cause::Rbac | Cause::Policy) { Exit::NotPermitted } else { Exit::Unavailable };
            vec![Step::failed(name, exit, failure.to_string(), "grant the agent's service account what the message names")]
        }
    }
}

/// Checks that an approver decides requests. No API reports this, so the check uses the conditions of this node's requests. Signed
/// requests are deleted and show nothing.
fn approver(requests: &[Request], now: i64) -> Step {
    let name = "approver";
    let age = |request: &Request| now - request.metadata.creation_timestamp.as_ref().map_or(now, |time| time.0.as_second());
    let is_decided = |request: &Request| {
        let conditions = request.status.iter().flat_map(|status| &status.conditions);
        conditions
            .filter(|condition| condition.status == "True")
            .find(|condition| matches!(&*condition.kind, "Approved" | "Denied"))
            .cloned()
    };
    let waiting: Vec<&Request> = requests.iter().filter(|request| is_decided(request).is_none() && age(request) > UNDECIDED).collect();
    if let Some(oldest) = waiting.iter().max_by_key(|request| age(request)) {
        let of = |text: &Option<String>| text.clone().unwrap_or_else(|| "?".to_owned());
        let detail = format!(
            "no approver has decided {} of {} requests of this node; the oldest, {}/{}, is {} s old",
            waiting.len(),
            requests.len(),
            of(&oldest.metadata.namespace),
            of(&oldest.metadata.name),
            age(oldest)
        );
        let remedy = "run `sds-agent approver` (the Deployment sds-agent-approver); if it runs, its log shows why it does not decide these. \
                      cert-manager's own approver checks no names: with it, a compromised node gets any name signed (docs/security.md)";
        return Step::failed(name, Exit::Failed, detail, remedy);
    }
    match requests.iter().filter_map(is_decided).next_back() {
        Some(condition) => {
            let reason = condition.reason.as_deref().unwrap_or("no reason");
            Step::ok(name, format!("an approver runs: a request of this node was {} ({reason})", condition.kind.to_lowercase()))
        }
        None => {
            let detail = "not known: this node has no requests, because signed requests are deleted";
            Step::unknown(name, detail, Some("run this again while a certificate is requested"))
        }
    }
}

/// Checks the requests of a node: those that failed, and those that their issuer cannot sign at present.
fn weigh(requests: &[Request], trust_domain: &str) -> Step {
    let name = "requests";
    let mut troubles: Vec<_> = requests.iter().filter_map(|request| Trouble::of(request, trust_domain)).collect();
    if troubles.is_empty() {
        return Step::ok(name, format!("{} of this node, none of them refused in the last 10 minutes", requests.len()));
    }
    // Requests with a known remedy come first, then the newest.
    troubles.sort_by_key(|trouble| (trouble.remedy.is_none(), std::cmp::Reverse(trouble.created)));
    let mut lines: Vec<String> = troubles.iter().take(SHOWN).map(|trouble| trouble.line.clone()).collect();
    if troubles.len() > SHOWN {
        lines.push(format!("and {} more", troubles.len() - SHOWN));
    }
    let remedy = troubles.swap_remove(0).remedy;
    let remedy = remedy.unwrap_or_else(|| "see the message; for details run: kubectl describe certificaterequest".to_owned());
    Step::failed(name, Exit::Failed, lines.join("\n"), remedy)
}

struct Trouble {
    line: String,
    remedy: Option<String>,
    /// Seconds since the epoch.
    created: i64,
}

impl Trouble {
    fn of(request: &Request, trust_domain: &str) -> Option<Self> {
        let (what, message) = match Verdict::of(request.status.as_ref()) {
            Verdict::Failed(why) => ("failed", why.message),
            Verdict::Denied(why) => ("was denied", why.message),
            Verdict::Invalid(why) => ("is not valid", why.message),
            // A pending request without a known problem is in progress.
            Verdict::Pending { message, .. } if vault::explain(&message, trust_domain).is_some() => ("waits", message),
            Verdict::Pending { .. } | Verdict::Issued => return None,
        };
        let finding = vault::explain(&message, trust_domain);
        let metadata = &request.metadata;
        let whose = metadata.annotations.as_ref().and_then(|all| all.get(keys::SPIFFE_ID)).map_or("?", String::as_str);
        let at = format!("{}/{}", metadata.namespace.as_deref().unwrap_or("?"), metadata.name.as_deref().unwrap_or("?"));
        let words = finding.as_ref().map_or_else(|| one_line(&message), |finding| finding.said.clone());
        Some(Self {
            line: format!("{whose} {what}: {words} ({at})"),
            remedy: finding.map(|finding| finding.remedy),
            created: metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
        })
    }
}

fn one_line(message: &str) -> String {
    text::excerpt(message, text::MAX_MESSAGE_CHARS)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::doctor::report::Outcome;

    const REFUSED: &str = "Vault failed to sign certificate: failed to sign certificate by vault: Error making API request.\n\nURL: POST \
                           http://v:8200/v1/pki/sign/seed\nCode: 400. Errors:\n\n* role requires keys of type rsa";

    fn request(name: &str, created: &str, reason: &str, message: &str) -> Request {
        serde_json::from_value(json!({
            "apiVersion": "cert-manager.io/v1", "kind": "CertificateRequest",
            "metadata": {"namespace": "sds-agent", "name": name, "creationTimestamp": created,
                "annotations": {keys::SPIFFE_ID: "spiffe://example.org/ns/a/sa/b"}},
            "spec": {},
            "status": {"conditions": [{"type": "Ready", "status": "False", "reason": reason, "message": message}]},
        }))
        .unwrap()
    }

    #[test]
    fn refused_requests_are_told_with_what_the_role_lacks() {
        let fine = request("a", "2026-01-01T00:00:00Z", "Pending", "Waiting on certificate issuance from order x: \"pending\"");
        let step = weigh(std::slice::from_ref(&fine), "example.org");
        assert_eq!((step.result, step.detail.as_str()), (Outcome::Ok, "1 of this node, none of them refused in the last 10 minutes"));

        let other = request("c", "2026-01-01T00:00:09Z", "Failed", "out\nof ink");
        let step = weigh(&[fine, other, request("b", "2026-01-01T00:00:00Z", "Failed", REFUSED)], "example.org");
        let expected = "spiffe://example.org/ns/a/sa/b failed: Vault's role pki/roles/seed refuses the request (\"role requires keys of type \
                        rsa\") (sds-agent/b)\nspiffe://example.org/ns/a/sa/b failed: out of ink (sds-agent/c)";
        assert_eq!((step.result, step.detail.as_str()), (Outcome::Failed, expected));
        assert!(step.remedy.as_ref().unwrap().starts_with("the role lacks key_type=any;"), "{step:?}");
    }

    #[test]
    fn an_approver_is_known_by_what_became_of_requests() {
        let at = |seconds: i64| 1_767_225_600 + seconds;
        let plain = request("a", "2026-01-01T00:00:00Z", "Pending", "");
        let decided = |kind: &str| {
            let mut request = plain.clone();
            let condition = json!({"type": kind, "status": "True", "reason": "Policy", "message": "m"});
            request.status.as_mut().unwrap().conditions.push(serde_json::from_value(condition).unwrap());
            request
        };
        let step = approver(&[decided("Approved"), plain.clone()], at(45));
        assert!(
            step.result == Outcome::Failed && step.detail.ends_with("1 of 2 requests of this node; the oldest, sds-agent/a, is 45 s old")
        );
        assert_eq!(
            approver(&[decided("Approved"), plain.clone()], at(5)).detail,
            "an approver runs: a request of this node was approved (Policy)"
        );
        assert_eq!(approver(&[decided("Denied")], at(500)).result, Outcome::Ok);
        assert_eq!((approver(&[], at(0)).result, approver(&[plain], at(5)).result), (Outcome::Unknown, Outcome::Unknown));
    }

    #[test]
    fn only_a_few_are_shown() {
        let many: Vec<_> = (0..9).map(|n| request(&n.to_string(), "2026-01-01T00:00:00Z", "Failed", "x")).collect();
        let step = weigh(&many, "example.org");
        assert_eq!(step.detail.lines().count(), SHOWN + 1);
        assert!(step.detail.ends_with("and 4 more") && step.remedy.is_some(), "{step:?}");
    }

    #[test]
    fn an_issuer_is_described_and_its_trouble_explained() {
        let vault =
            json!({"vault": {"server": "http://v:8200", "path": "pki/sign/mesh", "auth": {"kubernetes": {"role": "cert-manager"}}}});
        let words = "ClusterIssuer m: Vault at http://v:8200, path pki/sign/mesh, Kubernetes auth as role cert-manager";
        let condition = |status: &str, message: &str| json!({"conditions": [{"type": "Ready", "status": status, "message": message}]});
        let step = judge("ClusterIssuer m", &json!({"spec": vault, "status": condition("True", "Vault verified")}), "example.org");
        assert_eq!((step.result, step.detail), (Outcome::Ok, format!("{words}; Ready")));

        let message = "Failed to initialize Vault client: while requesting a Vault token using the Kubernetes auth: error calling Vault \
                       server: Error making API request.\n\nURL: POST http://v:8200/v1/auth/kubernetes/login\nCode: 403. Errors:\n\n\
                       * permission denied";
        let step = judge("ClusterIssuer m", &json!({"spec": vault, "status": condition("False", message)}), "example.org");
        assert_eq!(step.result, Outcome::Failed);
        assert!(step.detail.starts_with(&format!("{words}; not Ready: cert-manager could not log in")), "{step:?}");
        assert!(step.remedy.unwrap().contains("bound_service_account_names"));

        for (spec, words) in [
            (json!({"ca": {"secretName": "s"}}), "a CA in Secret s"),
            (json!({"acme": {}}), "of type acme"),
            (json!({"vault": {"auth": {"appRole": {}}}}), "Vault at ?, path ?, auth by appRole"),
        ] {
            assert_eq!(authority(&spec), words);
        }
        assert_eq!(judge("Issuer m", &json!({"spec": {}}), "example.org").result, Outcome::Failed);
    }
}
