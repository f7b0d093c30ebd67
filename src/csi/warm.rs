//! A certificate before it is asked for: publishing starts the issue, and the pod's first call finds it done.
//!
//! The lease is held until somebody has called, with time enough to take a lease of their own, or for a bounded time: a pod that never
//! asks is not renewed for ever. The pod index has the same last word as for a call.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    attest::mount::MountAttestor,
    identity::{Resolver, Workload},
    store::{Demand, Store},
};

/// From publish to the first call: images are pulled in between.
const PATIENCE: Duration = Duration::from_secs(600);
/// While the index cannot say who the pod is.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// From the first call to its own lease.
const HANDOVER: Duration = Duration::from_secs(10);

/// Starts issues.
#[derive(Debug, Clone)]
pub struct Warmer {
    /// Where certificates are.
    pub store: Arc<Store>,
    /// How callers are named.
    pub resolver: watch::Receiver<Arc<Resolver>>,
}

impl Warmer {
    /// Has the certificate of `attestor`'s pod issued; `issued` is cancelled once it is there.
    pub fn warm(&self, attestor: Arc<MountAttestor>, issued: CancellationToken) {
        let warmer = self.clone();
        tokio::spawn(async move {
            let gone = attestor.gone().clone();
            gone.run_until_cancelled(warmer.hold(&attestor, issued)).await;
        });
    }

    async fn hold(&self, attestor: &MountAttestor, issued: CancellationToken) {
        let Ok(Some(workload)) = tokio::time::timeout(PATIENCE, known(attestor)).await else { return };
        let called = async {
            attestor.called().cancelled().await;
            tokio::time::sleep(HANDOVER).await;
        };
        tokio::select! {
            () = self.keep(&workload, &issued) => {}
            () = tokio::time::sleep(PATIENCE) => {}
            () = called => {}
        }
    }

    /// Holds the lease that the rules give to `workload`, whatever these become; returns only when they give none.
    async fn keep(&self, workload: &Workload, issued: &CancellationToken) {
        let mut rules = self.resolver.clone();
        let mut held = None;
        loop {
            let resolved = rules.borrow_and_update().resolve(workload);
            let identity = match resolved {
                Ok(identity) => Arc::new(identity),
                Err(cause) => {
                    warn!(%workload, %cause, "no certificate is issued for a published socket");
                    return;
                }
            };
            debug!(%workload, %identity, "a certificate is issued ahead of the first call");
            // The one before ends when the new one is held.
            let lease = held.insert(self.store.lease(&identity, Demand::Now, workload.pod().cloned()));
            let mut material = lease.watch();
            let announced = async {
                if material.wait_for(Option::is_some).await.is_ok() {
                    issued.cancel();
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = announced => {}
                Ok(()) = rules.changed() => {}
            }
        }
    }
}

/// Who it is, as soon as the index can say so.
async fn known(attestor: &MountAttestor) -> Option<Workload> {
    loop {
        match attestor.workload().await {
            Ok(workload) => return Some(workload),
            Err(cause) if cause.temporary => {
                debug!(%cause, "a published socket's pod is not known yet");
                tokio::time::sleep(ASK_AGAIN).await;
            }
            Err(cause) => {
                warn!(%cause, "no certificate is issued for a published socket");
                return None;
            }
        }
    }
}
