//! The server in another program: `crates/sds-server/examples/embed.rs`, with grpcurl as its client.

use std::{collections::BTreeSet, os::unix::fs::PermissionsExt, path::Path, process::Stdio, time::Duration};

use serde_json::json;
use test_harness::{child, eventually, tools};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::Command,
    time::timeout,
};

#[path = "../../crates/sds-server/examples/embed.rs"]
#[allow(dead_code, reason = "its main function is for users")]
mod example;

/// Limit for each step. Certificates live for 10 s.
const PATIENCE: Duration = Duration::from_secs(120);
const SERVICE: &str = "envoy.service.secret.v3.SecretDiscoveryService";
const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
const OTHER: &str = "12345";

/// The value of a line such as `"nonce": "1",`.
fn value(line: &str, key: &str) -> Option<String> {
    let rest = line.trim().strip_prefix(&format!("\"{key}\": \""))?;
    rest.strip_suffix('"').or_else(|| rest.strip_suffix("\",")).map(str::to_owned)
}

/// One stream over three rotations, with an ACK for each.
async fn rotations(target: &str) -> BTreeSet<String> {
    let mut command = Command::new(tools::grpcurl());
    command.args(["-plaintext", "-d", "@", target, &format!("{SERVICE}/StreamSecrets")]);
    let mut client = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let (mut requests, mut answers) = (client.stdin.take().unwrap(), BufReader::new(client.stdout.take().unwrap()).lines());
    let request = json!({"typeUrl": TYPE_URL, "resourceNames": ["default"]});
    requests.write_all(request.to_string().as_bytes()).await.unwrap();
    let (mut versions, mut version) = (BTreeSet::new(), String::new());
    while versions.len() < 4 {
        let line = answers.next_line().await.unwrap().expect("the stream continues");
        version = value(&line, "versionInfo").unwrap_or(version);
        if let Some(nonce) = value(&line, "nonce") {
            versions.insert(version.clone());
            let ack = json!({"typeUrl": TYPE_URL, "resourceNames": ["default"], "versionInfo": version, "responseNonce": nonce});
            requests.write_all(ack.to_string().as_bytes()).await.unwrap();
        }
    }
    versions
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_rotates_on_one_stream_and_refuses_another_user() {
    let directory = tempfile::tempdir().unwrap();
    // Another user needs access to the directory too.
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let socket = directory.path().join("sds.sock");
    let serving = tokio::spawn({
        let socket = socket.clone();
        async move { example::serve(&socket, nix::unistd::getuid().as_raw()).await }
    });
    eventually("the socket", PATIENCE, async || if Path::exists(&socket) { Ok(()) } else { Err(String::new()) }).await;
    let target = format!("unix://{}", socket.display());

    let grpcurl = directory.path().join("grpcurl");
    std::fs::copy(tools::grpcurl(), &grpcurl).unwrap();
    let mut command = Command::new(tools::setpriv());
    command.args(["--reuid", OTHER, "--regid", OTHER, "--clear-groups"]).arg(&grpcurl);
    command.args(["-plaintext", "-d", r#"{"resourceNames": ["default"]}"#, &target, &format!("{SERVICE}/FetchSecrets")]);
    let refused = child::finish(command, PATIENCE).await;
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && error.contains("PermissionDenied"), "{error}");

    let versions = timeout(PATIENCE, rotations(&target)).await.expect("three rotations");
    assert_eq!(versions.len(), 4);
    serving.abort();
}
