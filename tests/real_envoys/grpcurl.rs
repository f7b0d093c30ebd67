//! grpcurl with only the socket: reflection lists and describes, a secret is readable, health is served.

use std::{path::Path, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::Value;
use test_harness::{agent::Launch, child, tools};

const PATIENCE: Duration = Duration::from_secs(30);
const SERVICE: &str = "envoy.service.secret.v3.SecretDiscoveryService";
const SECRET: &str = "envoy.extensions.transport_sockets.tls.v3.Secret";

async fn grpcurl(socket: &Path, before: &[&str], words: &[&str]) -> String {
    let target = format!("unix://{}", socket.display());
    let arguments = [&["-plaintext"], before, &[&target], words].concat();
    child::succeed(&tools::grpcurl(), &arguments, PATIENCE).await
}

#[tokio::test]
async fn reflection_lists_and_describes() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Launch::dev(dir.path()).start().await;
    let list = grpcurl(agent.socket(), &[], &["list"]).await;
    for service in [SERVICE, "grpc.health.v1.Health"] {
        assert!(list.lines().any(|line| line == service), "{list}");
    }
    let service = grpcurl(agent.socket(), &[], &["describe", SERVICE]).await;
    for method in ["StreamSecrets", "DeltaSecrets", "FetchSecrets"] {
        assert!(service.contains(&format!("rpc {method} (")), "{service}");
    }
    let secret = grpcurl(agent.socket(), &[], &["describe", SECRET]).await;
    for field in ["tls_certificate = 2;", "validation_context = 4;"] {
        assert!(secret.contains(field), "{secret}");
    }
}

/// Libraries send the socket's path as `:authority`, escaped or not, or any configured value.
#[tokio::test]
async fn any_authority_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Launch::dev(dir.path()).start().await;
    for authority in ["localhost", "/run/sds-agent/agent.sock", "%2Frun%2Fsds-agent%2Fagent.sock", "node/agent|sds"] {
        let list = grpcurl(agent.socket(), &["-authority", authority], &["list"]).await;
        assert!(list.lines().any(|line| line == SERVICE), "{authority}: {list}");
    }
}

#[tokio::test]
async fn a_secret_is_readable() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Launch::dev(dir.path()).start().await;
    let request = r#"{"resource_names": ["default", "ROOTCA"]}"#;
    let answer = grpcurl(agent.socket(), &["-d", request], &[&format!("{SERVICE}/FetchSecrets")]).await;
    let answer: Value = serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{e}: {answer}"));
    let resources = answer["resources"].as_array().expect("resources");
    let named = |name: &str| resources.iter().find(|secret| secret["name"] == name).unwrap_or_else(|| panic!("{name} is missing"));
    assert_eq!(resources.len(), 2);
    assert_eq!(named("default")["@type"], format!("type.googleapis.com/{SECRET}"));
    let pem = |source: &Value| {
        let bytes = BASE64_STANDARD.decode(source["inlineBytes"].as_str().expect("inline bytes")).expect("base64");
        String::from_utf8(bytes).expect("PEM is text")
    };
    let certificate = &named("default")["tlsCertificate"];
    assert!(pem(&certificate["certificateChain"]).starts_with("-----BEGIN CERTIFICATE-----"));
    assert!(pem(&certificate["privateKey"]).starts_with("-----BEGIN PRIVATE KEY-----"));
    assert!(pem(&named("ROOTCA")["validationContext"]["trustedCa"]).starts_with("-----BEGIN CERTIFICATE-----"));
}

#[tokio::test]
async fn health_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Launch::dev(dir.path()).start().await;
    for request in ["{}".to_owned(), format!(r#"{{"service": "{SERVICE}"}}"#)] {
        let health = grpcurl(agent.socket(), &["-d", &request], &["grpc.health.v1.Health/Check"]).await;
        let health: Value = serde_json::from_str(&health).unwrap_or_else(|e| panic!("{e}: {health}"));
        assert_eq!(health["status"], "SERVING", "{request}");
    }
}
