//! The effect of a pod that floods the agent on another pod: `cargo bench --bench flood [-- --json]`.
//!
//! The agent, the flooding pod and the quiet pod are separate processes on one socket; the quiet pod is the bench itself. The agent
//! distinguishes them by the cgroup files of their processes, as on a node. These files are in a directory that replaces `/proc`, so the
//! bench needs no root. Without `--bench` or with `--quick` the counts are so small that the bench only shows errors.
#![allow(
    clippy::cast_precision_loss,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    unreachable_pub,
    reason = "a bench may fail loudly, prints, writes files for its server, and computes with rounded figures"
)]

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use attest_kubernetes::attestor::CgroupOrigins;
use futures::future::BoxFuture;
use sds_server::{
    attest::{Attested, Attestor, Error, Method, origin::Origins, unix::UnixAttestor},
    limits::Limits,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};
use unix_peer::peer::Peer;

use self::support::{
    agent::{self, Timed},
    client::{self, Ask, FETCH},
    flood::Flood,
    process::{Server, raise_open_files},
    stats::{self, Row, Target, median, micros, percentile},
};

mod support;

/// The counts of a run.
#[derive(Clone, Copy)]
struct Scale {
    rounds: usize,
    fetches: usize,
    connects: usize,
    /// Minimum number of attempts by the flood before and during the measurement.
    attempts: u64,
}

const FULL: Scale = Scale { rounds: 7, fetches: 1000, connects: 40, attempts: 10_000 };
const QUICK: Scale = Scale { rounds: 1, fetches: 20, connects: 3, attempts: 300 };

fn main() {
    raise_open_files();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = |threads| tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().unwrap();
    match &arguments[..] {
        [mode, proc, socket] if mode == "serve" => runtime(2).block_on(serve(proc.into(), Path::new(socket))),
        [mode, socket] if mode == "flood" => {
            let runtime = runtime(1);
            let _inside = runtime.enter();
            flood(&Path::new(socket).into());
        }
        _ => {
            let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
            let scale = if has("--bench") && !has("--quick") { FULL } else { QUICK };
            stats::print(&runtime(1).block_on(measure(scale)), has("--json"));
        }
    }
}

/// All callers have the same user; each caller with a cgroup file counts as a pod.
#[derive(Debug)]
struct Pods(Arc<CgroupOrigins>);

impl Attestor for Pods {
    fn method(&self) -> Method {
        Method::unix
    }

    fn origins(&self) -> Origins {
        Origins::ByPod(self.0.clone())
    }

    fn attest<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Result<Attested, Error>> {
        UnixAttestor.attest(peer)
    }
}

/// Runs the agent with its default limits.
async fn serve(proc: PathBuf, socket: &Path) {
    let mut config = agent::config(socket);
    config.limits = Limits::default();
    agent::start_as(&config, Arc::new(Pods(Arc::new(CgroupOrigins::new(proc, Arc::default())))), Timed::new()).await;
    for line in std::io::stdin().lines() {
        drop(line);
    }
}

/// The flooding pod. It reads `go`, then `tell` for each report of its counts, then `stop`.
fn flood(socket: &Arc<Path>) {
    let mut flood: Option<Flood> = None;
    // This is the main thread, which may block; the runtime's worker runs the flood.
    for line in std::io::stdin().lines() {
        match (line.unwrap().as_str(), &flood) {
            ("go", _) => flood = Some(Flood::start(socket)),
            ("tell", Some(flood)) => println!("{} {}", flood.counts.attempts(), flood.counts.told()),
            ("stop", _) => flood = None,
            (other, _) => panic!("no such command: {other}"),
        }
    }
}

/// The other end of [`flood`].
struct Flooder {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Flooder {
    fn start(socket: &Path) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("flood").arg(socket).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { input: child.stdin.take().unwrap(), output, child }
    }

    async fn say(&mut self, line: &str) {
        self.input.write_all(format!("{line}\n").as_bytes()).await.unwrap();
    }

    async fn told(&mut self) -> (u64, String) {
        self.say("tell").await;
        let line = self.output.next_line().await.unwrap().unwrap();
        let (attempts, words) = line.split_once(' ').unwrap();
        (attempts.parse().unwrap(), words.to_owned())
    }

    async fn until(&mut self, attempts: u64) -> String {
        loop {
            let (made, words) = self.told().await;
            if made >= attempts {
                return words;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn be_a_pod(proc: &Path, pid: u32, uid: &str) {
    let folder = proc.join(pid.to_string());
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("cgroup"), format!("0::/kubepods/burstable/pod{uid}/c\n")).unwrap();
}

/// The times that the quiet pod measures: a cached fetch on its connection, and a new connection with its first secret.
#[derive(Default)]
struct Seen {
    fetches: Vec<f64>,
    connects: Vec<f64>,
}

async fn look(socket: &Arc<Path>, client: &mut client::Client, scale: Scale) -> Seen {
    let mut seen = Seen::default();
    for _ in 0..scale.fetches {
        let start = Instant::now();
        client::unary(client, FETCH, Ask::small("default")).await;
        seen.fetches.push(micros(start.elapsed()));
    }
    for _ in 0..scale.connects {
        let start = Instant::now();
        client::first_secret(socket.clone(), "default").await;
        seen.connects.push(micros(start.elapsed()));
        // Below the rate limit of the pod.
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    seen
}

async fn measure(scale: Scale) -> Vec<Row> {
    let proc = tempfile::tempdir().unwrap();
    let arguments = |socket: &Path| vec!["serve".into(), proc.path().as_os_str().to_owned(), socket.as_os_str().to_owned()];
    be_a_pod(proc.path(), std::process::id(), "11111111-1111-1111-1111-111111111111");
    let server = Server::start(std::env::current_exe().unwrap(), arguments).await;
    let socket: Arc<Path> = server.socket().into();
    let mut flooder = Flooder::start(&socket);
    be_a_pod(proc.path(), flooder.child.id().unwrap(), "22222222-2222-2222-2222-222222222222");
    let mut client = client::connect(&socket).await;
    look(&socket, &mut client, Scale { connects: 3, ..scale }).await;

    let (mut fetches, mut connects, mut worst) = (Vec::new(), Vec::new(), Vec::new());
    let (mut quiets, mut loads, mut words) = (Vec::new(), Vec::new(), String::new());
    for _ in 0..scale.rounds {
        let mut quiet = look(&socket, &mut client, scale).await;
        flooder.say("go").await;
        flooder.until(scale.attempts).await;
        let used = server.processor();
        let start = Instant::now();
        let mut flooded = look(&socket, &mut client, scale).await;
        loads.push((server.processor() - used).as_secs_f64() / start.elapsed().as_secs_f64());
        words = flooder.until(2 * scale.attempts).await;
        flooder.say("stop").await;
        // The connections of the flood end, and its rate limit recovers.
        tokio::time::sleep(Duration::from_secs(1)).await;
        fetches.push(median(&mut flooded.fetches) / median(&mut quiet.fetches));
        connects.push(median(&mut flooded.connects) / median(&mut quiet.connects));
        worst.push(percentile(&mut flooded.fetches, 0.99) / 1e3);
        quiets.push(median(&mut quiet.fetches));
    }
    let quiet = median(&mut quiets);
    vec![
        Row {
            figure: "a neighbour's cached fetch in a flood / quiet, median",
            value: median(&mut fetches),
            unit: "",
            target: Target::AtMost(3.0),
            of: format!("quiet {quiet:.1} µs; the flood: {words}"),
        },
        Row {
            figure: "a neighbour's connect and first secret in a flood / quiet, median",
            value: median(&mut connects),
            unit: "",
            target: Target::None,
            of: format!("{} rounds", scale.rounds),
        },
        Row {
            figure: "a neighbour's cached fetch in a flood, p99",
            value: median(&mut worst),
            unit: "ms",
            target: Target::None,
            of: "median of the rounds".into(),
        },
        Row {
            figure: "the agent's load in a flood",
            value: median(&mut loads),
            unit: "cores",
            target: Target::None,
            of: "processor time / time".into(),
        },
    ]
}
