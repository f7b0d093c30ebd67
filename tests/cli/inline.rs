//! Roots in the configuration itself are served, and no output of the agent has a part of them.

use std::process::Output;

use serde_json::json;

use super::{
    confined::{Agent, root},
    stalled_reader::command,
};

/// No line of the PEM is in `text`. The markers of PEM are in the agent's own messages.
fn assert_hidden(pem: &str, text: &str) {
    assert!(!text.is_empty());
    let shown = pem.lines().filter(|line| !line.starts_with('-')).find(|line| text.contains(&line[..line.len().min(20)]));
    assert_eq!(shown, None, "{text}");
}

fn printed(output: &Output) -> String {
    [&*output.stdout, &*output.stderr].map(String::from_utf8_lossy).concat()
}

#[test]
fn roots_of_the_configuration_are_served_and_not_logged() {
    let roots = root();
    let agent = Agent::start(tempfile::tempdir().expect("a directory"), &json!({"inline": roots}));
    agent.until_it_serves(&roots);
    let log = agent.log();
    assert!(log.contains("\"source\":\"inline trust.sources[0]\""), "{log}");
    assert_hidden(&roots, &log);
    let config = agent.dir.path().join("config/agent.yaml");
    for form in ["text", "json"] {
        let arguments = ["check-config", "--config", config.to_str().expect("a plain path"), "-o", form];
        let output = command(&arguments).output().expect("it runs");
        assert!(output.status.success(), "{}", printed(&output));
        assert!(printed(&output).contains("PEM in this configuration"));
        assert_hidden(&roots, &printed(&output));
    }
}

#[test]
fn a_start_with_unusable_roots_is_explained_without_them() {
    let roots = root();
    let (dir, secret) = (tempfile::tempdir().expect("a directory"), roots.replace("CERTIFICATE", "PRIVATE KEY"));
    let config = dir.path().join("agent.yaml");
    for (pem, words) in [
        (secret, "trust.sources[0].inline: has a private key; write certificates only"),
        (roots.replace("CERTIFICATE", "CERT"), "trust.sources[0].inline: holds no certificate"),
    ] {
        let text = json!({"attestation": "unix", "issuer": {"embedded": {}}, "trust": {"sources": [{"inline": pem}]}});
        std::fs::write(&config, text.to_string()).expect("the configuration");
        for verb in ["run", "check-config"] {
            let output = command(&[verb, "--config", config.to_str().expect("a plain path")]).output().expect("it runs");
            let printed = printed(&output);
            assert!(!output.status.success() && printed.contains(words), "{verb}: {printed}");
            assert_hidden(&roots, &printed);
        }
    }
}
