//! Composes the approver: probes, metrics, reload and shutdown.

use std::{fmt, sync::Arc};

use agent_runtime::{
    clock::SystemClock,
    readiness::{self, Readiness},
    shutdown::{Drained, Shutdown},
};
use approver::{Approver, Pods};
use futures::FutureExt;
use kube::Client;
use tokio::task::JoinSet;
use tracing::{error, info};

use self::reload::Reload;
use super::Base;
use crate::{
    admin,
    config::{Env, reloads},
};

mod denied_nodes;
pub mod reload;
pub mod settings;
pub mod source;

pub use settings::Settings;
pub use source::Start;

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::app::approver";

/// An approver whose addresses are bound.
pub struct BoundApprover {
    approver: Approver,
    pods: Pods,
    listeners: admin::Listeners,
    http_metrics: admin::Metrics,
    routes: admin::Routes,
    readiness: Readiness,
    shutdown: Shutdown,
    start: readiness::Guard,
    reload: Reload,
    client: Client,
    kube_metrics: agent_kube::Metrics,
}

impl fmt::Debug for BoundApprover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BoundApprover").field("reload", &self.reload).finish_non_exhaustive()
    }
}

/// Binds the addresses and creates the API client, without waiting for the API server.
pub async fn build_approver(start: Start, env: Env<'static>, base: Base) -> anyhow::Result<BoundApprover> {
    let Base { mut exposition, readiness, shutdown, start: start_guard, log, .. } = base;
    let config = start.settings.config.clone();
    let listeners = admin::Listeners::bind(config.http_addresses())?;
    let http_metrics = admin::Metrics::register(exposition.registry());
    let kube_metrics = agent_kube::Metrics::register(exposition.registry());
    let client = agent_kube::connect(&kube_metrics, approver::RATE).await?;
    let driver = config.per_pod.as_ref().map(|per_pod| per_pod.driver_name.clone());
    let pods = Pods::new(client.clone(), config.node.pod.clone(), driver, kube_metrics.clone());
    let reload = Reload::new(start, env, reloads::Metrics::register(exposition.registry()));
    let approver = Approver::new(approver::Parts {
        client: client.clone(),
        active_rules: reload.active_rules(),
        pods: pods.clone(),
        clock: Arc::new(SystemClock),
        instance: config.node.pod.as_ref().map_or_else(|| "sds-agent-approver".to_owned(), |pod| pod.name.to_string()),
        kube_metrics: kube_metrics.clone(),
        metrics: approver::Metrics::register(exposition.registry()),
    });
    let routes = admin::Routes::new(readiness.clone(), Arc::new(exposition)).with_log(log.map(admin::LogLevel::new));
    Ok(BoundApprover {
        approver,
        pods,
        listeners,
        http_metrics,
        routes,
        readiness,
        shutdown,
        start: start_guard,
        reload,
        client,
        kube_metrics,
    })
}

impl BoundApprover {
    /// Decides until the shutdown begins. It does not wait for a decision that is being written: another replica, or the next start of
    /// this one, reads the request again.
    ///
    /// # Errors
    ///
    /// A task of the approver failed, and its failure began the shutdown.
    pub async fn run(self) -> anyhow::Result<Drained> {
        let Self { approver, pods, listeners, http_metrics, routes, readiness, shutdown, start, reload, client, kube_metrics } = self;
        for (name, mut synced) in [("the watch of pods", pods.synced()), ("the watch of requests", approver.synced())] {
            let guard = readiness.guard(name);
            tokio::spawn(async move {
                match synced.wait_for(|synced| *synced).await {
                    Ok(_) => drop(guard),
                    Err(_) => guard.abandon(),
                }
            });
        }
        info!(target: LOG_TARGET, "approving");
        listeners.serve(&routes, &http_metrics, &shutdown);
        drop(start);
        tokio::spawn(async move {
            readiness.reached().await;
            info!(target: LOG_TARGET, "ready");
        });

        let mut parts = JoinSet::new();
        parts.spawn(async move { pods.run().await }.map(|()| "the watch of pods"));
        parts.spawn(approver.run().map(|()| "the approver"));
        parts.spawn(reload.run(client, kube_metrics).map(|()| "the watch of the configuration"));
        let failed = tokio::select! {
            biased;
            () = shutdown.drain.cancelled() => None,
            Some(ended) = parts.join_next() => Some(ended.map_or_else(|error| error.to_string(), |part| format!("{part} has ended"))),
        };
        if let Some(cause) = &failed {
            error!(target: LOG_TARGET, cause, "a task of the approver has failed; shutting down for a restart");
            shutdown.begin();
        }
        parts.shutdown().await;
        let drained = shutdown.drained().await;
        info!(target: LOG_TARGET, "stopped");
        match failed {
            None => Ok(drained),
            Some(cause) => Err(anyhow::anyhow!("a task of the approver has failed: {cause}")),
        }
    }
}
