//! Binds a Unix socket under a temporary name, sets its mode, and renames it to its public path atomically.
//!
//! So the public path always leads to a socket with the right mode. Binding ([`prepare`]) and renaming ([`Prepared::publish`]) are two
//! steps, so that a predecessor can serve in between. At shutdown only the process's own socket is removed (same device and inode), and a
//! successor's socket stays. The directory is never removed, because workloads have it mounted.

use std::{
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, RenameFlags},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use tokio::net::UnixListener;

use crate::socket_file::SocketFile;

/// Maximum number of connections that wait to be accepted: all proxies of a node may reconnect at the same time.
const BACKLOG: i32 = 4096;

/// The socket cannot be bound. The message names the configuration field, the path, the failed step and the remedy.
#[derive(Debug, thiserror::Error)]
#[error("{field} {path}: cannot {action}: {cause}{hint}")]
pub struct Error {
    field: &'static str,
    path: PathBuf,
    action: &'static str,
    cause: io::Error,
    hint: &'static str,
    needs_restart: bool,
}

impl Error {
    /// Whether no later attempt of this process can succeed: its directory was deleted, and the process still sees the deleted one, such as
    /// through a mount. A new container gets a new mount.
    pub fn needs_restart(&self) -> bool {
        self.needs_restart
    }

    /// Whether the process has no permission for the step.
    pub fn is_denied(&self) -> bool {
        self.cause.kind() == io::ErrorKind::PermissionDenied
    }
}

/// A listening socket under its public path.
#[derive(Debug)]
pub struct Bound {
    /// The listener for the accept loop.
    pub listener: UnixListener,
    /// The public path.
    pub name: BoundPath,
}

/// The public path of a socket, with the socket's device and inode. Dropping it does not remove the socket.
#[derive(Debug)]
pub struct BoundPath(SocketFile);

/// A socket that listens under a temporary name beside its public path. Dropping it removes the temporary name.
#[derive(Debug)]
pub struct Prepared {
    field: &'static str,
    beside: PathBuf,
    name: BoundPath,
    taken: bool,
}

/// Binds `path` with permission bits `mode`, and replaces an existing file. Creates missing directories with mode 0755; the mode of the
/// socket decides which users can connect.
///
/// # Errors
///
/// Like [`prepare`] and [`Prepared::publish`].
///
/// # Panics
///
/// Outside of a tokio runtime with I/O enabled.
pub fn bind(path: &Path, mode: u32) -> Result<Bound, Error> {
    bind_for("the socket's path", path, mode)
}

/// Like [`bind`], for a path from the configuration field `field`.
///
/// # Errors
///
/// Like [`prepare`] and [`Prepared::publish`].
///
/// # Panics
///
/// Outside of a tokio runtime with I/O enabled.
pub fn bind_for(field: &'static str, path: &Path, mode: u32) -> Result<Bound, Error> {
    let (listener, prepared) = prepare(field, path, mode)?;
    Ok(Bound { listener, name: prepared.publish()? })
}

/// Binds and listens under a temporary name beside `path`, which is from the configuration field `field`. `path` itself is not changed.
///
/// # Errors
///
/// The directory cannot be created or opened, or the socket cannot be created, bound or given its mode. The name of the file may be too
/// long for a socket address (108 bytes).
///
/// # Panics
///
/// Outside of a tokio runtime with I/O enabled.
pub fn prepare(field: &'static str, path: &Path, mode: u32) -> Result<(UnixListener, Prepared), Error> {
    let error = |action, cause: io::Error, hint| Error { field, path: path.to_owned(), action, cause, hint, needs_restart: false };
    let failed = |action, hint| move |cause: rustix::io::Errno| error(action, cause.into(), hint);
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_directory(directory).map_err(failed("make its directory", ""))?;

    let name = path.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
    let beside = directory.join(format!(".{name}.{}", std::process::id()));
    // A process of the same pid may have been killed between binding and renaming.
    let _ = rustix::fs::unlink(&beside);
    let too_long = "; a socket's path has at most 108 bytes, choose a shorter one";
    // If the path is too long for an address, the directory is addressed by its descriptor, and only the name of the file has to fit.
    let way = rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed("open its directory", ""))?;
    if rustix::fs::fstat(&way).is_ok_and(|stat| stat.st_nlink == 0) {
        let deleted = error("bind in its directory", io::ErrorKind::NotFound.into(), "; the directory was deleted, a restart is needed");
        return Err(Error { needs_restart: true, ..deleted });
    }
    let shorter = || format!("/proc/self/fd/{}/{}", way.as_raw_fd(), beside.file_name().unwrap_or_default().to_string_lossy());
    let address = SocketAddrUnix::new(&beside).or_else(|_| SocketAddrUnix::new(shorter())).map_err(failed("bind beside it", too_long))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed("make a socket", ""))?;
    rustix::net::bind(&socket, &address).map_err(failed("bind beside it", ""))?;
    // From here on, dropping `prepared` removes the temporary name.
    let stat = rustix::fs::statat(CWD, &beside, AtFlags::SYMLINK_NOFOLLOW).map_err(failed("read its inode", ""))?;
    let name = BoundPath(SocketFile::new(path, &stat));
    let prepared = Prepared { field, beside, name, taken: false };
    rustix::fs::chmodat(CWD, &prepared.beside, Mode::from_raw_mode(mode), AtFlags::empty()).map_err(failed("set its mode", ""))?;
    rustix::net::listen(&socket, BACKLOG).map_err(failed("listen", ""))?;
    let listener = UnixListener::from_std(std::os::unix::net::UnixListener::from(socket)).map_err(|cause| error("listen", cause, ""))?;
    Ok((listener, prepared))
}

impl Prepared {
    /// Returns the public path.
    pub fn path(&self) -> &Path {
        self.name.path()
    }

    /// Renames the socket to its public path, and replaces an existing file.
    ///
    /// # Errors
    ///
    /// Another process of the same pid has replaced the temporary name, or the rename fails. The temporary name is removed if it is still
    /// this socket's.
    pub fn publish(mut self) -> Result<BoundPath, Error> {
        let (field, path, action) = (self.field, self.name.path().to_owned(), "move it into place");
        let failed = |cause, hint| Error { field, path, action, cause, hint, needs_restart: false };
        if !self.name.0.is_at(&self.beside) {
            let hint = "; another process has replaced the prepared socket";
            return Err(failed(io::ErrorKind::NotFound.into(), hint));
        }
        rustix::fs::rename(&self.beside, self.name.path()).map_err(|cause| failed(cause.into(), "; is there a directory of that name?"))?;
        self.taken = true;
        Ok(BoundPath(self.name.0.clone()))
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // A process of the same pid in another container may have bound its own socket under this name.
        if !self.taken && self.name.0.is_at(&self.beside) {
            let _ = rustix::fs::unlink(&self.beside);
        }
    }
}

/// Creates `directory`, and missing directories above it, each with the mode 0755 before the umask. An existing one is not an error.
///
/// # Errors
///
/// The kernel's error of the directory that cannot be created.
pub fn make_directory(directory: &Path) -> rustix::io::Result<()> {
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
    /// Returns the public path.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Returns whether the public path still leads to this socket.
    pub fn is_owned(&self) -> bool {
        self.0.is_current()
    }

    /// Completes when the public path no longer leads to this socket, like [`SocketFile::replaced`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing: each call checks the path before it waits.
    pub async fn superseded(&self) {
        self.0.replaced().await;
    }

    /// Removes the public path if it leads to this socket. A successor may replace the socket at the same time, so the path is renamed to
    /// a temporary name and checked again there; the socket of a successor is renamed back.
    pub fn unlink_if_owned(&self) {
        if !self.is_owned() {
            return;
        }
        let path = self.path();
        let name = path.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
        let aside = path.with_file_name(format!(".{name}.{}.gone", std::process::id()));
        if rustix::fs::rename(path, &aside).is_err() {
            return;
        }
        if !self.0.is_at(&aside) {
            let _ = rustix::fs::renameat_with(CWD, &aside, CWD, path, RenameFlags::NOREPLACE);
        }
        // This process's socket, or a successor's that was replaced meanwhile and could not be renamed back.
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
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file is left");
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
            // Neither a change of the mode nor another file replaces the socket.
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

    #[tokio::test]
    async fn a_deleted_directory_needs_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        let way = rustix::fs::open(&inside, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        // Like a mount of the directory: it leads to the directory after its deletion too.
        let path = PathBuf::from(format!("/proc/self/fd/{}/sds.sock", way.as_raw_fd()));
        bind(&path, 0o666).unwrap().name.unlink_if_owned();
        std::fs::remove_dir(&inside).unwrap();
        let error = bind(&path, 0o666).unwrap_err();
        assert!(error.needs_restart() && error.to_string().contains("a restart is needed"), "{error}");
        let error = bind(&dir.path().join("x".repeat(200)), 0o666).unwrap_err();
        assert!(!error.needs_restart(), "{error}");
    }

    /// Processes with pid 1 in two containers use the same temporary name.
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
        assert!(serving.name.is_owned(), "no process publishes the socket of another one");
        assert!(prepared.publish().unwrap().is_owned());
    }

    #[tokio::test]
    async fn a_directory_of_any_depth_holds_a_socket() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(60)).join("e".repeat(60));
        let path = deep.join("sds.sock");
        let bound = bind(&path, 0o666).unwrap();
        assert!(bound.name.is_owned() && bound.name.path() == path);
        assert_eq!(std::fs::read_dir(&deep).unwrap().count(), 1, "no temporary file is left");
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
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }
}
