//! The socket that a path leads to, by device and inode: looking at it, connecting to it, and waiting until the path leads elsewhere.
//!
//! The path itself has to be the socket: a symbolic link is none. So a process that may write the directory cannot make a reader see one
//! socket and connect to another one.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, inotify};
use tokio::{io::unix::AsyncFd, net::UnixStream, time::sleep};
use tracing::warn;

use crate::fd;

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::listener";

/// Interval between two looks at the path if the kernel does not report changes (no inotify).
const LOOK_INTERVAL: Duration = Duration::from_secs(30);

/// A path, and the device and inode of the socket that was there. Dropping it does not remove the socket.
#[derive(Debug, Clone)]
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

/// A socket that was found at a path. Its descriptor keeps the inode, so that no later file gets the same number.
#[derive(Debug)]
pub struct FoundSocket {
    file: SocketFile,
    pinned: OwnedFd,
}

impl SocketFile {
    pub(crate) fn new(path: &Path, stat: &Stat) -> Self {
        Self { path: path.to_owned(), device: stat.st_dev, inode: stat.st_ino }
    }

    /// Returns the path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whether the path still leads to this socket.
    pub fn is_current(&self) -> bool {
        self.is_at(&self.path)
    }

    pub(crate) fn is_at(&self, path: &Path) -> bool {
        rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| stat.st_dev == self.device && stat.st_ino == self.inode)
    }

    /// Completes when the path no longer leads to this socket. Uses inotify. If that is unavailable, it logs a warning and looks at the path
    /// every 30 s.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing: each call checks the path before it waits.
    pub async fn replaced(&self) {
        self.replaced_by(self.watch()).await;
    }

    async fn replaced_by(&self, watch: io::Result<AsyncFd<OwnedFd>>) {
        let followed = match watch {
            Ok(events) => self.follow(&events).await,
            // The path may have been removed before the watch was added.
            Err(_) if !self.is_current() => return,
            Err(error) => Err(error),
        };
        if let Err(error) = followed {
            let seconds = LOOK_INTERVAL.as_secs();
            warn!(target: LOG_TARGET, %error, socket = %self.path.display(), seconds, "cannot watch the socket's path; looking at it repeatedly");
            self.replaced_by_looks().await;
        }
    }

    async fn replaced_by_looks(&self) {
        while self.is_current() {
            sleep(LOOK_INTERVAL).await;
        }
    }

    async fn follow(&self, events: &AsyncFd<OwnedFd>) -> io::Result<()> {
        // Checked after the watch was added, so that no change is missed.
        while self.is_current() {
            let mut ready = events.readable().await?;
            // The events are discarded: the state of the path counts.
            let mut buffer = [const { MaybeUninit::uninit() }; 1024];
            let mut reader = inotify::Reader::new(events.get_ref(), &mut buffer);
            while reader.next().is_ok() {}
            ready.clear_ready();
        }
        Ok(())
    }

    /// Watches the inode of the socket, whose link count changes when another file is renamed over it, and the directory, which may be
    /// renamed.
    fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let socket = inotify::WatchFlags::ATTRIB | inotify::WatchFlags::MOVE_SELF | inotify::WatchFlags::DONT_FOLLOW;
        inotify::add_watch(&events, &self.path, socket)?;
        let directory = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        inotify::add_watch(&events, directory, inotify::WatchFlags::MOVE_SELF | inotify::WatchFlags::DELETE_SELF)?;
        fd::watched(events)
    }
}

impl FoundSocket {
    /// Looks at `path`.
    ///
    /// # Errors
    ///
    /// The error of opening `path`, and `InvalidInput` if it is not a socket.
    pub fn at(path: &Path) -> io::Result<Self> {
        let pinned = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let stat = rustix::fs::fstat(&pinned)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self { file: SocketFile::new(path, &stat), pinned })
    }

    /// Connects to this socket, also if the path leads to another one now.
    ///
    /// # Errors
    ///
    /// No process listens on the socket, its mode permits no connection, or its backlog is full.
    pub async fn connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect(format!("/proc/self/fd/{}", self.pinned.as_raw_fd())).await
    }

    /// Completes when the path no longer leads to this socket, like [`SocketFile::replaced`].
    pub async fn replaced(&self) {
        self.file.replaced().await;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::symlink, net::UnixListener};

    use tokio::time::{Instant, timeout};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_found_socket_is_reached_after_its_path_was_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("sds.sock"), dir.path().join("other"));
        let first = UnixListener::bind(&path).unwrap();
        let found = FoundSocket::at(&path).unwrap();
        let _second = UnixListener::bind(&other).unwrap();
        std::fs::rename(&other, &path).unwrap();
        timeout(PATIENCE, found.replaced()).await.unwrap();
        let _connection = found.connect().await.unwrap();
        first.set_nonblocking(true).unwrap();
        first.accept().expect("the connection is to the socket that was found");
    }

    #[tokio::test]
    async fn links_files_and_directories_are_no_sockets() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, link, file) = (dir.path().join("sds.sock"), dir.path().join("link"), dir.path().join("file"));
        let _listener = UnixListener::bind(&socket).unwrap();
        symlink(&socket, &link).unwrap();
        std::fs::write(&file, "").unwrap();
        for path in [&*link, &*file, dir.path(), &*dir.path().join("missing")] {
            FoundSocket::at(path).unwrap_err();
        }
        FoundSocket::at(&socket).unwrap();
    }

    #[tokio::test]
    async fn a_directory_that_is_renamed_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, path) = (dir.path().join("inside"), dir.path().join("inside/sds.sock"));
        std::fs::create_dir(&inside).unwrap();
        let _listener = UnixListener::bind(&path).unwrap();
        let found = FoundSocket::at(&path).unwrap();
        let mut replaced = std::pin::pin!(found.replaced());
        assert!(futures::poll!(replaced.as_mut()).is_pending());
        std::fs::rename(&inside, dir.path().join("elsewhere")).unwrap();
        timeout(PATIENCE, replaced).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn without_inotify_a_change_is_seen_within_30_seconds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sds.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let found = FoundSocket::at(&path).unwrap();
        let no_inotify = io::Error::from(rustix::io::Errno::MFILE);
        let mut looks = std::pin::pin!(found.file.replaced_by(Err(no_inotify)));
        assert!(timeout(Duration::from_secs(3600), looks.as_mut()).await.is_err(), "nothing has changed");
        std::fs::remove_file(&path).unwrap();
        let begun = Instant::now();
        looks.await;
        assert!(begun.elapsed() <= LOOK_INTERVAL);
    }
}
