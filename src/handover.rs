//! Takes the name of the shared socket and takes it back after its loss.
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

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use agent_runtime::{
    readiness::{Guard, Readiness},
    telemetry::hush::LogLimiter,
};
use futures::future::{BoxFuture, OptionFuture};
use sds_server::grpc::client;
use tokio::{
    net::UnixListener,
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tracing::{error, info};
use unix_peer::listener::{self, Bound, BoundPath, Prepared};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::handover";

/// The configuration field of the socket's path.
const FIELD: &str = "sockets.shared.path";
/// A predecessor that does not answer the health check within this time is not healthy.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(2);
/// The name of the readiness guard in `/readyz?verbose`.
pub const AWAITED: &str = "the socket, which a healthy predecessor serves until all else is in sync";

/// Another process that serves the socket. `gone` completes when it ends.
struct Predecessor {
    gone: BoxFuture<'static, ()>,
}

/// Owns the socket's name, or waits for it.
#[derive(Debug)]
pub struct SocketLease {
    spec: SocketSpec,
    readiness: Readiness,
    role: Role,
}

/// The path of the socket and its permission bits.
#[derive(Debug)]
struct SocketSpec {
    path: PathBuf,
    mode: u32,
    /// Limits the lines about the name: a process that can write to the directory can take the name in a loop.
    lines: LogLimiter<&'static str>,
}

/// Whether this agent has the name or waits for a predecessor.
enum Role {
    Active(Bound),
    Standby(Waiting),
}

struct Waiting {
    predecessor: Predecessor,
    /// The listener that was bound at the start, when an error ends the process. `None` after a loss: the agent binds again when it takes
    /// the name.
    prepared: Option<(UnixListener, Prepared)>,
    /// The readiness guard of an agent that is not ready yet. An agent that was ready has none, and waits until the predecessor ends.
    guard: Option<Guard>,
}

impl std::fmt::Debug for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Active(bound) => f.debug_tuple("Active").field(bound).finish(),
            Self::Standby(waiting) => f.debug_tuple("Standby").field(&waiting.prepared).finish(),
        }
    }
}

impl SocketLease {
    /// Binds beside `path`, with permission bits `mode`, and takes the name unless a healthy predecessor serves it. The agent is not ready
    /// before it has the name.
    ///
    /// # Errors
    ///
    /// The socket cannot be bound, or its name cannot be taken.
    pub async fn acquire(path: &Path, mode: u32, readiness: &Readiness) -> Result<Self, listener::Error> {
        let (listener, prepared) = listener::prepare(FIELD, path, mode)?;
        let role = match find_predecessor(path).await {
            None => Role::Active(Bound { listener, name: prepared.publish()? }),
            Some(predecessor) => {
                info!(target: LOG_TARGET, socket = %path.display(), "a predecessor serves the socket; it is taken over once all else is in sync");
                let guard = Some(readiness.guard(AWAITED));
                Role::Standby(Waiting { predecessor, prepared: Some((listener, prepared)), guard })
            }
        };
        Ok(Self { spec: SocketSpec { path: path.to_owned(), mode, lines: LogLimiter::default() }, readiness: readiness.clone(), role })
    }

    /// Whether this agent has the name.
    pub fn is_held(&self) -> bool {
        matches!(self.role, Role::Active(_))
    }

    /// Keeps the name, and takes it back after a loss, until `end`. Returns the name if this agent has it then. Each time the agent takes
    /// the name, it sends the new listener to `open`; no client connects to an earlier one.
    pub async fn keep(self, end: CancellationToken, open: mpsc::Sender<UnixListener>) -> Option<BoundPath> {
        let Self { spec, readiness, mut role } = self;
        loop {
            let bound = match role {
                Role::Active(bound) => bound,
                Role::Standby(waiting) => end.run_until_cancelled(waiting.take_over(&spec, &readiness)).await??,
            };
            let Bound { listener, name } = bound;
            // The accept loop lives as long as the process, so `send` does not fail.
            let _ = open.send(listener).await;
            end.run_until_cancelled(name.superseded()).await;
            if end.is_cancelled() {
                return Some(name);
            }
            role = end.run_until_cancelled(spec.superseded(&readiness)).await??;
        }
    }
}

impl SocketSpec {
    /// The next role after the name was removed or refers to another socket. `None` if the socket cannot be bound again.
    async fn superseded(&self, readiness: &Readiness) -> Option<Role> {
        let Some(predecessor) = find_predecessor(&self.path).await else {
            if let Some(left_out) = self.lines.permit("lost", Instant::now()) {
                let socket = self.path.display();
                info!(target: LOG_TARGET, %socket, left_out, "the socket has lost its name, and no process serves it");
            }
            return self.bind().map(Role::Active);
        };
        if let Some(left_out) = self.lines.permit("taken", Instant::now()) {
            let socket = self.path.display();
            info!(target: LOG_TARGET, %socket, left_out, "another agent has taken the socket; it is taken back when that one ends");
        }
        let guard = (!readiness.is_ready()).then(|| readiness.guard(AWAITED));
        Some(Role::Standby(Waiting { predecessor, prepared: None, guard }))
    }

    fn bind(&self) -> Option<Bound> {
        self.log_outcome(listener::bind_for(FIELD, &self.path, self.mode))
    }

    fn log_outcome(&self, bound: Result<Bound, listener::Error>) -> Option<Bound> {
        match &bound {
            Ok(_) => {
                if let Some(left_out) = self.lines.permit("acquired", Instant::now()) {
                    info!(target: LOG_TARGET, socket = %self.path.display(), left_out, "the socket is acquired");
                }
            }
            // The agent does not try again, so this is logged once.
            Err(cause) => error!(target: LOG_TARGET, %cause, "the socket cannot be taken over"),
        }
        bound.ok()
    }
}

impl Waiting {
    /// Takes the name when all parts are in sync or the predecessor has ended. Returns `None` if the socket cannot be taken.
    async fn take_over(self, spec: &SocketSpec, readiness: &Readiness) -> Option<Bound> {
        let Self { mut predecessor, prepared, guard } = self;
        loop {
            let in_sync = OptionFuture::from(guard.as_ref().map(|guard| readiness.awaits_only(guard)));
            tokio::select! {
                biased;
                Some(()) = in_sync => break,
                () = &mut predecessor.gone => match find_predecessor(&spec.path).await {
                    Some(next) => predecessor = next,
                    None => {
                        if let Some(left_out) = spec.lines.permit("ended", Instant::now()) {
                            info!(target: LOG_TARGET, left_out, "the predecessor has ended; taking the socket");
                        }
                        break;
                    }
                },
            }
        }
        let bound = match prepared {
            Some((listener, prepared)) => spec.log_outcome(prepared.publish().map(|name| Bound { listener, name })),
            None => spec.bind(),
        };
        match (guard, &bound) {
            // The agent never becomes ready, so the rollout stops and the predecessor keeps serving.
            (Some(guard), None) => guard.abandon(),
            (guard, _) => drop(guard),
        }
        bound
    }
}

/// Returns the healthy process that serves the socket at `path`, if there is one.
async fn find_predecessor(path: &Path) -> Option<Predecessor> {
    let ask = async {
        let (connection, driver) = client::connect(path).await.ok()?;
        let driver = tokio::spawn(driver);
        let mut health = HealthClient::with_origin(connection, client::origin());
        let answer = health.check(HealthCheckRequest::default()).await;
        let serves = answer.is_ok_and(|answer| answer.into_inner().status() == ServingStatus::Serving);
        // Keeps the client until the connection ends, because dropping it would close the connection.
        let gone = Box::pin(async move {
            let _held = health;
            let _ = driver.await;
        });
        serves.then_some(Predecessor { gone })
    };
    timeout(HEALTH_TIMEOUT, ask).await.ok().flatten()
}

#[cfg(test)]
mod tests;
