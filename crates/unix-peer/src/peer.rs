//! The process at the other end of a Unix socket: its credentials, and a handle that pid reuse does not affect.
//!
//! The order of the calls matters. First create the [`Peer`], then read evidence about the pid, then call [`Peer::is_alive`]. If it
//! returns true, the evidence is about the process that connected, and not about a later owner of its pid.
//!
//! On the side that has connected, the peer is the process that called `listen`. That process may have passed the listening socket to
//! another one: if it has ended and the socket is still served, its credentials prove nothing about the process that answers.
//!
//! Kernels before 6.5 have no `SO_PEERPIDFD`. On those, [`Peer::of`] records the process that has the pid shortly after the connection. It
//! may not be the process that connected, so a caller that relies on it has to allow that explicitly ([`Peer::is_pinned`]).

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

/// Returns whether the kernel supports `SO_PEERPIDFD` (Linux 6.5).
///
/// # Errors
///
/// A pair of sockets cannot be created, or the kernel returns an error other than `ENOPROTOOPT`.
pub fn kernel_pins() -> io::Result<bool> {
    let (socket, _other) = UnixStream::pair()?;
    match getsockopt(&socket, sockopt::PeerPidfd) {
        Ok(_) => Ok(true),
        Err(Errno::ENOPROTOOPT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Credentials of a peer at connect time, and a handle on its process. Owns the descriptors of the handle.
pub struct Peer {
    /// Process ID in the PID namespace of this process; 0 if the peer is not visible there.
    pub pid: i32,
    /// Effective user ID.
    pub uid: u32,
    /// Effective group ID.
    pub gid: u32,
    pidfd: Option<Arc<OwnedFd>>,
    procfs_handle: Option<ProcfsHandle>,
    dropped: CancellationToken,
    _drop: DropGuard,
}

impl Peer {
    /// Reads `SO_PEERPIDFD` and `SO_PEERCRED` of a connected socket. On kernels before 6.5 it calls [`recorded`](Self::recorded). The peer
    /// has no handle if its process has ended or is not visible.
    ///
    /// # Errors
    ///
    /// The kernel returns no credentials, or an unexpected error for the handle.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        match getsockopt(socket, sockopt::PeerPidfd) {
            Ok(fd) => Self::with(socket, Some(fd)),
            Err(Errno::ENOPROTOOPT) => Self::recorded(socket, Path::new("/proc")),
            // The process has been reaped (ESRCH) or is invisible (EINVAL): the credentials show which.
            Err(Errno::ESRCH | Errno::EINVAL | Errno::ENODATA) => Self::with(socket, None),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads the credentials and records the process that has the pid now, for kernels before 6.5. `proc` is the mount point of procfs.
    /// The peer has no handle if the process cannot be recorded.
    ///
    /// # Errors
    ///
    /// The kernel returns no credentials.
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

    /// Creates the peer of a process that has not connected, to diagnose how the process would be attested.
    ///
    /// # Errors
    ///
    /// `ESRCH` if the process does not exist. Other errors if it cannot be read in `/proc`.
    pub fn of_process(pid: i32) -> io::Result<Self> {
        let no_such = || io::Error::from(Errno::ESRCH);
        let handle = procfs_handle::open(pid)?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let (uid, gid) = procfs_handle::effective_ids(&status).ok_or_else(no_such)?;
        let dropped = CancellationToken::new();
        let guard = dropped.clone().drop_guard();
        Ok(Self { pid, uid, gid, pidfd: Some(Arc::new(handle)), procfs_handle: None, dropped, _drop: guard })
    }

    /// Creates a peer without a process and a handle, for tests without a socket.
    #[cfg(any(test, feature = "testing"))]
    pub fn without_process(uid: u32) -> Self {
        let dropped = CancellationToken::new();
        let guard = dropped.clone().drop_guard();
        Self { pid: 0, uid, gid: uid, pidfd: None, procfs_handle: None, dropped, _drop: guard }
    }

    /// Returns whether the peer has a handle, from the kernel or recorded.
    pub fn has_handle(&self) -> bool {
        self.pidfd.is_some() || self.procfs_handle.is_some()
    }

    /// Returns whether the handle is from the kernel (`SO_PEERPIDFD`), and so proves which process connected.
    pub fn is_pinned(&self) -> bool {
        self.pidfd.is_some() && self.procfs_handle.is_none()
    }

    /// Returns the directory of the process in `/proc`, if the peer was [recorded](Self::recorded).
    pub fn directory(&self) -> Option<&OwnedFd> {
        self.procfs_handle.as_ref().map(ProcfsHandle::directory)
    }

    /// Returns the inode number of the pidfd. Since Linux 6.9 it is unique for each process; on older kernels it is the same for all.
    pub fn handle_number(&self) -> Option<u64> {
        fstat(self.pidfd.as_deref()?).ok().map(|stat| stat.st_ino)
    }

    /// Returns a duplicate of the pidfd, or `None` without one.
    pub fn handle(&self) -> Option<io::Result<OwnedFd>> {
        self.pidfd.as_deref().map(OwnedFd::try_clone)
    }

    /// Returns a future that waits for the end of the process. It returns true when the process has ended, and false when this peer is
    /// dropped first. The first waiter shares the descriptor of the handle; each further one duplicates it. On kernels without `pidfd_open`
    /// (before 5.3), only the drop of the peer completes the future.
    ///
    /// # Errors
    ///
    /// `Unsupported` if the peer has no handle. Other errors if the descriptor cannot be duplicated or registered.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing: call `ended` again.
    pub fn ended(&self) -> io::Result<impl Future<Output = bool> + Send + use<>> {
        let watched = match self.pidfd.clone() {
            None if self.procfs_handle.is_some() => None,
            None => return Err(io::ErrorKind::Unsupported.into()),
            Some(pidfd) => Some(match fd::watched_shared(pidfd.clone()) {
                // epoll accepts a descriptor only once.
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
                // A pidfd becomes readable when its process ends. An error means that the runtime shuts down.
                ready = pidfd.readable() => ready.is_ok(),
            }
        })
    }

    /// Returns whether the process still runs. False without a handle.
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
        assert!(peer.is_pinned() && kernel_pins().unwrap(), "these tests need Linux 6.5 or newer");
        assert!(peer.is_alive() && peer.directory().is_none());
        assert_eq!(peer.handle_number(), Peer::of(&ours).unwrap().handle_number());
    }

    /// Set for the child process of the tests below, so that `--include-ignored` does nothing.
    const CHILD: &str = "UNIX_PEER_TEST_SOCKET";

    /// Binds the path in [`CHILD`] and listens. Then hands the socket to a child process, and ends if `UNIX_PEER_TEST_END` is set.
    #[test]
    #[ignore = "runs in a separate process"]
    #[expect(clippy::zombie_processes, reason = "the child outlives this process, and the test kills it")]
    fn child_listens() {
        use std::{io::Read, os::fd::AsRawFd, process::Command};

        use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

        let Some(path) = std::env::var_os(CHILD) else { return };
        // Without CLOEXEC: the next process inherits the socket.
        let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
        bind(socket.as_raw_fd(), &UnixAddr::new(Path::new(&path)).unwrap()).unwrap();
        listen(&socket, Backlog::new(8).unwrap()).unwrap();
        let heir = Command::new("sleep").arg("600").stdin(std::process::Stdio::null()).spawn().unwrap();
        let written = Path::new(&path).with_extension("heir.new");
        std::fs::write(&written, heir.id().to_string()).unwrap();
        std::fs::rename(written, Path::new(&path).with_extension("heir")).unwrap();
        // Ends when the test closes the pipe.
        let _ = std::io::stdin().read(&mut [0]);
    }

    /// The kernel's answer on the side that connects. The handover of the shared socket relies on it.
    #[test]
    fn the_peer_of_a_client_is_the_process_that_listens() {
        use std::process::{Command, Stdio};

        let dir = tempfile::tempdir().unwrap();
        let (path, heir) = (dir.path().join("socket"), dir.path().join("socket.heir"));
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "peer::tests::child_listens", "--ignored"]).env(CHILD, &path).stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        let heir: i32 = loop {
            match std::fs::read_to_string(&heir) {
                Ok(pid) => break pid.parse().unwrap(),
                Err(_) => assert!(child.try_wait().unwrap().is_none(), "the child has failed"),
            }
            std::thread::yield_now();
        };

        let peer = Peer::of(&UnixStream::connect(&path).unwrap()).unwrap();
        assert_eq!(peer.pid, i32::try_from(child.id()).unwrap());
        assert!(peer.is_pinned() && peer.is_alive());
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!peer.is_alive());

        // The heir keeps the socket open, and it still accepts connections.
        let peer = Peer::of(&UnixStream::connect(&path).unwrap()).unwrap();
        assert_eq!(peer.pid, i32::try_from(child.id()).unwrap(), "never that of the heir {heir}");
        assert!(!peer.is_alive());
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(heir), nix::sys::signal::Signal::SIGKILL).unwrap();
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
