//! Invalid files and their errors.

use super::{LEAST, errors, load};
use crate::config::IssuerConfig;

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
        (
            "approver: { agents: [] }",
            "approver.agents: a list names no account, so every request would be denied; name the agents' account, or leave the field out",
        ),
        (
            "approver: { agents: [sds-agent] }",
            r#"approver.agents[0]: "sds-agent" is not the user name of a service account; write system:serviceaccount:<namespace>:<name>: only the tokens of service accounts name a node"#,
        ),
        ("trustDomian: a", "trustDomian: is not a field of the configuration; did you mean trustDomain?"),
        ("trust_domain: a", "trust_domain: is not a field of the configuration; did you mean trustDomain?"),
        ("lifetime: 1h", "lifetime: is not a field of the configuration; did you mean certificate.lifetime?"),
        ("certificate: { lifetme: 1h }", "certificate.lifetme: is not a field of certificate; did you mean lifetime?"),
        (
            "sockets: { shared: { zzz: 1 } }",
            "sockets.shared.zzz: is not a field of sockets.shared; use one of enabled, path, mode, acceptPidReuse",
        ),
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
            r#"sockets.shared.mode: "0066" prevents the agent from using its own socket; begin it with 6, such as "0666" or "0660""#,
        ),
        (
            "sockets: { shared: { enabled: false } }",
            "sockets: has neither shared nor perPod enabled, so no client could be served; enable at least one of them",
        ),
        (
            "sockets: { perPod: { enabled: true, directory: /run/sds-agent/pods } }",
            r#"sockets.perPod.directory: "/run/sds-agent/pods" is inside the directory of sockets.shared.path, which pods mount: they could open each other's sockets; use a directory of its own, such as /run/sds-agent-pods"#,
        ),
        (
            "attestation: unix\nsockets: { perPod: { enabled: true } }",
            "sockets.perPod.enabled: true needs pods, which `attestation: unix` does not know; set attestation to kubernetes, or this to false",
        ),
        (
            "attestation: unix\nwarmUp: { enabled: true }",
            "warmUp.enabled: true needs pods, which `attestation: unix` does not know; set attestation to kubernetes, or this to false",
        ),
        (
            "sockets: { shared: { enabled: false }, perPod: { enabled: true } }\nwarmUp: { enabled: true }",
            "warmUp.enabled: true is about callers of sockets.shared, which is not enabled; pods with sockets of their own are warmed up anyway; set it to false",
        ),
        (
            "warmUp: { enabled: true, socketMount: false }",
            "warmUp.socketMount: false leaves no pod to warm up, because podLabels is empty; name labels, or set enabled to false",
        ),
        (
            "sockets: { perPod: { directory: /run/../etc } }",
            r#"sockets.perPod.directory: "/run/../etc" is not in normal form; leave out '.', '..' and doubled or final slashes"#,
        ),
        ("sockets: { perPod: { directory: / } }", r#"sockets.perPod.directory: "/" is the root of the file system; choose a directory"#),
        (
            "sockets: { perPod: { driverName: Sds } }",
            r#"sockets.perPod.driverName: "Sds" is not the name of a Kubernetes object; use lower-case letters, digits, '-' and '.', with a letter or digit at both ends of each part"#,
        ),
        ("sockets: { perPod: { waitForCertificate: 2m } }", r#"sockets.perPod.waitForCertificate: "2m" is too long; use at most 1m"#),
        (
            "sockets: { perPod: { enabled: true, kubeletDirectory: /a/very/long/way/to/the/kubelet/that/nobody/takes/anywhere } }",
            r#"sockets.perPod.kubeletDirectory: "/a/very/long/way/to/the/kubelet/that/nobody/takes/anywhere" leads to socket paths of more than 100 bytes, and the kernel's limit allows no more; shorten it, or sockets.perPod.driverName"#,
        ),
        (
            "attestationPolicy: { containers: [Envoy] }",
            r#"attestationPolicy.containers[0]: "Envoy" is not the name of a container; use 1 to 63 lower-case letters, digits and '-', with a letter or digit at both ends"#,
        ),
        (
            "attestationPolicy: { uids: [-1] }",
            "attestationPolicy.uids[0]: -1 is not a valid whole number; use a whole number from 0 to 4294967294",
        ),
        ("attestationPolicy: { uids: 1337 }", "attestationPolicy.uids: 1337 is not a list; write `[a, b]`, or one `- ` line for each item"),
        (
            "attestation: unix\nattestationPolicy: { uids: [1] }",
            "attestationPolicy: a mapping is about pods, which `attestation: unix` does not know; remove it",
        ),
        ("attestation: k8s", r#"attestation: "k8s" is not a valid value; use kubernetes or unix"#),
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
            r#"identity.spiffeId: "spiffe://{trustDomain}/ns/{namespace" has an unmatched brace; use {trustDomain}, {namespace}, {serviceAccount}, {podName} or {podUid}"#,
        ),
        (
            "identity: { spiffeId: 'spiffe://{trustDomain}/{namespace}//x' }",
            r#"identity.spiffeId: "spiffe://{trustDomain}/{namespace}//x" renders to an invalid SPIFFE ID: a path segment is empty; write, for example, spiffe://{trustDomain}/ns/{namespace}/sa/{serviceAccount}"#,
        ),
        (
            "identity: { dnsNames: ['ok.{namespace}.svc', '*.{namespace}.svc'] }",
            r#"identity.dnsNames[1]: "*.{namespace}.svc" renders to an invalid DNS name; use lower-case letters, digits, '-' and '.', with a letter or digit at both ends of each part"#,
        ),
        (
            "identity: { spiffeId: 'spiffe://{trustDomain}/{namespace}-{serviceAccount}' }",
            r#"identity.spiffeId: "spiffe://{trustDomain}/{namespace}-{serviceAccount}" gives two workloads one name: "spiffe://cluster.local/a-b-a" is that of namespace "a" with serviceAccount "b-a", and of namespace "a-b" with serviceAccount "a"; write, for example, spiffe://{trustDomain}/ns/{namespace}/sa/{serviceAccount}"#,
        ),
        (
            "identity: { dnsNames: ['{serviceAccount}-{namespace}.svc'] }",
            r#"identity.dnsNames[0]: "{serviceAccount}-{namespace}.svc" gives two workloads one name: "b-a-b.svc" is that of namespace "b" with serviceAccount "b-a", and of namespace "a-b" with serviceAccount "b"; write, for example, {serviceAccount}.{namespace}.svc"#,
        ),
        ("identity: { dnsNames: a.b }", r#"identity.dnsNames: "a.b" is not a list; write `[a, b]`, or one `- ` line for each item"#),
        ("trust: { sources: [ {} ] }", SOURCELESS),
        (
            "trust: { sources: [ { file: /a, configMap: { namespace: a, name: b } } ] }",
            "trust.sources[0]: names both configMap and file; make it two sources",
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
            "trust.federated.Partner: has a name that is not a trust domain; use a name such as partner.example",
        ),
        (
            "names: { bundle: default }",
            r#"names.bundle: "default" is the name of the certificate too; give names.certificate and names.bundle different names"#,
        ),
        (
            "names: { certificate: 'spiffe://a/b' }",
            r#"names.certificate: "spiffe://a/b" is a SPIFFE ID, which already names its own secret; choose another name"#,
        ),
        ("keys: { lockMemory: sometimes }", r#"keys.lockMemory: "sometimes" is not a valid value; use auto, always or never"#),
        ("limits: { connections: 0 }", "limits.connections: 0 is out of range; use a whole number from 1 to 1000000"),
        ("limits: { connections: -1 }", "limits.connections: -1 is not a valid whole number; use a whole number from 1 to 1000000"),
        ("limits: { messageBytes: 4096 }", "limits.messageBytes: 4096 is out of range; use a whole number from 65536 to 16777216"),
        ("limits: { idle: 1s }", r#"limits.idle: "1s" is too short; use at least 10s"#),
        ("retention: 2days", r#"retention: "2days" is too long; use at most 1day"#),
        ("drain: 11m", r#"drain: "11m" is too long; use at most 10m"#),
        (
            "admin: { address: 0.0.0.0:15090 }",
            r#"admin.address: "0.0.0.0:15090" is not a loopback address, and every client that reaches it could reissue certificates; use 127.0.0.1 or [::1]; Prometheus uses metrics.address, and the kubelet probes.address"#,
        ),
        (
            "admin: { address: localhost:1 }",
            r#"admin.address: "localhost:1" is not an IP address with a port; write, for example, 127.0.0.1:15090 or "[::1]:15090""#,
        ),
        (
            "metrics: { address: \"[::]:15090\" }",
            r#"metrics.address: "[::]:15090" uses the port of admin.address; give it a port of its own"#,
        ),
        (
            "metrics: { address: 0.0.0.0:15090 }",
            r#"metrics.address: "0.0.0.0:15090" uses the port of admin.address; give it a port of its own"#,
        ),
        (
            "probes: { address: \"[::]:15090\" }",
            r#"probes.address: "[::]:15090" uses the port of admin.address; give it a port of its own"#,
        ),
        (
            "probes: { address: 10.0.0.1:15091 }",
            r#"probes.address: "10.0.0.1:15091" uses the port of metrics.address; give it a port of its own"#,
        ),
        ("workerThreads: 0", "workerThreads: 0 is out of range; use a whole number from 1 to 512"),
        ("authorityEpoch: 1.5", "authorityEpoch: 1.5 is not a valid whole number; use a whole number of at least 0"),
    ];
    for (text, expected) in table {
        // The rest of the file is the shortest configuration, without the lines that the case replaces.
        let rest: String = LEAST.lines().filter(|line| !text.contains(&line[..5])).map(|line| format!("{line}\n")).collect();
        let text = format!("{text}\n{rest}");
        assert_eq!(errors(&text), [*expected], "{text}");
    }
}

const SOURCELESS: &str = "trust.sources[0]: names no source; \
                          write { configMap: { namespace: cert-manager, name: mesh-roots } }, \
                          { clusterTrustBundle: { name: mesh-roots } }, { file: /etc/sds-agent/roots.pem } \
                          or { inline: | } with PEM below it";

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
