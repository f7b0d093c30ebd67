//! Taking the shared socket's name: at once where nobody serves it, and from a healthy predecessor only once this process is in sync.
//!
//! So a new version that cannot serve never takes the socket from an old one that can, and during a surge there is no moment in which a
//! client finds nobody. A predecessor is healthy while it answers `grpc.health.v1` on the socket. Nothing polls: the connection on which
//! it was asked is kept, and its end says that the predecessor has gone.

use std::{path::Path, time::Duration};

use futures::future::BoxFuture;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tracing::{error, info};

use crate::{
    grpc::client,
    listener::{Name, Prepared},
    readiness::{Guard, Readiness},
};

/// A predecessor that does not answer within this time serves nobody.
const PATIENCE: Duration = Duration::from_secs(2);
/// What is awaited, in the answer to `/readyz?verbose`.
const AWAITED: &str = "the socket, which a healthy predecessor serves until all else is in sync";

/// A predecessor that serves.
struct Predecessor {
    gone: BoxFuture<'static, ()>,
}

/// Our claim on the name.
#[derive(Debug)]
pub struct Claim(State);

enum State {
    Held(Name),
    Waiting(Waiting),
}

struct Waiting {
    prepared: Prepared,
    predecessor: Predecessor,
    readiness: Readiness,
    guard: Guard,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Held(name) => f.debug_tuple("Held").field(name).finish(),
            Self::Waiting(waiting) => f.debug_tuple("Waiting").field(&waiting.prepared).finish(),
        }
    }
}

impl Claim {
    /// Takes the name of `prepared`, unless a healthy predecessor serves it. `readiness` is not reached before the name is taken.
    pub async fn make(prepared: Prepared, readiness: &Readiness) -> Result<Self, crate::listener::Error> {
        match find(prepared.path()).await {
            None => Ok(Self(State::Held(prepared.take()?))),
            Some(predecessor) => {
                info!(socket = %prepared.path().display(), "a predecessor serves the socket; it is taken over once all else is in sync");
                let guard = readiness.guard(AWAITED);
                Ok(Self(State::Waiting(Waiting { prepared, predecessor, readiness: readiness.clone(), guard })))
            }
        }
    }

    /// Returns once the name is held; none where `end` came first, or it cannot be had.
    pub async fn hold(self, end: CancellationToken) -> Option<Name> {
        let Waiting { prepared, mut predecessor, readiness, guard } = match self.0 {
            State::Held(name) => return Some(name),
            State::Waiting(waiting) => waiting,
        };
        loop {
            tokio::select! {
                biased;
                () = end.cancelled() => return None,
                () = readiness.awaits_only(&guard) => break,
                () = &mut predecessor.gone => match find(prepared.path()).await {
                    Some(next) => predecessor = next,
                    None => {
                        info!("the predecessor has gone; taking the socket before all else is in sync");
                        break;
                    }
                },
            }
        }
        match prepared.take() {
            Ok(name) => {
                info!(socket = %name.path().display(), "the socket is ours");
                drop(guard);
                Some(name)
            }
            Err(cause) => {
                // Never ready: the rollout stops, and the predecessor goes on.
                error!(%cause, "the socket cannot be taken over");
                guard.abandon();
                None
            }
        }
    }
}

/// Who serves the socket at `path`, if anybody does.
async fn find(path: &Path) -> Option<Predecessor> {
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
    timeout(PATIENCE, ask).await.ok().flatten()
}

#[cfg(test)]
mod tests;
