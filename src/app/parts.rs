//! Creates the real dependencies that a configuration describes.

use std::sync::Arc;

use attest_kubernetes::{attestor::KubernetesAttestor, pods::Pods};
use futures::future::BoxFuture;
use issuance::rotation;
use sds_server::{
    attest::{self, Attestor},
    trust::file::FileSource,
};
use tracing::warn;
use unix_peer::peer;
use workload_identity::TrustDomain;

use super::{
    Base, Deps,
    builder::{Builder, Cluster},
    upstream,
};
use crate::{
    app::{cluster_trust_bundle_source::ClusterTrustBundleSource, config_map_source::ConfigMapSource},
    config::{Attestation, Config, IssuerConfig, TrustSource},
    events,
    handover::holder::{self, HolderAttestor},
};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::app::parts";

/// Creates the dependencies of `config`. It does not wait for the API server: a part that has to be in sync holds a readiness guard.
pub(super) async fn make(config: &Config, base: &mut Base) -> anyhow::Result<Deps> {
    check_kernel(config, peer::kernel_pins()?)?;
    let mut builder = Builder::new(config, base);
    // First, because this call registers the first metrics of the page.
    let cluster = if needs_cluster(config) { Some(cluster(&mut builder).await?) } else { None };
    let await_bundle = sources(&mut builder, cluster.as_ref())?;
    let issuer_set = upstream::issuers(&mut builder, cluster.as_ref())?;
    let reporter = cluster.as_ref().filter(|_| config.events).and_then(|cluster| events(&mut builder, cluster));
    let observer = reporter.clone().map(|reporter| reporter as Arc<dyn rotation::IssuanceObserver>);
    let caller_observer = reporter.map(|reporter| reporter as Arc<dyn attest::CallerObserver>);
    let pods = cluster.and_then(|cluster| cluster.pods);
    let attestor = attestor(config, pods.clone())?;
    let holder_attestor = holder_attestor(config, pods.as_ref())?;
    let Builder { clock, trust, last, mut tasks, .. } = builder;
    tasks.push(Box::pin(trust.clone().run(last.clone())));
    Ok(Deps { clock, attestor, holder_attestor, pods, issuer_set, trust, await_bundle, observer, caller_observer, tasks, last })
}

fn needs_cluster(config: &Config) -> bool {
    config.attestation == Attestation::Kubernetes
        || config.issuers.values().any(|issuer| matches!(issuer, IssuerConfig::CertManager(_)))
        || config.trust_sources.iter().chain(config.federated.values()).any(TrustSource::is_in_cluster)
}

async fn cluster(builder: &mut Builder<'_>) -> anyhow::Result<Cluster> {
    let config = builder.config;
    let metrics = agent_kube::Metrics::register(builder.base.exposition.registry());
    let client = agent_kube::connect(&metrics, config.kubernetes).await?;
    let pods = match &config.node.node_name {
        Some(node) if config.attestation == Attestation::Kubernetes => {
            let mut pods = Pods::new(client.clone(), node, metrics.clone());
            if !config.attestation_policy.containers.is_empty() {
                pods = pods.with_containers();
            }
            if let Some(per_pod) = &config.per_pod {
                pods = pods.with_picks_by(&per_pod.driver_name);
            }
            let mut synced = pods.synced();
            let (running, last) = (pods.clone(), builder.last.clone());
            let come = async move { drop(synced.wait_for(|synced| *synced).await) };
            builder.run_guarded("the pod index", come, async move { running.run(last).await });
            Some(pods)
        }
        _ => None,
    };
    let node_uid = agent_kube::token::node_uid().await;
    Ok(Cluster { client, metrics, pods, node_uid })
}

/// The reporter of Kubernetes Events, if there is a pod index.
fn events(builder: &mut Builder<'_>, cluster: &Cluster) -> Option<Arc<events::Reporter>> {
    cluster.pods.as_ref()?;
    let metrics = events::Metrics::register(builder.base.exposition.registry());
    let (reporter, writer) = events::new(cluster.client.clone(), &builder.config.node, metrics);
    let last = builder.last.clone();
    builder.tasks.push(Box::pin(async move { writer.run(last).await }));
    Some(Arc::new(reporter))
}

/// The attestor that the configuration names. There is no fallback to user ids: root of every pod would be the same workload.
pub(crate) fn attestor(config: &Config, pods: Option<Pods>) -> anyhow::Result<Arc<dyn Attestor>> {
    Ok(match (config.attestation, pods) {
        (Attestation::Kubernetes, Some(pods)) => {
            Arc::new(kubernetes_attestor(config, pods)?.with_policy(config.attestation_policy.clone()))
        }
        (Attestation::Kubernetes, None) => anyhow::bail!("attestation: kubernetes serves the pods of one node: set NODE_NAME"),
        (Attestation::Unix, _) => Arc::new(attest::unix::UnixAttestor),
    })
}

fn kubernetes_attestor(config: &Config, pods: Pods) -> std::io::Result<KubernetesAttestor> {
    let accepts_pid_reuse = config.shared_socket.as_ref().is_some_and(|socket| socket.accept_pid_reuse);
    Ok(KubernetesAttestor::new(pods, "/proc".into(), config.node.pod.as_ref())?.accepting_pid_reuse(accepts_pid_reuse))
}

/// The attestor of other processes that serve the shared socket's path: agents of the same service account if this agent runs in a pod.
fn holder_attestor(config: &Config, pods: Option<&Pods>) -> anyhow::Result<Arc<dyn HolderAttestor>> {
    Ok(match (config.attestation, pods, &config.node.pod) {
        (Attestation::Kubernetes, Some(pods), Some(own)) => {
            Arc::new(holder::SameAccount::new(kubernetes_attestor(config, pods.clone())?, pods.clone(), own.clone()))
        }
        _ => Arc::new(holder::SameUser),
    })
}

/// Returns an error if a process that reuses a pid could be served as another caller, unless the configuration accepts that.
fn check_kernel(config: &Config, kernel_pins: bool) -> anyhow::Result<()> {
    match &config.shared_socket {
        Some(socket) if config.attestation == Attestation::Kubernetes && !kernel_pins => {
            anyhow::ensure!(
                socket.accept_pid_reuse,
                "sockets.shared: this kernel has no SO_PEERPIDFD: a process that reuses the pid of a caller that has just ended would be \
                 served as that caller. Use Linux 6.5 or newer, use sockets.perPod without sockets.shared, or accept the risk with \
                 sockets.shared.acceptPidReuse: true"
            );
            warn!(
                target: LOG_TARGET,
                "this kernel has no SO_PEERPIDFD: a process that reuses the pid of a caller that has just ended is served as that caller"
            );
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Starts the sources of trust bundles. Returns whether `trust.sources` has any, for which readiness then waits.
fn sources(builder: &mut Builder<'_>, cluster: Option<&Cluster>) -> anyhow::Result<bool> {
    let config = builder.config;
    let own = config.trust_sources.iter().map(|source| (None, source));
    let federated = config.federated.iter().map(|(domain, source)| (Some(domain.clone()), source));
    for (domain, source) in own.chain(federated) {
        let task = feed(builder, domain, source, cluster)?;
        builder.tasks.extend(task);
    }
    let awaited = !config.trust_sources.is_empty();
    if awaited {
        let mut bundles = builder.trust.subscribe();
        let come = async move { drop(bundles.wait_for(|set| set.own.is_some()).await) };
        let ended = builder.last.clone().cancelled_owned();
        builder.run_guarded("the trust bundle", come, ended);
    }
    Ok(awaited)
}

/// Returns the task that follows `source`. `None` for a source that cannot change while the agent runs.
fn feed(
    builder: &Builder<'_>,
    domain: Option<TrustDomain>,
    source: &TrustSource,
    cluster: Option<&Cluster>,
) -> anyhow::Result<Option<BoxFuture<'static, ()>>> {
    let (trust, last) = (&builder.trust, builder.last.clone());
    match (source, cluster) {
        (TrustSource::File { path }, _) => {
            let source = trust.source(domain, &FileSource::source_name(path));
            Ok(Some(Box::pin(FileSource::new(path.clone(), source).run(last))))
        }
        (TrustSource::ConfigMap { namespace, name, key }, Some(cluster)) => {
            let source = trust.source(domain, &ConfigMapSource::source_name(namespace, name, key));
            let source = ConfigMapSource::new(cluster.client.clone(), namespace, name, key, source, cluster.metrics.clone());
            Ok(Some(Box::pin(source.run(last))))
        }
        (TrustSource::Inline { path, pem }, _) => {
            // `offer` counts and logs a refusal.
            let _ = trust.source(domain, &format!("inline {path}")).offer(pem.as_bytes());
            Ok(None)
        }
        (TrustSource::ClusterTrustBundle(selection), Some(cluster)) => {
            let source = trust.source(domain, &ClusterTrustBundleSource::source_name(selection));
            let source = ClusterTrustBundleSource::new(cluster.client.clone(), selection.clone(), source, cluster.metrics.clone());
            Ok(Some(Box::pin(source.run(last))))
        }
        (TrustSource::ConfigMap { .. } | TrustSource::ClusterTrustBundle(_), None) => {
            anyhow::bail!("a ConfigMap or ClusterTrustBundle as a trust source needs a cluster")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use agent_runtime::shutdown::Shutdown;

    use super::*;
    use crate::config::{self, Dev};

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
        let mut base = Base::new(Shutdown::new(Duration::ZERO));
        let mut builder = Builder::new(&config, &mut base);
        assert!(sources(&mut builder, None).unwrap());
        let Builder { last, tasks, .. } = builder;
        last.cancel();
        let ended = tokio::time::timeout(Duration::from_secs(1), futures::future::join_all(tasks)).await;
        assert!(ended.is_ok());
        assert_eq!(base.readiness.awaited(), ["start".into(), "the trust bundle".into()], "the end of the task is not readiness");
    }

    /// A task that ends would end the agent.
    #[tokio::test]
    async fn a_bundle_of_the_configuration_is_there_at_once_and_needs_no_task() {
        let root = rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem();
        let sources = serde_json::json!({"sources": [{"inline": root}], "federated": {"partner.example": {"inline": root}}});
        let text = serde_json::json!({"attestation": "unix", "issuer": {"embedded": {}}, "trust": sources}).to_string();
        let config = Config::parse(&text, &|_| None).unwrap().config;
        let mut base = Base::new(Shutdown::new(Duration::ZERO));
        let mut builder = Builder::new(&config, &mut base);
        assert!(super::sources(&mut builder, None).unwrap());
        let set = builder.trust.subscribe().borrow().clone();
        assert!(set.own.is_some() && set.federated.len() == 1);
        assert_eq!(builder.tasks.len(), 1, "the guard of the readiness alone");
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
