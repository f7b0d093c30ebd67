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
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn a_confined_process_does_what_is_named_and_nothing_else() {
    in_a_process_of_its_own("child_is_confined");
}

/// Whether an operation failed for lack of permission.
fn is_denied<T>(result: std::io::Result<T>) -> bool {
    result.is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied)
}

#[test]
#[ignore = "runs in a process of its own"]
fn child_is_confined() {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;

    use confinement::{Access, Outcome, Policy, confine};

    if !is_child() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [sockets, named, other] = ["sockets", "named", "other"].map(|name| dir.path().join(name));
    for directory in [&sockets, &named, &other] {
        fs::create_dir(directory).unwrap();
    }
    fs::create_dir(sockets.join("pod")).unwrap();
    for file in [named.join("file"), other.join("file")] {
        fs::write(file, "a").unwrap();
    }
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (own_port, other_port) = (free(), free());
    let access =
        Access { sockets: vec![sockets.clone()], reads: Some(vec![named.clone()]), ports: vec![own_port.port()], starts_programs: false };
    let parent = std::os::unix::process::parent_id();
    let confined = confine(Policy::Auto, &access);
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();

    // The kernel's own report: a filter, and no way to more privileges.
    assert_eq!(confined.seccomp, Outcome::InForce);
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
    let attempts = || {
        assert!(is_denied(Command::new("/bin/true").status()), "a program starts");
        // Threads start by clone3, or clone without new namespaces.
        std::thread::spawn(|| ()).join().unwrap();
        UnixListener::bind(sockets.join("pod/socket")).unwrap();
        fs::rename(sockets.join("pod/socket"), sockets.join("pod/renamed")).unwrap();
        fs::remove_file(sockets.join("pod/renamed")).unwrap();
        TcpListener::bind(own_port).unwrap();
        fs::read(named.join("file")).unwrap();
        crate::per_pod::directory::Root::open(&sockets).unwrap();
        if !confined.landlock.is_in_force() {
            return;
        }
        assert!(is_denied(fs::write(other.join("new"), "")) && is_denied(fs::write(other.join("file"), "")), "a file is written");
        assert!(is_denied(fs::write(sockets.join("file"), "")), "a file is written beside the sockets");
        assert!(is_denied(UnixListener::bind(other.join("socket"))), "a socket is bound elsewhere");
        assert!(is_denied(fs::read(other.join("file"))) && is_denied(fs::read_dir(&other)), "a file is read that is not named");
        assert!(is_denied(fs::remove_file(named.join("file"))) && is_denied(fs::create_dir(sockets.join("more"))));
        // As a debugger does.
        assert!(is_denied(fs::File::open(format!("/proc/{parent}/mem"))), "the memory of another process is read");
        if confined.landlock == Outcome::InForce {
            assert!(is_denied(TcpListener::bind(other_port)), "another port is bound");
            let signal = rustix::process::Pid::from_raw(parent.cast_signed()).unwrap();
            assert_eq!(rustix::process::test_kill_process(signal), Err(rustix::io::Errno::PERM), "another process gets a signal");
        }
    };
    attempts();
    std::thread::scope(|scope| scope.spawn(attempts).join()).unwrap();
    println!("figure: landlock {}, seccomp {}", confined.landlock, confined.seccomp);
}
