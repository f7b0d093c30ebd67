//! The approver without the policy.

use rcgen::SanType;
use serde_json::json;
use test_harness::{
    ask::{Ask, condition, denied, dns, issued, uri},
    cluster::Pod,
    eventually,
    world::{GUARDED, NAMESPACE, PATIENCE, World},
};

/// An attacker with the token of node A's agent requests everything that it must not get. All requests exist in the API server before the
/// approver's first decision.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stolen_token_gets_the_names_of_its_nodes_pods_and_nothing_else() {
    let world = World::start(GUARDED).await;
    let approver = world.approver("approver-0", "24h").await;
    let [a, b] = [world.cluster.node().await, world.cluster.node().await];
    let agent = world.actor("agent-a", "sds-agent", &a).await;
    let shop = world.cluster.namespace().await;
    let cluster = &world.cluster;

    let here = cluster.pod(&shop, "here", &a).await;
    let there = cluster.pod(&shop, "there", &b).await;
    let nowhere = cluster.unbound_pod(&shop, "nowhere").await;
    let ended = cluster.pod(&shop, "ended", &a).await;
    cluster.patch(&format!("{}/status", ended.path()), &json!({"status": {"phase": "Succeeded"}})).await;
    let mirror = cluster.mirror_pod(&shop, "static", &a, "11111111-2222-3333-4444-555555555555").await;
    let uid = cluster.get(&mirror.path()).await["metadata"]["uid"].as_str().unwrap().to_owned();
    let mirror = Pod { uid, service_account: "here".to_owned(), ..mirror };
    let invented = Pod { name: "invented".into(), uid: "99999999-8888-7777-6666-555555555555".into(), ..here.clone() };
    let made_anew = Pod { uid: "99999999-8888-7777-6666-555555555555".into(), ..here.clone() };
    let as_another = Pod { name: there.name.clone(), ..here.clone() };

    let good = || Ask::of(&agent, &here);
    let other_name = SanType::OtherName((vec![1, 3, 6, 1, 4, 1, 311, 20, 2, 3], "root@corp".into()));
    // Name constraints (RFC 5280, 4.2.1.10) with one permitted DNS name. cert-manager copies the bytes unparsed.
    let constraints = [0x30, 0x09, 0xa0, 0x07, 0x30, 0x05, 0x82, 0x03, b'c', b'o', b'm'];
    let cases = [
        ("a pod of another node", Ask::of(&agent, &there), "WrongNode"),
        ("a pod of no node", Ask::of(&agent, &nowhere), "WrongNode"),
        ("another node's label as well", Ask::of(&agent, &there).label(&b).annotation("sds-agent.io/node-name", &b), "WrongNode"),
        ("an invented pod", Ask::of(&agent, &invented), "PodGone"),
        ("a pod that was recreated", Ask::of(&agent, &made_anew), "PodGone"),
        ("one pod's UID under another's name", Ask::of(&agent, &as_another), "PodGone"),
        ("a pod that has ended", Ask::of(&agent, &ended), "PodGone"),
        ("a static pod", Ask::of(&agent, &mirror), "NoServiceAccount"),
        ("no pod", good().annotation("sds-agent.io/pod-uid", ""), "NoEvidence"),
        ("another account's identity", good().named(uri(&there.spiffe_id())), "WrongIdentity"),
        ("another trust domain", good().named(uri(&here.spiffe_id().replace("cluster.local", "corp.example"))), "WrongIdentity"),
        ("a second identity", good().and(uri(&there.spiffe_id())), "InvalidCsr"),
        ("a DNS name", good().and(dns("api.bank.svc")), "ProfileMismatch"),
        ("an otherName", good().and(other_name), "InvalidCsr"),
        ("an address", good().and(SanType::IpAddress([10, 0, 0, 1].into())), "InvalidCsr"),
        ("an email address", good().and(SanType::Rfc822Name("root@corp.example".try_into().unwrap())), "InvalidCsr"),
        ("name constraints", good().extension(&[2, 5, 29, 30], &constraints), "InvalidCsr"),
        ("an unknown extension", good().extension(&[1, 3, 6, 1, 4, 1, 99999, 1], &[5, 0]), "InvalidCsr"),
        ("a subject", good().common_name("root"), "InvalidCsr"),
        ("a longer life", good().spec("duration", json!("8760h")), "ProfileMismatch"),
        ("no duration", good().spec("duration", json!(null)), "ProfileMismatch"),
        ("another kind of key", good().key(&rcgen::PKCS_ECDSA_P384_SHA384), "ProfileMismatch"),
        ("other usages", good().spec("usages", json!(["cert sign", "crl sign"])), "InvalidSpec"),
        ("orders to an issuer", good().annotation("venafi.cert-manager.io/custom-fields", "[]"), "InvalidAnnotation"),
        ("a CA's certificate", good().spec("isCA", json!(true)), "InvalidSpec"),
    ];
    let mut asked = Vec::new();
    for (what, ask, reason) in cases {
        asked.push((what, ask.create(&agent).await.unwrap_or_else(|e| panic!("{what}: {e}")), reason));
    }
    let unbound = world.log_in(Pod { uid: format!("{}-unbound", agent.pod.uid), ..agent.pod.clone() }, &a, false).await;
    asked.push(("a token that names no node", good().create(&unbound).await.unwrap(), "WrongNode"));
    let editor = world.editor(NAMESPACE).await;
    asked.push(("an editor", good().create(&editor).await.unwrap(), "NotTheAgent"));
    // The approver does not read requests of namespaces in which no agent makes any: without an approval they are not signed.
    let elsewhere = good().in_namespace(&shop).create(&world.editor(&shop).await).await.unwrap();
    let admin = good().create_in(cluster).await.unwrap();
    asked.push(("an administrator", admin, "NotTheAgent"));

    for (what, path, reason) in &asked {
        let (found, sentence) = denied(cluster, path).await;
        assert_eq!(found, *reason, "{what}: {sentence}");
    }
    let approved = issued(cluster, &good().create(&agent).await.unwrap()).await;
    let ignored = cluster.get(&elsewhere).await;
    assert!(condition(&ignored, "Approved").is_none() && ignored["status"]["certificate"].is_null(), "{ignored}");
    let why = condition(&approved, "Approved").unwrap();
    assert_eq!(why["reason"], "approver.sds-agent.io");
    let expected = format!("pod \"{shop}/here\" on node {a:?} may have {}", here.spiffe_id());
    assert_eq!(why["message"], json!(expected));

    // Each denial is written into an Event of its request, and counted.
    let (_, denied_path, _) = &asked[0];
    let name = denied_path.rsplit('/').next().unwrap();
    eventually("an Event", PATIENCE, async || {
        let events = cluster.get(&format!("/api/v1/namespaces/{NAMESPACE}/events")).await;
        let events = events["items"].as_array().unwrap();
        let found = events.iter().find(|event| event["involvedObject"]["name"] == name && event["reason"] == "WrongNode");
        found.map(|event| assert_eq!(event["related"]["name"], "there")).ok_or_else(|| format!("{} others", events.len()))
    })
    .await;
    let decided = async |label: &str, least| approver.counted("sds_agent_approver_decisions_total", &[label], least).await;
    let count = f64::from(u32::try_from(asked.len()).unwrap());
    assert!((decided("decision=\"denied\"", count).await - count).abs() < 0.5);
    assert!((decided("decision=\"approved\"", 1.0).await - 1.0).abs() < 0.5);
}

/// The approver has no permission to approve for other issuers, and ignores their requests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_issuers_are_left_alone_and_two_replicas_agree() {
    let world = World::start(GUARDED).await;
    let replicas = [world.approver("approver-0", "24h").await, world.approver("approver-1", "24h").await];
    let node = world.cluster.node().await;
    let agent = world.actor("agent", "sds-agent", &node).await;
    let pod = world.cluster.pod(&world.cluster.namespace().await, "app", &node).await;
    let foreign = json!({"name": "other", "kind": "ClusterIssuer", "group": "cert-manager.io"});
    let foreign = Ask::of(&agent, &pod).spec("issuerRef", foreign).create(&agent).await.unwrap();

    let mut paths = Vec::new();
    for _ in 0..20 {
        paths.push(Ask::of(&agent, &pod).create(&agent).await.unwrap());
    }
    for path in &paths {
        let request = issued(&world.cluster, path).await;
        let conditions = request["status"]["conditions"].as_array().unwrap();
        assert_eq!(conditions.iter().filter(|c| c["type"] == "Approved").count(), 1, "{conditions:?}");
    }
    let mut decided = 0.0;
    for replica in &replicas {
        decided += replica.metric("sds_agent_approver_decisions_total").await;
    }
    assert!((decided - 20.0).abs() < 0.5, "{decided}");
    let untouched = world.cluster.get(&foreign).await;
    assert!(condition(&untouched, "Approved").is_none() && condition(&untouched, "Denied").is_none(), "{untouched}");
}

/// The operator has not removed the issuer from cert-manager's own approver. The approver counts its approvals, and the log says how to
/// fix this.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_approver_is_noticed() {
    let world = World::start(&[]).await;
    let approver = world.approver("approver-0", "24h").await;
    // The approver under test has no permission to write, so the other one is always first.
    let role = "/apis/rbac.authorization.k8s.io/v1/clusterroles/sds-agent-approver";
    let mut rules = world.cluster.get(role).await["rules"].clone();
    rules.as_array_mut().unwrap().retain(|rule| rule["resources"] != json!(["signers"]));
    world.cluster.patch(role, &json!({"rules": rules})).await;
    let [a, b] = [world.cluster.node().await, world.cluster.node().await];
    let agent = world.actor("agent-a", "sds-agent", &a).await;
    let elsewhere = world.cluster.pod(&world.cluster.namespace().await, "app", &b).await;
    eventually("an approval by another approver", PATIENCE, async || {
        let path = Ask::of(&agent, &elsewhere).create(&agent).await.unwrap();
        let request = eventually("a decision", PATIENCE, async || {
            let request = world.cluster.get(&path).await;
            let decided = condition(&request, "Approved").or(condition(&request, "Denied")).is_some();
            if decided { Ok(request) } else { Err(request["status"].to_string()) }
        })
        .await;
        let Some(approval) = condition(&request, "Approved") else { return Err("the authorizer has not seen the change yet".to_owned()) };
        assert_eq!(approval["reason"], "cert-manager.io", "what must not be signed was approved by us");
        let counted = approver.metric("sds_agent_approver_foreign_approvals_total").await;
        if counted > 0.5 { Ok(()) } else { Err(format!("{counted}")) }
    })
    .await;
    approver.logs("the other approver", PATIENCE, |line| line["by"] == "cert-manager.io").await;
}
