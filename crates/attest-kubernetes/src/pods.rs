//! This node's pods by UID: one watch, a few facts of each pod, and a token that is cancelled when the pod has ended.
//!
//! The caller runs [`Pods::run`] for as long as the agent lives. A lookup waits for a pod that is not known yet; it does not poll. A UID
//! that the complete index does not know costs one live read, a quorum list. All waiting lookups share it, and there is at most one per
//! second. For the next 30 s the same UID costs no further read: containers outlive their pods and retry without end. Known pods that a new
//! list lacks are confirmed by a live read before any stream ends.

use std::{collections::HashSet, fmt, sync::Arc, time::Duration};

use agent_kube::{
    self, Call, Failure,
    labels::Resource,
    pod::PodObject,
    watch::{Selection, Signal},
};
use futures::StreamExt;
use kube::{Api, Client, api::ListParams, runtime::watcher};
use parking_lot::{Mutex, MutexGuard};
use sds_server::attest::{Error, Reason};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use workload_identity::{Account, Workload};

mod index;

use index::Index;
pub use index::{Known, Starting};

/// Target of this module's log lines.
const LOG_TARGET: &str = "sds_agent::attest::pods";

/// Minimum interval between live reads.
const LIVE_READ_INTERVAL: Duration = Duration::from_secs(1);
/// Time for which a UID that a live read did not find counts as unknown. A pod is in the API before its containers run on the node, so such
/// a pod does not exist, or it is a static pod whose mirror pod is late. The watch reports the latter.
const UNKNOWN_FOR: Duration = Duration::from_secs(30);
/// Pause after a failed live read, while pods wait to be confirmed.
const LIVE_READ_RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// Maximum wait for a container's status, which the kubelet reports some time after the start of the container.
const CONTAINER_TIMEOUT: Duration = Duration::from_secs(30);

/// The node's pods. Clones share one index.
#[derive(Clone)]
pub struct Pods(Arc<Shared>);

struct Shared {
    api: Api<PodObject>,
    node: String,
    metrics: agent_kube::Metrics,
    index: Mutex<Index>,
    changed: watch::Sender<()>,
    pod_terminations: watch::Sender<u64>,
    synced: watch::Sender<bool>,
    /// Number of live reads that were requested.
    asked: watch::Sender<u64>,
    /// Number of the last request that a live read has answered, and the result of that read.
    answered: watch::Sender<(u64, Result<(), Arc<str>>)>,
}

impl fmt::Debug for Pods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pods").field("node", &self.0.node).finish_non_exhaustive()
    }
}

impl Pods {
    /// Creates the index of the pods on `node`. It stays empty until [`run`](Self::run) is called.
    pub fn new(client: Client, node: &str, metrics: agent_kube::Metrics) -> Self {
        Self(Arc::new(Shared {
            api: Api::all(client),
            node: node.to_owned(),
            metrics,
            index: Mutex::default(),
            changed: watch::Sender::new(()),
            pod_terminations: watch::Sender::new(0),
            synced: watch::Sender::new(false),
            asked: watch::Sender::new(0),
            answered: watch::Sender::new((0, Ok(()))),
        }))
    }

    /// Keeps the containers of each pod too. Call it before [`run`](Self::run).
    pub fn with_containers(self) -> Self {
        self.index().keeps_containers = true;
        self
    }

    /// Keeps the profiles that pods pick by volumes of this CSI driver. Call it before [`run`](Self::run).
    pub fn with_picks_by(self, driver: &str) -> Self {
        self.index().driver = Some(driver.to_owned());
        self
    }

    /// Returns a receiver of the pods that are first seen before any of their containers has started, each once, whether the watch or a
    /// live read reports them. There is one receiver: call it once, before [`run`](Self::run).
    pub fn starts(&self) -> mpsc::UnboundedReceiver<Starting> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.index().starts = Some(sender);
        receiver
    }

    /// Runs the watch and the live reads until `shutdown`.
    ///
    /// # Cancel safety
    ///
    /// A dropped future stops the updates, and the index keeps its content. Lookups that need an update then wait until `run` is called
    /// again.
    pub async fn run(&self, shutdown: CancellationToken) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.watch() => {}
            () = self.read_live() => {}
        }
    }

    /// Becomes true when the index is complete for the first time, and stays true.
    pub fn synced(&self) -> watch::Receiver<bool> {
        self.0.synced.subscribe()
    }

    /// Returns the pod with this UID. Waits while the index is not complete, then for at most one live read.
    ///
    /// # Errors
    ///
    /// [`Reason::pod_ended`], not temporary, if the pod has ended or was deleted. Temporary: [`Reason::unknown_pod`] if the API server
    /// knows no such pod on this node, [`Reason::unreadable`] if the live read fails.
    ///
    /// # Cancel safety
    ///
    /// A dropped future only stops waiting. A live read that it has requested is still made, and updates the index.
    pub async fn wait_for(&self, uid: &str) -> Result<Known, Error> {
        let mut arrival = match self.look(uid) {
            Ok(known) => return serveable(known),
            // Containers may outlive their pod and retry without end, and a live read would not find the pod.
            Err(_) if self.index().has_gone(uid) => return Err(deleted(uid)),
            Err(arrival) => arrival,
        };
        let was_unknown = self.index().is_unknown(uid, Instant::now());
        if was_unknown {
            // No live read is made. The watch has as long to report the pod as a live read would have taken.
            return match timeout(LIVE_READ_INTERVAL, &mut arrival).await {
                Ok(_) => self.arrived(uid),
                Err(_) => Err(self.unknown(uid)),
            };
        }
        let mut synced = self.synced();
        tokio::select! {
            biased;
            _ = &mut arrival => return self.arrived(uid),
            _ = synced.wait_for(|synced| *synced) => {}
        }
        let read = tokio::select! {
            biased;
            _ = &mut arrival => return self.arrived(uid),
            read = self.ask() => read,
        };
        drop(arrival);
        match (self.look(uid), read) {
            (Ok(known), _) => serveable(known),
            (Err(_), Ok(())) => {
                self.index().note_unknown(uid, Instant::now() + UNKNOWN_FOR);
                Err(self.unknown(uid))
            }
            (Err(_), Err(why)) => Err(Error::temporary(Reason::unreadable, format!("cannot look for the pod with UID {uid}: {why}"))),
        }
    }

    fn unknown(&self, uid: &str) -> Error {
        let detail = format!("the API server knows no pod with UID {uid} on node {}", self.0.node);
        Error::temporary(Reason::unknown_pod, detail)
    }

    /// Returns the name of the container with this id in the pod with this UID. Waits up to 30 s for the kubelet to report it.
    ///
    /// # Errors
    ///
    /// [`Reason::pod_ended`], not temporary, if the pod has ended or was deleted. [`Reason::unknown_container`], temporary, if the pod's
    /// status does not contain the container in time.
    ///
    /// # Cancel safety
    ///
    /// A dropped future only stops waiting.
    pub async fn wait_for_container(&self, uid: &str, id: &str) -> Result<Arc<str>, Error> {
        let mut changed = self.0.changed.subscribe();
        let told = async {
            loop {
                changed.borrow_and_update();
                let known = serveable(self.arrived(uid)?)?;
                if let Some(name) = known.pod.container(id) {
                    return Ok(name);
                }
                if changed.changed().await.is_err() {
                    return Err(Error::temporary(Reason::unknown_container, "the agent is ending"));
                }
            }
        };
        timeout(CONTAINER_TIMEOUT, told).await.unwrap_or_else(|_| {
            let detail = format!("the status of the pod with UID {uid} contains no container {id}");
            Err(Error::temporary(Reason::unknown_container, detail))
        })
    }

    /// Returns the service account of the pod with this UID, also of a pod that has ended or was deleted. `None` if it has none: a static
    /// pod. Waits like [`wait_for`](Self::wait_for).
    ///
    /// # Errors
    ///
    /// Temporary: [`Reason::unknown_pod`] if neither the index nor the API server knows the pod, [`Reason::unreadable`] if the live read
    /// fails.
    ///
    /// # Cancel safety
    ///
    /// Like [`wait_for`](Self::wait_for).
    pub async fn account(&self, uid: &str) -> Result<Option<Account>, Error> {
        // The sender lives in `self`, so the wait does not fail.
        let _ = self.synced().wait_for(|synced| *synced).await;
        let waited = self.wait_for(uid).await;
        let account = self.index().account(uid);
        match (account, waited) {
            (Some(account), _) => Ok(account),
            (None, Ok(known)) => Ok(known.pod.workload().account()),
            (None, Err(error)) => Err(error),
        }
    }

    /// Returns the known workloads of the node's pods that have not ended, on all their sockets.
    pub fn workloads(&self) -> Vec<Workload> {
        self.index().workloads()
    }

    /// Number of pods that have ended so far; the receiver is notified of each increase.
    pub fn pod_terminations(&self) -> watch::Receiver<u64> {
        self.0.pod_terminations.subscribe()
    }

    /// Returns the UIDs of the node's pods that have not ended, confirmed by a live read that begins after this call; `None` if that read
    /// fails.
    ///
    /// # Cancel safety
    ///
    /// A dropped future only stops waiting.
    pub async fn live(&self) -> Option<HashSet<Arc<str>>> {
        self.ask().await.ok()?;
        Some(self.index().live())
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.0.index.lock()
    }

    /// Returns the pod if it is known, or a signal for its arrival.
    fn look(&self, uid: &str) -> Result<Known, oneshot::Receiver<()>> {
        let mut index = self.index();
        index.get(uid).ok_or_else(|| index.await_arrival(uid))
    }

    fn arrived(&self, uid: &str) -> Result<Known, Error> {
        match self.index().get(uid) {
            Some(known) => serveable(known),
            // The pod was added and deleted again.
            None => Err(deleted(uid)),
        }
    }

    /// Waits for a live read that begins after this call.
    async fn ask(&self) -> Result<(), Arc<str>> {
        let mut mine = 0;
        let mut answered = self.0.answered.subscribe();
        self.0.asked.send_modify(|asked| {
            *asked += 1;
            mine = *asked;
        });
        match answered.wait_for(|(upto, _)| *upto >= mine).await {
            Ok(answer) => answer.1.clone(),
            Err(_) => Err("the agent is ending".into()),
        }
    }

    async fn watch(&self) {
        let fields = format!("spec.nodeName={}", self.0.node);
        // The list comes from the API server's cache, so that thousands of agents that start at once do not make it read all pods from
        // storage. Such a list may be stale, so pods that it lacks are confirmed before they count as deleted. A limit would turn the list
        // into a read from storage again.
        let config = watcher::Config { page_size: None, ..watcher::Config::default().fields(&fields).any_semantic() };
        let selection = Selection { resource: Resource::pods, name: "pods".to_owned(), namespace: None, config };
        let mut signals = Box::pin(agent_kube::watch::watch(self.0.api.clone(), selection, self.0.metrics.clone()));
        while let Some(signal) = signals.next().await {
            match signal {
                Signal::Event(watcher::Event::Init) => self.index().list_begins(),
                Signal::Event(watcher::Event::InitApply(pod)) => self.index().listed(&pod),
                Signal::Event(watcher::Event::InitDone) => {
                    let missing = self.index().list_ends();
                    if missing > 0 {
                        tracing::info!(target: LOG_TARGET, pods = missing, "a new list lacks pods; confirming with a live read");
                        self.0.asked.send_modify(|asked| *asked += 1);
                    }
                    if !self.0.synced.send_replace(true) {
                        tracing::info!(target: LOG_TARGET, pods = self.index().len(), node = self.0.node, "the index of this node's pods is complete");
                    }
                }
                Signal::Event(watcher::Event::Apply(pod)) => self.index().applied(&pod),
                Signal::Event(watcher::Event::Delete(pod)) => self.index().deleted(&pod),
                Signal::Trouble(..) => {}
            }
            self.announce();
        }
    }

    /// Notifies the receivers of changes.
    fn announce(&self) {
        let now = self.index().pod_terminations;
        self.0.pod_terminations.send_if_modified(|pod_terminations| std::mem::replace(pod_terminations, now) != now);
        self.0.changed.send_replace(());
    }

    /// Makes live reads, quorum lists, each of which answers all requests so far.
    async fn read_live(&self) {
        let mut asked = self.0.asked.subscribe();
        let parameters = ListParams::default().fields(&format!("spec.nodeName={}", self.0.node));
        let call = Call { verb: "list", resource: "pods", name: None, namespace: None };
        while asked.wait_for(|asked| *asked > self.0.answered.borrow().0).await.is_ok() {
            let upto = *asked.borrow_and_update();
            let doubts = self.index().doubts();
            let answer = match self.0.api.list(&parameters).await {
                Ok(list) => {
                    self.index().confirmed(&list.items, &doubts);
                    self.announce();
                    Ok(())
                }
                Err(error) => Err(Failure::of(&error, &call).message.into()),
            };
            let failed = answer.is_err();
            self.0.answered.send_modify(|answered| *answered = (upto, answer));
            if failed && !doubts.is_empty() {
                tokio::time::sleep(LIVE_READ_RETRY_INTERVAL).await;
                self.0.asked.send_modify(|asked| *asked += 1);
            } else {
                tokio::time::sleep(LIVE_READ_INTERVAL).await;
            }
        }
    }
}

fn deleted(uid: &str) -> Error {
    Error::refused(Reason::pod_ended, format!("the pod with UID {uid} was deleted"))
}

fn serveable(known: Known) -> Result<Known, Error> {
    if known.pod.ended {
        return Err(Error::refused(Reason::pod_ended, format!("pod {} has ended", known.pod.pod)));
    }
    Ok(known)
}

#[cfg(test)]
mod tests;
