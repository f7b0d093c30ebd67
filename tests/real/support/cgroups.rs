//! Cgroups shaped like a pod's, in every hierarchy that the machine has mounted: v1, v2 or both at once.
//!
//! Processes are started in them by a shell that moves itself and then becomes the program. Needs root.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use tokio::process::Command;

/// What the kubelet's cgroupfs driver makes for pods of the middle class.
const PARENTS: [&str; 2] = ["kubepods", "kubepods/burstable"];

/// How often a removal is tried while killed processes are still on their way out, 10 ms apart.
const REMOVALS: usize = 200;

/// A container's cgroup in each hierarchy. Removed when dropped; its processes must have been told to end by then.
pub struct PodCgroup {
    folders: Vec<PathBuf>,
}

impl PodCgroup {
    /// Makes `kubepods/burstable/pod<uid>/<container id>` everywhere.
    pub fn new(pod_uid: &str) -> Self {
        let container = format!("{:064x}", u128::from_str_radix(&pod_uid.replace('-', ""), 16).expect("a pod's UID is hexadecimal"));
        let pod = format!("{}/pod{pod_uid}", PARENTS[1]);
        let path = format!("{pod}/{container}");
        let hierarchies = hierarchies();
        assert!(!hierarchies.is_empty(), "no cgroup hierarchy is mounted");
        let folders = hierarchies.iter().map(|root| {
            for step in [PARENTS[0], PARENTS[1], &pod, &path] {
                make(root, &root.join(step));
            }
            root.join(&path)
        });
        Self { folders: folders.collect() }
    }

    /// A command that runs `program` in this cgroup.
    pub fn command(&self, program: &Path) -> Command {
        let moves = self.folders.iter().map(|folder| format!("echo $$ >'{}/cgroup.procs' && ", folder.display()));
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("{}exec \"$0\" \"$@\"", moves.collect::<String>())).arg(program);
        command
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        for folder in &self.folders {
            for _ in 0..REMOVALS {
                match fs::remove_dir(folder) {
                    Err(e) if e.kind() == ErrorKind::ResourceBusy => thread::sleep(Duration::from_millis(10)),
                    _ => break,
                }
            }
            // Parents that another pod still uses refuse and stay.
            for parent in folder.ancestors().skip(1).take(1 + PARENTS.len()) {
                let _ = fs::remove_dir(parent);
            }
        }
    }
}

/// The mount points of all cgroup hierarchies, each once.
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
    // A v1 cpuset takes no process before it has cores and memory.
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

#[tokio::test]
async fn a_process_is_in_its_pods_cgroup_in_every_hierarchy() {
    let uid = "0f6b1d6e-7f2a-4c39-9f0e-5f3d1c2b4a59";
    let cgroup = PodCgroup::new(uid);
    let output = cgroup.command(Path::new("cat")).arg("/proc/self/cgroup").output().await.expect("cat runs");
    let lines = String::from_utf8(output.stdout).expect("text");
    assert_eq!(lines.lines().count(), fs::read_to_string("/proc/self/cgroup").expect("/proc is mounted").lines().count());
    for line in lines.lines() {
        assert!(line.contains(&format!("/kubepods/burstable/pod{uid}/")), "{line}");
    }
    let folders = cgroup.folders.clone();
    drop(cgroup);
    assert!(folders.iter().all(|folder| !folder.exists()), "they are left behind");
}
