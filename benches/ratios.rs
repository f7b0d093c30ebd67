//! The table of performance targets, as ratios to the floor in one run: `cargo bench --bench ratios [-- --json]`.
//!
//! The floor is a unary echo on tonic in this process. Memory and processor time are those of a separate server process: the agent as
//! `sds-agent dev`, or this program again where a bench must choose identities or the time of a rotation. Without `--bench` (as `cargo
//! test --benches` runs it) or with `--quick` the counts are so small that the bench only shows errors.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a bench may fail loudly, prints, and computes with rounded figures"
)]

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, future, stream};
use sds_server::attest::unix::UnixAttestor;

use self::support::{
    agent::{self, Everybody, Timed},
    client::{self, Ask, Client, FETCH},
    fleet::Fleet,
    floor::{self, ECHO},
    process::{self, Server, raise_open_files},
    pushing::Pushing,
    stats::{self, Compared, Row, Target, alternate, median, micros, percentile},
};

mod support;

/// The counts of a run.
#[derive(Clone, Copy)]
struct Scale {
    rounds: usize,
    calls: usize,
    at_once: usize,
    /// Connections whose memory is measured.
    connections: usize,
    /// Connections that receive a rotation, with two streams each.
    fleet: usize,
    rotations: usize,
    issues: usize,
}

const FULL: Scale = Scale { rounds: 21, calls: 1000, at_once: 100, connections: 2000, fleet: 5000, rotations: 9, issues: 300 };
const QUICK: Scale = Scale { rounds: 1, calls: 10, at_once: 5, connections: 20, fleet: 20, rotations: 1, issues: 5 };

/// Number of concurrent calls on one connection for the throughput.
const IN_FLIGHT: usize = 32;

fn main() {
    raise_open_files();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    if let [mode, kind, socket] = &arguments[..]
        && mode == "serve"
    {
        return runtime.block_on(serve(kind, Path::new(socket)));
    }
    let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
    let scale = if has("--bench") && !has("--quick") { FULL } else { QUICK };
    let rows = runtime.block_on(async {
        let mut rows = Vec::new();
        calls(scale, &mut rows).await;
        rotation(scale, &mut rows).await;
        memory(scale, &mut rows).await;
        rows
    });
    stats::print(&rows, has("--json"));
}

/// The server's side of a bench: executes one command per line, until its input ends.
async fn serve(kind: &str, socket: &Path) {
    let mut pushing = match kind {
        "pushing" => Some(Pushing::start(socket).await),
        "everybody" => {
            agent::start(socket, Arc::new(Everybody::default()), Timed::new()).await;
            None
        }
        other => panic!("no such server: {other}"),
    };
    // This is the main thread, which may block; the runtime's workers serve.
    for line in std::io::stdin().lines() {
        match (&mut pushing, line.unwrap().as_str()) {
            (Some(pushing), "publish") => pushing.publish().await,
            (_, other) => panic!("no such command: {other}"),
        }
    }
}

async fn server(kind: &str) -> Server {
    let program = std::env::current_exe().unwrap();
    Server::start(program, |socket| vec!["serve".into(), kind.to_owned(), socket.display().to_string()]).await
}

/// Starts `sds-agent dev` with certificates that outlive the bench.
async fn dev() -> Server {
    let arguments = |socket: &Path| {
        let flags = ["dev", "--lifetime", "24h", "--admin", "127.0.0.1:0", "--socket"];
        [&flags.map(str::to_owned)[..], &[socket.display().to_string()]].concat()
    };
    Server::start(env!("CARGO_BIN_EXE_sds-agent"), arguments).await
}

/// Measures calls and first secrets, with agent and floor in this process.
async fn calls(scale: Scale, rows: &mut Vec<Row>) {
    let directory = tempfile::tempdir().unwrap();
    let [ours, floor, cold] = ["agent", "floor", "cold"].map(|name| Arc::<Path>::from(directory.path().join(name)));
    agent::start(&ours, Arc::new(UnixAttestor), Timed::new()).await;
    let mut agent_client = client::connect(&ours).await;
    let like = client::unary(&mut agent_client, FETCH, Ask::small("default")).await;
    floor::start(&floor, &like);
    let floor_client = client::connect(&floor).await;

    let one_by_one = |client: &Client, path: &'static str| {
        let mut client = client.clone();
        async move {
            let mut times = Vec::with_capacity(scale.calls);
            for _ in 0..scale.calls {
                let start = Instant::now();
                client::unary(&mut client, path, Ask::small("default")).await;
                times.push(micros(start.elapsed()));
            }
            median(&mut times)
        }
    };
    let Compared { ratio, ours: mine, floor: theirs } =
        alternate(scale.rounds, || one_by_one(&agent_client, FETCH), || one_by_one(&floor_client, ECHO)).await;
    rows.push(Row {
        figure: "cached FetchSecrets, one connection, median / floor",
        value: ratio,
        unit: "",
        target: Target::AtMost(1.05),
        of: format!("{mine:.1} µs / {theirs:.1} µs"),
    });

    // The processor time is less affected by other load on the machine.
    let busy = |client: &Client, path: &'static str| {
        let work = one_by_one(client, path);
        async move {
            let before = process::used();
            work.await;
            micros(process::used() - before) / scale.calls as f64
        }
    };
    let Compared { ratio, ours: mine, floor: theirs } =
        alternate(scale.rounds, || busy(&agent_client, FETCH), || busy(&floor_client, ECHO)).await;
    rows.push(Row {
        figure: "cached FetchSecrets, processor time with its client / floor with its client",
        value: ratio,
        unit: "",
        target: Target::None,
        of: format!("{mine:.1} µs / {theirs:.1} µs"),
    });

    let many = |client: &Client, path: &'static str| {
        let client = client.clone();
        async move {
            let start = Instant::now();
            let calls = stream::iter(0..4 * scale.calls).map(|_| {
                let mut client = client.clone();
                async move { drop(client::unary(&mut client, path, Ask::small("default")).await) }
            });
            calls.buffer_unordered(IN_FLIGHT).for_each(|()| future::ready(())).await;
            4.0 * scale.calls as f64 / start.elapsed().as_secs_f64()
        }
    };
    let Compared { ratio, ours: mine, floor: theirs } =
        alternate(scale.rounds, || many(&agent_client, FETCH), || many(&floor_client, ECHO)).await;
    rows.push(Row {
        figure: "cached FetchSecrets, throughput / floor",
        value: ratio,
        unit: "",
        target: Target::AtLeast(1.0),
        of: format!("{mine:.0}/s / {theirs:.0}/s, {IN_FLIGHT} in flight"),
    });
    let Compared { ratio, ours: mine, floor: theirs } = alternate(
        scale.rounds,
        || at_once(scale.at_once, || client::first_secret(ours.clone(), "default")),
        || at_once(scale.at_once, || floor::first_answer(floor.clone())),
    )
    .await;
    rows.push(Row {
        figure: "connect, attest, first cached secret, 100 at once, p99 / connect + floor with the same bytes",
        value: ratio,
        unit: "",
        target: Target::AtMost(1.5),
        of: format!("{:.1} ms / {:.1} ms", mine / 1e3, theirs / 1e3),
    });

    let issuer = Timed::new();
    agent::start(&cold, Arc::new(Everybody::default()), issuer.clone()).await;
    let mut shares = Vec::new();
    for _ in 0..scale.issues {
        let start = Instant::now();
        let mut client = client::connect(&cold).await;
        client::unary(&mut client, FETCH, Ask::small("default")).await;
        shares.push(start.elapsed().saturating_sub(issuer.last()).as_secs_f64() * 1e3);
    }
    rows.push(Row {
        figure: "agent's own share of a cold issue, P-256, median",
        value: median(&mut shares),
        unit: "ms",
        target: Target::AtMost(5.0),
        of: format!("connect to secret without the signature; p99 {:.2} ms", percentile(&mut shares, 0.99)),
    });
}

/// The 99th percentile of the times of many tasks that start together, in microseconds.
async fn at_once<F: Future<Output = ()> + Send + 'static>(count: usize, one: impl Fn() -> F) -> f64 {
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..count {
        let work = one();
        tasks.spawn(async move {
            let start = Instant::now();
            work.await;
            micros(start.elapsed())
        });
    }
    percentile(&mut tasks.join_all().await, 0.99)
}

/// Measures a rotation that reaches the open streams of many Envoys.
async fn rotation(scale: Scale, rows: &mut Vec<Row>) {
    let mut server = server("pushing").await;
    // The two names of the certificate, so that each rotation is an update for both streams of a connection.
    let id = format!("spiffe://example.org/uid/{}", nix::unistd::geteuid());
    let firsts = [Ask::envoy("default"), Ask::envoy(&id)];
    server.tell("publish").await;
    let empty = server.resident().await;
    let mut fleet = Fleet::open(server.socket(), scale.fleet, &firsts).await;
    let (mut latencies, mut processor, mut clients) = (Vec::new(), Vec::new(), Vec::new());
    // The first round warms up.
    for round in 0..=scale.rotations {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let (start, used, used_here) = (Instant::now(), server.processor(), process::used());
        server.tell("publish").await;
        let mut latency: Vec<f64> = fleet.pushed().await.iter().map(|at| micros(*at - start) / 1e3).collect();
        // The processor time includes the acknowledgements.
        tokio::time::sleep(Duration::from_millis(300)).await;
        if round > 0 {
            latencies.push(percentile(&mut latency, 0.99));
            processor.push(micros(server.processor() - used) / fleet.streams() as f64);
            clients.push(micros(process::used() - used_here) / fleet.streams() as f64);
        }
    }
    let of = format!("{} streams, {} rotations", fleet.streams(), scale.rotations);
    rows.push(Row {
        figure: "a rotation reaches all streams, p99",
        value: median(&mut latencies),
        unit: "ms",
        target: Target::AtMost(300.0),
        of,
    });
    rows.push(Row {
        figure: "server's processor time for each stream of a rotation",
        value: median(&mut processor),
        unit: "µs",
        target: Target::AtMost(30.0),
        of: format!("its client uses {:.1} µs beside it", median(&mut clients)),
    });
    rows.push(Row {
        figure: "memory per Envoy connection after these rotations",
        value: (server.resident().await - empty) / scale.fleet as f64,
        unit: "KiB",
        target: Target::None,
        of: format!("{} connections", scale.fleet),
    });
}

/// Measures the memory of the agent itself, and of each further connection and identity.
async fn memory(scale: Scale, rows: &mut Vec<Row>) {
    let of = format!("{} connections", scale.connections);
    let envoy = [Ask::envoy("default"), Ask::envoy("ROOTCA")];
    let small = [Ask::small("default")];

    let server = dev().await;
    rows.push(Row {
        figure: "memory of the idle agent",
        value: server.resident().await / 1024.0,
        unit: "MiB",
        target: Target::AtMost(12.0),
        of: "sds-agent dev".to_owned(),
    });
    rows.push(Row {
        figure: "memory per idle Envoy connection (two streams)",
        value: each(scale, &server, &envoy).await,
        unit: "KiB",
        target: Target::AtMost(40.0),
        of: of.clone(),
    });
    let shared = each(scale, &dev().await, &small).await;
    rows.push(Row {
        figure: "memory per small client's connection (one stream)",
        value: shared,
        unit: "KiB",
        target: Target::AtMost(28.0),
        of,
    });
    // As above, with a different identity for each connection.
    let own = each(scale, &self::server("everybody").await, &small).await;
    rows.push(Row {
        figure: "memory per identity",
        value: own - shared,
        unit: "KiB",
        target: Target::AtMost(8.0),
        of: format!("{own:.1} KiB per connection with an identity of its own"),
    });
}

/// The memory of each further connection, in KiB. Some connections exist before: the process keeps the temporary memory of a burst once.
async fn each(scale: Scale, server: &Server, firsts: &[Ask]) -> f64 {
    let _crowd = Fleet::open(server.socket(), scale.connections / 10, firsts).await;
    let before = server.resident().await;
    let _fleet = Fleet::open(server.socket(), scale.connections, firsts).await;
    (server.resident().await - before) / scale.connections as f64
}
