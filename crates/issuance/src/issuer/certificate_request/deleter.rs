//! Deletes requests in the background, with a bounded number of retries. At shutdown it makes a best effort of at most 5 s.
//!
//! The sweep deletes requests that this worker could not delete. After the process has ended, the sweep of the next agent does. Without the
//! permission to delete, all requests are left to the sweep, and each sweep tries again.

use std::{sync::Arc, time::Duration};

use agent_kube::{Call, Cause, Failure};
use cert_manager::CertificateRequest;
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use kube::{
    Api, Client,
    api::{DeleteParams, Preconditions},
};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use crate::issuer::certificate_request::{
    RESOURCE,
    create::jittered,
    tracker::{Deletion, RequestTracker},
};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::issuer::cert_manager::deleter";

/// Maximum number of deletions at the same time.
const CONCURRENCY: usize = 4;
/// Attempts for one request. After them, the sweep deletes it.
const MAX_TRIES: u32 = 8;
/// Wait before the second attempt. It doubles up to [`MAX_BACKOFF`].
const INITIAL_BACKOFF: Duration = Duration::from_millis(500);
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// Time for which nothing is deleted after the API server has answered that the permission is missing. The sweep comes later than this.
const REFUSED_FOR: Duration = Duration::from_secs(240);
/// Time limit of [`Deleter::finish`].
pub(super) const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// The worker that deletes requests.
pub(super) struct Deleter {
    client: Client,
    tracker: Arc<RequestTracker>,
    queue: mpsc::UnboundedReceiver<Deletion>,
    running: FuturesUnordered<BoxFuture<'static, ()>>,
    orphans: Counter,
    /// Time at which the permission to delete was missing.
    refused: Arc<Mutex<Option<Instant>>>,
}

impl Deleter {
    pub(super) fn new(client: Client, tracker: Arc<RequestTracker>, queue: mpsc::UnboundedReceiver<Deletion>, orphans: Counter) -> Self {
        Self { client, tracker, queue, running: FuturesUnordered::new(), orphans, refused: Arc::default() }
    }

    /// Deletes requests without a time limit. Cancel safe: deletions that have begun continue with the next call.
    pub(super) async fn work(&mut self) {
        while self.step().await {}
    }

    /// Deletes requests until none is left and no order can add one, but at most for [`SHUTDOWN_TIMEOUT`].
    pub(super) async fn finish(&mut self) {
        let rest = async {
            while !(self.running.is_empty() && self.queue.is_empty() && !self.tracker.has_orders()) {
                self.step().await;
            }
        };
        if timeout(SHUTDOWN_TIMEOUT, rest).await.is_err() {
            let left = self.running.len() + self.queue.len();
            tracing::warn!(target: LOG_TARGET, left, "requests are left to the next agent's sweep");
        }
    }

    async fn step(&mut self) -> bool {
        tokio::select! {
            Some(()) = self.running.next() => true,
            next = self.queue.recv(), if self.running.len() < CONCURRENCY => match next {
                Some(deletion) => {
                    if self.refused.lock().is_some_and(|at| at.elapsed() < REFUSED_FOR) {
                        self.tracker.done(&deletion.key, false);
                    } else {
                        let (client, tracker) = (self.client.clone(), self.tracker.clone());
                        self.running.push(Box::pin(delete(client, tracker, deletion, self.orphans.clone(), self.refused.clone())));
                    }
                    true
                }
                None => false,
            },
        }
    }
}

async fn delete(client: Client, tracker: Arc<RequestTracker>, deletion: Deletion, orphans: Counter, refused: Arc<Mutex<Option<Instant>>>) {
    let Deletion { key, uid, orphan } = deletion;
    let api: Api<CertificateRequest> = Api::namespaced(client, &key.namespace);
    let preconditions = uid.map(|uid| Preconditions { uid: Some(uid), resource_version: None });
    let parameters = DeleteParams { preconditions, ..DeleteParams::default() };
    let call = Call { verb: "delete", resource: RESOURCE, name: Some(&key.name), namespace: Some(&key.namespace) };
    let (mut pause, mut gone) = (INITIAL_BACKOFF, true);
    for tries in 1..=MAX_TRIES {
        let failure = match api.delete(&key.name, &parameters).await {
            Ok(_) => {
                if orphan {
                    orphans.inc();
                    tracing::info!(target: LOG_TARGET, request = %key.name, namespace = %key.namespace, "deleted the request of an agent that no longer runs");
                }
                break;
            }
            Err(error) => Failure::of(&error, &call),
        };
        match failure.cause {
            // The request no longer exists; or another object has the name, which is not the agent's to delete.
            Cause::NotFound | Cause::NoSuchKind | Cause::NoNamespace | Cause::Conflict => break,
            Cause::Rbac => {
                gone = false;
                let before = refused.lock().replace(Instant::now());
                if before.is_none_or(|at| at.elapsed() >= REFUSED_FOR) {
                    tracing::warn!(target: LOG_TARGET, action = %call, error = %failure, "requests are left to the next sweep");
                }
                break;
            }
            _ if tries == MAX_TRIES => {
                gone = false;
                tracing::warn!(target: LOG_TARGET, action = %call, error = %failure, "left to the next sweep");
            }
            _ if tries == 1 => {
                tracing::info!(target: LOG_TARGET, action = %call, error = %failure, "cannot delete a request; trying again");
            }
            _ => {}
        }
        if tries < MAX_TRIES {
            let asked = if let Cause::TooManyRequests(Some(after)) = failure.cause { after } else { Duration::ZERO };
            tokio::time::sleep(jittered(pause).max(asked)).await;
            pause = (pause * 2).min(MAX_BACKOFF);
        }
    }
    tracker.done(&key, gone);
}
