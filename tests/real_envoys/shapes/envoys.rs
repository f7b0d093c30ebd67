//! One Envoy for all shapes: for each trial a listener, a cluster that connects to it, and two secrets for both.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::{StreamExt, stream};
use serde_json::{Value, json};
use tempfile::TempDir;
use test_harness::{child::Child, eventually, http};
use tokio::process::Command;

use super::secrets::Secrets;

/// Limit for the start with all secrets.
const START: Duration = Duration::from_secs(90);
/// Connections at the same time.
const AT_ONCE: usize = 8;
const ANSWER: &str = "both sides accept";

/// The secrets of one trial, in PEM.
pub struct Trial {
    /// Unique, of letters and digits.
    pub id: String,
    pub chain: String,
    pub key: String,
    pub roots: String,
    pub lists: Option<String>,
}

/// The answer of an Envoy to the secrets of a trial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Both sides have completed a handshake.
    Accepts,
    /// The secret with the chain or that with the roots is rejected.
    Rejects,
    /// The secrets are accepted, and a side refuses the other one.
    Refuses(String),
}

impl Verdict {
    pub fn in_words(&self) -> &'static str {
        match self {
            Self::Accepts => "accepts",
            Self::Rejects => "rejects the secret",
            Self::Refuses(_) => "refuses the peer",
        }
    }

    pub fn accepts(&self) -> bool {
        *self == Self::Accepts
    }
}

/// Returns the verdict of `program` for each trial, by its id.
pub async fn verdicts(program: &Path, trials: &[Trial]) -> BTreeMap<String, Verdict> {
    let dir = tempfile::Builder::new().prefix("e").tempdir_in("/tmp").expect("a temporary folder");
    let secrets = Secrets::of(trials);
    let socket = dir.path().join("secrets");
    let serving = secrets.serve(&socket);
    let envoy = start(program, &dir, trials).await;
    let entry = eventually("the entry", START, async || {
        let text = http::get_ok(envoy.admin, "/listeners?format=json").await?;
        let listeners: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        let mut all = listeners["listener_statuses"].as_array().map(Vec::as_slice).unwrap_or_default().iter();
        let entry = all.find(|listener| listener["name"] == "entry").ok_or(text.clone())?;
        let port = entry["local_address"]["socket_address"]["port_value"].as_u64().and_then(|port| u16::try_from(port).ok());
        port.map(|port| SocketAddr::from(([127, 0, 0, 1], port))).ok_or(text)
    })
    .await;
    let rejected = eventually("an answer to each secret", START, async || secrets.rejected().ok_or("some are missing".to_owned())).await;
    let answers = stream::iter(trials).map(async |trial| {
        let is_rejected = ["chain", "roots"].iter().any(|kind| rejected.contains(&format!("{kind}-{}", trial.id)));
        let verdict = if is_rejected {
            Verdict::Rejects
        } else {
            let answer = http::get(entry, &format!("/{}/", trial.id)).await.expect("the entry answers");
            if answer.status == 200 && answer.body == ANSWER { Verdict::Accepts } else { Verdict::Refuses(answer.body) }
        };
        (trial.id.clone(), verdict)
    });
    let verdicts = answers.buffer_unordered(AT_ONCE).collect().await;
    serving.abort();
    verdicts
}

struct Envoy {
    admin: SocketAddr,
    _process: Child,
}

async fn start(program: &Path, dir: &TempDir, trials: &[Trial]) -> Envoy {
    let path = |name: String| dir.path().join(name);
    let bootstrap = path("bootstrap.json".to_owned());
    fs::write(&bootstrap, bootstrap_for(dir.path(), trials).to_string()).expect("the bootstrap is written");
    let address = path("admin".to_owned());
    let mut command = Command::new(program);
    command.arg("--config-path").arg(&bootstrap).arg("--admin-address-path").arg(&address);
    command.args(["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "error", "--disable-hot-restart"]);
    let process = Child::spawn("envoy shapes", &mut command);
    let admin = eventually("Envoy with all secrets", START, async || {
        let text = fs::read_to_string(&address).map_err(|error| error.to_string())?;
        let admin = text.parse::<SocketAddr>().map_err(|error| format!("{text:?}: {error}"))?;
        http::get_ok(admin, "/ready").await.map(|_| admin)
    });
    Envoy { admin: admin.await, _process: process }
}

fn bootstrap_for(dir: &Path, trials: &[Trial]) -> Value {
    let socket = |trial: &Trial| -> PathBuf { dir.join(format!("{}.sock", trial.id)) };
    let to_trial = |trial: &Trial| {
        json!({
            "match": {"prefix": format!("/{}/", trial.id)},
            "route": {"cluster": trial.id, "timeout": "20s"},
        })
    };
    let routes: Vec<Value> = trials.iter().map(to_trial).collect();
    let mut listeners = vec![json!({
        "name": "entry",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
        "filter_chains": [{"filters": [manager(&routes)]}],
    })];
    listeners.extend(trials.iter().map(|trial| {
        json!({
            "name": trial.id,
            "address": {"pipe": {"path": socket(trial)}},
            "filter_chains": [{
                "transport_socket": tls("DownstreamTlsContext", json!({
                    "require_client_certificate": true,
                    "common_tls_context": common_tls(trial),
                })),
                "filters": [manager(&[json!({
                    "match": {"prefix": "/"},
                    "direct_response": {"status": 200, "body": {"inline_string": ANSWER}},
                })])],
            }],
        })
    }));
    let mut clusters: Vec<Value> = trials
        .iter()
        .map(|trial| {
            json!({
                "name": trial.id,
                "type": "STATIC",
                "connect_timeout": "20s",
                "transport_socket": tls("UpstreamTlsContext", json!({"common_tls_context": common_tls(trial)})),
                "load_assignment": {
                    "cluster_name": trial.id,
                    "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": socket(trial)}}}}]}],
                },
            })
        })
        .collect();
    clusters.push(json!({
        "name": "secrets",
        "type": "STATIC",
        "connect_timeout": "5s",
        // A stream for each secret.
        "circuit_breakers": {"thresholds": [{"max_requests": 10_000}]},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }},
        "load_assignment": {
            "cluster_name": "secrets",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": dir.join("secrets")}}}}]}],
        },
    }));
    json!({
        "node": {"id": "shapes", "cluster": "shapes"},
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    })
}

fn common_tls(trial: &Trial) -> Value {
    let secret = |kind: &str| {
        let name = format!("{kind}-{}", trial.id);
        json!({
            "name": name,
            "sds_config": {
                "api_config_source": {
                    "api_type": "GRPC",
                    "transport_api_version": "V3",
                    "set_node_on_first_message_only": true,
                    "grpc_services": [{"envoy_grpc": {"cluster_name": "secrets"}}],
                },
                "resource_api_version": "V3",
                "initial_fetch_timeout": "0s",
            },
        })
    };
    json!({
        "tls_certificate_sds_secret_configs": [secret("chain")],
        "validation_context_sds_secret_config": secret("roots"),
    })
}

fn manager(routes: &[Value]) -> Value {
    json!({
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "http",
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
            "http_filters": [{
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
            }],
        },
    })
}

fn tls(context: &str, mut config: Value) -> Value {
    config["@type"] = format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{context}").into();
    json!({"name": "envoy.transport_sockets.tls", "typed_config": config})
}
