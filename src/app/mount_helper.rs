//! Composes the mount helper: the CSI driver, probes, metrics and shutdown.

use std::sync::Arc;

use agent_runtime::{
    readiness::{self, Readiness},
    shutdown::{Drained, Shutdown},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::Base;
use crate::{admin, config::Config, csi, per_pod::PerPod};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::app::mount_helper";

/// A mount helper whose sockets are open.
#[derive(Debug)]
pub struct BoundMountHelper {
    driver: csi::Driver,
    listeners: admin::Listeners,
    http_metrics: admin::Metrics,
    routes: admin::Routes,
    readiness: Readiness,
    shutdown: Shutdown,
    start: readiness::Guard,
}

/// Opens the sockets of the mount helper that `config` describes. `per_pod` is its section `sockets.perPod`.
///
/// # Errors
///
/// A socket or an address cannot be bound.
pub fn build_mount_helper(config: &Config, per_pod: PerPod, base: Base) -> anyhow::Result<BoundMountHelper> {
    let Base { mut exposition, readiness, shutdown, start, .. } = base;
    let listeners = admin::Listeners::of_mount_helper(&config.mount_helper)?;
    let registry = exposition.registry();
    let http_metrics = admin::Metrics::register(registry);
    let metrics = csi::metrics::Metrics::register(registry);
    let node = config.node.node_name.clone().unwrap_or_default();
    let registration = readiness.guard("the registration with the kubelet");
    let driver = csi::Driver::bind(csi::Parts { config: per_pod, node, metrics, registration })?;
    let routes = admin::Routes::new(readiness.clone(), Arc::new(exposition));
    Ok(BoundMountHelper { driver, listeners, http_metrics, routes, readiness, shutdown, start })
}

impl BoundMountHelper {
    /// Serves the kubelet until the shutdown begins.
    ///
    /// # Errors
    ///
    /// The driver failed, and its failure began the shutdown.
    pub async fn run(self) -> anyhow::Result<Drained> {
        let Self { driver, listeners, http_metrics, routes, readiness, shutdown, start } = self;
        listeners.serve(&routes, &http_metrics, &shutdown);
        drop(start);
        tokio::spawn(async move {
            readiness.reached().await;
            info!(target: LOG_TARGET, "ready");
        });
        let last = CancellationToken::new();
        let mut driver = tokio::spawn(driver.run(last.clone()));
        let failed = tokio::select! {
            biased;
            () = shutdown.drain.cancelled() => None,
            ended = &mut driver => Some(ended.err().map_or_else(|| "it ended".to_owned(), |error| error.to_string())),
        };
        if let Some(cause) = &failed {
            error!(target: LOG_TARGET, cause, "the driver has failed; shutting down for a restart");
            shutdown.begin();
        } else {
            last.cancel();
            let _ = driver.await;
        }
        let drained = shutdown.drained().await;
        info!(target: LOG_TARGET, "stopped");
        match failed {
            None => Ok(drained),
            Some(cause) => Err(anyhow::anyhow!("the driver has failed: {cause}")),
        }
    }
}
