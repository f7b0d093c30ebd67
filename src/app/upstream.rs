//! The issuers of a configuration, and what they share: one agent, and watches of requests whose scopes never meet.
//!
//! A watch of requests deletes what is this agent's and what none of *its* orders knows. Two that see the same namespace would delete each
//! other's live requests. So every namespace is seen by one at most: each fixed one by its own, or, as soon as one issuer follows the
//! workloads' namespaces, all of them by a single one.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use tracing::error;

use super::{
    Base,
    parts::{Cluster, guarded},
};
use crate::{
    attest::pods::Pods,
    cert_manager::naming::Agent,
    clock::Clock,
    config::{self, Config, IssuerConfig, RequestNamespace},
    identity::IssuerName,
    issuer::{
        Issuer,
        cert_manager::{CertManager, LivePods, Metrics, Requests},
        embedded::Embedded,
    },
    trust::Trust,
};

/// Makes the issuers of `config`.
pub(super) fn issuers(
    config: &Config,
    base: &mut Base,
    trust: &Trust,
    cluster: Option<&Cluster>,
    clock: &Arc<dyn Clock>,
    tasks: &mut Vec<BoxFuture<'static, ()>>,
    last: &CancellationToken,
) -> anyhow::Result<BTreeMap<IssuerName, Arc<dyn Issuer>>> {
    let scopes = match cluster {
        Some(cluster) => watched(config, base, cluster, clock, tasks, last),
        None => Vec::new(),
    };
    let mut out: BTreeMap<IssuerName, Arc<dyn Issuer>> = BTreeMap::new();
    for (name, issuer) in &config.issuers {
        let made: Arc<dyn Issuer> = match issuer {
            IssuerConfig::Embedded => {
                let embedded = Embedded::new(config.trust_domain.as_str(), clock.clone())?;
                trust.source(None, &format!("issuer {name}")).take(embedded.bundle()?);
                Arc::new(embedded)
            }
            IssuerConfig::CertManager(cert_manager) => {
                let scope = scopes.iter().find(|(scope, _)| holds(scope, &cert_manager.namespace));
                let Some((_, requests)) = scope else { anyhow::bail!("issuer {name}: cert-manager needs a cluster") };
                Arc::new(ask_cert_manager(name, cert_manager, requests.clone(), trust, tasks, last))
            }
        };
        out.insert(name.clone(), made);
    }
    Ok(out)
}

/// The scopes of the watches that `config` needs: none is part of another.
fn scopes(config: &Config) -> Vec<RequestNamespace> {
    let mut out: Vec<RequestNamespace> = Vec::new();
    for issuer in config.issuers.values() {
        match issuer {
            IssuerConfig::CertManager(issuer) if issuer.namespace == RequestNamespace::Workload => return vec![RequestNamespace::Workload],
            IssuerConfig::CertManager(issuer) if !out.contains(&issuer.namespace) => out.push(issuer.namespace.clone()),
            IssuerConfig::CertManager(_) | IssuerConfig::Embedded => {}
        }
    }
    out
}

/// Whether a watch of `scope` sees the requests of an issuer that asks in `namespace`.
fn holds(scope: &RequestNamespace, namespace: &RequestNamespace) -> bool {
    *scope == RequestNamespace::Workload || scope == namespace
}

/// Begins to watch each scope, all as one agent.
fn watched(
    config: &Config,
    base: &mut Base,
    cluster: &Cluster,
    clock: &Arc<dyn Clock>,
    tasks: &mut Vec<BoxFuture<'static, ()>>,
    last: &CancellationToken,
) -> Vec<(RequestNamespace, Requests)> {
    let scopes = scopes(config);
    if scopes.is_empty() {
        return Vec::new();
    }
    let metrics = Metrics::register(base.exposition.registry());
    let agent = Arc::new(Agent::new(&config.node, fastrand::u64(..)));
    let pods = cluster.pods.clone().map(|pods| Arc::new(NodePods(pods)) as Arc<dyn LivePods>);
    let watch = |scope: RequestNamespace| {
        let client = cluster.client.clone();
        let (clock, pods) = (clock.clone(), pods.clone());
        let requests = Requests::new(client, scope.clone(), agent.clone(), pods, clock, cluster.metrics.clone(), metrics.clone());
        let (running, synced, last) = (requests.clone(), requests.clone(), last.clone());
        let name = match &scope {
            RequestNamespace::Fixed(namespace) => format!("the watch of requests in namespace {namespace}"),
            RequestNamespace::Workload => "the watch of requests".to_owned(),
        };
        let come = async move { synced.synced().await };
        tasks.push(guarded(&base.readiness, &name, come, async move { running.run(last).await }));
        (scope, requests)
    };
    scopes.into_iter().map(watch).collect()
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

/// The pod index, as the sweep of requests asks it.
#[derive(Debug)]
struct NodePods(Pods);

impl LivePods for NodePods {
    fn live(&self) -> BoxFuture<'_, Option<HashSet<Arc<str>>>> {
        Box::pin(self.0.live())
    }
}

#[cfg(test)]
mod tests;
