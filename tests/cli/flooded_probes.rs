//! Probes of a program whose ports are flooded by a client with the prober's own address, as a pod with `hostNetwork` has it.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::Runtime,
};

use super::stalled_reader::{PATIENCE, approver, command, line, lines};

/// The time limit of a scrape; the default of Prometheus.
const SCRAPE: Duration = Duration::from_secs(10);

/// A running program and the addresses in its log.
struct Program {
    child: Child,
    metrics: SocketAddr,
    probes: SocketAddr,
}

impl Drop for Program {
    fn drop(&mut self) {
        // The program may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Program {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the program starts");
        let log = lines(child.stderr.take().expect("a pipe"));
        let (metrics, probes) = line(&log, |line| {
            let line: Value = serde_json::from_str(line).ok()?;
            let address = |field: &str| line[field].as_str()?.parse().ok();
            (line["message"] == "serving metrics and probes").then(|| address("address").zip(address("probes")))?
        });
        Self { child, metrics, probes }
    }
}

/// Keeps idle connections open until it is dropped, and opens each again that is closed.
struct Flood {
    opened: [Arc<AtomicUsize>; 2],
    _runtime: Runtime,
}

impl Flood {
    /// Keeps `connections` open on each port. Each sends `start`, and nothing more.
    fn start(targets: [SocketAddr; 2], connections: usize, start: &'static [u8]) -> Self {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("what it may have");
        let runtime = Runtime::new().expect("a runtime");
        let opened = targets.map(|target| {
            let opened = Arc::<AtomicUsize>::default();
            for _ in 0..connections {
                let opened = opened.clone();
                runtime.spawn(async move {
                    loop {
                        let Ok(mut stream) = tokio::net::TcpStream::connect(target).await else { continue };
                        opened.fetch_add(1, Ordering::Relaxed);
                        // Both return when the server closes the connection, in any way.
                        let _ = stream.write_all(start).await;
                        let _ = stream.read_to_end(&mut Vec::new()).await;
                    }
                });
            }
            opened
        });
        Self { opened, _runtime: runtime }
    }

    /// Connections opened on each port.
    fn opened(&self) -> [usize; 2] {
        self.opened.each_ref().map(|opened| opened.load(Ordering::Relaxed))
    }

    /// Waits until each port has had this number of connections.
    fn wait(&self, connections: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.opened().iter().any(|opened| *opened < connections) {
            assert!(Instant::now() < deadline, "the flood does not begin: {:?}", self.opened());
            std::thread::yield_now();
        }
    }
}

/// One GET request, whose answer has to be complete within `limit`, as for a probe of the kubelet.
pub(super) fn get(address: SocketAddr, path: &str, limit: Duration) -> Result<String, String> {
    let start = Instant::now();
    let told = |error: std::io::Error| format!("{path} after {:?}: {error}", start.elapsed());
    let left = || limit.saturating_sub(start.elapsed()).max(Duration::from_millis(1));
    let mut stream = TcpStream::connect_timeout(&address, limit).map_err(told)?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").as_bytes()).map_err(told)?;
    let mut answer = Vec::new();
    loop {
        stream.set_read_timeout(Some(left())).map_err(told)?;
        let mut bytes = [0; 16 << 10];
        match stream.read(&mut bytes).map_err(told)? {
            0 => break,
            read => answer.extend_from_slice(&bytes[..read]),
        }
    }
    let (answer, took) = (String::from_utf8_lossy(&answer).into_owned(), start.elapsed());
    if answer.starts_with("HTTP/1.1 200 ") && took <= limit { Ok(answer) } else { Err(format!("{path} after {took:?}: {answer:?}")) }
}

/// The probes of a manifest: the shortest time limit, and the port's number.
fn manifest(path: &str) -> (Duration, u64) {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect("the manifest");
    let object: Value = serde_saphyr::from_str(text.split("\n---\n").next().expect("a document")).expect("YAML");
    let container = &object["spec"]["template"]["spec"]["containers"][0];
    let probes = [("livenessProbe", "/livez"), ("readinessProbe", "/readyz")].map(|(probe, path)| {
        assert_eq!(container[probe]["httpGet"], serde_json::json!({"path": path, "port": "probes"}));
        // The default of Kubernetes is 1 s.
        container[probe]["timeoutSeconds"].as_u64().unwrap_or(1)
    });
    let port = container["ports"].as_array().expect("ports").iter().find(|port| port["name"] == "probes").expect("the port `probes`");
    (Duration::from_secs(probes.into_iter().min().expect("two")), port["containerPort"].as_u64().expect("a number"))
}

/// A flood, and the probes during it.
struct Attack {
    connections: usize,
    start: &'static [u8],
    probes: usize,
    limit: Duration,
}

impl Attack {
    /// Returns the probes and scrapes that failed while both ports are flooded, and the page of metrics after the flood.
    fn run(&self, program: &Program, paths: &[&str]) -> (Vec<String>, String) {
        // Two floods at once would be another attack.
        static TURN: Mutex<()> = Mutex::new(());
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let flood = Flood::start([program.metrics, program.probes], self.connections, self.start);
        flood.wait(self.connections);
        let probes = paths.iter().cycle().take(self.probes).map(|path| get(program.probes, path, self.limit));
        let scrapes = (0..10).map(|_| get(program.metrics, "/metrics", SCRAPE.max(self.limit)));
        let failed = probes.chain(scrapes).filter_map(Result::err).collect();
        drop(flood);
        (failed, get(program.metrics, "/metrics", PATIENCE).expect("a scrape"))
    }
}

fn agent(directory: &Path) -> Program {
    let socket = directory.join("sds.sock");
    let mut command = command(&["dev", "--socket", socket.to_str().expect("a plain path"), "--admin", "127.0.0.1:0"]);
    command.env("SDS_AGENT_LOG", "info");
    let agent = Program::start(command);
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = get(agent.probes, "/readyz", PATIENCE) {
        assert!(Instant::now() < deadline, "the agent does not become ready: {error}");
    }
    agent
}

#[test]
fn no_probe_of_an_agent_fails_in_a_flood_from_its_own_address() {
    let directory = tempfile::tempdir().expect("a temporary folder");
    let (limit, port) = manifest("daemonset/base/daemonset.yaml");
    let attack = Attack { connections: 500, start: b"", probes: 100, limit };
    assert_eq!(attack.run(&agent(directory.path()), &["/livez", "/readyz"]).0, Vec::<String>::new());
    let config = sds_agent::config::Config::parse("attestation: unix\nissuer: { embedded: {} }\n", &|_| None).expect("a configuration");
    assert_eq!(u64::from(config.config.probes.port()), port, "the manifest has the default of probes.address");
}

#[test]
fn no_probe_of_an_approver_fails_in_a_flood_from_its_own_address() {
    let directory = tempfile::tempdir().expect("a temporary folder");
    let (limit, _) = manifest("daemonset/approver/deployment.yaml");
    let attack = Attack { connections: 500, start: b"", probes: 100, limit };
    // Without a cluster it is not ready.
    assert_eq!(attack.run(&Program::start(approver(directory.path())), &["/livez"]).0, Vec::<String>::new());
}

/// More connections than there are places, and none of them times out before it is replaced. How long a probe takes then depends on the
/// speed of the machine.
#[test]
fn every_probe_is_answered_when_all_places_are_taken() {
    let directory = tempfile::tempdir().expect("a temporary folder");
    let attack = Attack { connections: 1500, start: b"GET /livez HT", probes: 20, limit: PATIENCE };
    let (failed, page) = attack.run(&agent(directory.path()), &["/livez", "/readyz"]);
    assert_eq!(failed, Vec::<String>::new());
    for listener in ["metrics", "probes"] {
        let series = format!("sds_agent_http_connections_evicted_total{{listener=\"{listener}\"}} ");
        let evicted = page.lines().find_map(|line| line.strip_prefix(&series)).expect(&series);
        assert!(evicted.parse::<u64>().expect("a number") > 0, "{series}{evicted}");
    }
}
