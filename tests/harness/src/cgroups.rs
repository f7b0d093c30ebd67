//! Cgroups with the paths of a pod's, in every hierarchy that the machine has mounted: v1, v2 or both.
//!
//! A shell moves itself into the cgroup and then executes the program. Needs root.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use tokio::process::Command;

/// The parents that the kubelet's cgroupfs driver creates for burstable pods.
const PARENTS: [&str; 2] = ["kubepods", "kubepods/burstable"];

/// Attempts to remove a cgroup, 10 ms apart, while its killed processes end.
const REMOVALS: usize = 200;

/// A cgroup in each hierarchy, such as a container's. Removed when dropped; its processes must have been killed before.
pub struct PodCgroup {
    /// (mount point, cgroup)
    folders: Vec<(PathBuf, PathBuf)>,
}

impl PodCgroup {
    /// Creates `kubepods/burstable/pod<uid>/<container id>` in each hierarchy.
    pub fn new(pod_uid: &str) -> Self {
        Self::container(pod_uid, &container_id(pod_uid, 0))
    }

    /// Its directories, one in each hierarchy.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.folders.iter().map(|(_, folder)| folder.clone()).collect()
    }

    /// Limits the memory of the processes in this cgroup, without swap.
    pub fn limit_memory(&self, bytes: u64) {
        let files = ["memory.limit_in_bytes", "memory.max"];
        let limits: Vec<_> = self.paths().iter().flat_map(|path| files.map(|file| path.join(file))).filter(|file| file.exists()).collect();
        assert!(!limits.is_empty(), "no mounted hierarchy limits memory");
        for limit in limits {
            fs::write(&limit, bytes.to_string()).unwrap_or_else(|e| panic!("{}: {e}", limit.display()));
        }
    }

    /// The number of processes that the kernel has killed because of the limit.
    pub fn oom_kills(&self) -> u64 {
        let files = ["memory.oom_control", "memory.events"];
        let texts = self.paths().into_iter().flat_map(|path| files.map(|file| fs::read_to_string(path.join(file)).unwrap_or_default()));
        let lines: Vec<u64> = texts
            .flat_map(|text| text.lines().filter_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).collect::<Vec<_>>())
            .collect();
        assert!(!lines.is_empty(), "no mounted hierarchy counts the kills");
        lines.into_iter().sum()
    }

    /// Creates the cgroup of the container `id` of a pod.
    pub fn container(pod_uid: &str, id: &str) -> Self {
        Self::at(&format!("{}/pod{pod_uid}/{id}", PARENTS[1]))
    }

    /// Creates `path` in each hierarchy. Dropping the value removes its last four directories.
    pub fn at(path: &str) -> Self {
        let hierarchies = hierarchies();
        assert!(!hierarchies.is_empty(), "no cgroup hierarchy is mounted");
        Self::made(hierarchies.into_iter().map(|root| (root.clone(), root)), path)
    }

    /// Creates `path` below this cgroup in each hierarchy, as a container with a writable cgroup file system can.
    pub fn below(&self, path: &str) -> Self {
        Self::made(self.folders.iter().cloned(), path)
    }

    fn made(places: impl Iterator<Item = (PathBuf, PathBuf)>, path: &str) -> Self {
        let make_all = |(root, place): (PathBuf, PathBuf)| {
            let folder = path.split('/').fold(place, |above, step| {
                let folder = above.join(step);
                make(&root, &folder);
                folder
            });
            (root, folder)
        };
        Self { folders: places.map(make_all).collect() }
    }

    /// The number of hierarchies.
    pub fn hierarchies(&self) -> usize {
        self.folders.len()
    }

    /// A command that runs `program` in this cgroup.
    pub fn command(&self, program: &Path) -> Command {
        Self::moved(self.folders.iter(), program)
    }

    /// A command that runs `program` in this cgroup, except in the last hierarchy, where it runs in `other`.
    pub fn command_mixed_with(&self, other: &Self, program: &Path) -> Command {
        let last = self.folders.len() - 1;
        Self::moved(self.folders[..last].iter().chain(&other.folders[last..]), program)
    }

    fn moved<'a>(folders: impl Iterator<Item = &'a (PathBuf, PathBuf)>, program: &Path) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("{}exec \"$0\" \"$@\"", moves(folders))).arg(program);
        command
    }

    /// Shell code that moves the shell into this cgroup. More commands can follow.
    pub fn moves(&self) -> String {
        moves(self.folders.iter())
    }

    /// The words before a program and its arguments that run it in this cgroup.
    pub fn wrapper(&self) -> [String; 3] {
        ["sh".to_owned(), "-c".to_owned(), format!("{}exec \"$0\" \"$@\"", self.moves())]
    }
}

/// A cgroup in each hierarchy for programs that create cgroups below it. Dropping the value removes all of them.
pub struct Tree {
    root: PodCgroup,
    own: PodCgroup,
}

impl Tree {
    /// Creates `root` in each hierarchy, and `own` in it for the programs themselves.
    pub fn new(root: &str, own: &str) -> Self {
        let root = PodCgroup::at(root);
        let own = root.below(own);
        Self { root, own }
    }

    /// A command that runs `program` in `own`.
    pub fn command(&self, program: &Path) -> Command {
        self.own.command(program)
    }

    /// Shell code that moves the shell into a cgroup below this one that another program has created, such as a runtime for a container.
    pub fn moves(&self, name: &str) -> String {
        let found: Vec<_> = self.root.folders.iter().filter_map(|(root, top)| Some((root.clone(), find_below(top, name)?))).collect();
        assert!(!found.is_empty(), "there is no cgroup {name}");
        moves(found.iter())
    }
}

fn find_below(folder: &Path, name: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.find_map(|entry| if entry.file_name() == name { Some(entry.path()) } else { find_below(&entry.path(), name) })
}

impl Drop for Tree {
    fn drop(&mut self) {
        for (_, folder) in &self.root.folders {
            remove_below(folder);
        }
    }
}

/// Removes the cgroups below a cgroup, the innermost first.
fn remove_below(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_below(&entry.path());
            remove(&entry.path());
        }
    }
}

/// Removes a cgroup whose processes are ending.
fn remove(folder: &Path) {
    for _ in 0..REMOVALS {
        match fs::remove_dir(folder) {
            Err(e) if e.kind() == ErrorKind::ResourceBusy => thread::sleep(Duration::from_millis(10)),
            _ => break,
        }
    }
}

fn moves<'a>(folders: impl Iterator<Item = &'a (PathBuf, PathBuf)>) -> String {
    folders.map(|(_, folder)| format!("echo $$ >'{}/cgroup.procs' && ", folder.display())).collect()
}

/// A container ID in the format of runtimes: the `index`th of a pod.
pub fn container_id(pod_uid: &str, index: u8) -> String {
    let uid = u128::from_str_radix(&pod_uid.replace('-', ""), 16).expect("a pod's UID is hexadecimal");
    format!("{index:032x}{uid:032x}")
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        for (_, folder) in &self.folders {
            remove(folder);
            // Parents that another pod still uses cannot be removed and stay.
            for parent in folder.ancestors().skip(1).take(1 + PARENTS.len()) {
                let _ = fs::remove_dir(parent);
            }
        }
    }
}

/// The mount points of all cgroup hierarchies, without duplicates.
fn hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    let mut seen = Vec::new();
    let mut roots = Vec::new();
    for line in mounts.lines() {
        // … parent, device, root, mount point, options … - type source options
        let (Some((before, after)), Some(device)) = (line.split_once(" - "), line.split(' ').nth(2)) else { continue };
        let is_cgroup = after.starts_with("cgroup ") || after.starts_with("cgroup2 ");
        if is_cgroup && !seen.contains(&device) {
            seen.push(device);
            roots.extend(before.split(' ').nth(4).map(PathBuf::from));
        }
    }
    roots
}

fn make(root: &Path, folder: &Path) {
    match fs::create_dir(folder) {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
        Err(e) => panic!("cannot make the cgroup {}: {e}; these tests need root and a writable cgroup file system", folder.display()),
    }
    // A v1 cpuset accepts no process before it has cores and memory nodes.
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = folder.join(file);
        if root.join("cgroup.subtree_control").exists() || fs::read_to_string(&own).is_ok_and(|value| !value.trim().is_empty()) {
            continue;
        }
        if let Some(value) = folder.parent().and_then(|parent| fs::read_to_string(parent.join(file)).ok()) {
            fs::write(&own, value).unwrap_or_else(|e| panic!("cannot write {}: {e}", own.display()));
        }
    }
}
