//! `sds-agent fetch`, as a script would use it.

use std::{collections::BTreeMap, path::Path, time::Duration};

use serde_json::Value;
use tokio::process::Command;

use crate::{
    agent,
    cgroups::PodCgroup,
    child::{self, Child, Lines},
};

const PATIENCE: Duration = Duration::from_secs(30);

/// Fields of every kind of update.
const COMMON: [&str; 3] = ["name", "kind", "version"];
const CERTIFICATE: [&str; 7] = ["spiffe_id", "dns_names", "serial", "fingerprint_sha256", "not_before", "not_after", "chain_pem"];

/// Requests secrets once; returns the updates by kind.
pub async fn once(socket: &Path) -> BTreeMap<String, Value> {
    ask(None, socket, &BOTH, "10s").await.unwrap_or_else(|refusal| panic!("{}: {}", refusal.code, refusal.words))
}

/// The certificate and the trust bundle.
pub const BOTH: [&str; 2] = ["default", "ROOTCA"];

/// A failed call of `fetch`.
#[derive(Debug)]
pub struct Refusal {
    /// The exit code.
    pub code: i32,
    /// The standard error.
    pub words: String,
}

/// Requests secrets once, as a process of a pod if given; returns the updates by kind.
pub async fn ask(pod: Option<&PodCgroup>, socket: &Path, names: &[&str], patience: &str) -> Result<BTreeMap<String, Value>, Refusal> {
    let mut command = command(pod, socket);
    command.args(["--timeout", patience]);
    command.args(names.iter().flat_map(|name| ["--name", name]));
    let output = child::finish(command, PATIENCE).await;
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(!stdout.contains("PRIVATE KEY"), "fetch prints a private key");
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Refusal { code: output.status.code().unwrap_or(-1), words });
    }
    let updates = updates(&stdout.lines().map(str::to_owned).collect::<Vec<_>>()).into_iter();
    Ok(updates.map(|update| (update["kind"].as_str().expect("a kind").to_owned(), update)).collect())
}

/// Watches the certificate until the child is dropped.
pub fn watch(socket: &Path) -> (Child, Lines) {
    let child = watch_as(None, socket, "default");
    let lines = child.stdout();
    (child, lines)
}

/// Watches a secret until the child is dropped, as a process of a pod if given.
pub fn watch_as(pod: Option<&PodCgroup>, socket: &Path, name: &str) -> Child {
    let mut command = command(pod, socket);
    command.args(["--name", name, "--watch"]);
    Child::spawn("sds-agent fetch", &mut command)
}

fn command(pod: Option<&PodCgroup>, socket: &Path) -> Command {
    let program = agent::program();
    let mut command = pod.map_or_else(|| Command::new(program), |pod| pod.command(program));
    command.arg("fetch").arg("--socket").arg(socket).args(["-o", "json"]);
    command
}

/// Parses one object per line and checks that it has the fields of its kind.
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
