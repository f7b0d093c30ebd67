//! A private key in a trust file or in the configuration: no output of the agent or of its command line has a part of it, in any encoding.

use std::{
    fs::{self, File},
    net::{SocketAddr, TcpListener},
    path::Path,
    process::{Child, Output},
    thread,
    time::{Duration, Instant},
};

use agent_runtime::text::test_keys::Key;
use sds_server::material::TrustBundle;
use serde_json::json;

use super::{
    confined::root,
    flooded_probes::get,
    stalled_reader::{PATIENCE, command},
};

/// Killed when dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn printed(output: &Output) -> Vec<u8> {
    [&*output.stdout, &*output.stderr].concat()
}

/// Replaces the file, so that the agent reads it as a whole.
fn replace(path: &Path, text: &str) {
    let beside = path.with_extension("new");
    fs::write(&beside, text).expect("a file");
    fs::rename(beside, path).expect("the new file");
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_key_in_a_trust_file_is_in_no_output() {
    let dir = tempfile::tempdir().expect("a directory");
    let (roots, log_path, socket) = (dir.path().join("roots.pem"), dir.path().join("log"), dir.path().join("sds.sock"));
    fs::write(&roots, root()).expect("a file");
    // Free a moment ago.
    let admin: SocketAddr = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
    let config = json!({
        "attestation": "unix",
        "issuer": {"embedded": {}},
        "sockets": {"shared": {"path": socket}},
        "trust": {"sources": [{"file": roots}]},
        "admin": {"address": admin.to_string()},
        "metrics": {"address": "127.0.0.1:0"},
        "probes": {"address": "127.0.0.1:0"},
        "confinement": "never",
    });
    let file = dir.path().join("agent.yaml");
    fs::write(&file, config.to_string()).expect("the configuration");
    let mut agent = command(&["run", "--config", file.to_str().expect("a plain path")]);
    let _agent = Killed(agent.stderr(File::create(&log_path).expect("the log")).spawn().expect("the agent starts"));
    let log = || fs::read_to_string(&log_path).expect("the log");
    // The embedded issuer is a source too.
    let count = |what: &str| log().lines().filter(|line| line.contains(what) && line.contains("roots.pem")).count();
    until("the first bundle", || count("\"trust bundle taken\"") == 1);

    let key = Key::ecdsa();
    let mut last = None;
    for (name, input) in key.inputs() {
        let before = count("\"trust bundle ");
        replace(&roots, &input);
        // Equal roots are not logged again.
        let bundle = TrustBundle::from_pem(input.as_bytes()).ok();
        if bundle.is_none() || bundle != last {
            until(name, || count("\"trust bundle ") > before);
        }
        last = bundle.or(last);
    }
    let admin_url = format!("http://{admin}");
    let outputs = [
        ("the log", log().into_bytes()),
        ("/certs", get(admin, "/certs", PATIENCE).expect("the certificates").into_bytes()),
        ("/metrics", get(admin, "/metrics", PATIENCE).expect("the metrics").into_bytes()),
        ("/readyz", get(admin, "/readyz", PATIENCE).unwrap_or_else(|refusal| refusal).into_bytes()),
        ("certs", printed(&command(&["certs", "--admin", &admin_url]).output().expect("it runs"))),
        ("fetch", printed(&command(&["fetch", "--socket", socket.to_str().expect("a plain path")]).output().expect("it runs"))),
        ("doctor", printed(&command(&["doctor", "--config", file.to_str().expect("a plain path")]).output().expect("it runs"))),
    ];
    for (what, output) in outputs {
        assert!(!output.is_empty(), "{what}");
        assert_eq!(key.leak_in_bytes(&output), None, "{what}: {}", String::from_utf8_lossy(&output));
    }
    let longest = log().lines().map(str::len).max().unwrap_or_default();
    assert!(longest < 4096, "a line of {longest} bytes");
    assert!(count("\"trust bundle refused\"") > 5, "{}", log());
}

#[test]
fn a_key_in_the_configuration_is_in_no_output() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("agent.yaml");
    let key = Key::ecdsa();
    for (name, text) in key.some_texts() {
        for config in [
            text.clone(),
            json!({"trustDomain": text}).to_string(),
            json!({"attestation": "unix", "trust": {"sources": [{"inline": text}]}}).to_string(),
            json!({"trust": {"sources": [{"configMap": {"namespace": text, "name": text, "key": text}}]}}).to_string(),
        ] {
            fs::write(&file, config).expect("the configuration");
            for verb in ["check-config", "run"] {
                let output = command(&[verb, "--config", file.to_str().expect("a plain path")]).output().expect("it runs");
                let output = (output.status.code(), printed(&output));
                assert_eq!(output.0, Some(64), "{name}: {}", String::from_utf8_lossy(&output.1));
                assert_eq!(key.leak_in_bytes(&output.1), None, "{verb} of {name}: {}", String::from_utf8_lossy(&output.1));
            }
        }
    }
}
