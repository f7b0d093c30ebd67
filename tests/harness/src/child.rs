//! A program in the background. Its output is kept and can be awaited line by line. It ends with the test.

use std::{
    path::Path,
    process::{ExitStatus, Output, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::Command,
    sync::watch,
    time::timeout,
};

/// Number of output lines that a failing test prints for each program.
const SHOWN_LINES: usize = 80;

/// A running program. Killed when dropped; a panicking test prints the end of its output.
pub struct Child {
    name: String,
    process: tokio::process::Child,
    pid: Pid,
    stdout: Lines,
    stderr: Lines,
}

impl Child {
    /// Starts the program with an empty standard input.
    pub fn spawn(name: &str, command: &mut Command) -> Self {
        Self::spawn_with(name, command, Stdio::null())
    }

    /// Starts a program that ends with its standard input, and so with this process, regardless of how that ends.
    pub fn spawn_tied(name: &str, command: &mut Command) -> Self {
        Self::spawn_with(name, command, Stdio::piped())
    }

    fn spawn_with(name: &str, command: &mut Command, stdin: Stdio) -> Self {
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut process = command.spawn().unwrap_or_else(|e| panic!("cannot start {name} ({command:?}): {e}"));
        let pid = process.id().and_then(|pid| i32::try_from(pid).ok()).expect("a process that was not waited for has an id");
        let stdout = Lines::follow(process.stdout.take().expect("a pipe"));
        let stderr = Lines::follow(process.stderr.take().expect("a pipe"));
        Self { name: name.to_owned(), process, pid: Pid::from_raw(pid), stdout, stderr }
    }

    /// The process ID.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The standard output.
    pub fn stdout(&self) -> Lines {
        self.stdout.clone()
    }

    /// The standard error.
    pub fn stderr(&self) -> Lines {
        self.stderr.clone()
    }

    /// Both outputs together, for searches.
    pub fn output(&self) -> String {
        [self.stdout.text(), self.stderr.text()].concat()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid, signal).unwrap_or_else(|e| panic!("cannot send {signal} to {}: {e}", self.name));
    }

    /// Waits for the end of the process and of its output.
    pub async fn exit(&mut self, limit: Duration) -> ExitStatus {
        let waited = timeout(limit, async {
            let status = self.process.wait().await;
            self.stdout.ended().await;
            self.stderr.ended().await;
            status
        });
        waited.await.unwrap_or_else(|_| panic!("{} has not ended within {limit:?}", self.name)).expect("it can be waited for")
    }

    /// The exit status, if the process has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.try_wait().expect("it can be waited for")
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let output = self.output();
            let lines: Vec<_> = output.lines().collect();
            let shown = &lines[lines.len().saturating_sub(SHOWN_LINES)..];
            eprintln!("--- {} wrote at last:\n{}\n---", self.name, shown.join("\n"));
        }
    }
}

/// A growing text, shared by all tasks that wait for a line in it.
#[derive(Clone)]
pub struct Lines {
    lines: Arc<Mutex<Vec<String>>>,
    count: watch::Receiver<usize>,
}

impl Lines {
    fn follow(from: impl AsyncRead + Unpin + Send + 'static) -> Self {
        let lines = Arc::<Mutex<Vec<String>>>::default();
        let (grown, count) = watch::channel(0);
        let kept = lines.clone();
        tokio::spawn(async move {
            let mut reader = BufReader::new(from);
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).await.is_ok_and(|read| read > 0) {
                let text = String::from_utf8_lossy(line.trim_ascii_end()).into_owned();
                let mut kept = kept.lock().expect("not poisoned");
                kept.push(text);
                grown.send_replace(kept.len());
                line.clear();
            }
        });
        Self { lines, count }
    }

    /// Returns when the output is complete.
    async fn ended(&self) {
        let mut count = self.count.clone();
        while count.changed().await.is_ok() {}
    }

    /// The text so far.
    pub fn text(&self) -> String {
        let lines = self.lines.lock().expect("not poisoned");
        lines.iter().flat_map(|line| [line, "\n"]).collect()
    }

    /// Waits until `enough` returns a value for the text as a whole. Panics if the text ends or `limit` passes before.
    pub async fn until<T>(&self, what: &str, limit: Duration, mut enough: impl FnMut(&[String]) -> Option<T>) -> T {
        let mut count = self.count.clone();
        let waited = timeout(limit, async {
            loop {
                count.borrow_and_update();
                if let Some(found) = enough(&self.lines.lock().expect("not poisoned")) {
                    return Some(found);
                }
                count.changed().await.ok()?;
            }
        });
        match waited.await {
            Ok(Some(found)) => found,
            Ok(None) => panic!("{what}: the output ended before"),
            Err(_) => panic!("{what}: not within {limit:?}"),
        }
    }
}

/// Runs a program to its end and returns its output.
pub async fn run(program: &Path, arguments: &[&str], limit: Duration) -> Output {
    let mut command = Command::new(program);
    command.args(arguments);
    finish(command, limit).await
}

/// Runs a command to its end and returns its output.
pub async fn finish(mut command: Command, limit: Duration) -> Output {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(limit, command.output()).await;
    let output = output.unwrap_or_else(|_| panic!("{:?} has not ended within {limit:?}", command.as_std()));
    output.unwrap_or_else(|e| panic!("cannot run {:?}: {e}", command.as_std()))
}

/// Runs a program to its end and returns its standard output. Panics unless it succeeds.
pub async fn succeed(program: &Path, arguments: &[&str], limit: Duration) -> String {
    let output = run(program, arguments, limit).await;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {arguments:?}: {}\n{stdout}{stderr}", program.display(), output.status);
    stdout
}
