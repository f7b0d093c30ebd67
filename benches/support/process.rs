//! A server in a separate process, so that memory and processor time are those of the server alone.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use nix::{
    sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit},
    unistd::{SysconfVar, sysconf},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

/// A running server. Dropping it kills it.
pub struct Server {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Server {
    /// Starts `program` with the arguments that `arguments` derives from a socket's path, and waits until it serves there.
    pub async fn start<A: AsRef<OsStr>>(program: impl AsRef<OsStr>, arguments: impl FnOnce(&Path) -> Vec<A>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("sds.sock");
        let mut child = Command::new(program)
            .args(arguments(&socket))
            .env("SDS_AGENT_LOG", "error")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        let input = child.stdin.take().unwrap();
        while tokio::net::UnixStream::connect(&socket).await.is_err() {
            assert!(child.try_wait().unwrap().is_none(), "the server has ended");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Self { child, input, output, socket, _directory: directory }
    }

    /// The path of its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends a line.
    pub async fn tell(&mut self, line: &str) {
        self.input.write_all(format!("{line}\n").as_bytes()).await.unwrap();
    }

    /// Waits for a line.
    pub async fn hear(&mut self) -> String {
        self.output.next_line().await.unwrap().unwrap()
    }

    /// The resident memory in KiB, once it is stable.
    pub async fn resident(&self) -> f64 {
        let mut last = self.resident_now();
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let now = self.resident_now();
            if (now - last).abs() < 64.0 {
                return now;
            }
            last = now;
        }
    }

    fn resident_now(&self) -> f64 {
        let status = std::fs::read_to_string(self.proc("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// The processor time that it has used, with a resolution of about 10 ms.
    pub fn processor(&self) -> Duration {
        let stat = std::fs::read_to_string(self.proc("stat")).unwrap();
        // Fields are counted after the process name, which may contain any character.
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
        let rate = sysconf(SysconfVar::CLK_TCK).unwrap().unwrap();
        Duration::from_secs_f64(ticks as f64 / rate as f64)
    }

    fn proc(&self, file: &str) -> String {
        format!("/proc/{}/{file}", self.child.id().unwrap())
    }
}

/// The processor time that this process has used.
pub fn used() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    [usage.user_time(), usage.system_time()]
        .map(|time| Duration::from_micros((time.tv_sec() * 1_000_000 + time.tv_usec()) as u64))
        .iter()
        .sum()
}

/// Raises the limit of open files to its maximum.
pub fn raise_open_files() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}
