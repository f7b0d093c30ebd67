//! The issuers of a configuration, and the watches of CertificateRequests that they share.
//!
//! [`Requests`] watches the requests of one namespace, or of all. It deletes a request of this agent that belongs to none of its own
//! orders, so two watches of the same namespace would delete each other's live requests. Therefore at most one watch sees a namespace:
//! one watch for each fixed namespace, or a single watch of all namespaces as soon as one issuer uses `namespace: workload`.
//!
//! A change of the configuration creates new issuers and keeps unchanged ones with their state. A removed issuer ends with its last order.
//! A new namespace gets its own watch. A watch that no issuer needs runs until the agent ends, because its namespace may still hold
//! requests and records of refusals. A change that would make two watches see the same namespace is rejected.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    sync::Arc,
};

use agent_runtime::clock::Clock;
use attest_kubernetes::pods::Pods;
use cert_manager::{RequestNamespace, naming::Agent};
use futures::future::BoxFuture;
use issuance::issuer::{
    Issuer,
    certificate_request::{self, CertManager, LivePods, Metrics, Requests},
    embedded::Embedded,
};
use sds_server::trust::Trust;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};
use workload_identity::IssuerName;

use super::builder::{Builder, Cluster};
use crate::config::{Config, IssuerConfig};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::app::upstream";

/// The issuers in force, and the factory for new ones.
pub struct IssuerSet {
    issuers: BTreeMap<IssuerName, Arc<dyn Issuer>>,
    /// Every issuer that was created. A configuration that returns gets its former issuer again.
    made: Vec<(IssuerConfig, Arc<dyn Issuer>)>,
    wanted: Vec<IssuerConfig>,
    maker: Option<IssuerFactory>,
}

impl fmt::Debug for IssuerSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IssuerSet").field(&self.issuers).finish()
    }
}

/// A fixed set: no configuration changes it.
impl From<BTreeMap<IssuerName, Arc<dyn Issuer>>> for IssuerSet {
    fn from(issuers: BTreeMap<IssuerName, Arc<dyn Issuer>>) -> Self {
        Self { issuers, made: Vec::new(), wanted: Vec::new(), maker: None }
    }
}

/// Creates issuers and their watches.
struct IssuerFactory {
    asked: Option<ClusterDeps>,
    scopes: Vec<(RequestNamespace, Requests)>,
    trust: Trust,
    clock: Arc<dyn Clock>,
    last: CancellationToken,
}

/// The cluster for CertificateRequests, and the agent's name in them.
struct ClusterDeps {
    client: kube::Client,
    kube_metrics: agent_kube::Metrics,
    metrics: Metrics,
    agent: Arc<Agent>,
    pods: Option<Arc<dyn LivePods>>,
}

/// The background tasks of new issuers. They run until the agent ends.
#[derive(Default)]
pub(super) struct Started {
    /// The watches, with their names for readiness.
    watches: Vec<(String, Requests)>,
    checks: Vec<BoxFuture<'static, ()>>,
}

impl Started {
    /// The tasks, each of which runs until `last` is cancelled.
    pub(super) fn tasks(self, last: &CancellationToken) -> impl Iterator<Item = BoxFuture<'static, ()>> {
        let watches = self.watches.into_iter().map(|(_, requests)| {
            let last = last.clone();
            Box::pin(async move { requests.run(last).await }) as BoxFuture<'static, ()>
        });
        watches.collect::<Vec<_>>().into_iter().chain(self.checks)
    }
}

/// Creates the issuers of the configuration. The agent is not ready before their watches are in sync.
pub(super) fn issuers(builder: &mut Builder<'_>, cluster: Option<&Cluster>) -> anyhow::Result<IssuerSet> {
    let (config, last) = (builder.config, builder.last.clone());
    let asked = cluster.map(|cluster| ClusterDeps {
        client: cluster.client.clone(),
        kube_metrics: cluster.metrics.clone(),
        metrics: Metrics::register(builder.base.exposition.registry()),
        agent: Arc::new(Agent::new(&config.node, cluster.node_uid.clone(), fastrand::u64(..))),
        pods: cluster.pods.clone().map(|pods| Arc::new(NodePods(pods)) as Arc<dyn LivePods>),
    });
    let maker = IssuerFactory { asked, scopes: Vec::new(), trust: builder.trust.clone(), clock: builder.clock.clone(), last: last.clone() };
    let mut issuer_set = IssuerSet { issuers: BTreeMap::new(), made: Vec::new(), wanted: Vec::new(), maker: Some(maker) };
    let started = issuer_set.change(config)?;
    for (name, requests) in started.watches {
        let (running, last) = (requests.clone(), last.clone());
        let come = async move { requests.synced().await };
        builder.run_guarded(&name, come, async move { running.run(last).await });
    }
    builder.tasks.extend(started.checks);
    Ok(issuer_set)
}

impl IssuerSet {
    /// The issuers in force, by the names that profiles use.
    pub(super) fn issuers(&self) -> BTreeMap<IssuerName, Arc<dyn Issuer>> {
        self.issuers.clone()
    }

    /// The number of watches.
    #[cfg(test)]
    pub(super) fn scopes(&self) -> usize {
        self.maker.as_ref().map_or(0, |maker| maker.scopes.len())
    }

    /// Puts the issuers of `config` into force.
    ///
    /// # Errors
    ///
    /// The configuration needs a watch that the running agent cannot add, or an issuer cannot be created. Nothing has changed then.
    pub(super) fn change(&mut self, config: &Config) -> anyhow::Result<Started> {
        let mut started = Started::default();
        let Some(maker) = &mut self.maker else { anyhow::bail!("the issuers of this agent are fixed") };
        let watches = maker.scopes.len();
        maker.watch(config, &mut started)?;
        let (mut issuers, mut made) = (BTreeMap::new(), Vec::new());
        for (name, wanted) in &config.issuers {
            let known = self.made.iter().find(|(known, _)| known == wanted).map(|(_, issuer)| issuer.clone());
            let issuer = match known.map_or_else(|| maker.make(name, wanted, config, &mut started), Ok) {
                Ok(issuer) => issuer,
                Err(error) => {
                    // The new watches will not run.
                    maker.scopes.truncate(watches);
                    return Err(error);
                }
            };
            made.push((wanted.clone(), issuer.clone()));
            issuers.insert(name.clone(), issuer);
        }
        for (wanted, issuer) in made {
            if !self.made.iter().any(|(known, _)| *known == wanted) {
                self.made.push((wanted, issuer));
            }
        }
        let wanted: Vec<_> = config.issuers.values().cloned().collect();
        for gone in self.wanted.iter().filter(|known| !wanted.contains(known)).filter_map(self_vouching) {
            // Peers still hold its certificates; the agent does not know until when.
            warn!(target: LOG_TARGET, issuer = %gone, "the roots of a removed issuer stay in the bundle until a restart");
        }
        (self.issuers, self.wanted) = (issuers, wanted);
        Ok(started)
    }
}

impl IssuerFactory {
    /// Adds the watches that `config` needs and the agent does not have.
    fn watch(&mut self, config: &Config, started: &mut Started) -> anyhow::Result<()> {
        let missing: Vec<_> = scopes(config).into_iter().filter(|scope| !self.scopes.iter().any(|(have, _)| holds(have, scope))).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let Some(asked) = &self.asked else { anyhow::bail!("cert-manager needs a cluster, and the agent was started without one") };
        anyhow::ensure!(
            self.scopes.is_empty() || !missing.contains(&RequestNamespace::Workload),
            "namespace: workload needs one watch of all namespaces, and the agent already watches single ones"
        );
        for scope in missing {
            let name = match &scope {
                RequestNamespace::Fixed(namespace) => format!("the watch of requests in namespace {namespace}"),
                RequestNamespace::Workload => "the watch of requests".to_owned(),
            };
            let ClusterDeps { client, kube_metrics, metrics, agent, pods } = asked;
            let (agent, pods, clock) = (agent.clone(), pods.clone(), self.clock.clone());
            let requests = Requests::new(client.clone(), scope.clone(), agent, pods, clock, kube_metrics.clone(), metrics.clone());
            started.watches.push((name, requests.clone()));
            self.scopes.push((scope, requests));
        }
        Ok(())
    }

    fn make(&self, name: &IssuerName, wanted: &IssuerConfig, config: &Config, started: &mut Started) -> anyhow::Result<Arc<dyn Issuer>> {
        match wanted {
            IssuerConfig::Embedded => {
                let embedded = Embedded::new(config.trust_domain.as_str(), self.clock.clone())?;
                self.trust.source(None, &format!("issuer {name}")).take(embedded.bundle()?)?;
                Ok(Arc::new(embedded))
            }
            IssuerConfig::CertManager(cert_manager) => {
                let scope = self.scopes.iter().find(|(scope, _)| holds(scope, &cert_manager.namespace));
                let Some((_, requests)) = scope else { anyhow::bail!("issuer {name}: cert-manager needs a cluster") };
                Ok(Arc::new(self.ask_cert_manager(name, cert_manager, requests.clone(), started)))
            }
        }
    }

    fn ask_cert_manager(
        &self,
        name: &IssuerName,
        config: &certificate_request::Settings,
        requests: Requests,
        started: &mut Started,
    ) -> CertManager {
        let status_ca = config.trust_status_ca.then(|| self.trust.source(None, &format!("status.ca of issuer {name}")));
        let issuer = CertManager::new(requests, config.clone(), status_ca);
        // Logs early the errors that the first order would meet.
        let (check, name, last) = (issuer.preflight(), name.clone(), self.last.clone());
        started.checks.push(Box::pin(async move {
            tokio::select! {
                () = last.cancelled() => return,
                checked = check => if let Err(cause) = checked {
                    error!(target: LOG_TARGET, issuer = %name, %cause, "the check of the issuer failed; orders will retry");
                },
            }
            last.cancelled().await;
        }));
        issuer
    }
}

/// The scopes of the watches that `config` needs. No scope contains another.
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

/// The name of an issuer whose `status.ca` the agent trusts.
fn self_vouching(issuer: &IssuerConfig) -> Option<&str> {
    match issuer {
        IssuerConfig::CertManager(certificate_request::Settings { trust_status_ca: true, issuer_ref, .. }) => Some(&issuer_ref.name),
        IssuerConfig::CertManager(_) | IssuerConfig::Embedded => None,
    }
}

/// Whether a watch of `scope` sees the requests of an issuer that creates them in `namespace`.
fn holds(scope: &RequestNamespace, namespace: &RequestNamespace) -> bool {
    *scope == RequestNamespace::Workload || scope == namespace
}

/// The pod index, as the sweep of requests uses it.
#[derive(Debug)]
struct NodePods(Pods);

impl LivePods for NodePods {
    fn live(&self) -> BoxFuture<'_, Option<HashSet<Arc<str>>>> {
        Box::pin(self.0.live())
    }
}

#[cfg(test)]
mod tests;
