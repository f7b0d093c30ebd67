//! Each check of a request, tested by one change to a request that is approved without the change.

use std::{collections::BTreeMap, sync::Arc};

use agent_runtime::text::test_keys::Key;
use base64::{Engine, engine::general_purpose::STANDARD};
use cert_manager::{CertificateRequestSpec, Condition, Csr, Reference, RequestNamespace, Status};
use serde_json::json;
use workload_identity::{IssuerName, KeyType, Labels, Pattern, Profile, Resolver, TrustDomain};

use super::*;
use crate::rules::Guarded;

const AGENT: &str = "system:serviceaccount:sds-agent:sds-agent";

pub(crate) fn issuer_ref() -> IssuerRef {
    IssuerRef { name: "mesh-ca".into(), kind: "ClusterIssuer".into(), group: "cert-manager.io".into() }
}

pub(crate) fn rules() -> Rules {
    let profile = Profile {
        name: "default".into(),
        issuer: IssuerName("default".into()),
        authority: "ClusterIssuer/mesh-ca".into(),
        key: KeyType::EcdsaP256,
        lifetime: Duration::from_secs(3600),
        renew_at: 0.5,
        jitter: 0.1,
        spiffe_id: "spiffe://{trustDomain}/ns/{namespace}/sa/{serviceAccount}".into(),
        dns_names: vec!["{serviceAccount}.{namespace}.svc".into(), "{serviceAccount}.{namespace}".into()],
        per_pod: false,
        epoch: 0,
    };
    let (issuer, namespace) = (issuer_ref(), RequestNamespace::Fixed("sds-agent".into()));
    Rules {
        agents: [AGENT.to_owned()].into(),
        issuers: vec![Guarded { name: IssuerName("default".into()), issuer, namespace }],
        resolver: Resolver::single(TrustDomain::new("cluster.local").unwrap(), Arc::new(profile)),
        annotations: Vec::new(),
        overlap: Duration::ZERO,
    }
}

pub(crate) fn pod() -> Pod {
    Pod {
        pod: PodRef { namespace: "shop".into(), name: "cart-1".into(), uid: "u-1".into() },
        node_name: Some("n1".into()),
        service_account: Some("cart".into()),
        labels: Labels::default(),
        picks: BTreeMap::new(),
        host_network: false,
        mirror: false,
        ended: false,
        deleted_at: None,
        containers: Vec::new(),
    }
}

fn csr(spiffe_id: &str, dns_names: &[&str], algorithm: &'static rcgen::SignatureAlgorithm) -> Csr {
    let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = vec![rcgen::SanType::URI(spiffe_id.try_into().unwrap())];
    params.subject_alt_names.extend(dns_names.iter().map(|name| rcgen::SanType::DnsName((*name).try_into().unwrap())));
    Csr::from_der(params.serialize_request(&key).unwrap().der())
}

/// The request of the agent on `n1` for [`pod`].
pub(crate) fn request() -> Request {
    let extra = [(claims::NODE_NAME, "n1"), (claims::NODE_UID, "node-uid"), (claims::POD_NAME, "sds-agent-x"), (claims::POD_UID, "a-1")];
    let spec = CertificateRequestSpec {
        issuer_ref: Reference::from(&issuer_ref()),
        request: csr("spiffe://cluster.local/ns/shop/sa/cart", &["cart.shop.svc", "cart.shop"], &rcgen::PKCS_ECDSA_P256_SHA256),
        duration: Some("1h0m0s".into()),
        is_ca: false,
        usages: USAGES.map(String::from).to_vec(),
        username: Some(AGENT.into()),
        extra: extra.map(|(key, value)| (key.to_owned(), vec![value.to_owned()])).into(),
        ..CertificateRequestSpec::default()
    };
    let mut request = Request::new("sds-1", spec);
    request.metadata.namespace = Some("sds-agent".into());
    request.metadata.uid = Some("cr-1".into());
    let pod = [(keys::POD_NAMESPACE, "shop"), (keys::POD_NAME, "cart-1"), (keys::POD_UID, "u-1")];
    request.metadata.annotations = Some(pod.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
    request
}

fn decide(request: &Request, pod: Option<&Pod>) -> Decision {
    judge(request, PodView::Live(pod), &rules())
}

/// The denial of a request with one change that is denied regardless of the pod.
pub(crate) fn denied_at_once(change: impl Fn(&mut Request)) -> Denial {
    let mut request = request();
    change(&mut request);
    let decisions = [PodView::Cached(None), PodView::Cached(Some(&pod())), PodView::Live(None)].map(|view| judge(&request, view, &rules()));
    match &decisions {
        [Decision::Deny(denial), b, c] if decisions[0] == *b && decisions[0] == *c => denial.clone(),
        _ => panic!("{decisions:?}"),
    }
}

/// The denial of a request with one change that depends on the pod, and so requires a live read.
fn denied(change: impl Fn(&mut Request), pod: Option<&Pod>) -> Denial {
    let mut request = request();
    change(&mut request);
    let uid = request.metadata.annotations.as_ref().unwrap()[keys::POD_UID].clone();
    let Decision::NeedsLiveRead(asked) = judge(&request, PodView::Cached(pod), &rules()) else { panic!("denied without a live read") };
    assert_eq!(&*asked.uid, uid);
    match decide(&request, pod) {
        Decision::Deny(denial) => denial,
        decision => panic!("{decision:?}"),
    }
}

fn annotate(key: &'static str, value: &'static str) -> impl Fn(&mut Request) {
    move |request| drop(request.metadata.annotations.as_mut().unwrap().insert(key.into(), value.into()))
}

fn asks(spiffe_id: &'static str, dns_names: &'static [&'static str]) -> impl Fn(&mut Request) {
    move |request| request.spec.request = csr(spiffe_id, dns_names, &rcgen::PKCS_ECDSA_P256_SHA256)
}

#[test]
fn a_request_for_a_pod_on_the_agents_node_is_approved() {
    let approved = Decision::Approve("pod \"shop/cart-1\" on node \"n1\" may have spiffe://cluster.local/ns/shop/sa/cart".into());
    for view in [PodView::Cached(Some(&pod())), PodView::Live(Some(&pod()))] {
        assert_eq!(judge(&request(), view, &rules()), approved);
    }
    assert_eq!(judge(&request(), PodView::Cached(None), &rules()), Decision::NeedsLiveRead(pod().pod));
    let mut seconds = request();
    seconds.spec.duration = Some("3600s".into());
    assert_eq!(decide(&seconds, Some(&pod())), approved);
}

#[test]
fn what_is_not_ours_or_decided_is_left_alone() {
    let with = |change: &dyn Fn(&mut Request)| {
        let mut request = request();
        change(&mut request);
        decide(&request, Some(&pod()))
    };
    let condition = |kind: &'static str, status: &'static str| {
        move |request: &mut Request| {
            let condition = Condition { kind: kind.into(), status: status.into(), ..Condition::default() };
            request.status = Some(Status { conditions: vec![condition], ..Status::default() });
        }
    };
    for change in [
        &(|r: &mut Request| r.spec.issuer_ref.name = "other".into()) as &dyn Fn(&mut Request),
        &|r| r.spec.issuer_ref.kind = "Issuer".into(),
        &|r| r.spec.issuer_ref.kind = String::new(),
        &|r| r.spec.issuer_ref.group = "example.com".into(),
        &condition("Approved", "True"),
        &condition("Denied", "True"),
        &condition("InvalidRequest", "True"),
        &|r| r.metadata.deletion_timestamp = Some(serde_json::from_str("\"2026-01-01T00:00:00Z\"").unwrap()),
    ] {
        assert_eq!(with(change), Decision::Ignore);
    }
    for change in [
        &(|r: &mut Request| r.spec.issuer_ref.group = String::new()) as &dyn Fn(&mut Request),
        &condition("Ready", "False"),
        &condition("Approved", "False"),
    ] {
        assert!(matches!(with(change), Decision::Approve(_)));
    }
}

#[test]
fn an_approval_by_another_is_noticed() {
    let approved = |reason: Option<&str>| {
        let mut request = request();
        let condition =
            Condition { kind: "Approved".into(), status: "True".into(), reason: reason.map(Into::into), ..Condition::default() };
        request.status = Some(Status { conditions: vec![condition], ..Status::default() });
        request
    };
    assert_eq!(approved_by_another(&request(), &rules()), None);
    assert_eq!(approved_by_another(&approved(Some(APPROVER)), &rules()), None);
    assert_eq!(approved_by_another(&approved(Some("cert-manager.io")), &rules()), Some("cert-manager.io"));
    assert_eq!(approved_by_another(&approved(None), &rules()), Some(""));
    let mut other = approved(Some("cert-manager.io"));
    other.spec.issuer_ref.name = "other".into();
    assert_eq!(approved_by_another(&other, &rules()), None);
}

#[test]
fn an_issuer_of_a_namespace_is_another_one_elsewhere() {
    let mut rules = rules();
    rules.issuers[0].issuer.kind = "Issuer".into();
    let mut request = request();
    request.spec.issuer_ref.kind = String::new();
    assert!(matches!(judge(&request, PodView::Live(Some(&pod())), &rules), Decision::Approve(_)));
    request.metadata.namespace = Some("elsewhere".into());
    assert_eq!(judge(&request, PodView::Live(Some(&pod())), &rules), Decision::Ignore);
    rules.issuers[0].namespace = RequestNamespace::Workload;
    let Decision::Deny(denial) = judge(&request, PodView::Live(Some(&pod())), &rules) else { panic!() };
    assert!(
        denial.sentence.starts_with("the namespace is \"elsewhere\", and the approver's profile default requires \"shop\": give"),
        "{denial:?}"
    );
}

#[test]
fn nobody_else_may_ask() {
    for name in
        [None, Some(""), Some("alice"), Some("system:serviceaccount:sds-agent:default"), Some("system:serviceaccount:shop:sds-agent")]
    {
        let denial = denied_at_once(|request| request.spec.username = name.map(Into::into));
        assert_eq!(denial.code, denied::NOT_THE_AGENT);
        assert!(denial.sentence.contains(&format!("the requester is {:?}, and only sds-agent", name.unwrap_or_default())), "{denial:?}");
    }
}

#[test]
fn the_claims_of_a_node_stand_there_exactly_once() {
    for name in [claims::NODE_NAME, claims::NODE_UID, claims::POD_NAME, claims::POD_UID] {
        for (values, times) in [(None, 0), (Some(vec![]), 0), (Some(vec!["n1", "n1"]), 2), (Some(vec!["n1", "n2"]), 2), (Some(vec![""]), 1)]
        {
            let denial = denied_at_once(|request| {
                request.spec.extra.remove(name);
                if let Some(values) = &values {
                    request.spec.extra.insert(name.into(), values.iter().map(|&v| v.to_owned()).collect());
                }
            });
            assert_eq!(denial.code, denied::WRONG_NODE);
            assert!(
                denial.sentence.starts_with(&format!("the requester's token has the claim {name} {times} times, not once")),
                "{denial:?}"
            );
        }
    }
}

#[test]
fn the_requests_own_fields_are_an_agents() {
    assert_eq!(denied_at_once(|request| request.spec.is_ca = true).code, denied::INVALID_SPEC);
    let newer = denied_at_once(|request| {
        let mut spec = serde_json::to_value(&request.spec).unwrap();
        spec["nameConstraints"] = json!({"permitted": ["*"]});
        request.spec = serde_json::from_value(spec).unwrap();
    });
    assert_eq!(newer.code, denied::INVALID_SPEC);
    assert!(newer.sentence.starts_with("the spec has the field \"nameConstraints\""), "{newer:?}");
    for usages in [vec![], vec!["cert sign"], vec!["digital signature", "key encipherment", "client auth", "server auth"]] {
        let denial = denied_at_once(|request| request.spec.usages = usages.iter().map(|&u| u.to_owned()).collect());
        assert_eq!(denial.code, denied::INVALID_SPEC);
        assert!(denial.sentence.starts_with(&format!("the usages are {:?}, and have to be", usages.join(", "))), "{denial:?}");
    }
    let mut more = USAGES.map(String::from).to_vec();
    more.push("cert sign".into());
    assert_eq!(denied_at_once(|request| request.spec.usages = more.clone()).code, denied::INVALID_SPEC);
    let invalid = denied_at_once(|request| request.spec.request = serde_json::from_str("\"no base64\"").unwrap());
    assert_eq!(
        invalid,
        Denial {
            code: denied::INVALID_CSR,
            sentence: "the CSR is not in base64, or is longer than 64 KiB. No agent sends such a CSR: find the client that uses its token"
                .into()
        }
    );
    assert_eq!(denied_at_once(|request| request.spec.request = Csr::from_der(&[0x30, 0])).code, denied::INVALID_CSR);
    for key in [keys::POD_NAMESPACE, keys::POD_NAME, keys::POD_UID] {
        assert_eq!(denied_at_once(|request| drop(request.metadata.annotations.as_mut().unwrap().remove(key))).code, denied::NO_EVIDENCE);
        assert_eq!(denied_at_once(annotate(key, "")).code, denied::NO_EVIDENCE);
    }
    assert_eq!(denied_at_once(|request| request.metadata.annotations = None).code, denied::NO_EVIDENCE);
}

#[test]
fn annotations_of_others_are_no_agents() {
    let denial = denied_at_once(annotate("venafi.cert-manager.io/custom-fields", "[]"));
    assert_eq!(denial.code, denied::INVALID_ANNOTATION);
    assert!(denial.sentence.starts_with("the annotation \"venafi.cert-manager.io/custom-fields\" is not an agent's"), "{denial:?}");
    // Annotations of later versions of the agent are allowed too.
    let mut request = request();
    annotate("sds-agent.io/later", "x")(&mut request);
    assert!(matches!(decide(&request, Some(&pod())), Decision::Approve(_)));

    let told = Rules { annotations: [Pattern::parse("policies.example/*").unwrap()].into(), ..rules() };
    annotate("policies.example/mutated", "yes")(&mut request);
    assert!(matches!(judge(&request, PodView::Live(Some(&pod())), &told), Decision::Approve(_)));
    annotate("other.example/mutated", "yes")(&mut request);
    assert!(matches!(judge(&request, PodView::Live(Some(&pod())), &told), Decision::Deny(_)));
}

#[test]
fn a_pod_that_is_not_there_any_more_is_gone_whichever_way() {
    let same = |_: &mut Request| {};
    assert_eq!(
        denied(same, None),
        Denial {
            code: denied::POD_GONE,
            sentence: "there is no pod \"shop/cart-1\" with UID \"u-1\": it has been deleted or recreated".into()
        }
    );
    let anew = Pod { pod: PodRef { uid: "u-2".into(), ..pod().pod }, ..pod() };
    assert_eq!(denied(same, Some(&anew)).code, denied::POD_GONE);
    // The UID of one pod under the name of another.
    for (key, value) in [(keys::POD_NAME, "victim"), (keys::POD_NAMESPACE, "victims")] {
        assert_eq!(denied(annotate(key, value), Some(&pod())).code, denied::POD_GONE);
    }
    let ended = denied(same, Some(&Pod { ended: true, ..pod() }));
    assert_eq!(ended, Denial { code: denied::POD_GONE, sentence: "pod \"shop/cart-1\" has ended".into() });
}

#[test]
fn a_pod_of_another_node_or_without_an_account_is_nobodys() {
    let same = |_: &mut Request| {};
    let elsewhere = denied(same, Some(&Pod { node_name: Some("n2".into()), ..pod() }));
    assert_eq!(elsewhere.code, denied::WRONG_NODE);
    assert!(elsewhere.sentence.starts_with("pod \"shop/cart-1\" is on node n2, and the requester on node \"n1\""), "{elsewhere:?}");
    assert_eq!(denied(same, Some(&Pod { node_name: None, ..pod() })).code, denied::WRONG_NODE);
    assert_eq!(denied(same, Some(&Pod { service_account: None, ..pod() })).code, denied::NO_SERVICE_ACCOUNT);
}

#[test]
fn names_are_exactly_the_pods() {
    const ID: &str = "spiffe://cluster.local/ns/shop/sa/cart";
    for id in
        ["spiffe://cluster.local/ns/shop/sa/root", "spiffe://cluster.local/ns/shop/sa/cart/", "spiffe://CLUSTER.local/ns/shop/sa/cart"]
    {
        let denial = denied(|r| r.spec.request = csr(id, &["cart.shop.svc", "cart.shop"], &rcgen::PKCS_ECDSA_P256_SHA256), Some(&pod()));
        assert_eq!(denial, Denial { code: denied::WRONG_IDENTITY, sentence: format!("the SPIFFE ID is {id:?}, and the pod's is {ID:?}") });
    }
    for names in [&[][..], &["cart.shop.svc"], &["cart.shop.svc", "cart.shop", "api.bank.svc"], &["cart.shop.svc", "*.shop"]] {
        let denial = denied(asks(ID, names), Some(&pod()));
        assert_eq!(denial.code, denied::PROFILE_MISMATCH);
        let expected = format!(
            "the DNS names are {:?}, and the approver's profile default requires \"cart.shop.svc, cart.shop\": give",
            names.join(", ")
        );
        assert!(denial.sentence.starts_with(&expected), "{denial:?}");
    }
    let mut turned = request();
    asks(ID, &["cart.shop", "cart.shop.svc"])(&mut turned);
    assert!(matches!(decide(&turned, Some(&pod())), Decision::Approve(_)), "the order of DNS names does not matter");
}

#[test]
fn another_configuration_is_told_by_field_and_by_both_values() {
    let denial = denied(|request| request.metadata.namespace = Some("shop".into()), Some(&pod()));
    assert!(
        denial.sentence.starts_with("the namespace is \"shop\", and the approver's profile default requires \"sds-agent\": give"),
        "{denial:?}"
    );
    for duration in [None, Some("24h"), Some("3601s"), Some("1h0m0.5s"), Some("-1h"), Some("99999999999999999999h"), Some("")] {
        let denial = denied(|request| request.spec.duration = duration.map(Into::into), Some(&pod()));
        assert_eq!(denial.code, denied::PROFILE_MISMATCH);
        let expected =
            format!("the duration is {:?}, and the approver's profile default requires \"3600s\": give", duration.unwrap_or_default());
        assert!(denial.sentence.starts_with(&expected), "{denial:?}");
    }
    let p384 = |request: &mut Request| {
        let names = &["cart.shop.svc", "cart.shop"];
        request.spec.request = csr("spiffe://cluster.local/ns/shop/sa/cart", names, &rcgen::PKCS_ECDSA_P384_SHA384);
    };
    let denial = denied(p384, Some(&pod()));
    assert!(
        denial.sentence.starts_with("the key is \"ecdsa-p384\", and the approver's profile default requires \"ecdsa-p256\": give"),
        "{denial:?}"
    );

    // A guarded issuer, but of another profile.
    let mut rules = rules();
    let mut payments = rules.issuers[0].clone();
    payments.name = IssuerName("payments".into());
    payments.issuer.name = "payments-ca".into();
    rules.issuers.push(payments);
    let mut request = request();
    request.spec.issuer_ref.name = "payments-ca".into();
    let Decision::Deny(denial) = judge(&request, PodView::Live(Some(&pod())), &rules) else { panic!() };
    let expected = "the issuer is \"ClusterIssuer.cert-manager.io/payments-ca\", and the approver's profile default requires \
                    \"ClusterIssuer.cert-manager.io/mesh-ca\": give agents and approver the same configuration";
    assert_eq!(denial, Denial { code: denied::PROFILE_MISMATCH, sentence: expected.into() });
}

#[test]
fn what_others_wrote_is_shown_tame_and_bounded() {
    let denial = denied_at_once(|request| request.spec.username = Some(format!("x\n\u{1b}[31m{}", "ü".repeat(100_000))));
    assert!(denial.sentence.len() < 2000 && !denial.sentence.contains(['\n', '\u{1b}']), "{denial:?}");
}

#[test]
fn durations_are_read_as_go_writes_them() {
    for (text, seconds) in [("3600s", Some(3600)), ("1h0m0s", Some(3600)), ("24h", Some(86_400)), ("1m30s", Some(90)), ("0s", Some(0))] {
        assert_eq!(go_duration(text), seconds.map(Duration::from_secs), "{text}");
    }
    for text in ["", "h", "1", "1d", "1h ", " 1h", "1.5h", "1ms", "+1h", "1hh", "18446744073709551615h", "١h"] {
        assert_eq!(go_duration(text), None, "{text}");
    }
}

#[test]
fn a_key_in_a_request_is_not_in_its_denial() {
    let key = Key::ecdsa();
    for (name, text) in key.some_texts() {
        let in_each = [
            denied_at_once(|request| request.spec.username = Some(text.clone())),
            denied_at_once(|request| request.spec.usages = vec![text.clone()]),
            denied_at_once(|request| drop(request.metadata.annotations.get_or_insert_default().insert(text.clone(), text.clone()))),
            denied_at_once(|request| request.spec.request = serde_json::from_value(json!(STANDARD.encode(&text))).unwrap()),
            denied_at_once(|request| request.spec.request = serde_json::from_value(json!(text)).unwrap()),
        ];
        for denial in in_each {
            key.assert_tame(name, &format!("{denial:?}"));
        }
    }
}

#[test]
fn a_denied_node_gets_nothing_by_any_rules() {
    let later = Rules { overlap: Duration::from_secs(600), ..rules() };
    let now = Instant::now();
    let former = ActiveRules::new(rules()).replaced(later, now);
    let (request, pod) = (request(), pod());
    let decide = |active_rules: &ActiveRules| super::decide(&request, PodView::Cached(Some(&pod)), active_rules, now).0;
    assert!(matches!(decide(&former.denying(["n2".to_owned()].into())), Decision::Approve(_)));
    let Decision::Deny(denial) = decide(&former.denying(["n1".to_owned()].into())) else { panic!("not denied") };
    assert_eq!(denial.code, denied::NODE_DENIED);
    assert_eq!(denial.sentence, "node \"n1\" is in deniedNodes of the ConfigMap sds-agent: its agent gets no certificate");
    // Rules that follow keep the denied nodes, and no rule is needed to deny a request that names several nodes.
    let next = former.denying(["n1".to_owned()].into()).replaced(rules(), now);
    assert!(matches!(decide(&next), Decision::Deny(_)));
    let mut two = request.clone();
    two.spec.extra.insert(claims::NODE_NAME.to_owned(), vec!["n0".to_owned(), "n1".to_owned()]);
    assert!(
        matches!(super::decide(&two, PodView::Cached(None), &next, now).0, Decision::Deny(denial) if denial.code == denied::NODE_DENIED)
    );
    // Requests of other issuers are not the approver's.
    let mut other = request.clone();
    other.spec.issuer_ref.name = "other".into();
    assert_eq!(super::decide(&other, PodView::Cached(None), &next, now).0, Decision::Ignore);
}

/// `deletionTimestamp` is the end of the grace period.
#[test]
fn a_deleted_pod_is_renewed_to_the_end_of_its_grace_period_and_not_after() {
    const END: i64 = 1_800_000_000;
    let deleted = Pod { deleted_at: Some(END), ..pod() };
    let at = |created: i64| {
        move |request: &mut Request| {
            let created = k8s_openapi::jiff::Timestamp::from_second(created).unwrap();
            request.metadata.creation_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(created));
        }
    };
    for created in [END - 600, END, END + 300] {
        let mut request = request();
        at(created)(&mut request);
        assert!(matches!(decide(&request, Some(&deleted)), Decision::Approve(_)), "{created}");
    }
    let denial = denied(at(END + 301), Some(&deleted));
    assert_eq!(denial.code, denied::POD_GONE);
    assert!(denial.sentence.contains("ended 301 s before this request was created"), "{}", denial.sentence);
}
