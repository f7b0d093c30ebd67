//! Clients that occupy places: silent ones, slow ones, and those that do not read. All of them have the address of the client that is
//! served.

use std::io::{Read, Write};

use futures::FutureExt;

use super::{super::places::Places, *};

/// Longer than any test: only another connection ends these.
const HOUR: Duration = Duration::from_secs(3600);

/// `connections` places, whose connections end only for a newer one.
fn limits(connections: usize) -> Limits {
    Limits { size: Size { connections, answers: connections, incomplete_per_peer: 2 }, head: HOUR, connection: HOUR }
}

/// Reads what the server sends until it closes the connection.
async fn rest(mut stream: TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    // A connection that is closed before its request was read is reset.
    let _ = timeout(BOUND, stream.read_to_end(&mut rest)).await.unwrap();
    rest
}

/// Connects, and sends the start of a request.
async fn begun(address: SocketAddr, start: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(start.as_bytes()).await.unwrap();
    stream
}

/// An answer that is larger than all buffers between server and client.
fn large() -> Controls {
    controls(Arc::new(|| vec![json!("x".repeat(64 << 10)); 256])).0
}

#[tokio::test]
async fn clients_that_say_nothing_or_half_keep_nobody_out() {
    for start in ["", "GET /livez HT", "GET /livez HTTP/1.1\r\nhost: localhost\r\n"] {
        let server = served(limits(4), routes().0);
        let mut silent = Vec::new();
        for _ in 0..50 {
            silent.push(begun(server.address, start).await);
            assert_answer(&ask(server.address, "GET /livez").await, 200, TEXT, "ok\n");
        }
        let evicted = server.evicted.get();
        assert!((46..=50).contains(&evicted), "{evicted}");
        // The oldest were replaced, the newest are open.
        for stream in silent.drain(..46) {
            assert_eq!(rest(stream).await, b"");
        }
    }
}

#[tokio::test]
async fn a_request_that_has_arrived_is_answered_before_its_place_is_taken() {
    let listener = bind("metrics.address", ANYWHERE).unwrap();
    let address = listener.local_addr().unwrap();
    let mut clients = Vec::new();
    for _ in 0..200 {
        clients.push(begun(address, "GET /livez HTTP/1.1\r\nhost: localhost\r\nsds-agent-admin: 1\r\n\r\n").await);
    }
    // All of them wait to be accepted, and each needs the place of another.
    let evicted = Counter::default();
    tokio::spawn(connections::serve(limits(1), listener, routes().0, evicted.clone(), Shutdown::new(BOUND)));
    for client in clients {
        assert_answer(std::str::from_utf8(&rest(client).await).unwrap(), 200, TEXT, "ok\n");
    }
    assert_eq!(evicted.get(), 0);
}

/// As on a busy machine, where the runtime reports that a connection is readable after its place is needed.
#[tokio::test]
async fn a_request_that_has_arrived_unnoticed_is_answered_too() {
    const REQUEST: &[u8] = b"GET /livez HTTP/1.1\r\nhost: localhost\r\nsds-agent-admin: 1\r\n\r\n";
    let listener = std::net::TcpListener::bind(ANYWHERE).unwrap();
    let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.write_all(REQUEST).unwrap();
    let (stream, peer) = listener.accept().unwrap();
    while stream.peek(&mut [0; 100]).unwrap() < REQUEST.len() {}
    stream.set_nonblocking(true).unwrap();
    let stream = TcpStream::from_std(stream).unwrap();
    let places = Places::new(limits(1).size);
    let place = places.take(peer.ip()).await;
    assert!(places.take(peer.ip()).now_or_never().is_none(), "the connection is to end");
    let (routes, _start) = routes();
    let (shutdown, evicted) = (Shutdown::new(BOUND), Counter::default());
    let served = connections::connection(limits(1), stream, routes, shutdown.drain.clone(), place, evicted.clone(), shutdown.guard());
    // Since the connection was registered with the runtime, no other task has run: the runtime reports nothing about it.
    let mut served = std::pin::pin!(served);
    assert!(futures::poll!(served.as_mut()).is_pending(), "the answer waits for the runtime");
    served.await;
    assert_eq!(evicted.get(), 0);
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_answer(&text, 200, TEXT, "ok\n");
}

#[tokio::test]
async fn clients_that_do_not_read_keep_nobody_out() {
    let server = served(limits(2), routes().0.with_controls(large()));
    let mut deaf = Vec::new();
    for _ in 0..6 {
        deaf.push(begun(server.address, "GET /certs HTTP/1.1\r\nhost: localhost\r\nsds-agent-admin: 1\r\n\r\n").await);
        assert_answer(&ask(server.address, "GET /livez").await, 200, TEXT, "ok\n");
    }
    assert_eq!(server.evicted.get(), 5);
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_off_after_a_time() {
    let listener = bind("metrics.address", ANYWHERE).unwrap();
    let address = listener.local_addr().unwrap();
    // The listener does not drain; only its guards count.
    let (shutdown, mut serving) = {
        let shutdown = Shutdown::new(BOUND);
        (shutdown.clone(), shutdown)
    };
    serving.drain = tokio_util::sync::CancellationToken::new();
    let limits = Limits { connection: Duration::from_millis(200), ..limits(4) };
    let evicted = Counter::default();
    tokio::spawn(connections::serve(limits, listener, routes().0.with_controls(large()), evicted.clone(), serving));
    let _deaf = begun(address, "GET /certs HTTP/1.1\r\nhost: localhost\r\nsds-agent-admin: 1\r\n\r\n").await;
    // Accepted after it.
    ask(address, "GET /livez").await;
    shutdown.begin();
    assert_eq!(shutdown.drained().await, agent_runtime::shutdown::Drained::Complete);
    assert_eq!(evicted.get(), 0);
}

#[tokio::test]
async fn a_request_that_is_complete_outlives_newer_silent_ones() {
    let (controls, mut calls) = controls(Arc::new(Vec::new));
    let server = served(limits(2), routes().0.with_controls(controls));
    let waiting = begun(server.address, "POST /reissue HTTP/1.1\r\nhost: localhost\r\nsds-agent-admin: 1\r\n\r\n").await;
    let call = calls.recv().await.unwrap();
    for _ in 0..20 {
        let silent = begun(server.address, "").await;
        assert_answer(&ask(server.address, "GET /livez").await, 200, TEXT, "ok\n");
        assert_eq!(rest(silent).await, b"");
    }
    call.answer.send(Reissued { matched: 1, just_done: 0, retried: 0 }).unwrap();
    assert!(rest(waiting).await.starts_with(b"HTTP/1.1 200 "));
}

#[tokio::test]
async fn a_body_that_does_not_arrive_is_an_incomplete_request() {
    let (_guard, filter) = telemetry::capture("info", telemetry::Format::Json, std::io::sink).unwrap();
    let (controls, mut calls) = controls(Arc::new(Vec::new));
    let server = served(limits(2), routes().0.with_controls(controls).with_log(Some(LogLevel::new(filter))));
    let waiting = begun(server.address, "POST /reissue HTTP/1.1\r\nhost: localhost\r\nsds-agent-admin: 1\r\n\r\n").await;
    let call = calls.recv().await.unwrap();
    let bodiless =
        begun(server.address, "PUT /log-level HTTP/1.1\r\nhost: localhost\r\nsds-agent-admin: 1\r\ncontent-length: 5\r\n\r\n").await;
    assert_answer(&ask(server.address, "GET /livez").await, 200, TEXT, "ok\n");
    assert_eq!(rest(bodiless).await, b"");
    call.answer.send(Reissued { matched: 1, just_done: 0, retried: 0 }).unwrap();
    assert!(rest(waiting).await.starts_with(b"HTTP/1.1 200 "));
}

#[tokio::test]
async fn a_head_that_does_not_arrive_ends_after_a_time() {
    let server = served(Limits { head: Duration::from_millis(50), ..limits(4) }, routes().0);
    for start in ["", "GET /livez HT"] {
        let stream = begun(server.address, start).await;
        rest(stream).await;
    }
    assert_eq!(server.evicted.get(), 0);
}
