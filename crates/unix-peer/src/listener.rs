//! The socket's name in the file system: bound beside it, given its mode, and moved into place in one step.
//!
//! There is no moment without a socket under the public name, and no moment with the wrong mode. Binding ([`prepare`]) and taking the name
//! ([`Prepared::publish`]) are two steps, so that a predecessor can go on in between. At the end only our own socket is removed (same device
//! and inode); a successor's stays. The directory is never removed: workloads have it mounted.

use std::{
    future::pending,
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, inotify},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use tokio::{io::unix::AsyncFd, net::UnixListener};
use tracing::warn;

use crate::fd;

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::listener";

/// Connections that wait to be accepted: a node's worth of proxies that reconnect at once.
const BACKLOG: i32 = 4096;

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("{field} {path}: cannot {action}: {cause}{hint}")]
pub struct Error {
    field: &'static str,
    path: PathBuf,
    action: &'static str,
    cause: io::Error,
    hint: &'static str,
}

/// A bound socket under its public name.
#[derive(Debug)]
pub struct Bound {
    /// For the accept loop.
    pub listener: UnixListener,
    /// Its name.
    pub name: BoundPath,
}

/// The public name, which led to our socket when it was taken.
#[derive(Debug)]
pub struct BoundPath {
    path: PathBuf,
    device: u64,
    inode: u64,
}

/// A socket that listens beside its public name.
#[derive(Debug)]
pub struct Prepared {
    field: &'static str,
    beside: PathBuf,
    name: BoundPath,
    taken: bool,
}

/// Binds `path` with permission bits `mode`, replacing what is there. A missing directory is made, accessible to everybody, as the
/// socket's own mode decides who may connect.
pub fn bind(path: &Path, mode: u32) -> Result<Bound, Error> {
    bind_for("the socket's path", path, mode)
}

/// The same for a path that comes from `field` of the configuration.
pub fn bind_for(field: &'static str, path: &Path, mode: u32) -> Result<Bound, Error> {
    let (listener, prepared) = prepare(field, path, mode)?;
    Ok(Bound { listener, name: prepared.publish()? })
}

/// Binds and listens beside `path`, which comes from `field` of the configuration, and leaves the name itself alone.
pub fn prepare(field: &'static str, path: &Path, mode: u32) -> Result<(UnixListener, Prepared), Error> {
    let failed = |action, hint| move |cause: rustix::io::Errno| Error { field, path: path.to_owned(), action, cause: cause.into(), hint };
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_directory(directory).map_err(failed("make its directory", ""))?;

    let name = path.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
    let beside = directory.join(format!(".{name}.{}", std::process::id()));
    // Left over from a process of the same id that was killed in this very moment.
    let _ = rustix::fs::unlink(&beside);
    let too_long = "; a socket's path has at most 108 bytes, choose a shorter one";
    // A path that is too long for an address is reached by its directory's descriptor; the file's name alone has to fit.
    let way = rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed("open its directory", ""))?;
    let shorter = || format!("/proc/self/fd/{}/{}", way.as_raw_fd(), beside.file_name().unwrap_or_default().to_string_lossy());
    let address = SocketAddrUnix::new(&beside).or_else(|_| SocketAddrUnix::new(shorter())).map_err(failed("bind beside it", too_long))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed("make a socket", ""))?;
    rustix::net::bind(&socket, &address).map_err(failed("bind beside it", ""))?;
    // From here on what is dropped is removed.
    let stat = rustix::fs::statat(CWD, &beside, AtFlags::SYMLINK_NOFOLLOW).map_err(failed("look at it", ""))?;
    let name = BoundPath { path: path.to_owned(), device: stat.st_dev, inode: stat.st_ino };
    let prepared = Prepared { field, beside, name, taken: false };
    rustix::fs::chmodat(CWD, &prepared.beside, Mode::from_raw_mode(mode), AtFlags::empty()).map_err(failed("set its mode", ""))?;
    rustix::net::listen(&socket, BACKLOG).map_err(failed("listen", ""))?;
    let listener = UnixListener::from_std(std::os::unix::net::UnixListener::from(socket)).map_err(|cause| Error {
        field,
        path: path.to_owned(),
        action: "listen",
        cause,
        hint: "",
    })?;
    Ok((listener, prepared))
}

impl Prepared {
    /// The public name that it is for.
    pub fn path(&self) -> &Path {
        &self.name.path
    }

    /// Moves the socket into place, over whatever is there.
    pub fn publish(mut self) -> Result<BoundPath, Error> {
        let failed = |cause, hint| Error { field: self.field, path: self.name.path.clone(), action: "move it into place", cause, hint };
        if !self.name.is_socket_at(&self.beside) {
            let hint = "; another process has prepared to take it since";
            return Err(failed(io::ErrorKind::NotFound.into(), hint));
        }
        rustix::fs::rename(&self.beside, &self.name.path).map_err(|cause| failed(cause.into(), "; is there a directory of that name?"))?;
        self.taken = true;
        let BoundPath { path, device, inode } = &mut self.name;
        Ok(BoundPath { path: std::mem::take(path), device: *device, inode: *inode })
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // In another container there may be a process of the same id, which has bound its own under this name since.
        if !self.taken && self.name.is_socket_at(&self.beside) {
            let _ = rustix::fs::unlink(&self.beside);
        }
    }
}

fn make_directory(directory: &Path) -> rustix::io::Result<()> {
    let mode = Mode::from_raw_mode(0o755);
    match rustix::fs::mkdir(directory, mode) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(rustix::io::Errno::NOENT) => match directory.parent() {
            Some(parent) => {
                make_directory(parent)?;
                match rustix::fs::mkdir(directory, mode) {
                    Err(error) if error != rustix::io::Errno::EXIST => Err(error),
                    _ => Ok(()),
                }
            }
            None => Err(rustix::io::Errno::NOENT),
        },
        Err(error) => Err(error),
    }
}

impl BoundPath {
    /// The public name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the name still leads to our socket.
    pub fn is_owned(&self) -> bool {
        self.is_socket_at(&self.path)
    }

    /// Returns once the name no longer leads to our socket, as the kernel tells; never where it cannot.
    pub async fn superseded(&self) {
        let events = match self.watch() {
            Ok(events) => events,
            // The name may have gone before it was watched.
            Err(_) if !self.is_owned() => return,
            Err(error) => {
                warn!(target: LOG_TARGET, %error, socket = %self.path.display(), "cannot watch the socket's name; where somebody takes it, it is not taken back");
                return pending().await;
            }
        };
        // Looked at after it is watched, so that nothing falls between.
        while self.is_owned() {
            match events.readable().await {
                Ok(mut ready) => {
                    // What has happened is told by the name itself.
                    let mut buffer = [const { MaybeUninit::uninit() }; 1024];
                    let mut told = inotify::Reader::new(events.get_ref(), &mut buffer);
                    while told.next().is_ok() {}
                    ready.clear_ready();
                }
                Err(_) => return pending().await,
            }
        }
    }

    /// Of the inode: its links change when another one is moved over it.
    fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let what = inotify::WatchFlags::ATTRIB | inotify::WatchFlags::MOVE_SELF | inotify::WatchFlags::DONT_FOLLOW;
        inotify::add_watch(&events, &self.path, what)?;
        fd::watched(events)
    }

    fn is_socket_at(&self, path: &Path) -> bool {
        rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| stat.st_dev == self.device && stat.st_ino == self.inode)
    }

    /// Removes the name, if it is still ours. A successor may take it in this very moment, so that it is moved aside first and looked at
    /// once more there: a successor's goes back.
    pub fn unlink_if_owned(&self) {
        if !self.is_owned() {
            return;
        }
        let name = self.path.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
        let aside = self.path.with_file_name(format!(".{name}.{}.gone", std::process::id()));
        if rustix::fs::rename(&self.path, &aside).is_err() {
            return;
        }
        if !self.is_socket_at(&aside) {
            let _ = rustix::fs::renameat_with(CWD, &aside, CWD, &self.path, RenameFlags::NOREPLACE);
        }
        // Ours, or one that yet another has replaced meanwhile.
        let _ = rustix::fs::unlink(&aside);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::UnixStream,
    };

    use super::*;

    const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);

    #[tokio::test]
    async fn a_socket_gets_its_mode_and_its_missing_directories() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/sds.sock");
        let bound = bind(&path, 0o640).unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        assert!(meta.file_type().is_socket());
        assert_eq!(meta.permissions().mode() & 0o777, 0o640);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");
        UnixStream::connect(&path).unwrap();
        bound.name.unlink_if_owned();
        assert!(!path.exists() && path.parent().unwrap().exists());
    }

    #[tokio::test]
    async fn a_successor_takes_the_name_and_the_predecessor_leaves_it_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sds.sock");
        let old = bind(&path, 0o666).unwrap();
        let new = bind(&path, 0o666).unwrap();
        assert!(!old.name.is_owned() && new.name.is_owned());
        old.name.unlink_if_owned();
        UnixStream::connect(&path).unwrap();
    }

    #[tokio::test]
    async fn a_name_that_is_taken_away_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sds.sock");
        for way in ["replaced", "removed", "moved", "before"] {
            let bound = bind(&path, 0o666).unwrap();
            if way == "before" {
                std::fs::remove_file(&path).unwrap();
                tokio::time::timeout(PATIENCE, bound.name.superseded()).await.unwrap();
                continue;
            }
            let mut superseded = std::pin::pin!(bound.name.superseded());
            assert!(futures::poll!(superseded.as_mut()).is_pending(), "{way}");
            // Nothing of this takes it away.
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            std::fs::write(dir.path().join("beside"), "").unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            assert!(futures::poll!(superseded.as_mut()).is_pending(), "{way}");
            match way {
                "replaced" => drop(bind(&path, 0o666).unwrap()),
                "removed" => std::fs::remove_file(&path).unwrap(),
                _ => std::fs::rename(&path, dir.path().join("elsewhere")).unwrap(),
            }
            tokio::time::timeout(PATIENCE, superseded).await.unwrap();
            assert!(!bound.name.is_owned(), "{way}");
        }
    }

    /// Each container has a process 1: two that wait for the name at once bind beside it under one name.
    #[tokio::test]
    async fn dropping_a_prepared_socket_leaves_a_later_one_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sds.sock");
        let serving = bind(&path, 0o666).unwrap();
        let (_first, given_up) = prepare("sockets.shared.path", &path, 0o666).unwrap();
        let (_second, superseded) = prepare("sockets.shared.path", &path, 0o666).unwrap();
        let (_third, prepared) = prepare("sockets.shared.path", &path, 0o666).unwrap();
        drop(given_up);
        let error = superseded.publish().unwrap_err().to_string();
        assert!(error.contains("another process"), "{error}");
        assert!(serving.name.is_owned(), "nobody takes the name with another's socket");
        assert!(prepared.publish().unwrap().is_owned());
    }

    #[tokio::test]
    async fn a_directory_of_any_depth_holds_a_socket() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(60)).join("e".repeat(60));
        let path = deep.join("sds.sock");
        let bound = bind(&path, 0o666).unwrap();
        assert!(bound.name.is_owned() && bound.name.path() == path);
        assert_eq!(std::fs::read_dir(&deep).unwrap().count(), 1, "nothing is left beside it");
        bound.name.unlink_if_owned();
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn errors_name_the_field_the_path_and_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let error = bind_for("sockets.shared.path", &dir.path().join("x".repeat(120)), 0o666).unwrap_err().to_string();
        assert!(error.contains("sockets.shared.path") && error.contains("choose a shorter one"), "{error}");
        std::fs::create_dir_all(dir.path().join("taken/inside")).unwrap();
        let error = bind(&dir.path().join("taken"), 0o666).unwrap_err().to_string();
        assert!(error.contains("move it into place"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");
    }
}
