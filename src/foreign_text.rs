//! Passes texts with a private key to every function that reads external input, and checks that no error, log line or verdict contains it.

use agent_kube::{Call, Failure};
use agent_runtime::{
    telemetry::{self, Format, captured::Captured},
    text::test_keys::Key,
};
use cert_manager::{Condition, Status, verdict::Verdict};
use sds_server::{
    material::{self, CertificateChain, TrustBundle},
    trust::{self, Trust, crl},
};
use serde_json::json;

use crate::config::Config;

#[test]
fn a_key_in_pem_that_is_read_is_not_shown() {
    let key = Key::ecdsa();
    for (name, input) in key.inputs() {
        let pem = input.as_bytes();
        let errors = [TrustBundle::from_pem(pem).err(), CertificateChain::from_pem(pem).err(), crl::from_pem(pem).err()];
        for error in errors.into_iter().flatten() {
            key.assert_tame(name, &format!("{error} {error:?}"));
        }
    }
}

#[test]
fn a_key_in_a_trust_source_is_not_logged() {
    let key = Key::ecdsa();
    for (name, input) in key.inputs() {
        let log = Captured::default();
        let (_guard, _filter) = telemetry::capture("debug", Format::Json, log.clone()).unwrap();
        let source = Trust::new(trust::Metrics::default()).source(None, "file /roots.pem");
        let refused = source.offer(input.as_bytes()).err().map(|error| error.to_string()).unwrap_or_default();
        key.assert_tame(name, &(log.take() + &refused));
    }
}

/// An error names the line of the mistake.
#[test]
fn broken_pem_is_told_with_its_line() {
    let root = rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem();
    let lines = root.lines().count();
    let told = |pem: &str| TrustBundle::from_pem(pem.as_bytes()).unwrap_err().to_string();
    let damaged = root.replacen("-----BEGIN", "----BEGIN", 1);
    assert_eq!(
        told(&format!("{root}# a comment\n{damaged}")),
        format!(
            "is not valid PEM: a BEGIN marker is damaged; write -----BEGIN CERTIFICATE----- (line {}, after 1 valid blocks)",
            lines + 2
        )
    );
    let endless = root.lines().take(4).collect::<Vec<_>>().join("\n");
    assert_eq!(
        told(&format!("{root}{root}{endless}")),
        format!("is not valid PEM: a BEGIN marker has no matching END marker (line {}, after 2 valid blocks)", 2 * lines + 1)
    );
    let broken = root.replacen("MII", "M!I", 1);
    let place = format!("(line {}, after 1 valid blocks)", lines + 2);
    assert_eq!(told(&format!("{root}\n{broken}")), format!("is not valid PEM: a block is not base64 {place}"));
    assert_eq!(CertificateChain::from_pem(b"").unwrap_err(), material::Error::Empty);
}

#[test]
fn a_key_in_the_words_of_a_server_is_not_shown() {
    let key = Key::ecdsa();
    let call = Call { verb: "create", resource: "certificaterequests.cert-manager.io", name: None, namespace: Some("shop") };
    for (name, text) in key.texts() {
        for code in [400, 403, 409, 418, 422, 500] {
            let status = serde_json::from_value(json!({"code": code, "reason": text, "message": text})).unwrap();
            key.assert_tame(name, &format!("{:?}", Failure::of_status(&status, &call)));
        }
        let transport = kube::Error::Service(std::io::Error::other(text.clone()).into());
        key.assert_tame(name, &format!("{:?}", Failure::of(&transport, &call)));

        for (kind, status, reason) in [("Denied", "True", &*text), ("InvalidRequest", "True", &*text), ("Ready", "False", "Failed")] {
            let (kind, status, reason, message) = (kind.into(), status.into(), Some(reason.into()), Some(text.clone()));
            let condition = Condition { kind, status, reason, message, last_transition_time: None };
            let verdict = Verdict::of(Some(&Status { conditions: vec![condition], ..Status::default() }));
            assert_eq!(key.leak_in(&format!("{verdict:?}")), None, "{name}: {verdict:?}");
        }
    }
}

#[test]
fn a_key_in_the_configuration_is_not_shown() {
    let key = Key::ecdsa();
    let env = |_: &str| None;
    for (name, text) in key.texts().into_iter().filter(|(name, _)| !name.contains("megabyte")) {
        let written = json!(text);
        for yaml in [
            text.clone(),
            format!("trustDomain: {text}"),
            format!("trustDomain: {written}"),
            format!("{written}: 1"),
            format!("issuer: {{ {written}: 1 }}"),
            format!("issuer: {{ certManager: {{ issuerRef: {{ name: {written}, kind: {written} }} }} }}"),
            format!("identity: {{ spiffeId: {written}, dnsNames: [ {written} ] }}"),
            format!("certificate: {{ lifetime: {written}, key: {written}, renewAt: {written} }}"),
            format!("trust: {{ sources: [ {{ file: {written} }} ], federated: {{ {written}: {{ file: /a }} }} }}"),
            format!(
                "admin: {{ address: {written} }}\nmetrics: {{ address: {written} }}\nprobes: {{ address: {written} }}\ndrain: {written}"
            ),
            format!("a: &x {text}\nb: *y"),
        ] {
            if let Err(errors) = Config::parse(&yaml, &env) {
                for problem in &errors.0 {
                    key.assert_tame(name, &format!("{problem}"));
                }
                assert_eq!(key.leak_in(&errors.to_string()), None, "{name}: {errors}");
            }
        }
    }
}

#[test]
fn a_key_in_a_log_filter_is_not_repeated() {
    let key = Key::ecdsa();
    for (name, text) in key.texts() {
        let (_guard, filter) = telemetry::capture("info", Format::Text, std::io::sink).unwrap();
        if let Err(error) = filter.replace(&text) {
            key.assert_tame(name, &error.to_string());
        }
    }
}

/// The second protection: the log redacts PEM that a caller has not removed.
#[test]
fn a_key_in_pem_that_is_logged_by_mistake_is_not_in_the_line() {
    let key = Key::ecdsa();
    let list = format!("{:?}", key.pem.as_bytes());
    let one_line = key.pem.replace('\n', " ");
    for format in [Format::Json, Format::Text] {
        for text in [&key.pem, &one_line, &list, &one_line.repeat(1000)] {
            let log = Captured::default();
            let (_guard, _filter) = telemetry::capture("info", format, log.clone()).unwrap();
            tracing::warn!(cause = %text, serial = "00aa", "{text}");
            tracing::warn!(cause = ?text, "as it is");
            let log = log.take();
            assert_eq!(log.lines().count(), 2);
            assert!(format == Format::Text || log.contains("00aa"), "{log}");
            log.lines().for_each(|line| key.assert_tame("a line", line));
        }
    }
}
