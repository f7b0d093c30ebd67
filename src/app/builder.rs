//! What the parts of an agent are made with: the configuration, and what they share.

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

/// What of the cluster several parts share.
pub(super) struct Cluster {
    pub(super) client: kube::Client,
    pub(super) metrics: agent_kube::Metrics,
    pub(super) pods: Option<Pods>,
}

/// Owns what is shared while the parts are made, and collects what is to run.
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
