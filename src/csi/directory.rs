//! The directories in which the sockets are: `<directory>/<pod uid>/<volume>`, the record of what is published, without any file.
//!
//! A volume whose socket has a name of its own is `<volume>+<socket>`, so that a restart knows the name even when the socket is gone.
//! Upper directories are for root alone; the innermost is what its pod has mounted, and everybody may enter it. Nothing here follows a
//! symbolic link, and nothing that another user could have made or can change is used or removed: it is an error that says so.

use std::{
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

use super::volume::{DEFAULT_SOCKET, Place, is_pod_uid, is_socket, is_volume};

/// Where the read-only view of the directory is mounted: no pod's UID.
pub const VIEW: &str = ".view";
const SEPARATOR: char = '+';
const ROOT_ONLY: RawMode = 0o700;
const ENTERED_BY_ALL: RawMode = 0o755;
const WRITTEN_BY_OTHERS: RawMode = 0o022;

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody else could have a hand in it.
    #[error("{path} {why}")]
    Unsafe {
        /// The directory or what stands in its place.
        path: PathBuf,
        /// What is wrong with it, and the way out.
        why: String,
    },
    /// The volume is there with another socket.
    #[error("the volume is published already, and its socket is called {0}; a pod's volume keeps its {name}", name = super::volume::SOCKET_NAME)]
    OtherSocket(Arc<str>),
    /// The kernel refuses.
    #[error("cannot {action} {path}: {cause}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// The answer.
        cause: io::Error,
    },
}

fn refused(action: &'static str, path: &Path) -> impl FnOnce(Errno) -> Error {
    let path = path.to_owned();
    move |cause| Error::Io { action, path, cause: cause.into() }
}

/// The directory of all.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    fd: OwnedFd,
}

/// The innermost directory: one volume's.
#[derive(Debug)]
pub struct Leaf {
    /// Where.
    pub path: PathBuf,
    /// Which device and inode.
    pub id: (u64, u64),
    /// Whether it was made just now.
    pub is_new: bool,
}

/// A volume's directory that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Whose.
    pub place: Place,
    /// Its socket's name.
    pub socket: Arc<str>,
    /// Where.
    pub path: PathBuf,
}

impl Root {
    /// Opens `path`, and makes what is missing of it. Fails when anybody but this user or root can change it or the way to it.
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
            fd = enter(fd.as_fd(), name, &way)?;
            let stat = rustix::fs::fstat(&fd).map_err(refused("look at", &way))?;
            if is_last { own(&stat, &way)? } else { on_the_way(&stat, &way)? }
        }
        // One that was made for us, such as a host path, is open for all to read.
        rustix::fs::chmodat(CWD, path, Mode::from_raw_mode(ROOT_ONLY), AtFlags::empty()).map_err(refused("close to others", path))?;
        Ok(Self { path: path.to_owned(), fd })
    }

    /// Where.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory of `place`, made where it is missing.
    pub fn make(&self, place: &Place, socket: &str) -> Result<Leaf, Error> {
        let pod_path = self.path.join(&*place.uid);
        let made_pod = make(self.fd.as_fd(), OsStr::new(&*place.uid), &pod_path, ROOT_ONLY)?;
        let made = self.make_in(&pod_path, place, socket);
        if made.is_err() && made_pod {
            self.remove_pod(&place.uid);
        }
        made
    }

    fn make_in(&self, pod_path: &Path, place: &Place, socket: &str) -> Result<Leaf, Error> {
        let pod = self.enter_own(&place.uid)?;
        for (volume, other) in entries(pod.as_fd(), pod_path)?.iter().filter_map(|name| parse(name)) {
            if *volume == *place.volume && other != socket {
                return Err(Error::OtherSocket(other.into()));
            }
        }
        let name = entry(&place.volume, socket);
        let path = pod_path.join(&name);
        let is_new = make(pod.as_fd(), OsStr::new(&name), &path, ENTERED_BY_ALL)?;
        let leaf = enter(pod.as_fd(), OsStr::new(&name), &path)?;
        let stat = rustix::fs::fstat(&leaf).map_err(refused("look at", &path))?;
        own(&stat, &path)?;
        Ok(Leaf { path, id: (stat.st_dev, stat.st_ino), is_new })
    }

    /// Every volume's directory, and what does not belong here.
    pub fn scan(&self) -> Result<(Vec<Found>, Vec<Error>), Error> {
        let (mut found, mut strays) = (Vec::new(), Vec::new());
        for uid in entries(self.fd.as_fd(), &self.path)?.iter().filter(|name| *name != VIEW) {
            let path = self.path.join(uid);
            match self.scan_pod(uid) {
                Ok((volumes, others)) if !volumes.is_empty() || !others.is_empty() => {
                    found.extend(volumes);
                    strays.extend(others);
                }
                // Left over from a publish that was cut short.
                Ok(_) => self.remove_pod(uid),
                Err(Error::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => {}
                Err(Error::Io { action, cause, .. }) => strays.push(Error::Io { action, path, cause }),
                Err(stray) => strays.push(stray),
            }
        }
        Ok((found, strays))
    }

    fn scan_pod(&self, uid: &str) -> Result<(Vec<Found>, Vec<Error>), Error> {
        let path = self.path.join(uid);
        if !is_pod_uid(uid) {
            return Err(stray(path, "has not the UID of a pod for its name"));
        }
        let pod = self.enter_own(uid)?;
        let (mut found, mut strays) = (Vec::<Found>::new(), Vec::new());
        for name in entries(pod.as_fd(), &path)? {
            let path = path.join(&name);
            let Some((volume, socket)) = parse(&name) else {
                strays.push(stray(path, "has not the name of a volume"));
                continue;
            };
            if found.iter().any(|other| *other.place.volume == *volume) {
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

    /// Removes the directory of `place` with the sockets in it; one that is not there is removed already.
    pub fn remove(&self, place: &Place) -> Result<(), Error> {
        let path = self.path.join(&*place.uid);
        let pod = match self.enter_own(&place.uid) {
            Err(Error::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
            pod => pod?,
        };
        for name in entries(pod.as_fd(), &path)? {
            if parse(&name).is_some_and(|(volume, _)| *volume == *place.volume) {
                remove_leaf(pod.as_fd(), &name, &path.join(&name))?;
            }
        }
        drop(pod);
        self.remove_pod(&place.uid);
        Ok(())
    }

    /// Removes a pod's directory where it is empty.
    fn remove_pod(&self, uid: &str) {
        let _ = rustix::fs::unlinkat(&self.fd, uid, AtFlags::REMOVEDIR);
    }

    fn enter_own(&self, uid: &str) -> Result<OwnedFd, Error> {
        let path = self.path.join(uid);
        let pod = enter(self.fd.as_fd(), OsStr::new(uid), &path)?;
        own(&rustix::fs::fstat(&pod).map_err(refused("look at", &path))?, &path)?;
        Ok(pod)
    }
}

/// Removes the sockets that a process left in a volume's directory before it got them into place.
pub fn clear_unfinished(path: &Path) -> Result<(), Error> {
    let fd = enter(CWD, path.as_os_str(), path)?;
    for name in entries(fd.as_fd(), path)?.iter().filter(|name| name.starts_with('.')) {
        remove_socket(fd.as_fd(), name, path)?;
    }
    Ok(())
}

fn remove_leaf(pod: BorrowedFd<'_>, name: &str, path: &Path) -> Result<(), Error> {
    let leaf = enter(pod, OsStr::new(name), path)?;
    own(&rustix::fs::fstat(&leaf).map_err(refused("look at", path))?, path)?;
    for file in entries(leaf.as_fd(), path)? {
        remove_socket(leaf.as_fd(), &file, path)?;
    }
    drop(leaf);
    rustix::fs::unlinkat(pod, name, AtFlags::REMOVEDIR).map_err(refused("remove", path))
}

fn remove_socket(leaf: BorrowedFd<'_>, name: &str, path: &Path) -> Result<(), Error> {
    let path = path.join(name);
    let stat = rustix::fs::statat(leaf, name, AtFlags::SYMLINK_NOFOLLOW).map_err(refused("look at", &path))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(stray(path, "is no socket"));
    }
    rustix::fs::unlinkat(leaf, name, AtFlags::empty()).map_err(refused("remove", &path))
}

/// Makes a directory with exactly this mode; whether it was missing.
fn make(parent: BorrowedFd<'_>, name: &OsStr, path: &Path, mode: RawMode) -> Result<bool, Error> {
    match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(mode)) {
        // The process's mask may have taken something away.
        Ok(()) => rustix::fs::chmodat(parent, name, Mode::from_raw_mode(mode), AtFlags::empty())
            .map(|()| true)
            .map_err(refused("set the mode of", path)),
        Err(Errno::EXIST) => Ok(false),
        Err(error) => Err(refused("make", path)(error)),
    }
}

fn enter(parent: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty()).map_err(|error| match error {
        Errno::NOTDIR | Errno::LOOP => stray(path.to_owned(), "is a symbolic link or no directory"),
        error => refused("enter", path)(error),
    })
}

fn entries(directory: BorrowedFd<'_>, path: &Path) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory).map_err(refused("read", path))? {
        let entry = entry.map_err(refused("read", path))?;
        // A name that is no text is nobody's; it shows in the log as one that cannot be.
        let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// A directory that only this user can change.
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

/// A directory above ours: nobody but root or this user can put something else in the place of what is in it.
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

fn parse(name: &str) -> Option<(&str, &str)> {
    let (volume, socket) = name.split_once(SEPARATOR).unwrap_or((name, DEFAULT_SOCKET));
    (is_volume(volume) && is_socket(socket) && entry(volume, socket) == name).then_some((volume, socket))
}

#[cfg(test)]
mod tests;
