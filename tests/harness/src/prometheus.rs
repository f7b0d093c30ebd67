//! A real Prometheus that scrapes agents as the operator configures it: with the relabelings of the PodMonitor, and the rules.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::process::Command;

use crate::{child::Child, eventually, free_port, http, paths, tools};

const START: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(30);

/// The path of a file of the repository.
pub fn file(path: &str) -> PathBuf {
    paths::root().join(path)
}

/// Reads a YAML or JSON file of the repository.
pub fn read(path: &str) -> Value {
    let text = fs::read_to_string(file(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    serde_saphyr::from_str(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The part of the PrometheusRule that Prometheus reads.
pub fn rules() -> Value {
    read("daemonset/monitoring/prometheusrule.yaml")["spec"].take()
}

/// A scrape target.
pub struct Target<'a> {
    /// The PodMonitor in `daemonset/monitoring` that applies to it.
    pub monitor: &'static str,
    pub address: SocketAddr,
    pub node: &'a str,
}

pub const AGENTS: &str = "podmonitor.yaml";
pub const APPROVERS: &str = "podmonitor-approver.yaml";

/// A running Prometheus. Killed when dropped.
pub struct Prometheus {
    address: SocketAddr,
    _process: Child,
}

impl Prometheus {
    /// Starts Prometheus with its files in `dir`; returns when it has scraped every target.
    pub async fn start(dir: &Path, targets: &[Target<'_>]) -> Self {
        let (config, rules_file) = (dir.join("prometheus.yml"), dir.join("rules.yaml"));
        fs::write(&rules_file, rules().to_string()).expect("the rules are written");
        fs::write(&config, configuration(&rules_file, targets).to_string()).expect("the configuration is written");
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut command = Command::new(tools::prometheus());
        command.arg(format!("--config.file={}", config.display()));
        command.arg(format!("--storage.tsdb.path={}", dir.join("data").display()));
        command.arg(format!("--web.listen-address={address}")).arg("--log.level=warn");
        let mut process = Child::spawn("prometheus", &mut command);
        eventually("Prometheus is ready", START, async || {
            if let Some(status) = process.ended() {
                panic!("Prometheus ended before it was ready: {status}");
            }
            http::get_ok(address, "/-/ready").await
        })
        .await;
        let prometheus = Self { address, _process: process };
        eventually("everything is scraped", PATIENCE, async || {
            let found = prometheus.get("/api/v1/targets").await?;
            let up = found["activeTargets"].as_array().expect("a list").iter().filter(|target| target["health"] == "up").count();
            if up == targets.len() { Ok(()) } else { Err(found["activeTargets"].to_string()) }
        })
        .await;
        prometheus
    }

    /// The field `data` of an answer of its API.
    pub async fn get(&self, path: &str) -> Result<Value, String> {
        let text = http::get_ok(self.address, path).await?;
        let mut answer: Value = serde_json::from_str(&text).map_err(|e| format!("{path}: {e}"))?;
        Ok(answer["data"].take())
    }

    /// The values of an instant query, each with its labels; values that are not numbers are omitted.
    pub async fn query(&self, expr: &str) -> Result<Vec<(Value, f64)>, String> {
        let data = self.get(&format!("/api/v1/query?query={}", encoded(expr))).await?;
        let samples = data["result"].as_array().ok_or("no list")?;
        let value = |sample: &Value| sample["value"][1].as_str().and_then(|value| value.parse::<f64>().ok());
        let samples = samples.iter().filter_map(|sample| Some((sample["metric"].clone(), value(sample)?)));
        Ok(samples.filter(|(_, value)| !value.is_nan()).collect())
    }
}

/// The operator derives labels from the pod. Here they are given as discovery would set them, and relabelled by the PodMonitors.
fn configuration(rules: &Path, targets: &[Target<'_>]) -> Value {
    let scrapes = [AGENTS, APPROVERS].map(|monitor| scrape(monitor, targets));
    json!({
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [rules],
        "scrape_configs": scrapes,
    })
}

fn scrape(file: &str, targets: &[Target<'_>]) -> Value {
    let monitor = read(&format!("daemonset/monitoring/{file}"));
    let endpoint = &monitor["spec"]["podMetricsEndpoints"][0];
    let relabelings = endpoint["relabelings"].as_array().map(Vec::as_slice).unwrap_or_default().iter().map(|rule| {
        let unknown = rule.as_object().expect("a rule").keys().find(|key| !["sourceLabels", "targetLabel"].contains(&key.as_str()));
        assert_eq!(unknown, None, "this part of a relabeling is not translated here");
        json!({"source_labels": rule["sourceLabels"], "target_label": rule["targetLabel"]})
    });
    // The value that `jobLabel` reads from the pods.
    let job = monitor["spec"]["selector"]["matchLabels"]["app.kubernetes.io/name"].as_str().expect("the pods' name");
    let groups = targets.iter().filter(|target| target.monitor == file).map(|target| {
        json!({
            "targets": [target.address.to_string()],
            "labels": {
                "__meta_kubernetes_pod_node_name": target.node,
                "namespace": monitor["spec"]["namespaceSelector"]["matchNames"][0], "pod": format!("{job}-{}", target.node),
            },
        })
    });
    json!({
        "job_name": job,
        "metrics_path": endpoint["path"],
        "static_configs": groups.collect::<Value>(),
        "relabel_configs": relabelings.collect::<Value>(),
    })
}

fn encoded(text: &str) -> String {
    text.bytes().map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
