//! Over real sockets: a server that is slow to close is as wrong as one that answers badly.

use std::net::{Ipv4Addr, SocketAddr};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinHandle,
};

use super::*;
use crate::readiness;

const BOUND: Duration = Duration::from_secs(20);
const ANYWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

struct Served {
    address: SocketAddr,
    shutdown: Shutdown,
    task: JoinHandle<()>,
}

async fn served(limits: Limits, routes: Routes) -> Served {
    let listener = bind("metrics.address", ANYWHERE).await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = Shutdown::new(BOUND);
    let task = tokio::spawn(serve_within(limits, listener, routes, shutdown.clone()));
    Served { address, shutdown, task }
}

fn routes() -> (Routes, readiness::Guard) {
    let (readiness, start) = Readiness::new(readiness::Metrics::default());
    (Routes::new(readiness, Arc::new(Exposition::new())), start)
}

/// The whole answer: the server closes after one.
async fn ask(address: SocketAddr, request_line: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("{request_line} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes()).await.unwrap();
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
    let server = served(LIMITS, routes).await;
    assert_answer(&ask(server.address, "GET /livez").await, 200, TEXT, "ok\n");
    drop(start);
    assert_answer(&ask(server.address, "GET /readyz").await, 503, TEXT, "not ready\n");
    assert_answer(&ask(server.address, "GET /readyz?verbose").await, 503, TEXT, "not ready\nawaiting pod index\n");
    drop(pods);
    assert_answer(&ask(server.address, "GET /readyz?a=b&verbose=1").await, 200, TEXT, "ready\n");
}

#[tokio::test]
async fn the_metrics_page_is_openmetrics() {
    let server = served(LIMITS, routes().0).await;
    let text = ask(server.address, "GET /metrics").await;
    let body = text.split_once("\r\n\r\n").unwrap().1;
    assert_answer(&text, 200, "application/openmetrics-text; version=1.0.0; charset=utf-8", body);
    assert!(body.starts_with("# HELP sds_agent_build_info ") && body.ends_with("# EOF\n"), "{body}");
}

#[tokio::test]
async fn certificates_are_on_the_admin_address_only() {
    let rows = || vec![json!({ "spiffe_id": "spiffe://a/b", "state": "valid" })];
    let admin = served(LIMITS, routes().0.with_certificates(Arc::new(rows))).await;
    let expected = "{\"certificates\":[{\"spiffe_id\":\"spiffe://a/b\",\"state\":\"valid\"}]}\n";
    assert_answer(&ask(admin.address, "GET /certs").await, 200, JSON, expected);
    assert_answer(&ask(admin.address, "HEAD /certs").await, 200, JSON, "");

    let metrics = served(LIMITS, routes().0).await;
    let expected = "not found; here are /livez, /readyz and /metrics\n";
    assert_answer(&ask(metrics.address, "GET /certs").await, 404, TEXT, expected);
}

#[tokio::test]
async fn other_paths_and_methods_are_refused_in_a_sentence() {
    let server = served(LIMITS, routes().0).await;
    let text = ask(server.address, "POST /livez").await;
    assert_answer(&text, 405, TEXT, "use GET\n");
    assert!(text.contains("allow: GET, HEAD\r\n"), "{text}");
    assert_answer(&ask(server.address, "GET /livez/").await, 404, TEXT, "not found; here are /livez, /readyz and /metrics\n");
}

#[tokio::test]
async fn clients_that_say_nothing_do_not_keep_the_probes_out() {
    let limits = Limits { connections: 2, head: Duration::from_millis(100), connection: BOUND };
    let server = served(limits, routes().0).await;
    let mut silent = TcpStream::connect(server.address).await.unwrap();
    let mut slow = TcpStream::connect(server.address).await.unwrap();
    slow.write_all(b"GET /livez HT").await.unwrap();
    assert_answer(&ask(server.address, "GET /livez").await, 200, TEXT, "ok\n");
    let mut rest = Vec::new();
    timeout(BOUND, silent.read_to_end(&mut rest)).await.unwrap().unwrap();
    timeout(BOUND, slow.read_to_end(&mut rest)).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_off() {
    let many = || vec![json!("x".repeat(64 << 10)); 256];
    let limits = Limits { connections: 1, connection: Duration::from_millis(200), ..LIMITS };
    let server = served(limits, routes().0.with_certificates(Arc::new(many))).await;
    let mut deaf = TcpStream::connect(server.address).await.unwrap();
    deaf.write_all(b"GET /certs HTTP/1.1\r\nhost: test\r\n\r\n").await.unwrap();
    assert_answer(&ask(server.address, "GET /livez").await, 200, TEXT, "ok\n");
}

#[tokio::test]
async fn the_drain_ends_the_listener_and_silent_connections_do_not_hold_it() {
    let server = served(LIMITS, routes().0).await;
    // Answered, so the silent one before it has been accepted.
    let _silent = TcpStream::connect(server.address).await.unwrap();
    ask(server.address, "GET /livez").await;
    server.shutdown.begin();
    timeout(BOUND, server.task).await.unwrap().unwrap();
    assert_eq!(timeout(DRAIN * 5, server.shutdown.drained()).await.unwrap(), crate::shutdown::Drained::Complete);
    assert!(TcpStream::connect(server.address).await.is_err());
}

#[tokio::test]
async fn a_taken_address_is_named_with_its_field() {
    let taken = bind("metrics.address", ANYWHERE).await.unwrap();
    let address = taken.local_addr().unwrap();
    let error = bind("metrics.address", address).await.unwrap_err().to_string();
    assert!(error.starts_with(&format!("metrics.address {address}: cannot listen: ")), "{error}");
}
