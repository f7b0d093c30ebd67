//! The control plane that the test programs of a run share. Cargo starts these programs one after the other, and the control plane ends
//! with cargo.
//!
//! Its files are in `target/tmp/controlplane-run-<pid of cargo>-<start of cargo>`. A test program that cargo did not start gets a control
//! plane that ends with the program.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio, id},
    sync::OnceLock,
};

use nix::fcntl::{Flock, FlockArg};

use crate::{
    free_port, paths,
    plane::{self, PREFIX, sweep},
    tools,
};

/// Number of log lines that are printed if it does not start.
const SHOWN_LINES: usize = 40;

/// A process, distinguished from a later one with the same ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    id: u32,
    /// In clock ticks since the boot: field 22 of `/proc/<pid>/stat`.
    started: u64,
}

/// An administrator's kubeconfig. The first call of a run starts the control plane. Panics if it does not start.
pub fn kubeconfig() -> &'static Path {
    static KUBECONFIG: OnceLock<PathBuf> = OnceLock::new();
    KUBECONFIG.get_or_init(|| of_run(cargo().unwrap_or_else(|| process(id()).expect("this process").0)))
}

/// The control plane of the run, which lives as long as `run`.
fn of_run(run: Process) -> PathBuf {
    let folder = paths::tmp().join(format!("{PREFIX}run-{}-{}", run.id, run.started));
    fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let turn = File::create(folder.join("start.lock")).expect("a file of this run");
    let _turn = Flock::lock(turn, FlockArg::LockExclusive).map_err(|(_, e)| e).expect("the run's lock");
    let files = folder.join("files");
    let kubeconfig = files.join("admin.kubeconfig");
    if kubeconfig.is_file() {
        if is_running(&files) {
            return kubeconfig;
        }
        println!("figure: the shared control plane has ended; its log was {}", log(&folder));
        fs::remove_dir_all(&files).expect("its files can be removed");
    }
    sweep();
    start(run, &folder, &files)
}

/// The control plane holds a lock while it runs.
fn is_running(files: &Path) -> bool {
    let lock = File::open(files.join("lock")).expect("the control plane's lock");
    Flock::lock(lock, FlockArg::LockExclusiveNonblock).is_err()
}

/// Starts it in a separate process group: a signal to the tests' group reaches it as the end of cargo.
#[allow(clippy::zombie_processes, reason = "both processes go on when this one ends")]
fn start(run: Process, folder: &Path, files: &Path) -> PathBuf {
    let mut end = Command::new(tools::system("tail", "coreutils"));
    end.args(["--follow", "--sleep-interval=0.2", &format!("--pid={}", run.id), "/dev/null"]);
    let mut end =
        end.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0).spawn().expect("tail can be started");
    let mut plane = plane::command(files, free_port());
    plane.stdin(end.stdout.take().expect("a pipe"));
    plane.stderr(File::create(folder.join("stderr")).expect("a file of this run"));
    let mut plane = plane.process_group(0).spawn().expect("the control plane can be started");
    let kubeconfig = plane::wait_until_ready(&mut plane);
    kubeconfig.unwrap_or_else(|line| panic!("the shared control plane did not start ({line:?}): {}", log(folder)))
}

/// The last lines of its log.
fn log(folder: &Path) -> String {
    let text = fs::read_to_string(folder.join("stderr")).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
}

/// The nearest cargo among the ancestors of this process.
fn cargo() -> Option<Process> {
    let mut next = process(id())?.1;
    loop {
        let (found, parent) = process(next)?;
        if fs::read_to_string(format!("/proc/{next}/comm")).ok()?.trim_end() == "cargo" {
            return Some(found);
        }
        next = parent;
    }
}

/// A process and the id of its parent.
fn process(id: u32) -> Option<(Process, u32)> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The second field is a name in parentheses, with anything in it.
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some((Process { id, started: fields.get(19)?.parse().ok()? }, fields.get(1)?.parse().ok()?))
}
