//! Certificates from Vault by cert-manager's own Vault issuer: chains of three, a role that refuses SPIFFE names, an unavailable Vault.
//! Roots from trust-manager's own controller.
//!
//! `make test-long GROUP=vault`. Unit tests pin the texts of Vault's errors too (`vault_words.rs`); here they come from Vault itself.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::cast_precision_loss,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "tests write files for other programs, wait for those, and fail loudly"
)]

use std::time::Duration;

use serde_json::{Value, json};
use test_harness::{
    agent::{Agent, Launch},
    cluster::Cluster,
    doctor::{detail, doctor},
    envoy::Sds,
    eventually,
    pair::{End, Pair},
    scene::{PATIENCE, Scene},
};
use x509_parser::pem::Pem;

use self::server::{Vault, Wire};

mod server;
mod trust_manager;

/// Limit for steps that cert-manager retries with its own backoff.
const SIGNED: Duration = Duration::from_secs(120);

/// A node whose agent reads its roots from a ConfigMap that contains Vault's root.
struct World {
    scene: Scene,
    vault: Vault,
}

impl World {
    /// Vault has a correct role `mesh`, and a role `seed` with typical settings for DNS names.
    async fn new() -> Self {
        let cluster = Cluster::shared().await;
        let mut scene = Scene::new(&cluster).await;
        scene.agent_pod = scene.agent_pod.with_own_roots().await;
        let vault = Vault::start(&cluster, scene.dir.path(), &scene.namespace).await;
        let mesh = json!({"allowed_uri_sans": "spiffe://cluster.local/*", "key_type": "any", "require_cn": false, "max_ttl": "24h"});
        vault.write("pki/roles/mesh", mesh).await;
        vault.write("pki/roles/seed", json!({"allowed_domains": "svc.cluster.local", "allow_subdomains": true, "max_ttl": "24h"})).await;
        let roots = json!({"metadata": {"name": "roots"}, "data": {"ca.crt": vault.root}});
        cluster.create(&format!("/api/v1/namespaces/{}/configmaps", scene.agent_pod.pod.namespace), &roots).await;
        Self { scene, vault }
    }

    /// How to start the agent with a ClusterIssuer of that role.
    async fn launch(&mut self, role: &str, server: &str, certificate: &str) -> Launch {
        let issuer = self.vault.issuer(&self.scene.cluster, role, role, server).await;
        self.scene.agent_pod.issuer = format!("{{ name: {issuer}, kind: ClusterIssuer }}");
        self.scene.agent_pod.launch(self.scene.dir.path(), &format!("certificate: {certificate}"))
    }
}

fn chain(certificate: &Value) -> Vec<Pem> {
    let pem = certificate["chain_pem"].as_str().expect("a chain");
    Pem::iter_from_buffer(pem.as_bytes()).map(Result::unwrap).collect()
}

/// The log line about an order of `id` that failed or waits, and its cause.
async fn no_certificate(agent: &Agent, id: &str) -> (Value, String) {
    let line = agent.logs("the refusal", PATIENCE, |line| text(line, "cause").is_some() && text(line, "identity") == Some(id)).await;
    let cause = text(&line, "cause").expect("a cause").to_owned();
    (line, cause)
}

/// A field of a log line, at either level of the JSON.
fn text<'a>(line: &'a Value, field: &str) -> Option<&'a str> {
    line.get(field).or_else(|| line["fields"].get(field))?.as_str()
}

fn number(line: &Value, field: &str) -> u64 {
    line.get(field).or_else(|| line["fields"].get(field)).and_then(Value::as_u64).unwrap_or_else(|| panic!("no {field}: {line}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_of_three_from_vault_serves_two_envoys() {
    const ROTATIONS: u64 = 3;
    let _turn = test_harness::turn().await;
    let mut world = World::new().await;
    let server = world.vault.server();
    let launch = world.launch("mesh", &server, "{ lifetime: 60s }").await;
    let agent = launch.start().await;
    let [server, client] = [world.scene.workload("server").await, world.scene.workload("client").await];
    let (server_id, client_id) = (server.id(), client.id());
    let ends = [(&server_id, Sds::StateOfTheWorld, &server), (&client_id, Sds::Delta, &client)];
    let [at_server, at_client] = ends.map(|(id, sds, workload)| End { id, sds, cgroup: Some(&workload.cgroup) });
    let pair = Pair::start(agent.socket(), at_server, at_client).await;

    // Leaf and intermediate are served in the chain; the root is only in the bundle.
    let certificate = server.fetch(&agent).await;
    let shown = chain(&certificate);
    let [leaf, intermediate] = &shown[..] else { panic!("{} certificates", shown.len()) };
    let (leaf, intermediate) = (leaf.parse_x509().unwrap(), intermediate.parse_x509().unwrap());
    let (_, root) = x509_parser::pem::parse_x509_pem(world.vault.root.as_bytes()).unwrap();
    let root = root.parse_x509().unwrap();
    assert_eq!((leaf.issuer(), intermediate.issuer()), (intermediate.subject(), root.subject()));
    assert_eq!(root.issuer(), root.subject());
    leaf.verify_signature(Some(intermediate.public_key())).unwrap();
    intermediate.verify_signature(Some(root.public_key())).unwrap();
    let roots = server.fetch_roots(&agent).await;
    assert_eq!(roots["trusted_ca_pem"].as_str().map(str::trim), Some(world.vault.root.trim()));

    // Vault sets `notBefore` 30 s back, so these renewals come early. Each is pushed.
    let before = pair.taken().await;
    let load = pair.load();
    pair.rotated_under(&load, before, ROTATIONS, Duration::from_secs(180)).await;
    let tally = load.stop().await;
    pair.assert_clean(&tally).await;
    assert_ne!(server.fetch(&agent).await["serial"], certificate["serial"]);

    let (code, steps) = doctor(&launch, &[]).await;
    assert_eq!(code, Some(0), "{steps:?}");
    let told = detail(&steps, "issuer");
    assert!(told.contains(&format!("Vault at {}, path pki/sign/mesh, Kubernetes auth as role", world.vault.server())), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_refuses_spiffe_names_is_told_what_it_lacks() {
    let mut world = World::new().await;
    let server = world.vault.server();
    let launch = world.launch("seed", &server, "{ lifetime: 1h }").await;
    let agent = launch.start().await;

    // Vault reports one error at a time. The test applies the remedy of each message, until a certificate is issued.
    let uris = "allowed_uri_sans=\"spiffe://cluster.local/*\"";
    for (name, lacks, change) in [
        ("first", "key_type=any", json!({"key_type": "any"})),
        ("second", "require_cn=false", json!({"require_cn": false})),
        ("third", uris, json!({"allowed_uri_sans": "spiffe://cluster.local/*"})),
    ] {
        let workload = world.scene.workload(name).await;
        let stream = workload.watch(agent.socket());
        let (line, cause) = no_certificate(&agent, &workload.id()).await;
        let sentence = format!("the role lacks {lacks}; for SPIFFE it needs all of these: vault patch pki/roles/seed {uris} key_type=any");
        assert!(cause.contains("Vault's role pki/roles/seed refuses the request") && cause.contains(&sentence), "{cause}");
        assert!(number(&line, "retry_in_seconds") >= 240, "only the operator can help: {line}");

        // The row is updated shortly after the log line.
        eventually("the row has the error too", PATIENCE, async || {
            let row = agent.certificate(&workload.id()).await.unwrap_or_default();
            if row["last_error"].as_str().is_some_and(|error| error.contains(&sentence)) { Ok(()) } else { Err(row.to_string()) }
        })
        .await;
        let (code, steps) = doctor(&launch, &[]).await;
        assert_eq!(code, Some(1), "{steps:?}");
        let told = detail(&steps, "requests");
        assert!(told.contains(&workload.id()) && told.contains("Vault's role pki/roles/seed refuses the request"), "{told}");
        let remedies: Vec<_> = steps.iter().filter_map(|step| step["remedy"].as_str()).collect();
        assert!(remedies.iter().any(|remedy| remedy.contains("vault patch pki/roles/seed")), "{remedies:?}");
        assert!(stream.updates().is_empty());
        world.vault.patch("pki/roles/seed", change).await;
    }
    let workload = world.scene.workload("fourth").await;
    assert_eq!(workload.fetch(&agent).await["spiffe_id"], workload.id());
    assert_eq!(chain(&workload.fetch(&agent).await).len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_login_or_a_policy_that_does_not_fit_is_told_and_tried_again() {
    let mut world = World::new().await;
    let server = world.vault.server();
    let launch = world.launch("mesh", &server, "{ lifetime: 1h }").await;
    let (agent, vault) = (launch.start().await, &world.vault);
    let name = format!("vault-mesh-{}", world.scene.namespace);
    let policy = |role: &str| json!({"policy": format!("path \"pki/sign/{role}\" {{ capabilities = [\"create\", \"update\"] }}")});

    // The login succeeds and the policy does not allow this role: the request fails permanently, and the agent soon creates another.
    vault.write(&format!("sys/policies/acl/{name}"), policy("other")).await;
    let workload = world.scene.workload("first").await;
    let stream = workload.watch(agent.socket());
    let (line, cause) = no_certificate(&agent, &workload.id()).await;
    assert!(cause.contains("could not have Vault sign: \"permission denied\": the policy of the auth role must allow"), "{cause}");
    assert!(number(&line, "retry_in_seconds") < 60, "{line}");
    vault.write(&format!("sys/policies/acl/{name}"), policy("mesh")).await;
    stream.update(1, SIGNED).await;

    // The login fails: the request waits, and the log says why.
    vault.write(&format!("auth/kubernetes/role/{name}"), json!({"bound_service_account_names": "somebody"})).await;
    let workload = world.scene.workload("second").await;
    let stream = workload.watch(agent.socket());
    let (line, cause) = no_certificate(&agent, &workload.id()).await;
    assert_eq!(text(&line, "message"), Some("the request waits for its issuer"));
    assert!(cause.contains("could not log in to Vault") && cause.contains("bound_service_account_names"), "{cause}");
    vault.write(&format!("auth/kubernetes/role/{name}"), json!({"bound_service_account_names": name})).await;
    stream.update(1, SIGNED).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_request_is_followed_by_a_new_one_and_nothing_good_is_lost() {
    let mut world = World::new().await;
    let wire = Wire::to(&world.vault).await;
    let launch = world.launch("mesh", &wire.server(), "{ lifetime: 2m, renewAt: 0.3 }").await;
    let agent = launch.start().await;
    let workload = world.scene.workload("app").await;
    let stream = workload.watch(agent.socket());
    let first = stream.update(1, PATIENCE).await;
    let recorder = world.scene.cluster.record_requests(&world.scene.agent_pod.pod.namespace).await;

    // Logins succeed and signatures fail: cert-manager marks the request as failed, and the agent creates another.
    wire.cut_signing(true);
    let failures = || agent.log().into_iter().filter(|line| text(line, "cause").is_some_and(|c| c.contains("could not have Vault sign")));
    eventually("two requests have failed", SIGNED, async || {
        let failed: Vec<_> = failures().filter_map(|line| text(&line, "cause").map(str::to_owned)).collect();
        if failed.len() >= 2 { Ok(()) } else { Err(format!("{failed:?}")) }
    })
    .await;
    for line in failures() {
        assert!(number(&line, "retry_in_seconds") < 60 && number(&line, "valid_for_seconds") > 0, "{line}");
        assert!(text(&line, "cause").unwrap().contains("it does not answer"), "{line}");
    }
    assert!(recorder.seen().len() >= 2, "a failed request is not tried again by cert-manager: {:?}", recorder.seen());
    assert_eq!(stream.updates().len(), 1);
    assert_eq!(workload.fetch(&agent).await["serial"], first["serial"], "the certificate in use stays");
    let (code, steps) = doctor(&launch, &[]).await;
    assert_eq!(code, Some(1), "{steps:?}");
    assert!(detail(&steps, "requests").contains("it does not answer"), "{steps:?}");

    wire.cut_signing(false);
    let second = stream.update(2, SIGNED).await;
    assert_ne!(second["serial"], first["serial"]);
    assert!(agent.certificate(&workload.id()).await.expect("a row")["last_error"].is_null());
    stream.assert_undisturbed();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_waits_while_vault_is_down_and_is_signed_when_it_is_back() {
    let mut world = World::new().await;
    let server = world.vault.server();
    let launch = world.launch("mesh", &server, "{ lifetime: 2m, renewAt: 0.3 }").await;
    let agent = launch.start().await;
    let workload = world.scene.workload("app").await;
    let stream = workload.watch(agent.socket());
    let first = stream.update(1, PATIENCE).await;

    // The login is impossible: cert-manager keeps the request and retries, and the agent keeps it too.
    world.vault.stop();
    let waits =
        agent.logs("why the request waits", SIGNED, |line| text(line, "cause").is_some_and(|c| c.contains("could not log in"))).await;
    assert!(text(&waits, "cause").unwrap().contains("connection refused"), "{waits}");
    let request = text(&waits, "request").expect("its name").to_owned();
    assert_eq!(workload.fetch(&agent).await["serial"], first["serial"], "the certificate in use stays");
    let (code, steps) = doctor(&launch, &[]).await;
    assert_eq!(code, Some(1), "{steps:?}");
    assert!(detail(&steps, "requests").contains("waits: cert-manager could not log in to Vault"), "{steps:?}");

    world.vault.resume().await;
    let second = stream.update(2, SIGNED).await;
    assert_ne!(second["serial"], first["serial"]);
    let signed = agent.log().into_iter().rfind(|line| text(line, "message") == Some("certificate signed"));
    assert_eq!(signed.as_ref().and_then(|line| text(line, "request")), Some(request.as_str()));
    stream.assert_undisturbed();
}
