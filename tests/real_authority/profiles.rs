//! Profiles with two authorities at once. Processes in the cgroups of pods request certificates.

use std::{fs, time::Duration};

use serde_json::{Value, json};
use test_harness::{
    agent::Agent,
    authority::{self, Second},
    child,
    cluster::Cluster,
    eventually,
    scene::{PATIENCE, Scene, Workload},
};
use x509_parser::{pem::Pem, prelude::X509Certificate};

const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";

/// Allows the agent to create requests in another namespace.
async fn allow_requests(scene: &Scene, namespace: &str) {
    let (verbs, agent) = (["create", "get", "list", "watch", "delete"], &scene.agent_pod.pod);
    let path = format!("{RBAC}/namespaces/{namespace}");
    let rules = json!([{"apiGroups": ["cert-manager.io"], "resources": ["certificaterequests"], "verbs": verbs}]);
    scene.cluster.create(&format!("{path}/roles"), &json!({"metadata": {"name": "requests"}, "rules": rules})).await;
    let binding = json!({
        "metadata": {"name": "requests"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "requests"},
        "subjects": [{"kind": "ServiceAccount", "namespace": agent.namespace, "name": agent.service_account}],
    });
    scene.cluster.create(&format!("{path}/rolebindings"), &binding).await;
}

/// A certificate from the output of `fetch`, parsed by another library.
struct Seen {
    update: Value,
    leaf: Pem,
}

impl Seen {
    fn of(update: Value) -> Self {
        let chain = update["chain_pem"].as_str().unwrap().to_owned();
        let leaf = Pem::iter_from_buffer(chain.as_bytes()).next().unwrap().unwrap();
        Self { update, leaf }
    }

    fn leaf(&self) -> X509Certificate<'_> {
        self.leaf.parse_x509().unwrap()
    }

    fn key_bits(&self) -> usize {
        self.leaf().public_key().parsed().unwrap().key_size()
    }

    fn lifetime(&self) -> i64 {
        let leaf = self.leaf();
        leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp()
    }

    fn serial(&self) -> &str {
        self.update["serial"].as_str().unwrap()
    }
}

/// Whether the chain verifies with this root as the only trust anchor.
async fn leads_to(scene: &Scene, seen: &Seen, root: &str) -> bool {
    authority::leads_to(scene.dir.path(), seen.update["chain_pem"].as_str().unwrap(), root).await
}

/// Another pod of the workload's service account.
async fn sibling(scene: &Scene, of: &Workload, name: &str) -> Workload {
    Workload::of(scene.cluster.pod_of(&of.pod.namespace, &of.pod.service_account, name, &scene.node).await)
}

async fn label(scene: &Scene, workload: &Workload, key: &str, value: &str) {
    scene.cluster.patch(&workload.pod.path(), &json!({"metadata": {"labels": {key: value}}})).await;
}

async fn issued(agent: &Agent, issuer: &str) -> f64 {
    agent.metric_of("sds_agent_issuances_total", &[&format!("issuer=\"{issuer}\""), "result=\"ok\""]).await
}

#[tokio::test]
async fn two_authorities_serve_at_the_same_time_each_whose_profile_names_it() {
    let cluster = Cluster::connect().await;
    let second = Second::create(&cluster).await;
    let mut scene = Scene::new(&cluster).await;
    let first_root = cluster.authority().await;
    let more = scene.dir.path().join("second.pem");
    fs::write(&more, &second.root).unwrap();
    scene.agent_pod.more_roots = vec![more];
    let payments = cluster.namespace().await;
    let requests = cluster.namespace().await;
    allow_requests(&scene, &requests).await;

    let cart = scene.workload("cart").await;
    let cart_2 = sibling(&scene, &cart, "cart-2").await;
    let gold = [sibling(&scene, &cart, "gold-1").await, sibling(&scene, &cart, "gold-2").await];
    for pod in &gold {
        label(&scene, pod, "tier", "gold").await;
    }
    let till = Workload::of(cluster.pod(&payments, "till", &scene.node).await);
    // The namespace takes precedence over the label.
    label(&scene, &till, "tier", "gold").await;

    let settings = format!(
        "certificate: {{ lifetime: 2h }}\n\
         profiles:\n\
         - {{ name: payments, match: {{ namespaces: [{payments}] }}, issuerRef: {{ name: {issuer}, kind: ClusterIssuer }},\n\
         \x20   certificate: {{ lifetime: 1h }} }}\n\
         - {{ name: gold, match: {{ podLabels: {{ tier: gold }} }}, namespace: {requests},\n\
         \x20   certificate: {{ key: rsa-2048, perPod: true }} }}\n",
        issuer = second.issuer
    );
    let launch = scene.agent_pod.launch(scene.dir.path(), &settings);
    let agent = launch.start().await;

    let of_cart = Seen::of(cart.fetch(&agent).await);
    assert_eq!((of_cart.update["spiffe_id"].as_str(), of_cart.key_bits(), of_cart.lifetime()), (Some(cart.id().as_str()), 256, 7200));
    assert!(leads_to(&scene, &of_cart, &first_root).await && !leads_to(&scene, &of_cart, &second.root).await);
    assert_eq!(Seen::of(cart_2.fetch(&agent).await).serial(), of_cart.serial(), "siblings share what no profile divides");

    let of_till = Seen::of(till.fetch(&agent).await);
    assert_eq!((of_till.update["spiffe_id"].as_str(), of_till.key_bits(), of_till.lifetime()), (Some(till.id().as_str()), 256, 3600));
    assert!(leads_to(&scene, &of_till, &second.root).await && !leads_to(&scene, &of_till, &first_root).await);

    let mut serials = vec![of_cart.serial().to_owned()];
    for pod in &gold {
        let seen = Seen::of(pod.fetch(&agent).await);
        assert_eq!((seen.update["spiffe_id"].as_str(), seen.key_bits(), seen.lifetime()), (Some(cart.id().as_str()), 2048, 7200));
        assert!(leads_to(&scene, &seen, &first_root).await);
        assert!(!serials.iter().any(|known| known == seen.serial()), "a pod shares the certificate of another pod");
        serials.push(seen.serial().to_owned());
    }

    // All workloads get one bundle with the roots of both authorities.
    let roots = |text: &str| Pem::iter_from_buffer(text.as_bytes()).map(|pem| pem.unwrap().contents).collect::<Vec<_>>();
    for workload in [&cart, &till] {
        let bundle = roots(workload.fetch_roots(&agent).await["trusted_ca_pem"].as_str().unwrap());
        let wanted = [roots(&first_root), roots(&second.root)].concat();
        assert!(bundle.len() == 2 && wanted.iter().all(|root| bundle.contains(root)), "{} roots", bundle.len());
    }

    // The metrics have one issuer for each authority, named after its profile, and no other issuer.
    assert_eq!((issued(&agent, "default").await, issued(&agent, "payments").await, issued(&agent, "gold").await), (1.0, 1.0, 2.0));
    assert_eq!(agent.metric("sds_agent_issuances_total").await, 4.0);
    eventually("no request is left", PATIENCE, async || {
        let left = [scene.requests().await, cluster.requests(&requests).await].concat();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;

    // A changed label takes effect at the next connection.
    label(&scene, &cart_2, "tier", "gold").await;
    let changed = eventually("the label has arrived", PATIENCE, async || {
        let seen = Seen::of(cart_2.fetch(&agent).await);
        if seen.key_bits() == 2048 { Ok(seen) } else { Err(format!("{} bits", seen.key_bits())) }
    });
    assert!(!serials.contains(&changed.await.serial().to_owned()));

    for (workload, first, rest) in [
        (&till, format!("payments: profiles[0] is the first whose match holds (namespace {payments})"), 0),
        (&gold[0], "gold: profiles[1] is the first whose match holds (label tier=gold)".to_owned(), 1),
        (&cart, "default: no match holds".to_owned(), 2),
    ] {
        let name = format!("{}/{}", workload.pod.namespace, workload.pod.name);
        let output = child::finish(launch.doctor(&["--pod", &name]), PATIENCE).await;
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let step = report["steps"].as_array().unwrap().iter().find(|step| step["name"] == "profile").unwrap();
        let told: Vec<_> = step["detail"].as_str().unwrap().lines().collect();
        assert!(step["result"] == "ok" && told[0] == first && told.len() == 1 + rest, "{step}");
    }
    second.remove(&cluster).await;
}

/// All profiles share one trust bundle. A certificate whose chain does not lead to a root of the bundle is not served, and other
/// identities are not delayed.
#[tokio::test]
async fn an_authority_whose_root_is_not_in_the_bundle_serves_nobody() {
    let cluster = Cluster::connect().await;
    let second = Second::create(&cluster).await;
    let scene = Scene::new(&cluster).await;
    let payments = cluster.namespace().await;
    let cart = scene.workload("cart").await;
    let till = Workload::of(cluster.pod(&payments, "till", &scene.node).await);
    let settings = format!(
        "certificate: {{ lifetime: 1h }}\n\
         profiles: [ {{ name: payments, match: {{ namespaces: ['{}*'] }}, issuerRef: {{ name: {}, kind: ClusterIssuer }} }} ]\n",
        payments, second.issuer
    );
    let agent = scene.agent_pod.launch(scene.dir.path(), &settings).start().await;
    let refusal = till.refusal(&agent, "3s").await;
    assert_eq!(refusal.code, 69, "{refusal:?}");
    assert_eq!(cart.fetch(&agent).await["spiffe_id"], cart.id());
    eventually("it is counted", Duration::from_secs(30), async || {
        let labels = ["issuer=\"payments\"", "result=\"invalid_certificate\""];
        let counted = agent.metric_of("sds_agent_issuances_total", &labels).await;
        if counted > 0.5 { Ok(()) } else { Err(counted.to_string()) }
    })
    .await;
    assert_eq!(issued(&agent, "payments").await, 0.0);
    second.remove(&cluster).await;
}
