//! The mounts of a node: the host's mount namespace, the container of an agent whose mounts propagate to the host, and pods that see one
//! volume.
//!
//! A separate process holds the host's namespace, because mounts have to outlive the agent. All mounts end with that process.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::unistd::Pid;
use tokio::process::Command;

use crate::{
    child::{self, Child},
    tools,
};

/// The mount point of a volume in a pod.
pub const IN_POD: &str = "/mnt";

/// A mount namespace that represents the host. Unmounted when dropped.
pub struct Host {
    holder: Child,
    dir: PathBuf,
}

/// A mount of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The directory that is mounted, in its file system.
    pub root: PathBuf,
    pub target: PathBuf,
    pub options: String,
}

impl Host {
    /// Creates a host with its files in `dir`. Mounts below `kubelet/pods` there propagate to every namespace that requests it, as a kubelet's
    /// mounts do.
    pub async fn new(dir: &Path) -> Self {
        let pods = dir.join("kubelet/pods");
        fs::create_dir_all(&pods).expect("the kubelet's directory");
        let script = "mount --bind \"$0\" \"$0\" && mount --make-rshared \"$0\" && echo ready && exec sleep infinity";
        let mut command = Command::new(unshare());
        command.args(["--mount", "--propagation", "private", "sh", "-c", script]).arg(&pods);
        let holder = Child::spawn("the host", &mut command);
        let ready = |lines: &[String]| lines.iter().any(|line| line == "ready").then_some(());
        holder.stdout().until("the host's mounts", std::time::Duration::from_secs(20), ready).await;
        Self { holder, dir: dir.to_owned() }
    }

    /// The kubelet's directory.
    pub fn kubelet(&self) -> PathBuf {
        self.dir.join("kubelet")
    }

    fn enter(&self) -> Vec<String> {
        let nsenter = tools::system("nsenter", "util-linux").display().to_string();
        vec![nsenter, format!("--mount=/proc/{}/ns/mnt", self.holder.pid())]
    }

    /// The words before a program that runs directly on the host.
    pub fn words(&self) -> Vec<String> {
        self.enter()
    }

    /// The words before a program in a container whose mounts below the kubelet's directory propagate to the host (`Bidirectional`).
    pub fn container(&self) -> Vec<String> {
        let mut words = self.enter();
        words.extend([&unshare(), "--mount", "--propagation", "unchanged"].map(str::to_owned));
        words
    }

    /// The words before a program in a container without capabilities, which does not see the kubelet's directory.
    pub fn unprivileged(&self) -> Vec<String> {
        let setpriv = tools::system("setpriv", "util-linux").display().to_string();
        let script = format!(
            "mount -t tmpfs none '{}' && exec '{setpriv}' --no-new-privs --inh-caps=-all --bounding-set=-all \"$@\"",
            self.kubelet().display()
        );
        let mut words = self.enter();
        words.extend([&unshare(), "--mount", "--propagation", "private", "sh", "-c", &script, "agent"].map(str::to_owned));
        words
    }

    /// The words before a program in a pod that has `volume` at [`IN_POD`] and does not see the host's directories.
    pub fn pod(&self, volume: &Path) -> Vec<String> {
        // As a runtime does: the volume is taken from the host, bound to its place in the pod, and the host's directories are hidden.
        let script = format!("mount --bind \"$0\" {IN_POD} && mount -t tmpfs none '{}' && exec \"$@\"", self.dir.display());
        let mut words = self.enter();
        words.extend([&unshare(), "--mount", "--propagation", "slave", "sh", "-c", &script].map(str::to_owned));
        words.push(volume.display().to_string());
        words
    }

    /// Runs a program of the system in such a pod to its end.
    pub async fn in_pod(&self, volume: &Path, program: &str) -> std::process::Output {
        let words = self.pod(volume);
        let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
        words.extend(["sh", "-c", program]);
        child::run(Path::new(words[0]), &words[1..], std::time::Duration::from_secs(30)).await
    }

    /// The host's mounts below the directory of the pods.
    pub fn mounts(&self) -> Vec<Mount> {
        let pods = self.kubelet().join("pods");
        mounts(self.holder.pid()).into_iter().filter(|mount| mount.target.starts_with(&pods) && mount.target != pods).collect()
    }

    /// Device and inode of `path` on the host.
    pub fn inode(&self, path: &Path) -> Option<(u64, u64)> {
        let seen = format!("/proc/{}/root{}", self.holder.pid(), path.display());
        fs::metadata(seen).ok().map(|meta| (meta.dev(), meta.ino()))
    }
}

/// All mounts of a process.
pub fn mounts(process: Pid) -> Vec<Mount> {
    let table = fs::read_to_string(format!("/proc/{process}/mountinfo")).expect("the process lives");
    let mounts = table.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(3);
        let (root, target) = (PathBuf::from(fields.next()?), PathBuf::from(fields.next()?));
        Some(Mount { root, target, options: fields.next()?.to_owned() })
    });
    mounts.collect()
}

fn unshare() -> String {
    tools::system("unshare", "util-linux").display().to_string()
}
