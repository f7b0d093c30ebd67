//! Callers that exceed their share are rejected, and other callers are not affected.

use std::path::{Path, PathBuf};

use agent_runtime::telemetry::{self, Format, captured::Captured};
use futures::future::BoxFuture;
use sds_server::attest::{self, Attested, Attestor, Method, Reason, origin::Origins};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;
use unix_peer::listener;

use super::{
    arrivals::PREFACE,
    bench::{Agent, soon, until},
    link::{Link, names},
    *,
};

/// The attestor of a per-pod socket.
#[derive(Debug)]
struct OfOnePod(Arc<dyn Attestor>, &'static str);

impl Attestor for OfOnePod {
    fn method(&self) -> Method {
        self.0.method()
    }

    fn origins(&self) -> Origins {
        Origins::Fixed(Origin::Pod(self.1.into()))
    }

    fn attest<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Result<Attested, attest::Error>> {
        self.0.attest(peer)
    }
}

/// A further socket of the same agent, for `pod`.
pub fn socket_of(agent: &Agent, pod: &'static str) -> PathBuf {
    let mut sessions = agent.sessions.clone();
    sessions.authenticator.attestor = Arc::new(OfOnePod(sessions.authenticator.attestor, pod));
    let path = agent.path.with_file_name(pod);
    let bound = listener::bind(&path, 0o666).unwrap();
    tokio::spawn(sessions.accept(bound.listener));
    path
}

/// Connects and returns whether the server closes at once.
pub async fn is_turned_away(path: &Path) -> bool {
    let mut stream = UnixStream::connect(path).await.unwrap();
    let mut byte = [0];
    // The server sends the first bytes to a connection that it accepts.
    !matches!(soon("the server's first word or its end", stream.read(&mut byte)).await, Ok(1))
}

async fn served(path: &Path) -> Link {
    let mut link = Link::connect(path).await;
    assert_eq!(names(&link.asking(&["default"]).await.reply().await), ["default"]);
    link
}

#[tokio::test]
async fn a_pod_at_its_connection_limit_is_rejected_and_others_are_not() {
    let agent = Agent::with(|sessions| sessions.limits.connections_per_pod = 3).await;
    let (flooding, quiet) = (socket_of(&agent, "flooding"), socket_of(&agent, "quiet"));
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(served(&flooding).await);
    }
    for _ in 0..50 {
        assert!(is_turned_away(&flooding).await);
    }
    assert_eq!(agent.sessions.metrics.rejections(Rejection::pod_connection_limit), 50);
    served(&quiet).await;
    served(&agent.path).await;
    held.pop();
    soon("a free place", async { while is_turned_away(&flooding).await {} }).await;
}

#[tokio::test]
async fn who_connects_too_often_is_turned_away_and_its_neighbour_is_not() {
    let agent = Agent::with(|sessions| {
        sessions.limits.new_connections_burst_per_pod = 5;
        sessions.limits.new_connections_per_second_per_pod = 1;
    })
    .await;
    let (flooding, quiet) = (socket_of(&agent, "flooding"), socket_of(&agent, "quiet"));
    let (mut taken, begun) = (0, Instant::now());
    while agent.sessions.metrics.rejections(Rejection::pod_connection_rate) < 20 {
        taken += u64::from(!is_turned_away(&flooding).await);
    }
    // The burst, and one for each second since.
    let most = 6 + begun.elapsed().as_secs();
    assert!((5..=most).contains(&taken), "{taken} of {most}");
    served(&quiet).await;
}

#[tokio::test]
async fn streams_are_counted_over_all_connections_and_one_too_many_is_told_so() {
    let agent = Agent::with(|sessions| sessions.limits.streams_per_pod = 4).await;
    let (greedy, quiet) = (socket_of(&agent, "greedy"), socket_of(&agent, "quiet"));
    let (mut one, mut two) = (Link::connect(&greedy).await, Link::connect(&greedy).await);
    let mut held = Vec::new();
    for link in [&mut one, &mut two] {
        for _ in 0..2 {
            let mut stream = link.asking(&["ROOTCA"]).await;
            stream.reply().await;
            held.push(stream);
        }
    }
    let (code, words) = one.asking(&["ROOTCA"]).await.end().await;
    assert_eq!((code, words.as_str()), (Code::ResourceExhausted, "the limit of concurrent streams is reached"));
    assert_eq!(agent.sessions.metrics.refusals(metrics::Refusal::pod_stream_limit), 1);
    served(&quiet).await;

    held.pop();
    until("a stream's end", || agent.streams() == 3).await;
    two.asking(&["ROOTCA"]).await.reply().await;
}

#[tokio::test]
async fn who_goes_on_with_refused_streams_loses_the_connection_and_only_that() {
    let agent = Agent::with(|sessions| {
        sessions.limits.streams_per_pod = 1;
        sessions.timeouts.refusal_delay = Duration::from_millis(5);
    })
    .await;
    let greedy = socket_of(&agent, "greedy");
    let mut good = Link::connect(&greedy).await;
    let mut stream = good.asking(&["ROOTCA"]).await;
    stream.reply().await;
    let mut bad = Link::connect(&greedy).await;
    for _ in 1..MAX_REFUSED_STREAMS {
        assert_eq!(bad.asking(&["ROOTCA"]).await.end().await.0, Code::ResourceExhausted);
    }
    assert!(bad.is_open());
    let _last = bad.asking(&["ROOTCA"]).await;
    bad.ended().await;
    assert_eq!(agent.sessions.metrics.rejections(Rejection::refused_streams), 1);
    agent.change_bundle();
    stream.reply().await;
}

/// Rejects every caller.
#[derive(Debug)]
pub struct Closed;

impl Attestor for Closed {
    fn method(&self) -> Method {
        Method::unix
    }

    fn attest<'a>(&'a self, _: &'a Peer) -> BoxFuture<'a, Result<Attested, attest::Error>> {
        Box::pin(std::future::ready(Err(attest::Error::refused(Reason::not_in_pod, "no identity"))))
    }
}

#[tokio::test]
async fn a_caller_that_is_refused_in_a_loop_does_not_fill_the_log() {
    let log = Captured::default();
    let (_guard, _filter) = telemetry::capture("info", Format::Json, log.clone()).unwrap();
    let agent = Agent::with(|sessions| {
        sessions.authenticator.attestor = Arc::new(Closed);
        sessions.limits.new_connections_burst_per_pod = 20;
        sessions.limits.new_connections_per_second_per_pod = 1;
    })
    .await;
    for _ in 0..20 {
        let (code, _) = Link::connect(&agent.path).await.asking(&["default"]).await.end().await;
        assert_eq!(code, Code::PermissionDenied);
    }
    assert_eq!(log.count("caller not served"), 1);
    while agent.sessions.metrics.rejections(Rejection::pod_connection_rate) < 20 {
        is_turned_away(&agent.path).await;
    }
    assert_eq!(log.count("connection closed: over quota"), 1);
}

#[tokio::test]
async fn what_a_library_says_about_a_clients_bytes_does_not_fill_the_log() {
    let log = Captured::default();
    let (_guard, _filter) = telemetry::capture("info", Format::Json, log.clone()).unwrap();
    let agent = Agent::start().await;
    let mut stream = UnixStream::connect(&agent.path).await.unwrap();
    // An acknowledgement of a PING that was never sent, and then one real PING, whose answer marks the end.
    let ping = |flags: u8| [&[0, 0, 8, 6, flags, 0, 0, 0, 0][..], b"whatever"].concat();
    let told = [PREFACE, &ping(1).repeat(1000), &ping(0)].concat();
    stream.write_all(&told).await.unwrap();
    let mut heard = Vec::new();
    while !heard.windows(ping(1).len()).any(|frame| frame == ping(1)) {
        assert_ne!(soon("the answer", stream.read_buf(&mut heard)).await.unwrap(), 0);
    }
    assert_eq!(log.count("recv PING ack that we never sent"), 1);
}
