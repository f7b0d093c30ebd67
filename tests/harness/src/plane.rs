//! The control plane as a process of one test, which the test changes or stops. All other tests use that of the run: `shared_plane`.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{free_port, paths, tools};

/// Prefix of the directories' names; the ID of the test process and a number follow. See `shared_plane` for those of a run.
pub(crate) const PREFIX: &str = "controlplane-";

/// How to start a control plane: with the same port and files each time, so that clients and tokens survive a restart.
#[derive(Debug, Clone)]
pub struct Plan {
    folder: PathBuf,
    port: u16,
    flags: Vec<String>,
}

/// A running control plane. Killed when dropped; it also ends with its standard input, and so with this process, regardless of how that
/// ends.
pub struct Plane {
    plan: Plan,
    kubeconfig: PathBuf,
    process: Child,
    _alive: ChildStdin,
}

/// The command of a control plane that reports on its standard output when it is ready.
pub(crate) fn command(folder: &Path, port: u16) -> Command {
    let mut command = Command::new(tools::controlplane());
    command.arg("--dir").arg(folder).args(["--port", &port.to_string()]).stdout(Stdio::piped());
    command
}

/// Waits for the report, and returns the path of the administrator's kubeconfig. Returns another line as the error; it is empty if the
/// control plane ended.
pub(crate) fn wait_until_ready(process: &mut Child) -> Result<PathBuf, String> {
    let mut line = String::new();
    BufReader::new(process.stdout.take().expect("a pipe")).read_line(&mut line).expect("the control plane's output");
    line.trim_end().strip_prefix("ready ").map(PathBuf::from).ok_or(line)
}

impl Plan {
    /// A plan with new files and a new port. `flags` are passed to the program, see `tests/controlplane/README.md`.
    pub fn new(flags: &[&str]) -> Self {
        let flags = flags.iter().copied().map(str::to_owned).collect();
        Self { folder: files(), port: free_port(), flags }
    }

    /// Passes these flags to the program, instead of the former ones.
    pub fn with(mut self, flags: &[&str]) -> Self {
        self.flags = flags.iter().copied().map(str::to_owned).collect();
        self
    }

    /// Starts the control plane; returns when it is ready.
    pub async fn start(self) -> Plane {
        tokio::task::spawn_blocking(|| Plane::start(self)).await.expect("the control plane starts")
    }
}

impl Plane {
    fn start(plan: Plan) -> Self {
        let mut process =
            command(&plan.folder, plan.port).args(&plan.flags).stdin(Stdio::piped()).spawn().expect("the control plane can be started");
        let alive = process.stdin.take().expect("a pipe");
        let kubeconfig = wait_until_ready(&mut process);
        let kubeconfig = kubeconfig.unwrap_or_else(|line| panic!("the control plane did not start (output {line:?}); its log is above"));
        Self { plan, kubeconfig, process, _alive: alive }
    }

    /// An administrator's kubeconfig.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Stops the process: it keeps its connections and answers nothing, until it is killed.
    pub fn freeze(&self) {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).expect("process ids are small"));
        kill(pid, Signal::SIGSTOP).expect("it runs");
    }

    /// Kills the control plane. The returned plan starts the same cluster again.
    pub fn kill(self) -> Plan {
        self.plan.clone()
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A directory below `target/tmp`, named after this process. Its logs stay for diagnosis after a failure; the next run removes them.
fn files() -> PathBuf {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    if number == 0 {
        sweep();
    }
    paths::tmp().join(format!("{PREFIX}{}-{number}", std::process::id()))
}

/// Removes the files of control planes whose test process or run has ended.
pub(crate) fn sweep() {
    let owner = |name: &str| {
        let name = name.strip_prefix(PREFIX)?;
        name.strip_prefix("run-").unwrap_or(name).split('-').next()?.parse::<u32>().ok()
    };
    for entry in fs::read_dir(paths::tmp()).expect("target/tmp can be read").flatten() {
        let owner = entry.file_name().to_str().and_then(owner);
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            // Another test program can remove them at the same time.
            let removed = fs::remove_dir_all(entry.path());
            assert!(removed.is_ok() || !entry.path().exists(), "{}: {removed:?}", entry.path().display());
        }
    }
}
