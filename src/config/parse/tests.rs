use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::{
    config::{CertManager, IssuerConfig, IssuerRef, RequestNamespace},
    identity::{IssuerName, KeyType, PodRef},
};

const REFERENCE: &str = include_str!("../../../docs/configuration.md");

/// The sample of the design, with what this version does not serve taken out.
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
profiles: []
trust:
  sources: [ { configMap: { namespace: cert-manager, name: mesh-roots, key: ca.crt } } ]
  federated: { partner.example: { file: /etc/sds-agent/partner.pem } }
admin: { address: 127.0.0.1:15090 }
metrics: { address: 0.0.0.0:15091 }
"#;

/// What every configuration of a pod needs, and nothing else.
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
    assert_eq!(Config { federated: BTreeMap::new(), ..config.clone() }, least.config);

    let issuer = IssuerConfig::CertManager(CertManager {
        issuer_ref: IssuerRef { name: "mesh-ca".into(), kind: "ClusterIssuer".into(), group: "cert-manager.io".into() },
        namespace: RequestNamespace::Fixed("sds-agent".into()),
        trust_status_ca: false,
    });
    assert_eq!(config.issuers, BTreeMap::from([(IssuerName("default".into()), issuer)]));
    assert_eq!(config.shared_socket, SharedSocket { path: "/run/sds-agent/sds.sock".into(), mode: 0o666 });
    assert_eq!(config.default_profile.lifetime, Duration::from_secs(86_400));
    assert_eq!((config.retention, config.drain), (Duration::from_secs(300), Duration::from_secs(10)));
    assert_eq!(config.limits, Limits::default());
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
limits: { connections: 10, streamsPerConnection: "20", messageBytes: 70000, namesPerStream: 5, idle: 1m }
retention: 1h
drain: 1s
admin: { address: "[::1]:1" }
metrics: { address: 127.0.0.1:2 }
workerThreads: 3
authorityEpoch: 7
"#;
    let Loaded { config, warnings } = Config::parse(text, &|_| None).unwrap();
    assert_eq!(warnings, []);
    let profile = &config.default_profile;
    assert_eq!((&*profile.spiffe_id, &*profile.dns_names[0]), ("spiffe://{trustDomain}/user/{uid}", "u{uid}.users.{trustDomain}"));
    assert_eq!((profile.key, profile.renew_at, profile.jitter, profile.epoch), (KeyType::Rsa3072, 0.6, 0.0, 7));
    assert_eq!(profile.lifetime, Duration::from_secs(9000));
    assert_eq!(config.shared_socket.mode, 0o600);
    assert_eq!(config.names, Names { certificate: "own".into(), bundle: "roots".into() });
    assert_eq!((config.lock_memory, config.attestation, config.worker_threads), (LockMemory::Never, Attestation::Unix, 3));
    assert_eq!(config.trust_sources, [TrustSource::File { path: "/a.pem".into() }]);
    let federated = TrustSource::ConfigMap { namespace: "n".into(), name: "m".into(), key: "roots.pem".into() };
    assert_eq!(config.federated, BTreeMap::from([(TrustDomain::new("b.example").unwrap(), federated)]));
    assert_eq!((config.admin.to_string(), config.metrics.to_string()), ("[::1]:1".into(), "127.0.0.1:2".into()));
    let limits =
        Limits { connections: 10, streams_per_connection: 20, message_bytes: 70_000, names_per_stream: 5, idle: Duration::from_secs(60) };
    assert_eq!(config.limits, limits);
}

#[test]
fn each_mistake_has_its_sentence() {
    let table: &[(&str, &str)] = &[
        (
            "certificate: { key: ed25519 }",
            r#"certificate.key: "ed25519" is not supported for SDS: Envoy refuses it; use ecdsa-p256, ecdsa-p384, rsa-2048 or rsa-3072"#,
        ),
        ("certificate: { key: dsa }", r#"certificate.key: "dsa" is not a key type; use ecdsa-p256, ecdsa-p384, rsa-2048 or rsa-3072"#),
        ("certificate: { lifetime: 3600 }", "certificate.lifetime: 3600 has no unit; write a duration such as 24h, 5m or 90s"),
        (
            "certificate: { lifetime: tomorrow }",
            r#"certificate.lifetime: "tomorrow" is not a duration; write a duration such as 24h, 5m or 90s"#,
        ),
        ("certificate: { lifetime: 5s }", r#"certificate.lifetime: "5s" is too short; use at least 10s"#),
        ("certificate: { lifetime: 0s }", r#"certificate.lifetime: "0s" is too short; use at least 10s"#),
        ("certificate: { renewAt: 1.5 }", "certificate.renewAt: 1.5 is out of range; use a number from 0.1 to 0.9"),
        ("certificate: { renewAt: half }", r#"certificate.renewAt: "half" is not a number; use a number from 0.1 to 0.9"#),
        ("certificate: { jitter: NaN }", r#"certificate.jitter: "NaN" is out of range; use a number from 0 to 0.3"#),
        (
            "certificate: { renewAt: 0.9, jitter: 0.2 }",
            "certificate.jitter: 0.2 with renewAt 0.9 puts a renewal as late as 1.08 of the lifetime; \
             keep renewAt × (1 + jitter) at or below 0.95",
        ),
        (
            "attestation: unix\ncertificate: { perPod: true }",
            "certificate.perPod: true needs pods, which `attestation: unix` does not know; set it to false",
        ),
        ("certificate: { perPod: yes }", r#"certificate.perPod: "yes" is neither true nor false; write true or false"#),
        ("trustDomian: a", "trustDomian: is not a field of the configuration; did you mean trustDomain?"),
        ("trust_domain: a", "trust_domain: is not a field of the configuration; did you mean trustDomain?"),
        ("lifetime: 1h", "lifetime: is not a field of the configuration; did you mean certificate.lifetime?"),
        ("certificate: { lifetme: 1h }", "certificate.lifetme: is not a field of certificate; did you mean lifetime?"),
        ("sockets: { shared: { zzz: 1 } }", "sockets.shared.zzz: is not a field of sockets.shared; use one of path, mode"),
        (
            "trustDomain: Cluster.Local",
            r#"trustDomain: "Cluster.Local" is not a trust domain; use 1 to 255 lower-case letters, digits, '.', '-' or '_'"#,
        ),
        ("trustDomain: spiffe://a.b/", r#"trustDomain: "spiffe://a.b/" is not a trust domain; leave spiffe:// out: a.b"#),
        ("trustDomain: 12", "trustDomain: 12 is not text; put it in quotes"),
        ("trustDomain: ''", r#"trustDomain: "" is empty; give it a value or leave the field out"#),
        ("sockets: here", r#"sockets: "here" is not a mapping; write its fields as `name: value`"#),
        ("sockets: { shared: { path: run/a.sock } }", r#"sockets.shared.path: "run/a.sock" is not an absolute path; begin it with /"#),
        (
            "sockets: { shared: { path: /run/ } }",
            r#"sockets.shared.path: "/run/" names no file; add the socket's file name, such as sds.sock"#,
        ),
        (
            "sockets: { shared: { mode: 438 } }",
            r#"sockets.shared.mode: 438 is not a file mode; write it in octal and in quotes, such as "0666" or "0660""#,
        ),
        (
            "sockets: { shared: { mode: '0888' } }",
            r#"sockets.shared.mode: "0888" is not a file mode; write it in octal and in quotes, such as "0666" or "0660""#,
        ),
        (
            "sockets: { shared: { mode: '0066' } }",
            r#"sockets.shared.mode: "0066" keeps the agent itself from its socket; begin it with 6, such as "0666" or "0660""#,
        ),
        (
            "sockets: { perPod: { enabled: true } }",
            "sockets.perPod.enabled: true asks for a socket in every pod, which this version does not serve; \
             set it to false and let pods use sockets.shared",
        ),
        ("attestation: k8s", r#"attestation: "k8s" is not known here; use kubernetes or unix"#),
        (
            "identity: { spiffeId: 'spiffe://{trustDomain}/uid/{uid}' }",
            r#"identity.spiffeId: "spiffe://{trustDomain}/uid/{uid}" has the placeholder {uid}, which `attestation: kubernetes` does not know; use {trustDomain}, {namespace}, {serviceAccount}, {podName} or {podUid}"#,
        ),
        (
            "attestation: unix\nidentity: { spiffeId: 'spiffe://{trustDomain}/ns/{namespace}' }",
            r#"identity.spiffeId: "spiffe://{trustDomain}/ns/{namespace}" has the placeholder {namespace}, which `attestation: unix` does not know; use {trustDomain} or {uid}"#,
        ),
        (
            "identity: { spiffeId: 'spiffe://other/ns/{namespace}' }",
            r#"identity.spiffeId: "spiffe://other/ns/{namespace}" does not begin with spiffe://cluster.local/; write, for example, spiffe://{trustDomain}/ns/{namespace}/sa/{serviceAccount}"#,
        ),
        (
            "identity: { spiffeId: 'spiffe://{trustDomain}/ns/{namespace' }",
            r#"identity.spiffeId: "spiffe://{trustDomain}/ns/{namespace" has a brace without its counterpart; use {trustDomain}, {namespace}, {serviceAccount}, {podName} or {podUid}"#,
        ),
        (
            "identity: { spiffeId: 'spiffe://{trustDomain}/{namespace}//x' }",
            r#"identity.spiffeId: "spiffe://{trustDomain}/{namespace}//x" makes no valid SPIFFE ID: a path segment is empty; write, for example, spiffe://{trustDomain}/ns/{namespace}/sa/{serviceAccount}"#,
        ),
        (
            "identity: { dnsNames: ['ok.{namespace}.svc', '*.{namespace}.svc'] }",
            r#"identity.dnsNames[1]: "*.{namespace}.svc" makes no valid DNS name; use lower-case letters, digits, '-' and '.', with a letter or digit at both ends of each part"#,
        ),
        ("identity: { dnsNames: a.b }", r#"identity.dnsNames: "a.b" is not a list; write `[a, b]`, or one `- ` line for each item"#),
        (
            "profiles: [ { match: {} } ]",
            "profiles: a list is more than this version does: it has one profile; remove it, and run an agent for each issuer",
        ),
        ("trust: { sources: [ {} ] }", SOURCELESS),
        (
            "trust: { sources: [ { file: /a, configMap: { namespace: a, name: b } } ] }",
            "trust.sources[0]: names both a configMap and a file; make it two sources",
        ),
        ("trust: { sources: [ { file: a.pem } ] }", r#"trust.sources[0].file: "a.pem" is not an absolute path; begin it with /"#),
        (
            "trust: { sources: [ { configMap: { name: a } } ] }",
            "trust.sources[0].configMap.namespace: is missing; name the namespace of the ConfigMap",
        ),
        (
            "trust: { sources: [ { configMap: { name: A_b, namespace: x } } ] }",
            r#"trust.sources[0].configMap.name: "A_b" is not the name of a Kubernetes object; use lower-case letters, digits, '-' and '.', with a letter or digit at both ends of each part"#,
        ),
        (
            "trust: { federated: { cluster.local: { file: /a } } }",
            "trust.federated.cluster.local: is the agent's own trust domain; put its roots under trust.sources",
        ),
        (
            "trust: { federated: { Partner: { file: /a } } }",
            "trust.federated.Partner: is not under the name of a trust domain; use a name such as partner.example",
        ),
        (
            "names: { bundle: default }",
            r#"names.bundle: "default" is the name of the certificate too; give names.certificate and names.bundle different names"#,
        ),
        (
            "names: { certificate: 'spiffe://a/b' }",
            r#"names.certificate: "spiffe://a/b" is a SPIFFE ID, and those name themselves; choose another name"#,
        ),
        ("keys: { lockMemory: sometimes }", r#"keys.lockMemory: "sometimes" is not known here; use auto, always or never"#),
        ("limits: { connections: 0 }", "limits.connections: 0 is out of range; use a whole number from 1 to 1000000"),
        ("limits: { connections: -1 }", "limits.connections: -1 is not a whole number that fits; use a whole number from 1 to 1000000"),
        ("limits: { messageBytes: 4096 }", "limits.messageBytes: 4096 is out of range; use a whole number from 65536 to 16777216"),
        ("limits: { idle: 1s }", r#"limits.idle: "1s" is too short; use at least 10s"#),
        ("retention: 2days", r#"retention: "2days" is too long; use at most 1day"#),
        ("drain: 11m", r#"drain: "11m" is too long; use at most 10m"#),
        (
            "admin: { address: 0.0.0.0:15090 }",
            r#"admin.address: "0.0.0.0:15090" is not a loopback address, and anybody who reaches it can reissue certificates; use 127.0.0.1 or [::1]; probes and Prometheus use metrics.address"#,
        ),
        (
            "admin: { address: localhost:1 }",
            r#"admin.address: "localhost:1" is not an IP address with a port; write, for example, 127.0.0.1:15090 or "[::1]:15090""#,
        ),
        (
            "metrics: { address: 0.0.0.0:15090 }",
            r#"metrics.address: "0.0.0.0:15090" takes the port of admin.address; give it a port of its own"#,
        ),
        ("workerThreads: 0", "workerThreads: 0 is out of range; use a whole number from 1 to 512"),
        ("authorityEpoch: 1.5", "authorityEpoch: 1.5 is not a whole number that fits; use a whole number of at least 0"),
    ];
    for (text, expected) in table {
        // The rest of the file is the least that a pod needs, unless the case is about it.
        let rest: String = LEAST.lines().filter(|line| !text.contains(&line[..5])).map(|line| format!("{line}\n")).collect();
        let text = format!("{text}\n{rest}");
        assert_eq!(errors(&text), [*expected], "{text}");
    }
}

const SOURCELESS: &str = "trust.sources[0]: names no source; \
                          write { configMap: { namespace: cert-manager, name: mesh-roots } } or { file: /etc/sds-agent/roots.pem }";

#[test]
fn the_issuer_has_to_be_named_completely() {
    let table = [
        (
            "{}",
            "issuer: is missing: it says who signs the certificates; \
             write, for example, `issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }`",
        ),
        (
            "issuer: {}",
            "issuer: names no certificate authority; \
             write, for example, `issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }`",
        ),
        (
            "issuer: { embedded: {}, certManager: { issuerRef: { name: a, kind: Issuer } } }",
            "issuer: names both certManager and embedded; keep one of them",
        ),
        (
            "issuer: { certManager: { issuerRef: { name: mesh-ca } } }",
            "issuer.certManager.issuerRef.kind: is missing, and without it cert-manager looks for an Issuer in the namespace of the \
             request, never for a ClusterIssuer; write kind: ClusterIssuer for one that serves the whole cluster, or kind: Issuer",
        ),
        (
            "issuer: { certManager: { issuerRef: { kind: Issuer } } }",
            "issuer.certManager.issuerRef.name: is missing; name the Issuer or ClusterIssuer that signs",
        ),
        (
            "issuer: { certManager: { issuerRef: { name: a, kind: clusterissuer } } }",
            r#"issuer.certManager.issuerRef.kind: "clusterissuer" is not a kind of cert-manager.io; use ClusterIssuer or Issuer, or set issuerRef.group to the group of an external issuer"#,
        ),
        (
            "issuer: { certManager: { kind: Issuer, issuerRef: { name: a, kind: Issuer } } }",
            "issuer.certManager.kind: is not a field of issuer.certManager; did you mean issuer.certManager.issuerRef.kind?",
        ),
        (
            "{ attestation: unix, issuer: { certManager: { namespace: workload, issuerRef: { name: a, kind: Issuer } } } }",
            r#"issuer.certManager.namespace: "workload" needs pods, which `attestation: unix` does not know; name one namespace"#,
        ),
        ("issuer: { embedded: { ca: 1 } }", "issuer.embedded.ca: is not a field of issuer.embedded; remove it: nothing can be set here"),
    ];
    for (text, expected) in table {
        assert_eq!(errors(text), [expected], "{text}");
    }
    assert_eq!(load("issuer: { embedded: }").config.issuers.values().next(), Some(&IssuerConfig::Embedded));
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
    assert!(rootless[1].starts_with("trust.sources: is empty: the bundle (ROOTCA) stays unanswered"));
    let told = |name: &str| (name == "NODE_NAME").then(|| "n".to_owned());
    let unowned = Config::parse(LEAST, &told).unwrap().warnings;
    assert!(unowned[0].to_string().starts_with("POD_NAME: is not set with POD_NAMESPACE and POD_UID"), "{unowned:?}");
}

#[test]
fn the_length_of_the_socket_path_is_bounded() {
    let at = |len: usize| format!("sockets: {{ shared: {{ path: /{} }} }}\n{LEAST}", "a".repeat(len - 1));
    assert!(Config::parse(&at(100), &in_a_pod).is_ok());
    assert!(errors(&at(101))[0].ends_with("is 101 bytes long, and the kernel's limit leaves 100; choose a shorter path"));
}

#[test]
fn a_private_key_in_the_wrong_place_is_not_repeated() {
    let text = "trustDomain: \"-----BEGIN PRIVATE KEY-----\\nabc\"\nissuer: { embedded: {} }";
    assert_eq!(errors(text), ["trustDomain: (a private key, not shown) has control characters; write it on one line"]);
}

#[test]
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

/// Every field that the reader knows, from files that lead it everywhere.
fn known() -> BTreeSet<String> {
    let files = [
        "{ trust: { sources: [ { configMap: {}, file: /a } ], federated: { a.b: { configMap: {}, file: /a } } } }",
        "{ issuer: { certManager: {}, embedded: {} } }",
    ];
    let walked = files.into_iter().flat_map(|text| {
        let report = Report::default();
        let tree = tree(text).unwrap();
        report.root(&tree, |root| walk(root, &report, &in_a_pod));
        report.known()
    });
    walked.collect()
}

#[test]
fn the_reference_describes_every_field() {
    let known = known();
    assert!(known.contains("issuer.certManager.issuerRef.kind") && known.contains("trust.federated.<name>.configMap.key"));
    let missing: Vec<_> = known.iter().filter(|field| !REFERENCE.contains(&format!("`{field}`"))).collect();
    assert!(missing.is_empty(), "docs/configuration.md does not describe {missing:?}");
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "(?s).{0,200}") {
        let _ = Config::parse(&text, &in_a_pod);
    }

    #[test]
    fn no_value_anywhere_makes_it_panic(
        field in prop::sample::select(known().into_iter().collect::<Vec<_>>()),
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
