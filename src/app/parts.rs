//! The real dependencies: what a configuration asks for, made and joined.

use std::{
    collections::{BTreeMap, HashSet},
    future::Future,
    pin::pin,
    sync::Arc,
};

use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::{Base, Deps};
use crate::{
    attest::{self, Attestor, kubernetes::KubernetesAttestor, pods::Pods},
    cert_manager::naming::Agent,
    clock::{Clock, SystemClock},
    config::{self, Attestation, Config, IssuerConfig, RequestNamespace, TrustSource},
    identity::{IssuerName, TrustDomain},
    issuer::{
        Issuer,
        cert_manager::{CertManager, LivePods, Metrics as RequestMetrics, Requests},
        embedded::Embedded,
    },
    kubernetes, peer,
    readiness::Readiness,
    trust::{self, Trust, config_map::ConfigMapSource, file::FileSource},
};

/// What of the cluster several parts share.
struct Cluster {
    client: kube::Client,
    metrics: kubernetes::Metrics,
    pods: Option<Pods>,
}

/// Makes what `config` asks for. Nothing here waits for the upstream: what has to be in sync holds a readiness guard.
pub(super) async fn make(config: &Config, base: &mut Base) -> anyhow::Result<Deps> {
    check_kernel(config, peer::kernel_pins()?)?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let last = CancellationToken::new();
    let mut tasks: Vec<BoxFuture<'static, ()>> = Vec::new();
    let cluster = if needs_cluster(config) { Some(cluster(config, base, &mut tasks, &last).await?) } else { None };

    let trust = Trust::new(trust::Metrics::register(base.exposition.registry()));
    let await_bundle = sources(config, base, &trust, cluster.as_ref(), &mut tasks, &last)?;
    let issuers = issuers(config, base, &trust, cluster.as_ref(), &clock, &mut tasks, &last)?;
    let pods = cluster.and_then(|cluster| cluster.pods);
    let attestor = attestor(config, pods.clone())?;
    Ok(Deps { clock, attestor, pods, issuers, trust, await_bundle, tasks, last })
}

fn needs_cluster(config: &Config) -> bool {
    let config_map = |source: &TrustSource| matches!(source, TrustSource::ConfigMap { .. });
    config.attestation == Attestation::Kubernetes
        || config.issuers.values().any(|issuer| matches!(issuer, IssuerConfig::CertManager(_)))
        || config.trust_sources.iter().chain(config.federated.values()).any(config_map)
}

async fn cluster(
    config: &Config,
    base: &mut Base,
    tasks: &mut Vec<BoxFuture<'static, ()>>,
    last: &CancellationToken,
) -> anyhow::Result<Cluster> {
    let metrics = kubernetes::Metrics::register(base.exposition.registry());
    let client = kubernetes::connect(&metrics, config.kubernetes).await?;
    let pods = match &config.node.node_name {
        Some(node) if config.attestation == Attestation::Kubernetes => {
            let mut pods = Pods::new(client.clone(), node, metrics.clone());
            if !config.attestation_policy.containers.is_empty() {
                pods = pods.with_containers();
            }
            let mut synced = pods.synced();
            let (running, last) = (pods.clone(), last.clone());
            let come = async move { drop(synced.wait_for(|synced| *synced).await) };
            tasks.push(guarded(&base.readiness, "the pod index", come, async move { running.run(last).await }));
            Some(pods)
        }
        _ => None,
    };
    Ok(Cluster { client, metrics, pods })
}

/// What the configuration names, and nothing in its place: by user id, every pod's root would be one workload.
pub(crate) fn attestor(config: &Config, pods: Option<Pods>) -> anyhow::Result<Arc<dyn Attestor>> {
    Ok(match (config.attestation, pods) {
        (Attestation::Kubernetes, Some(pods)) => {
            let attestor = KubernetesAttestor::new(pods, "/proc".into(), config.node.pod.as_ref())?;
            let accepts_pid_reuse = config.shared_socket.as_ref().is_some_and(|socket| socket.accept_pid_reuse);
            Arc::new(attestor.with_policy(config.attestation_policy.clone()).accepting_pid_reuse(accepts_pid_reuse))
        }
        (Attestation::Kubernetes, None) => anyhow::bail!("attestation: kubernetes serves the pods of one node: set NODE_NAME"),
        (Attestation::Unix, _) => Arc::new(attest::unix::UnixAttestor),
    })
}

/// Refuses to serve where a caller could be taken for another.
fn check_kernel(config: &Config, kernel_pins: bool) -> anyhow::Result<()> {
    match &config.shared_socket {
        Some(socket) if config.attestation == Attestation::Kubernetes && !kernel_pins => {
            anyhow::ensure!(
                socket.accept_pid_reuse,
                "sockets.shared: this kernel gives no handle on a caller (SO_PEERPIDFD), so that whoever takes over the pid of one that \
                 has just ended would be served as that one; use Linux 6.5 or newer, sockets.perPod without sockets.shared, or accept \
                 the risk with sockets.shared.acceptPidReuse: true"
            );
            warn!("this kernel gives no handle on a caller: whoever takes over the pid of one that has just ended is served as that one");
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Feeds the bundles; whether one comes from elsewhere than the issuers.
fn sources(
    config: &Config,
    base: &Base,
    trust: &Trust,
    cluster: Option<&Cluster>,
    tasks: &mut Vec<BoxFuture<'static, ()>>,
    last: &CancellationToken,
) -> anyhow::Result<bool> {
    let own = config.trust_sources.iter().map(|source| (None, source));
    let federated = config.federated.iter().map(|(domain, source)| (Some(domain.clone()), source));
    for (domain, source) in own.chain(federated) {
        tasks.push(feed(domain, source, trust, cluster, last)?);
    }
    let awaited = !config.trust_sources.is_empty();
    if awaited {
        let mut bundles = trust.subscribe();
        let come = async move { drop(bundles.wait_for(|set| set.own.is_some()).await) };
        tasks.push(guarded(&base.readiness, "the trust bundle", come, last.clone().cancelled_owned()));
    }
    Ok(awaited)
}

fn feed(
    domain: Option<TrustDomain>,
    source: &TrustSource,
    trust: &Trust,
    cluster: Option<&Cluster>,
    last: &CancellationToken,
) -> anyhow::Result<BoxFuture<'static, ()>> {
    let last = last.clone();
    match (source, cluster) {
        (TrustSource::File { path }, _) => {
            let source = trust.source(domain, &FileSource::source_name(path));
            Ok(Box::pin(FileSource::new(path.clone(), source).run(last)))
        }
        (TrustSource::ConfigMap { namespace, name, key }, Some(cluster)) => {
            let source = trust.source(domain, &ConfigMapSource::source_name(namespace, name, key));
            let source = ConfigMapSource::new(cluster.client.clone(), namespace, name, key, source, cluster.metrics.clone());
            Ok(Box::pin(source.run(last)))
        }
        (TrustSource::ConfigMap { .. }, None) => anyhow::bail!("a ConfigMap as a trust source needs a cluster"),
    }
}

fn issuers(
    config: &Config,
    base: &mut Base,
    trust: &Trust,
    cluster: Option<&Cluster>,
    clock: &Arc<dyn Clock>,
    tasks: &mut Vec<BoxFuture<'static, ()>>,
    last: &CancellationToken,
) -> anyhow::Result<BTreeMap<IssuerName, Arc<dyn Issuer>>> {
    let mut out: BTreeMap<IssuerName, Arc<dyn Issuer>> = BTreeMap::new();
    // One watch, one sweep for each scope: "workload" or a namespace.
    let mut scopes: Vec<(RequestNamespace, Requests)> = Vec::new();
    let mut request_metrics = None;
    for (name, issuer) in &config.issuers {
        match (issuer, cluster) {
            (IssuerConfig::Embedded, _) => {
                let embedded = Embedded::new(config.trust_domain.as_str(), clock.clone())?;
                trust.source(None, &format!("issuer {name}")).take(embedded.bundle()?);
                out.insert(name.clone(), Arc::new(embedded));
            }
            (IssuerConfig::CertManager(cert_manager), Some(cluster)) => {
                let metrics = request_metrics.get_or_insert_with(|| RequestMetrics::register(base.exposition.registry())).clone();
                let requests = match scopes.iter().find(|(scope, _)| *scope == cert_manager.namespace) {
                    Some((_, requests)) => requests.clone(),
                    None => {
                        let scope = cert_manager.namespace.clone();
                        let made = requests(config, scope.clone(), cluster, clock, metrics);
                        let (running, last) = (made.clone(), last.clone());
                        let synced = made.clone();
                        let come = async move { synced.synced().await };
                        tasks.push(guarded(&base.readiness, "the watch of requests", come, async move { running.run(last).await }));
                        scopes.push((scope, made.clone()));
                        made
                    }
                };
                out.insert(name.clone(), Arc::new(ask_cert_manager(name, cert_manager, requests, trust, tasks, last)));
            }
            (IssuerConfig::CertManager(_), None) => anyhow::bail!("issuer {name}: cert-manager needs a cluster"),
        }
    }
    Ok(out)
}

fn requests(config: &Config, scope: RequestNamespace, cluster: &Cluster, clock: &Arc<dyn Clock>, metrics: RequestMetrics) -> Requests {
    let agent = Agent::new(&config.node, fastrand::u64(..));
    let pods = cluster.pods.clone().map(|pods| Arc::new(NodePods(pods)) as Arc<dyn LivePods>);
    Requests::new(cluster.client.clone(), scope, agent, pods, clock.clone(), cluster.metrics.clone(), metrics)
}

fn ask_cert_manager(
    name: &IssuerName,
    config: &config::CertManager,
    requests: Requests,
    trust: &Trust,
    tasks: &mut Vec<BoxFuture<'static, ()>>,
    last: &CancellationToken,
) -> CertManager {
    let status_ca = config.trust_status_ca.then(|| trust.source(None, &format!("status.ca of issuer {name}")));
    let issuer = CertManager::new(requests, config.clone(), status_ca);
    // The log tells early what the first order would run into.
    let (check, name, last) = (issuer.preflight(), name.clone(), last.clone());
    tasks.push(Box::pin(async move {
        tokio::select! {
            () = last.cancelled() => return,
            checked = check => if let Err(cause) = checked {
                error!(issuer = %name, %cause, "the issuer cannot serve as it is; orders will try again");
            },
        }
        last.cancelled().await;
    }));
    issuer
}

/// `running`, with readiness held back until `come`. It ends with `running`, whether that has come or not.
fn guarded(
    readiness: &Readiness,
    name: &str,
    come: impl Future<Output = ()> + Send + 'static,
    running: impl Future<Output = ()> + Send + 'static,
) -> BoxFuture<'static, ()> {
    let guard = readiness.guard(name);
    Box::pin(async move {
        let mut running = pin!(running);
        tokio::select! {
            () = come => drop(guard),
            // Nobody becomes ready by ending.
            () = &mut running => return guard.abandon(),
        }
        running.await;
    })
}

/// The pod index, as the sweep of requests asks it.
#[derive(Debug)]
struct NodePods(Pods);

impl LivePods for NodePods {
    fn live(&self) -> BoxFuture<'_, Option<HashSet<Arc<str>>>> {
        Box::pin(self.0.live())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{config::Dev, shutdown::Shutdown};

    fn config() -> Config {
        config::dev(Dev::default(), &|_| None).unwrap()
    }

    #[test]
    fn kubernetes_attestation_without_a_node_is_no_attestation_by_user_id() {
        assert!(attestor(&Config { attestation: Attestation::Kubernetes, ..config() }, None).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_bundle_that_never_came_does_not_hold_up_the_end() {
        let path = "/nonexistent/roots.pem".into();
        let config = Config { trust_sources: vec![TrustSource::File { path }], ..config() };
        let base = Base::new(Shutdown::new(Duration::ZERO));
        let (trust, last, mut tasks) = (Trust::new(trust::Metrics::default()), CancellationToken::new(), Vec::new());
        assert!(sources(&config, &base, &trust, None, &mut tasks, &last).unwrap());
        last.cancel();
        let ended = tokio::time::timeout(Duration::from_secs(1), futures::future::join_all(tasks)).await;
        assert!(ended.is_ok());
        assert_eq!(base.readiness.awaited(), ["start".into(), "the trust bundle".into()], "nor does the end make anybody ready");
    }

    #[test]
    fn an_old_kernel_is_served_only_where_the_risk_was_accepted_by_name() {
        let mut config = config();
        check_kernel(&config, false).unwrap();
        config.attestation = Attestation::Kubernetes;
        check_kernel(&config, true).unwrap();
        let error = check_kernel(&config, false).unwrap_err().to_string();
        assert!(error.contains("Linux 6.5") && error.contains("acceptPidReuse: true"), "{error}");
        config.shared_socket.as_mut().unwrap().accept_pid_reuse = true;
        check_kernel(&config, false).unwrap();
        config.shared_socket = None;
        check_kernel(&config, false).unwrap();
    }
}
