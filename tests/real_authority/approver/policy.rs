//! The policy without an approver: cert-manager's own approver approves every request that the policy accepts, where it is named as the
//! approver.

use serde_json::{Value, json};
use test_harness::{
    ask::{Ask, issued},
    cluster::{Cluster, Pod, labels},
    eventually,
    world::{NAMESPACE, PATIENCE, World},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_policy_alone_stops_what_it_is_there_for() {
    let world = World::start(&[]).await;
    let cluster = &world.cluster;
    let [a, b] = [cluster.node().await, cluster.node().await];
    let agent = world.actor("agent-a", "sds-agent", &a).await;
    let neighbour = world.actor("agent-b", "sds-agent", &b).await;
    let shop = cluster.namespace().await;
    let pod = cluster.pod(&shop, "app", &a).await;
    let good = || Ask::of(&agent, &pod);
    // Without the policy, all of these requests are signed.
    issued(cluster, &good().label(&b).create(&agent).await.unwrap()).await;
    world.install_policy().await;
    world.let_cert_manager_approve().await;

    let other = json!({"name": "other", "kind": "ClusterIssuer", "group": "cert-manager.io"});
    let without_kind = json!({"name": "mesh-ca"});
    let external = json!({"name": "mesh-ca", "kind": "ClusterIssuer", "group": "example.com"});
    let metadata = |field: &str, value: Value| {
        let mut ask = good();
        ask.object["metadata"][field] = value;
        ask
    };
    let owner = |n: usize| json!({"apiVersion": "v1", "kind": "Pod", "name": format!("p{n}"), "uid": format!("u{n}")});
    let uid_label = |uid: &str| {
        let mut ask = good();
        ask.object["metadata"]["labels"]["sds-agent.io/node-uid"] = json!(uid);
        ask
    };
    let mut many_annotations = good();
    for n in 0..30 {
        many_annotations = many_annotations.annotation(&format!("example.com/{n}"), "");
    }
    for (what, ask, words) in [
        ("a finalizer", metadata("finalizers", json!(["example.com/kept"])), "cannot have finalizers"),
        ("many annotations", many_annotations, "is larger than an agent's"),
        ("a long annotation", good().annotation("example.com/note", &"n".repeat(1025)), "is larger than an agent's"),
        ("a long duration", good().spec("duration", json!(format!("{}3600s", "0".repeat(64)))), "is larger than an agent's"),
        ("many owners", metadata("ownerReferences", (0..5).map(owner).collect()), "is larger than an agent's"),
        ("another node's label", good().label(&b), "the request is labelled with node"),
        ("no label", good().unlabelled(), "the request is labelled with node"),
        ("another node's name", good().annotation("sds-agent.io/node-name", &b), "the request is labelled with node"),
        ("both", good().label(&b).annotation("sds-agent.io/node-name", &b), "the request is labelled with node"),
        ("another issuer", good().spec("issuerRef", other.clone()), "sds-agent may not ask ClusterIssuer/other"),
        ("an Issuer of the same name", good().spec("issuerRef", without_kind), "sds-agent may not ask Issuer/mesh-ca"),
        ("an external issuer", good().spec("issuerRef", external), "sds-agent may not ask ClusterIssuer.example.com/mesh-ca"),
        ("a longer life", good().spec("duration", json!("24h1s")), "the duration is missing or above 24h"),
        ("no duration", good().spec("duration", Value::Null), "the duration is missing or above 24h"),
        ("other usages", good().spec("usages", json!(["cert sign"])), "the usages have to be"),
        ("no usages", good().spec("usages", Value::Null), "the usages have to be"),
        ("a CA's certificate", good().spec("isCA", json!(true)), "isCA is set"),
        ("another node's UID", uid_label(&uid_of(cluster, &b).await), "the request is labelled with node"),
        ("no UID", uid_label(""), "the request is labelled with node"),
    ] {
        let refusal = ask.refused(&agent).await;
        assert!(refusal.contains(words), "{what}: {refusal}");
    }
    let unbound = world.log_in(Pod { uid: format!("{}-unbound", agent.pod.uid), ..agent.pod.clone() }, &a, false).await;
    let refusal = good().refused(&unbound).await;
    assert!(refusal.contains("the agent's token names no node"), "{refusal}");

    // A label cannot hold the name of every node, and CEL cannot compute its digest: the annotation counts.
    let long = format!("{}.{}", "n".repeat(60), "m".repeat(40));
    cluster.create("/api/v1/nodes", &json!({"metadata": {"name": long, "labels": labels()}})).await;
    let far = world.actor("agent-far", "sds-agent", &long).await;
    let far_pod = cluster.pod(&shop, "far", &long).await;
    let ask = |label: &str| Ask::of(&far, &far_pod).label(label);
    let digest = "sha256-0123456789abcdef0123456789abcdef01234567";
    for refused in
        [ask(&a), ask("n"), ask(digest).annotation("sds-agent.io/node-name", &a), ask(digest).annotation("sds-agent.io/node-name", digest)]
    {
        assert!(refused.refused(&far).await.contains("the request is labelled with node"));
    }
    ask(digest).create(&far).await.unwrap();

    // Other accounts cannot use the mesh's issuer, and can use every other one.
    for namespace in [NAMESPACE, &shop] {
        let editor = world.editor(namespace).await;
        let ask = good().in_namespace(namespace);
        assert!(ask.clone().spec("issuerRef", other.clone()).refused(&editor).await.contains("only an agent may set"));
        let ask = ask.unlabelled();
        let refusal = ask.refused(&editor).await;
        assert!(refusal.contains("only sds-agent may ask ClusterIssuer/mesh-ca"), "{refusal}");
        ask.spec("issuerRef", other.clone()).create(&editor).await.unwrap();
    }
    assert!(good().unlabelled().refused_in(cluster).await.contains("only sds-agent may ask"));

    // The requests that agents really make are signed; those of the previous version have no label with the UID.
    issued(cluster, &good().create(&agent).await.unwrap()).await;
    let path = uid_label(&uid_of(cluster, &a).await).create(&agent).await.unwrap();
    issued(cluster, &path).await;

    // An agent can delete requests that agents of its node have made, and no others.
    let refusal = neighbour.cluster.try_delete(&path).await.unwrap_err().to_string();
    assert!(refusal.contains("an agent may delete only requests that an agent of its own node has made"), "{refusal}");
    let of_an_editor = world.requests(NAMESPACE).await;
    let mut spared = 0;
    for request in of_an_editor {
        let who = cluster.get(&request).await["spec"]["username"].as_str().unwrap().to_owned();
        if who.ends_with(":editor") {
            agent.cluster.try_delete(&request).await.unwrap_err();
            spared += 1;
        }
    }
    assert!(spared > 0);
    let successor = world.actor("agent-a-2", "sds-agent", &a).await;
    successor.cluster.try_delete(&path).await.unwrap();
}

async fn uid_of(cluster: &Cluster, node: &str) -> String {
    cluster.get(&format!("/api/v1/nodes/{node}")).await["metadata"]["uid"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_garbage_collector_and_the_end_of_a_namespace_pass_the_policy() {
    let world = World::start(&[]).await;
    world.install_policy().await;
    let cluster = &world.cluster;
    let node = cluster.node().await;
    let agent = world.actor("agent", "sds-agent", &node).await;
    let shop = cluster.namespace().await;
    let pod = cluster.pod(&shop, "app", &node).await;
    let owned = Ask::of(&agent, &pod).owner(&agent.pod).create(&agent).await.unwrap();
    let editor = world.editor(&shop).await;
    let other = json!({"name": "other", "kind": "ClusterIssuer", "group": "cert-manager.io"});
    let foreign = Ask::of(&agent, &pod).in_namespace(&shop).spec("issuerRef", other).unlabelled();
    foreign.create(&editor).await.unwrap();

    cluster.delete(&agent.pod.path()).await;
    eventually("the collector deletes the request of the agent that has ended", PATIENCE, async || match cluster.try_get(&owned).await {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    let path = format!("/api/v1/namespaces/{shop}");
    cluster.delete(&path).await;
    eventually("the namespace is deleted", PATIENCE, async || match cluster.try_get(&path).await {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
}
