//! Log lines that clients of the listeners can cause, and what a client of the admin address can make the agent hold.

use agent_runtime::telemetry::captured::Captured;

use super::*;

const TIMES: usize = 1000;

/// Sends a request, which may be no HTTP, and reads the answer, which the server may cut.
async fn send(address: SocketAddr, request: &str) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let _ = stream.write_all(request.as_bytes()).await;
    let _ = timeout(BOUND, stream.read_to_end(&mut Vec::new())).await.unwrap();
}

fn put(query: &str, filter: &str) -> String {
    let length = filter.len();
    format!("PUT /log-level{query} HTTP/1.1\r\nhost: localhost\r\nsds-agent-admin: 1\r\ncontent-length: {length}\r\n\r\n{filter}")
}

/// A request, with the number of the attempt, and the line that it may cause once a minute.
type Case = (fn(usize) -> String, Option<&'static str>);

const CASES: [Case; 8] = [
    (|number| put("", &format!("info,a{number}=debug")), Some("the log's filter was changed")),
    (|number| put("?for=7d", &format!("info,b{number}=debug")), Some("the log's filter was changed")),
    (|_| put("?for=0s", "info"), Some("the log's former filter is restored")),
    (|number| put("", &format!("info={number}=")), None),
    (|number| format!("GET /{number} HTTP/1.1\r\nhost: localhost\r\n\r\n"), None),
    (|number| format!("POST /reissue HTTP/1.1\r\nhost: {number}.example\r\norigin: x\r\n\r\n"), None),
    (|number| format!("{number}\r\n\r\n"), None),
    (|number| format!("GET / HTTP/1.1\r\nhost: localhost\r\na: {}\r\n\r\n", number.to_string().repeat(10_000)), None),
];

#[tokio::test]
async fn a_flood_of_requests_is_one_line_for_each_cause() {
    for (request, line) in CASES {
        let log = Captured::default();
        let (_guard, filter) = telemetry::capture("info", telemetry::Format::Json, log.clone()).unwrap();
        let routes = routes().0.with_log(Some(LogLevel::new(filter)));
        let others = [served(PROBES, routes.for_probes()), served(PAGES, routes.for_metrics())];
        let admin = served(PAGES, routes);
        for number in 0..TIMES {
            send(admin.address, &request(number)).await;
        }
        for other in &others {
            for number in 0..TIMES / 10 {
                send(other.address, &request(number)).await;
            }
        }
        let text = log.text();
        let lines: Vec<_> = text.lines().collect();
        // A filter that is restored has been changed before.
        assert!(lines.len() <= 2 * usize::from(line.is_some()), "{:?}: {} lines", line, lines.len());
        assert!(line.is_none_or(|line| log.count(line) == 1), "{line:?}: {lines:?}");
    }
}

#[tokio::test]
async fn changes_of_the_log_filter_for_a_time_leave_one_task() {
    let (_guard, filter) = telemetry::capture("info", telemetry::Format::Json, std::io::sink).unwrap();
    let log = LogLevel::new(filter.clone());
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    for number in 0..TIMES {
        log.change(&format!("a{number}=debug"), Some(Duration::from_secs(86_400))).unwrap();
    }
    // A task that is aborted ends when it runs.
    let at_most = async |count: usize| {
        while tasks() > count {
            tokio::task::yield_now().await;
        }
    };
    timeout(BOUND, at_most(before + 1)).await.expect("the other tasks end");
    log.change("warn", None).unwrap();
    timeout(BOUND, at_most(before)).await.expect("the last task ends");
    assert_eq!(filter.current(), "warn");
}
