//! The main case: two real Envoys, each in its pod's cgroup, with certificates from the real cert-manager that are replaced before they
//! expire.

use std::{fs, time::Duration};

use tempfile::TempDir;
use test_harness::{
    agent::{Agent, Launch},
    cgroups::PodCgroup,
    child,
    cluster::{AgentPod, Cluster, Pod},
    envoy::{Envoy, Sds, Side},
    eventually,
    pair::{End, Pair},
    tools,
};
use x509_parser::{extensions::GeneralName, pem::Pem};

const PATIENCE: Duration = Duration::from_secs(30);

/// A node with an agent and two pods on it.
struct Node {
    cluster: Cluster,
    agent_pod: AgentPod,
    launch: Launch,
    agent: Agent,
    server: (Pod, PodCgroup),
    client: (Pod, PodCgroup),
    dir: TempDir,
}

impl Node {
    /// `certificate` is the value of that field in the agent's configuration.
    async fn start(certificate: &str) -> Self {
        let cluster = Cluster::connect().await;
        let dir = tempfile::tempdir().unwrap();
        let node = cluster.node().await;
        let namespace = cluster.namespace().await;
        let agent_pod = cluster.agent(dir.path(), &node).await;
        let launch = agent_pod.launch(dir.path(), &format!("certificate: {certificate}"));
        let agent = launch.start().await;
        let [server, client] = [cluster.pod(&namespace, "server", &node).await, cluster.pod(&namespace, "client", &node).await];
        let (server_cgroup, client_cgroup) = (PodCgroup::new(&server.uid), PodCgroup::new(&client.uid));
        Self { cluster, agent_pod, launch, agent, server: (server, server_cgroup), client: (client, client_cgroup), dir }
    }

    fn ids(&self) -> (String, String) {
        (self.server.0.spiffe_id(), self.client.0.spiffe_id())
    }

    async fn pair(&self) -> Pair {
        let (server, client) = self.ids();
        self.pair_expecting((&server, &client)).await
    }

    /// Two Envoys, one with each protocol variant.
    async fn pair_expecting(&self, expected: (&str, &str)) -> Pair {
        let (server, client) = self.ids();
        let server = End { id: &server, sds: Sds::StateOfTheWorld, cgroup: Some(&self.server.1) };
        let client = End { id: &client, sds: Sds::Delta, cgroup: Some(&self.client.1) };
        Pair::expecting(self.agent.socket(), server, client, expected).await
    }

    /// Prints the time for the first certificate, the agent's own share of it, and the time for a cached one.
    async fn figures(&self, pair: &Pair, key: &str) {
        let id = &self.ids().1;
        let second = Envoy::start(Side::Server { client: id }, self.agent.socket(), Sds::StateOfTheWorld, Some(&self.server.1)).await;
        second.live().await;
        let (cold, cached) = (pair.server.took().as_millis(), second.took().as_millis());
        eprintln!("figure: {key}: a server Envoy's start to its first secrets: {cold} ms cold, {cached} ms cached");

        // Mean in milliseconds of the two orders so far. Neither of them was a renewal.
        let mean = async |name: &str, labels: &[&str]| {
            let count = self.agent.metric_of(&format!("sds_agent_{name}_seconds_count"), labels).await;
            assert!((count - 2.0).abs() < 0.5, "{name} {labels:?} was measured {count} times");
            self.agent.metric_of(&format!("sds_agent_{name}_seconds_sum"), labels).await / count * 1000.0
        };
        let whole = mean("first_secret_duration", &["cache=\"miss\""]).await;
        let call = mean("kube_request_duration", &["verb=\"create\"", "resource=\"certificaterequests\""]).await;
        let [create, approve, sign] = ["create", "approve", "sign"].map(|phase| format!("phase=\"{phase}\""));
        let create = mean("issuance_duration", &[&create]).await;
        let signer = mean("issuance_duration", &[&approve]).await + mean("issuance_duration", &[&sign]).await;
        let own = whole - call - signer;
        let build = if cfg!(debug_assertions) { "debug build" } else { "release build" };
        eprintln!(
            "figure: {key}, {build}: first request to secret pushed {whole:.1} ms; from the CertificateRequest's creation {:.1} ms; \
             the create call {call:.1} ms, approver and signer {signer:.1} ms, our own share {own:.1} ms",
            whole - create
        );
        assert!(own > 0.0, "the parts exceed the whole");
    }

    /// Every request has been consumed and deleted.
    async fn assert_no_requests_left(&self) {
        let namespace = &self.agent_pod.pod.namespace;
        eventually("no CertificateRequest is left", PATIENCE, async || {
            let left = self.cluster.requests(namespace).await;
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
    }
}

#[tokio::test]
async fn mtls_with_p256() {
    mtls("ecdsa-p256", "1.2.840.10045.2.1", 256).await;
}

#[tokio::test]
async fn mtls_with_rsa_2048() {
    mtls("rsa-2048", "1.2.840.113549.1.1.1", 2048).await;
}

async fn mtls(key: &str, algorithm: &str, bits: usize) {
    let _turn = test_harness::turn().await;
    let node = Node::start(&format!("{{ lifetime: 1h, key: {key} }}")).await;
    let pair = node.pair().await;
    pair.request().await.unwrap();

    // The certificate that the server presents to every client: its name, its key type, and a chain to the private CA only.
    let authority = node.dir.path().join("authority.pem");
    fs::write(&authority, node.cluster.authority().await).unwrap();
    let shown = s_client(&pair, authority.to_str().unwrap()).await;
    assert!(shown.contains("Verify return code: 0 (ok)"), "{shown}");
    let chain: Vec<_> = Pem::iter_from_buffer(shown.as_bytes()).map(Result::unwrap).filter(|pem| pem.label == "CERTIFICATE").collect();
    let leaf = chain.first().expect("openssl shows the chain").parse_x509().unwrap();
    let names = leaf.subject_alternative_name().unwrap().expect("a SAN").value.general_names.as_slice();
    let id = node.server.0.spiffe_id();
    assert!(matches!(names, [GeneralName::URI(uri)] if *uri == id), "{names:?}");
    assert_eq!(leaf.public_key().algorithm.algorithm.to_id_string(), algorithm);
    assert_eq!(leaf.public_key().parsed().unwrap().key_size(), bits);
    let root = fs::read(&authority).unwrap();
    let (_, root) = x509_parser::pem::parse_x509_pem(&root).unwrap();
    assert_eq!(leaf.issuer().as_raw(), root.parse_x509().unwrap().subject().as_raw());

    // The check can fail: another authority is not accepted.
    let other = node.dir.path().join("other.pem");
    let foreign = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    fs::write(&other, params.self_signed(&foreign).unwrap().pem()).unwrap();
    let shown = s_client(&pair, other.to_str().unwrap()).await;
    assert!(!shown.contains("Verify return code: 0 (ok)"), "{shown}");

    node.assert_no_requests_left().await;
    node.figures(&pair, key).await;
}

async fn s_client(pair: &Pair, authority: &str) -> String {
    let address = pair.tls.to_string();
    let arguments = ["s_client", "-connect", &address, "-showcerts", "-no-CApath", "-no-CAstore", "-CAfile", authority];
    let output = child::run(&tools::openssl(), &arguments, PATIENCE).await;
    // The exit code is ignored: the server rejects this client, which has no certificate.
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test]
async fn a_wrong_id_is_refused_by_either_side() {
    let _turn = test_harness::turn().await;
    let node = Node::start("{ lifetime: 1h }").await;
    let (server, client) = node.ids();
    let stranger = "spiffe://cluster.local/ns/elsewhere/sa/stranger";
    let refusals = async |envoy: &Envoy| envoy.stats().await.sum(".ssl.fail_verify_san");

    let pair = node.pair_expecting((stranger, &client)).await;
    pair.request().await.expect_err("the client expects another server");
    assert_eq!((refusals(&pair.client).await, refusals(&pair.server).await), (1, 0));
    drop(pair);

    let pair = node.pair_expecting((&server, stranger)).await;
    pair.request().await.expect_err("the server expects another client");
    assert_eq!((refusals(&pair.client).await, refusals(&pair.server).await), (0, 1));
}

#[tokio::test]
async fn certificates_of_30_seconds_rotate_under_load() {
    const ROTATIONS: u64 = 4;
    let _turn = test_harness::turn().await;
    let node = Node::start("{ lifetime: 30s }").await;
    let recorder = node.cluster.record_requests(&node.agent_pod.pod.namespace).await;
    let pair = node.pair().await;
    let before = pair.taken().await;

    let load = pair.load();
    pair.rotated_under(&load, before, ROTATIONS, Duration::from_secs(180)).await;
    let tally = load.stop().await;

    pair.assert_clean(&tally).await;
    for envoy in [&pair.server, &pair.client] {
        assert!(envoy.stats().await.sum("ssl_context_update_by_sds") >= ROTATIONS);
    }
    node.assert_no_requests_left().await;
    let (server, client) = node.ids();
    for id in [server, client] {
        let made = recorder.seen().iter().filter(|request| request.uris == [id.as_str()]).count();
        assert!(
            made > usize::try_from(ROTATIONS).unwrap(),
            "{id}: only {made} requests were seen, so the certificates came from elsewhere"
        );
    }
}

#[tokio::test]
async fn a_restart_costs_no_handshake_and_no_early_request() {
    let _turn = test_harness::turn().await;
    // No renewal may be due before the restart is over. The duration of the restart depends on the machine.
    for lifetime in ["90s", "5m", "20m"] {
        if restart_before_the_renewal(lifetime).await {
            return;
        }
        eprintln!("a renewal of certificates of {lifetime} was due before the restart was over: again, with longer ones");
    }
    panic!("the machine is too slow for this test");
}

/// Returns whether the restart was over before a renewal was due.
async fn restart_before_the_renewal(lifetime: &str) -> bool {
    let mut node = Node::start(&format!("{{ lifetime: {lifetime} }}")).await;
    let pair = node.pair().await;
    let (server, client) = node.ids();
    let planned = [
        (server, renewal(&pair.server.version("default").await.unwrap())),
        (client, renewal(&pair.client.version("default").await.unwrap())),
    ];
    node.assert_no_requests_left().await;
    let recorder = node.cluster.record_requests(&node.agent_pod.pod.namespace).await;
    let before = pair.taken().await;

    let load = pair.load();
    load.passes("before the restart").await;
    node.agent.kill().await;
    load.passes("without an agent").await;
    node.agent = node.launch.start().await;
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    if planned.iter().any(|(_, at)| now >= *at) {
        return false;
    }
    // At least the longest of the lifetimes.
    pair.rotated(before, 1, Duration::from_secs(1200)).await;
    load.passes("after the renewal").await;
    let tally = load.stop().await;

    pair.assert_clean(&tally).await;
    let requests = recorder.seen();
    for (id, at) in &planned {
        let first = requests.iter().find(|request| request.uris == [id.as_str()]).unwrap_or_else(|| panic!("no request for {id}"));
        let created = u64::try_from(first.created).unwrap();
        assert!(created >= *at, "{id}: {} came at {created}, {} s before its renewal time", first.name, at - created);
    }
    true
}

/// The renewal time in a certificate's version, `<notAfter>-<renewAt>-…`, in Unix seconds.
fn renewal(version: &str) -> u64 {
    version.split('-').nth(1).and_then(|part| part.parse().ok()).unwrap_or_else(|| panic!("{version:?} has no renewal time"))
}
