//! The process at the other end of a Unix socket: its credentials and a handle that survives pid reuse.
//!
//! The order matters: take the handle first (here), read evidence about the pid second (`attest`), and ask [`Peer::is_alive`] last.
//! Evidence that was read while the handle lives is about the process that connected, and about no later owner of its pid.
//!
//! Kernels before 6.5 give no handle. There the process that has the pid a moment later is recorded instead; whether it is the one that
//! connected cannot be known, and whoever relies on it has to be told to ([`Peer::is_pinned`]).

use std::{
    fmt, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::Arc,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{getsockopt, sockopt},
        stat::fstat,
    },
};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::procfs_handle::ProcfsHandle;
use crate::fd;

pub mod procfs_handle;

/// Whether this kernel gives a handle on a peer (`SO_PEERPIDFD`, Linux 6.5).
pub fn kernel_pins() -> io::Result<bool> {
    let (socket, _other) = UnixStream::pair()?;
    match getsockopt(&socket, sockopt::PeerPidfd) {
        Ok(_) => Ok(true),
        Err(Errno::ENOPROTOOPT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Credentials at connect time, and the handle.
pub struct Peer {
    /// The process id in our PID namespace; 0 when it is not visible there.
    pub pid: i32,
    /// The effective user id.
    pub uid: u32,
    /// The effective group id.
    pub gid: u32,
    pidfd: Option<Arc<OwnedFd>>,
    procfs_handle: Option<ProcfsHandle>,
    dropped: CancellationToken,
    _drop: DropGuard,
}

impl Peer {
    /// Reads `SO_PEERPIDFD` and `SO_PEERCRED` of a connected socket. Where the kernel gives no handle, it records who has the pid now.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        match getsockopt(socket, sockopt::PeerPidfd) {
            Ok(fd) => Self::with(socket, Some(fd)),
            Err(Errno::ENOPROTOOPT) => Self::recorded(socket, Path::new("/proc")),
            // The process is gone and reaped (ESRCH), or invisible (EINVAL): the credentials tell which.
            Err(Errno::ESRCH | Errno::EINVAL | Errno::ENODATA) => Self::with(socket, None),
            Err(error) => Err(error.into()),
        }
    }

    /// What [`of`](Self::of) does on kernels before 6.5. `proc` is where procfs is mounted.
    pub fn recorded(socket: &impl AsFd, proc: &Path) -> io::Result<Self> {
        let mut peer = Self::with(socket, None)?;
        peer.procfs_handle = ProcfsHandle::take(proc, peer.pid, peer.uid, peer.gid).ok();
        peer.pidfd = peer.procfs_handle.as_ref().and_then(|procfs_handle| procfs_handle.pidfd(peer.pid)).map(Arc::new);
        Ok(peer)
    }

    fn with(socket: &impl AsFd, pidfd: Option<OwnedFd>) -> io::Result<Self> {
        let credentials = getsockopt(socket, sockopt::PeerCredentials)?;
        let dropped = CancellationToken::new();
        let guard = dropped.clone().drop_guard();
        let (pid, uid, gid) = (credentials.pid(), credentials.uid(), credentials.gid());
        Ok(Self { pid, uid, gid, pidfd: pidfd.map(Arc::new), procfs_handle: None, dropped, _drop: guard })
    }

    /// A process that has not connected, for a look at how it would be judged.
    pub fn of_process(pid: i32) -> io::Result<Self> {
        let no_such = || io::Error::from(Errno::ESRCH);
        let handle = procfs_handle::open(pid)?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let (uid, gid) = procfs_handle::effective_ids(&status).ok_or_else(no_such)?;
        let dropped = CancellationToken::new();
        let guard = dropped.clone().drop_guard();
        Ok(Self { pid, uid, gid, pidfd: Some(Arc::new(handle)), procfs_handle: None, dropped, _drop: guard })
    }

    /// A peer for tests that have no socket: no process, no handle.
    #[cfg(any(test, feature = "testing"))]
    pub fn without_process(uid: u32) -> Self {
        let dropped = CancellationToken::new();
        let guard = dropped.clone().drop_guard();
        Self { pid: 0, uid, gid: uid, pidfd: None, procfs_handle: None, dropped, _drop: guard }
    }

    /// Whether there is a handle at all.
    pub fn has_handle(&self) -> bool {
        self.pidfd.is_some() || self.procfs_handle.is_some()
    }

    /// Whether the handle is the kernel's, on the very process that connected.
    pub fn is_pinned(&self) -> bool {
        self.pidfd.is_some() && self.procfs_handle.is_none()
    }

    /// The process's directory in `/proc`, where it was opened with the connection.
    pub fn directory(&self) -> Option<&OwnedFd> {
        self.procfs_handle.as_ref().map(ProcfsHandle::directory)
    }

    /// The number of the handle. From Linux 6.9 on, no two processes ever have the same one; before, all have.
    pub fn handle_number(&self) -> Option<u64> {
        fstat(self.pidfd.as_deref()?).ok().map(|stat| stat.st_ino)
    }

    /// A second descriptor of the same handle.
    pub fn handle(&self) -> Option<io::Result<OwnedFd>> {
        self.pidfd.as_deref().map(OwnedFd::try_clone)
    }

    /// Waits for the end of the process: true when it has come, false when this peer was dropped before. The first waiter needs no
    /// descriptor of its own; on kernels without pidfds (before 5.3) only the drop is noticed.
    pub fn ended(&self) -> io::Result<impl Future<Output = bool> + Send + use<>> {
        let watched = match self.pidfd.clone() {
            None if self.procfs_handle.is_some() => None,
            None => return Err(io::ErrorKind::Unsupported.into()),
            Some(pidfd) => Some(match fd::watched_shared(pidfd.clone()) {
                // A descriptor is registered once.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => fd::watched_shared(Arc::new(pidfd.try_clone()?))?,
                other => other?,
            }),
        };
        let dropped = self.dropped.clone();
        Ok(async move {
            let Some(pidfd) = watched else {
                dropped.cancelled().await;
                return false;
            };
            tokio::select! {
                () = dropped.cancelled() => false,
                // A pidfd becomes readable when its process ends. Where the poller itself has ended, nothing is known.
                ready = pidfd.readable() => ready.is_ok(),
            }
        })
    }

    /// Whether the process that connected still runs; false where there is no handle to ask.
    pub fn is_alive(&self) -> bool {
        let runs = |pidfd: &Arc<OwnedFd>| {
            let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
            // A pidfd becomes readable when its process ends.
            matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
        };
        self.has_handle() && self.pidfd.as_ref().is_none_or(runs) && self.procfs_handle.as_ref().is_none_or(ProcfsHandle::is_alive)
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Peer(pid {}, uid {}, gid {})", self.pid, self.uid, self.gid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_this_process_and_alive() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).unwrap();
        assert_eq!(peer.pid, i32::try_from(std::process::id()).unwrap());
        assert_eq!(peer.uid, nix::unistd::geteuid().as_raw());
        assert!(peer.is_pinned() && kernel_pins().unwrap(), "these tests want Linux 6.5 or newer");
        assert!(peer.is_alive() && peer.directory().is_none());
        assert_eq!(peer.handle_number(), Peer::of(&ours).unwrap().handle_number());
    }

    #[test]
    fn without_the_kernels_handle_the_process_is_recorded_and_known_to_be() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::recorded(&ours, Path::new("/proc")).unwrap();
        assert!(peer.has_handle() && !peer.is_pinned() && peer.is_alive() && peer.directory().is_some());
        let nowhere = tempfile::tempdir().unwrap();
        let gone = Peer::recorded(&ours, nowhere.path()).unwrap();
        assert!(!gone.has_handle() && !gone.is_alive());
        assert!(gone.ended().is_err());
    }

    #[tokio::test]
    async fn the_end_of_the_process_or_of_the_peer_is_noticed() {
        use std::{process::Command, time::Duration};

        use tokio::time::timeout;

        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let of_child = || {
            let pidfd = procfs_handle::open(i32::try_from(child.id()).unwrap()).unwrap();
            Peer { pidfd: Some(Arc::new(pidfd)), ..Peer::of(&ours).unwrap() }
        };
        let (first, second) = (of_child(), of_child());
        let mut ended = Box::pin(first.ended().unwrap());
        assert!(timeout(Duration::from_millis(20), &mut ended).await.is_err());
        drop(first);
        assert!(!timeout(Duration::from_secs(20), ended).await.unwrap());

        let ended = second.ended().unwrap();
        child.kill().unwrap();
        assert!(timeout(Duration::from_secs(20), ended).await.unwrap());
        assert!(!second.is_alive());
        child.wait().unwrap();
    }
}
