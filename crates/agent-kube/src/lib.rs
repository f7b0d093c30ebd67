//! The way to the Kubernetes API: one client with explicit time-outs, its metrics, watches that recover, and errors in words.
//!
//! The caller installs rustls' crypto provider first, and owes every `watch` a consumer that keeps polling. Nothing is retried here
//! but watches: who asks decides when to ask again. All requests of a process share one client, and so its pace. The libraries below log whole responses when they cannot read them: keep the
//! targets `kube_client` and `kube_runtime` out of the log.

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

pub mod failure;
#[cfg(any(test, feature = "testing"))]
pub mod fake;
pub mod labels;
pub mod layer;
pub mod metrics;
pub mod object;
pub mod pod;
mod retry_after;
mod throttle;
pub mod watch;
#[cfg(any(test, feature = "testing"))]
pub mod wire;

pub use failure::{Call, Cause, Failure};
pub use metrics::Metrics;

use agent_runtime::text;

/// For the TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest body of an answer that is read. It is in memory twice until it has been parsed, and the smallest container that reads lists
/// has 512 MiB.
pub const MAX_ANSWER_BYTES: usize = 128 << 20;
/// For a whole answer; for a watch, until its headers are there.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// A silent connection is probed after this time and at this interval, so that a watch across a dead path ends within a minute.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// How fast one process asks the Kubernetes API, whatever for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestRate {
    /// `requestsPerSecond`, in the long run.
    pub per_second: u32,
    /// `burst`: how many at once.
    pub burst: u32,
}

impl Default for RequestRate {
    fn default() -> Self {
        Self { per_second: 20, burst: 40 }
    }
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither a kubeconfig nor a pod's environment.
    #[error("no way to the Kubernetes API: set KUBECONFIG, or run in a pod with a service account token: {0}")]
    Infer(String),
    /// The configuration cannot be used.
    #[error("the Kubernetes API's configuration cannot be used: {0}")]
    Build(String),
}

impl From<kube::config::InferConfigError> for Error {
    fn from(error: kube::config::InferConfigError) -> Self {
        use kube::config::KubeconfigError;
        let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref());
        Self::Infer(match source {
            // Its text shows the lines around the mistake: a kubeconfig holds keys and tokens.
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

/// A client from `KUBECONFIG`, the user's kubeconfig, or the pod's service account, whichever is found first. What one process sends
/// at most at `rate` goes through one client and its clones.
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

/// A client from a given configuration, over connections of `connector`. `kube`'s own builder would add retries of its own.
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
