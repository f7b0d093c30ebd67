//! Publishes and unpublishes the sockets of pods, and serves them again after a restart.
//!
//! Owns the socket of each volume. Changes run one at a time on a blocking thread. A change is a few system calls and does not wait for
//! the API server or an issuer; neither does the lock of the book. A change that has started completes, even if its future is dropped.

use std::{collections::HashMap, path::Path, sync::Arc};

use agent_runtime::shutdown::Shutdown;
use attest_kubernetes::{
    mount::{Claim, MountAttestor},
    pods::Pods,
};
use parking_lot::{Mutex, MutexGuard};
use sds_server::{caller::Authenticator, session::Sessions};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{debug, error, info, warn};
use unix_peer::listener;

use super::{
    directory::{self, Found, Root},
    log::{Cause, VolumeLog},
    metrics::Metrics,
    mounts::{self, Mounts},
    volume::{Place, Volume},
};
use crate::{csi::PerPod, warm::Prefetcher};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::csi::sockets";

const FIELD: &str = "sockets.perPod.directory";
/// Any user may connect, because containers of the pod may run as any user.
const SOCKET_MODE: u32 = 0o666;
/// Maximum of connections to one pod's socket, far above those of its proxies with reconnects.
const CONNECTIONS: usize = 256;

/// A volume cannot be published or unpublished.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory of the volume cannot be used.
    #[error(transparent)]
    Directory(#[from] directory::Error),
    /// The directory cannot be mounted or unmounted.
    #[error(transparent)]
    Mount(#[from] mounts::Error),
    /// The socket cannot be bound.
    #[error(transparent)]
    Socket(#[from] listener::Error),
    /// The volume is published for another pod or service account.
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
            Error::Directory(directory::Error::Unsafe { .. })
            | Error::Mount(mounts::Error::NoParent(_) | mounts::Error::Occupied { .. }) => Self::failed_precondition(text),
            Error::Directory(directory::Error::Io { .. }) | Error::Mount(mounts::Error::Io { .. }) | Error::Socket(_) => {
                Self::internal(text)
            }
            Error::Ending => Self::unavailable(text),
        }
    }
}

/// The sockets of all volumes. Clones share them.
#[derive(Debug, Clone)]
pub struct Sockets(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    root: Root,
    mounts: Mounts,
    book: Mutex<HashMap<Place, Live>>,
    turn: Arc<Semaphore>,
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
    /// Whether this process has published it.
    is_published: bool,
}

impl Live {
    /// Whether this process serves the socket that `volume` requests.
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

/// A volume that is published, and whose certificate may still be on order.
#[derive(Debug, Clone)]
pub struct Published {
    /// Cancelled when the certificate is there.
    pub issued: CancellationToken,
}

impl Sockets {
    /// Opens the directory and serves the sockets that are published in it. Every socket uses `sessions` with its own attestor.
    ///
    /// # Errors
    ///
    /// The directory cannot be used, or the view cannot be mounted. A single socket that cannot be served is logged.
    pub fn open(config: &PerPod, pods: Pods, sessions: Sessions, warmer: Prefetcher, metrics: Metrics) -> Result<Self, Error> {
        let root = Root::open(&config.directory)?;
        let mounts = Mounts::new(&config.directory, &config.kubelet_directory);
        mounts.prepare()?;
        mounts.check_propagation();
        let (book, turn) = (Mutex::default(), Arc::new(Semaphore::new(1)));
        let sockets = Self(Arc::new(Shared { root, mounts, book, turn, pods, sessions, warmer, metrics, log: VolumeLog::default() }));
        sockets.rebuild()?;
        Ok(sockets)
    }

    /// Binds sockets in the existing directories, because pods have mounted their inodes.
    fn rebuild(&self) -> Result<(), Error> {
        let (found, strays) = self.0.root.scan()?;
        for stray in strays {
            warn!(target: LOG_TARGET, cause = %stray, "not a socket's directory");
        }
        let mut served = 0;
        for Found { place, socket, path } in found {
            let bound = directory::clear_unfinished(&path).map_err(Error::from).and_then(|()| {
                let leaf = self.0.root.make(&place, &socket)?;
                self.0.serve(&place, &leaf.path.join(&*socket), leaf.id, None, false)
            });
            match bound {
                Ok(_) => served += 1,
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

    /// Limits the log lines about volumes.
    pub(super) fn log(&self) -> &VolumeLog {
        &self.0.log
    }

    /// The pod index.
    pub fn pods(&self) -> &Pods {
        &self.0.pods
    }

    /// Whether the volume is published and mounted already, exactly as requested.
    pub async fn is_published(&self, volume: &Volume) -> Result<bool, Error> {
        let volume = volume.clone();
        self.on_a_thread(move |shared| {
            let leaf = match shared.book().get(&volume.place) {
                Some(live) if live.is(&volume) => live.leaf,
                _ => return Ok(false),
            };
            Ok(shared.mounts.is_attached(&volume.place, leaf)?)
        })
        .await
    }

    /// Publishes a volume. One that is published already stays as it is.
    pub async fn publish(&self, volume: Volume) -> Result<Published, Error> {
        self.in_turn(move |shared| shared.publish(&volume)).await
    }

    /// Unpublishes a volume. One that is not published is not an error.
    pub async fn unpublish(&self, place: Place) -> Result<(), Error> {
        self.in_turn(move |shared| shared.unpublish(&place)).await
    }

    /// The volumes that an earlier process published, and that the kubelet has not published again or unpublished since.
    pub fn inherited(&self) -> Vec<Place> {
        self.0.book().iter().filter(|(_, live)| !live.is_published).map(|(place, _)| place.clone()).collect()
    }

    /// Removes the sockets' names when the agent ends. Directories and mounts stay, because pods use them.
    pub async fn unlink_if_owned(&self) {
        let released = self.in_turn(|shared| {
            for (_, live) in shared.book().drain() {
                live.name.unlink_if_owned();
            }
            shared.mounts.finish();
            Ok(())
        });
        let _ = released.await;
    }

    async fn in_turn<T: Send + 'static>(&self, change: impl FnOnce(&Shared) -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
        let turn = self.0.turn.clone().acquire_owned().await.map_err(|_| Error::Ending)?;
        self.on_a_thread(move |shared| {
            let _turn = turn;
            change(shared)
        })
        .await
    }

    async fn on_a_thread<T: Send + 'static>(&self, work: impl FnOnce(&Shared) -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
        let shared = self.0.clone();
        tokio::task::spawn_blocking(move || work(&shared)).await.map_err(|_| Error::Ending)?
    }
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, HashMap<Place, Live>> {
        self.book.lock()
    }

    fn publish(&self, volume: &Volume) -> Result<Published, Error> {
        let place = &volume.place;
        let known = self.book().get(place).map(|live| live.attestor.claim());
        if known.flatten().is_some_and(|claim| claim != volume.claim) {
            return Err(Error::OtherClaim);
        }
        let leaf = self.root.make(place, &volume.socket)?;
        let made = self.publish_in(volume, &leaf);
        if made.is_err() && leaf.is_new {
            self.forget(place);
            if let Err(cause) = self.root.remove(place)
                && let Some(left_out) = self.log.permit(Cause::NotCleared(place.clone()))
            {
                warn!(target: LOG_TARGET, %cause, left_out, "cannot remove the directory of a volume that was not published");
            }
        }
        made
    }

    fn publish_in(&self, volume: &Volume, leaf: &directory::Leaf) -> Result<Published, Error> {
        let place = &volume.place;
        let (attestor, is_known) = {
            let mut book = self.book();
            // A socket whose name or directory was replaced or removed is bound again.
            let live = book.get_mut(place).filter(|live| live.name.is_owned() && live.leaf == leaf.id);
            match live {
                Some(live) => {
                    live.attestor.set_claim(volume.claim.clone());
                    live.is_published = true;
                    (live.attestor.clone(), true)
                }
                None => {
                    drop(book);
                    (self.serve(place, &leaf.path.join(&*volume.socket), leaf.id, Some(volume.claim.clone()), true)?, false)
                }
            }
        };
        if let Err(error) = self.mounts.attach(place, leaf) {
            if !is_known {
                self.forget(place);
            }
            return Err(error.into());
        }
        let issued = CancellationToken::new();
        if is_known {
            // The pod holds a certificate or requests one: the agent does not order certificates ahead of calls after a restart.
            issued.cancel();
        } else {
            self.warmer.published(attestor, issued.clone());
            if let Some(left_out) = self.log.permit(Cause::Published(place.clone())) {
                let (pod, socket) = (&volume.claim.pod, &volume.socket);
                info!(target: LOG_TARGET, %pod, pod_uid = %place.uid, volume = %place.volume, %socket, left_out, "socket published");
            }
        }
        Ok(Published { issued })
    }

    /// Binds the socket and starts to serve it.
    fn serve(
        &self,
        place: &Place,
        path: &Path,
        leaf: (u64, u64),
        claim: Option<Claim>,
        is_published: bool,
    ) -> Result<Arc<MountAttestor>, Error> {
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
        let live = Live { name: bound.name, leaf, attestor: attestor.clone(), shutdown, ending, is_published };
        let mut book = self.book();
        book.insert(place.clone(), live);
        self.metrics.sockets(book.len());
        Ok(attestor)
    }

    fn unpublish(&self, place: &Place) -> Result<(), Error> {
        // Stops serving first, and then removes the mount and the directory, in the reverse order of `publish`.
        let was_served = self.forget(place);
        self.mounts.detach(place)?;
        match self.root.remove(place) {
            Ok(()) if was_served => {
                if let Some(left_out) = self.log.permit(Cause::Unpublished(place.clone())) {
                    info!(target: LOG_TARGET, pod_uid = %place.uid, volume = %place.volume, left_out, "socket unpublished");
                }
            }
            Ok(()) => debug!(target: LOG_TARGET, pod_uid = %place.uid, volume = %place.volume, "unpublished; it was not served"),
            // The volume is neither mounted nor served, so the pod's end must not wait for a directory that is not the agent's.
            Err(cause @ directory::Error::Unsafe { .. }) => {
                if let Some(left_out) = self.log.permit(Cause::DirectoryStays(place.clone())) {
                    warn!(target: LOG_TARGET, pod_uid = %place.uid, volume = %place.volume, %cause, left_out, "unpublished; its directory stays");
                }
            }
            Err(cause) => return Err(cause.into()),
        }
        Ok(())
    }

    fn forget(&self, place: &Place) -> bool {
        let mut book = self.book();
        let live = book.remove(place);
        self.metrics.sockets(book.len());
        drop(book);
        live.inspect(|live| live.name.unlink_if_owned()).is_some()
    }
}
