//! The caller of one connection: attested when it first asks for something, once.
//!
//! The socket's side of the HTTP/2 handshake never waits for this: a client that only connects is answered at once.

use std::{sync::Arc, time::Instant};

use tokio::sync::{Notify, OnceCell, watch};
use tonic::Status;
use tracing::{debug, warn};

use crate::{
    attest::{self, Attested, Attestor, Reason, origin::Origin},
    identity::{Identity, Resolver},
    peer::Peer,
    telemetry::hush::Hush,
};

/// A proven caller and what it may have.
#[derive(Debug)]
pub struct Caller {
    /// Who it is; `attested.gone` ends its streams.
    pub attested: Attested,
    /// What it may have.
    pub identity: Arc<Identity>,
}

/// Attests and names callers; one for each socket.
#[derive(Debug, Clone)]
pub struct Desk {
    /// How callers of this socket are known.
    pub attestor: Arc<dyn Attestor>,
    /// How they are named.
    pub resolver: watch::Receiver<Arc<Resolver>>,
    /// What is counted.
    pub metrics: attest::Metrics,
}

/// One connection's caller, not yet known or known.
#[derive(Debug)]
pub struct Connection {
    peer: Peer,
    desk: Desk,
    caller: OnceCell<Arc<Caller>>,
    known: Notify,
    origin: Origin,
    refusals: Arc<Refusals>,
}

/// What the log has been told about callers that are refused, by where they come from and why.
pub type Refusals = Hush<(Origin, &'static str)>;

/// What a caller that can never be served is told. The cause goes to the log.
const REFUSED: &str = "no identity is available to this caller";
/// What a caller that cannot be judged now is told.
const LATER: &str = "the caller cannot be identified right now";

impl Connection {
    /// A fresh connection of `peer`.
    pub fn new(peer: Peer, desk: Desk) -> Self {
        let origin = Origin::User(peer.uid);
        Self { peer, desk, caller: OnceCell::new(), known: Notify::new(), origin, refusals: Arc::default() }
    }

    /// The same, one of several that come from `origin` and are told of in one place.
    pub fn coming_from(self, origin: Origin, refusals: Arc<Refusals>) -> Self {
        Self { origin, refusals, ..self }
    }

    /// The peer.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Who is calling. The first call attests, and may wait as long as the attestor does; failures are not remembered.
    pub async fn caller(&self) -> Result<Arc<Caller>, Status> {
        let caller = self.caller.get_or_try_init(|| async {
            let start = Instant::now();
            let result = self.identify().await;
            self.desk.metrics.observe(self.desk.attestor.method(), result.as_ref().map(|_| ()), start.elapsed().as_secs_f64());
            match &result {
                Ok(caller) => {
                    debug!(peer = ?self.peer, workload = %caller.attested.workload, identity = %caller.identity, "caller attested");
                }
                Err(error) => self.log(error),
            }
            result
                .map(Arc::new)
                .map_err(|error| if error.temporary { Status::unavailable(LATER) } else { Status::permission_denied(REFUSED) })
        });
        let caller = caller.await.cloned();
        // After the cell has been set: who wakes finds it.
        self.known.notify_waiters();
        caller
    }

    async fn identify(&self) -> Result<Caller, attest::Error> {
        let attested = self.desk.attestor.attest(&self.peer).await?;
        let resolver = self.desk.resolver.borrow().clone();
        match resolver.resolve(&attested.workload) {
            Ok(identity) => Ok(Caller { attested, identity: Arc::new(identity) }),
            Err(error) => Err(attest::Error::refused(Reason::no_identity, error.to_string())),
        }
    }

    /// One line for each cause, origin and minute: a caller that tries again and again does not fill the log.
    fn log(&self, error: &attest::Error) {
        match self.refusals.tells((self.origin.clone(), error.reason.as_str()), tokio::time::Instant::now()) {
            Some(0) => warn!(peer = ?self.peer, cause = %error, "caller not served"),
            Some(left_out) => warn!(peer = ?self.peer, origin = %self.origin, left_out, cause = %error, "caller not served"),
            None => debug!(peer = ?self.peer, cause = %error, "caller not served, again"),
        }
    }

    /// Returns when the workload of this connection has ended; never while the caller is unknown.
    pub async fn gone(&self) {
        loop {
            let known = self.known.notified();
            if let Some(caller) = self.caller.get() {
                caller.attested.gone.cancelled().await;
                return;
            }
            known.await;
        }
    }
}
