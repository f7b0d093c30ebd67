//! Hardening changes the whole process, so each test starts this binary again as a child process that runs one ignored test.

use std::{fs, process::Command};

use rustix::{
    process::{DumpableBehavior, Resource, Rlimit, dumpable_behavior, getrlimit, setrlimit},
    thread::{CapabilitySet, capabilities, set_capabilities},
};

use super::*;

/// Set for the child, so that `--include-ignored` does not harden the process of all tests.
const CHILD: &str = "SDS_AGENT_TEST_CHILD";

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

fn in_a_process_of_its_own(test: &str) {
    let name = format!("process::tests::{test}");
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--exact", &name, "--ignored", "--nocapture"]).env(CHILD, "1").output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn hardening_leaves_no_core_and_no_dump_and_raises_the_descriptor_limit() {
    in_a_process_of_its_own("child_hardens");
}

#[test]
#[ignore = "runs in a process of its own"]
fn child_hardens() {
    if !is_child() {
        return;
    }
    let hard = getrlimit(Resource::Nofile).maximum.unwrap();
    let limited = |soft: u64, hard: u64| Rlimit { current: Some(soft), maximum: Some(hard) };
    setrlimit(Resource::Nofile, limited(256.min(hard), hard)).unwrap();
    let hardened = harden(LockMemory::Never).unwrap();
    assert_eq!(getrlimit(Resource::Core), limited(0, 0));
    assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
    assert_eq!(getrlimit(Resource::Nofile), limited(hard, hard));
    assert_eq!(hardened.open_files, OpenFiles { limit: hard, before: 256.min(hard) });
    assert_eq!(hardened.locked, Locked::No(Unlocked::Never));
    assert_eq!(locked_kib(), 0);
}

#[test]
fn with_a_finite_limit_and_no_capability_nothing_is_locked() {
    in_a_process_of_its_own("child_without_the_capability");
}

#[test]
#[ignore = "runs in a process of its own"]
fn child_without_the_capability() {
    if !is_child() {
        return;
    }
    let mut sets = capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::IPC_LOCK);
    set_capabilities(None, sets).unwrap();
    let before = getrlimit(Resource::Memlock);
    let limit = before.current.unwrap_or(u64::MAX).min(64 << 10);
    setrlimit(Resource::Memlock, Rlimit { current: Some(limit), ..before }).unwrap();

    let reason = Unlocked::NotAllowed { limit };
    assert_eq!(harden(LockMemory::Always), Err(Error::NotLocked(reason)));
    let text = Error::NotLocked(reason).to_string();
    assert!(text.starts_with("keys.lockMemory is always, but") && text.contains("IPC_LOCK"), "{text}");
    let auto = harden(LockMemory::Auto).unwrap();
    assert!(matches!(auto.locked, Locked::No(Unlocked::NotAllowed { .. } | Unlocked::NoSwap)), "{auto:?}");
    assert_eq!(locked_kib(), 0);
}

#[test]
fn where_allowed_everything_is_locked_and_threads_still_start() {
    let allowed = capabilities(None).unwrap().effective.contains(CapabilitySet::IPC_LOCK) || getrlimit(Resource::Memlock).current.is_none();
    if allowed {
        in_a_process_of_its_own("child_locks");
    }
}

#[test]
#[ignore = "runs in a process of its own"]
fn child_locks() {
    if !is_child() {
        return;
    }
    assert_eq!(harden(LockMemory::Always).unwrap().locked, Locked::Yes);
    assert!(locked_kib() > 0);
    let threads: Vec<_> = (0..16).map(|_| std::thread::spawn(|| vec![1u8; 4 << 20].len())).collect();
    assert!(threads.into_iter().all(|thread| thread.join().unwrap() == 4 << 20));
}

fn locked_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
