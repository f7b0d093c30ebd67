//! The policies with parameters that are missing, incomplete, in another place or of another version: only the mesh's issuers are
//! affected.

use serde_json::{Value, json};
use test_harness::{
    cluster::name_of,
    eventually,
    guarded::{Guarded, moved},
    manifests::{NAMESPACE, helm, install, named, try_helm},
    world::{GUARDED, PATIENCE, World},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parameters_that_are_missing_hold_up_no_other_issuer() {
    let scene = Guarded::of(World::start(GUARDED).await).await;
    scene.world.install_policy().await;
    scene.assert_no_state_of_the_parameters_matters_to_others().await;
    assert_the_list_is_the_charts(&scene).await;
}

/// Only `namespace:` is added: accounts, permissions, ConfigMap and the policies' parameters follow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_namespace_by_kustomize_holds_up_no_other_issuer() {
    let objects = moved().await;
    // The messages of the policies name the ConfigMap of the unchanged manifests.
    let text: Vec<_> = objects.iter().filter(|object| object["kind"] != "ValidatingAdmissionPolicy").map(Value::to_string).collect();
    let former = ["\"namespace\":\"sds-agent\"", "\"namespace\":\"sds-agent-approver\"", "sds-agent/sds-agent"];
    assert!(!text.iter().any(|text| former.iter().any(|former| text.contains(former))), "{text:#?}");
    let approver = named(&objects, "Deployment", "sds-agent-approver");
    assert_eq!(approver["spec"]["template"]["spec"]["containers"][0]["args"], json!(["approver", "--config-map", "mesh-system/sds-agent"]));
    let world = World::start_in(GUARDED, &objects).await;
    assert_eq!([world.namespace.as_str(), &world.approver_namespace], ["mesh-system", "mesh-approver"]);
    Guarded::of(world).await.assert_another_namespace_holds_up_no_other_issuer().await;
}

/// The policies guard exactly the issuers that the chart lists: a second ClusterIssuer, and an Issuer only in its own namespace.
async fn assert_the_list_is_the_charts(scene: &Guarded) {
    let profiles = json!([
        {"name": "pay", "match": {"namespaces": ["pay"]}, "issuerRef": {"name": "pay-ca", "kind": "ClusterIssuer"}},
        {"name": "own", "match": {"namespaces": ["own"]}, "namespace": scene.shop, "issuerRef": {"name": "own", "kind": "Issuer"}},
        {
            "name": "step", "match": {"namespaces": ["step"]},
            "issuerRef": {"name": "step", "kind": "StepClusterIssuer", "group": "certmanager.step.sm"},
        },
    ]);
    let signers = r#"approver.signers=["stepclusterissuers.certmanager.step.sm/step"]"#;
    let accounts = r#"policy.signers=["system:serviceaccount:cert-manager:cert-manager","system:serviceaccount:step:step-issuer"]"#;
    let refused = try_helm(NAMESPACE, &["--set-json", &format!("config.profiles={profiles}"), "--set-json", signers]).await;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("policy.signers: add the user name of the controller"), "{text}");
    let objects =
        helm(NAMESPACE, &["--set-json", &format!("config.profiles={profiles}"), "--set-json", signers, "--set-json", accounts]).await;
    let policies: Vec<_> =
        objects.into_iter().filter(|object| object["kind"].as_str().unwrap().starts_with("ValidatingAdmissionPolicy")).collect();
    assert_eq!(policies.len(), 12);
    install(&scene.world.cluster, &policies).await;
    let elsewhere = scene.world.cluster.namespace().await;
    let neighbour = scene.world.editor(&elsewhere).await;
    let issuer = |kind: &str, name: &str| json!({"name": name, "kind": kind, "group": "cert-manager.io"});
    for (kind, name) in [("ClusterIssuer", "pay-ca"), ("Issuer", "own"), ("ClusterIssuer", "mesh-ca")] {
        let ask = scene.ask().in_namespace(&scene.shop).unlabelled().spec("issuerRef", issuer(kind, name));
        eventually("the chart's policy is enforced", PATIENCE, async || match ask.try_dry_run(&scene.editor).await {
            Err(kube::Error::Api(status)) if status.message.contains(&format!("only sds-agent may ask {kind}/{name}")) => Ok(()),
            answer => Err(format!("{answer:?}")),
        })
        .await;
    }
    // External issuers accept a request without a group in its `issuerRef`, where cert-manager's webhook is disabled.
    let unvalidated = scene.world.unvalidated_namespace().await;
    let tenant = scene.world.editor(&unvalidated).await;
    for (reference, is_guarded) in [
        (json!({"name": "step", "kind": "StepClusterIssuer", "group": "certmanager.step.sm"}), true),
        (json!({"name": "step", "kind": "StepClusterIssuer"}), true),
        (json!({"name": "step", "kind": "StepClusterIssuer", "group": ""}), true),
        (json!({"name": "other", "kind": "StepClusterIssuer"}), false),
        (json!({"name": "step", "kind": "Issuer"}), false),
    ] {
        let answer = scene.ask().in_namespace(&unvalidated).unlabelled().spec("issuerRef", reference.clone()).try_dry_run(&tenant).await;
        assert_eq!(answer.is_err(), is_guarded, "{reference}: {answer:?}");
    }
    for (kind, name) in [("Issuer", "own"), ("ClusterIssuer", "own"), ("Issuer", "pay-ca")] {
        scene.ask().in_namespace(&elsewhere).unlabelled().spec("issuerRef", issuer(kind, name)).try_dry_run(&neighbour).await.unwrap();
    }
    assert_eq!(name_of(&policies[0]), "sds-agent-requests");
}
