//! The policies limit who sets a certificate, the labels by which agents select requests, the agents' Events, and the removal of ended
//! requests.

use serde_json::{Value, json};
use test_harness::{
    ask::{Ask, condition, denied, issued, uri},
    cluster::{Cluster, Pod, Write, rejection},
    eventually,
    world::{Actor, GUARDED, NAMESPACE, PATIENCE, World, event},
};

const SIGNER: &str = "system:serviceaccount:cert-manager:cert-manager";
const TIME: &str = "2026-01-02T03:04:05Z";
/// A field of an Event with a value that no agent sets.
type Change = (&'static str, fn(&mut Value));
/// Ended requests of a node that the approver keeps.
const KEPT: usize = 256;
/// No signer runs.
const WITHOUT_SIGNER: &[&str] = &["--controllers", "*,-certificaterequests-approver,-certificaterequests-issuer-ca"];

fn ready(status: &str, reason: &str) -> Value {
    json!({"type": "Ready", "status": status, "reason": reason, "lastTransitionTime": TIME})
}

/// A cluster with the policies, and an agent and a pod on one node.
struct Scene {
    world: World,
    agent: Actor,
    /// Namespace of the pod.
    shop: String,
    pod: Pod,
}

impl Scene {
    async fn start(flags: &[&str]) -> Self {
        let world = World::start(flags).await;
        world.install_policy().await;
        let node = world.cluster.node().await;
        let agent = world.actor("agent", "sds-agent", &node).await;
        let shop = world.cluster.namespace().await;
        let pod = world.cluster.pod(&shop, "app", &node).await;
        Self { world, agent, shop, pod }
    }

    /// The request that the agent would create for the pod.
    fn ask(&self) -> Ask {
        Ask::of(&self.agent, &self.pod)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_signer_sets_a_certificate_its_ca_and_the_other_conditions() {
    let scene = Scene::start(WITHOUT_SIGNER).await;
    let Scene { world, agent, .. } = &scene;
    let cluster = &world.cluster;
    // A tenant's controller may have these permissions.
    let rules = json!([
        {"apiGroups": ["cert-manager.io"], "resources": ["certificaterequests", "certificaterequests/status"], "verbs": ["*"]},
        {"apiGroups": ["cert-manager.io"], "resources": ["signers"], "verbs": ["approve"]},
    ]);
    cluster.grant("tenant", &rules).await;
    let tenant = world.impersonate("tenant", &[]).await;
    let break_glass = world.impersonate("jane", &["sds-agent:break-glass"]).await;
    let approver = world.as_approver().await;
    let accounts =
        [("a tenant", &tenant), ("an administrator", cluster), ("the break-glass group", &break_glass), ("the approver", &approver)];
    let signer = world.impersonate(SIGNER, &[]).await;
    let fields = [
        (&["status", "certificate"][..], json!("Zm9yZ2Vk")),
        (&["status", "ca"], json!("Zm9yZ2Vk")),
        (&["status", "failureTime"], json!(TIME)),
        (&["status", "conditions"], json!([ready("True", "Issued")])),
        (&["status", "conditions"], json!([ready("False", "Failed")])),
        (&["status", "conditions"], json!([{"type": "InvalidRequest", "status": "True", "reason": "Bad", "lastTransitionTime": TIME}])),
        (&["status", "conditions"], json!([{"type": "Note", "status": "True", "reason": "Noted"}])),
    ];
    let path = scene.ask().create(agent).await.unwrap();
    let status = format!("{path}/status");
    for (field, value) in &fields {
        for (who, account) in accounts {
            // The approver has the right to patch alone.
            let may = |write: &Write| who != "the approver" || matches!(write, Write::MergePatch | Write::Apply);
            for write in Write::ALL.into_iter().filter(may) {
                let what = format!("{field:?} by {who}, {write:?}");
                let refused = rejection(account.try_set(write, &status, field, value).await, &what);
                assert!(refused.contains("only the signer may change"), "{what}: {refused}");
            }
        }
    }
    // An approval that brings a certificate with it.
    let approval = json!({"type": "Approved", "status": "True", "reason": "approver.sds-agent.io", "lastTransitionTime": TIME});
    let both = json!({"conditions": [approval], "certificate": "Zm9yZ2Vk"});
    let refused = rejection(approver.try_set(Write::MergePatch, &status, &["status"], &both).await, "both");
    assert!(refused.contains("only the signer may change"), "{refused}");
    // The signer's account signs, and does not decide.
    let refused = rejection(signer.try_set(Write::MergePatch, &status, &["status"], &both).await, "an approval by the signer");
    assert!(refused.contains("only the approver may change"), "{refused}");
    approver.try_set(Write::MergePatch, &status, &["status", "conditions"], &json!([approval])).await.unwrap();

    // The signer issues, and from then on the certificate stays as it is. Other notations of it are no change.
    let conditions = json!([approval, ready("True", "Issued")]);
    let issued = json!({"conditions": conditions, "certificate": "Zm9yZ2Vk", "ca": "Y2E="});
    signer.try_set(Write::MergePatch, &status, &["status"], &issued).await.unwrap();
    for (field, value) in
        [("certificate", json!("b3RoZXI=")), ("certificate", Value::Null), ("ca", Value::Null), ("conditions", json!([approval]))]
    {
        for (who, account) in accounts {
            let answer = account.try_set(Write::MergePatch, &status, &["status", field], &value).await;
            let refused = rejection(answer, field);
            assert!(refused.contains("only the signer may change"), "{field} by {who}: {refused}");
        }
    }
    let mut reworded = conditions.clone();
    reworded[1]["message"] = json!("revoked");
    let twice = json!([conditions[0], conditions[1], ready("False", "Failed")]);
    for (what, changed) in [("another message", &reworded), ("a second Ready", &twice)] {
        let answer = tenant.try_set(Write::MergePatch, &status, &["status", "conditions"], changed).await;
        let refused = rejection(answer, what);
        assert!(refused.contains("only the signer may change") || refused.contains("Duplicate value"), "{what}: {refused}");
    }
    let mut rewritten = conditions.clone();
    rewritten[1]["lastTransitionTime"] = json!("2026-01-02T04:04:05+01:00");
    rewritten[1]["message"] = json!("");
    tenant.try_set(Write::MergePatch, &status, &["status", "conditions"], &rewritten).await.unwrap();
    tenant.try_set(Write::MergePatch, &path, &["metadata", "annotations", "example.com/note"], &json!("mine")).await.unwrap();

    // Requests for other issuers are their owners'.
    let other = json!({"name": "other", "kind": "ClusterIssuer", "group": "cert-manager.io"});
    let foreign = scene.ask().spec("issuerRef", other).unlabelled();
    let foreign = format!("{}/status", foreign.create_in(cluster).await.unwrap());
    tenant.try_set(Write::MergePatch, &foreign, &["status", "certificate"], &json!("Zm9yZ2Vk")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_labels_by_which_agents_select_requests_are_the_agents() {
    let scene = Scene::start(GUARDED).await;
    let Scene { world, agent, shop, .. } = &scene;
    let cluster = &world.cluster;
    let editor = world.editor(shop).await;
    let none = json!({"name": "none", "kind": "Issuer", "group": "cert-manager.io"});
    let with = |labels: Value| {
        let mut ask = scene.ask().in_namespace(shop).spec("issuerRef", none.clone());
        ask.object["metadata"]["labels"] = labels;
        ask
    };
    for label in ["sds-agent.io/node", "sds-agent.io/node-uid", "sds-agent.io/agent-uid", "sds-agent.io/of-a-later-version"] {
        let refused = with(json!({label: "x"})).refused(&editor).await;
        assert!(refused.contains("only an agent may set, change or remove labels"), "{label}: {refused}");
    }
    let own = with(json!({"example.com/team": "shop"})).create(&editor).await.unwrap();
    let of_agent = scene.ask().create(agent).await.unwrap();
    let label = ["metadata", "labels", "sds-agent.io/node"];
    for write in Write::ALL {
        let refused = rejection(editor.cluster.try_set(write, &own, &label, &json!(agent.node)).await, "an editor's");
        assert!(refused.contains("only an agent may set"), "{write:?}: {refused}");
        let refused = rejection(cluster.try_set(write, &of_agent, &label, &json!("elsewhere")).await, "the agent's");
        assert!(refused.contains("only an agent may set"), "{write:?}: {refused}");
        editor.cluster.try_set(write, &own, &["metadata", "labels", "example.com/team"], &json!(format!("{write:?}"))).await.unwrap();
        cluster.try_set(write, &of_agent, &["metadata", "labels", "example.com/team"], &json!(format!("{write:?}"))).await.unwrap();
    }
    let refused = rejection(cluster.try_set(Write::MergePatch, &of_agent, &label, &Value::Null).await, "a removal");
    assert!(refused.contains("only an agent may set"), "{refused}");
    issued_by_hand(world, &of_agent).await;
}

/// A request whose labels others have tried to change is still approved and signed.
async fn issued_by_hand(world: &World, path: &str) {
    let break_glass = world.impersonate("jane", &["sds-agent:break-glass"]).await;
    let approval = json!([{"type": "Approved", "status": "True", "reason": "ByHand", "message": "", "lastTransitionTime": TIME}]);
    break_glass.try_set(Write::MergePatch, &format!("{path}/status"), &["status", "conditions"], &approval).await.unwrap();
    issued(&world.cluster, path).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agents_token_writes_events_about_pods_alone() {
    let scene = Scene::start(GUARDED).await;
    let Scene { world, agent, shop, .. } = &scene;
    let cluster = &world.cluster;
    let events = format!("/apis/events.k8s.io/v1/namespaces/{shop}/events");
    let send = async |account: &Cluster, change: fn(&mut Value)| account.try_create(&events, &event(shop, change)).await;
    send(&agent.cluster, |_| {}).await.unwrap();
    let changes: [Change; 6] = [
        ("another controller", |event| event["reportingController"] = json!("kubelet")),
        ("a node", |event| event["regarding"]["kind"] = json!("Node")),
        ("a related object", |event| event["related"] = json!({"kind": "Pod", "name": "x"})),
        ("a finalizer", |event| event["metadata"]["finalizers"] = json!(["example.com/kept"])),
        ("annotations", |event| event["metadata"]["annotations"] = json!({"note": "x".repeat(100_000)})),
        ("a series", |event| event["series"] = json!({"count": 2, "lastObservedTime": "2026-01-02T03:04:05.000000Z"})),
    ];
    for (what, change) in changes {
        let refused = rejection(send(&agent.cluster, change).await, what);
        assert!(refused.contains("an agent creates only short Events"), "{what}: {refused}");
    }
    // The other API group of Events is closed to the token altogether.
    let mut of_core = event(shop, |_| {});
    of_core["involvedObject"] = of_core["regarding"].take();
    let core = format!("/api/v1/namespaces/{shop}/events");
    rejection(agent.cluster.try_create(&core, &of_core).await, "an Event of the core group");
    // Other accounts are not limited.
    send(cluster, |event| event["reportingController"] = json!("example.com/other")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_approver_deletes_ended_requests_alone_and_bounds_their_number() {
    let scene = Scene::start(&["--controllers", "*,-certificaterequests-approver"]).await;
    let Scene { world, agent, .. } = &scene;
    let cluster = &world.cluster;
    let account = world.as_approver().await;
    let none = json!({"name": "none", "kind": "Issuer", "group": "cert-manager.io"});
    let foreign = scene.ask().spec("issuerRef", none).unlabelled();
    let foreign = foreign.create_in(cluster).await.unwrap();
    let denial = json!([{"type": "Denied", "status": "True", "reason": "No", "message": "", "lastTransitionTime": TIME}]);
    cluster.try_set(Write::MergePatch, &format!("{foreign}/status"), &["status", "conditions"], &denial).await.unwrap();
    let undecided = scene.ask().create(agent).await.unwrap();
    for (what, path) in [("an undecided one", &undecided), ("one for another issuer", &foreign)] {
        let refused = rejection(account.try_delete(path).await, what);
        assert!(refused.contains("the approver may delete only requests for a guarded issuer that are denied"), "{what}: {refused}");
    }

    let approver = world.approver("approver-0", "24h").await;
    issued(cluster, &undecided).await;
    account.try_delete(&undecided).await.unwrap();
    // An agent that requests names of other pods without end.
    let forged = scene.ask().named(uri("spiffe://cluster.local/ns/other/sa/other"));
    let first = forged.create(agent).await.unwrap();
    assert_eq!(denied(cluster, &first).await.0, "WrongIdentity");
    for _ in 0..KEPT + 10 {
        forged.create(agent).await.unwrap();
    }
    approver.counted("sds_agent_approver_requests_removed_total", &[], 11.0).await;
    eventually("the others are kept", PATIENCE, async || {
        let left = world.requests(NAMESPACE).await.len();
        // One is the request for another issuer.
        if left == KEPT + 1 { Ok(()) } else { Err(format!("{left} are left")) }
    })
    .await;
    assert!(cluster.try_get(&first).await.is_err(), "the oldest is removed first");
    assert!(condition(&cluster.get(&foreign).await, "Denied").is_some());
}
