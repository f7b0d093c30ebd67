//! Keys exist only in memory: no file is written, no core dump is possible, and writable memory is locked where this is permitted.
//!
//! Each assertion is also checked with a process that does what the agent must not do.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use tempfile::TempDir;
use test_harness::{
    agent::{self, Launch},
    child::{self, Child},
    eventually, fetch, tools, trace,
};
use tokio::process::Command;

const PATIENCE: Duration = Duration::from_secs(30);
/// The ID of the user `nobody`, who has no permissions.
const NOBODY: u32 = 65_534;
const MEMLOCK: u64 = 64 << 10;

const EMBEDDED: &str = "attestation: unix\nissuer: { embedded: {} }\n";

#[tokio::test]
async fn nothing_is_written_in_a_whole_rotation() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("trace");
    let wrapper = trace::wrapper(&tools::strace(), &log);
    let mut agent = Launch::dev(dir.path()).lifetime("10s").under(wrapper).start().await;
    let (watch, lines) = fetch::watch(agent.socket());
    lines.until("a rotation", Duration::from_secs(60), |lines| (lines.len() >= 2).then_some(())).await;
    drop(watch);
    agent.terminate();
    let status = agent.exit(PATIENCE).await;
    assert!(status.success(), "{status}");

    let trace = trace::read(&log, PATIENCE).await;
    assert!(trace.contains("/proc/"), "the agent reads there at least: {} lines", trace.lines().count());
    assert_eq!(trace::writes(&trace), Vec::<&str>::new());
    assert!(trace::not_dumpable(&trace), "no PR_SET_DUMPABLE in the trace");
}

/// The control of the test above.
#[tokio::test]
async fn the_trace_shows_a_process_that_writes() {
    let dir = tempfile::tempdir().unwrap();
    let (log, target) = (dir.path().join("trace"), dir.path().join("key.pem"));
    let mut words = trace::wrapper(&tools::strace(), &log);
    words.extend(["sh".to_owned(), "-c".to_owned(), format!("(echo key >'{}'; true >/dev/null)", target.display())]);
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    child::succeed(Path::new(words[0]), &words[1..], PATIENCE).await;
    let trace = trace::read(&log, PATIENCE).await;
    let writes = trace::writes(&trace);
    assert!(matches!(writes.as_slice(), [write] if write.contains("key.pem")), "{writes:?}");
    assert!(!trace::not_dumpable(&trace));
}

#[tokio::test]
async fn every_writable_mapping_is_locked_when_asked() {
    for (policy, locked) in [("always", true), ("never", false)] {
        let dir = tempfile::tempdir().unwrap();
        let agent = Launch::run(dir.path(), &format!("{EMBEDDED}keys: {{ lockMemory: {policy} }}\n")).start().await;
        assert_eq!(fetch::once(agent.socket()).await.len(), 2);
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", agent.process().pid())).unwrap();
        assert!(smaps.contains("VmFlags:"), "the kernel does not show the flags of mappings");
        let unlocked = trace::unlocked_writable(&smaps);
        assert_eq!(unlocked.is_empty(), locked, "lockMemory: {policy}: {unlocked:?}");
        assert_eq!(agent.metric("sds_agent_memory_locked").await > 0.5, locked);
    }
}

/// This user has a small limit for locked memory: `mlockall` would succeed, and the next thread or allocation would fail.
#[tokio::test]
async fn a_finite_limit_is_not_trusted() {
    let nobody = Nobody::new();
    let agent = nobody.launch("auto").under_swap(&nobody).start().await;
    assert_eq!(fetch::once(agent.socket()).await.len(), 2);
    agent.wrote(&format!("RLIMIT_MEMLOCK is {MEMLOCK} bytes"), 1).await;
    assert!(agent.metric("sds_agent_memory_locked").await < 0.5);
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", agent.process().pid())).unwrap();
    assert!(!trace::unlocked_writable(&smaps).is_empty(), "it has locked memory under a limit");
}

#[tokio::test]
async fn a_lock_that_must_be_and_cannot_ends_the_agent() {
    let nobody = Nobody::new();
    let mut agent = nobody.launch("always").spawn();
    let status = agent.exit(PATIENCE).await;
    assert!(!status.success());
    let output = agent.process().output();
    assert!(output.contains("keys.lockMemory is always") && output.contains("IPC_LOCK"), "{output}");
}

/// A process that is not dumpable is protected from its own user as if it were root's. Root can still read it, so this test reads as
/// `nobody`.
#[tokio::test]
async fn its_own_user_cannot_read_it() {
    let nobody = Nobody::new();
    let agent = nobody.launch("auto").start().await;
    assert!(!Nobody::can_read_environ(agent.process()).await, "the agent's memory is open to its user");

    // The control: the user can read every other process of its own.
    let (name, words) = Nobody::words();
    let mut command = Command::new(name);
    command.args(words).args(["sleep", "60"]);
    let open = Child::spawn("sleep", &mut command);
    eventually("the user nobody can read another of its processes", PATIENCE, async || {
        if Nobody::can_read_environ(&open).await { Ok(()) } else { Err("refused".to_owned()) }
    })
    .await;
}

/// A user without permissions, and a directory that it can use.
struct Nobody {
    dir: TempDir,
    program: PathBuf,
}

impl Nobody {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // A program that its user cannot read is not dumpable for that reason alone, so it must be readable.
        let program = dir.path().join("sds-agent");
        fs::copy(agent::program(), &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        chown(dir.path(), Some(NOBODY), Some(NOBODY)).expect("these tests need root");
        Self { dir, program }
    }

    /// The program and arguments that run the following words as this user, with a small limit for locked memory.
    fn words() -> (String, Vec<String>) {
        let limit = format!("--memlock={MEMLOCK}:{MEMLOCK}");
        let (prlimit, setpriv) = (tools::prlimit(), tools::setpriv());
        let user = [format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"), "--clear-groups".to_owned()];
        let words = [limit, setpriv.display().to_string()].into_iter().chain(user).collect();
        (prlimit.display().to_string(), words)
    }

    fn launch(&self, policy: &str) -> NobodysLaunch {
        let launch = Launch::run(self.dir.path(), &format!("{EMBEDDED}keys: {{ lockMemory: {policy} }}\n")).program(&self.program);
        let (program, words) = Self::words();
        NobodysLaunch { launch, words: [vec![program], words].concat() }
    }

    /// Reads as this user. The content is not printed, not even by a failing test.
    async fn can_read_environ(process: &Child) -> bool {
        let (program, words) = Self::words();
        let path = format!("/proc/{}/environ", process.pid());
        let words: Vec<_> = words.iter().map(String::as_str).chain(["cat", &path]).collect();
        let output = child::run(Path::new(&program), &words, PATIENCE).await;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() || said.contains("Permission denied"), "cat failed for another reason: {said}");
        output.status.success()
    }
}

/// A launch as that user.
struct NobodysLaunch {
    launch: Launch,
    words: Vec<String>,
}

impl NobodysLaunch {
    /// Simulates a machine with swap. Without swap there is no reason to lock memory.
    fn under_swap(mut self, nobody: &Nobody) -> Self {
        let swaps = nobody.dir.path().join("swaps");
        fs::write(&swaps, "Filename\tType\tSize\tUsed\tPriority\n/dev/none\tpartition\t1024\t0\t-2\n").unwrap();
        let script = format!("mount --bind '{}' /proc/swaps && exec \"$0\" \"$@\"", swaps.display());
        let unshare = tools::system("unshare", "util-linux").display().to_string();
        let before = [unshare, "--mount".to_owned(), "sh".to_owned(), "-c".to_owned(), script];
        self.words.splice(0..0, before);
        self
    }

    async fn start(self) -> agent::Agent {
        self.launch.under(self.words).start().await
    }

    fn spawn(self) -> agent::Agent {
        self.launch.under(self.words).spawn()
    }
}
