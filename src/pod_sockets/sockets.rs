//! Binds and serves the sockets of pods.
//!
//! Owns the socket of each volume. Changes run one at a time on a blocking thread. A change is a few system calls and does not wait for
//! the API server or an issuer; neither does the lock of the book. A change that has started completes, even if its future is dropped.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Weak},
};

use agent_runtime::shutdown::Shutdown;
use attest_kubernetes::{
    mount::{Claim, MountAttestor},
    pods::Pods,
};
use parking_lot::{Mutex, MutexGuard};
use sds_server::{caller::Authenticator, session::Sessions};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{debug, error, info};
use unix_peer::listener;

use super::metrics::Metrics;
use crate::{
    per_pod::{
        PerPod,
        directory::{self, Found, Leaf, Root},
        log::{Cause, VolumeLog},
        turns::Turns,
        volume::{Place, Volume},
    },
    warm::Prefetcher,
};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::pod_sockets";

const FIELD: &str = "sockets.perPod.directory";
/// Any user may connect, because containers of the pod may run as any user.
const SOCKET_MODE: u32 = 0o666;
/// Maximum of connections to one pod's socket, far above those of its proxies with reconnects.
const CONNECTIONS: usize = 256;

/// The socket of a volume cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory of the volume cannot be used.
    #[error(transparent)]
    Directory(#[from] directory::Error),
    /// The socket cannot be bound.
    #[error(transparent)]
    Socket(#[from] listener::Error),
    /// The volume is served for another pod or service account.
    #[error("the volume is published already, for another pod name, namespace or service account")]
    OtherClaim,
    /// The runtime is shutting down.
    #[error("the agent is ending")]
    Ending,
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Directory(directory::Error::OtherSocket(_)) | Error::OtherClaim => Self::already_exists(text),
            Error::Directory(directory::Error::Unsafe { .. }) => Self::failed_precondition(text),
            // The mount helper repeats the call when the kubelet does.
            Error::Directory(directory::Error::Io { .. }) | Error::Socket(_) | Error::Ending => Self::unavailable(text),
        }
    }
}

/// The sockets of all volumes. Clones share them.
#[derive(Debug, Clone)]
pub struct Sockets(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    root: Root,
    book: Mutex<HashMap<Place, Live>>,
    turns: Turns,
    pods: Pods,
    sessions: Sessions,
    warmer: Prefetcher,
    metrics: Metrics,
    log: VolumeLog,
}

/// A socket that is served. Dropping it ends its connections; `unlink_if_owned` removes its name.
#[derive(Debug)]
struct Live {
    name: listener::BoundPath,
    leaf: (u64, u64),
    attestor: Arc<MountAttestor>,
    shutdown: Shutdown,
    ending: CancellationToken,
}

impl Live {
    /// Whether this is the socket that `volume` requests.
    fn is(&self, volume: &Volume) -> bool {
        self.attestor.claim().as_ref() == Some(&volume.claim)
            && self.name.path().file_name().is_some_and(|name| name == &*volume.socket)
            && self.name.is_owned()
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.shutdown.drain.cancel();
        self.attestor.terminated().cancel();
        self.ending.cancel();
        // The containers of the pod have ended, so no client waits for a final response.
        self.shutdown.abort.cancel();
    }
}

/// A volume whose socket is served, and whose certificate may still be on order.
#[derive(Debug, Clone)]
pub struct Served {
    /// Cancelled when the certificate is there.
    pub issued: CancellationToken,
}

impl Sockets {
    /// Opens the directory. Every socket uses `sessions` with its own attestor.
    ///
    /// # Errors
    ///
    /// The directory cannot be used.
    pub fn open(config: &PerPod, pods: Pods, sessions: Sessions, warmer: Prefetcher, metrics: Metrics) -> Result<Self, Error> {
        let root = Root::open(&config.directory)?;
        let (book, turns, log) = (Mutex::default(), Turns::default(), VolumeLog::default());
        Ok(Self(Arc::new(Shared { root, book, turns, pods, sessions, warmer, metrics, log })))
    }

    /// Binds sockets in the existing directories, because pods have mounted their inodes. A socket that cannot be served is logged.
    ///
    /// # Errors
    ///
    /// The directory cannot be read.
    pub fn serve_all(&self) -> Result<(), Error> {
        let mut served = 0;
        for Found { place, socket, path } in self.0.root.scan()?.found {
            let bound = directory::clear_unfinished(&path).map_err(Error::from).and_then(|()| {
                let leaf = self.0.root.find(&place, &socket)?;
                self.0.bind(&place, &socket, &leaf, None)
            });
            match bound {
                Ok(attestor) => {
                    served += 1;
                    // The attestor follows its pod from the first answer on, and no client may ever call.
                    tokio::spawn(async move { drop(attestor.workload().await) });
                }
                Err(cause) => {
                    error!(target: LOG_TARGET, pod_uid = %place.uid, volume = %place.volume, %cause, "the socket of a pod cannot be served again");
                }
            }
        }
        if served > 0 {
            info!(target: LOG_TARGET, sockets = served, directory = %self.0.root.path().display(), "sockets of pods are served again");
        }
        Ok(())
    }

    /// The pod index.
    pub fn pods(&self) -> &Pods {
        &self.0.pods
    }

    /// Whether the socket is served already, exactly as requested.
    pub async fn is_served(&self, volume: &Volume) -> Result<bool, Error> {
        let (shared, volume) = (self.0.clone(), volume.clone());
        let is_served = move || shared.book().get(&volume.place).is_some_and(|live| live.is(&volume));
        tokio::task::spawn_blocking(is_served).await.map_err(|_| Error::Ending)
    }

    /// Serves the socket of a volume. One that is served already stays as it is.
    pub async fn serve(&self, volume: Volume) -> Result<Served, Error> {
        self.in_turn(move |shared| shared.serve(&volume)).await
    }

    /// Stops serving a volume. One that is not served is not an error.
    pub async fn withdraw(&self, place: Place) -> Result<(), Error> {
        self.in_turn(move |shared| {
            shared.forget(&place);
            Ok(())
        })
        .await
    }

    /// Removes the sockets' names when the agent ends. Directories stay, because pods have them mounted.
    pub async fn unlink_if_owned(&self) {
        let released = self.in_turn(|shared| {
            for (_, live) in shared.book().drain() {
                live.name.unlink_if_owned();
            }
            Ok(())
        });
        let _ = released.await;
    }

    async fn in_turn<T: Send + 'static>(&self, change: impl FnOnce(&Arc<Shared>) -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
        let shared = self.0.clone();
        self.0.turns.run(move || change(&shared)).await.ok_or(Error::Ending)?
    }
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, HashMap<Place, Live>> {
        self.book.lock()
    }

    fn serve(self: &Arc<Self>, volume: &Volume) -> Result<Served, Error> {
        let place = &volume.place;
        let known = self.book().get(place).map(|live| live.attestor.claim());
        if known.flatten().is_some_and(|claim| claim != volume.claim) {
            return Err(Error::OtherClaim);
        }
        let leaf = self.root.find(place, &volume.socket)?;
        let issued = CancellationToken::new();
        {
            let book = self.book();
            // A socket whose name or directory was replaced or removed is bound again.
            if let Some(live) = book.get(place).filter(|live| live.name.is_owned() && live.leaf == leaf.id) {
                live.attestor.set_claim(volume.claim.clone());
                // The pod holds a certificate or requests one: the agent does not order certificates ahead of calls after a restart.
                issued.cancel();
                return Ok(Served { issued });
            }
        }
        let attestor = self.bind(place, &volume.socket, &leaf, Some(volume.claim.clone()))?;
        self.warmer.published(attestor, issued.clone());
        if let Some(left_out) = self.log.permit(Cause::Published(place.clone())) {
            let (pod, socket) = (&volume.claim.pod, &volume.socket);
            info!(target: LOG_TARGET, %pod, pod_uid = %place.uid, volume = %place.volume, %socket, left_out, "socket published");
        }
        Ok(Served { issued })
    }

    /// Binds the socket and starts to serve it.
    fn bind(self: &Arc<Self>, place: &Place, socket: &str, leaf: &Leaf, claim: Option<Claim>) -> Result<Arc<MountAttestor>, Error> {
        let path: &Path = &leaf.path.join(socket);
        let bound = listener::bind_for(FIELD, path, SOCKET_MODE)?;
        let template = &self.sessions;
        let (shutdown, ending) = (template.shutdown.part(), template.ending.child_token());
        let attestor =
            Arc::new(MountAttestor::new(self.pods.clone(), place.uid.clone(), place.volume.clone(), claim, CancellationToken::new()));
        let mut sessions = Sessions {
            authenticator: Authenticator { attestor: attestor.clone(), ..template.authenticator.clone() },
            shutdown: shutdown.clone(),
            ending: ending.clone(),
            ..template.clone()
        };
        sessions.limits.connections = sessions.limits.connections.min(CONNECTIONS);
        tokio::spawn(sessions.accept(bound.listener));
        tokio::spawn(forget_ended(Arc::downgrade(self), place.clone(), attestor.clone()));
        let live = Live { name: bound.name, leaf: leaf.id, attestor: attestor.clone(), shutdown, ending };
        let mut book = self.book();
        book.insert(place.clone(), live);
        self.metrics.sockets(book.len());
        Ok(attestor)
    }

    fn forget(&self, place: &Place) {
        let mut book = self.book();
        let live = book.remove(place);
        self.metrics.sockets(book.len());
        drop(book);
        let Some(live) = live else { return };
        live.name.unlink_if_owned();
        if let Some(left_out) = self.log.permit(Cause::Unpublished(place.clone())) {
            info!(target: LOG_TARGET, pod_uid = %place.uid, volume = %place.volume, left_out, "socket unpublished");
        }
    }
}

/// Closes the socket of a pod that has ended, in case that the mount helper does not withdraw it.
async fn forget_ended(shared: Weak<Shared>, place: Place, attestor: Arc<MountAttestor>) {
    attestor.terminated().cancelled().await;
    let Some(shared) = shared.upgrade() else { return };
    let sockets = Sockets(shared);
    let ended = sockets.in_turn(move |shared| {
        // A socket that was served for the place since then stays: changes have their turn.
        let is_same = shared.book().get(&place).is_some_and(|live| Arc::ptr_eq(&live.attestor, &attestor));
        if is_same {
            debug!(target: LOG_TARGET, pod_uid = %place.uid, volume = %place.volume, "the pod has ended");
            shared.forget(&place);
        }
        Ok(())
    });
    let _ = ended.await;
}
