//! State that all orders of the agent share: the watch, the deleter and the sweep.
//!
//! The caller runs [`Requests::run`] once, from start to shutdown, and for some time after the orders have ended. After its token is
//! cancelled, it deletes the last requests and returns within 5 s.

use std::{
    collections::HashSet,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use agent_kube::{
    self, Call, Cause,
    labels::Resource,
    watch::{Selection, Signal},
};
use agent_runtime::clock::{self, Clock};
use cert_manager::{REQUESTS_PER_PAGE, RequestNamespace, naming::Agent};
use futures::{StreamExt, future::BoxFuture};
use kube::{Api, Client, api::ListParams, runtime::watcher};
use parking_lot::Mutex;
use prometheus_client::{metrics::counter::Counter, registry::Registry};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::issuer::{
    Error, Retry,
    certificate_request::{
        RESOURCE,
        create::jittered,
        deleter::Deleter,
        sweep,
        tracker::{self, Deletion, Key, Record, RequestTracker, Watched, Watching},
    },
};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::issuer::cert_manager::requests";

/// Interval between sweeps, before jitter.
const SWEEP_EVERY: Duration = Duration::from_secs(600);
/// Interval until the next sweep if the pods could not be read, before jitter.
const SWEEP_RETRY_INTERVAL: Duration = Duration::from_secs(30);
/// Time for which an order waits for the watch. After it, the order fails with the error of the watch.
const WATCH_TIMEOUT: Duration = Duration::from_secs(10);

/// Lists the running pods of the node. The sweep uses it.
pub trait LivePods: fmt::Debug + Send + Sync + 'static {
    /// Returns the UIDs of the node's pods that have not ended, read from the API server after this call. `None` if they cannot be read.
    fn live(&self) -> BoxFuture<'_, Option<HashSet<Arc<str>>>>;
}

/// Metrics of the requests.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    orphans: Counter,
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "orphaned_requests_deleted",
            "CertificateRequests of agents that no longer run, deleted by the sweep",
            metrics.orphans.clone(),
        );
        metrics
    }

    /// Registers all metrics with a sample, for the reference of metrics.
    #[cfg(any(test, feature = "testing"))]
    pub fn sample(registry: &mut Registry) {
        Self::register(registry);
    }

    /// Number of deleted orphans, for tests.
    #[cfg(any(test, feature = "testing"))]
    pub fn orphans(&self) -> u64 {
        self.orphans.get()
    }
}

/// The requests of one agent in one scope. Clones share all state.
#[derive(Clone)]
pub struct Requests(Arc<Shared>);

struct Shared {
    client: Client,
    scope: RequestNamespace,
    agent: Arc<Agent>,
    pods: Option<Arc<dyn LivePods>>,
    clock: Arc<dyn Clock>,
    tracker: Arc<RequestTracker>,
    /// Notified when the UID of the node has changed.
    node_changed: watch::Sender<()>,
    queue: Mutex<Option<mpsc::UnboundedReceiver<Deletion>>>,
    kube_metrics: agent_kube::Metrics,
    metrics: Metrics,
}

impl fmt::Debug for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Requests").field("scope", &self.0.scope).field("agent", &self.0.agent).finish_non_exhaustive()
    }
}

impl Requests {
    /// Creates the requests of `agent` in `scope`. Issuers with the same scope share one value. The scopes of an agent must not overlap,
    /// because each value deletes those of the agent's requests that its own orders do not know. Without `pods`, the sweep deletes no
    /// requests of other pods.
    pub fn new(
        client: Client,
        scope: RequestNamespace,
        agent: Arc<Agent>,
        pods: Option<Arc<dyn LivePods>>,
        clock: Arc<dyn Clock>,
        kube_metrics: agent_kube::Metrics,
        metrics: Metrics,
    ) -> Self {
        let (deletions, queue) = mpsc::unbounded_channel();
        let tracker = Arc::new(RequestTracker::new(agent.instance.clone(), deletions));
        let queue = Mutex::new(Some(queue));
        let node_changed = watch::Sender::new(());
        Self(Arc::new(Shared { client, scope, agent, pods, clock, tracker, node_changed, queue, kube_metrics, metrics }))
    }

    /// The time of the clock that all orders share.
    pub(super) fn now(&self) -> SystemTime {
        self.0.clock.now()
    }

    /// Watches, deletes and sweeps requests until `shutdown`. Then deletes the last requests, for at most 5 s. Call it once: a second call
    /// logs an error and returns.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses the queue of deletions. The sweep of the next agent process deletes the requests that are left.
    pub async fn run(&self, shutdown: CancellationToken) {
        let taken = self.0.queue.lock().take();
        let Some(queue) = taken else {
            tracing::error!(target: LOG_TARGET, "the requests are run twice; the second run does nothing");
            return;
        };
        let mut deleter = Deleter::new(self.0.client.clone(), self.tracker().clone(), queue, self.0.metrics.orphans.clone());
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.watch() => {}
            () = self.sweep() => {}
            () = self.tracker().expire_kept() => {}
            () = deleter.work() => {}
        }
        deleter.finish().await;
    }

    /// Returns when the watch runs, after its first complete list. Cancel safe.
    pub async fn synced(&self) {
        let mut watching = self.tracker().watching();
        let _ = watching.wait_for(|w| *w == Watching::Running).await;
    }

    /// Waits until the watch runs. Without the watch, an order could not see the answer to its request.
    pub(super) async fn ready(&self) -> Result<(), Error> {
        let mut watching = self.tracker().watching();
        if timeout(WATCH_TIMEOUT, watching.wait_for(|w| *w == Watching::Running)).await.is_ok() {
            return Ok(());
        }
        let call = Call { verb: "watch", resource: RESOURCE, name: None, namespace: self.namespace() };
        Err(match &*watching.borrow() {
            Watching::Trouble(why) => Error::Api { action: call.to_string(), message: why.to_string(), retry: Retry::Backoff },
            _ => Error::Timeout { action: call.to_string(), after: WATCH_TIMEOUT },
        })
    }

    /// Reads the agent's token again after a policy has rejected a request: a Node that was recreated under its name has another UID, and the policy
    /// compares it with that in the request's label.
    pub(super) async fn check_node(&self) {
        let Some(before) = self.0.agent.node_uid() else { return };
        if let Some(now) = agent_kube::token::node_uid().await
            && self.node_is(&now)
        {
            tracing::warn!(target: LOG_TARGET, before, now, "the node was recreated and has another UID; watching its requests again");
        }
    }

    /// Sets the UID of the node, and restarts the watch if it has changed. Returns whether it has.
    pub(super) fn node_is(&self, uid: &str) -> bool {
        let has_changed = self.0.agent.set_node_uid(uid);
        if has_changed {
            self.0.node_changed.send_replace(());
        }
        has_changed
    }

    pub(super) fn client(&self) -> &Client {
        &self.0.client
    }

    pub(super) fn agent(&self) -> &Agent {
        &self.0.agent
    }

    pub(super) fn tracker(&self) -> &Arc<RequestTracker> {
        &self.0.tracker
    }

    fn namespace(&self) -> Option<&str> {
        match &self.0.scope {
            RequestNamespace::Fixed(namespace) => Some(namespace),
            RequestNamespace::Workload => None,
        }
    }

    fn api(&self) -> Api<Watched> {
        match self.namespace() {
            Some(namespace) => Api::namespaced(self.0.client.clone(), namespace),
            None => Api::all(self.0.client.clone()),
        }
    }

    /// Lists the requests that agents of the previous version made on this node: the watch does not select them. Returns `None` if they
    /// cannot be listed.
    async fn former(&self) -> Option<Vec<(Key, Record)>> {
        let Some(selector) = self.0.agent.former_selector() else { return Some(Vec::new()) };
        let parameters = ListParams::default().labels(&selector).limit(REQUESTS_PER_PAGE);
        let list = self.api().list(&parameters).await.ok()?;
        Some(list.items.iter().filter_map(tracker::record).collect())
    }

    async fn watch(&self) {
        let mut node_changed = self.0.node_changed.subscribe();
        loop {
            tokio::select! {
                () = self.watch_node() => return,
                Ok(()) = node_changed.changed() => {}
            }
        }
    }

    /// Watches the requests with the node's present UID.
    async fn watch_node(&self) {
        let api = self.api();
        let selection = Selection {
            resource: Resource::certificaterequests,
            name: RESOURCE.to_owned(),
            namespace: self.namespace().map(str::to_owned),
            // A quorum read: a request that was created before the list and is not in it no longer exists.
            config: watcher::Config::default().labels(&self.0.agent.selector()).page_size(REQUESTS_PER_PAGE),
        };
        let mut signals = Box::pin(agent_kube::watch::watch(api, selection, self.0.kube_metrics.clone()));
        let tracker = self.tracker();
        while let Some(signal) = signals.next().await {
            match signal {
                Signal::Event(watcher::Event::Init) => tracker.list_begins(),
                Signal::Event(watcher::Event::InitApply(object)) => tracker.listed(&object),
                Signal::Event(watcher::Event::InitDone) => tracker.list_ends(),
                Signal::Event(watcher::Event::Apply(object)) => tracker.applied(&object),
                Signal::Event(watcher::Event::Delete(object)) => tracker.deleted(&object),
                Signal::Trouble(ended, failure) => tracker.trouble(ended, &failure.message, failure.cause == Cause::Rbac),
            }
        }
    }

    async fn sweep(&self) {
        self.synced().await;
        let mut has_former = true;
        loop {
            let mut unclaimed = self.tracker().unclaimed();
            let mut pause = SWEEP_EVERY;
            if has_former {
                let former = self.former().await;
                // Agents of the previous version make no requests after this agent has replaced them.
                has_former = former.as_ref().is_none_or(|former| !former.is_empty());
                unclaimed.extend(former.unwrap_or_default());
            }
            if !unclaimed.is_empty() {
                // The pods are read after the requests, because a pod exists before its first request.
                let live = match &self.0.pods {
                    Some(pods) => pods.live().await,
                    None => None,
                };
                if live.is_none() && self.0.pods.is_some() {
                    pause = SWEEP_RETRY_INTERVAL;
                }
                let now = i64::try_from(clock::unix_seconds(self.0.clock.now())).unwrap_or(i64::MAX);
                let orphans = sweep::orphans(&self.0.agent, unclaimed, live.as_ref(), now);
                if !orphans.is_empty() {
                    tracing::info!(target: LOG_TARGET, requests = orphans.len(), "sweeping requests of agents that no longer run");
                    self.tracker().delete_orphans(orphans);
                }
            }
            tokio::time::sleep(jittered(pause)).await;
        }
    }
}
