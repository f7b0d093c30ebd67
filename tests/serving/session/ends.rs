//! The end of connections: with their workload, and with the agent.

use agent_runtime::shutdown::Drained;
use futures::future::BoxFuture;
use sds_agent::{
    app,
    config::{self, Dev},
};
use sds_server::session::Companions;
use tokio::{io::AsyncWriteExt, sync::watch};
use tonic::Code;

use super::{
    arrivals::PREFACE,
    bench::{Agent, DRAIN, soon, until},
    link::{Link, names},
    *,
};

#[tokio::test]
async fn a_workloads_end_ends_its_connection_and_no_other() {
    let agent = Agent::start().await;
    let (mut one, mut other) = (Link::connect(&agent.path).await, Link::connect(&agent.path).await);
    let (mut of_one, mut too) = (one.asking(&["default"]).await, one.asking(&["ROOTCA"]).await);
    of_one.reply().await;
    too.reply().await;
    let mut of_other = other.asking(&["default"]).await;
    of_other.reply().await;
    agent.let_in.lock().unwrap()[0].cancel();
    for stream in [&mut of_one, &mut too] {
        assert_eq!(stream.end().await, (Code::PermissionDenied, "the workload has ended".into()));
    }
    one.ended().await;
    of_other.ask(&["default", "ROOTCA"]);
    assert_eq!(names(&of_other.reply().await), ["default", "ROOTCA"]);
    assert_eq!(agent.leases(), 1);
}

#[tokio::test]
async fn a_client_that_does_not_read_is_dropped_when_its_workload_has_ended() {
    let agent = Agent::with(|sessions| sessions.timeouts.graceful_close = Duration::from_millis(100)).await;
    let mut deaf = Link::with(&agent.path, h2::client::Builder::new().initial_window_size(0)).await;
    let mut stream = deaf.asking(&["default"]).await;
    stream.headers().await;
    until("the certificate", || agent.leases() == 1).await;
    agent.let_in.lock().unwrap()[0].cancel();
    deaf.ended().await;
    until("the end of the subscription", || agent.leases() == 0 && agent.streams() == 0).await;
}

#[tokio::test]
async fn a_drain_tells_every_stream_and_is_over_when_the_connections_are() {
    let agent = Agent::start().await;
    let mut links = Vec::new();
    for names in [&["default"][..], &["ROOTCA"], &["default", "ROOTCA"]] {
        let mut link = Link::connect(&agent.path).await;
        let mut stream = link.asking(names).await;
        stream.reply().await;
        links.push((link, stream));
    }
    let idle = Link::connect(&agent.path).await;
    agent.sessions.shutdown.begin();
    soon("the end of accepting", agent.accepting).await.unwrap();
    agent.sessions.ending.cancel();
    for (link, mut stream) in links {
        assert_eq!(stream.end().await, (Code::Unavailable, "the agent is shutting down".into()));
        drop(stream);
        link.ended().await;
    }
    idle.ended().await;
    assert_eq!(soon("the drain", agent.sessions.shutdown.drained()).await, Drained::Complete);
}

#[tokio::test]
async fn who_does_not_read_is_dropped_at_the_drains_end_and_leaves_nothing() {
    let agent = Agent::start().await;
    let mut deaf = Link::with(&agent.path, h2::client::Builder::new().initial_window_size(0)).await;
    let mut stream = deaf.asking(&["default"]).await;
    stream.headers().await;
    until("the certificate", || agent.leases() == 1).await;
    agent.sessions.shutdown.begin();
    agent.sessions.ending.cancel();
    let begun = std::time::Instant::now();
    let drained = soon("the drain", agent.sessions.shutdown.drained()).await;
    assert_eq!(drained, Drained::TimedOut { holders: 1 });
    assert!(begun.elapsed() >= DRAIN && deaf.is_open());
    agent.sessions.shutdown.abort.cancel();
    deaf.ended().await;
    until("the end of the subscription", || agent.leases() == 0 && agent.streams() == 0).await;
}

#[tokio::test]
async fn who_has_no_call_holds_up_no_drain_whatever_it_does_not_say() {
    let agent = Agent::with(|sessions| sessions.timeouts.graceful_close = Duration::from_millis(20)).await;
    let silent = UnixStream::connect(&agent.path).await.unwrap();
    let mut rude = UnixStream::connect(&agent.path).await.unwrap();
    rude.write_all(PREFACE).await.unwrap();
    // Connections are accepted in order: when this one is served, the others have been accepted.
    let mut link = Link::connect(&agent.path).await;
    link.asking(&["ROOTCA"]).await.reply().await;
    agent.sessions.shutdown.begin();
    agent.sessions.ending.cancel();
    assert_eq!(soon("the drain", agent.sessions.shutdown.drained()).await, Drained::Complete);
    drop((silent, rude));
}

#[tokio::test]
async fn the_agents_name_is_free_before_its_streams_end() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("sds.sock");
    let flags = Dev { socket: Some(socket.clone()), admin: Some(([127, 0, 0, 1], 0).into()), ..Dev::default() };
    let config = config::dev(flags, &|_| None).unwrap();
    let shutdown = Shutdown::new(config.drain);
    let agent = app::build(&config, app::Base::new(shutdown.clone())).await.unwrap();
    let running = tokio::spawn(async move { format!("{:?}", agent.run().await) });
    let mut link = Link::connect(&socket).await;
    let mut stream = link.asking(&["default"]).await;
    stream.reply().await;
    shutdown.begin();
    assert_eq!(stream.end().await.0, Code::Unavailable);
    assert!(!socket.exists(), "a client that reconnects at once could reach the agent that ends");
    drop(stream);
    link.ended().await;
    let drained = soon("the agent's end", running).await.unwrap();
    assert!(drained.contains("Complete"), "{drained}");
}

/// Says whether every caller is another agent, and counts the questions.
#[derive(Debug)]
struct Companion(bool, watch::Sender<usize>);

impl Companions for Companion {
    fn is_companion<'a>(&'a self, _peer: &'a Peer) -> BoxFuture<'a, bool> {
        self.1.send_modify(|asked| *asked += 1);
        Box::pin(std::future::ready(self.0))
    }
}

#[tokio::test]
async fn a_connection_without_an_identity_ends_unless_it_is_another_agents() {
    for is_agent in [false, true] {
        let companion = Arc::new(Companion(is_agent, watch::Sender::new(0)));
        let mut asked = companion.1.subscribe();
        let agent = Agent::with(|sessions| {
            sessions.timeouts.attestation = Duration::from_millis(300);
            sessions.companions = Some(companion);
        })
        .await;
        let mut attested = Link::connect(&agent.path).await;
        let mut stream = attested.asking(&["default"]).await;
        stream.reply().await;
        let unattested = Link::connect(&agent.path).await;
        soon("the question", asked.wait_for(|asked| *asked == 1)).await.unwrap();
        if is_agent {
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert!(unattested.is_open());
        } else {
            unattested.ended().await;
        }
        assert_eq!(agent.sessions.metrics.rejections(Rejection::unattested), u64::from(!is_agent));
        stream.ask(&["default", "ROOTCA"]);
        assert_eq!(names(&stream.reply().await), ["default", "ROOTCA"], "an attested connection stays");
        assert_eq!(*asked.borrow(), 1, "it is not asked about an attested caller");
    }
}
