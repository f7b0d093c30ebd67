//! `sds-agent dev`: the agent with the embedded authority. Callers are identified by their uid.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use super::{Exit, output};
use crate::config::{self, Config, Dev, Env, Loaded};

/// The flags of `dev`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Path of the socket [default: $XDG_RUNTIME_DIR/sds-agent/sds.sock, or /tmp/sds-agent/sds.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Lifetime of a certificate, at least 10s [default: 2m]
    #[arg(long, value_name = "DUR")]
    pub lifetime: Option<humantime::Duration>,
    /// Trust domain of all identities [default: example.org]
    #[arg(long, value_name = "TD")]
    pub trust_domain: Option<String>,
    /// Address of health, metrics and the list of certificates, loopback only [default: 127.0.0.1:15090]
    #[arg(long, value_name = "ADDR")]
    pub admin: Option<SocketAddr>,
}

const EXAMPLES: &str = "\
Every caller gets the identity spiffe://<trust domain>/uid/<its user id>. An authority in the memory of the process signs
it, and ends with the process.

Examples:
  sds-agent dev                           serve, and print how to call it
  sds-agent dev --lifetime 20s            rotate about every ten seconds
  sds-agent dev --socket /tmp/a.sock --admin 127.0.0.1:0
                                          run a second agent
  sds-agent fetch --watch                 in another terminal: watch certificates rotate
  sds-agent certs                         list its certificates

Exit codes: 0 stopped by a signal, 1 it could not start, or the drain was aborted, 64 usage.";

impl Args {
    /// The configuration from the flags. Errors are already printed when this returns an exit code.
    pub fn load(self, env: Env<'_>) -> Result<Loaded, Exit> {
        let Self { socket, lifetime, trust_domain, admin } = self;
        let flags = Dev { socket, lifetime: lifetime.map(Into::into), trust_domain, admin };
        config::dev(flags, env).map(|config| Loaded { config, warnings: Vec::new() }).map_err(|errors| {
            output::tell(format_args!("{errors}"));
            Exit::Usage
        })
    }
}

/// Instructions for the user at the terminal.
pub fn greeting(socket: &Path, admin: SocketAddr, config: &Config) -> String {
    let socket = socket.display();
    let id = format!("{}/uid/{}", config.trust_domain.id(), nix::unistd::geteuid());
    let (certificate, bundle) = (&config.names.certificate, &config.names.bundle);
    format!(
        r#"sds-agent serves {socket}; your processes are {id}

fetch as a workload does, and watch certificates rotate:
  sds-agent fetch --socket {socket}
  sds-agent fetch --socket {socket} --watch

fetch with grpcurl (the answer contains the private key):
  grpcurl -plaintext -d '{{"resource_names":["{certificate}"]}}' \
    unix://{socket} envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets

Envoy: a cluster, and the same config source for every secret:
  clusters:
  - name: sds-grpc
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{ http2_protocol_options: {{}} }}
    load_assignment:
      cluster_name: sds-grpc
      endpoints:
      - lb_endpoints:
        - endpoint: {{ address: {{ pipe: {{ path: {socket} }} }} }}
  common_tls_context:
    tls_certificate_sds_secret_configs:
    - name: {certificate}
      sds_config: &sds
        resource_api_version: V3
        initial_fetch_timeout: 0s
        api_config_source:
          api_type: GRPC
          transport_api_version: V3
          grpc_services: [ {{ envoy_grpc: {{ cluster_name: sds-grpc }} }} ]
    validation_context_sds_secret_config: {{ name: {bundle}, sds_config: *sds }}

certificates: http://{admin}/certs   metrics: http://{admin}/metrics

"#
    )
}
