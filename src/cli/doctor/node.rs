//! The steps about the node: pidfds of callers, visible processes, file descriptors, and locked memory.

use std::{collections::BTreeMap, fs, path::Path};

use attest_kubernetes::cgroup::{self, HostPrefix};
use nix::sys::resource::{Resource, getrlimit};
use unix_peer::peer;

use super::report::Step;
use crate::{
    cli::Exit,
    config::{Attestation, Config},
    process::memory::{self, Decision, Unlocked},
};

/// Above this share of the limit, file descriptors are scarce.
const MAX_FILES_SHARE: f64 = 0.8;
/// File descriptors beside those of connections.
const OTHER_FILES: u64 = 256;

/// Checks whether the kernel gives a pidfd of a caller.
pub(super) fn kernel(config: &Config) -> Step {
    let name = "kernel";
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(|_| "?".to_owned(), |text| text.trim().to_owned());
    let shared = config.shared_socket.as_ref().filter(|_| config.attestation == Attestation::Kubernetes);
    match (peer::kernel_pins(), shared) {
        (Ok(true), _) => Step::ok(name, format!("Linux {release}, which gives a pidfd of a caller (SO_PEERPIDFD)")),
        (Ok(false), None) => Step::ok(name, format!("Linux {release}; no pidfd of a caller is needed")),
        (Ok(false), Some(shared)) => {
            let detail = format!(
                "Linux {release} gives no pidfd of a caller (SO_PEERPIDFD): a process with a reused pid could be taken for a caller"
            );
            if shared.accept_pid_reuse {
                Step::warning(name, detail, "use Linux 6.5 or newer, or sockets.perPod; sockets.shared.acceptPidReuse accepts the risk")
            } else {
                let remedy = "use Linux 6.5 or newer, or sockets.perPod, or accept the risk with sockets.shared.acceptPidReuse: true";
                Step::failed(name, Exit::Failed, detail, remedy)
            }
        }
        (Err(error), _) => Step::unknown(name, format!("Linux {release}; the check for pidfds failed: {error}"), None),
    }
}

/// Checks whether processes of other pods are visible here.
pub(super) fn host_pids(own: Option<&HostPrefix>) -> Step {
    let Some(own) = own else { return Step::unknown("host pids", "the cgroup of this process is not known", Some("mount /proc")) };
    let read = |entry: &Path| cgroup::read(fs::File::open(entry.join("cgroup"))).ok();
    let uid = |file: &str| cgroup::pod_uid(file, own).ok().map(|uid| uid.to_string());
    let mine = read(Path::new("/proc/self")).and_then(|file| uid(&file));
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = entries.filter(|entry| entry.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok()));
    judge_pids(mine.as_deref(), processes.filter_map(|entry| read(&entry.path())).map(|file| uid(&file)))
}

/// `mine` is the pod of this process, and `visible` has the pod of each visible process.
fn judge_pids(mine: Option<&str>, visible: impl Iterator<Item = Option<String>>) -> Step {
    let name = "host pids";
    let mut counts: BTreeMap<Option<String>, usize> = BTreeMap::new();
    visible.for_each(|pod| *counts.entry(pod).or_default() += 1);
    let processes: usize = counts.values().sum();
    let pods = counts.keys().flatten().filter(|pod| mine != Some(pod)).count();
    let detail = format!("{processes} processes are visible here, of {pods} other pods");
    match mine {
        Some(mine) if counts.keys().all(|pod| pod.as_deref() == Some(mine)) => {
            let remedy = "run the agent with hostPID: true: the shared socket identifies callers by their processes";
            Step::failed(name, Exit::Failed, format!("{detail}: only processes of this pod are visible"), remedy)
        }
        _ => Step::ok(name, detail),
    }
}

/// Checks file descriptors: those of the agent if its metrics are available, otherwise the limit of this process.
pub(super) fn open_files(config: &Config, agent: Option<(u64, u64)>) -> Step {
    let name = "open files";
    let needed = u64::try_from(config.limits.connections).unwrap_or(u64::MAX).saturating_mul(2).saturating_add(OTHER_FILES);
    let (detail, open, most) = match agent {
        Some((open, most)) => (format!("the agent has {open} of {most} files open"), open, most),
        None => {
            let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return Step::unknown(name, "the limit cannot be read", None) };
            (format!("an agent that is started here may open {hard} files"), 0, hard)
        }
    };
    let remedy = "raise the limit of open files of the container runtime or the unit (LimitNOFILE), or lower limits.connections";
    #[expect(clippy::cast_precision_loss, reason = "a share")]
    let share = open as f64 / most.max(1) as f64;
    if share > MAX_FILES_SHARE {
        Step::failed(name, Exit::Failed, format!("{detail}: nearly all of them"), remedy)
    } else if most < needed {
        Step::warning(name, format!("{detail}; limits.connections may take {needed}"), remedy)
    } else {
        Step::ok(name, detail)
    }
}

/// Checks whether keys can reach swap: from the agent's metrics if it answers, otherwise from the rules of `keys.lockMemory` on this node.
pub(super) fn memory_lock(config: &Config, agent: Option<bool>) -> Step {
    let name = "memory lock";
    let words = match agent {
        Some(true) => return Step::ok(name, "the agent's memory is locked: no key reaches swap"),
        Some(false) => "the agent's memory is not locked",
        None => "the agent does not answer, and an agent that is started here would not lock its memory",
    };
    match memory::forecast(config.lock_memory) {
        Decision::Lock if agent.is_none() => {
            Step::ok(name, "the agent does not answer; an agent that is started here would lock its memory")
        }
        Decision::Lock => {
            Step::warning(name, format!("{words}, although it could be locked here"), "its log says why, in the line `process hardened`")
        }
        Decision::Skip(reason @ (Unlocked::Never | Unlocked::NoSwap)) => Step::ok(name, format!("{words}: {reason}")),
        Decision::Skip(reason) => {
            let remedy =
                "add IPC_LOCK to the container's capabilities, or turn swap off; with keys.lockMemory: always the agent does not start";
            Step::warning(name, format!("{words}: {reason}"), remedy)
        }
        Decision::Fail(reason) => {
            let remedy = "add IPC_LOCK to the container's capabilities, or set keys.lockMemory: auto";
            Step::failed(name, Exit::Failed, format!("keys.lockMemory is always, but {reason}: the agent does not start"), remedy)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cli::doctor::report::Outcome, config};

    fn config() -> Config {
        config::dev(config::Dev::default(), &|_| None).unwrap()
    }

    #[test]
    fn a_pod_that_sees_only_itself_lacks_host_pid() {
        let pods = |pods: &[Option<&str>]| pods.iter().map(|pod| pod.map(str::to_owned)).collect::<Vec<_>>().into_iter();
        let step = judge_pids(Some("a"), pods(&[Some("a"), Some("a")]));
        assert!(step.result == Outcome::Failed && step.remedy.unwrap().contains("hostPID: true"));
        for (mine, visible) in [(Some("a"), &[Some("a"), Some("b")][..]), (Some("a"), &[Some("a"), None]), (None, &[None])] {
            assert_eq!(judge_pids(mine, pods(visible)).result, Outcome::Ok);
        }
        assert_eq!(judge_pids(Some("a"), pods(&[Some("b"), Some("c"), None])).detail, "3 processes are visible here, of 2 other pods");
    }

    #[test]
    fn descriptors_are_few_when_nearly_all_are_open_or_the_limits_need_more() {
        let config = config();
        for (agent, result) in [
            ((10, 100_000), Outcome::Ok),
            ((10, 1000), Outcome::Warning),
            ((90_000, 100_000), Outcome::Failed),
            ((900, 1000), Outcome::Failed),
        ] {
            let step = open_files(&config, Some(agent));
            assert_eq!((step.result, step.remedy.is_some()), (result, result != Outcome::Ok), "{agent:?}");
        }
        assert!(open_files(&config, None).detail.starts_with("an agent that is started here may open "));
    }

    #[test]
    fn memory_that_is_locked_or_need_not_be_is_fine() {
        let never = Config { lock_memory: crate::process::LockMemory::Never, ..config() };
        assert_eq!(memory_lock(&never, Some(true)).result, Outcome::Ok);
        let step = memory_lock(&never, Some(false));
        assert_eq!((step.result, &*step.detail), (Outcome::Ok, "the agent's memory is not locked: keys.lockMemory is never"));
    }
}
