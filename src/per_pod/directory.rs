//! The directories of the sockets, `<directory>/<pod uid>/<volume>`. They record which volumes are published; there is no other file. The
//! mount helper makes and removes them, and the agent binds the sockets.
//!
//! If the socket does not have the default name, the directory is `<volume>+<socket>`, so that a restarted agent knows the name even if the
//! socket was removed. Only root may enter the upper directories. The innermost directory is mounted in its pod, and any user may enter
//! it. The functions follow no symbolic link. They return an error instead of using or removing anything that another user could have
//! created or can change.

use std::{
    collections::HashSet,
    ffi::OsStr,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RawMode, Stat},
    io::Errno,
};

use super::{
    HELPER_SOCKET,
    volume::{DEFAULT_SOCKET, Place, is_pod_uid, is_socket, is_volume},
};

/// The mount point of the read-only view in former releases. It is not a valid pod UID.
const FORMER_VIEW: &str = ".view";
const SEPARATOR: char = '+';
/// Maximum number of entries of a directory. A node has fewer pods, and a directory with more is not read.
const MAX_ENTRIES: usize = 16_384;
/// Maximum number of directories of one volume that are removed at once. There is one, unless something else has made more.
const MAX_LEAVES: usize = 4;
/// Maximum number of attempts to remove a directory in which sockets change.
const MAX_REMOVALS: usize = 5;
const ROOT_ONLY: RawMode = 0o700;
const ENTERED_BY_ALL: RawMode = 0o755;
const WRITTEN_BY_OTHERS: RawMode = 0o022;

/// A directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another user could have created it or can change it.
    #[error("{path} {why}")]
    Unsafe {
        /// The path of the directory, or of the file there.
        path: PathBuf,
        /// The reason and the remedy.
        why: String,
    },
    /// The volume is published with another socket name.
    #[error("the volume is published already, and its socket is called {0}; a pod's volume keeps its {name}", name = super::volume::SOCKET_NAME)]
    OtherSocket(Arc<str>),
    /// A system call failed.
    #[error("cannot {action} {path}: {cause}")]
    Io {
        /// The operation.
        action: &'static str,
        /// The path of the operation.
        path: PathBuf,
        /// The kernel's error.
        cause: io::Error,
    },
}

impl Error {
    /// Whether a directory does not exist.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Io { cause, .. } if cause.kind() == io::ErrorKind::NotFound)
    }
}

/// Whether `name` is that of the agent's socket for the mount helper, or one of its temporary names.
fn is_helper_socket(name: &str) -> bool {
    name == HELPER_SOCKET || name.strip_prefix('.').is_some_and(|name| name.starts_with(HELPER_SOCKET))
}

fn refused(action: &'static str, path: &Path) -> impl FnOnce(Errno) -> Error {
    let path = path.to_owned();
    move |cause| Error::Io { action, path, cause: cause.into() }
}

/// The entries of the directory of all sockets.
#[derive(Debug, Default)]
pub struct Scan {
    /// The directories of volumes.
    pub found: Vec<Found>,
    /// Every other entry.
    pub strays: Vec<Error>,
    /// The UIDs of pods whose directories are empty.
    pub empty: Vec<String>,
}

/// The parent of all pods' directories.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    fd: OwnedFd,
}

/// The innermost directory, which is that of one volume.
#[derive(Debug)]
pub struct Leaf {
    /// The path of the directory.
    pub path: PathBuf,
    /// Its device and inode.
    pub id: (u64, u64),
    /// Whether this call has created it.
    pub is_new: bool,
}

/// A volume's directory that a scan has found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its pod and volume.
    pub place: Place,
    /// The name of its socket.
    pub socket: Arc<str>,
    /// The path of the directory.
    pub path: PathBuf,
}

impl Root {
    /// Opens `path`, and creates missing directories.
    ///
    /// # Errors
    ///
    /// Another user than this one or root can change the directory or a parent of it, or a system call fails.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let mut fd = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(refused("open", Path::new("/")))?;
        let mut way = PathBuf::from("/");
        let mut names = path.components().filter(|part| !matches!(part, Component::RootDir)).peekable();
        while let Some(name) = names.next() {
            let name = name.as_os_str();
            way.push(name);
            let is_last = names.peek().is_none();
            make(fd.as_fd(), name, &way, if is_last { ROOT_ONLY } else { ENTERED_BY_ALL })?;
            // The way is not read: a confined process may read the last directory alone.
            fd = if is_last { enter(fd.as_fd(), name, &way)? } else { pass(fd.as_fd(), name, &way)? };
            let stat = rustix::fs::fstat(&fd).map_err(refused("look at", &way))?;
            if is_last { own(&stat, &way)? } else { on_the_way(&stat, &way)? }
        }
        // A directory that the kubelet has created, as for a host path, is readable by all users.
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(ROOT_ONLY)).map_err(refused("close to others", path))?;
        Ok(Self { path: path.to_owned(), fd })
    }

    /// The path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the directory of `place`, and creates it if it is missing.
    pub fn make(&self, place: &Place, socket: &str) -> Result<Leaf, Error> {
        let pod_path = self.path.join(&*place.uid);
        let made_pod = make(self.fd.as_fd(), OsStr::new(&*place.uid), &pod_path, ROOT_ONLY)?;
        let made = self.enter_own(&place.uid).and_then(|pod| leaf(&pod, &pod_path, place, socket, true));
        if made.is_err() && made_pod {
            self.remove_pod(&place.uid);
        }
        made
    }

    /// Returns the existing directory of `place`.
    ///
    /// # Errors
    ///
    /// The directory is missing, the volume has another socket name, or the directory cannot be used.
    pub fn find(&self, place: &Place, socket: &str) -> Result<Leaf, Error> {
        let pod_path = self.path.join(&*place.uid);
        leaf(&self.enter_own(&place.uid)?, &pod_path, place, socket, false)
    }

    /// Returns the device and inode of the directory of `place`, regardless of the name of its socket. `None` if there is none.
    ///
    /// # Errors
    ///
    /// The directory cannot be used.
    pub fn find_any(&self, place: &Place) -> Result<Option<(u64, u64)>, Error> {
        let path = self.path.join(&*place.uid);
        let pod = match self.enter_own(&place.uid) {
            Err(error) if error.is_missing() => return Ok(None),
            pod => pod?,
        };
        let names = entries(pod.as_fd(), &path)?;
        let Some((name, _)) = of_volume(&names, place).next() else { return Ok(None) };
        let stat = rustix::fs::fstat(enter(pod.as_fd(), OsStr::new(name), &path.join(name))?).map_err(refused("look at", &path))?;
        Ok(Some((stat.st_dev, stat.st_ino)))
    }

    /// Reads all entries, and changes nothing.
    pub fn scan(&self) -> Result<Scan, Error> {
        let mut scan = Scan::default();
        for uid in entries(self.fd.as_fd(), &self.path)?.into_iter().filter(|name| name != FORMER_VIEW && !is_helper_socket(name)) {
            if scan.found.len() + scan.strays.len() + scan.empty.len() > MAX_ENTRIES {
                scan.strays.push(stray(self.path.clone(), &format!("has more than {MAX_ENTRIES} entries in its directories")));
                break;
            }
            let path = self.path.join(&uid);
            match self.scan_pod(&uid) {
                Ok((volumes, others)) if volumes.is_empty() && others.is_empty() => scan.empty.push(uid),
                Ok((volumes, others)) => {
                    scan.found.extend(volumes);
                    scan.strays.extend(others);
                }
                Err(error) if error.is_missing() => {}
                Err(Error::Io { action, cause, .. }) => scan.strays.push(Error::Io { action, path, cause }),
                Err(stray) => scan.strays.push(stray),
            }
        }
        Ok(scan)
    }

    fn scan_pod(&self, uid: &str) -> Result<(Vec<Found>, Vec<Error>), Error> {
        let path = self.path.join(uid);
        if !is_pod_uid(uid) {
            return Err(stray(path, "is not named by the UID of a pod"));
        }
        let pod = self.enter_own(uid)?;
        let (mut found, mut strays, mut volumes) = (Vec::<Found>::new(), Vec::new(), HashSet::new());
        for name in entries(pod.as_fd(), &path)? {
            let path = path.join(&name);
            let Some((volume, socket)) = parse(&name) else {
                strays.push(stray(path, "is not named by a volume"));
                continue;
            };
            if !volumes.insert(volume.to_owned()) {
                strays.push(stray(path, "is a second directory of its volume"));
                continue;
            }
            let checked = enter(pod.as_fd(), OsStr::new(&name), &path)
                .and_then(|leaf| own(&rustix::fs::fstat(&leaf).map_err(refused("look at", &path))?, &path));
            match checked {
                Ok(()) => found.push(Found { place: Place { uid: uid.into(), volume: volume.into() }, socket: socket.into(), path }),
                Err(stray) => strays.push(stray),
            }
        }
        Ok((found, strays))
    }

    /// Removes the directory of `place` with the sockets in it. A missing directory is not an error.
    pub fn remove(&self, place: &Place) -> Result<(), Error> {
        let path = self.path.join(&*place.uid);
        let pod = match self.enter_own(&place.uid) {
            Err(error) if error.is_missing() => return Ok(()),
            pod => pod?,
        };
        let names = entries(pod.as_fd(), &path)?;
        let own: Vec<_> = of_volume(&names, place).map(|(name, _)| name).collect();
        if own.len() > MAX_LEAVES {
            return Err(stray(path, &format!("has more than {MAX_LEAVES} directories of one volume")));
        }
        for name in own {
            remove_leaf(pod.as_fd(), name, &path.join(name))?;
        }
        drop(pod);
        self.remove_pod(&place.uid);
        Ok(())
    }

    /// Removes the empty mount point that a former release has left.
    pub fn remove_former_view(&self) {
        self.remove_pod(FORMER_VIEW);
    }

    /// Removes a pod's directory if it is empty.
    pub fn remove_pod(&self, uid: &str) {
        let _ = rustix::fs::unlinkat(&self.fd, uid, AtFlags::REMOVEDIR);
    }

    fn enter_own(&self, uid: &str) -> Result<OwnedFd, Error> {
        let path = self.path.join(uid);
        let pod = enter(self.fd.as_fd(), OsStr::new(uid), &path)?;
        own(&rustix::fs::fstat(&pod).map_err(refused("look at", &path))?, &path)?;
        Ok(pod)
    }
}

/// The directory of a volume in that of its pod. A missing one is created if `makes`.
fn leaf(pod: &OwnedFd, pod_path: &Path, place: &Place, socket: &str, makes: bool) -> Result<Leaf, Error> {
    let names = entries(pod.as_fd(), pod_path)?;
    if let Some((_, other)) = of_volume(&names, place).find(|(_, other)| *other != socket) {
        return Err(Error::OtherSocket(other.into()));
    }
    let name = entry(&place.volume, socket);
    let path = pod_path.join(&name);
    let is_new = makes && make(pod.as_fd(), OsStr::new(&name), &path, ENTERED_BY_ALL)?;
    let leaf = enter(pod.as_fd(), OsStr::new(&name), &path)?;
    let stat = rustix::fs::fstat(&leaf).map_err(refused("look at", &path))?;
    own(&stat, &path)?;
    Ok(Leaf { path, id: (stat.st_dev, stat.st_ino), is_new })
}

/// Removes unfinished sockets from a volume's directory: those that a process bound but did not rename to their final name.
pub fn clear_unfinished(path: &Path) -> Result<(), Error> {
    let fd = enter(CWD, path.as_os_str(), path)?;
    for name in entries(fd.as_fd(), path)?.iter().filter(|name| name.starts_with('.')) {
        remove_socket(fd.as_fd(), name, path)?;
    }
    Ok(())
}

fn remove_leaf(pod: BorrowedFd<'_>, name: &str, path: &Path) -> Result<(), Error> {
    for _ in 0..MAX_REMOVALS {
        let leaf = match enter(pod, OsStr::new(name), path) {
            Err(error) if error.is_missing() => return Ok(()),
            leaf => leaf?,
        };
        own(&rustix::fs::fstat(&leaf).map_err(refused("look at", path))?, path)?;
        for file in entries(leaf.as_fd(), path)? {
            remove_socket(leaf.as_fd(), &file, path)?;
        }
        drop(leaf);
        match rustix::fs::unlinkat(pod, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            // The agent has renamed a socket in it meanwhile, or has made another one.
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            Err(error) => return Err(refused("remove", path)(error)),
        }
    }
    Err(stray(path.to_owned(), "is in use"))
}

fn remove_socket(leaf: BorrowedFd<'_>, name: &str, path: &Path) -> Result<(), Error> {
    let path = path.join(name);
    let stat = match rustix::fs::statat(leaf, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        stat => stat.map_err(refused("look at", &path))?,
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(stray(path, "is no socket"));
    }
    match rustix::fs::unlinkat(leaf, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(refused("remove", &path)(error)),
    }
}

/// Creates a directory with exactly this mode. Returns whether it was missing.
fn make(parent: BorrowedFd<'_>, name: &OsStr, path: &Path, mode: RawMode) -> Result<bool, Error> {
    match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(mode)) {
        // The umask of the process may have removed bits. The name may be that of a link by now.
        Ok(()) => rustix::fs::fchmod(enter(parent, name, path)?, Mode::from_raw_mode(mode))
            .map(|()| true)
            .map_err(refused("set the mode of", path)),
        Err(Errno::EXIST) => Ok(false),
        Err(error) => Err(refused("make", path)(error)),
    }
}

fn enter(parent: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<OwnedFd, Error> {
    open(parent, name, path, OFlags::RDONLY)
}

fn pass(parent: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<OwnedFd, Error> {
    open(parent, name, path, OFlags::PATH)
}

fn open(parent: BorrowedFd<'_>, name: &OsStr, path: &Path, access: OFlags) -> Result<OwnedFd, Error> {
    let flags = access | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty()).map_err(|error| match error {
        Errno::NOTDIR | Errno::LOOP => stray(path.to_owned(), "is a symbolic link or no directory"),
        error => refused("enter", path)(error),
    })
}

fn entries(directory: BorrowedFd<'_>, path: &Path) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory).map_err(refused("read", path))? {
        let entry = entry.map_err(refused("read", path))?;
        // No pod or volume has a name that is not UTF-8, so a lossy name is rejected and logged.
        let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
        if names.len() > MAX_ENTRIES {
            return Err(stray(path.to_owned(), &format!("has more than {MAX_ENTRIES} entries")));
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Checks that only this user can change the directory.
fn own(stat: &Stat, path: &Path) -> Result<(), Error> {
    let user = rustix::process::geteuid().as_raw();
    if stat.st_uid != user {
        return Err(stray(path.to_owned(), &format!("belongs to user {} and not to {user}", stat.st_uid)));
    }
    if stat.st_mode & WRITTEN_BY_OTHERS != 0 {
        return Err(stray(path.to_owned(), &format!("can be written by others (mode {:04o})", stat.st_mode & 0o7777)));
    }
    Ok(())
}

/// Checks a parent directory: only root or this user can replace its entries.
fn on_the_way(stat: &Stat, path: &Path) -> Result<(), Error> {
    let user = rustix::process::geteuid().as_raw();
    if stat.st_uid != user && stat.st_uid != 0 {
        return Err(stray(path.to_owned(), &format!("belongs to user {}", stat.st_uid)));
    }
    let is_sticky = Mode::from_raw_mode(stat.st_mode).contains(Mode::SVTX);
    if stat.st_mode & WRITTEN_BY_OTHERS != 0 && !is_sticky {
        return Err(stray(path.to_owned(), &format!("can be written by others (mode {:04o})", stat.st_mode & 0o7777)));
    }
    Ok(())
}

fn stray(path: PathBuf, why: &str) -> Error {
    Error::Unsafe { path, why: format!("{why}; it is left alone, and root should look at it") }
}

fn entry(volume: &str, socket: &str) -> String {
    if socket == DEFAULT_SOCKET { volume.to_owned() } else { format!("{volume}{SEPARATOR}{socket}") }
}

/// The names of the directories of a volume, each with that of its socket.
fn of_volume<'a>(names: &'a [String], place: &Place) -> impl Iterator<Item = (&'a str, &'a str)> {
    names.iter().filter_map(|name| parse(name).filter(|(volume, _)| **volume == *place.volume).map(|(_, socket)| (&**name, socket)))
}

fn parse(name: &str) -> Option<(&str, &str)> {
    let (volume, socket) = name.split_once(SEPARATOR).unwrap_or((name, DEFAULT_SOCKET));
    (is_volume(volume) && is_socket(socket) && entry(volume, socket) == name).then_some((volume, socket))
}

#[cfg(test)]
mod tests;
