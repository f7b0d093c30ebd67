//! Pods that start on this node and will call the shared socket: who they are, and a lease for each.
//!
//! What counts is whether a pod has begun, not how it became known: a list after a restart of the agent, or after a watch that broke, holds
//! pods that start beside those that run. The caller runs [`Starts::run`] until the agent drains.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use agent_kube::pod::Pod;
use agent_runtime::clock::Clock;
use attest_kubernetes::pods::{Pods, Starting};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::{FIRST_CALL_TIMEOUT, Prefetch, Prefetcher};
use crate::warm::WarmUp;

/// Certificates that are made ahead of calls at once: half of what rotation makes at once, so that on a node that boots nobody who has
/// called stands behind all those who have not.
pub const MAX_CONCURRENT: usize = 4;

/// Who is warmed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    labels: BTreeMap<String, String>,
    /// The shared socket's directory, where mounting it counts.
    directory: Option<PathBuf>,
}

impl Rule {
    /// What `warm_up` says about callers of the socket at `socket`.
    pub fn new(warm_up: &WarmUp, socket: &Path) -> Self {
        let directory = socket.parent().filter(|_| warm_up.socket_mount).map(Path::to_owned);
        Self { labels: warm_up.pod_labels.clone(), directory }
    }

    /// Whether `pod`, which mounts `host_paths`, will call.
    fn takes(&self, pod: &Pod, host_paths: &[String]) -> bool {
        let mounts = || {
            let directory = self.directory.as_deref()?;
            host_paths.iter().find(|path| reaches(Path::new(path), directory))
        };
        let carries = || !self.labels.is_empty() && self.labels.iter().all(|(key, value)| pod.labels.get(key) == Some(value));
        pod.service_account.is_some() && !pod.ended && (carries() || mounts().is_some())
    }
}

/// Whether who mounts `path` of the node finds `directory`, or something in it, there. Who mounts the whole node is not after the socket.
fn reaches(path: &Path, directory: &Path) -> bool {
    let (path, directory) = (plain(path), plain(directory));
    path.parent().is_some() && (path.starts_with(&directory) || directory.starts_with(&path))
}

/// The same path, as nodes name it: `/var/run` is a link to `/run` on all of them.
fn plain(path: &Path) -> PathBuf {
    match path.strip_prefix("/var/run") {
        Ok(rest) => Path::new("/run").join(rest).components().collect(),
        Err(_) => path.components().collect(),
    }
}

/// See the module.
#[derive(Debug)]
pub struct Starts {
    warmer: Prefetcher,
    rule: Rule,
    clock: Arc<dyn Clock>,
    told: mpsc::UnboundedReceiver<Starting>,
    turns: Arc<Semaphore>,
}

impl Starts {
    /// Of those of `pods` whom `rule` takes. To be made before `pods` run.
    pub fn new(warmer: Prefetcher, rule: Rule, clock: Arc<dyn Clock>, pods: &Pods) -> Self {
        Self { warmer, rule, clock, told: pods.starts(), turns: Arc::new(Semaphore::new(MAX_CONCURRENT)) }
    }

    /// Warms them up until `drain`, and then nobody any more.
    pub async fn run(mut self, drain: CancellationToken) {
        let mut held = JoinSet::new();
        loop {
            let starting = tokio::select! {
                () = drain.cancelled() => return,
                Some(_) = held.join_next() => continue,
                starting = self.told.recv() => starting,
            };
            match starting {
                Some(starting) => self.begin(&mut held, starting),
                // The index is gone, and with it all that could be told.
                None => return drain.cancelled().await,
            }
        }
    }

    fn begin(&self, held: &mut JoinSet<()>, starting: Starting) {
        let Starting { known, host_paths, since } = starting;
        let waited = since.map_or_else(Default::default, |since| self.clock.now().duration_since(since).unwrap_or_default());
        let patience = FIRST_CALL_TIMEOUT.saturating_sub(waited);
        // A pod that cannot start is not warmed up again by each start of the agent.
        if patience.is_zero() || !self.rule.takes(&known.pod, &host_paths) {
            return;
        }
        let (warmer, turns) = (self.warmer.clone(), self.turns.clone());
        held.spawn(async move {
            let (workload, nobody) = (known.pod.workload(), CancellationToken::new());
            let whom = Prefetch { workload: &workload, first_call: &known.first_call, terminated: &known.terminated, patience };
            warmer.hold(&whom, &turns, &nobody).await;
        });
    }
}

#[cfg(test)]
mod tests;
