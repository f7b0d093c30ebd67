//! The builder of an agent: the configuration and the dependencies that its parts share.

use std::{future::Future, pin::pin, sync::Arc};

use agent_runtime::{
    clock::{Clock, SystemClock},
    readiness::Readiness,
};
use attest_kubernetes::pods::Pods;
use futures::future::BoxFuture;
use sds_server::trust::{self, Trust};
use tokio_util::sync::CancellationToken;

use super::Base;
use crate::config::Config;

/// The access to the cluster that several parts share.
pub(super) struct Cluster {
    pub(super) client: kube::Client,
    pub(super) metrics: agent_kube::Metrics,
    pub(super) pods: Option<Pods>,
    /// UID of the node, if the agent's token names it.
    pub(super) node_uid: Option<String>,
}

/// Owns the shared parts while an agent is built, and collects its tasks.
pub(super) struct Builder<'a> {
    pub(super) config: &'a Config,
    pub(super) base: &'a mut Base,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) trust: Trust,
    /// Cancelled when the streams have ended; tasks that serve streams run until then.
    pub(super) last: CancellationToken,
    pub(super) tasks: Vec<BoxFuture<'static, ()>>,
}

impl<'a> Builder<'a> {
    /// Creates a builder with the system's clock and no tasks.
    pub(super) fn new(config: &'a Config, base: &'a mut Base) -> Self {
        let trust = Trust::new(trust::Metrics::register(base.exposition.registry()));
        Self { config, base, clock: Arc::new(SystemClock), trust, last: CancellationToken::new(), tasks: Vec::new() }
    }

    /// Adds `running` to the agent's tasks. The agent is not ready before `come` completes.
    pub(super) fn run_guarded(
        &mut self,
        name: &str,
        come: impl Future<Output = ()> + Send + 'static,
        running: impl Future<Output = ()> + Send + 'static,
    ) {
        self.tasks.push(guarded(&self.base.readiness, name, come, running));
    }
}

/// Returns a task that runs `running` to its end. The agent is not ready before `come` completes.
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
            // The end of `running` does not make the agent ready.
            () = &mut running => return guard.abandon(),
        }
        running.await;
    })
}
