//! The configuration and commands of the tutorial work unchanged, except for sockets and ports.

use std::{fs, net::SocketAddr, path::Path, process::Stdio, time::Duration};

use test_harness::{
    agent::{self, Launch},
    child::Child,
    eventually, free_port, http, tools,
};
use tokio::{io::AsyncWriteExt, process::Command};

const PATIENCE: Duration = Duration::from_secs(60);
const GUIDE: &str = include_str!("../../docs/tutorial.md");

/// The code block of the guide that begins with `first`.
fn block(first: &str) -> String {
    let start = GUIDE.find(first).unwrap_or_else(|| panic!("the guide has no block that begins with {first:?}"));
    GUIDE[start..].split("\n```").next().unwrap_or_default().to_owned()
}

/// Runs one of the guide's commands by a shell in `dir`, with the paths of programs and socket inserted.
async fn command(line: &str, dir: &Path, socket: &Path) -> String {
    assert!(GUIDE.contains(line), "the guide no longer has {line:?}");
    let line = line.replace("target/release/sds-agent", agent::program().to_str().unwrap());
    let mut shell = Command::new("bash");
    shell.args(["-c", &line]).current_dir(dir).env("SPIFFE_ENDPOINT_SOCKET", format!("unix://{}", socket.display()));
    let output = shell.stdin(Stdio::null()).output().await.unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test]
async fn the_plain_envoy_of_the_guide_serves_and_rotates() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Launch::dev(dir.path()).lifetime("20s").start().await;
    let (admin, tls) = (free_port(), free_port());
    let config = block("# envoy.yaml")
        .replace("/tmp/sds-agent/sds.sock", agent.socket().to_str().unwrap())
        .replace("port_value: 9901", &format!("port_value: {admin}"))
        .replace("port_value: 8443", &format!("port_value: {tls}"));
    let path = dir.path().join("envoy.yaml");
    fs::write(&path, config).unwrap();
    let mut envoy = Command::new(tools::envoy());
    envoy.arg("-c").arg(&path).args(["--use-dynamic-base-id", "--concurrency", "1"]);
    let _envoy = Child::spawn("envoy of the guide", &mut envoy);
    let admin = SocketAddr::from(([127, 0, 0, 1], admin));
    eventually("Envoy is live", PATIENCE, async || http::get_ok(admin, "/ready").await).await;

    for line in [
        "target/release/sds-agent fetch --name default -o pem --write-key key.pem > cert.pem",
        "target/release/sds-agent fetch --name ROOTCA -o pem > roots.pem",
    ] {
        command(line, dir.path(), agent.socket()).await;
    }
    let arguments = "-cert cert.pem -cert_chain cert.pem -key key.pem -CAfile roots.pem -quiet";
    assert!(GUIDE.contains(arguments), "the guide has another command");
    let mut client = Command::new(tools::openssl());
    client.args(["s_client", "-connect", &format!("127.0.0.1:{tls}"), "-verify_return_error"]).args(arguments.split(' '));
    let mut client = client.current_dir(dir.path()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    client.stdin.take().unwrap().write_all(b"GET / HTTP/1.1\r\nHost: server\r\nConnection: close\r\n\r\n").await.unwrap();
    let output = tokio::time::timeout(PATIENCE, client.wait_with_output()).await.unwrap().unwrap();
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(answer.contains("200 OK") && answer.contains("hello"), "{answer}{}", String::from_utf8_lossy(&output.stderr));

    eventually("a rotation", PATIENCE, async || {
        let stats = http::get_ok(admin, "/stats").await?;
        let line = stats.lines().find(|line| line.contains("sds.default.update_success")).unwrap_or_default().to_owned();
        let taken: u64 = line.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
        if taken >= 2 { Ok(()) } else { Err(line) }
    })
    .await;
}
