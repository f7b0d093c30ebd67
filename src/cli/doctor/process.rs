//! The steps about a process: its pidfd and its cgroups, checked by the functions that attest it.

use std::{fs, path::Path};

use attest_kubernetes::cgroup::{self, HostPrefix, PodUid};
use unix_peer::peer::Peer;

use super::report::Step;
use crate::{cli::Exit, config::SharedSocket};

/// Checks the shared socket. Returns the process that listens on it.
pub(super) fn socket(shared: &SharedSocket) -> (Step, Option<i32>) {
    match listening(shared) {
        Ok((step, pid)) => (step, Some(pid)),
        Err(step) => (step, None),
    }
}

fn listening(shared: &SharedSocket) -> Result<(Step, i32), Step> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let (path, name) = (shared.path.display(), "socket");
    let running = "check that the agent runs on this node and that its directory is mounted here";
    let meta = match fs::symlink_metadata(&shared.path) {
        Ok(meta) => meta,
        Err(error) => return Err(Step::failed(name, Exit::Unavailable, format!("{path}: {error}"), running)),
    };
    if !meta.file_type().is_socket() {
        return Err(Step::failed(name, Exit::Failed, format!("{path} is not a socket"), "remove it and restart the agent"));
    }
    let mode = meta.mode() & 0o7777;
    let found = format!("{path}: mode {mode:04o}, inode {}", meta.ino());
    if mode != shared.mode {
        let remedy = format!("restart the agent; sockets.shared.mode says {:04o}", shared.mode);
        return Err(Step::failed(name, Exit::Failed, found, remedy));
    }
    match std::os::unix::net::UnixStream::connect(&shared.path).and_then(|stream| Peer::of(&stream)) {
        Ok(server) => {
            let who = comm(Path::new("/proc"), server.pid);
            Ok((Step::ok(name, format!("{found}; process {} ({who}) listens on it", server.pid)), server.pid))
        }
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            let detail = format!("{found}; no process listens on it: it was left by an agent that ended without removing it");
            let remedy = "start the agent, which replaces it; if an agent runs, it serves another directory: compare the mounts";
            Err(Step::failed(name, Exit::Unavailable, detail, remedy))
        }
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            let detail = format!("{found}; this user may not connect");
            Err(Step::failed(name, Exit::NotPermitted, detail, "see sockets.shared.mode, and the modes of the directories above it"))
        }
        Err(error) => Err(Step::failed(name, Exit::Unavailable, format!("{found}; cannot connect: {error}"), running)),
    }
}

/// Checks a process and opens its pidfd. Returns the peer for attestation.
pub(super) fn process(pid: i32) -> (Vec<Step>, Option<Peer>) {
    let proc = Path::new("/proc");
    if !proc.join(pid.to_string()).exists() {
        let remedy = "use its pid on the node (hostPID), not its pid in the container";
        return (vec![Step::failed("process", Exit::Failed, format!("there is no process {pid}"), remedy)], None);
    }
    match Peer::of_process(pid) {
        Ok(peer) => {
            let runs = Step::ok("process", format!("{pid} ({}), uid {}, gid {}", comm(proc, pid), peer.uid, peer.gid));
            let step = Step::ok("handle", "the kernel gives a pidfd, and the process runs");
            (vec![runs, step], Some(peer))
        }
        Err(error) => {
            let remedy = "the shared socket needs Linux 6.5 or newer, and a process that still runs";
            (vec![Step::failed("handle", Exit::Failed, format!("no pidfd for process {pid}: {error}"), remedy)], None)
        }
    }
}

/// The agent's cgroup prefix, taken from this process, which must run where the agent runs.
pub(super) fn own(pod_uid: Option<&str>) -> (Step, Option<HostPrefix>) {
    let read = cgroup::read(fs::File::open("/proc/self/cgroup")).map_err(|error| error.to_string());
    match read.and_then(|file| HostPrefix::of(&file, pod_uid).map_err(|error| error.to_string())) {
        Ok(own) => (Step::ok("own prefix", format!("the agent ignores this beginning of cgroup paths: {own}")), Some(own)),
        Err(error) => (Step::failed("own prefix", Exit::Failed, error, "mount /proc"), None),
    }
}

/// Checks the cgroup file of a process: the verdict of each line, and the pod that follows from all lines.
pub(super) fn cgroups(pid: i32, own: &HostPrefix) -> (Step, Option<PodUid>) {
    match cgroup::read(fs::File::open(Path::new("/proc").join(pid.to_string()).join("cgroup"))) {
        Ok(file) => judge(&file, own),
        Err(error) => {
            let step = Step::failed("cgroups", Exit::Failed, format!("/proc/{pid}/cgroup: {error}"), "the process may have ended");
            (step, None)
        }
    }
}

fn judge(file: &str, own: &HostPrefix) -> (Step, Option<PodUid>) {
    let mut detail: Vec<String> = file.lines().map(|line| format!("{line}  [{}]", verdict(line, own))).collect();
    match cgroup::pod_uid(file, own) {
        Ok(uid) => {
            detail.insert(0, format!("pod {uid}"));
            (Step::ok("cgroups", detail.join("\n")), Some(uid))
        }
        Err(error) => {
            let remedy = match error {
                cgroup::Error::NotInPod(_) => {
                    "only processes of pods are served on the shared socket; check that it is a container of this node's kubelet"
                }
                cgroup::Error::Conflicting { .. } => "the process was moved to another cgroup: restart its pod",
                cgroup::Error::Malformed(_) => "this is not a cgroup file of the kernel; check that /proc is mounted",
            };
            detail.insert(0, error.to_string());
            (Step::failed("cgroups", Exit::NotPermitted, detail.join("\n"), remedy), None)
        }
    }
}

/// The verdict of one line: the result for a file with only this line.
fn verdict(line: &str, own: &HostPrefix) -> String {
    match cgroup::pod_uid(line, own) {
        Ok(uid) => {
            let names_it = |segment: &&str| cgroup::pod_uid(&format!("0::/{segment}"), &HostPrefix::default()).as_ref() == Ok(&uid);
            format!("decided by {}", line.split('/').find(names_it).unwrap_or("it"))
        }
        Err(cgroup::Error::NotInPod(_)) => "no pod".to_owned(),
        Err(error) => error.to_string(),
    }
}

/// The processes of a pod, found by the same check of their cgroup files.
pub(super) fn of_pod(uid: &str, own: &HostPrefix) -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let file = cgroup::read(fs::File::open(Path::new("/proc").join(pid.to_string()).join("cgroup")));
        file.is_ok_and(|file| cgroup::pod_uid(&file, own).is_ok_and(|found| found.as_str() == uid))
    })
    .collect()
}

pub(super) fn comm(proc: &Path, pid: i32) -> String {
    fs::read_to_string(proc.join(pid.to_string()).join("comm")).map_or_else(|_| "?".to_owned(), |name| name.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::report::Outcome;

    const A: &str = "2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4e";

    #[test]
    fn each_line_tells_what_decided_and_why_none_did() {
        let (step, uid) = judge(&format!("2:memory:/kubepods/burstable/pod{A}/f00/kubepods/podx\n0::/\n"), &HostPrefix::default());
        assert_eq!(uid.unwrap().as_str(), A);
        let expected = format!("pod {A}\n2:memory:/kubepods/burstable/pod{A}/f00/kubepods/podx  [decided by pod{A}]\n0::/  [no pod]");
        assert_eq!((step.result, step.detail), (Outcome::Ok, expected));

        let (step, uid) = judge("0::/user.slice/x", &HostPrefix::default());
        assert_eq!((step.result, uid), (Outcome::Failed, None));
        assert!(step.detail.starts_with("its cgroup paths contain no pod") && step.remedy.is_some(), "{step:?}");
    }

    #[test]
    fn this_process_has_a_handle_and_nobody_has_none() {
        let (steps, peer) = process(i32::try_from(std::process::id()).unwrap());
        assert!(steps.iter().all(|step| step.result == Outcome::Ok) && peer.unwrap().is_alive(), "{steps:?}");
        let (steps, peer) = process(i32::MAX);
        assert_eq!((steps.len(), steps[0].name, steps[0].result), (1, "process", Outcome::Failed));
        assert!(peer.is_none());
    }

    #[test]
    fn a_socket_that_is_none_or_that_nobody_serves_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let shared = |name: &str, mode| SharedSocket { path: dir.path().join(name), mode, accept_pid_reuse: false };
        fs::write(dir.path().join("file"), "").unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(dir.path().join("served")).unwrap();
        let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(dir.path().join("served")).unwrap()) & 0o7777;
        let (step, pid) = socket(&shared("served", mode));
        assert_eq!((step.result, pid), (Outcome::Ok, i32::try_from(std::process::id()).ok()));
        drop(std::os::unix::net::UnixListener::bind(dir.path().join("stale")).unwrap());
        let (step, pid) = socket(&shared("stale", mode));
        assert!(step.detail.contains("left by an agent that ended") && pid.is_none(), "{step:?}");
        for (name, words) in [("none", "No such file"), ("file", "is not a socket"), ("served", "mode")] {
            let (step, _) = socket(&shared(name, 0o1));
            assert!(step.result == Outcome::Failed && step.detail.contains(words), "{step:?}");
        }
    }
}
