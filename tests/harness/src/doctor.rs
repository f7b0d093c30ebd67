//! `sds-agent doctor` as a child process.

use serde_json::Value;

use crate::{agent::Launch, child, scene::PATIENCE};

/// Runs `doctor` with the configuration of `launch`; returns its exit code and its steps.
pub async fn doctor(launch: &Launch, arguments: &[&str]) -> (Option<i32>, Vec<Value>) {
    let output = child::finish(launch.doctor(arguments), PATIENCE).await;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let report: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}{}", String::from_utf8_lossy(&output.stderr)));
    let steps = report["steps"].as_array().expect("steps").clone();
    assert_eq!(report["healthy"], output.status.success());
    let failed = steps.iter().filter(|step| step["result"] == "failed");
    assert!(failed.clone().all(|step| step["remedy"].is_string()), "a failure without a remedy: {text}");
    assert_eq!(failed.count() == 0, output.status.success(), "{text}");
    (output.status.code(), steps)
}

/// The evidence of a step.
pub fn detail<'a>(steps: &'a [Value], name: &str) -> &'a str {
    steps.iter().find(|step| step["name"] == name).and_then(|step| step["detail"].as_str()).unwrap_or_else(|| panic!("no {name}"))
}
