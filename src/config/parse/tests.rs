//! The rules of the whole file: defaults, order, warnings, the environment, and no panic for any input.

use cert_manager::{IssuerRef, RequestNamespace};
use issuance::issuer::certificate_request;
use proptest::prelude::*;
use workload_identity::{IssuerName, KeyType, PodRef};

use super::*;
use crate::{
    config::{IssuerConfig, SharedSocket, TrustSource},
    per_pod::PerPod,
    warm::WarmUp,
};

mod mistakes;
mod profiles;

/// A sample with every default written out, and one profile.
const SAMPLE: &str = r#"
trustDomain: cluster.local
sockets:
  shared: { path: /run/sds-agent/sds.sock, mode: "0666" }
  perPod: { enabled: false, directory: /run/sds-agent/pods }
attestation: kubernetes
identity:
  spiffeId: spiffe://{trustDomain}/ns/{namespace}/sa/{serviceAccount}
  dnsNames: []
certificate: { lifetime: 24h, key: ecdsa-p256, renewAt: 0.5, jitter: 0.1 }
issuer:
  certManager:
    issuerRef: { name: mesh-ca, kind: ClusterIssuer, group: cert-manager.io }
    namespace: sds-agent
profiles:
  - name: payments
    match: { namespaces: [payments], serviceAccounts: ["*"] }
    issuerRef: { name: payments-ca, kind: ClusterIssuer }
    certificate: { lifetime: 1h }
trust:
  sources: [ { configMap: { namespace: cert-manager, name: mesh-roots, key: ca.crt } } ]
  federated: { partner.example: { file: /etc/sds-agent/partner.pem } }
admin: { address: 127.0.0.1:15090 }
metrics: { address: "[::]:15091", perWorkload: false }
probes: { address: "[::]:15092" }
"#;

/// The shortest configuration for a pod.
const LEAST: &str = "issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }\n\
                     trust: { sources: [ { configMap: { namespace: cert-manager, name: mesh-roots } } ] }\n";

fn in_a_pod(name: &str) -> Option<String> {
    let value = match name {
        "NODE_NAME" => "node-1",
        "POD_NAMESPACE" => "sds-agent",
        "POD_NAME" => "sds-agent-x7k2p",
        "POD_UID" => "7f3f5d0e-5b1c-4f5e-9f60-0d3a52b1a001",
        _ => return None,
    };
    Some(value.to_owned())
}

fn load(text: &str) -> Loaded {
    Config::parse(text, &in_a_pod).unwrap()
}

fn errors(text: &str) -> Vec<String> {
    Config::parse(text, &in_a_pod).unwrap_err().to_string().lines().map(str::to_owned).collect()
}

fn warnings(text: &str) -> Vec<String> {
    load(text).warnings.iter().map(ToString::to_string).collect()
}

#[test]
fn the_sample_of_the_design_is_understood_and_says_what_the_defaults_say() {
    let Loaded { config, warnings } = load(SAMPLE);
    assert_eq!(warnings, []);
    assert_eq!(config.federated.len(), 1);
    let least = load(LEAST);
    assert_eq!(least.warnings, []);
    let issuer = |name: &str| {
        IssuerConfig::CertManager(certificate_request::Settings {
            issuer_ref: IssuerRef { name: name.into(), kind: "ClusterIssuer".into(), group: "cert-manager.io".into() },
            namespace: RequestNamespace::Fixed("sds-agent".into()),
            trust_status_ca: false,
        })
    };
    let default = (IssuerName("default".into()), issuer("mesh-ca"));
    assert_eq!(config.issuers, BTreeMap::from([default.clone(), (IssuerName("payments".into()), issuer("payments-ca"))]));
    let one = Config { federated: BTreeMap::new(), profiles: Vec::new(), issuers: BTreeMap::from([default]), ..config.clone() };
    assert_eq!(one, least.config);
    let shared = SharedSocket { path: "/run/sds-agent/sds.sock".into(), mode: 0o666, accept_pid_reuse: false };
    assert_eq!((config.shared_socket, config.per_pod), (Some(shared), None));
    assert_eq!(config.default_profile.lifetime, Duration::from_secs(86_400));
    assert_eq!((config.retention, config.drain), (Duration::from_secs(300), Duration::from_secs(10)));
    assert_eq!(config.limits, Limits::default());
    assert_eq!(config.kubernetes, RequestRate { per_second: 20, burst: 40 });
    assert_eq!(config.node.node_name.as_deref(), Some("node-1"));
    let pod = PodRef { namespace: "sds-agent".into(), name: "sds-agent-x7k2p".into(), uid: "7f3f5d0e-5b1c-4f5e-9f60-0d3a52b1a001".into() };
    assert_eq!(config.node.pod, Some(pod));
}

#[test]
fn every_field_is_read() {
    let text = r#"
trustDomain: mesh.example
sockets: { shared: { path: /tmp/a.sock, mode: 0600 } }
attestation: unix
identity: { spiffeId: "spiffe://{trustDomain}/user/{uid}", dnsNames: ["u{uid}.users.{trustDomain}"] }
certificate: { lifetime: 2h 30m, key: rsa-3072, renewAt: "0.6", jitter: 0 }
issuer:
  certManager:
    issuerRef: { name: vault, kind: VaultThing, group: example.com }
    namespace: requests
    trustStatusCA: true
trust: { sources: [ { file: /a.pem } ], federated: { b.example: { configMap: { namespace: n, name: m, key: roots.pem } } } }
names: { certificate: own, bundle: roots }
keys: { lockMemory: never }
limits:
  { connections: 10, connectionsPerPod: 3, streams: 30, streamsPerPod: 4, streamsPerConnection: "20", messageBytes: 70000, namesPerStream: 5, memoryBytes: 10485760, memoryBytesPerPod: 2097152,
    newConnectionsPerSecondPerPod: 6, newConnectionsBurstPerPod: 7, idle: 1m }
kubernetes: { requestsPerSecond: 5, burst: "9" }
retention: 1h
reissueOver: 3m
drain: 1s
admin: { address: "[::1]:1" }
metrics: { address: 127.0.0.1:2, perWorkload: true }
probes: { address: 127.0.0.1:4 }
workerThreads: 3
approver: { agents: ["system:serviceaccount:mesh:agent"], overlap: 2m }
authorityEpoch: 7
"#;
    let Loaded { config, warnings } = Config::parse(text, &|_| None).unwrap();
    assert_eq!(warnings, []);
    let profile = &config.default_profile;
    assert_eq!((&*profile.spiffe_id, &*profile.dns_names[0]), ("spiffe://{trustDomain}/user/{uid}", "u{uid}.users.{trustDomain}"));
    assert_eq!((profile.key, profile.renew_at, profile.jitter, profile.epoch), (KeyType::Rsa3072, 0.6, 0.0, 7));
    assert_eq!(profile.lifetime, Duration::from_secs(9000));
    assert_eq!(config.shared_socket.unwrap().mode, 0o600);
    assert_eq!(config.names, Names { certificate: "own".into(), bundle: "roots".into() });
    assert_eq!(config.reissue_over, Duration::from_secs(180));
    assert_eq!((config.lock_memory, config.attestation, config.worker_threads), (LockMemory::Never, Attestation::Unix, 3));
    assert_eq!(config.approver.agents, ["system:serviceaccount:mesh:agent"]);
    assert_eq!(config.approver.overlap, Duration::from_secs(120));
    assert_eq!(config.trust_sources, [TrustSource::File { path: "/a.pem".into() }]);
    let federated = TrustSource::ConfigMap { namespace: "n".into(), name: "m".into(), key: "roots.pem".into() };
    assert_eq!(config.federated, BTreeMap::from([(TrustDomain::new("b.example").unwrap(), federated)]));
    assert_eq!([config.admin, config.metrics, config.probes].map(|it| it.to_string()), ["[::1]:1", "127.0.0.1:2", "127.0.0.1:4"]);
    assert!(config.metrics_per_workload);
    let limits = Limits {
        connections: 10,
        connections_per_pod: 3,
        streams: 30,
        streams_per_pod: 4,
        streams_per_connection: 20,
        new_connections_per_second_per_pod: 6,
        new_connections_burst_per_pod: 7,
        message_bytes: 70_000,
        names_per_stream: 5,
        memory_bytes: 10 << 20,
        memory_bytes_per_pod: 2 << 20,
        idle: Duration::from_secs(60),
    };
    assert_eq!(config.limits, limits);
    assert_eq!(config.kubernetes, RequestRate { per_second: 5, burst: 9 });
}

#[test]
fn who_of_a_pod_may_fetch_is_read_and_is_everybody_unless_told() {
    assert_eq!(load(LEAST).config.attestation_policy, AttestationPolicy::default());
    let config = load(&format!("attestationPolicy: {{ containers: [istio-proxy, envoy], uids: [1337, \"0\"] }}\n{LEAST}")).config;
    let expected = AttestationPolicy { containers: vec!["istio-proxy".into(), "envoy".into()], uids: vec![1337, 0] };
    assert_eq!(config.attestation_policy, expected);
    let loaded = load(&format!("sockets: {{ shared: {{ acceptPidReuse: true }} }}\n{LEAST}"));
    assert!(loaded.config.shared_socket.unwrap().accept_pid_reuse);
    assert!(loaded.warnings[0].to_string().starts_with("sockets.shared.acceptPidReuse: before Linux 6.5, "), "{:?}", loaded.warnings);
    let unread = load(&format!(
        "attestationPolicy: {{ uids: [1] }}\nsockets: {{ shared: {{ enabled: false }}, perPod: {{ enabled: true }} }}\n{LEAST}"
    ));
    assert!(unread.warnings[0].to_string().starts_with("attestationPolicy: applies to callers of sockets.shared"), "{:?}", unread.warnings);
}

#[test]
fn pods_are_warmed_up_only_where_that_is_enabled() {
    for text in ["", "warmUp: { podLabels: { mesh: \"on\" }, socketMount: false }\n"] {
        assert_eq!(load(&format!("{text}{LEAST}")).config.warm_up, None);
    }
    let told = |text: &str| load(&format!("warmUp: {{ enabled: true{text} }}\n{LEAST}")).config.warm_up.unwrap();
    assert_eq!(told(""), WarmUp { pod_labels: BTreeMap::new(), socket_mount: true });
    let pod_labels = BTreeMap::from([("mesh".to_owned(), "on".to_owned())]);
    assert_eq!(told(", socketMount: false, podLabels: { mesh: \"on\" }"), WarmUp { pod_labels, socket_mount: false });
}

#[test]
fn sockets_of_pods_stand_beside_the_shared_one_or_instead_of_it() {
    let defaults = PerPod {
        directory: "/run/sds-agent-pods".into(),
        driver_name: "csi.sds-agent.io".into(),
        kubelet_directory: "/var/lib/kubelet".into(),
        wait_for_certificate: Duration::ZERO,
    };
    let config = load(&format!("sockets: {{ perPod: {{ enabled: true }} }}\n{LEAST}")).config;
    assert!(config.shared_socket.is_some());
    assert_eq!(config.per_pod, Some(defaults));

    let text = "sockets:\n  shared: { enabled: false }\n  perPod: { enabled: true, directory: /run/sds-agent/pods, driverName: sds.example, \
                kubeletDirectory: /k, waitForCertificate: 5s }\n";
    let config = load(&format!("{text}{LEAST}")).config;
    assert_eq!(config.shared_socket, None);
    let per_pod = config.per_pod.unwrap();
    assert_eq!(per_pod.driver_socket(), Path::new("/k/plugins/sds.example/csi.sock"));
    assert_eq!(per_pod.registration_socket(), Path::new("/k/plugins_registry/sds.example-reg.sock"));
    assert_eq!((per_pod.directory.as_path(), per_pod.wait_for_certificate), (Path::new("/run/sds-agent/pods"), Duration::from_secs(5)));
}

#[test]
fn every_error_is_reported_at_once_in_the_order_of_the_fields() {
    let text = "trustDomain: A\ncertificate: { key: ed25519, lifetime: x }\nadmin: { address: 1.2.3.4:5 }\nbogus: 1\n";
    let fields: Vec<String> = errors(text).iter().map(|line| line.split(": ").next().unwrap().to_owned()).collect();
    assert_eq!(fields, ["trustDomain", "certificate.lifetime", "certificate.key", "issuer", "admin.address", "bogus"]);
}

#[test]
fn yaml_that_is_broken_says_where() {
    let table = [
        ("a: [1,\nb: 2", "line 1, column 4: unclosed bracket '['; correct the YAML there"),
        (
            "retention: 1m\nretention: 2m\n",
            "line 2, column 1: duplicate mapping key `retention` is not allowed here; correct the YAML there",
        ),
        ("a: {b: 1, b: 2}", "line 1, column 11: duplicate mapping key `b` is not allowed here; correct the YAML there"),
        ("a: .nan", "line 1, column 4: value `.nan` is not a finite number; correct the YAML there"),
        ("- 1", "the file: a list is not a mapping; write its fields as `name: value`"),
    ];
    for (text, expected) in table {
        assert_eq!(errors(text)[0], expected, "{text}");
    }
    assert!(errors("a: 1\n---\nb: 2\n")[0].starts_with("line 3, column 1: "));
    assert!(errors(&format!("a: {}", "[".repeat(5000)))[0].starts_with("line 1, column "));
}

#[test]
fn kubernetes_attestation_needs_the_node_and_says_how_to_tell_it() {
    let expected = "NODE_NAME: is not set, and `attestation: kubernetes` serves the pods of one node; add to the container \
                    `env: [{ name: NODE_NAME, valueFrom: { fieldRef: { fieldPath: spec.nodeName } } }]`";
    assert_eq!(Config::parse(LEAST, &|_| None).unwrap_err().to_string(), expected);
    assert!(Config::parse(&format!("attestation: unix\n{LEAST}"), &|_| None).is_ok());
    let bad = Config::parse(LEAST, &|name| (name == "NODE_NAME").then(|| "a b".to_owned())).unwrap_err();
    assert!(bad.to_string().starts_with(r#"NODE_NAME: "a b" is not the name of a Kubernetes object; "#), "{bad}");
}

#[test]
fn the_namespace_of_requests_is_the_agents_own_unless_told() {
    let namespace = |env: Env<'_>| match Config::parse(LEAST, env).unwrap().config.issuers.into_values().next().unwrap() {
        IssuerConfig::CertManager(cert_manager) => cert_manager.namespace,
        IssuerConfig::Embedded => unreachable!(),
    };
    let told = |name: &str| (name == "NODE_NAME").then(|| "n".to_owned());
    assert_eq!(namespace(&told), RequestNamespace::Fixed("sds-agent".into()));
    let told = |name: &str| matches!(name, "NODE_NAME" | "POD_NAMESPACE").then(|| "mesh-system".to_owned());
    assert_eq!(namespace(&told), RequestNamespace::Fixed("mesh-system".into()));
}

#[test]
fn what_works_but_deserves_a_thought_is_a_warning() {
    let with = |text: &str| warnings(&format!("{text}\n{LEAST}"));
    let one = |text: &str| {
        let mut all = with(text);
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    };
    assert!(one("certificate: { key: ecdsa-p384 }").starts_with("certificate.key: ecdsa-p384 works between Envoys only with"));
    assert!(one("certificate: { lifetime: 2years }").starts_with("certificate.lifetime: is longer than a year"));
    let hint = "certificate.lifetime: 30m means 1.1 requests per second for each 1,000 identities of the cluster; ";
    assert!(one("certificate: { lifetime: 30m }").starts_with(hint));
    assert!(one("retention: 10s").starts_with("retention: an Envoy that reconnects takes up to 30s"));
    let alike = one("identity: { spiffeId: 'spiffe://{trustDomain}/ns/{namespace}' }");
    assert!(alike.contains("gives different workloads the same identity"), "{alike}");

    let embedded = warnings("issuer: { embedded: {} }");
    assert!(embedded[0].starts_with("issuer.embedded: is an authority in this process's memory, for development and tests only"));
    let rootless = warnings("issuer: { certManager: { issuerRef: { name: a, kind: Issuer }, namespace: workload } }");
    assert!(rootless[0].starts_with("issuer.certManager.namespace: workload: every workload's namespace needs an Issuer \"a\""));
    assert!(rootless[1].starts_with("trust.sources: is empty: requests for the bundle (ROOTCA) are not answered"));
    let told = |name: &str| (name == "NODE_NAME").then(|| "n".to_owned());
    let unowned = Config::parse(LEAST, &told).unwrap().warnings;
    assert!(unowned[0].to_string().starts_with("POD_NAME: is not set with POD_NAMESPACE and POD_UID"), "{unowned:?}");
}

#[test]
fn the_length_of_the_socket_path_is_bounded() {
    let at = |len: usize| format!("sockets: {{ shared: {{ path: /{} }} }}\n{LEAST}", "a".repeat(len - 1));
    assert!(Config::parse(&at(100), &in_a_pod).is_ok());
    assert!(errors(&at(101))[0].ends_with("is 101 bytes long, and the kernel's limit allows 100; choose a shorter path"));
}

#[test]
fn a_private_key_in_the_wrong_place_is_not_repeated() {
    let text = "trustDomain: \"-----BEGIN PRIVATE KEY-----\\nabc\"\nissuer: { embedded: {} }";
    assert_eq!(errors(text), ["trustDomain: (a private key, not shown) has control characters; write it on one line"]);
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a test's own file")]
fn a_file_that_cannot_be_read_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("missing.yaml");
    let error = Config::load(&path, &in_a_pod).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}: cannot be read: No such file", path.display())), "{error}");
    assert!(error.ends_with("; name a readable YAML file with --config"), "{error}");
    std::fs::write(&path, b"\xff\xfe").unwrap();
    assert!(Config::load(&path, &in_a_pod).unwrap_err().to_string().contains("is not UTF-8 text"));
    std::fs::write(&path, LEAST).unwrap();
    assert_eq!(Config::load(&path, &in_a_pod).unwrap(), load(LEAST));
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "(?s).{0,200}") {
        let _ = Config::parse(&text, &in_a_pod);
    }

    #[test]
    fn no_value_anywhere_makes_it_panic(
        field in prop::sample::select(known_fields().into_iter().collect::<Vec<_>>()),
        value in prop_oneof![
            "[-{}\\[\\],:#&*!|>'\"%@`a-z0-9. ]{0,12}",
            any::<f64>().prop_map(|n| n.to_string()),
            any::<i64>().prop_map(|n| n.to_string()),
            Just("9999999999999999999999s".to_owned()),
            Just("{}".to_owned()),
            Just("[{}]".to_owned()),
            Just("[[[]], null, {a: 1}]".to_owned()),
        ],
    ) {
        let mut text = String::new();
        for (depth, part) in field.split('.').enumerate() {
            let part = part.replace("<name>", "other.example");
            let indent = "  ".repeat(depth);
            match part.strip_suffix("[]") {
                Some(list) => text += &format!("{indent}{list}:\n{indent} -\n"),
                None => text += &format!("{indent}{part}:\n"),
            }
        }
        let text = format!("{} {value}\n", text.trim_end());
        if let Err(errors) = Config::parse(&text, &in_a_pod) {
            prop_assert!(!errors.0.is_empty());
        }
    }
}
