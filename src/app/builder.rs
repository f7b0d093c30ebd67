//! The builder of an agent: the configuration, and all that its parts share.

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
}

/// Owns the shared parts while an agent is built, and collects its tasks.
pub(super) struct Builder<'a> {
    pub(super) config: &'a Config,
    pub(super) base: &'a mut Base,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) trust: Trust,
    /// Cancelled when streams have ended: tasks that serve them run until then.
    pub(super) last: CancellationToken,
    pub(super) tasks: Vec<BoxFuture<'static, ()>>,
}

impl<'a> Builder<'a> {
    /// By the system's clock, with nothing to run yet.
    pub(super) fn new(config: &'a Config, base: &'a mut Base) -> Self {
        let trust = Trust::new(trust::Metrics::register(base.exposition.registry()));
        Self { config, base, clock: Arc::new(SystemClock), trust, last: CancellationToken::new(), tasks: Vec::new() }
    }

    /// Runs `running` with the agent, and holds readiness back until `come`.
    pub(super) fn run_guarded(
        &mut self,
        name: &str,
        come: impl Future<Output = ()> + Send + 'static,
        running: impl Future<Output = ()> + Send + 'static,
    ) {
        self.tasks.push(guarded(&self.base.readiness, name, come, running));
    }
}

/// A task that runs `running`, and holds readiness back until `come` is done. It ends with `running`.
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
            // An agent does not become ready because a part has ended.
            () = &mut running => return guard.abandon(),
        }
        running.await;
    })
}
