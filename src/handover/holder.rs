//! The process that serves the socket's path: its credentials, its health and its end; and whether it is an agent like this one.

use std::{fmt, path::Path, sync::Arc, time::Duration};

use attest_kubernetes::attestor::KubernetesAttestor;
use futures::future::BoxFuture;
use sds_server::{attest::Reason, grpc::client, session::Companions};
use tokio::{
    net::UnixStream,
    time::{sleep, timeout},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use unix_peer::{peer::Peer, socket_file::FoundSocket};
use workload_identity::PodRef;

/// A process that does not answer the health check within this time is not healthy.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(2);
/// The pauses between two attempts to attest a holder that cannot be attested now: the first, doubled up to the last.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Time for the connection to end after the process that listened has ended. If it has not ended then, another process serves it.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// The result of attesting the process that serves the socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// An agent of the same service account: a predecessor or a successor.
    Agent,
    /// Another process. The text is the evidence, for the log.
    Impostor(String),
    /// The process is in a pod that the API server does not know.
    UnknownPod(String),
    /// The process that listened has ended.
    Ended(String),
    /// It cannot be decided now.
    Unavailable(String),
}

/// Attests another process of the socket: the one that serves the path in place of this agent, or one that calls this agent.
pub trait HolderAttestor: fmt::Debug + Send + Sync {
    /// Attests `peer`. Waits while the evidence may still arrive. Must be cancel safe.
    fn attest<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Verdict>;
}

/// Accepts each process of this process's user and of root. For agents that run in no pod.
#[derive(Debug, Clone, Copy)]
pub struct SameUser;

impl HolderAttestor for SameUser {
    fn attest<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Verdict> {
        let own = rustix::process::geteuid().as_raw();
        let verdict = if peer.uid == own || peer.uid == 0 {
            Verdict::Agent
        } else {
            Verdict::Impostor(format!("process {} runs as user {}; this agent runs as user {own}", peer.pid, peer.uid))
        };
        Box::pin(std::future::ready(verdict))
    }
}

/// Accepts processes of pods in the namespace and with the service account of the agent's own pod.
#[derive(Debug)]
pub struct SameAccount {
    attestor: KubernetesAttestor,
    pods: attest_kubernetes::pods::Pods,
    own: PodRef,
}

impl SameAccount {
    /// Finds the pod of a holder with `attestor`; `pods` is its index, and `own` the agent's pod.
    pub fn new(attestor: KubernetesAttestor, pods: attest_kubernetes::pods::Pods, own: PodRef) -> Self {
        Self { attestor, pods, own }
    }

    async fn judge(&self, peer: &Peer) -> Verdict {
        let (uid, account) = match self.attestor.account_of(peer).await {
            Ok(found) => found,
            Err(error) => {
                let cause = error.to_string();
                return match error.reason {
                    Reason::unknown_pod => Verdict::UnknownPod(cause),
                    Reason::process_gone => Verdict::Ended(cause),
                    Reason::unreadable | Reason::pid_invisible | Reason::no_pidfd => Verdict::Unavailable(cause),
                    _ => Verdict::Impostor(cause),
                };
            }
        };
        if uid.as_str() == &*self.own.uid {
            return Verdict::Agent;
        }
        match (account, self.pods.account(&self.own.uid).await) {
            (Some(account), Ok(Some(own))) if account == own => Verdict::Agent,
            (_, Ok(Some(own))) => {
                let pid = peer.pid;
                Verdict::Impostor(format!(
                    "process {pid} is in pod {uid}, which has not the service account {}/{}",
                    own.namespace, own.name
                ))
            }
            (_, Ok(None)) => Verdict::Unavailable("the agent's own pod has no service account".to_owned()),
            (_, Err(error)) => Verdict::Unavailable(format!("the agent's own pod is not known: {error}")),
        }
    }
}

impl HolderAttestor for SameAccount {
    fn attest<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Verdict> {
        Box::pin(self.judge(peer))
    }
}

/// The other agents of the node as callers of this one's socket: each keeps a connection, whose end is the end of this agent.
#[derive(Debug)]
pub struct OtherAgents(pub Arc<dyn HolderAttestor>);

impl Companions for OtherAgents {
    fn is_companion<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, bool> {
        Box::pin(async move { self.0.attest(peer).await == Verdict::Agent })
    }
}

/// A process that accepts connections on the socket's path.
pub(super) struct Holder {
    /// The process that called `listen`.
    pub(super) peer: Peer,
    /// Whether it answers the health check.
    pub(super) is_healthy: bool,
    /// Completes when the process has closed the connection, or the path leads to another file.
    pub(super) end: BoxFuture<'static, ()>,
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holder").field("peer", &self.peer).field("is_healthy", &self.is_healthy).finish_non_exhaustive()
    }
}

/// Whether the process may keep the path.
#[derive(Debug)]
pub(super) enum Judgement {
    Agent,
    Impostor(String),
}

impl Holder {
    /// Returns the process that accepts connections at `path`; `None` if there is none, or `path` is not a socket.
    pub(super) async fn at(path: &Path) -> Option<Self> {
        let found = Arc::new(FoundSocket::at(path).ok()?);
        let stream = timeout(HEALTH_TIMEOUT, found.connect()).await.ok()?.ok()?;
        let peer = Peer::of(&stream).ok()?;
        let connection = timeout(HEALTH_TIMEOUT, healthy_connection(stream)).await.ok().flatten();
        let is_healthy = connection.is_some();
        let end = Box::pin(async move {
            let replaced = found.replaced();
            match connection {
                Some(ended) => tokio::select! {
                    () = ended => {}
                    () = replaced => {}
                },
                None => replaced.await,
            }
        });
        Some(Self { peer, is_healthy, end })
    }
}

/// Waits until it is known whether `peer` may keep the path. `spares_unknown`: a process in a pod that the API server does not know may keep
/// it. `failed` reports the cause of each attempt that decides nothing.
pub(super) async fn judge(peer: &Peer, attestor: &dyn HolderAttestor, spares_unknown: bool, mut failed: impl FnMut(&str)) -> Judgement {
    let mut pause = RETRY.0;
    loop {
        match attestor.attest(peer).await {
            Verdict::Agent => return Judgement::Agent,
            Verdict::Impostor(cause) => return Judgement::Impostor(cause),
            Verdict::UnknownPod(_) if spares_unknown => return Judgement::Agent,
            Verdict::UnknownPod(cause) => return Judgement::Impostor(cause),
            // The caller also waits for `end`, which comes first if the socket was closed with the process.
            Verdict::Ended(cause) => {
                sleep(END_TIMEOUT).await;
                return Judgement::Impostor(format!("{cause}, but the socket is still served"));
            }
            Verdict::Unavailable(cause) => {
                failed(&cause);
                sleep(pause).await;
                pause = (2 * pause).min(RETRY.1);
            }
        }
    }
}

/// Returns a future that completes at the end of the connection, if the process answers the health check.
async fn healthy_connection(stream: UnixStream) -> Option<impl Future<Output = ()> + Send + use<>> {
    let (connection, driver) = client::over(stream).await.ok()?;
    let driver = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(driver));
    let mut health = HealthClient::with_origin(connection, client::origin());
    let answer = health.check(HealthCheckRequest::default()).await;
    let serves = answer.is_ok_and(|answer| answer.into_inner().status() == ServingStatus::Serving);
    serves.then_some(async move {
        // Keeps the client until the connection ends, because dropping it would close the connection.
        let _held = health;
        let _ = driver.await;
    })
}

#[cfg(test)]
mod tests;
