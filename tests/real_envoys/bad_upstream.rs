//! Everything that can be wrong upstream, against the real API server and cert-manager.
//!
//! Whatever it is: it is counted, told in one sentence, and never replaces or loses a good certificate; and when it is over, everything
//! goes on by itself, on the streams that were open all the time.

use std::time::Duration;

use serde_json::Value;
use test_harness::agent::Agent;

mod issuers;
mod rights;
mod roots;
mod server;
mod signer;

/// Certificates that are soon to be renewed and still live for most of a test: the first renewal comes after 4 to 12 % of the life.
const HASTY: &str = "certificate: { lifetime: 60s, renewAt: 0.1, jitter: 0 }";

/// The failures of an identity, as the log tells them: one line each.
fn failures(agent: &Agent, id: &str) -> Vec<Value> {
    agent.log().into_iter().filter(|line| is_failure(line, id)).collect()
}

/// Waits for the identity's first failure; gives its cause.
async fn failure(agent: &Agent, id: &str, limit: Duration) -> String {
    let line = agent.logs(&format!("a failure of {id}"), limit, |line| is_failure(line, id)).await;
    line["cause"].as_str().expect("a cause").to_owned()
}

fn is_failure(line: &Value, id: &str) -> bool {
    line["identity"] == id && line["message"].as_str().is_some_and(|message| message.starts_with("no new certificate; "))
}
