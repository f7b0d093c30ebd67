//! Orders a certificate while a pod starts, so that the pod's first call finds it issued.
//!
//! Owns leases for pods that have not called yet: pods with a published per-pod socket, and, if `warmUp` is configured, starting pods that
//! will call the shared socket ([`starts`]). A lease ends 10 s after the first call, so that the caller has its own lease by then. It also
//! ends with the pod, and after 10 min without a call, so that an unused certificate is not renewed without a limit.
//!
//! As for a call, the pod index must confirm the pod. A pod that ran before the agent started gets no such lease: its client holds a
//! certificate, and sends the version of that certificate when it reconnects.

use std::{collections::BTreeMap, future::pending, sync::Arc, time::Duration};

use agent_runtime::telemetry::hush::{self, LogLimiter};
use attest_kubernetes::mount::MountAttestor;
use sds_server::store::{Demand, Store};
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use workload_identity::{Resolver, Workload};

pub mod metrics;
pub mod starts;

use metrics::{Ended, Metrics};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::warm";

/// Time limit from the start of a pod to its first call. The kubelet pulls images in this time.
const FIRST_CALL_TIMEOUT: Duration = Duration::from_secs(600);
/// Interval of retries while the pod index does not know the pod.
const INDEX_RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// Time from the first call to the end of the lease; the caller takes its own lease meanwhile.
const LEASE_HANDOVER: Duration = Duration::from_secs(10);

/// `warmUp`, where it is enabled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WarmUp {
    /// `podLabels`: a pod that has all these labels is warmed up. If empty, labels select no pod.
    pub pod_labels: BTreeMap<String, String>,
    /// `socketMount`: a pod that mounts the directory of the shared socket is warmed up too.
    pub socket_mount: bool,
}

/// Holds leases for pods that have not called.
#[derive(Debug, Clone)]
pub struct Prefetcher {
    /// The store in which leases are taken.
    pub store: Arc<Store>,
    /// Derives the identity of a pod.
    pub resolver: watch::Receiver<Arc<Resolver>>,
    /// The metrics of warm-ups.
    pub metrics: Metrics,
    /// Limits the log lines about pods without a certificate ahead of the first call.
    pub lines: Arc<LogLimiter<Cause>>,
}

/// The cause of a log line.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Cause {
    /// UID of the pod, if it is known.
    pod: Option<Arc<str>>,
    what: &'static str,
}

impl hush::Cause for Cause {}

/// The pod for which a lease is held, and the conditions that end the lease.
struct Prefetch<'a> {
    workload: &'a Workload,
    /// Cancelled when the pod has called.
    first_call: &'a CancellationToken,
    /// Cancelled when the pod has ended.
    terminated: &'a CancellationToken,
    /// Time limit for the first call.
    patience: Duration,
}

impl Prefetcher {
    /// Orders the certificate for the pod of a published socket. Cancels `issued` when the certificate is there.
    pub fn published(&self, attestor: Arc<MountAttestor>, issued: CancellationToken) {
        let warmer = self.clone();
        tokio::spawn(async move {
            let (terminated, first_call) = (attestor.terminated(), attestor.first_call());
            let identified = terminated.run_until_cancelled(timeout(FIRST_CALL_TIMEOUT, warmer.identified(&attestor))).await;
            let Some(Ok(Some(workload))) = identified else { return };
            // The kubelet may wait for each of these certificates, so their number is not limited.
            let unlimited = Semaphore::new(1);
            warmer.hold(&Prefetch { workload: &workload, first_call, terminated, patience: FIRST_CALL_TIMEOUT }, &unlimited, &issued).await;
        });
    }

    /// Waits until the pod index knows the workload. Returns `None` if the index rejects it.
    async fn identified(&self, attestor: &MountAttestor) -> Option<Workload> {
        loop {
            match attestor.workload().await {
                Ok(workload) => return Some(workload),
                Err(cause) if cause.temporary => {
                    debug!(target: LOG_TARGET, %cause, "a published socket's pod is not known yet");
                    sleep(INDEX_RETRY_INTERVAL).await;
                }
                Err(cause) => {
                    let pod = attestor.claim().map(|claim| claim.pod.uid);
                    if let Some(left_out) = self.lines.permit(Cause { pod, what: "rejected" }, Instant::now()) {
                        warn!(target: LOG_TARGET, %cause, left_out, "no certificate is issued for a published socket");
                    }
                    return None;
                }
            }
        }
    }

    /// Holds a lease, once a permit is free, until the pod has called or ended, or until `patience` has passed since this call. The permit
    /// is free again when the certificate is issued.
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
        debug!(target: LOG_TARGET, %workload, ?ended, "the lease ahead of the first call has ended");
    }

    /// Holds a lease for the identity of `workload`, also after the rules change. Returns only if the rules give it no identity.
    async fn keep(&self, workload: &Workload, permits: &Semaphore, issued: &CancellationToken) {
        let mut rules = self.resolver.clone();
        let mut held = None;
        loop {
            let resolved = rules.borrow_and_update().resolve(workload);
            let identity = match resolved {
                Ok(identity) => Arc::new(identity),
                Err(cause) => {
                    let pod = workload.pod().map(|pod| pod.uid.clone());
                    if let Some(left_out) = self.lines.permit(Cause { pod, what: "no identity" }, Instant::now()) {
                        warn!(target: LOG_TARGET, %workload, %cause, left_out, "no certificate is issued ahead of the first call");
                    }
                    return;
                }
            };
            let turn = permits.acquire().await;
            debug!(target: LOG_TARGET, %workload, %identity, "a certificate is issued ahead of the first call");
            // `insert` drops the previous lease after the new one is taken.
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
