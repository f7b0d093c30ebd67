//! Every kind of log line that a client can cause, in a flood of one pod: one line for each pod and cause, however often it occurs, and
//! another pod's first line is there while the flood goes on.

use agent_runtime::telemetry::{self, Format, captured::Captured};
use bytes::Bytes;
use h2::client;
use prost::Message;
use sds_server::{
    grpc::prefix,
    proto::{envoy::service::discovery::v3::DiscoveryRequest, google::rpc::Status as RpcStatus},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

use super::{
    arrivals::PREFACE,
    bench::{Agent, soon},
    floods::{Closed, is_turned_away, socket_of},
    link::{Call, Link},
    *,
};

/// How often the flooding pod causes each kind, before and after the other pod does it once.
const TIMES: usize = 500;

/// An action of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Calls without an identity.
    NoIdentity,
    /// Opens more connections than a pod may have.
    Connections,
    /// Opens more streams than a pod may have.
    Streams,
    /// Rejects a certificate.
    Certificate,
    /// Rejects a bundle.
    Bundle,
    /// Requests another type of resource, with another name each time.
    Type,
    /// Requests more names than a stream may have.
    Names,
    /// Calls a method that does not exist.
    Method,
    /// Sends bytes that are not HTTP/2.
    Garbage,
    /// Acknowledges PINGs that were not sent.
    Ping,
    /// Opens streams and resets them at once.
    Reset,
}

impl Kind {
    const ALL: [Self; 11] = [
        Self::NoIdentity,
        Self::Connections,
        Self::Streams,
        Self::Certificate,
        Self::Bundle,
        Self::Type,
        Self::Names,
        Self::Method,
        Self::Garbage,
        Self::Ping,
        Self::Reset,
    ];

    /// The line about it, with the target. `None`: the agent itself logs nothing. The lines of libraries name no pod, so they are one for all.
    fn line(self) -> Option<&'static str> {
        match self {
            Self::NoIdentity => Some("caller not served"),
            Self::Connections => Some("connection closed: over quota"),
            Self::Streams => Some("stream refused: over quota"),
            Self::Certificate | Self::Bundle => Some("rejected by the client"),
            Self::Type | Self::Names => Some("stream refused"),
            Self::Method | Self::Garbage | Self::Ping | Self::Reset => None,
        }
    }

    async fn agent(self) -> Agent {
        Agent::with(|sessions| {
            sessions.limits.new_connections_burst_per_pod = 1_000_000;
            sessions.timeouts.refusal_delay = Duration::ZERO;
            match self {
                Self::NoIdentity => sessions.authenticator.attestor = Arc::new(Closed),
                Self::Connections => sessions.limits.connections_per_pod = 1,
                Self::Streams => sessions.limits.streams_per_pod = 1,
                _ => {}
            }
        })
        .await
    }
}

/// A pod's client.
struct Pod {
    path: std::path::PathBuf,
    link: Link,
    /// A stream that uses the pod's quota.
    _held: Option<Call>,
}

impl Pod {
    async fn new(agent: &Agent, kind: Kind, name: &'static str) -> Self {
        let path = socket_of(agent, name);
        let mut link = Link::connect(&path).await;
        let mut held = None;
        if kind == Kind::Streams {
            let mut stream = link.asking(&["ROOTCA"]).await;
            stream.reply().await;
            held = Some(stream);
        }
        Self { path, link, _held: held }
    }

    async fn send(&mut self, request: &DiscoveryRequest) -> (Code, String) {
        let mut call = self.link.stream().await;
        call.say.send_data(framed(request), false).unwrap();
        call.end().await
    }

    /// Receives a secret and rejects it. The end of the stream shows that the server has read the rejection.
    async fn reject(&mut self, name: &str, number: usize) {
        let mut call = self.link.asking(&[name]).await;
        let reply = call.reply().await;
        let request = DiscoveryRequest {
            resource_names: vec![name.to_owned()],
            response_nonce: reply.nonce,
            error_detail: Some(RpcStatus { code: 13, message: format!("reason {number}") }),
            ..Default::default()
        };
        call.say.send_data(framed(&request), true).unwrap();
        assert_eq!(call.end().await.0, Code::Ok);
    }

    /// Sends these bytes on a connection of its own, and reads to its end.
    async fn say(&self, bytes: &[u8]) {
        let mut stream = UnixStream::connect(&self.path).await.unwrap();
        // The server may close the connection before it has read everything.
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let _ = soon("the connection's end", stream.read_to_end(&mut Vec::new())).await;
    }

    async fn act(&mut self, kind: Kind, number: usize) {
        match kind {
            Kind::NoIdentity => {
                assert_eq!(
                    self.send(&DiscoveryRequest { resource_names: vec!["default".into()], ..Default::default() }).await.0,
                    Code::PermissionDenied
                );
            }
            Kind::Connections => assert!(is_turned_away(&self.path).await),
            Kind::Streams => {
                // The connection of a client that goes on with refused streams is closed.
                let mut link = Link::connect(&self.path).await;
                assert_eq!(link.asking(&["ROOTCA"]).await.end().await.0, Code::ResourceExhausted);
            }
            Kind::Certificate => self.reject("default", number).await,
            Kind::Bundle => self.reject("ROOTCA", number).await,
            Kind::Type => {
                let request = DiscoveryRequest { type_url: format!("type {number}"), ..Default::default() };
                assert_eq!(self.send(&request).await.0, Code::InvalidArgument);
            }
            Kind::Names => {
                let resource_names = (0..65).map(|name| format!("{number} {name}")).collect();
                assert_eq!(self.send(&DiscoveryRequest { resource_names, ..Default::default() }).await.0, Code::ResourceExhausted);
            }
            Kind::Method => {
                let path = format!("nothing.Here/At{number}");
                assert_eq!(self.link.call(&path).await.end().await.0, Code::Unimplemented);
            }
            Kind::Garbage => self.say(&number.to_string().repeat(100).into_bytes()).await,
            // An acknowledgement with other content each time.
            Kind::Ping => self.say(&[PREFACE, &[0, 0, 8, 6, 1, 0, 0, 0, 0], &number.to_be_bytes()].concat()).await,
            Kind::Reset => {
                let mut link = Link::with(&self.path, &client::Builder::new()).await;
                for _ in 0..4 {
                    link.stream().await.say.send_reset(h2::Reason::CANCEL);
                }
            }
        }
    }
}

fn framed(request: &DiscoveryRequest) -> Bytes {
    let message = request.encode_to_vec();
    Bytes::from([&prefix(message.len())[..], &message].concat())
}

#[tokio::test]
async fn each_kind_of_line_is_limited_by_pod_and_cause() {
    let log = Captured::default();
    let (_guard, _filter) = telemetry::capture(telemetry::DEFAULT_FILTER, Format::Json, log.clone()).unwrap();
    for kind in Kind::ALL {
        let agent = kind.agent().await;
        let (mut flooding, mut quiet) = (Pod::new(&agent, kind, "flooding").await, Pod::new(&agent, kind, "quiet").await);
        // Without the lines about its start.
        log.take();
        let count = |log: &Captured| kind.line().map_or(0, |line| log.lines(line).len());
        let lines = usize::from(kind.line().is_some());
        for number in 0..TIMES {
            flooding.act(kind, number).await;
        }
        assert_eq!(count(&log), lines, "{kind:?}: the flood is one line");
        quiet.act(kind, 0).await;
        assert_eq!(count(&log), 2 * lines, "{kind:?}: another pod has its own");
        for number in 0..TIMES {
            flooding.act(kind, TIMES + number).await;
        }
        assert_eq!(count(&log), 2 * lines, "{kind:?}: the flood went on");
        // The certificate that was issued is a line. Those of libraries are one for each place in their code.
        let text = log.take();
        let others: Vec<_> = text
            .lines()
            .filter(|line| !line.contains("certificate issued"))
            .filter(|line| kind.line().is_none_or(|it| !line.contains(it)))
            .collect();
        assert!(others.len() <= usize::from(matches!(kind, Kind::Ping | Kind::Reset)), "{kind:?}: {others:#?}");
    }
}
