//! The process at the other end of a Unix socket: its credentials and a handle that survives pid reuse.
//!
//! The order matters: take the handle first (here), read evidence about the pid second (`attest`), and ask [`Peer::is_alive`] last.
//! Evidence that was read while the handle lives is about the process that connected, and about no later owner of its pid.

use std::{
    fmt, io,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{getsockopt, sockopt},
};

/// Credentials at connect time, and the handle.
pub struct Peer {
    /// The process id in our PID namespace; 0 when it is not visible there.
    pub pid: i32,
    /// The effective user id.
    pub uid: u32,
    /// The effective group id.
    pub gid: u32,
    pidfd: Option<OwnedFd>,
}

impl Peer {
    /// Reads `SO_PEERPIDFD` and `SO_PEERCRED` of a connected socket. Kernels before 6.5 give no handle.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        let pidfd = match getsockopt(socket, sockopt::PeerPidfd) {
            Ok(fd) => Some(fd),
            // Too old a kernel; or the process is gone and reaped (ESRCH), or invisible (EINVAL): the credentials tell which.
            Err(Errno::ENOPROTOOPT | Errno::ESRCH | Errno::EINVAL | Errno::ENODATA) => None,
            Err(error) => return Err(error.into()),
        };
        let credentials = getsockopt(socket, sockopt::PeerCredentials)?;
        Ok(Self { pid: credentials.pid(), uid: credentials.uid(), gid: credentials.gid(), pidfd })
    }

    /// Whether there is a handle at all.
    pub fn has_handle(&self) -> bool {
        self.pidfd.is_some()
    }

    /// A second descriptor of the same handle, for waiting on it.
    pub fn handle(&self) -> Option<io::Result<OwnedFd>> {
        self.pidfd.as_ref().map(OwnedFd::try_clone)
    }

    /// Whether the process that connected still runs; false where there is no handle to ask.
    pub fn is_alive(&self) -> bool {
        let Some(pidfd) = &self.pidfd else { return false };
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        // A pidfd becomes readable when its process ends.
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Peer(pid {}, uid {}, gid {})", self.pid, self.uid, self.gid)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_peer_is_this_process_and_alive() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).unwrap();
        assert_eq!(peer.pid, i32::try_from(std::process::id()).unwrap());
        assert_eq!(peer.uid, nix::unistd::geteuid().as_raw());
        assert!(peer.has_handle(), "these tests want Linux 6.5 or newer");
        assert!(peer.is_alive());
    }
}
