//! The configured issuer, the namespaces, and `status.ca`.

use super::*;

/// Returns the error of an order that its issuer refuses before a request is created.
async fn refusal(issuer: (&str, &str, &str), objects: &[(&str, Value)]) -> Error {
    let api = FakeApi::new();
    for (plural, object) in objects {
        api.put(plural, object.clone());
    }
    let (name, kind, group) = issuer;
    let reference = IssuerRef { name: name.into(), kind: kind.into(), group: group.into() };
    let world = World::with(RequestNamespace::Fixed("sds-agent".into()), reference, api);
    let error = end(world.order("cart").0).await.unwrap_err();
    assert_eq!(writes(&world.api), (0, 0));
    error
}

#[tokio::test(start_paused = true)]
async fn an_issuer_that_cannot_serve_is_told_before_anything_is_asked() {
    let group = "cert-manager.io";
    let mut namespaced = ready_issuer("Issuer", "local-ca", json!({"ca": {}}));
    namespaced["metadata"]["namespace"] = json!("sds-agent");
    let self_signed = ("clusterissuers", ready_issuer("ClusterIssuer", "self", json!({"selfSigned": {}})));
    for (issuer, objects, retry, text) in [
        (("self", "ClusterIssuer", group), vec![self_signed], Retry::Configuration, "is of type SelfSigned"),
        (("x", "Isuer", group), vec![], Retry::Configuration, "issuerRef.kind \"Isuer\" does not exist in group cert-manager.io"),
        (
            ("local-ca", "ClusterIssuer", group),
            vec![("issuers", namespaced)],
            Retry::Configuration,
            "ClusterIssuer \"local-ca\" does not exist, but a resource of kind Issuer with this name does in namespace sds-agent",
        ),
        (
            ("mesh-ca", "Issuer", ""),
            vec![],
            Retry::Configuration,
            "Issuer \"mesh-ca\" does not exist in namespace sds-agent, but a resource of kind ClusterIssuer with this name does",
        ),
        (("nobody", "ClusterIssuer", group), vec![], Retry::Backoff, "get clusterissuers.cert-manager.io nobody: it does not exist"),
    ] {
        let error = refusal(issuer, &objects).await;
        assert_eq!(error.retry(), retry, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_issuer_that_may_not_be_read_or_is_external_is_used_unchecked() {
    let forbidden = json!({"kind": "Status", "code": 403, "reason": "Forbidden",
        "message": "clusterissuers.cert-manager.io \"mesh-ca\" is forbidden: User \"x\" cannot get resource"});
    let world = World::new();
    world.api.fail("get", "clusterissuers", Fault::Status(403, forbidden), usize::MAX);
    let (task, _) = world.order("cart");
    world.issue(&world.request().await);
    end(task).await.unwrap();

    let external = IssuerRef { name: "x".into(), kind: "AWSPCAClusterIssuer".into(), group: "awspca.cert-manager.io".into() };
    let world = World::with(RequestNamespace::Fixed("sds-agent".into()), external, FakeApi::new());
    let (task, _) = world.order("cart");
    world.issue(&world.request().await);
    end(task).await.unwrap();
    assert_eq!(world.api.count("get", "clusterissuers"), 0);
}

#[tokio::test(start_paused = true)]
async fn the_issuer_is_checked_once_and_again_after_each_failure() {
    let world = World::new();
    for account in ["a", "b", "c"] {
        let (task, _) = world.order(account);
        world.issue(&world.request().await);
        end(task).await.unwrap();
        world.api.until_count(CR, 0).await;
    }
    assert_eq!(world.api.count("get", "clusterissuers"), 1);

    for _ in 0..3 {
        tokio::time::sleep(11 * MINUTE).await;
        let (task, _) = world.order("a");
        let request = world.request().await;
        world.condition(&request, "Ready", "False", "Failed");
        end(task).await.unwrap_err();
    }
    assert_eq!(world.api.count("get", "clusterissuers"), 3, "before each order that followed a failure");
}

#[tokio::test(start_paused = true)]
async fn requests_can_go_to_the_workloads_namespaces_owned_by_the_pod_they_name() {
    let world = World::with(RequestNamespace::Workload, issuer_ref(), FakeApi::new());
    let (task, _) = world.order("cart");
    let request = world.request().await;
    assert_eq!(text(&request, "namespace"), "shop");
    let owner = json!([{"apiVersion": "v1", "kind": "Pod", "name": "cart-1", "uid": "pod-1"}]);
    assert_eq!(request["metadata"]["ownerReferences"], owner);
    world.issue(&request);
    end(task).await.unwrap();
    world.api.until_count(CR, 0).await;

    let (progress, _stage) = Progress::new();
    let order = Order { identity: Arc::new(identity("cart")), evidence: None, progress };
    let error = end(tokio::spawn(world.issuer.issue(order))).await.unwrap_err();
    assert_eq!(error.retry(), Retry::Configuration);
}

#[tokio::test(start_paused = true)]
async fn the_issuers_own_root_becomes_a_bundle_only_where_the_operator_said_so() {
    // The last certificate of the chain is the root that it leads to; the other root has signed nothing.
    let signer = CertificateChain::from_pem(CHAIN.as_bytes()).unwrap().certificates().last().unwrap().clone();
    let other = {
        let key = rcgen::KeyPair::generate().unwrap();
        rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap().pem().into_bytes()
    };
    let own = sds_server::material::TrustBundle::from_certificates(vec![signer]).unwrap().to_pem();
    for (is_source, ca, counts) in [(false, &own, false), (true, &own, true), (true, &other, false)] {
        let trust = trust::Trust::new(trust::Metrics::default());
        let world = World::new();
        let inner = &world.issuer.inner;
        let source = is_source.then(|| trust.source(None, "status.ca"));
        let issuer = CertManager::new(inner.requests.clone(), inner.config.clone(), source);
        let (progress, _stage) = Progress::new();
        let order = Order { identity: Arc::new(identity("cart")), evidence: Some(pod()), progress };
        let task = tokio::spawn(issuer.issue(order));
        let request = world.request().await;
        world.api.change(CR, "sds-agent", text(&request, "name"), |o| o["status"] = json!({"ca": STANDARD.encode(ca)}));
        world.issue(&request);
        end(task).await.unwrap();
        assert_eq!(trust.subscribe().borrow().own.is_some(), counts);
    }
}

#[tokio::test(start_paused = true)]
async fn a_missing_issuer_is_asked_about_less_often_and_found_within_a_minute() {
    let issuer_ref = IssuerRef { name: "later".into(), ..issuer_ref() };
    let world = World::with(RequestNamespace::Fixed("sds-agent".into()), issuer_ref, FakeApi::new());
    for _ in 0..600 {
        end(world.order("cart").0).await.unwrap_err();
        tokio::time::sleep(Duration::from_secs(6)).await;
    }
    let asked = world.api.count("get", "clusterissuers");
    assert!(asked <= 70, "{asked} times in an hour");

    world.api.put("clusterissuers", ready_issuer("ClusterIssuer", "later", json!({"ca": {"secretName": "s"}})));
    tokio::time::sleep(MINUTE).await;
    let (task, _) = world.order("cart");
    world.issue(&world.request().await);
    end(task).await.unwrap();
}
