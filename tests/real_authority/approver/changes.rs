//! Changes that only the policy prevents where cert-manager's own webhook is disabled: of a request's spec and of its decision.

use serde_json::{Value, json};
use test_harness::{
    ask::{Ask, condition, issued},
    cluster::{Write, rejection},
    eventually,
    world::{GUARDED, NAMESPACE, PATIENCE, World},
};

/// cert-manager's own approver approves a request for another issuer. The request cannot be changed into one for the mesh's issuer
/// afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_approved_request_is_not_changed_into_one_for_a_guarded_issuer() {
    let world = World::start(&[]).await;
    world.install_policy().await;
    world.install("workload-requests/rbac.yaml").await;
    let cluster = &world.cluster;
    let shop = world.unvalidated_namespace().await;
    let editor = world.editor(&shop).await;
    let node = cluster.node().await;
    let victim = cluster.pod(&shop, "victim", &node).await;
    let agent = world.actor("agent", "sds-agent", &node).await;
    let none = json!({"name": "none", "kind": "Issuer", "group": "cert-manager.io"});
    let foreign = Ask::of(&agent, &victim).in_namespace(&shop).spec("issuerRef", none.clone()).unlabelled();
    let guarded = json!({"name": "mesh-ca", "kind": "ClusterIssuer", "group": "cert-manager.io"});
    for write in Write::ALL {
        let path = foreign.create(&editor).await.unwrap();
        eventually("cert-manager approves it", PATIENCE, async || {
            let request = cluster.get(&path).await;
            if condition(&request, "Approved").is_some() { Ok(()) } else { Err(request["status"].to_string()) }
        })
        .await;
        for (who, account) in [("an editor", &editor.cluster), ("an administrator", cluster)] {
            let refusal = rejection(account.try_set(write, &path, &["spec", "issuerRef"], &guarded).await, &format!("{write:?} by {who}"));
            assert!(refusal.contains("the spec of a request cannot be changed"), "{write:?} by {who}: {refusal}");
        }
        // The editor can change fields outside of the spec, and requests for other issuers.
        editor.cluster.try_set(write, &path, &["metadata", "annotations", "example.com/note"], &json!("mine")).await.unwrap();
        let other = json!({"name": "other", "kind": "Issuer", "group": "cert-manager.io"});
        editor.cluster.try_set(write, &path, &["spec", "issuerRef"], &other).await.unwrap();
        assert!(cluster.get(&path).await["status"]["certificate"].is_null());
    }

    // A client that writes a request back in another notation changes nothing.
    let own = Ask::of(&agent, &victim).in_namespace(&shop).spec("duration", json!("86400s")).spec("isCA", json!(false));
    let own = own.create(&agent).await.unwrap();
    let mut spec = cluster.get(&own).await["spec"].clone();
    spec["duration"] = json!("24h0m0s");
    spec.as_object_mut().unwrap().remove("isCA");
    cluster.try_set(Write::Update, &own, &["spec"], &spec).await.unwrap();

    // A request for the mesh's issuer cannot become one for another issuer either, approved or not: the decision was about its original
    // spec.
    for write in Write::ALL {
        let usages = json!(["cert sign"]);
        for (field, value) in [("issuerRef", none.clone()), ("duration", json!("8760h")), ("isCA", json!(true)), ("usages", usages)] {
            let refusal = rejection(cluster.try_set(write, &own, &["spec", field], &value).await, field);
            assert!(refusal.contains("the spec of a request cannot be changed"), "{write:?} of {field}: {refusal}");
        }
    }
}

/// An account with all verbs by a wildcard decides nothing; the approver and the members of the break-glass group do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_named_accounts_decide_about_a_guarded_issuer() {
    let world = World::start(GUARDED).await;
    world.install_policy().await;
    world.install("workload-requests/rbac.yaml").await;
    let cluster = &world.cluster;
    let shop = world.unvalidated_namespace().await;
    let node = cluster.node().await;
    let agent = world.actor("agent", "sds-agent", &node).await;
    let pod = cluster.pod(&shop, "app", &node).await;
    let ask = |namespace: &str| Ask::of(&agent, &pod).in_namespace(namespace);
    // All verbs on requests, their status and every signer by wildcards, and on everything else the relevant verbs.
    let wildcards = json!([
        {"apiGroups": ["cert-manager.io"], "resources": ["*"], "verbs": ["*"]},
        {"apiGroups": ["*"], "resources": ["*"], "verbs": ["get", "approve", "request"]},
    ]);
    cluster.grant("mallory", &wildcards).await;
    let mallory = world.impersonate("mallory", &[]).await;
    // As in docs/runbook.md: an administrator impersonates a member of that group.
    let break_glass = world.impersonate("jane", &["sds-agent:break-glass"]).await;

    let own = [Write::MergePatch, Write::Update].map(|write| (NAMESPACE, write));
    for (namespace, write) in Write::ALL.map(|write| (shop.as_str(), write)).into_iter().chain(own) {
        let path = ask(namespace).create(&agent).await.unwrap();
        let status = format!("{path}/status");
        for kind in ["Approved", "Denied"] {
            for (who, account) in [("an account with all rights on requests", &mallory), ("an administrator", cluster)] {
                let answer = account.try_set(write, &status, &["status", "conditions"], &decision(kind)).await;
                let refusal = rejection(answer, &format!("{kind} by {who}, {write:?}"));
                assert!(refusal.contains("only the approver may change the conditions"), "{kind} by {who}, {write:?}: {refusal}");
            }
        }
        break_glass.try_set(write, &status, &["status", "conditions"], &decision("Approved")).await.unwrap();
        // cert-manager writes its own conditions beside that one.
        let request = issued(cluster, &path).await;
        assert_eq!(condition(&request, "Approved").unwrap()["reason"], "ByHand", "{write:?}");

        // A decision can be neither removed nor changed.
        let conditions = request["status"]["conditions"].as_array().unwrap();
        let others: Vec<_> = conditions.iter().filter(|c| c["type"] != "Approved").cloned().collect();
        let reworded = json!([{"type": "Approved", "status": "True", "reason": "cert-manager.io", "message": "approved"}]);
        let changes = [("taken back", json!(others)), ("reworded", reworded)];
        // A server-side apply with fewer fields removes only fields of the same manager.
        for (what, conditions) in changes.into_iter().filter(|(what, _)| write != Write::Apply || *what != "taken back") {
            let refusal = rejection(mallory.try_set(write, &status, &["status", "conditions"], &conditions).await, what);
            assert!(refusal.contains("only the approver may change the conditions"), "{what}, {write:?}: {refusal}");
        }
    }

    // Other notations with the same meaning: cert-manager writes all conditions back in its own notation.
    for (field, value) in [("message", json!("")), ("lastTransitionTime", json!("2026-01-02T04:04:05+01:00"))] {
        let path = ask(&shop).create(&agent).await.unwrap();
        let mut conditions = decision("Approved");
        conditions[0][field] = value;
        break_glass.try_set(Write::MergePatch, &format!("{path}/status"), &["status", "conditions"], &conditions).await.unwrap();
        issued(cluster, &path).await;
    }

    let path = ask(NAMESPACE).create(&agent).await.unwrap();
    let _approver = world.approver("approver-0", "24h").await;
    assert_eq!(condition(&issued(cluster, &path).await, "Approved").unwrap()["reason"], "approver.sds-agent.io");
}

/// cert-manager's own approver has permission for every signer, and the webhook that would check it is disabled: the policy rejects its
/// approval.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cert_managers_own_approver_does_not_decide_about_a_guarded_issuer() {
    let world = World::start(&["--audit"]).await;
    world.install_policy().await;
    let node = world.cluster.node().await;
    let agent = world.actor("agent", "sds-agent", &node).await;
    let pod = world.cluster.pod(&world.cluster.namespace().await, "app", &node).await;
    let path = Ask::of(&agent, &pod).create(&agent).await.unwrap();
    let name = path.rsplit_once('/').unwrap().1;
    eventually("cert-manager's approver has tried", PATIENCE, async || {
        let tried = |line: &Value| line["objectRef"]["name"] == name && line["objectRef"]["subresource"] == "status";
        let codes: Vec<_> = world.audit().iter().filter(|line| tried(line)).map(|line| line["responseStatus"]["code"].clone()).collect();
        if codes.contains(&json!(403)) { Ok(()) } else { Err(format!("{codes:?}")) }
    })
    .await;
    assert!(condition(&world.cluster.get(&path).await, "Approved").is_none());
    let _approver = world.approver("approver-0", "24h").await;
    assert_eq!(condition(&issued(&world.cluster, &path).await, "Approved").unwrap()["reason"], "approver.sds-agent.io");
}

/// The conditions of a request with a decision as the only one.
fn decision(kind: &str) -> Value {
    let time = "2026-01-02T03:04:05Z";
    json!([{"type": kind, "status": "True", "reason": "ByHand", "message": "looked at", "lastTransitionTime": time}])
}
