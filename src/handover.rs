//! Takes the name of the shared socket, and takes it back after its loss.
//!
//! The agent takes the name at once if no process serves it. If a healthy predecessor serves it, the agent waits until all its own parts
//! are in sync, or until the predecessor ends. If another agent takes the name later, this agent takes it back when the other one ends.
//!
//! So a new version that cannot serve never takes the socket from an old one that can, and during a surge a client always finds a listener.
//! Two agents may take the name from each other more than once: the kubelet restarts the container of an old pod beside the new pod, and
//! the restarted agent takes the socket. When the controller deletes the old pod, the remaining agent takes the socket back.
//!
//! A predecessor is healthy if it answers `grpc.health.v1` on the socket. Nothing polls: the agent keeps the connection of the health
//! check, and its end means that the predecessor has ended. The kernel (inotify) reports when the name refers to another socket.
//!
//! # Impostors
//!
//! A process that may write the socket's directory can rename a socket of its own over the agent's. Its health answer proves nothing, so
//! the agent attests it ([`holder`]): the kernel names the process that listens, its cgroup names its pod, and that pod must have the
//! namespace and the service account of the agent's own pod. An agent in no pod accepts processes of its own user and of root. The agent
//! takes the name back from any other process, at most once in 10 s: an impostor that takes it again and again must not make the agent
//! bind without end. The agent watches the name of each other socket too, so an agent that waits for another one notices an impostor that
//! replaces it.
//!
//! Decisions:
//!
//! - Before the index of pods is in sync, every healthy process counts as a predecessor.
//! - A pod that has ended, that is being deleted or that was deleted keeps its account: its agent may still drain. The index remembers
//!   deleted pods.
//! - A pod that was deleted before the index was read is unknown. Its process is an agent that outlives a pod deleted by force, and that
//!   the kubelet is about to stop, possibly after a restart of the kubelet. Or it is an impostor. An agent that is not ready yet waits for it
//!   as for a predecessor. An agent that is ready displaces it: no such process takes the name of a ready agent, because the kubelet starts
//!   no container of a pod that the API server does not know.
//! - A failed live read decides nothing. The agent waits as for another agent, and attests again after 1 s to 30 s.
//! - A process in no pod is an impostor to an agent in a pod, also an agent that the node's service manager has started.
//! - If the process that called `listen` has ended and the socket still answers, the process that answers is an impostor.
//!
//! # Failures
//!
//! An agent that cannot take the name tries again after 1 s, then after up to 30 s. It looks for another holder before each attempt. If the
//! directory was deleted and only this process still sees it, as through a mount, [`SocketLease::keep`] returns the error, and the process
//! has to be restarted.

use std::{
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use agent_runtime::{
    readiness::{Guard, Readiness},
    telemetry::hush::LogLimiter,
};
use futures::future::{OptionFuture, pending};
use tokio::{
    net::UnixListener,
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use unix_peer::listener::{self, Bound, BoundPath, Prepared};

pub mod holder;
mod metrics;

use holder::{Holder, HolderAttestor, Judgement};
pub use metrics::Metrics;

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::handover";

/// The configuration field of the socket's path.
const FIELD: &str = "sockets.shared.path";
/// Minimum time between two displacements of an impostor.
const DISPLACE_INTERVAL: Duration = Duration::from_secs(10);
/// Minimum time between two looks at the name, each of which may bind a socket.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Time that a holder which is not waited for has to be attested, so that an impostor is reported as such.
const ATTEST_TIMEOUT: Duration = Duration::from_secs(2);
/// The pauses after a failed attempt to bind: the first, doubled up to the last.
const BIND_RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// The name of the readiness guard in `/readyz?verbose`.
pub const AWAITED: &str = "the socket, which a healthy predecessor serves until all else is in sync";

/// Owns the socket's name, or waits for it.
#[derive(Debug)]
pub struct SocketLease {
    keeper: Keeper,
    role: Role,
}

/// The path of the socket and its permission bits.
#[derive(Debug, Clone)]
pub struct SocketSpec {
    /// The public path.
    pub path: PathBuf,
    /// Permission bits, which decide who may connect.
    pub mode: u32,
    /// Whether a denied permission stays denied, as for a confined process: it may use the directory that existed at its start, and no
    /// other one that replaces it.
    pub denial_is_final: bool,
}

/// The settings and state of an agent that takes the name.
#[derive(Debug)]
struct Keeper {
    spec: SocketSpec,
    readiness: Readiness,
    attestor: Arc<dyn HolderAttestor>,
    metrics: Metrics,
    last_look: Option<Instant>,
    last_displacement: Option<Instant>,
    /// Limits the lines about the name: a process that can write to the directory can take the name in a loop.
    lines: LogLimiter<&'static str>,
}

/// Whether this agent has the name or waits for another process.
enum Role {
    Active(Bound),
    Standby(Waiting),
}

#[derive(Debug)]
struct Waiting {
    /// The process that has the name. `None` if no process serves it.
    holder: Option<Holder>,
    /// The listener that was bound at the start, when an error ends the process. `None` after a loss: the agent binds again when it takes
    /// the name.
    prepared: Option<(UnixListener, Prepared)>,
    /// The readiness guard of an agent that is not ready yet. An agent that was ready has none, and waits until the other agent ends.
    guard: Option<Guard>,
}

/// The next step of an agent that has waited for the process with the name.
enum Next {
    /// Looks for a holder: this one has ended, or another socket has the name.
    Look,
    /// Takes the name.
    Take,
    /// Takes the name from an impostor; the evidence.
    Displace(String),
}

impl std::fmt::Debug for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Active(bound) => f.debug_tuple("Active").field(bound).finish(),
            Self::Standby(waiting) => f.debug_tuple("Standby").field(&waiting.holder).finish(),
        }
    }
}

impl SocketLease {
    /// Binds beside the path of `spec`, and takes the name unless a healthy process serves it. The agent is not ready before it has the
    /// name. `attestor` decides which process may keep the name.
    ///
    /// # Errors
    ///
    /// The socket cannot be bound, or its name cannot be taken.
    pub async fn acquire(
        spec: SocketSpec,
        readiness: &Readiness,
        attestor: Arc<dyn HolderAttestor>,
        metrics: Metrics,
    ) -> Result<Self, listener::Error> {
        let (listener, prepared) = listener::prepare(FIELD, &spec.path, spec.mode)?;
        let readiness = readiness.clone();
        let mut keeper =
            Keeper { spec, readiness, attestor, metrics, last_look: None, last_displacement: None, lines: LogLimiter::default() };
        let role = match keeper.look(None).await.filter(|holder| holder.is_healthy) {
            None => Role::Active(Bound { listener, name: prepared.publish()? }),
            Some(holder) => {
                let socket = keeper.spec.path.display();
                info!(target: LOG_TARGET, %socket, "a predecessor serves the socket; it is taken over once all else is in sync");
                let guard = Some(keeper.readiness.guard(AWAITED));
                Role::Standby(Waiting { holder: Some(holder), prepared: Some((listener, prepared)), guard })
            }
        };
        Ok(Self { keeper, role })
    }

    /// Whether this agent has the name.
    pub fn is_held(&self) -> bool {
        matches!(self.role, Role::Active(_))
    }

    /// The public path of the socket.
    pub fn path(&self) -> &Path {
        &self.keeper.spec.path
    }

    /// Keeps the name, and takes it back after a loss, until `end`. Returns the name if this agent has it then. Each time the agent takes
    /// the name, it sends the new listener to `open`; no client connects to an earlier one.
    ///
    /// # Errors
    ///
    /// The socket cannot be bound again by this process. Other errors are logged, and the agent tries again.
    pub async fn keep(self, end: CancellationToken, open: mpsc::Sender<UnixListener>) -> Result<Option<BoundPath>, listener::Error> {
        let Self { mut keeper, mut role } = self;
        loop {
            let bound = match role {
                Role::Active(bound) => bound,
                Role::Standby(waiting) => match end.run_until_cancelled(keeper.take_over(waiting)).await {
                    Some(bound) => bound?,
                    None => return Ok(None),
                },
            };
            let Bound { listener, name } = bound;
            keeper.metrics.bound.set(1);
            // The accept loop lives as long as the process, so `send` does not fail.
            let _ = open.send(listener).await;
            end.run_until_cancelled(name.superseded()).await;
            keeper.metrics.bound.set(0);
            if end.is_cancelled() {
                return Ok(Some(name));
            }
            role = match end.run_until_cancelled(keeper.superseded(&name)).await {
                Some(waiting) => Role::Standby(waiting),
                None => return Ok(None),
            };
        }
    }
}

impl Keeper {
    /// Returns the process that accepts connections on the name. `own` is the name that this agent had last: its socket may be there again.
    async fn look(&mut self, own: Option<&BoundPath>) -> Option<Holder> {
        if let Some(last) = self.last_look {
            sleep_until(last + LOOK_INTERVAL).await;
        }
        self.last_look = Some(Instant::now());
        if own.is_some_and(BoundPath::is_owned) {
            return None;
        }
        Holder::at(&self.spec.path).await
    }

    /// Looks for the next holder after the name was removed or refers to another socket.
    async fn superseded(&mut self, own: &BoundPath) -> Waiting {
        let holder = self.look(Some(own)).await;
        let socket = self.spec.path.display();
        match (&holder, self.lines.permit(if holder.is_some() { "taken" } else { "lost" }, Instant::now())) {
            (_, None) => {}
            (None, Some(left_out)) => {
                info!(target: LOG_TARGET, %socket, left_out, "the socket has lost its name, and no process serves it");
            }
            (Some(_), Some(left_out)) => info!(target: LOG_TARGET, %socket, left_out, "another process has taken the socket"),
        }
        let waits = holder.as_ref().is_some_and(|holder| holder.is_healthy);
        let guard = (waits && !self.readiness.is_ready()).then(|| self.readiness.guard(AWAITED));
        Waiting { holder, prepared: None, guard }
    }

    /// Takes the name when all parts are in sync, the holder has ended, or the holder is an impostor. Tries again after an error.
    async fn take_over(&mut self, waiting: Waiting) -> Result<Bound, listener::Error> {
        let Waiting { mut holder, mut prepared, guard } = waiting;
        let (mut pause, mut logged) = (BIND_RETRY.0, None);
        let bound = loop {
            let mut impostor = None;
            if let Some(current) = &mut holder {
                match self.wait(current, guard.as_ref()).await {
                    Next::Take => {}
                    Next::Displace(cause) => impostor = Some(cause),
                    Next::Look => {
                        holder = self.look(None).await;
                        if holder.is_none()
                            && let Some(left_out) = self.lines.permit("ended", Instant::now())
                        {
                            info!(target: LOG_TARGET, left_out, "the other process has ended; taking the socket");
                        }
                        continue;
                    }
                }
            }
            let attempt = match prepared.take() {
                Some((listener, prepared)) => prepared.publish().map(|name| Bound { listener, name }),
                None => listener::bind_for(FIELD, &self.spec.path, self.spec.mode),
            };
            match attempt {
                Ok(bound) => {
                    if let Some(cause) = impostor {
                        self.displaced(&cause);
                    }
                    break bound;
                }
                Err(cause) if cause.needs_restart() || self.spec.denial_is_final && cause.is_denied() => return Err(cause),
                Err(cause) => {
                    let cause = cause.to_string();
                    if logged.as_ref() != Some(&cause) {
                        error!(target: LOG_TARGET, cause, "the socket cannot be bound; trying again after 1 s to 30 s");
                        logged = Some(cause);
                    }
                    sleep(pause).await;
                    pause = (2 * pause).min(BIND_RETRY.1);
                    holder = self.look(None).await;
                }
            }
        };
        drop(guard);
        if let Some(left_out) = self.lines.permit("acquired", Instant::now()) {
            info!(target: LOG_TARGET, socket = %self.spec.path.display(), left_out, "the socket is acquired");
        }
        Ok(bound)
    }

    /// Waits for what ends the wait for `holder`. An agent that is not ready has a `guard`, and also waits until all other parts are in sync.
    async fn wait(&self, holder: &mut Holder, guard: Option<&Guard>) -> Next {
        let Holder { peer, is_healthy, end } = holder;
        let is_healthy = *is_healthy;
        let mut logged = String::new();
        let unavailable = |cause: &str| {
            if logged != cause {
                let socket = self.spec.path.display();
                warn!(target: LOG_TARGET, %socket, cause, "the process that serves the socket cannot be attested; trying again after 1 s to 30 s");
                cause.clone_into(&mut logged);
            }
        };
        let mut judge = pin!(holder::judge(peer, &*self.attestor, guard.is_some(), unavailable));
        let mut allowed = pin!(async {
            if is_healthy {
                let in_sync = OptionFuture::from(guard.map(|guard| self.readiness.awaits_only(guard))).await;
                if in_sync.is_none() {
                    pending::<()>().await;
                }
            }
        });
        let judgement = tokio::select! {
            biased;
            () = &mut *end => return Next::Look,
            judgement = &mut judge => Some(judgement),
            () = &mut allowed => None,
        };
        let is_allowed = judgement.is_none();
        let judgement = match judgement {
            Some(judgement) => Some(judgement),
            None => timeout(ATTEST_TIMEOUT, judge).await.ok(),
        };
        match judgement {
            Some(Judgement::Impostor(cause)) => {
                let due = self.last_displacement.map(|last| last + DISPLACE_INTERVAL);
                tokio::select! {
                    biased;
                    () = end => Next::Look,
                    _ = OptionFuture::from(due.map(sleep_until)) => Next::Displace(cause),
                }
            }
            _ if is_allowed => Next::Take,
            _ => {
                if is_healthy
                    && guard.is_none()
                    && let Some(left_out) = self.lines.permit("agent", Instant::now())
                {
                    let socket = self.spec.path.display();
                    info!(target: LOG_TARGET, %socket, left_out, "another agent has taken the socket; it is taken back when that one ends");
                }
                tokio::select! {
                    biased;
                    () = end => Next::Look,
                    () = allowed => Next::Take,
                }
            }
        }
    }

    fn displaced(&mut self, cause: &str) {
        self.last_displacement = Some(Instant::now());
        self.metrics.impostors.inc();
        error!(
            target: LOG_TARGET, cause,
            socket = %self.spec.path.display(),
            "a process that is no agent serves the socket; taking the socket back. Find the pod that mounts its directory writable"
        );
    }
}

#[cfg(test)]
mod tests;
