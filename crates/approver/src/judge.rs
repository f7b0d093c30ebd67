//! The decision about a request: a pure function of the request, the pod that it names, and the rules.
//!
//! Each name and attribute of the requested certificate is compared with the values that the rules derive from the pod object. The
//! annotations of a request only name the pod; they prove nothing. A denial that depends on the pod requires a live read of the pod,
//! because the watch may lag.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use agent_kube::pod::Pod;
use agent_runtime::{clock, text};
use cert_manager::{APPROVER, Condition, GROUP, IssuerRef, Request, USAGES, claims, csr, denied, keys, place};
use tokio::time::Instant;
use workload_identity::PodRef;

use crate::{
    active_rules::ActiveRules,
    retention::Settled,
    rules::{Expectation, Rules},
};

/// Maximum length of an excerpt of untrusted input in a denial, in characters.
const SHOWN: usize = 200;

/// Seconds after the end of a deleted pod's grace period for which its requests are approved. The kubelet stops the containers within the
/// grace period. It removes the pod's object some seconds later, and a node that is lost or compromised never does.
const TERMINATION_SLACK_SECONDS: i64 = 300;

/// The pod that a request names, and the source of the data.
#[derive(Debug, Clone, Copy)]
pub enum PodView<'a> {
    /// The pod from the watch. `None` if the watch has not reported it.
    Cached(Option<&'a Pod>),
    /// The pod from a read that began after the request was seen. `None` if the pod does not exist.
    Live(Option<&'a Pod>),
}

/// Result of judging a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Approve the request. The text names the pod and the SPIFFE ID, and becomes the message of the condition.
    Approve(String),
    /// Deny the request.
    Deny(Denial),
    /// The request is for an unguarded issuer, is decided already, or is being deleted.
    Ignore,
    /// The decision requires a live read of this pod.
    NeedsLiveRead(PodRef),
}

/// Reason of a denial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// One of [`denied`]; the reason of the condition and of the Event.
    pub code: &'static str,
    /// Cause and remedy for an operator; the message of the condition and of the Event.
    pub sentence: String,
}

/// Returns whether the approver has to decide a request.
pub fn is_ours(request: &Request, rules: &Rules) -> bool {
    let decided = |kind: &str| request.status.iter().flat_map(|s| &s.conditions).any(|c| c.kind == kind && c.status == "True");
    let over = decided("Approved") || decided("Denied") || decided("InvalidRequest") || request.metadata.deletion_timestamp.is_some();
    !over && rules.guard(&issuer(request), namespace(request))
}

/// Returns the reason of the `Approved` condition if another approver has approved a request of a guarded issuer.
pub fn approved_by_another<'a>(request: &'a Request, rules: &Rules) -> Option<&'a str> {
    let approval = request.status.as_ref()?.conditions.iter().find(|c| c.kind == "Approved" && c.status == "True")?;
    let reason = approval.reason.as_deref().unwrap_or_default();
    (reason != APPROVER && rules.guard(&issuer(request), namespace(request))).then_some(reason)
}

/// Returns whether a replica of this approver has decided a request, by the reason of the condition.
pub fn decided_by_a_replica(request: &Request) -> bool {
    let is_ours = |condition: &Condition| match (&*condition.kind, condition.reason.as_deref()) {
        ("Approved", Some(reason)) => reason == APPROVER,
        ("Denied", Some(reason)) => denied::ALL.contains(&reason),
        _ => false,
    };
    request.status.iter().flat_map(|status| &status.conditions).any(|condition| condition.status == "True" && is_ours(condition))
}

/// Returns the state of a decided request of a guarded issuer, at `now`. `None` for an undecided one, one that is being deleted, and any
/// other.
pub fn settled(request: &Request, rules: &Rules, now: SystemTime) -> Option<Settled> {
    if request.metadata.deletion_timestamp.is_some() || !rules.guard(&issuer(request), namespace(request)) {
        return None;
    }
    let conditions = || request.status.iter().flat_map(|status| &status.conditions);
    let is_end = |condition: &Condition| match (&*condition.kind, &*condition.status) {
        ("Denied" | "InvalidRequest" | "Ready", "True") => true,
        ("Ready", "False") => matches!(condition.reason.as_deref(), Some("Failed" | "Denied")),
        _ => false,
    };
    if let Some(end) = conditions().find(|condition| is_end(condition)) {
        // cert-manager keeps the time of the condition Ready when its reason changes from Pending to Failed.
        let failed = request.status.as_ref().and_then(|status| status.failure_time.as_deref());
        let time = if end.status == "False" { failed } else { end.last_transition_time.as_deref() };
        let since = time.and_then(|time| clock::since_rfc3339(time, now));
        return Some(Settled::Ended(since.unwrap_or_default()));
    }
    conditions().any(|condition| condition.kind == "Approved" && condition.status == "True").then_some(Settled::WaitsForSigner)
}

/// Returns the pod that a request names in its annotations. `None` if one of the three annotations is missing or empty.
pub fn evidence(request: &Request) -> Option<PodRef> {
    let annotation = |key: &str| request.metadata.annotations.as_ref()?.get(key).filter(|value| !value.is_empty());
    Some(PodRef {
        namespace: annotation(keys::POD_NAMESPACE)?.as_str().into(),
        name: annotation(keys::POD_NAME)?.as_str().into(),
        uid: annotation(keys::POD_UID)?.as_str().into(),
    })
}

/// Judges `request` by the newest rules, and if these do not approve it, by the superseded rules in force at `now`. Returns true with an
/// approval by superseded rules. If no rules approve the request, the result is that of the newest rules.
pub fn decide(request: &Request, view: PodView<'_>, active_rules: &ActiveRules, now: Instant) -> (Decision, bool) {
    if let Some(denial) = denied_node(request, active_rules) {
        return (Decision::Deny(denial), false);
    }
    let newest = judge(request, view, &active_rules.rules);
    if matches!(newest, Decision::Approve(_) | Decision::Ignore) {
        return (newest, false);
    }
    let by_superseded = active_rules.superseded(now).find_map(|rules| match judge(request, view, rules) {
        Decision::Approve(sentence) => {
            Some(Decision::Approve(format!("{sentence}, by a configuration replaced less than approver.overlap ago")))
        }
        _ => None,
    });
    match by_superseded {
        Some(approval) => (approval, true),
        None => (newest, false),
    }
}

/// Denies an undecided request if the requester's token claims a denied node.
fn denied_node(request: &Request, active_rules: &ActiveRules) -> Option<Denial> {
    let claimed = request.spec.extra.get(claims::NODE_NAME)?;
    let node = claimed.iter().find(|node| active_rules.denied_nodes.contains(*node))?;
    is_ours(request, &active_rules.rules).then(|| Denial {
        code: denied::NODE_DENIED,
        sentence: format!("node {} is in deniedNodes of the ConfigMap sds-agent: its agent gets no certificate", quoted(node)),
    })
}

/// Judges `request` by these rules.
pub fn judge(request: &Request, view: PodView<'_>, rules: &Rules) -> Decision {
    if !is_ours(request, rules) {
        return Decision::Ignore;
    }
    let asked = match request_alone(request, rules) {
        Ok(asked) => asked,
        Err(denial) => return Decision::Deny(denial),
    };
    let pod = match view {
        PodView::Cached(pod) | PodView::Live(pod) => pod.filter(|pod| pod.pod == asked.evidence),
    };
    match (with_pod(&asked, pod, rules), view) {
        (Ok(sentence), _) => Decision::Approve(sentence),
        (Err(_), PodView::Cached(_)) => Decision::NeedsLiveRead(asked.evidence),
        (Err(denial), PodView::Live(_)) => Decision::Deny(denial),
    }
}

/// Contents of a request that has passed the checks of [`request_alone`].
struct Asked<'a> {
    evidence: PodRef,
    node: &'a str,
    csr: csr::Asked,
    issuer: IssuerRef,
    namespace: &'a str,
    duration: &'a str,
    /// `creationTimestamp` of the request, in Unix seconds.
    created: Option<i64>,
}

/// The checks that need no pod: requester, claims, spec, annotations and CSR.
fn request_alone<'a>(request: &'a Request, rules: &Rules) -> Result<Asked<'a>, Denial> {
    let spec = &request.spec;
    let username = spec.username.as_deref().unwrap_or_default();
    if !rules.agents.contains(username) {
        return deny(
            denied::NOT_THE_AGENT,
            format!(
                "the requester is {}, and only sds-agent may use this issuer: use another issuer, or add the agent's service account to \
                 approver.agents",
                quoted(username)
            ),
        );
    }
    let node = claim(request, claims::NODE_NAME)?;
    // A token that is bound to a Node has the node's claims alone. An account that may create tokens could get one for any node.
    for name in [claims::NODE_UID, claims::POD_NAME, claims::POD_UID] {
        claim(request, name)?;
    }
    if let Some(field) = &spec.unknown.first {
        let sentence =
            format!("the spec has the field {}, which no agent sets and this version of the approver cannot judge", quoted(field));
        return deny(denied::INVALID_SPEC, sentence);
    }
    if spec.is_ca {
        return deny(denied::INVALID_SPEC, "isCA is set, and the approver denies CA certificates".to_owned());
    }
    if spec.usages != USAGES {
        let found = quoted(&spec.usages.join(", "));
        return deny(denied::INVALID_SPEC, format!("the usages are {found}, and have to be {:?} in this order", USAGES.join(", ")));
    }
    let annotations = request.metadata.annotations.iter().flatten();
    let is_expected = |key: &str| key.starts_with(keys::PREFIX) || rules.annotations.iter().any(|pattern| pattern.matches(key));
    if let Some((key, _)) = annotations.into_iter().find(|(key, _)| !is_expected(key)) {
        let sentence = format!(
            "the annotation {} is not an agent's, and an issuer may obey it: find the client that uses the agent's token; or, if another \
             component adds the annotation and the issuer ignores it, add it to approver.annotations",
            quoted(key)
        );
        return deny(denied::INVALID_ANNOTATION, sentence);
    }
    let pem = spec.request.pem().ok_or_else(|| invalid_csr("is not in base64, or is longer than 64 KiB"))?;
    let csr = csr::read(&pem).map_err(invalid_csr)?;
    let Some(evidence) = evidence(request) else {
        let keys = [keys::POD_NAMESPACE, keys::POD_NAME, keys::POD_UID].join(", ");
        return deny(denied::NO_EVIDENCE, format!("the request names no pod: an agent names it in the annotations {keys}"));
    };
    let duration = spec.duration.as_deref().unwrap_or_default();
    let created = request.metadata.creation_timestamp.as_ref().map(|time| time.0.as_second());
    Ok(Asked { evidence, node, csr, issuer: issuer(request), namespace: namespace(request), duration, created })
}

/// Returns a claim of the requester's token, which must have exactly one value.
fn claim<'a>(request: &'a Request, name: &str) -> Result<&'a str, Denial> {
    match request.spec.extra.get(name).map(Vec::as_slice) {
        Some([value]) if !value.is_empty() => Ok(value),
        found => {
            let times = found.map_or(0, <[String]>::len);
            let sentence = format!(
                "the requester's token has the claim {name} {times} times, not once: the agent must use its own pod's token, in a \
                 cluster whose tokens name the node (Kubernetes 1.30 or newer)"
            );
            deny(denied::WRONG_NODE, sentence)
        }
    }
}

/// The checks that need the pod. Returns the text of the approval.
fn with_pod(asked: &Asked<'_>, pod: Option<&Pod>, rules: &Rules) -> Result<String, Denial> {
    let Asked { evidence, node, .. } = asked;
    let shown = quoted(&evidence.to_string());
    let Some(pod) = pod else {
        return deny(
            denied::POD_GONE,
            format!("there is no pod {shown} with UID {}: it has been deleted or recreated", quoted(&evidence.uid)),
        );
    };
    if pod.ended {
        return deny(denied::POD_GONE, format!("pod {shown} has ended"));
    }
    // Both times are the API server's: no clock of a node, nor this process's, decides.
    if let Some((end, created)) = pod.deleted_at.zip(asked.created)
        && created > end + TERMINATION_SLACK_SECONDS
    {
        return deny(
            denied::POD_GONE,
            format!("pod {shown} was deleted, and its grace period ended {} s before this request was created", created - end),
        );
    }
    if pod.node_name.as_deref() != Some(*node) {
        let place = pod.node_name.as_deref().map_or_else(|| "on no node yet".to_owned(), |node| format!("on node {node}"));
        return deny(
            denied::WRONG_NODE,
            format!("pod {shown} is {place}, and the requester on node {}: an agent requests only for pods of its own node", quoted(node)),
        );
    }
    if pod.service_account.is_none() {
        return deny(
            denied::NO_SERVICE_ACCOUNT,
            format!("pod {shown} has no service account (static pods have none) and therefore no identity"),
        );
    }
    let expected = rules.expected(pod).map_err(|error| Denial { code: denied::PROFILE_MISMATCH, sentence: cut(&error.to_string()) })?;
    let mut nearest = None;
    for expectation in &expected {
        match difference(asked, expectation) {
            None => return Ok(format!("pod {shown} on node {} may have {}", quoted(node), asked.csr.uri)),
            // A difference to the expectation with the requested SPIFFE ID is the most specific one.
            Some(difference) if nearest.is_none() || asked.csr.uri == expectation.spiffe_id => {
                nearest.get_or_insert(difference);
            }
            Some(_) => {}
        }
    }
    Err(nearest
        .unwrap_or_else(|| Denial { code: denied::PROFILE_MISMATCH, sentence: format!("the approver has no profile for pod {shown}") }))
}

/// Returns the first field in which a request differs from `expected`.
fn difference(asked: &Asked<'_>, expected: &Expectation) -> Option<Denial> {
    let Asked { csr, .. } = asked;
    if csr.uri != expected.spiffe_id {
        let sentence = format!("the SPIFFE ID is {}, and the pod's is {:?}", quoted(&csr.uri), expected.spiffe_id);
        return Some(Denial { code: denied::WRONG_IDENTITY, sentence });
    }
    let sorted = |names: &[String]| {
        let mut names = names.to_vec();
        names.sort_unstable();
        names
    };
    let issuer = |issuer: &IssuerRef| format!("{}.{}/{}", issuer.kind, issuer.group, issuer.name);
    let lifetime = go_duration(asked.duration);
    let (field, found, wanted) = if sorted(&csr.dns_names) != sorted(&expected.dns_names) {
        ("DNS names are", csr.dns_names.join(", "), expected.dns_names.join(", "))
    } else if asked.issuer != expected.issuer {
        ("issuer is", issuer(&asked.issuer), issuer(&expected.issuer))
    } else if asked.namespace != expected.namespace {
        ("namespace is", asked.namespace.to_owned(), expected.namespace.clone())
    } else if lifetime != Some(expected.lifetime) {
        ("duration is", asked.duration.to_owned(), format!("{}s", expected.lifetime.as_secs()))
    } else if csr.key != expected.key {
        ("key is", csr.key.as_str().to_owned(), expected.key.as_str().to_owned())
    } else {
        return None;
    };
    let sentence = format!(
        "the {field} {}, and the approver's profile {} requires {:?}: give agents and approver the same configuration",
        quoted(&found),
        expected.profile,
        wanted
    );
    Some(Denial { code: denied::PROFILE_MISMATCH, sentence })
}

/// Parses a Go duration of whole seconds, such as `3600s` or `1h0m0s`.
fn go_duration(text: &str) -> Option<Duration> {
    let (mut seconds, mut rest) = (0_u64, text);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        let unit = match rest.as_bytes()[digits] {
            b'h' => 3600,
            b'm' => 60,
            b's' => 1,
            _ => return None,
        };
        seconds = seconds.checked_add(number.checked_mul(unit)?)?;
        rest = &rest[digits + 1..];
    }
    (!text.is_empty()).then(|| Duration::from_secs(seconds))
}

/// Returns the issuer of a request, with cert-manager's defaults for an empty kind or group.
fn issuer(request: &Request) -> IssuerRef {
    let told = &request.spec.issuer_ref;
    let or = |text: &str, default: &str| if text.is_empty() { default.to_owned() } else { text.to_owned() };
    IssuerRef { name: told.name.clone(), kind: or(&told.kind, "Issuer"), group: or(&told.group, GROUP) }
}

fn namespace(request: &Request) -> &str {
    place(request).0
}

fn deny<T>(code: &'static str, sentence: String) -> Result<T, Denial> {
    Err(Denial { code, sentence })
}

fn invalid_csr(why: impl fmt::Display) -> Denial {
    Denial {
        code: denied::INVALID_CSR,
        sentence: format!("the CSR {}. No agent sends such a CSR: find the client that uses its token", cut(&why.to_string())),
    }
}

/// Untrusted input, quoted, sanitised and truncated.
fn quoted(text: &str) -> String {
    format!("{:?}", cut(text))
}

fn cut(text: &str) -> String {
    text::excerpt(text, SHOWN)
}

#[cfg(test)]
pub(crate) mod tests;
