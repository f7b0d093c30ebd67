//! A real Envoy that gets its certificate and trust bundle from the agent: a server that answers, or a client that forwards to a server.
//!
//! Each side requires the SPIFFE ID of its peer. Each request between them uses a new TLS connection with a full handshake: connections
//! are not pooled and sessions are not resumed. So a request that succeeds proves that the certificates are valid at that moment.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::Path,
    sync::OnceLock,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use crate::{cgroups::PodCgroup, child::Child, eventually, http, tools};

/// Limit for Envoy's start, without secrets.
const START: Duration = Duration::from_secs(60);
/// Limit until Envoy has both secrets, with the slowest issuer under load.
const SECRETS: Duration = Duration::from_secs(90);

/// The body of the server's answer.
pub const ANSWER: &str = "hello from the other side";

/// The protocol for requesting secrets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sds {
    /// `StreamSecrets`
    StateOfTheWorld,
    /// `DeltaSecrets`, over a cluster whose name is not valid as the authority of a URI
    Delta,
    /// `StreamSecrets` over gRPC's C++ library, which sends the socket's path as `:authority`
    GoogleGrpc,
}

impl Sds {
    /// The name of the cluster for the agent.
    fn cluster(self) -> &'static str {
        match self {
            Self::StateOfTheWorld | Self::GoogleGrpc => "sds-grpc",
            Self::Delta => "node/agent|sds-grpc",
        }
    }
}

/// The end of the connection that this Envoy is. Each requires its peer's SPIFFE ID.
#[derive(Debug, Clone, Copy)]
pub enum Side<'a> {
    /// TLS listener that answers itself.
    Server { client: &'a str },
    /// Plain listener that forwards over TLS.
    Client { server: &'a str, at: SocketAddr },
}

/// A running Envoy.
pub struct Envoy {
    name: &'static str,
    started: Instant,
    took: OnceLock<Duration>,
    admin: SocketAddr,
    _process: Child,
    _files: TempDir,
}

/// A secret that an Envoy holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    pub name: String,
    pub version: String,
}

impl Envoy {
    /// Starts an Envoy, in a pod's cgroup if given, and waits only for its admin interface.
    pub async fn start(side: Side<'_>, socket: &Path, sds: Sds, cgroup: Option<&PodCgroup>) -> Self {
        let program = tools::envoy();
        let command = cgroup.map_or_else(|| Command::new(&program), |cgroup| cgroup.command(&program));
        Self::start_by(command, side, socket, sds).await
    }

    /// Like [`Envoy::start`], with words before the command, such as those that move it into a pod.
    pub async fn start_under(words: &[String], side: Side<'_>, socket: &Path, sds: Sds) -> Self {
        let (first, words) = words.split_first().expect("at least one word");
        let mut command = Command::new(first);
        command.args(words).arg(tools::envoy());
        Self::start_by(command, side, socket, sds).await
    }

    async fn start_by(mut command: Command, side: Side<'_>, socket: &Path, sds: Sds) -> Self {
        let name = match side {
            Side::Server { .. } => "server",
            Side::Client { .. } => "client",
        };
        let dir = tempfile::Builder::new().prefix("envoy-").tempdir().expect("a temporary folder");
        let bootstrap = dir.path().join("bootstrap.json");
        fs::write(&bootstrap, bootstrap_for(name, side, socket, sds).to_string()).expect("the bootstrap is written");
        let address = dir.path().join("admin");

        command.arg("--config-path").arg(&bootstrap);
        command.arg("--admin-address-path").arg(&address);
        command.args(["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "info", "--disable-hot-restart"]);
        let started = Instant::now();
        let process = Child::spawn(&format!("envoy {name}"), &mut command);

        let admin = eventually("Envoy's admin interface", START, async || {
            let text = fs::read_to_string(&address).map_err(|e| e.to_string())?;
            let admin = text.parse::<SocketAddr>().map_err(|e| format!("{text:?}: {e}"))?;
            http::get_ok(admin, "/server_info").await.map(|_| admin)
        });
        Self { name, started, took: OnceLock::new(), admin: admin.await, _process: process, _files: dir }
    }

    /// Waits until it has all its secrets and accepts connections; returns the address of its listener.
    pub async fn live(&self) -> SocketAddr {
        eventually("Envoy is live", SECRETS, async || http::get_ok(self.admin, "/ready").await).await;
        let took = self.took.get_or_init(|| self.started.elapsed());
        eprintln!("figure: {} Envoy with all its secrets {} ms after its start", self.name, took.as_millis());
        eventually("Envoy listens", START, async || {
            let listeners = self.json("/listeners?format=json").await?;
            let address = &listeners["listener_statuses"][0]["local_address"]["socket_address"];
            let port = address["port_value"].as_u64().and_then(|port| u16::try_from(port).ok());
            port.map(|port| SocketAddr::from(([127, 0, 0, 1], port))).ok_or_else(|| listeners.to_string())
        })
        .await
    }

    /// The time from its start until it was [live](Self::live), to the precision of the polls.
    pub fn took(&self) -> Duration {
        *self.took.get().expect("it was waited for")
    }

    /// Its own state: `PRE_INITIALIZING`, `INITIALIZING`, `LIVE`.
    pub async fn state(&self) -> Result<String, String> {
        let info = self.json("/server_info").await?;
        info["state"].as_str().map(str::to_owned).ok_or_else(|| info.to_string())
    }

    /// Its counters and gauges.
    pub async fn stats(&self) -> Stats {
        let stats = self.json("/stats?format=json").await.expect("Envoy's admin interface answers");
        let values = stats["stats"].as_array().expect("a list of stats").iter();
        Stats(values.filter_map(|stat| Some((stat["name"].as_str()?.to_owned(), stat["value"].as_u64()?))).collect())
    }

    /// The secrets that it uses now, with their versions.
    pub async fn secrets(&self) -> Result<Vec<Secret>, String> {
        let dump = self.json("/config_dump?resource=dynamic_active_secrets").await?;
        let secrets = dump["configs"].as_array().map(Vec::as_slice).unwrap_or_default().iter();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(secrets.map(|secret| Secret { name: text(&secret["name"]), version: text(&secret["version_info"]) }).collect())
    }

    /// The version of the secret with this name.
    pub async fn version(&self, name: &str) -> Result<String, String> {
        let secrets = self.secrets().await?;
        let found = secrets.iter().find(|secret| secret.name == name && !secret.version.is_empty());
        found.map(|secret| secret.version.clone()).ok_or_else(|| format!("no secret {name} in {secrets:?}"))
    }

    async fn json(&self, path: &str) -> Result<Value, String> {
        let text = http::get_ok(self.admin, path).await?;
        serde_json::from_str(&text).map_err(|e| format!("{path}: {e}: {text}"))
    }
}

/// Envoy's statistics by name.
#[derive(Debug, Clone)]
pub struct Stats(BTreeMap<String, u64>);

impl Stats {
    /// The sum over all names with this suffix. Panics if no name has it.
    pub fn sum(&self, suffix: &str) -> u64 {
        let mut found = self.0.iter().filter(|(name, _)| name.ends_with(suffix)).map(|(_, value)| value).peekable();
        assert!(found.peek().is_some(), "Envoy has no statistic that ends with {suffix}; among its names: {:?}", self.like("ssl"));
        found.sum()
    }

    /// The statistics with `part` in their names.
    pub fn like(&self, part: &str) -> Vec<(&str, u64)> {
        self.0.iter().filter(|(name, _)| name.contains(part)).map(|(name, value)| (name.as_str(), *value)).collect()
    }
}

fn bootstrap_for(name: &str, side: Side<'_>, socket: &Path, sds: Sds) -> Value {
    let mut clusters = vec![sds_cluster(socket, sds)];
    let filter_chain = match side {
        Side::Server { client } => json!({
            "transport_socket": tls("DownstreamTlsContext", json!({
                "require_client_certificate": true,
                "disable_stateless_session_resumption": true,
                "disable_stateful_session_resumption": true,
                "common_tls_context": common_tls(client, socket, sds),
            })),
            "filters": [http_filter(json!({"direct_response": {"status": 200, "body": {"inline_string": ANSWER}}}))],
        }),
        Side::Client { server, at } => {
            clusters.push(upstream(server, at, socket, sds));
            json!({"filters": [http_filter(json!({"route": {"cluster": "other-side", "timeout": "8s"}}))]})
        }
    };
    json!({
        "node": {"id": name, "cluster": name},
        "admin": {"address": address(SocketAddr::from(([127, 0, 0, 1], 0)))},
        "static_resources": {
            "listeners": [{
                "name": name,
                "address": address(SocketAddr::from(([127, 0, 0, 1], 0))),
                "filter_chains": [filter_chain],
            }],
            "clusters": clusters,
        },
    })
}

/// As istio-proxy configures it: a pipe, HTTP/2, one second to connect.
fn sds_cluster(socket: &Path, sds: Sds) -> Value {
    json!({
        "name": sds.cluster(),
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": http_options(json!({"explicit_http_config": {"http2_protocol_options": {}}})),
        "load_assignment": {
            "cluster_name": sds.cluster(),
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": socket}}}}]}],
        },
    })
}

fn upstream(server: &str, at: SocketAddr, socket: &Path, sds: Sds) -> Value {
    json!({
        "name": "other-side",
        "type": "STATIC",
        "connect_timeout": "5s",
        "typed_extension_protocol_options": http_options(json!({
            "common_http_protocol_options": {"max_requests_per_connection": 1},
            "explicit_http_config": {"http_protocol_options": {}},
        })),
        "transport_socket": tls("UpstreamTlsContext", json!({
            "max_session_keys": 0,
            "common_tls_context": common_tls(server, socket, sds),
        })),
        "load_assignment": {
            "cluster_name": "other-side",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(at)}}]}],
        },
    })
}

fn common_tls(peer: &str, socket: &Path, sds: Sds) -> Value {
    json!({
        "tls_certificate_sds_secret_configs": [secret("default", socket, sds)],
        "combined_validation_context": {
            "default_validation_context": {
                "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}],
            },
            "validation_context_sds_secret_config": secret("ROOTCA", socket, sds),
        },
    })
}

fn secret(name: &str, socket: &Path, sds: Sds) -> Value {
    let envoy_grpc = json!({"envoy_grpc": {"cluster_name": sds.cluster()}});
    let (api_type, service) = match sds {
        Sds::StateOfTheWorld => ("GRPC", envoy_grpc),
        Sds::Delta => ("DELTA_GRPC", envoy_grpc),
        Sds::GoogleGrpc => {
            let target = format!("unix:{}", socket.display());
            ("GRPC", json!({"google_grpc": {"target_uri": target, "stat_prefix": "sds"}}))
        }
    };
    json!({
        "name": name,
        "sds_config": {
            "api_config_source": {
                "api_type": api_type,
                "transport_api_version": "V3",
                "set_node_on_first_message_only": true,
                "grpc_services": [service],
            },
            "resource_api_version": "V3",
            "initial_fetch_timeout": "0s",
        },
    })
}

fn http_filter(mut route: Value) -> Value {
    route["match"] = json!({"prefix": "/"});
    json!({
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "http",
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
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

fn http_options(mut options: Value) -> Value {
    options["@type"] = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions".into();
    json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options})
}

fn address(at: SocketAddr) -> Value {
    json!({"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}})
}
