//! `sds-agent fetch`, as a script would use it.

use std::{collections::BTreeMap, path::Path, time::Duration};

use serde_json::Value;
use tokio::process::Command;

use super::{
    agent,
    child::{self, Child, Lines},
};

const PATIENCE: Duration = Duration::from_secs(30);

/// What the contract promises for each kind of update.
const COMMON: [&str; 3] = ["name", "kind", "version"];
const CERTIFICATE: [&str; 7] = ["spiffe_id", "dns_names", "serial", "fingerprint_sha256", "not_before", "not_after", "chain_pem"];

/// Asks once; the updates by kind.
pub async fn once(socket: &Path) -> BTreeMap<String, Value> {
    let socket = socket.to_str().expect("a plain path");
    let arguments = ["fetch", "--socket", socket, "-o", "json"];
    let output = child::succeed(agent::program(), &arguments, PATIENCE).await;
    assert!(!output.contains("PRIVATE KEY"), "fetch shows no key unless told where to write it");
    updates(&output.lines().map(str::to_owned).collect::<Vec<_>>())
        .into_iter()
        .map(|update| (update["kind"].as_str().expect("a kind").to_owned(), update))
        .collect()
}

/// Watches the certificate until dropped.
pub fn watch(socket: &Path) -> (Child, Lines) {
    let mut command = Command::new(agent::program());
    command.arg("fetch").arg("--socket").arg(socket).args(["--name", "default", "--watch", "-o", "json"]);
    let child = Child::spawn("sds-agent fetch", &mut command);
    let lines = child.stdout();
    (child, lines)
}

/// One object a line, each with what its kind promises.
pub fn updates(lines: &[String]) -> Vec<Value> {
    lines
        .iter()
        .map(|line| {
            let update: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("not a JSON object: {line:?}: {e}"));
            let promised: &[&str] = match update["kind"].as_str() {
                Some("certificate") => &CERTIFICATE,
                Some("bundle") => &["trusted_ca_pem"],
                _ => panic!("of no known kind: {update}"),
            };
            for field in COMMON.iter().chain(promised) {
                assert!(update.get(field).is_some_and(|value| !value.is_null()), "{field} is missing in {update}");
            }
            update
        })
        .collect()
}
