//! Client of the Kubernetes API: one rate-limited client per process, with time-outs, metrics, watches that recover, and errors for
//! operators.
//!
//! The caller installs rustls' crypto provider before [`connect`], and keeps polling each stream of [`watch::watch`]. Only watches are
//! retried here. For every other request the caller decides whether and when to retry. All clones of a client share one rate limiter.
//!
//! `kube_client` and `kube_runtime` log complete responses that they cannot parse: keep these two log targets out of the log.

use std::time::Duration;

use hyper_util::{
    client::legacy::{
        Client as HttpClient,
        connect::{Connect, HttpConnector},
    },
    rt::TokioExecutor,
};
use kube::{Client, Config, client::ConfigExt};
use tower::{BoxError, ServiceBuilder};

pub mod cluster_trust_bundle;
pub mod failure;
#[cfg(any(test, feature = "testing"))]
pub mod fake;
pub mod labels;
pub mod layer;
pub mod metrics;
pub mod object;
pub mod pages;
pub mod pod;
mod retry_after;
mod throttle;
pub mod token;
pub mod watch;
#[cfg(any(test, feature = "testing"))]
pub mod wire;

pub use failure::{Call, Cause, Failure};
pub use metrics::Metrics;

use agent_runtime::text;

/// Time-out of the TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum size of a response body, 32 MiB. A body is in memory up to three times until it is parsed. Pages of lists are
/// [smaller](pages::MAX_PAGE_BYTES).
pub const MAX_ANSWER_BYTES: usize = 32 << 20;
/// Time-out of a complete response, 30 s; for a watch, of its response headers.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// TCP keep-alive: an idle connection is probed after this time and at this interval, so that a watch over a dead path ends within a
/// minute.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Rate limit of one process for all its requests to the Kubernetes API. Default: 20 per second, burst 40.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestRate {
    /// `requestsPerSecond`: sustained requests per second.
    pub per_second: u32,
    /// `burst`: requests that may be sent at once after a pause.
    pub burst: u32,
}

impl Default for RequestRate {
    fn default() -> Self {
        Self { per_second: 20, burst: 40 }
    }
}

/// Reasons why no client can be created.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No configuration is found, or the kubeconfig cannot be read.
    #[error("no configuration for the Kubernetes API: set KUBECONFIG, or run in a pod with a service account token: {0}")]
    Infer(String),
    /// A configuration is found but cannot be used.
    #[error("the Kubernetes API's configuration cannot be used: {0}")]
    Build(String),
}

impl From<kube::config::InferConfigError> for Error {
    fn from(error: kube::config::InferConfigError) -> Self {
        use kube::config::KubeconfigError;
        let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref());
        Self::Infer(match source {
            // The parser's error quotes the lines around the mistake, and a kubeconfig contains keys and tokens.
            Some(KubeconfigError::Parse(error)) => match error.location() {
                Some(at) => format!("the kubeconfig is not valid: line {}, column {}", at.line(), at.column()),
                None => "the kubeconfig is not valid".to_owned(),
            },
            _ => text::excerpt(&error.to_string(), text::MAX_MESSAGE_CHARS),
        })
    }
}

impl From<kube::Error> for Error {
    fn from(error: kube::Error) -> Self {
        Self::Build(text::excerpt(&error.to_string(), text::MAX_MESSAGE_CHARS))
    }
}

/// Returns a client that is configured from `KUBECONFIG`, the user's kubeconfig or the pod's service account, whichever is found first. The
/// client and its clones together send at most `rate`.
///
/// # Errors
///
/// [`Error::Infer`] if no configuration is found or the kubeconfig is not valid. [`Error::Build`] if the configuration cannot be used, for
/// example because of its certificates or credentials.
pub async fn connect(metrics: &Metrics, rate: RequestRate) -> Result<Client, Error> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    tcp.set_keepalive(Some(KEEPALIVE));
    tcp.set_keepalive_interval(Some(KEEPALIVE));
    tcp.set_keepalive_retries(Some(2));
    tcp.set_tcp_user_timeout(Some(ANSWER_TIMEOUT));
    let config = Config::infer().await?;
    let https = config.rustls_https_connector_with_connector(tcp)?;
    Ok(client(config, https, metrics, rate)?)
}

/// Builds a client from `config` over connections of `connector`. `kube`'s own builder is not used, because it adds retries by default
/// (kube-rs/kube#2007).
fn client<C>(config: Config, connector: C, metrics: &Metrics, rate: RequestRate) -> Result<Client, kube::Error>
where
    C: Connect + Clone + Send + Sync + 'static,
{
    let http = HttpClient::builder(TokioExecutor::new()).build(connector);
    let service = ServiceBuilder::new()
        .layer(layer::Layer::new(metrics.clone(), rate))
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}
