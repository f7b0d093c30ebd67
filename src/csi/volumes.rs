//! Publishes and unpublishes the volumes of pods: makes a directory for each, requests that the agent serves a socket in it, and mounts it.
//!
//! The mount helper needs no agent for either. A volume that is published without an agent has no socket until an agent starts, which
//! finds the directory. Its client waits for the socket, and the kubelet does not wait.
//!
//! Changes of the file system run one at a time on a blocking thread. A change is a few system calls. A change that has started completes,
//! even if its future is dropped. No lock is held during a call to the agent.

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    sync::Arc,
};

use attest_kubernetes::mount::Claim;
use parking_lot::Mutex;
use tonic::{Code, Status};
use tracing::{debug, info, warn};

use super::{
    agent::{Agent, NotServed},
    metrics::Metrics,
    mounts::{self, Mounts},
};
use crate::per_pod::{
    PerPod,
    directory::{self, Root, Scan},
    log::{Cause, VolumeLog},
    turns::Turns,
    volume::{Place, Volume},
};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::csi::volumes";

/// Maximum number of unknown entries of the directory that are logged at the start.
const MAX_STRAYS: usize = 10;

/// A volume cannot be published or unpublished.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory of the volume cannot be used.
    #[error(transparent)]
    Directory(#[from] directory::Error),
    /// The directory cannot be mounted or unmounted.
    #[error(transparent)]
    Mount(#[from] mounts::Error),
    /// The volume is published for another pod or service account.
    #[error("the volume is published already, for another pod name, namespace or service account")]
    OtherClaim,
    /// Another call for the volume is in progress. The kubelet repeats the call.
    #[error("another call for this volume is in progress")]
    InProgress,
    /// The agent refuses to serve the socket.
    #[error("{1}")]
    Refused(Code, String),
    /// The runtime is shutting down.
    #[error("the mount helper is ending")]
    Ending,
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Directory(directory::Error::OtherSocket(_)) | Error::OtherClaim => Self::already_exists(text),
            Error::Directory(directory::Error::Unsafe { .. })
            | Error::Mount(mounts::Error::NoParent(_) | mounts::Error::Occupied { .. }) => Self::failed_precondition(text),
            Error::Directory(directory::Error::Io { .. }) | Error::Mount(mounts::Error::Io { .. }) => Self::internal(text),
            Error::Refused(code, text) => Self::new(code, text),
            // The code of CSI for this case.
            Error::InProgress => Self::aborted(text),
            Error::Ending => Self::unavailable(text),
        }
    }
}

/// The volumes of all pods. Clones share them.
#[derive(Debug, Clone)]
pub struct Volumes(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    files: Files,
    agent: Agent,
    book: Mutex<Book>,
    turns: Turns,
    metrics: Metrics,
    log: VolumeLog,
}

/// The directories and mounts.
#[derive(Debug)]
struct Files {
    root: Root,
    mounts: Mounts,
}

#[derive(Debug, Default)]
struct Book {
    /// Volumes that this process has published, and for which pods.
    published: HashMap<Place, Claim>,
    /// Volumes with a call in progress.
    in_progress: HashSet<Place>,
    /// Volumes of an earlier process, which the kubelet has neither published again nor unpublished since.
    inherited: HashSet<Place>,
}

impl Book {
    /// The number of published volumes.
    fn count(&self) -> usize {
        self.published.len() + self.inherited.len()
    }
}

/// Ends the call for a volume when dropped.
struct InProgress(Arc<Shared>, Place);

impl Drop for InProgress {
    fn drop(&mut self) {
        self.0.book.lock().in_progress.remove(&self.1);
    }
}

impl Volumes {
    /// Opens the directory, and mounts its view.
    ///
    /// # Errors
    ///
    /// The directory cannot be used, or the view cannot be mounted.
    pub fn open(config: &PerPod, metrics: Metrics) -> Result<Self, Error> {
        let root = Root::open(&config.directory)?;
        let mounts = Mounts::new(config);
        mounts.prepare()?;
        mounts.check_propagation();
        let Scan { found, strays, empty } = root.scan()?;
        let more = strays.len().saturating_sub(MAX_STRAYS);
        for stray in strays.iter().take(MAX_STRAYS) {
            warn!(target: LOG_TARGET, cause = %stray, more, "not a socket's directory");
        }
        // An interrupted publish left the pod's directory empty.
        empty.iter().for_each(|uid| root.remove_pod(uid));
        root.remove_former_view();
        let book = Book { inherited: found.into_iter().map(|found| found.place).collect(), ..Book::default() };
        metrics.published(book.count());
        let agent = Agent::new(config.helper_socket(), config.wait_for_certificate);
        let (files, book, turns, log) = (Files { root, mounts }, Mutex::new(book), Turns::default(), VolumeLog::default());
        Ok(Self(Arc::new(Shared { files, agent, book, turns, metrics, log })))
    }

    /// Limits the log lines about volumes.
    pub(super) fn log(&self) -> &VolumeLog {
        &self.0.log
    }

    /// The agent.
    pub(super) fn agent(&self) -> &Agent {
        &self.0.agent
    }

    /// The volumes that an earlier process published, and that the kubelet has not published again or unpublished since.
    pub fn inherited(&self) -> HashSet<Place> {
        self.0.book.lock().inherited.clone()
    }

    /// Publishes a volume. One that is published already stays as it is. The agent is called each time, because it may have started since.
    ///
    /// # Errors
    ///
    /// See [`Error`]. A volume that was not published before is removed again.
    pub async fn publish(&self, volume: Volume) -> Result<(), Error> {
        let volumes = self.clone();
        self.exclusive(volume.place.clone(), async move { volumes.publish_volume(volume).await }).await
    }

    /// Runs `call`, unless another call for the volume is in progress. It completes, even if this future is dropped.
    async fn exclusive(&self, place: Place, call: impl Future<Output = Result<(), Error>> + Send + 'static) -> Result<(), Error> {
        if !self.0.book.lock().in_progress.insert(place.clone()) {
            return Err(Error::InProgress);
        }
        let in_progress = InProgress(self.0.clone(), place);
        let done = tokio::spawn(async move {
            let _in_progress = in_progress;
            call.await
        });
        done.await.map_err(|_| Error::Ending)?
    }

    async fn publish_volume(&self, volume: Volume) -> Result<(), Error> {
        let known = self.0.book.lock().published.get(&volume.place).cloned();
        if known.as_ref().is_some_and(|claim| *claim != volume.claim) {
            return Err(Error::OtherClaim);
        }
        let asked = volume.clone();
        let leaf = self.in_turn(move |files| Ok(files.root.make(&asked.place, &asked.socket)?)).await?;
        let unavailable = match self.0.agent.serve(&volume).await {
            Ok(()) => None,
            Err(NotServed::Unavailable(cause)) => Some(cause),
            Err(NotServed::Refused(code, cause)) => {
                if leaf.is_new {
                    self.discard(&volume.place).await;
                }
                return Err(Error::Refused(code, cause));
            }
        };
        let (asked, is_new) = (volume.place.clone(), leaf.is_new);
        if let Err(error) = self.in_turn(move |files| Ok(files.mounts.attach(&asked, &leaf)?)).await {
            if is_new {
                self.0.agent.withdraw(&volume.place).await;
                self.discard(&volume.place).await;
            }
            return Err(error);
        }
        self.report(&volume, unavailable.as_deref(), known.is_none());
        let mut book = self.0.book.lock();
        book.inherited.remove(&volume.place);
        book.published.insert(volume.place, volume.claim);
        self.0.metrics.published(book.count());
        Ok(())
    }

    /// Logs and counts a published volume. `unavailable` is the cause if the agent does not serve it.
    fn report(&self, volume: &Volume, unavailable: Option<&str>, is_new: bool) {
        let (pod, place) = (&volume.claim.pod, &volume.place);
        if let Some(cause) = unavailable {
            self.0.metrics.agent_unavailable();
            if let Some(left_out) = self.0.log.permit(Cause::NotServed(place.clone())) {
                warn!(
                    target: LOG_TARGET, %pod, pod_uid = %place.uid, volume = %place.volume,
                    cause, left_out,
                    "volume published without a socket: the agent does not serve it yet"
                );
            }
        } else if is_new && let Some(left_out) = self.0.log.permit(Cause::Published(place.clone())) {
            info!(target: LOG_TARGET, %pod, pod_uid = %place.uid, volume = %place.volume, left_out, "volume published");
        }
    }

    /// Removes the directory of a volume that is not published.
    async fn discard(&self, place: &Place) {
        let asked = place.clone();
        let removed = self.in_turn(move |files| Ok(files.root.remove(&asked)?)).await;
        if let Err(cause) = removed
            && let Some(left_out) = self.0.log.permit(Cause::NotCleared(place.clone()))
        {
            warn!(target: LOG_TARGET, %cause, left_out, "cannot remove the directory of a volume that was not published");
        }
    }

    /// Unpublishes a volume. One that is not published is not an error.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub async fn unpublish(&self, place: Place) -> Result<(), Error> {
        let volumes = self.clone();
        self.exclusive(place.clone(), async move { volumes.remove(place, false).await }).await
    }

    /// Unpublishes a volume whose pod has ended, according to the agent. A mount that is not of this driver stays, because the agent could
    /// name the volume of another driver.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub async fn unpublish_ended(&self, place: Place) -> Result<(), Error> {
        let volumes = self.clone();
        self.exclusive(place.clone(), async move { volumes.remove(place, true).await }).await
    }

    async fn remove(&self, place: Place, only_own: bool) -> Result<(), Error> {
        // The agent stops serving first; then the mount and the directory are removed, in the reverse order of `publish`.
        self.0.agent.withdraw(&place).await;
        let asked = place.clone();
        let removed = self.in_turn(move |files| {
            if only_own {
                files.mounts.detach_own(&asked, files.root.find_any(&asked)?)?;
            } else {
                files.mounts.detach(&asked)?;
            }
            match files.root.remove(&asked) {
                // The volume is neither mounted nor served, so the pod's end must not wait for a directory that is not the driver's.
                Err(cause @ directory::Error::Unsafe { .. }) => Ok(Some(cause)),
                removed => removed.map(|()| None).map_err(Error::from),
            }
        });
        let stays = removed.await?;
        let was_known = {
            let mut book = self.0.book.lock();
            let was_known = book.published.remove(&place).is_some() | book.inherited.remove(&place);
            self.0.metrics.published(book.count());
            was_known
        };
        let Place { uid, volume } = &place;
        match stays {
            Some(cause) => {
                if let Some(left_out) = self.0.log.permit(Cause::DirectoryStays(place.clone())) {
                    warn!(target: LOG_TARGET, pod_uid = %uid, %volume, %cause, left_out, "unpublished; its directory stays");
                }
            }
            None if was_known => {
                if let Some(left_out) = self.0.log.permit(Cause::Unpublished(place.clone())) {
                    info!(target: LOG_TARGET, pod_uid = %uid, %volume, left_out, "volume unpublished");
                }
            }
            None => debug!(target: LOG_TARGET, pod_uid = %uid, %volume, "unpublished; it was not published"),
        }
        Ok(())
    }

    /// Unmounts the view when the mount helper ends. Directories and mounts stay, because pods use them.
    pub async fn finish(&self) {
        let _ = self
            .in_turn(|files| {
                files.mounts.finish();
                Ok(())
            })
            .await;
    }

    async fn in_turn<T: Send + 'static>(&self, change: impl FnOnce(&Files) -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
        let shared = self.0.clone();
        self.0.turns.run(move || change(&shared.files)).await.ok_or(Error::Ending)?
    }
}
