//! Mounts a volume's directory on the kubelet's target path, with the flags `ro`, `nosuid`, `nodev` and `noexec`.
//!
//! A mount must have these flags when it appears. In a container with `Bidirectional` propagation the host gets a copy of each new mount,
//! and the pod's mount is made from that copy. Flags that the driver sets on its own mount later do not reach the copy, so the pod could
//! write. Therefore the driver mounts the whole directory once, with the flags, on a directory of its own, the view. The mount on a target
//! is a clone of a part of the view and has its flags.
//!
//! The agent can change everything in the directory, and is treated as hostile. It cannot reach the view, which is beside the driver's
//! socket. A source is resolved beneath the view and a target beneath the kubelet's directory of pods (openat2), in both cases without
//! symbolic links and other mounts.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags, StatxAttributes, StatxFlags},
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags},
};
use tracing::warn;

use crate::{
    mountinfo::{self, Mount},
    per_pod::{PerPod, directory::Leaf, volume::Place},
};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::csi::mounts";

/// The name of the view, beside the driver's socket.
const VIEW: &str = "view";
const VIEW_MODE: u32 = 0o700;
/// The directory of pods, in the kubelet's directory.
const PODS: &str = "pods";
/// The mode of directories that the kubelet creates.
const TARGET_MODE: u32 = 0o750;
/// Maximum of mounts that are removed from one target, so that unmounting always ends.
const STACKED: usize = 32;

/// A volume cannot be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubelet's directory for the volume does not exist.
    #[error("{0} is not there; is sockets.perPod.kubeletDirectory mounted at its own path in the container of the mount helper?")]
    NoParent(PathBuf),
    /// The path is a link, a file, or another mount.
    #[error("{path} {why}")]
    Occupied {
        /// The target.
        path: PathBuf,
        /// The reason.
        why: &'static str,
    },
    /// A system call failed.
    #[error("cannot {action} {path}: {cause}{}", hint(cause))]
    Io {
        /// The operation.
        action: &'static str,
        /// The path of the operation.
        path: PathBuf,
        /// The kernel's error.
        cause: io::Error,
    },
}

fn hint(cause: &io::Error) -> &'static str {
    if Errno::from_io_error(cause) == Some(Errno::PERM) { "; the container of the mount helper has to be privileged to mount" } else { "" }
}

fn refused(action: &'static str, path: &Path) -> impl FnOnce(Errno) -> Error {
    let path = path.to_owned();
    move |cause| Error::Io { action, path, cause: cause.into() }
}

/// The state of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// The target does not exist.
    Absent,
    /// The target is a directory without a mount.
    Plain,
    /// The volume's directory is mounted with the right flags.
    Ours,
    /// Another directory is mounted.
    Other,
}

/// Creates and removes the mounts of this driver.
#[derive(Debug)]
pub struct Mounts {
    /// The parent of the directories of all sockets.
    directory: PathBuf,
    kubelet: PathBuf,
    view: PathBuf,
}

impl Mounts {
    /// Mounts directories below `sockets.perPod.directory` on targets below the kubelet's directory.
    pub fn new(config: &PerPod) -> Self {
        let view = config.driver_socket().with_file_name(VIEW);
        Self { directory: config.directory.clone(), kubelet: config.kubelet_directory.clone(), view }
    }

    /// Mounts the view, if it is not mounted yet.
    pub fn prepare(&self) -> Result<(), Error> {
        let view = &self.view;
        let source = open(CWD, &self.directory).map_err(refused("open", &self.directory))?;
        let id = identity(source.as_fd(), &self.directory)?;
        if is_view(view, id)? {
            return Ok(());
        }
        let ways: Vec<_> = view.ancestors().take_while(|way| *way != self.kubelet).collect();
        for directory in ways.into_iter().rev() {
            match rustix::fs::mkdir(directory, Mode::from_raw_mode(VIEW_MODE)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(refused("make", directory)(error)),
            }
        }
        // The mount is another one, or is writable because a process was killed between the two steps below.
        unmount_all(view)?;
        rustix::mount::mount_bind(&self.directory, view).map_err(refused("mount the view", view))?;
        let guarded = rustix::mount::mount_change(view, MountPropagationFlags::PRIVATE)
            .and_then(|()| rustix::mount::mount_remount(view, MountFlags::BIND | guarded(), c""))
            .map_err(refused("make read-only", view));
        if guarded.is_err() {
            let _ = rustix::mount::unmount(view, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
        guarded
    }

    /// Logs a warning if the host would not see the mounts of this driver.
    pub fn check_propagation(&self) {
        let pods = self.kubelet.join(PODS);
        let Ok(mounts) = mountinfo::of_this_process() else { return };
        if is_shared(&mounts, &pods) == Some(false) {
            warn!(
                target: LOG_TARGET, path = %pods.display(),
                "mounts of the mount helper are visible only in its own mount namespace, and pods find an empty directory; in a container, set \
                 mountPropagation: Bidirectional on the volume"
            );
        }
    }

    /// Unmounts the view. Mounts on targets stay.
    pub fn finish(&self) {
        let _ = rustix::mount::unmount(&self.view, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        let _ = rustix::fs::rmdir(&self.view);
    }

    /// Mounts `leaf` on its target, unless it is mounted already. After an error the target is as before.
    pub fn attach(&self, place: &Place, leaf: &Leaf) -> Result<(), Error> {
        let path = self.path(place);
        let parent = self.parent(place)?.ok_or_else(|| Error::NoParent(path.parent().unwrap_or(&path).to_owned()))?;
        let name = place.target().1;
        let is_new = match self.look(place, parent.as_fd(), Some(leaf.id))? {
            Target::Ours => return Ok(()),
            Target::Other => return Err(Error::Occupied { path, why: "has something else mounted on it" }),
            Target::Plain => false,
            Target::Absent => {
                rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(TARGET_MODE)).map_err(refused("make", &path))?;
                true
            }
        };
        let attached = self.cut(place, leaf).and_then(|tree| {
            rustix::mount::move_mount(&tree, c"", &parent, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
                .map_err(refused("mount on", &path))
        });
        if attached.is_err() && is_new {
            let _ = rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR);
        }
        attached
    }

    /// Returns a detached mount of `leaf`, cloned from the view.
    fn cut(&self, place: &Place, leaf: &Leaf) -> Result<OwnedFd, Error> {
        self.prepare()?;
        let below = Path::new(&*place.uid).join(leaf.path.file_name().unwrap_or_default());
        let source = self.view.join(&below);
        let view = open(CWD, &self.view).map_err(refused("open", &self.view))?;
        let directory = beneath(&view, &below).map_err(refused("open", &source))?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = rustix::mount::open_tree(&directory, c"", flags).map_err(refused("clone the mount of", &source))?;
        if identity(tree.as_fd(), &source)? != leaf.id || !is_guarded(tree.as_fd(), &source)? {
            return Err(Error::Occupied { path: source, why: "is not the read-only view of the volume's directory" });
        }
        Ok(tree)
    }

    /// Removes all mounts from the target, and the target. A missing target is not an error.
    pub fn detach(&self, place: &Place) -> Result<(), Error> {
        let path = self.path(place);
        let Some(parent) = self.parent(place)? else { return Ok(()) };
        if self.look(place, parent.as_fd(), None)? != Target::Absent {
            unmount_all(&path)?;
        }
        remove_target(&parent, place).map_err(refused("remove", &path))
    }

    /// Unmounts the target if `leaf` is mounted on it, and removes the target then. Any other target stays: the agent has named the volume,
    /// and could name that of another driver.
    pub fn detach_own(&self, place: &Place, leaf: Option<(u64, u64)>) -> Result<(), Error> {
        let path = self.path(place);
        let Some(parent) = self.parent(place)? else { return Ok(()) };
        match self.look(place, parent.as_fd(), leaf)? {
            Target::Ours => {}
            Target::Absent | Target::Plain => return Ok(()),
            Target::Other => return Err(Error::Occupied { path, why: "has a mount that is not of this driver" }),
        }
        rustix::mount::unmount(&path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH).map_err(refused("unmount", &path))?;
        match remove_target(&parent, place) {
            // Another mount was below.
            Err(Errno::BUSY) => Ok(()),
            removed => removed.map_err(refused("remove", &path)),
        }
    }

    fn path(&self, place: &Place) -> PathBuf {
        let (directory, name) = place.target();
        self.kubelet.join(directory).join(name)
    }

    /// Opens the parent directory of the target. The directory of pods is a mount of its own in a container, so the way begins there.
    fn parent(&self, place: &Place) -> Result<Option<OwnedFd>, Error> {
        let (directory, _) = place.target();
        let path = self.kubelet.join(&directory);
        let pods = self.kubelet.join(PODS);
        let below = directory.strip_prefix(PODS).unwrap_or(&directory);
        let pods = match open(CWD, &pods) {
            Err(Errno::NOENT) => return Ok(None),
            opened => opened.map_err(refused("open", &pods))?,
        };
        match beneath(&pods, below) {
            Ok(parent) => Ok(Some(parent)),
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::LOOP | Errno::NOTDIR | Errno::XDEV) => {
                Err(Error::Occupied { path, why: "has a symbolic link, a file or another mount on the way" })
            }
            Err(error) => Err(refused("open", &path)(error)),
        }
    }

    fn look(&self, place: &Place, parent: BorrowedFd<'_>, leaf: Option<(u64, u64)>) -> Result<Target, Error> {
        let path = self.path(place);
        let fd = match open(parent, Path::new(place.target().1)) {
            Err(Errno::NOENT) => return Ok(Target::Absent),
            Err(Errno::NOTDIR | Errno::LOOP) => return Err(Error::Occupied { path, why: "is a symbolic link or no directory" }),
            opened => opened.map_err(refused("open", &path))?,
        };
        if !is_mounted(fd.as_fd(), &path)? {
            return Ok(Target::Plain);
        }
        let is_owned = leaf.is_some() && leaf == Some(identity(fd.as_fd(), &path)?) && is_guarded(fd.as_fd(), &path)?;
        Ok(if is_owned { Target::Ours } else { Target::Other })
    }
}

/// Removes the directory of the target. The driver does not remove files that were in it below the mount.
fn remove_target(parent: impl AsFd, place: &Place) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(parent, place.target().1, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

fn is_view(view: &Path, id: (u64, u64)) -> Result<bool, Error> {
    let fd = match open(CWD, view) {
        Err(Errno::NOENT) => return Ok(false),
        opened => opened.map_err(refused("open", view))?,
    };
    Ok(is_mounted(fd.as_fd(), view)? && identity(fd.as_fd(), view)? == id && is_guarded(fd.as_fd(), view)?)
}

/// Whether mounts below `path` propagate to other mounts. The visible mount with the longest mount point above `path` decides.
fn is_shared(mounts: &[Mount], path: &Path) -> Option<bool> {
    mountinfo::above(mounts, path).map(|mount| mount.shared)
}

fn guarded() -> MountFlags {
    MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC
}

/// Opens a directory beneath `parent`, through no link and no other mount.
fn beneath(parent: impl AsFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(parent, path, flags, Mode::empty(), resolve)
}

fn open(parent: impl AsFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, path, flags, Mode::empty())
}

/// Whether `fd` is the root of a mount.
fn is_mounted(fd: BorrowedFd<'_>, path: &Path) -> Result<bool, Error> {
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::TYPE).map_err(refused("look at", path))?;
    if !stat.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT) {
        // Linux reports it since 5.8.
        return Err(refused("detect mounts at", path)(Errno::NOSYS));
    }
    Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

fn identity(fd: BorrowedFd<'_>, path: &Path) -> Result<(u64, u64), Error> {
    let stat = rustix::fs::fstat(fd).map_err(refused("look at", path))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(refused("use", path)(Errno::NOTDIR));
    }
    Ok((stat.st_dev, stat.st_ino))
}

/// Whether the mount of `fd` has all the flags of [`guarded`].
fn is_guarded(fd: BorrowedFd<'_>, path: &Path) -> Result<bool, Error> {
    let flags = rustix::fs::fstatvfs(fd).map_err(refused("look at", path))?.f_flag;
    use StatVfsMountFlags as Flags;
    Ok(flags.contains(Flags::RDONLY | Flags::NOSUID | Flags::NODEV | Flags::NOEXEC))
}

/// Removes every mount that is stacked on `path`. The kernel frees a mount that is in use when its last user ends.
fn unmount_all(path: &Path) -> Result<(), Error> {
    for _ in 0..STACKED {
        {
            let fd = open(CWD, path).map_err(refused("open", path))?;
            if !is_mounted(fd.as_fd(), path)? {
                return Ok(());
            }
        }
        let unmounted = match rustix::mount::unmount(path, UnmountFlags::NOFOLLOW) {
            Err(Errno::BUSY) => rustix::mount::unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH),
            unmounted => unmounted,
        };
        unmounted.map_err(refused("unmount", path))?;
    }
    Err(Error::Occupied { path: path.to_owned(), why: "has too many mounts stacked on it" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deepest_mount_above_a_path_decides_its_propagation() {
        let table = "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
                     30 21 0:40 / /var rw,relatime - tmpfs none rw\n\
                     31 30 8:1 /k /var/lib/kubelet/pods rw,relatime shared:7 master:2 - ext4 /dev/sda1 rw\n\
                     32 30 8:1 /k /var/lib/slave rw,relatime master:2 - ext4 /dev/shared:1 rw\n\
                     nonsense\n";
        let mounts = mountinfo::parse(table);
        let is_shared = |path: &str| is_shared(&mounts, Path::new(path));
        assert_eq!(is_shared("/var/lib/kubelet/pods"), Some(true));
        assert_eq!(is_shared("/var/lib/kubelet"), Some(false));
        assert_eq!(is_shared("/var/lib/slave/pods"), Some(false));
        assert_eq!(is_shared("/etc"), Some(true));
        assert_eq!(super::is_shared(&[], Path::new("/etc")), None);
    }
}
