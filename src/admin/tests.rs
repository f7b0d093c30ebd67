//! Tests over real sockets, so that a connection which the server does not close fails them too.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use agent_runtime::{readiness, telemetry};
use issuance::rotation::reissue::{Reissue, Reissued, Which};
use prometheus_client::metrics::counter::Counter;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};

use super::{connections::Limits, places::Size, *};
use crate::build_info;

mod documented;
mod floods;
mod log;

const BOUND: Duration = Duration::from_secs(20);
const ANYWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

struct Served {
    address: SocketAddr,
    shutdown: Shutdown,
    evicted: Counter,
    task: JoinHandle<()>,
}

fn served(limits: Limits, routes: Routes) -> Served {
    let listener = bind("metrics.address", ANYWHERE).unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = Shutdown::new(BOUND);
    let evicted = Counter::default();
    let task = tokio::spawn(connections::serve(limits, listener, routes, evicted.clone(), shutdown.clone()));
    Served { address, shutdown, evicted, task }
}

fn routes() -> (Routes, readiness::Guard) {
    let (readiness, start) = Readiness::new(readiness::Metrics::default());
    (Routes::new(readiness, Arc::new(Exposition::new(build_info::VERSION, build_info::REVISION))), start)
}

/// Controls, and the receiver of their calls.
fn controls(certificates: Certificates) -> (Controls, mpsc::Receiver<Reissue>) {
    let (reissue, calls) = mpsc::channel(1);
    (Controls { certificates, reissue }, calls)
}

/// Returns the whole response: the server closes the connection after one.
async fn ask(address: SocketAddr, request_line: &str) -> String {
    say(address, &format!("{request_line} HTTP/1.1\r\nhost: localhost\r\nsds-agent-admin: 1\r\n\r\n")).await
}

async fn say(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    timeout(BOUND, stream.read_to_string(&mut text)).await.unwrap().unwrap();
    text
}

fn assert_answer(text: &str, status: u16, content_type: &str, body: &str) {
    let (head, found) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{text}");
    assert!(head.contains(&format!("content-type: {content_type}\r\n")), "{text}");
    assert_eq!(found, body);
}

#[tokio::test]
async fn liveness_is_unconditional_and_readiness_names_what_is_awaited() {
    let (routes, start) = routes();
    let pods = routes.readiness.guard("pod index");
    let server = served(PAGES, routes);
    assert_answer(&ask(server.address, "GET /livez").await, 200, TEXT, "ok\n");
    drop(start);
    assert_answer(&ask(server.address, "GET /readyz").await, 503, TEXT, "not ready\n");
    assert_answer(&ask(server.address, "GET /readyz?verbose").await, 503, TEXT, "not ready\nawaiting pod index\n");
    drop(pods);
    assert_answer(&ask(server.address, "GET /readyz?a=b&verbose=1").await, 200, TEXT, "ready\n");
}

#[tokio::test]
async fn the_metrics_page_comes_in_the_format_that_is_asked_for() {
    let server = served(PAGES, routes().0);
    for (accept, content_type, end) in [
        ("application/openmetrics-text;version=1.0.0,text/plain;q=0.5", "application/openmetrics-text; version=1.0.0; charset=utf-8", true),
        ("*/*", "text/plain; version=0.0.4; charset=utf-8", false),
    ] {
        let text = say(server.address, &format!("GET /metrics HTTP/1.1\r\nhost: localhost\r\naccept: {accept}\r\n\r\n")).await;
        let body = text.split_once("\r\n\r\n").unwrap().1;
        assert_answer(&text, 200, content_type, body);
        assert!(body.starts_with("# HELP sds_agent_build_info ") && body.ends_with("# EOF\n") == end, "{body}");
    }
}

#[tokio::test]
async fn certificates_are_on_the_admin_address_only() {
    let rows = || vec![json!({ "spiffe_id": "spiffe://a/b", "state": "valid" })];
    let admin = served(PAGES, routes().0.with_controls(controls(Arc::new(rows)).0));
    let expected = "{\"certificates\":[{\"spiffe_id\":\"spiffe://a/b\",\"state\":\"valid\"}]}\n";
    assert_answer(&ask(admin.address, "GET /certs").await, 200, JSON, expected);
    assert_answer(&ask(admin.address, "HEAD /certs").await, 200, JSON, "");

    let metrics = served(PAGES, routes().0);
    let expected = "not found; here are /livez, /readyz and /metrics\n";
    assert_answer(&ask(metrics.address, "GET /certs").await, 404, TEXT, expected);
}

#[tokio::test]
async fn the_probes_address_serves_probes_alone() {
    let full = routes().0.with_controls(controls(Arc::new(Vec::new)).0);
    let probes = served(PROBES, full.for_probes());
    assert_answer(&ask(probes.address, "GET /livez").await, 200, TEXT, "ok\n");
    assert_answer(&ask(probes.address, "GET /readyz").await, 200, TEXT, "ready\n");
    for line in ["GET /metrics", "GET /certs", "POST /reissue", "GET /log-level"] {
        assert_answer(&ask(probes.address, line).await, 404, TEXT, "not found; here are /livez and /readyz\n");
    }
}

#[tokio::test]
async fn reissuing_is_asked_for_by_post_and_the_answer_counts() {
    let (controls, mut calls) = controls(Arc::new(Vec::new));
    let server = served(PAGES, routes().0.with_controls(controls));
    tokio::spawn(async move {
        let id = Some("spiffe://a/ns/b/sa/c".to_owned());
        for (which, over) in [
            (Which::default(), 300),
            (Which { spiffe_id: id, profile: None }, 0),
            (Which { profile: Some("gold".into()), spiffe_id: None }, 90),
        ] {
            let call = calls.recv().await.unwrap();
            assert_eq!((call.which, call.over), (which, Duration::from_secs(over)));
            call.answer.send(Reissued { matched: 3, just_done: 1, retried: 2 }).unwrap();
        }
    });
    let expected = |over: &str| format!("{{\"just_done\":1,\"matched\":3,\"over\":\"{over}\",\"retried\":2}}\n");
    assert_answer(&ask(server.address, "POST /reissue").await, 200, JSON, &expected("5m"));
    let line = "POST /reissue?spiffe_id=spiffe%3A%2F%2Fa/ns/b/sa/c&over=0s";
    assert_answer(&ask(server.address, line).await, 200, JSON, &expected("0s"));
    assert_answer(&ask(server.address, "POST /reissue?profile=gold&over=90s").await, 200, JSON, &expected("1m 30s"));

    let text = ask(server.address, "GET /reissue").await;
    assert_answer(&text, 405, TEXT, "use POST\n");
    assert!(text.contains("allow: POST\r\n"), "{text}");
    let wrong = "over: \"5\" is not a time of at most seven days; write, for example, over=5m\n";
    assert_answer(&ask(server.address, "POST /reissue?over=5").await, 400, TEXT, wrong);
    let wrong = "\"spiffeid\" is not known here; known: spiffe_id, profile and over\n";
    assert_answer(&ask(server.address, "POST /reissue?spiffeid=x").await, 400, TEXT, wrong);
    // The task that answers for rotation has ended.
    assert_answer(&ask(server.address, "POST /reissue").await, 503, TEXT, "the agent is shutting down\n");

    let metrics = served(PAGES, routes().0);
    let expected = "not found; here are /livez, /readyz and /metrics\n";
    assert_answer(&ask(metrics.address, "POST /reissue").await, 404, TEXT, expected);
}

/// Sends a request with a body.
async fn tell(address: SocketAddr, request_line: &str, body: &str) -> String {
    say(
        address,
        &format!("{request_line} HTTP/1.1\r\nhost: localhost\r\nsds-agent-admin: 1\r\ncontent-length: {}\r\n\r\n{body}", body.len()),
    )
    .await
}

#[tokio::test]
async fn the_logs_filter_is_shown_changed_and_goes_back() {
    let (_guard, filter) = telemetry::capture("info", telemetry::Format::Json, std::io::sink).unwrap();
    let routes = routes().0.with_log(Some(LogLevel::new(filter.clone())));
    let metrics = served(PAGES, routes.for_metrics());
    let expected = "not found; here are /livez, /readyz and /metrics\n";
    assert_answer(&ask(metrics.address, "GET /log-level").await, 404, TEXT, expected);
    let server = served(PAGES, routes);
    assert_answer(&ask(server.address, "GET /log-level").await, 200, TEXT, "info\n");
    let wrong = tell(server.address, "PUT /log-level", "sds_agent=loud").await;
    assert!(wrong.starts_with("HTTP/1.1 400 ") && wrong.contains("sds_agent=loud"), "{wrong}");
    assert!(tell(server.address, "PUT /log-level", " \n").await.starts_with("HTTP/1.1 400 "));
    assert!(tell(server.address, "PUT /log-level", &"x".repeat(5000)).await.starts_with("HTTP/1.1 400 "));
    assert!(tell(server.address, "PUT /log-level?for=ever", "debug").await.starts_with("HTTP/1.1 400 "));
    assert!(ask(server.address, "DELETE /log-level").await.contains("allow: GET, HEAD, PUT, POST\r\n"));
    assert_eq!(filter.current(), "info");

    assert_answer(&tell(server.address, "PUT /log-level", "sds_agent=debug,info\n").await, 200, TEXT, "sds_agent=debug,info\n");
    assert_answer(&tell(server.address, "POST /log-level?for=10m", "trace").await, 200, TEXT, "trace\n");
}

#[tokio::test(start_paused = true)]
async fn a_temporary_log_filter_reverts_unless_it_was_replaced() {
    let (_guard, filter) = telemetry::capture("info", telemetry::Format::Json, std::io::sink).unwrap();
    let log = LogLevel::new(filter.clone());
    let second = Duration::from_secs(1);
    log.change("debug", Some(10 * second)).unwrap();
    log.change("trace", Some(20 * second)).unwrap();
    tokio::time::sleep(15 * second).await;
    assert_eq!(filter.current(), "trace", "the second change cancels the end of the first");
    tokio::time::sleep(6 * second).await;
    assert_eq!(filter.current(), "info");
    log.change("debug", Some(10 * second)).unwrap();
    log.change("warn", None).unwrap();
    tokio::time::sleep(11 * second).await;
    assert_eq!(filter.current(), "warn");
    log.change("debug", Some(10 * second)).unwrap();
    tokio::time::sleep(11 * second).await;
    assert_eq!(filter.current(), "warn");
}

#[tokio::test]
async fn other_paths_and_methods_are_refused_in_a_sentence() {
    let server = served(PAGES, routes().0);
    let text = ask(server.address, "POST /livez").await;
    assert_answer(&text, 405, TEXT, "use GET\n");
    assert!(text.contains("allow: GET, HEAD\r\n"), "{text}");
    assert_answer(&ask(server.address, "GET /livez/").await, 404, TEXT, "not found; here are /livez, /readyz and /metrics\n");
}

#[tokio::test]
async fn the_drain_ends_the_listener_and_silent_connections_do_not_hold_it() {
    let server = served(PAGES, routes().0);
    // The response shows that the server has accepted the silent connection before it.
    let _silent = TcpStream::connect(server.address).await.unwrap();
    ask(server.address, "GET /livez").await;
    server.shutdown.begin();
    timeout(BOUND, server.task).await.unwrap().unwrap();
    assert_eq!(timeout(connections::DRAIN * 5, server.shutdown.drained()).await.unwrap(), agent_runtime::shutdown::Drained::Complete);
    assert!(TcpStream::connect(server.address).await.is_err());
}

#[tokio::test]
async fn a_taken_address_is_named_with_its_field() {
    let taken = bind("metrics.address", ANYWHERE).unwrap();
    let address = taken.local_addr().unwrap();
    let error = bind("metrics.address", address).unwrap_err().to_string();
    assert!(error.starts_with(&format!("metrics.address {address}: cannot listen: ")), "{error}");
}

#[tokio::test]
async fn an_unspecified_ipv6_address_listens_on_both_families() {
    let served = |address: &str| {
        let listener = bind("metrics.address", address.parse().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (shutdown, (routes, _start)) = (Shutdown::new(BOUND), routes());
        tokio::spawn(connections::serve(PAGES, listener, routes, Counter::default(), shutdown));
        port
    };
    let both = served("[::]:0");
    for address in [SocketAddr::from((Ipv4Addr::LOCALHOST, both)), SocketAddr::from((Ipv6Addr::LOCALHOST, both))] {
        assert_answer(&ask(address, "GET /livez").await, 200, TEXT, "ok\n");
    }
    let one = served("0.0.0.0:0");
    assert_answer(&ask(SocketAddr::from((Ipv4Addr::LOCALHOST, one)), "GET /livez").await, 200, TEXT, "ok\n");
    assert!(TcpStream::connect(SocketAddr::from((Ipv6Addr::LOCALHOST, one))).await.is_err(), "the listener is for IPv4 alone");
}
