//! Selects pods that start on this node and will call the shared socket, and holds a lease for each.
//!
//! A pod is selected if its containers have not started, regardless of how the agent learned of it: a list, after a restart of the agent or
//! of the watch, contains starting pods and running pods. The caller runs [`Starts::run`] until the agent drains.

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

/// Maximum of certificates that are issued at once for pods that have not called. It is half of rotation's limit, so that on a booting
/// node these orders do not delay a caller.
pub const MAX_CONCURRENT: usize = 4;

/// Selects the pods that are warmed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    labels: BTreeMap<String, String>,
    /// The directory of the shared socket, if a mount of it selects a pod.
    directory: Option<PathBuf>,
}

impl Rule {
    /// The rule of `warm_up` for callers of the socket at `socket`.
    pub fn new(warm_up: &WarmUp, socket: &Path) -> Self {
        let directory = socket.parent().filter(|_| warm_up.socket_mount).map(Path::to_owned);
        Self { labels: warm_up.pod_labels.clone(), directory }
    }

    /// Whether the rule selects `pod`, which mounts `host_paths`.
    fn takes(&self, pod: &Pod, host_paths: &[String]) -> bool {
        let mounts = || {
            let directory = self.directory.as_deref()?;
            host_paths.iter().find(|path| reaches(Path::new(path), directory))
        };
        let carries = || !self.labels.is_empty() && self.labels.iter().all(|(key, value)| pod.labels.get(key) == Some(value.as_str()));
        pod.service_account.is_some() && !pod.ended && (carries() || mounts().is_some())
    }
}

/// Whether a mount of the node's `path` contains `directory` or a part of it. A mount of `/` does not count: it is not for the socket.
fn reaches(path: &Path, directory: &Path) -> bool {
    let (path, directory) = (plain(path), plain(directory));
    path.parent().is_some() && (path.starts_with(&directory) || directory.starts_with(&path))
}

/// Normalises a path of the node. `/var/run` becomes `/run`, because it is a link to it on nodes.
fn plain(path: &Path) -> PathBuf {
    match path.strip_prefix("/var/run") {
        Ok(rest) => Path::new("/run").join(rest).components().collect(),
        Err(_) => path.components().collect(),
    }
}

/// Holds leases for the starting pods that the rule selects.
#[derive(Debug)]
pub struct Starts {
    warmer: Prefetcher,
    rule: Rule,
    clock: Arc<dyn Clock>,
    told: mpsc::UnboundedReceiver<Starting>,
    turns: Arc<Semaphore>,
}

impl Starts {
    /// Subscribes to the starting pods of `pods`. Call it before `pods` run.
    pub fn new(warmer: Prefetcher, rule: Rule, clock: Arc<dyn Clock>, pods: &Pods) -> Self {
        Self { warmer, rule, clock, told: pods.starts(), turns: Arc::new(Semaphore::new(MAX_CONCURRENT)) }
    }

    /// Holds leases until `drain` is cancelled, and then drops them.
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
                // The pod index has ended, so no more pods are reported.
                None => return drain.cancelled().await,
            }
        }
    }

    fn begin(&self, held: &mut JoinSet<()>, starting: Starting) {
        let Starting { known, host_paths, since } = starting;
        let waited = since.map_or_else(Default::default, |since| self.clock.now().duration_since(since).unwrap_or_default());
        let patience = FIRST_CALL_TIMEOUT.saturating_sub(waited);
        // The time limit counts from the pod's start, so that restarts of the agent do not warm up a stuck pod again and again.
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
