//! A certificate before it is asked for: it is issued while a pod starts, and the pod's first call finds it done.
//!
//! Owns the leases that are held for pods which have not called: those with a published socket of their own, and, where the operator
//! wants it, those that start and will call the shared socket ([`starts`]). Such a lease ends once somebody has called, with time enough to
//! take one of their own, or with the pod, or after a bounded time: who never asks is not renewed for ever. The pod index has the same
//! last word as for a call. A pod that ran before the agent did is never warmed up: it holds a certificate, and says so when it comes back.

use std::{collections::BTreeMap, future::pending, sync::Arc, time::Duration};

use attest_kubernetes::mount::MountAttestor;
use sds_server::store::{Demand, Store};
use tokio::{
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use workload_identity::{Resolver, Workload};

pub mod metrics;
pub mod starts;

use metrics::{Ended, Metrics};

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::warm";

/// From the start to the first call: images are pulled in between.
const FIRST_CALL_TIMEOUT: Duration = Duration::from_secs(600);
/// While the index cannot say who the pod is.
const INDEX_RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// From the first call to its own lease.
const LEASE_HANDOVER: Duration = Duration::from_secs(10);

/// `warmUp`, where it is enabled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WarmUp {
    /// `podLabels`: a pod that carries all of them is warmed up; none where it is empty.
    pub pod_labels: BTreeMap<String, String>,
    /// `socketMount`: so is one that mounts the shared socket's directory.
    pub socket_mount: bool,
}

/// Holds leases for pods that have not called.
#[derive(Debug, Clone)]
pub struct Prefetcher {
    /// Where certificates are.
    pub store: Arc<Store>,
    /// How callers are named.
    pub resolver: watch::Receiver<Arc<Resolver>>,
    /// What is counted.
    pub metrics: Metrics,
}

/// For whom a lease is held, and until when.
struct Prefetch<'a> {
    workload: &'a Workload,
    /// Cancelled once it has called.
    first_call: &'a CancellationToken,
    /// Cancelled when it has ended.
    terminated: &'a CancellationToken,
    /// How long it may take to call.
    patience: Duration,
}

impl Prefetcher {
    /// Has the certificate of a published socket's pod issued; `issued` is cancelled once it is there.
    pub fn published(&self, attestor: Arc<MountAttestor>, issued: CancellationToken) {
        let warmer = self.clone();
        tokio::spawn(async move {
            let (terminated, first_call) = (attestor.terminated(), attestor.first_call());
            let identified = terminated.run_until_cancelled(timeout(FIRST_CALL_TIMEOUT, identified(&attestor))).await;
            let Some(Ok(Some(workload))) = identified else { return };
            // The kubelet may wait for each of them.
            let unlimited = Semaphore::new(1);
            warmer.hold(&Prefetch { workload: &workload, first_call, terminated, patience: FIRST_CALL_TIMEOUT }, &unlimited, &issued).await;
        });
    }

    /// Holds a lease, from the moment that `permits` lets it: until then another one's certificate is being made.
    async fn hold(&self, held: &Prefetch<'_>, permits: &Semaphore, issued: &CancellationToken) {
        let Prefetch { workload, first_call, terminated, patience } = *held;
        let ended = tokio::select! {
            biased;
            () = terminated.cancelled() => Ended::gone,
            () = async { first_call.cancelled().await; sleep(LEASE_HANDOVER).await } => Ended::called,
            () = sleep(patience) => Ended::unused,
            () = self.keep(workload, permits, issued) => return,
        };
        self.metrics.ended(ended);
        debug!(target: LOG_TARGET, %workload, ?ended, "no longer held ahead of the first call");
    }

    /// Holds the lease that the rules give to `workload`, whatever these become; returns only when they give none.
    async fn keep(&self, workload: &Workload, permits: &Semaphore, issued: &CancellationToken) {
        let mut rules = self.resolver.clone();
        let mut held = None;
        loop {
            let resolved = rules.borrow_and_update().resolve(workload);
            let identity = match resolved {
                Ok(identity) => Arc::new(identity),
                Err(cause) => {
                    warn!(target: LOG_TARGET, %workload, %cause, "no certificate is issued ahead of the first call");
                    return;
                }
            };
            let turn = permits.acquire().await;
            debug!(target: LOG_TARGET, %workload, %identity, "a certificate is issued ahead of the first call");
            // The one before ends when the new one is held.
            let lease = held.insert(self.store.lease(&identity, Demand::Now, workload.pod().cloned()));
            let made = async {
                if lease.watch().wait_for(Option::is_some).await.is_ok() {
                    issued.cancel();
                }
                drop(turn);
                pending::<()>().await;
            };
            tokio::select! {
                () = made => {}
                Ok(()) = rules.changed() => {}
            }
        }
    }
}

/// Who it is, as soon as the index can say so.
async fn identified(attestor: &MountAttestor) -> Option<Workload> {
    loop {
        match attestor.workload().await {
            Ok(workload) => return Some(workload),
            Err(cause) if cause.temporary => {
                debug!(target: LOG_TARGET, %cause, "a published socket's pod is not known yet");
                sleep(INDEX_RETRY_INTERVAL).await;
            }
            Err(cause) => {
                warn!(target: LOG_TARGET, %cause, "no certificate is issued for a published socket");
                return None;
            }
        }
    }
}
