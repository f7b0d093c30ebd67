//! Failures of the upstream, with the real API server and cert-manager.
//!
//! Each failure is counted, is logged in one sentence, and never replaces or loses a valid certificate. When it is over, all streams that
//! were open continue without intervention.

use std::time::Duration;

use serde_json::Value;
use test_harness::agent::Agent;

mod issuers;
mod rights;
mod roots;
mod server;
mod signer;

/// Certificates that are renewed soon and remain valid for most of a test: the first renewal comes after 4 to 12 % of the lifetime.
const HASTY: &str = "certificate: { lifetime: 60s, renewAt: 0.1, jitter: 0 }";

/// The failures of an identity in the log, one line each.
fn failures(agent: &Agent, id: &str) -> Vec<Value> {
    agent.log().into_iter().filter(|line| is_failure(line, id)).collect()
}

/// Waits for the identity's first failure and returns its cause.
async fn failure(agent: &Agent, id: &str, limit: Duration) -> String {
    let line = agent.logs(&format!("a failure of {id}"), limit, |line| is_failure(line, id)).await;
    line["cause"].as_str().expect("a cause").to_owned()
}

fn is_failure(line: &Value, id: &str) -> bool {
    line["identity"] == id && line["message"].as_str().is_some_and(|message| message.starts_with("no new certificate; "))
}
