//! The command line as scripts use it: exit codes, and all errors of a configuration at once. Needs no other program.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    reason = "tests write files for the agent to read, and fail loudly"
)]

use std::{fs, process::Command};

#[path = "cli/confined.rs"]
mod confined;
#[path = "cli/flooded_probes.rs"]
mod flooded_probes;
#[path = "cli/inline.rs"]
mod inline;
#[path = "cli/keys.rs"]
mod keys;
#[path = "cli/stalled_reader.rs"]
mod stalled_reader;

/// One mistake in each place; the valid lines between them cause no error.
const BAD: &str = r#"
trustDomain: UPPER.example
sockets: { shared: { path: relative.sock, mode: "0999" } }
attestation: telepathy
certificate: { lifetime: 5, key: ed25519, renewAt: 1.5 }
issuer: { certManager: { issuerRef: { name: mesh-ca } } }
trust: { sources: [ { configMap: { namespace: cert-manager } } ] }
admin: { address: 0.0.0.0:15090 }
colour: blue
"#;

/// The field of each mistake, and its value.
const MISTAKES: [(&str, &str); 11] = [
    ("trustDomain", "\"UPPER.example\""),
    ("sockets.shared.path", "\"relative.sock\""),
    ("sockets.shared.mode", "\"0999\""),
    ("attestation", "\"telepathy\""),
    ("certificate.lifetime", "5"),
    ("certificate.key", "\"ed25519\""),
    ("certificate.renewAt", "1.5"),
    ("issuer.certManager.issuerRef.kind", "is missing"),
    ("trust.sources[0].configMap.name", "is missing"),
    ("admin.address", "\"0.0.0.0:15090\""),
    ("colour", "is not a field"),
];

fn sds_agent(arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sds-agent"));
    for variable in ["NODE_NAME", "POD_NAMESPACE", "POD_NAME", "POD_UID", "KUBECONFIG"] {
        command.env_remove(variable);
    }
    let output = command.args(arguments).output().expect("the agent can be started");
    (output.status.code(), [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat())
}

#[test]
fn every_error_of_a_configuration_is_told_at_once() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let config = dir.path().join("bad.yaml");
    fs::write(&config, BAD).expect("the configuration is written");
    let config = config.to_str().expect("a plain path");
    for subcommand in ["check-config", "run"] {
        let (code, output) = sds_agent(&[subcommand, "--config", config]);
        assert_eq!(code, Some(64), "{subcommand}: {output}");
        for (field, value) in MISTAKES {
            let told: Vec<_> = output.lines().filter_map(|line| line.strip_prefix(field)?.strip_prefix(": ")).collect();
            assert_eq!(told.len(), 1, "{subcommand} about {field}:\n{output}");
            assert!(told[0].starts_with(value) && told[0].contains("; "), "the value and the remedy: {told:?}");
        }
        let told = output.lines().filter(|line| line.contains("; ")).count();
        assert_eq!(told, MISTAKES.len(), "{subcommand} reports more than the mistakes:\n{output}");
    }
}

#[test]
fn a_good_configuration_is_0() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let config = dir.path().join("good.yaml");
    fs::write(&config, "attestation: unix\nissuer: { embedded: {} }\n").expect("the configuration is written");
    let (code, output) = sds_agent(&["check-config", "--config", config.to_str().expect("a plain path")]);
    assert_eq!(code, Some(0), "{output}");
}

#[test]
fn what_cannot_be_read_or_understood_is_64() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let broken = dir.path().join("broken.yaml");
    fs::write(&broken, "issuer: [ {").expect("the configuration is written");
    let broken = broken.to_str().expect("a plain path");
    for arguments in [
        &["check-config", "--config", "/nonexistent/agent.yaml"][..],
        &["check-config", "--config", broken],
        &["run", "--config", broken],
        &["run"],
        &["no-such-command"],
    ] {
        let (code, output) = sds_agent(arguments);
        assert_eq!(code, Some(64), "{arguments:?}: {output}");
        assert!(!output.trim().is_empty(), "{arguments:?} prints nothing");
    }
}

/// A kubeconfig contains keys and tokens. The error about an invalid one does not show its lines.
#[test]
fn a_kubeconfig_that_cannot_be_read_is_not_repeated() {
    const SECRET: &str = "LS0tLS1CRUdJTiBQUklWQVRFIEtFWS0tLS0tCk1JR0hBZ0VBTUJNR0J5cUdTTTQ5QWdFR0NDcUdTTTQ5";
    const TOKEN: &str = "s3cr3t-t0ken";
    let dir = tempfile::tempdir().expect("a temporary folder");
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).expect("a file");
        path
    };
    let config = write("config.yaml", "issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }\n");
    let users = format!("users:\n- name: a\n  user:\n    client-key-data: {SECRET}\n    token: {TOKEN}\n");
    for broken in ["contexts: [ {\n", "current-context: { a: b }\n", "  wrong: 1\n", "clusters: 7\n"] {
        let kubeconfig = write("kubeconfig", &format!("apiVersion: v1\nkind: Config\n{users}{broken}"));
        for subcommand in ["run", "approver", "doctor"] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_sds-agent"));
            command.args([subcommand, "--config"]).arg(&config).env("KUBECONFIG", &kubeconfig);
            for (name, value) in [("NODE_NAME", "n1"), ("POD_NAMESPACE", "mesh"), ("POD_NAME", "a-1"), ("POD_UID", "u-1")] {
                command.env(name, value);
            }
            let output = command.output().expect("the agent can be started");
            let told = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
            assert!(!output.status.success(), "{subcommand}: {told}");
            assert!(told.contains("kubeconfig"), "{subcommand}: {told}");
            assert!(!told.contains(&SECRET[..12]) && !told.contains(TOKEN), "{subcommand}: {told}");
        }
    }
}
