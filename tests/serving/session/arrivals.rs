//! New connections: which of them are accepted, rejected and kept.

use std::process::Command;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    bench::{Agent, soon, until},
    link::{Link, names},
    *,
};

/// A client's connection preface with an empty SETTINGS frame.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const SETTINGS: u8 = 4;

/// The type of the server's first frame, or `None` if it closes the connection.
async fn first_frame(stream: &mut UnixStream) -> Option<u8> {
    let mut head = [0; 9];
    soon("the server's first frame", stream.read_exact(&mut head)).await.ok().map(|_| head[3])
}

/// Returns when the server has closed the connection.
async fn closed(mut stream: UnixStream) {
    // Ignores data before the end; a reset is an end too.
    let _ = soon("the server's end", stream.read_to_end(&mut Vec::new())).await;
}

#[tokio::test]
async fn settings_come_before_anybody_asks_who_it_is() {
    let agent = Agent::start().await;
    agent.origin_cache.send_replace(false);
    let mut stream = UnixStream::connect(&agent.path).await.unwrap();
    stream.write_all(PREFACE).await.unwrap();
    assert_eq!(first_frame(&mut stream).await, Some(SETTINGS));

    // Calls that need no identity are answered too.
    let mut link = Link::connect(&agent.path).await;
    let mut held = link.asking(&["default"]).await;
    assert_eq!(link.call("nothing.Here/AtAll").await.end().await.0, tonic::Code::Unimplemented);
    assert!(held.headers().await.get("grpc-status").is_none());
    assert_eq!(agent.let_in.lock().unwrap().len(), 0);
}

#[tokio::test]
async fn who_says_nothing_is_dropped_and_who_has_spoken_is_not() {
    let agent = Agent::with(|sessions| sessions.timeouts.first_byte = Duration::from_millis(100)).await;
    let mut spoke = Link::connect(&agent.path).await;
    let mut stream = spoke.asking(&["ROOTCA"]).await;
    stream.reply().await;
    closed(UnixStream::connect(&agent.path).await.unwrap()).await;
    assert_eq!(agent.sessions.metrics.rejections(Rejection::silent), 1);
    agent.change_bundle();
    stream.reply().await;
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_one_with_an_open_stream_is_not() {
    let agent = Agent::with(|sessions| {
        sessions.timeouts.first_byte = Duration::from_millis(50);
        sessions.timeouts.graceful_close = Duration::from_millis(50);
        sessions.limits.idle = Duration::from_millis(200);
    })
    .await;
    let mut busy = Link::connect(&agent.path).await;
    let mut stream = busy.asking(&["ROOTCA"]).await;
    stream.reply().await;
    // These connections are younger, and their calls have ended.
    for _ in 0..2 {
        let mut idle = Link::connect(&agent.path).await;
        idle.call("nothing.Here/AtAll").await.end().await;
        idle.ended().await;
    }
    assert!(busy.is_open());
    agent.change_bundle();
    stream.reply().await;
    drop(stream);
    busy.ended().await;
    until("the end of the stream", || agent.streams() == 0).await;
}

#[tokio::test]
async fn connections_are_limited_and_a_closed_one_frees_its_place() {
    let agent = Agent::with(|sessions| sessions.limits.connections = 1).await;
    let mut first = Link::connect(&agent.path).await;
    let mut stream = first.asking(&["default"]).await;
    stream.reply().await;
    closed(UnixStream::connect(&agent.path).await.unwrap()).await;
    assert_eq!(agent.sessions.metrics.rejections(Rejection::connection_limit), 1);
    stream.ask(&["default", "ROOTCA"]);
    assert_eq!(names(&stream.reply().await), ["default", "ROOTCA"], "the first is not disturbed");

    drop((stream, first));
    soon("a free place", async {
        loop {
            let mut stream = UnixStream::connect(&agent.path).await.unwrap();
            // The server may close a rejected connection before it sends a frame.
            let _ = stream.write_all(PREFACE).await;
            if first_frame(&mut stream).await == Some(SETTINGS) {
                break;
            }
        }
    })
    .await;
}

/// Set for the child process, so that `--include-ignored` does not use up the descriptors of this one.
const CHILD: &str = "SDS_AGENT_TEST_CHILD";

#[test]
fn without_descriptors_accepting_neither_ends_nor_spins() {
    let name = "session::arrivals::child_without_descriptors";
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--exact", name, "--ignored", "--nocapture"]).env(CHILD, "1").output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[tokio::test]
#[ignore = "runs in a process of its own"]
async fn child_without_descriptors() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let agent = Agent::start().await;
    let mut before = Link::connect(&agent.path).await;
    let mut stream = before.asking(&["ROOTCA"]).await;
    stream.reply().await;

    // The client's end gets its descriptor before they run out.
    let client = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let mut taken = Vec::new();
    setrlimit(Resource::RLIMIT_NOFILE, 64.min(hard), hard).unwrap();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        taken.push(file);
    }
    rustix::net::connect(&client, &SocketAddrUnix::new(&agent.path).unwrap()).unwrap();
    let client = UnixStream::from_std(std::os::unix::net::UnixStream::from(client)).unwrap();
    let refused = || agent.sessions.metrics.rejections(Rejection::accept_error);
    until("the first failure", || refused() > 0).await;
    // This test measures in a fixed time: a loop that spins fails thousands of times in it.
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert!((2..=10).contains(&refused()), "{} attempts", refused());
    agent.change_bundle();
    stream.reply().await;

    drop(taken);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    let mut client = client;
    client.write_all(PREFACE).await.unwrap();
    assert_eq!(first_frame(&mut client).await, Some(SETTINGS), "the waiting client is served");
}
