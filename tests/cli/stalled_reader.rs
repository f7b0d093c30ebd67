//! Programs whose log reader stalls still serve and still end.

use std::{
    fs,
    io::{BufRead, BufReader, ErrorKind, PipeReader, PipeWriter, Read, Write},
    net::TcpStream,
    os::{
        fd::AsRawFd,
        unix::{fs::OpenOptionsExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A limit for a busy machine. A regression never passes it.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// The metric of dropped lines.
const DROPPED: &str = "sds_agent_log_lines_dropped_total ";

/// A program, and both ends of the pipe that is its standard error.
struct Program {
    child: Option<Child>,
    pid: Pid,
    /// The address of `/metrics`, `/livez` and more.
    address: String,
    reader: Option<PipeReader>,
    writer: PipeWriter,
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // The program may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub(super) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sds-agent"));
    for variable in ["NODE_NAME", "POD_NAMESPACE", "POD_NAME", "POD_UID", "KUBECONFIG", "XDG_RUNTIME_DIR"] {
        command.env_remove(variable);
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Fills the pipe completely, while a program may write to it too.
fn fill(writer: &PipeWriter) {
    // Opened again, so that O_NONBLOCK does not apply to the program's end of the pipe.
    let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
    let mut again = fs::OpenOptions::new().write(true).custom_flags(nix::libc::O_NONBLOCK).open(path).expect("the pipe is opened");
    for bytes in [&[b'\n'; 4096][..], b"\n"] {
        loop {
            match again.write(bytes) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("the pipe cannot be filled: {error}"),
            }
        }
    }
}

/// Reads lines in a separate thread, so that waiting for a line can time out.
pub(super) fn lines(reader: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || BufReader::new(reader).lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
    told
}

/// Waits for a line for which `take` returns a value.
pub(super) fn line<T>(lines: &mpsc::Receiver<String>, take: impl Fn(&str) -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if let Some(taken) = take(&lines.recv_timeout(left).expect("the line comes in time")) {
            return taken;
        }
    }
}

/// The address of metrics and probes in the log line that reports it.
fn address(line: &str) -> Option<String> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    (line["message"] == "serving metrics and probes").then(|| line["address"].as_str().map(str::to_owned))?
}

impl Program {
    /// The agent with the embedded issuer. Its log is never read.
    fn agent(directory: &Path) -> Self {
        let socket = socket(directory);
        let (reader, writer) = std::io::pipe().expect("a pipe");
        fill(&writer);
        let mut command = command(&["dev", "--socket", socket.to_str().expect("a plain path"), "--admin", "127.0.0.1:0"]);
        // At this level the log fills a queue of any size.
        command.env("SDS_AGENT_LOG", "debug").stderr(writer.try_clone().expect("the pipe's end")).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the agent starts");
        let told = lines(child.stdout.take().expect("a pipe"));
        let address = line(&told, |line| Some(line.split_once("http://")?.1.split_once("/certs")?.0.to_owned()));
        Self::started(child, address, Some(reader), writer)
    }

    fn started(child: Child, address: String, reader: Option<PipeReader>, writer: PipeWriter) -> Self {
        let pid = Pid::from_raw(child.id().try_into().expect("a pid"));
        Self { child: Some(child), pid, address, reader, writer }
    }

    fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").expect("the request is sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer in time");
        answer
    }

    fn is_alive(&self) {
        assert!(self.get("/livez").starts_with("HTTP/1.1 200"));
    }

    fn dropped(&self) -> u64 {
        let page = self.get("/metrics");
        page.lines().find_map(|line| line.strip_prefix(DROPPED)).expect("the metric is there").parse().expect("a number")
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid, signal).expect("the program is there");
    }

    /// Returns the exit code of a program that ends by itself.
    fn ended(&mut self) -> Option<i32> {
        let mut child = self.child.take().expect("it has not ended before");
        let (tell, told) = mpsc::channel();
        thread::spawn(move || tell.send(child.wait().expect("a child").code()));
        told.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            let _ = kill(self.pid, Signal::SIGKILL);
            panic!("it does not end");
        })
    }
}

fn socket(directory: &Path) -> PathBuf {
    directory.join("sds.sock")
}

fn fetch(directory: &Path) -> Output {
    let socket = socket(directory);
    let arguments = ["fetch", "--socket", socket.to_str().expect("a plain path"), "-o", "json", "--timeout", "60s"];
    command(&arguments).output().expect("fetch runs")
}

/// Sends several thousand PINGs on a connection, each of which is one or two log lines at this level, and reads their answers.
fn pings(directory: &Path) {
    const PINGS: usize = 2000;
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    const PING: &[u8] = b"\0\0\x08\x06\0\0\0\0\0whatever";
    let mut stream = UnixStream::connect(socket(directory)).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut writer = stream.try_clone().expect("its other half");
    let writing = thread::spawn(move || writer.write_all(&[PREFACE, &PING.repeat(PINGS)].concat()));
    stream.read_exact(&mut vec![0; PING.len() * PINGS]).expect("an answer to each");
    writing.join().expect("no panic").expect("they are sent");
}

#[test]
fn an_agent_whose_log_is_not_read_serves_and_ends() {
    let directory = tempfile::tempdir().expect("a temporary folder");
    let mut agent = Program::agent(directory.path());
    // Each is a new connection; the first one also causes an issuance.
    for _ in 0..3 {
        let fetched = fetch(directory.path());
        assert!(fetched.status.success(), "{fetched:?}");
    }
    agent.is_alive();
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.ended(), Some(0));
}

#[test]
fn a_second_signal_ends_an_agent_whose_log_is_not_read() {
    let directory = tempfile::tempdir().expect("a temporary folder");
    let mut agent = Program::agent(directory.path());
    agent.is_alive();
    agent.signal(Signal::SIGTERM);
    // The two signals may be merged into one; then the exit code of a normal end is correct too.
    agent.signal(Signal::SIGINT);
    assert!(matches!(agent.ended(), Some(0 | 1)));
}

#[test]
fn unread_lines_are_counted_and_the_log_goes_on_after_them() {
    let directory = tempfile::tempdir().expect("a temporary folder");
    let mut agent = Program::agent(directory.path());
    let deadline = Instant::now() + 2 * PATIENCE;
    while agent.dropped() == 0 {
        pings(directory.path());
        assert!(Instant::now() < deadline, "no line is dropped");
    }
    let told = lines(agent.reader.take().expect("taken once"));
    let reported: u64 = line(&told, |line| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        line["message"].as_str()?.starts_with("log lines were dropped").then(|| line["lines"].as_u64())?
    });
    assert!(reported > 0);
    assert!(fetch(directory.path()).status.success());
    line(&told, |line| line.contains("caller named").then_some(()));
    agent.signal(Signal::SIGTERM);
    // The last line is written before the end.
    line(&told, |line| line.contains("\"message\":\"stopped\"").then_some(()));
    assert_eq!(agent.ended(), Some(0));
}

#[test]
fn an_agent_whose_greeting_is_not_read_serves_and_ends() {
    let directory = tempfile::tempdir().expect("a temporary folder");
    let socket = socket(directory.path());
    let (reader, writer) = std::io::pipe().expect("a pipe");
    fill(&writer);
    let mut command = command(&["dev", "--socket", socket.to_str().expect("a plain path"), "--admin", "127.0.0.1:0"]);
    let mut child = command.stdout(writer.try_clone().expect("the pipe's end")).stderr(Stdio::piped()).spawn().expect("the agent starts");
    let log = lines(child.stderr.take().expect("a pipe"));
    let mut agent = Program::started(child, String::new(), Some(reader), writer);
    agent.address = line(&log, address);
    agent.is_alive();
    assert!(fetch(directory.path()).status.success());
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.ended(), Some(0));
}

/// An approver with its files in `directory`. Its cluster does not exist, which the approver tolerates.
pub(super) fn approver(directory: &Path) -> Command {
    const KUBECONFIG: &str = r#"
apiVersion: v1
kind: Config
clusters: [ { name: none, cluster: { server: "http://127.0.0.1:1" } } ]
contexts: [ { name: none, context: { cluster: none, user: none } } ]
users: [ { name: none, user: { token: none } } ]
current-context: none
"#;
    let write = |name: &str, text: &str| {
        let path = directory.join(name);
        fs::write(&path, text).expect("a file");
        path
    };
    let config = write(
        "config.yaml",
        "issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }\nadmin: { address: \"127.0.0.1:0\" }\n\
         metrics: { address: \"127.0.0.1:0\" }\nprobes: { address: \"127.0.0.1:0\" }\n",
    );
    let mut command = command(&["approver", "--config", config.to_str().expect("a plain path")]);
    command.env("KUBECONFIG", write("kubeconfig", KUBECONFIG)).env("POD_NAMESPACE", "mesh").env("POD_NAME", "approver-1");
    command
}

#[test]
fn an_approver_whose_log_is_not_read_any_more_answers_and_ends() {
    let directory = tempfile::tempdir().expect("a temporary folder");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut command = approver(directory.path());
    command.env("SDS_AGENT_LOG", "debug");
    let child = command.stderr(writer.try_clone().expect("the pipe's end")).stdout(Stdio::null()).spawn().expect("the approver starts");
    let mut approver = Program::started(child, String::new(), None, writer);

    // Reads only up to the address. The reader is kept, so that the pipe stays open.
    let mut reader = BufReader::new(reader);
    while approver.address.is_empty() {
        let mut line = String::new();
        assert_ne!(reader.read_line(&mut line).expect("a log"), 0, "it has ended");
        approver.address = address(&line).unwrap_or_default();
    }
    fill(&approver.writer);
    for _ in 0..3 {
        approver.is_alive();
    }
    approver.dropped();
    approver.signal(Signal::SIGTERM);
    assert_eq!(approver.ended(), Some(0));
}
