//! `profiles`: inherited fields, names of issuers, and errors.

use cert_manager::{IssuerRef, RequestNamespace};
use issuance::issuer::certificate_request;
use workload_identity::{IssuerName, KeyType, Profile};

use super::{LEAST, errors, load, warnings};
use crate::config::{Config, IssuerConfig};

fn with(profiles: &str) -> String {
    format!("profiles:\n{profiles}\n{LEAST}")
}

fn profile(config: &Config, place: usize) -> &Profile {
    &config.profiles[place].profile
}

fn issuer<'a>(config: &'a Config, profile: &Profile) -> &'a certificate_request::Settings {
    match &config.issuers[&profile.issuer] {
        IssuerConfig::CertManager(issuer) => issuer,
        IssuerConfig::Embedded => panic!("embedded"),
    }
}

#[test]
fn what_a_profile_does_not_say_is_said_at_the_top() {
    let text = r#"
identity: { spiffeId: "spiffe://{trustDomain}/{namespace}/{serviceAccount}", dnsNames: ["{serviceAccount}.{namespace}.svc"] }
certificate: { lifetime: 12h, key: rsa-2048, renewAt: 0.6, jitter: 0.2 }
authorityEpoch: 4
issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer }, namespace: requests, trustStatusCA: true } }
profiles:
- { name: same, match: { namespaces: [a] } }
- name: other
  match: { namespaces: [b], podLabels: { tier: gold, "example.com/x": "" } }
  identity: { dnsNames: [] }
  issuerRef: { name: x, kind: AWSPCAClusterIssuer, group: awspca.cert-manager.io }
  namespace: workload
  trustStatusCA: false
  certificate: { lifetime: 1h, perPod: true }
  authorityEpoch: 3
  selectable: true
"#;
    let config = load(text).config;
    let (default, same, other) = (&*config.default_profile, profile(&config, 0), profile(&config, 1));
    assert_eq!(*same, Profile { name: "same".into(), ..default.clone() });
    assert_eq!(same.fingerprint(), default.fingerprint());

    assert_eq!((&other.spiffe_id, other.dns_names.len()), (&default.spiffe_id, 0));
    assert_eq!((other.key, other.renew_at, other.jitter, other.per_pod), (KeyType::Rsa2048, 0.6, 0.2, true));
    // A profile's epoch includes the global one, so raising the global epoch replaces all certificates.
    assert_eq!((default.epoch, same.epoch, other.epoch), (4, 4, 7));
    assert_eq!(&*other.authority, "AWSPCAClusterIssuer x of awspca.cert-manager.io in the namespace of the workload");
    let expected = certificate_request::Settings {
        issuer_ref: IssuerRef { name: "x".into(), kind: "AWSPCAClusterIssuer".into(), group: "awspca.cert-manager.io".into() },
        namespace: RequestNamespace::Workload,
        trust_status_ca: false,
    };
    assert_eq!(*issuer(&config, other), expected);
    assert_eq!(config.profiles.iter().map(|rule| rule.selectable).collect::<Vec<_>>(), [false, true]);
    assert_eq!(config.profiles[1].matches.to_string(), "namespace b, label example.com/x=, label tier=gold");
}

#[test]
fn an_issuer_is_configured_once_under_its_first_profiles_name() {
    let ca = "issuerRef: { name: pay-ca, kind: ClusterIssuer }";
    let config = load(&with(&format!(
        "- {{ name: a, match: {{ namespaces: [a] }}, {ca} }}\n\
         - {{ name: b, match: {{ namespaces: [b] }}, issuerRef: {{ name: mesh-ca, kind: ClusterIssuer }} }}\n\
         - {{ name: c, match: {{ namespaces: [c] }}, {ca}, certificate: {{ key: rsa-2048 }} }}\n\
         - {{ name: d, match: {{ namespaces: [d] }}, {ca}, namespace: elsewhere }}\n"
    )))
    .config;
    let names: Vec<_> = config.profiles.iter().map(|rule| rule.profile.issuer.to_string()).collect();
    assert_eq!(names, ["a", "default", "a", "d"]);
    assert_eq!(config.issuers.keys().map(|IssuerName(name)| &**name).collect::<Vec<_>>(), ["a", "d", "default"]);
    // Profiles with different namespaces share no certificate: the approver expects each request in the namespace of its profile.
    assert_ne!(profile(&config, 0).fingerprint(), profile(&config, 3).fingerprint());
    assert_eq!(&*profile(&config, 3).authority, "ClusterIssuer pay-ca of cert-manager.io in namespace elsewhere");
    assert_eq!(issuer(&config, profile(&config, 3)).namespace, RequestNamespace::Fixed("elsewhere".into()));
}

#[test]
fn each_mistake_has_its_sentence() {
    let reached = "comes first and matches every pod that this one matches";
    let table: &[(&str, &[&str])] = &[
        (
            "- { match: {} }",
            &[
                "profiles[0].name: is missing: metrics, requests and volumes refer to the profile by its name; give it a name such as payments",
            ],
        ),
        (
            "- { name: a }",
            &["profiles[0].match: is missing: it says whose profile this is; \
               write, for example, `match: { namespaces: [payments] }`, or `match: {}` for every pod"],
        ),
        ("- { name: default, match: {} }", &[r#"profiles[0].name: "default" is the name of the default profile; choose another name"#]),
        (
            "- { name: Gold, match: {} }",
            &[
                r#"profiles[0].name: "Gold" is not the name of a profile; use 1 to 63 lower-case letters, digits and '-', with a letter or digit at both ends"#,
            ],
        ),
        (
            "- { name: a, match: { namespaces: [x] } }\n- { name: a, match: {} }",
            &[r#"profiles[1].name: "a" is the name of profiles[0] too; give each profile a name of its own"#],
        ),
        (
            "- { name: a, match: { namespaces: [x, 'a*b'] } }",
            &[
                r#"profiles[0].match.namespaces[1]: "a*b" has a '*' that is not at its beginning or end; write a name, or a part of one with '*' at its beginning or at its end"#,
            ],
        ),
        (
            "- { name: a, match: { namespaces: [Shop], serviceAccounts: [a.b, a_b] } }",
            &[
                r#"profiles[0].match.namespaces[0]: "Shop" can match no namespaces; use lower-case letters, digits and '-', as such names have"#,
                r#"profiles[0].match.serviceAccounts[1]: "a_b" can match no service accounts; use lower-case letters, digits and '-', as such names have"#,
            ],
        ),
        (
            "- { name: a, match: { namespaces: [] } }",
            &["profiles[0].match.namespaces: a list is empty and matches no pod; name some, or leave it out for all"],
        ),
        (
            "- { name: a, match: { namespace: shop } }",
            &["profiles[0].match.namespace: is not a field of profiles[0].match; did you mean namespaces?"],
        ),
        (
            "- { name: a, match: { podLabels: { tier: 1, app: 'x*', '': x } } }",
            &[
                r#"profiles[0].match.podLabels."": "x" is under an invalid label key; write a key such as app or example.com/tier"#,
                r#"profiles[0].match.podLabels.app: "x*" is not the value of a label; use at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends; patterns are not supported"#,
                "profiles[0].match.podLabels.tier: 1 is not text; put it in quotes",
            ],
        ),
        (
            "- { name: a, match: {}, certificate: { key: ed25519, renewAt: 0.9 } }",
            &[
                r#"profiles[0].certificate.key: "ed25519" is not supported for SDS: Envoy refuses it; use ecdsa-p256, ecdsa-p384, rsa-2048 or rsa-3072"#,
                "profiles[0].certificate.renewAt: 0.9 with jitter 0.1 puts a renewal as late as 0.99 of the lifetime; \
                 keep renewAt × (1 + jitter) at or below 0.95",
            ],
        ),
        (
            "- { name: a, match: {}, identity: { spiffeId: 'spiffe://other/{namespace}' }, issuerRef: { name: x } }",
            &[
                r#"profiles[0].identity.spiffeId: "spiffe://other/{namespace}" does not begin with spiffe://cluster.local/; write, for example, spiffe://{trustDomain}/ns/{namespace}/sa/{serviceAccount}"#,
                "profiles[0].issuerRef.kind: is missing, and without it cert-manager looks for an Issuer in the namespace of the request, \
                 never for a ClusterIssuer; write kind: ClusterIssuer for one that serves the whole cluster, or kind: Issuer",
            ],
        ),
    ];
    for (text, expected) in table {
        assert_eq!(errors(&with(text)), *expected, "{text}");
    }
    for (text, line) in [
        (
            "- { name: a, match: {} }\n- { name: b, match: { namespaces: [b] } }",
            format!("profiles[1]: is never used: profiles[0] {reached}"),
        ),
        (
            "- { name: a, match: { namespaces: ['pay*', x] } }\n- { name: b, match: { namespaces: [payments], podLabels: { a: b } } }",
            format!("profiles[1]: is never used: profiles[0] {reached}"),
        ),
    ] {
        assert_eq!(errors(&with(text)), [format!("{line}; put it before profiles[0], or narrow the match of that one")]);
    }
}

#[test]
fn profiles_that_are_picked_neither_stand_in_the_way_nor_are_hidden() {
    let text = "- { name: a, match: {}, selectable: true }\n- { name: b, match: {} }\n- { name: c, match: {}, selectable: true }\n";
    assert_eq!(warnings(&with(text)), Vec::<String>::new());
}

#[test]
fn profiles_are_about_pods_and_cert_manager() {
    let text = format!("attestation: unix\nprofiles: [ {{ name: a, match: {{}} }} ]\n{LEAST}");
    assert_eq!(errors(&text), ["profiles: a list needs pods, which `attestation: unix` does not know; remove it"]);
    let text = "issuer: { embedded: {} }\nprofiles: [ { name: a, match: {}, issuerRef: { name: a, kind: Issuer } } ]";
    assert_eq!(errors(text), ["profiles[0].issuerRef: a mapping needs cert-manager, and `issuer` is the embedded authority; remove it"]);
    let config = load("issuer: { embedded: {} }\nprofiles: [ { name: a, match: {}, certificate: { key: rsa-2048 } } ]").config;
    assert_eq!((profile(&config, 0).key, config.issuers.len()), (KeyType::Rsa2048, 1));
}

#[test]
fn what_works_but_deserves_a_thought_is_a_warning_at_the_profile() {
    let one = |profile: &str| {
        let all = warnings(&with(&format!("- {{ name: a, match: {{ namespaces: [a] }}, {profile} }}")));
        assert_eq!(all.len(), 1, "{all:?}");
        all[0].clone()
    };
    let rate = "profiles[0].certificate.lifetime: 30m means 1.1 requests per second for each 1,000 identities of the cluster; ";
    assert!(one("certificate: { lifetime: 30m }").starts_with(rate));
    assert!(one("certificate: { key: ecdsa-p384 }").starts_with("profiles[0].certificate.key: ecdsa-p384 works between Envoys only"));
    let local = one("issuerRef: { name: x, kind: Issuer }, namespace: workload");
    assert!(local.starts_with("profiles[0].namespace: workload: every workload's namespace needs an Issuer \"x\""), "{local}");
    let alike = one("identity: { spiffeId: 'spiffe://{trustDomain}/ns/{namespace}' }");
    assert!(alike.starts_with("profiles[0].identity.spiffeId: ") && alike.contains("the same identity"), "{alike}");

    let roots = "issuer: { certManager: { issuerRef: { name: a, kind: ClusterIssuer }, trustStatusCA: true } }\n\
                 profiles: [ { name: b, match: { namespaces: [b] }, issuerRef: { name: b, kind: ClusterIssuer }, trustStatusCA: false } ]";
    let rootless = warnings(roots);
    assert!(
        rootless.len() == 1 && rootless[0].starts_with("trust.sources: is empty, and these issuers provide no roots: b; "),
        "{rootless:?}"
    );
}
