//! The decision: a pure function of the request, what is known of its pod, and the rules.
//!
//! Everything that a certificate will say is checked here against what the pod may have, derived anew from the pod itself. The names in
//! a request's labels and annotations lead to the evidence; none of them is believed. A denial that rests on a pod's absence or on its
//! facts is made only from a live read: the watch may be behind.

use std::{fmt, time::Duration};

use agent_kube::pod::Pod;
use agent_runtime::text;
use cert_manager::{APPROVER, Condition, GROUP, IssuerRef, Request, USAGES, claims, csr, denied, keys, place};
use tokio::time::Instant;
use workload_identity::PodRef;

use crate::{
    active_rules::ActiveRules,
    rules::{Expectation, Rules},
};

/// No sentence of a denial repeats more of what others wrote than this, in characters.
const SHOWN: usize = 200;

/// What is known of the pod that a request names.
#[derive(Debug, Clone, Copy)]
pub enum PodView<'a> {
    /// What the watch tells; none where it has not seen the pod.
    Cached(Option<&'a Pod>),
    /// What a read that began after the request was seen told; none where there is no such pod.
    Live(Option<&'a Pod>),
}

/// What becomes of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// It gets its certificate. The sentence says for whom.
    Approve(String),
    /// It does not.
    Deny(Denial),
    /// It is none of ours, or decided already.
    Ignore,
    /// Only a live read of this pod can tell.
    NeedsLiveRead(PodRef),
}

/// Why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// One of [`denied`].
    pub code: &'static str,
    /// For people: what is wrong, and what to do.
    pub sentence: String,
}

/// Whether the approver has to decide about a request at all.
pub fn is_ours(request: &Request, rules: &Rules) -> bool {
    let decided = |kind: &str| request.status.iter().flat_map(|s| &s.conditions).any(|c| c.kind == kind && c.status == "True");
    let over = decided("Approved") || decided("Denied") || decided("InvalidRequest") || request.metadata.deletion_timestamp.is_some();
    !over && rules.guard(&issuer(request), namespace(request))
}

/// Who else has approved a request that was the approver's to decide: the reason of the condition.
pub fn approved_by_another<'a>(request: &'a Request, rules: &Rules) -> Option<&'a str> {
    let approval = request.status.as_ref()?.conditions.iter().find(|c| c.kind == "Approved" && c.status == "True")?;
    let reason = approval.reason.as_deref().unwrap_or_default();
    (reason != APPROVER && rules.guard(&issuer(request), namespace(request))).then_some(reason)
}

/// Whether an approver of this kind has decided about a request, as its reasons tell.
pub fn decided_by_a_replica(request: &Request) -> bool {
    let is_ours = |condition: &Condition| match (&*condition.kind, condition.reason.as_deref()) {
        ("Approved", Some(reason)) => reason == APPROVER,
        ("Denied", Some(reason)) => denied::ALL.contains(&reason),
        _ => false,
    };
    request.status.iter().flat_map(|status| &status.conditions).any(|condition| condition.status == "True" && is_ours(condition))
}

/// The pod that a request names as its evidence; none where the annotations do not say.
pub fn evidence(request: &Request) -> Option<PodRef> {
    let annotation = |key: &str| request.metadata.annotations.as_ref()?.get(key).filter(|value| !value.is_empty());
    Some(PodRef {
        namespace: annotation(keys::POD_NAMESPACE)?.as_str().into(),
        name: annotation(keys::POD_NAME)?.as_str().into(),
        uid: annotation(keys::POD_UID)?.as_str().into(),
    })
}

/// Decides about `request` by the newest rules, and where these do not approve it, by the former ones that still count at `now`; whether
/// it is by those that it is approved. What no rule approves is denied in the words of the newest.
pub fn decide(request: &Request, view: PodView<'_>, active_rules: &ActiveRules, now: Instant) -> (Decision, bool) {
    let newest = judge(request, view, &active_rules.rules);
    if matches!(newest, Decision::Approve(_) | Decision::Ignore) {
        return (newest, false);
    }
    let by_superseded = active_rules.superseded(now).find_map(|rules| match judge(request, view, rules) {
        Decision::Approve(sentence) => Some(Decision::Approve(format!("{sentence}, by a configuration that was replaced lately"))),
        _ => None,
    });
    match by_superseded {
        Some(approval) => (approval, true),
        None => (newest, false),
    }
}

/// Decides about `request` by these rules.
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

/// What a request says, found to be an agent's and of the form that agents give it.
struct Asked<'a> {
    evidence: PodRef,
    node: &'a str,
    csr: csr::Asked,
    issuer: IssuerRef,
    namespace: &'a str,
    duration: &'a str,
}

/// All that needs no pod.
fn request_alone<'a>(request: &'a Request, rules: &Rules) -> Result<Asked<'a>, Denial> {
    let spec = &request.spec;
    let username = spec.username.as_deref().unwrap_or_default();
    if !rules.agents.contains(username) {
        return deny(
            denied::NOT_THE_AGENT,
            format!(
                "{} asks, and only sds-agent may use this issuer: use another issuer, or add the agent's service account to approver.agents",
                quoted(username)
            ),
        );
    }
    let node = claim(request, claims::NODE_NAME)?;
    claim(request, claims::NODE_UID)?;
    if spec.is_ca {
        return deny(denied::INVALID_SPEC, "isCA is set, and nobody gets a CA's certificate here".to_owned());
    }
    if spec.usages != USAGES {
        let found = quoted(&spec.usages.join(", "));
        return deny(denied::INVALID_SPEC, format!("the usages are {found}, and have to be {:?} in this order", USAGES.join(", ")));
    }
    let annotations = request.metadata.annotations.iter().flatten();
    let is_expected = |key: &str| key.starts_with(keys::PREFIX) || rules.annotations.iter().any(|pattern| pattern.matches(key));
    if let Some((key, _)) = annotations.into_iter().find(|(key, _)| !is_expected(key)) {
        let sentence = format!(
            "the annotation {} is not an agent's, and an issuer may take orders from it: see who uses the agent's token; or, where something in \
             the cluster adds it and the issuer does not read it, name it in approver.annotations",
            quoted(key)
        );
        return deny(denied::INVALID_ANNOTATION, sentence);
    }
    let pem = spec.request.pem().ok_or_else(|| invalid_csr("is not in base64, or is longer than 64 KiB"))?;
    let csr = csr::read(&pem).map_err(invalid_csr)?;
    let Some(evidence) = evidence(request) else {
        let keys = [keys::POD_NAMESPACE, keys::POD_NAME, keys::POD_UID].join(", ");
        return deny(
            denied::NO_EVIDENCE,
            format!("the request names no pod: an agent says by the annotations {keys} for which one it asks"),
        );
    };
    let duration = spec.duration.as_deref().unwrap_or_default();
    Ok(Asked { evidence, node, csr, issuer: issuer(request), namespace: namespace(request), duration })
}

/// A claim of the requester's token, which stands there exactly once.
fn claim<'a>(request: &'a Request, name: &str) -> Result<&'a str, Denial> {
    match request.spec.extra.get(name).map(Vec::as_slice) {
        Some([value]) if !value.is_empty() => Ok(value),
        found => {
            let times = found.map_or(0, <[String]>::len);
            let sentence = format!(
                "the requester's token has the claim {name} {times} times, not once: the agent has to ask with its own pod's token, \
                 of a cluster whose tokens name nodes (Kubernetes 1.30 or newer)"
            );
            deny(denied::WRONG_NODE, sentence)
        }
    }
}

/// All that is about the pod; what is approved, in words.
fn with_pod(asked: &Asked<'_>, pod: Option<&Pod>, rules: &Rules) -> Result<String, Denial> {
    let Asked { evidence, node, .. } = asked;
    let shown = quoted(&evidence.to_string());
    let Some(pod) = pod else {
        return deny(
            denied::POD_GONE,
            format!("there is no pod {shown} with UID {}: it has been deleted or made anew", quoted(&evidence.uid)),
        );
    };
    if pod.ended {
        return deny(denied::POD_GONE, format!("pod {shown} has ended"));
    }
    if pod.node_name.as_deref() != Some(*node) {
        let place = pod.node_name.as_deref().map_or_else(|| "on no node yet".to_owned(), |node| format!("on node {node}"));
        return deny(
            denied::WRONG_NODE,
            format!("pod {shown} is {place}, and the requester on node {}: an agent asks for the pods of its own node only", quoted(node)),
        );
    }
    if pod.service_account.is_none() {
        return deny(
            denied::NO_SERVICE_ACCOUNT,
            format!("pod {shown} has no service account, as static pods have none, and so no identity"),
        );
    }
    let expected = rules.expected(pod).map_err(|error| Denial { code: denied::PROFILE_MISMATCH, sentence: cut(&error.to_string()) })?;
    let mut nearest = None;
    for expectation in &expected {
        match difference(asked, expectation) {
            None => return Ok(format!("pod {shown} on node {} may have {}", quoted(node), asked.csr.uri)),
            // The one with the right name says most about what is wrong.
            Some(difference) if nearest.is_none() || asked.csr.uri == expectation.spiffe_id => {
                nearest.get_or_insert(difference);
            }
            Some(_) => {}
        }
    }
    Err(nearest
        .unwrap_or_else(|| Denial { code: denied::PROFILE_MISMATCH, sentence: format!("no profile of the approver's is for pod {shown}") }))
}

/// The first field in which a request differs from what is expected of it.
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
        "the {field} {}, and by the approver's profile {} {wanted:?}: give agents and approver the same configuration",
        quoted(&found),
        expected.profile
    );
    Some(Denial { code: denied::PROFILE_MISMATCH, sentence })
}

/// A duration as Go writes whole seconds: `3600s`, `1h0m0s`.
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

/// The issuer of a request, with cert-manager's defaults for what it leaves out.
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
        sentence: format!("the CSR {}. No agent asks like this: see who uses its token", cut(&why.to_string())),
    }
}

/// What another wrote, in quotes, tame and bounded.
fn quoted(text: &str) -> String {
    format!("{:?}", cut(text))
}

fn cut(text: &str) -> String {
    text::excerpt(text, SHOWN)
}

#[cfg(test)]
pub(crate) mod tests;
