//! The mounts of the socket's directory, here and in the visible workloads. A workload should mount the directory, read-only.
//!
//! A mount of the socket file itself refers to one inode. The next agent creates another socket, and such a workload cannot connect until
//! it is restarted.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use super::{process::comm, report::Step};
use crate::{
    cli::Exit,
    mountinfo::{self, Mount},
};

/// Maximum number of mount namespaces that are checked.
const LOOKED_AT: usize = 2048;
/// Maximum number of processes that are named.
const NAMED: usize = 5;
/// The suffix that the kernel adds to the root of a mount whose file was deleted.
const DELETED: &str = "//deleted";

/// The mount that contains `path`, and the path in its file system.
fn locate<'a>(mounts: &'a [Mount], path: &Path) -> Option<(&'a Mount, String)> {
    let mount = mountinfo::above(mounts, path)?;
    let below = path.strip_prefix(&mount.point).ok()?;
    let place = Path::new(&mount.root).join(below);
    Some((mount, place.to_string_lossy().trim_end_matches('/').to_owned()))
}

/// How a workload mounts the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sight {
    Directory {
        read_only: bool,
    },
    File,
    /// A deleted file.
    Stale,
}

fn sights(mounts: &[Mount], device: &str, directory: &str, socket: &str) -> Vec<Sight> {
    let sight = |mount: &Mount| {
        let root = mount.root.trim_end_matches('/');
        match root.strip_suffix(DELETED) {
            _ if mount.device != device => None,
            Some(gone) => (gone == socket).then_some(Sight::Stale),
            None if root == socket => Some(Sight::File),
            None => (root == directory).then_some(Sight::Directory { read_only: mount.read_only }),
        }
    };
    mounts.iter().filter_map(sight).collect()
}

/// Checks the mounts of the directory of `socket` in this and in all visible mount namespaces. `server` is the process that listens.
pub(super) fn look(socket: &Path, in_pod: bool, server: Option<i32>) -> Vec<Step> {
    let name = "directory";
    let directory = socket.parent().unwrap_or(Path::new("/"));
    let table = mountinfo::of_this_process();
    let (Ok(table), Ok(directory)) = (table, directory.canonicalize()) else {
        let detail = format!("{} or the mounts of this process cannot be read", directory.display());
        return vec![Step::unknown(name, detail, Some("see the step socket"))];
    };
    let socket = directory.join(socket.file_name().unwrap_or_default());
    let Some((mount, place)) = locate(&table, &directory) else {
        return vec![Step::unknown(name, format!("{} is on no mount that is visible", directory.display()), None)];
    };
    let file = Path::new(&place).join(socket.file_name().unwrap_or_default()).to_string_lossy().into_owned();
    let here = own(&table, mount, &place, &directory, &socket, in_pod);
    vec![here, others(&mount.device, &place, &file, server)]
}

fn own(table: &[Mount], mount: &Mount, place: &str, directory: &Path, socket: &Path, in_pod: bool) -> Step {
    let name = "directory";
    let (shown, at) = (directory.display(), mount.point.display());
    if table.iter().any(|mount| mount.point == socket) {
        let detail = format!(
            "{} is a mount of the socket file: it refers to the socket of one agent, and not to those of later agents",
            socket.display()
        );
        return Step::failed(name, Exit::Failed, detail, "mount the directory, not the file");
    }
    let found = format!("{shown} is on {at} ({}, {})", mount.kind, if mount.read_only { "read-only" } else { "read-write" });
    if mount.read_only {
        let remedy = "the agent must mount the directory read-write; a workload should mount it read-only";
        return Step::warning(name, format!("{found}: an agent cannot create its socket here"), remedy);
    }
    if place.contains("/kubernetes.io~empty-dir/") {
        let remedy = "use a hostPath of type DirectoryOrCreate";
        return Step::warning(
            name,
            format!("{found}: an emptyDir, which is deleted with the agent's pod and invalidates the workloads' mounts"),
            remedy,
        );
    }
    if in_pod && mount.kind == "overlay" && mount.point == Path::new("/") {
        let remedy = "mount a hostPath of type DirectoryOrCreate there, in the agent and in the workloads";
        return Step::warning(name, format!("{found}: the container's own file system, which no workload sees"), remedy);
    }
    Step::ok(name, found)
}

fn others(device: &str, directory: &str, socket: &str, server: Option<i32>) -> Step {
    let proc = Path::new("/proc");
    let namespace = |pid: i32| fs::read_link(proc.join(pid.to_string()).join("ns/mnt")).ok();
    // Excludes the mount namespaces of this process and of the agent, which are not workloads.
    let mut seen: HashSet<PathBuf> = [i32::try_from(std::process::id()).ok(), server].into_iter().flatten().filter_map(namespace).collect();
    let (mut looked_at, mut found) = (0, Vec::new());
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    for pid in entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()) {
        if looked_at == LOOKED_AT || !namespace(pid).is_some_and(|namespace| seen.insert(namespace)) {
            continue;
        }
        let Ok(mounts) = mountinfo::read(&proc.join(pid.to_string())) else { continue };
        looked_at += 1;
        found.extend(sights(&mounts, device, directory, socket).into_iter().map(|sight| (pid, sight)));
    }
    judge(looked_at, &found, |pid| comm(proc, pid))
}

fn judge(looked_at: usize, found: &[(i32, Sight)], comm: impl Fn(i32) -> String) -> Step {
    let name = "mounts";
    let of = |wanted: Sight| found.iter().filter(|(_, sight)| *sight == wanted).map(|(pid, _)| *pid).collect::<Vec<_>>();
    let who = |pids: &[i32]| {
        let mut named: Vec<String> = pids.iter().take(NAMED).map(|pid| format!("{pid} ({})", comm(*pid))).collect();
        if pids.len() > NAMED {
            named.push(format!("{} more", pids.len() - NAMED));
        }
        named.join(", ")
    };
    let (stale, file) = (of(Sight::Stale), of(Sight::File));
    let (writable, fine) = (of(Sight::Directory { read_only: false }), of(Sight::Directory { read_only: true }));
    if !stale.is_empty() {
        let detail = format!("the mounts of these processes refer to a deleted socket: {}", who(&stale));
        return Step::failed(name, Exit::Failed, detail, "mount the socket's directory into these pods, not the file, and restart them");
    }
    if !file.is_empty() {
        let detail = format!("these processes mount the socket file, which becomes invalid when this agent ends: {}", who(&file));
        return Step::warning(name, detail, "mount the socket's directory into these pods, not the file");
    }
    let others = format!("{looked_at} other mount namespaces are visible, {} of them mount the directory", writable.len() + fine.len());
    if !writable.is_empty() {
        let detail =
            format!("{others}; root in these processes could replace the socket, because their mount is read-write: {}", who(&writable));
        return Step::warning(name, detail, "mount it with readOnly: true, which does not prevent connections");
    }
    Step::ok(name, others)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::report::Outcome;

    const TABLE: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:40 / /run rw,nosuid shared:2 - tmpfs tmpfs rw
41 22 0:40 /sds-agent /mnt/a\\040b ro,nosuid - tmpfs tmpfs rw
42 22 0:40 /sds-agent/sds.sock /mnt/sds.sock rw - tmpfs tmpfs rw
43 22 0:40 /sds-agent/sds.sock//deleted /mnt/old rw - tmpfs tmpfs rw
44 22 0:41 /sds-agent /elsewhere rw - tmpfs tmpfs rw
nonsense
";

    #[test]
    fn a_directory_is_found_by_its_place_whatever_it_is_called() {
        let table = mountinfo::parse(TABLE);
        assert_eq!((table.len(), table[2].point.as_path()), (6, Path::new("/mnt/a b")));
        let (mount, place) = locate(&table, Path::new("/run/sds-agent")).unwrap();
        assert_eq!((mount.device.as_str(), place.as_str()), ("0:40", "/sds-agent"));
        assert_eq!(locate(&table, Path::new("/mnt/a b")).unwrap().1, "/sds-agent");
        let sights = sights(&table, "0:40", "/sds-agent", "/sds-agent/sds.sock");
        assert_eq!(sights, [Sight::Directory { read_only: true }, Sight::File, Sight::Stale]);
    }

    #[test]
    fn the_worst_sight_decides() {
        let (read_only, writable) = (Sight::Directory { read_only: true }, Sight::Directory { read_only: false });
        for (found, result, words) in [
            (&[][..], Outcome::Ok, "7 other mount namespaces are visible, 0 of them"),
            (&[(1, read_only)], Outcome::Ok, "1 of them"),
            (&[(1, read_only), (2, writable)], Outcome::Warning, "because their mount is read-write: 2 (x)"),
            (&[(2, writable), (3, Sight::File)], Outcome::Warning, "becomes invalid when this agent ends: 3 (x)"),
            (&[(3, Sight::File), (4, Sight::Stale)], Outcome::Failed, "a deleted socket: 4 (x)"),
        ] {
            let step = judge(7, found, |_| "x".to_owned());
            assert!(step.result == result && step.detail.contains(words), "{step:?}");
        }
    }

    #[test]
    fn an_agents_own_mount_is_a_writable_directory_of_the_host() {
        let judge = |line: &str| {
            let table = mountinfo::parse(&format!("22 1 8:1 / / rw - overlay overlay rw\n{line}\n"));
            let (directory, socket) = (Path::new("/run/sds"), Path::new("/run/sds/sds.sock"));
            let (mount, place) = locate(&table, directory).unwrap();
            own(&table, mount, &place, directory, socket, true)
        };
        let (good, none) = ("41 22 8:2 /run/sds /run/sds rw - ext4 /dev/sda2 rw", "");
        assert_eq!((judge(good).result, judge(none).result), (Outcome::Ok, Outcome::Warning));
        let empty_dir = "41 22 8:2 /kubelet/pods/u/volumes/kubernetes.io~empty-dir/s /run/sds rw - ext4 /dev/sda2 rw";
        assert!(judge(empty_dir).detail.contains("an emptyDir"));
        assert!(judge("41 22 8:2 /run/sds /run/sds ro - ext4 /dev/sda2 rw").detail.contains("cannot create its socket"));
        assert_eq!(judge("41 22 8:2 /x/sds.sock /run/sds/sds.sock rw - ext4 /dev/sda2 rw").result, Outcome::Failed);
    }
}
