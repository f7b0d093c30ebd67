//! `dev` and `fetch`: the first commands of a new user, and the end of the agent.

use std::{fs, time::Duration};

use nix::sys::signal::Signal;
use test_harness::{agent::Launch, child, eventually, fetch, tools};
use tokio::{io::AsyncWriteExt, net::UnixStream};

/// Signals take effect at once; the limit is for a busy machine.
const PROMPT: Duration = Duration::from_secs(60);

#[tokio::test]
async fn fetch_shows_a_certificate_and_the_bundle_that_it_chains_to() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Launch::dev(dir.path()).start().await;
    let updates = fetch::once(agent.socket()).await;
    let (certificate, bundle) = (&updates["certificate"], &updates["bundle"]);

    let uid = nix::unistd::getuid();
    assert_eq!(certificate["name"], "default");
    assert_eq!(certificate["spiffe_id"], format!("spiffe://example.org/uid/{uid}"));
    assert_eq!(bundle["name"], "ROOTCA");

    let (chain, roots) = (dir.path().join("chain.pem"), dir.path().join("roots.pem"));
    fs::write(&chain, certificate["chain_pem"].as_str().unwrap()).unwrap();
    fs::write(&roots, bundle["trusted_ca_pem"].as_str().unwrap()).unwrap();
    let (chain, roots) = (chain.to_str().unwrap(), roots.to_str().unwrap());
    let openssl = tools::openssl();
    let verify = ["verify", "-no-CApath", "-no-CAstore", "-CAfile", roots, "-untrusted", chain, chain];
    child::succeed(&openssl, &verify, PROMPT).await;

    // openssl's output for the leaf agrees with that of fetch.
    let read = ["x509", "-in", chain, "-noout", "-fingerprint", "-sha256", "-serial", "-ext", "subjectAltName"];
    let seen = child::succeed(&openssl, &read, PROMPT).await;
    let plain = |text: &str| text.replace(':', "").trim_start_matches('0').to_ascii_lowercase();
    let after = |label: &str| seen.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix(label).map(plain)).unwrap();
    assert_eq!(plain(certificate["fingerprint_sha256"].as_str().unwrap()), after("sha256 fingerprint="));
    assert_eq!(plain(certificate["serial"].as_str().unwrap()), after("serial="));
    assert!(seen.contains(&format!("URI:spiffe://example.org/uid/{uid}")), "{seen}");
}

#[tokio::test]
async fn fetch_watch_shows_rotations() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Launch::dev(dir.path()).lifetime("10s").start().await;
    let (_watch, lines) = fetch::watch(agent.socket());
    let seen = lines.until("two rotations", Duration::from_secs(60), |lines| (lines.len() >= 3).then(|| fetch::updates(lines)));
    let seen = seen.await;
    for pair in seen.windows(2) {
        assert_ne!(pair[0]["serial"], pair[1]["serial"]);
        assert_ne!(pair[0]["version"], pair[1]["version"]);
        assert_eq!(pair[0]["spiffe_id"], pair[1]["spiffe_id"]);
        let end = |update: &serde_json::Value| update["not_after"].as_str().unwrap().to_owned();
        assert!(end(&pair[0]) < end(&pair[1]), "each expires later than the previous one");
    }
}

#[tokio::test]
async fn a_signal_ends_it_with_a_stream_open() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Launch::dev(dir.path()).start().await;
    let (_watch, lines) = fetch::watch(agent.socket());
    lines.until("the stream's first secret", Duration::from_secs(30), |lines| (!lines.is_empty()).then_some(())).await;

    agent.terminate();
    let status = agent.exit(PROMPT).await;
    assert!(status.success(), "{status}");
    let late = |line: &serde_json::Value| line["message"].as_str().is_some_and(|message| message.contains("before the drain deadline"));
    assert!(!agent.log().iter().any(late), "the stream was asked to end, and ended: {:?}", agent.log());
    assert!(!agent.socket().exists(), "it removes its socket");
}

#[tokio::test]
async fn a_second_signal_aborts_the_drain() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Launch::dev(dir.path()).start().await;
    // A client that stops sending keeps the drain open until its deadline of 10 s.
    let mut silent = UnixStream::connect(agent.socket()).await.unwrap();
    silent.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    silent.readable().await.unwrap();

    agent.terminate();
    let socket = agent.socket().to_owned();
    eventually("the drain has begun", PROMPT, async || if socket.exists() { Err("the socket is there".into()) } else { Ok(()) }).await;
    agent.process().signal(Signal::SIGTERM);
    let status = agent.exit(PROMPT).await;
    assert!(!status.success(), "an aborted drain is no success: {status}");
    drop(silent);
}
