//! Having the shared socket's name: it is taken at once where nobody serves it, from a healthy predecessor only once this process is in
//! sync, and again when whoever has taken it from us goes.
//!
//! So a new version that cannot serve never takes the socket from an old one that can, and during a surge there is no moment in which a
//! client finds nobody. Two agents may change places more than once: the program of an old pod that ends is started again beside the new
//! pod, takes the socket, and has it when the controller takes the old pod away. Whoever is left then has it again.
//!
//! A predecessor is healthy while it answers `grpc.health.v1` on the socket. Nothing polls: the connection on which it was asked is kept, and
//! its end says that the predecessor has gone; and the kernel tells when the name leads elsewhere.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use agent_runtime::readiness::{Guard, Readiness};
use futures::future::{BoxFuture, OptionFuture};
use sds_server::grpc::client;
use tokio::{net::UnixListener, sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tracing::{error, info};
use unix_peer::listener::{self, Bound, BoundPath, Prepared};

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::handover";

/// Where the socket's path comes from.
const FIELD: &str = "sockets.shared.path";
/// A predecessor that does not answer within this time serves nobody.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(2);
/// What is awaited, in the answer to `/readyz?verbose`.
pub const AWAITED: &str = "the socket, which a healthy predecessor serves until all else is in sync";

/// Another process that serves.
struct Predecessor {
    gone: BoxFuture<'static, ()>,
}

/// Our claim on the name.
#[derive(Debug)]
pub struct SocketLease {
    spec: SocketSpec,
    readiness: Readiness,
    role: Role,
}

/// The name and its mode.
#[derive(Debug)]
struct SocketSpec {
    path: PathBuf,
    mode: u32,
}

/// Whose turn it is.
enum Role {
    Active(Bound),
    Standby(Waiting),
}

struct Waiting {
    predecessor: Predecessor,
    /// What was bound at the start, where errors end the process. Later on it is bound when its turn has come.
    prepared: Option<(UnixListener, Prepared)>,
    /// Of a readiness that has not been reached. Who has reached it, and lost the name, does not go before the one that has it.
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
    /// Binds beside `path`, with permission bits `mode`, and takes the name unless a healthy predecessor serves it. `readiness` is not
    /// reached before the name is taken.
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
        Ok(Self { spec: SocketSpec { path: path.to_owned(), mode }, readiness: readiness.clone(), role })
    }

    /// Whether the name is held.
    pub fn is_held(&self) -> bool {
        matches!(self.role, Role::Active(_))
    }

    /// Has the name, whenever it is our turn, until `end`; gives it if it is ours then. What is to be accepted from is sent to `open` each
    /// time the name is taken; nobody new comes to an earlier one.
    pub async fn keep(self, end: CancellationToken, open: mpsc::Sender<UnixListener>) -> Option<BoundPath> {
        let Self { spec, readiness, mut role } = self;
        loop {
            let bound = match role {
                Role::Active(bound) => bound,
                Role::Standby(waiting) => end.run_until_cancelled(waiting.take_over(&spec, &readiness)).await??,
            };
            let Bound { listener, name } = bound;
            // Who accepts ends with the process.
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
    /// What is next when the name leads elsewhere.
    async fn superseded(&self, readiness: &Readiness) -> Option<Role> {
        let Some(predecessor) = find_predecessor(&self.path).await else {
            info!(target: LOG_TARGET, socket = %self.path.display(), "the socket has lost its name, and nobody serves it");
            return self.bind().map(Role::Active);
        };
        info!(target: LOG_TARGET, socket = %self.path.display(), "another agent has taken the socket; it is taken back when that one goes");
        let guard = (!readiness.is_ready()).then(|| readiness.guard(AWAITED));
        Some(Role::Standby(Waiting { predecessor, prepared: None, guard }))
    }

    fn bind(&self) -> Option<Bound> {
        self.log_outcome(listener::bind_for(FIELD, &self.path, self.mode))
    }

    fn log_outcome(&self, bound: Result<Bound, listener::Error>) -> Option<Bound> {
        match &bound {
            Ok(_) => info!(target: LOG_TARGET, socket = %self.path.display(), "the socket is ours"),
            Err(cause) => error!(target: LOG_TARGET, %cause, "the socket cannot be taken over"),
        }
        bound.ok()
    }
}

impl Waiting {
    /// Takes the name when it is our turn; none where it cannot be had.
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
                        info!(target: LOG_TARGET, "the predecessor has gone; taking the socket");
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
            // Never ready: the rollout stops, and the predecessor goes on.
            (Some(guard), None) => guard.abandon(),
            (guard, _) => drop(guard),
        }
        bound
    }
}

/// Who serves the socket at `path`, if anybody does.
async fn find_predecessor(path: &Path) -> Option<Predecessor> {
    let ask = async {
        let (connection, driver) = client::connect(path).await.ok()?;
        let driver = tokio::spawn(driver);
        let mut health = HealthClient::with_origin(connection, client::origin());
        let answer = health.check(HealthCheckRequest::default()).await;
        let serves = answer.is_ok_and(|answer| answer.into_inner().status() == ServingStatus::Serving);
        // The connection ends with its last holder, and is held until it ends.
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
