//! A client of either protocol variant. It stores names, versions and the last nonce, and sends the responses that a test requests.

use std::convert::Infallible;

use bytes::Buf;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use prost::Message;
use sds_server::proto::{
    envoy::{
        config::core::v3::data_source::Specifier,
        extensions::transport_sockets::tls::v3::{Secret, secret::Type},
        service::discovery::v3::{DeltaDiscoveryResponse, DiscoveryResponse},
    },
    google::rpc::Status as RpcStatus,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Code;

use super::{bench::Bench, *};

pub const FACES: [Variant; 2] = [Variant::Sotw, Variant::Delta];
/// A limit that no expected event reaches; in paused time it costs nothing.
const PATIENCE: Duration = Duration::from_secs(24 * 3600);

/// One resource of a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    pub name: String,
    /// Delta only.
    pub version: String,
    pub content: Content,
}

#[derive(Clone, PartialEq, Eq)]
pub enum Content {
    /// The chain in PEM.
    Certificate(Vec<u8>),
    /// The roots in PEM.
    Bundle(Vec<u8>),
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Self::Bundle(_)) { "bundle" } else { "certificate" })
    }
}

/// One response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// SotW only.
    pub version: String,
    pub nonce: String,
    pub resources: Vec<Resource>,
    /// Delta only: the names of removed resources.
    pub removed: Vec<String>,
}

impl Reply {
    pub fn names(&self) -> Vec<&str> {
        self.resources.iter().map(|r| &*r.name).collect()
    }

    /// The version of the only resource, in either variant.
    pub fn only_version(&self) -> &str {
        assert_eq!(self.resources.len(), 1);
        if self.version.is_empty() { &self.resources[0].version } else { &self.version }
    }

    /// Whether the resource `name` is the certificate `svid` with its chain.
    pub fn carries(&self, name: &str, svid: &Svid) -> bool {
        self.resources.iter().any(|r| r.name == name && r.content == Content::Certificate(svid.chain.to_pem()))
    }

    pub fn of_message(variant: Variant, message: &[u8]) -> Self {
        match variant {
            Variant::Sotw => {
                let response = DiscoveryResponse::decode(message).unwrap();
                assert_eq!(response.type_url, TYPE_URL);
                let resources = response.resources.iter().map(|any| resource(any, None)).collect();
                Self { version: response.version_info, nonce: response.nonce, resources, removed: Vec::new() }
            }
            Variant::Delta => {
                let response = DeltaDiscoveryResponse::decode(message).unwrap();
                assert_eq!(response.type_url, TYPE_URL);
                let resources =
                    response.resources.iter().map(|r| resource(r.resource.as_ref().unwrap(), Some((&r.name, &r.version)))).collect();
                Self { version: String::new(), nonce: response.nonce, resources, removed: response.removed_resources }
            }
        }
    }
}

fn resource(any: &prost_types::Any, of: Option<(&str, &str)>) -> Resource {
    assert_eq!(any.type_url, TYPE_URL);
    let secret = Secret::decode(&any.value[..]).unwrap();
    let inline = |source: Option<sds_server::proto::envoy::config::core::v3::DataSource>| match source.unwrap().specifier {
        Some(Specifier::InlineBytes(bytes)) => bytes.to_vec(),
        None => panic!("not inline"),
    };
    let content = match secret.r#type.unwrap() {
        Type::TlsCertificate(certificate) => {
            assert!(inline(certificate.private_key).starts_with(b"-----BEGIN PRIVATE KEY-----"));
            Content::Certificate(inline(certificate.certificate_chain))
        }
        Type::ValidationContext(context) => Content::Bundle(inline(context.trusted_ca)),
    };
    if let Some((name, _)) = of {
        assert_eq!(name, secret.name);
    }
    Resource { name: secret.name, version: of.map(|(_, version)| version.to_owned()).unwrap_or_default(), content }
}

/// An event on the client's side of a stream.
#[derive(Debug, PartialEq)]
enum Seen {
    Reply(Reply),
    End(Code, String),
}

/// A message in gRPC framing.
pub fn framed(message: &impl Message) -> Bytes {
    Bytes::from([&grpc::prefix(message.encoded_len())[..], &message.encode_to_vec()].concat())
}

/// A request that consists of the pieces of this channel.
pub fn body(pieces: mpsc::UnboundedReceiver<Bytes>, variant: Variant) -> Inbox {
    let frames = futures::StreamExt::map(UnboundedReceiverStream::new(pieces), |piece| Ok::<_, Infallible>(Frame::data(piece)));
    Inbox::of_body(StreamBody::new(frames), if variant == Variant::Delta { MessageKind::Delta } else { MessageKind::Sotw })
}

/// The status in the trailers of a response.
pub fn status(trailers: &http::HeaderMap) -> (Code, String) {
    let status = Status::from_header_map(trailers).expect("a status");
    (status.code(), status.message().to_owned())
}

/// A stream and its client.
pub struct Client {
    variant: Variant,
    said: Option<mpsc::UnboundedSender<Bytes>>,
    seen: mpsc::UnboundedReceiver<Seen>,
    transport: tokio::task::JoinHandle<()>,
    names: Vec<String>,
    nonce: String,
    version: String,
}

impl Client {
    /// Opens a stream on a new connection, without sending a request.
    pub async fn open(bench: &Bench, variant: Variant) -> Self {
        Self::on(bench, &bench.connection(), variant).await
    }

    pub async fn on(bench: &Bench, connection: &Arc<Connection>, variant: Variant) -> Self {
        let (said, pieces) = mpsc::unbounded_channel();
        let method = if variant == Variant::Delta { "DeltaSecrets" } else { "StreamSecrets" };
        let request = Request::post(format!("/{SERVICE}/{method}")).body(body(pieces, variant)).unwrap();
        let response = bench.service.call(connection, request).await.expect("a method of the service");
        let (tell, seen) = mpsc::unbounded_channel();
        let transport = tokio::spawn(carry(variant, response.into_body(), tell));
        Self { variant, said: Some(said), seen, transport, names: Vec::new(), nonce: String::new(), version: String::new() }
    }

    /// Opens a stream and requests `names`.
    pub async fn asking(bench: &Bench, variant: Variant, names: &[&str]) -> Self {
        let mut client = Self::open(bench, variant).await;
        client.ask(names);
        client
    }

    /// Opens a stream as a reconnecting client: it sends `version` for each of `names`.
    pub async fn returning(bench: &Bench, variant: Variant, names: &[&str], version: &str) -> Self {
        let mut client = Self::open(bench, variant).await;
        client.version = version.to_owned();
        client.names = names.iter().map(|n| (*n).to_owned()).collect();
        let (subscribe, names) = (client.names.clone(), client.names.clone());
        client.say(&subscribe, &[], names.iter().map(|n| (n.clone(), version.to_owned())).collect(), None, "");
        client
    }

    /// Changes the subscription to exactly `names`.
    pub fn ask(&mut self, names: &[&str]) {
        let next: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let added: Vec<String> = next.iter().filter(|n| !self.names.contains(n)).cloned().collect();
        let dropped: Vec<String> = self.names.iter().filter(|n| !next.contains(n)).cloned().collect();
        self.names = next;
        let nonce = if self.variant == Variant::Delta { String::new() } else { self.nonce.clone() };
        self.say(&added, &dropped, Default::default(), None, &nonce);
    }

    pub fn ack(&mut self, reply: &Reply) {
        (self.nonce, self.version) = (reply.nonce.clone(), reply.version.clone());
        self.say(&[], &[], Default::default(), None, &reply.nonce);
    }

    pub fn nack(&mut self, reply: &Reply) {
        self.nonce.clone_from(&reply.nonce);
        self.say(&[], &[], Default::default(), Some("bad certificate"), &reply.nonce);
    }

    /// Rejects `reply` and subscribes to another name, in one message.
    pub fn nack_and_add(&mut self, reply: &Reply, name: &str) {
        self.nonce.clone_from(&reply.nonce);
        self.names.push(name.to_owned());
        self.say(&[name.to_owned()], &[], Default::default(), Some("bad certificate"), &reply.nonce);
    }

    /// Rejects `reply` and subscribes to the same names again, in one message.
    pub fn nack_and_ask_again(&mut self, reply: &Reply) {
        self.nonce.clone_from(&reply.nonce);
        let names = self.names.clone();
        self.say(&names, &names, Default::default(), Some("bad certificate"), &reply.nonce);
    }

    fn say(
        &self,
        added: &[String],
        dropped: &[String],
        versions: std::collections::HashMap<String, String>,
        error: Option<&str>,
        nonce: &str,
    ) {
        let error_detail = error.map(|message| RpcStatus { code: 3, message: message.to_owned() });
        let (type_url, response_nonce) = (TYPE_URL.to_owned(), nonce.to_owned());
        self.send(match self.variant {
            Variant::Sotw => framed(&DiscoveryRequest {
                version_info: self.version.clone(),
                resource_names: self.names.clone(),
                type_url,
                response_nonce,
                error_detail,
            }),
            Variant::Delta => framed(&DeltaDiscoveryRequest {
                type_url,
                resource_names_subscribe: added.to_vec(),
                resource_names_unsubscribe: dropped.to_vec(),
                initial_resource_versions: versions,
                response_nonce,
                error_detail,
            }),
        });
    }

    /// Sends `piece` unchanged.
    pub fn send(&self, piece: Bytes) {
        // A stream that has ended does not receive it.
        let _ = self.said.as_ref().expect("the client has not said its last").send(piece);
    }

    /// Ends the client's side of the stream and still receives.
    pub fn close(&mut self) {
        self.said = None;
    }

    /// The next response, without a limit in paused time.
    pub async fn reply(&mut self) -> Reply {
        match tokio::time::timeout(PATIENCE, self.seen.recv()).await.expect("a response in time") {
            Some(Seen::Reply(reply)) => reply,
            other => panic!("no response but {other:?}"),
        }
    }

    /// Receives and acknowledges the next response.
    pub async fn accepted(&mut self) -> Reply {
        let reply = self.reply().await;
        self.ack(&reply);
        reply
    }

    /// Asserts that nothing arrives for `time`.
    pub async fn quiet(&mut self, time: Duration) {
        if let Ok(seen) = tokio::time::timeout(time, self.seen.recv()).await {
            panic!("expected no response, got {seen:?}");
        }
    }

    /// Returns the final status; asserts that no response comes before it.
    pub async fn end(&mut self) -> (Code, String) {
        match tokio::time::timeout(PATIENCE, self.seen.recv()).await.expect("an end in time") {
            Some(Seen::End(code, message)) => (code, message),
            other => panic!("no end but {other:?}"),
        }
    }

    /// Resets the stream, and returns when the service has processed it.
    pub async fn reset(self) {
        self.transport.abort();
        let _ = self.transport.await;
    }
}

/// The bytes of a frame.
pub fn bytes(mut data: grpc::Pieces) -> Bytes {
    data.copy_to_bytes(data.remaining())
}

/// Reads a response as a transport does: each piece at once.
async fn carry(variant: Variant, mut response: Body, tell: mpsc::UnboundedSender<Seen>) {
    let mut pending = Vec::new();
    while let Some(frame) = response.frame().await {
        let frame = match frame.unwrap().into_data() {
            Ok(data) => {
                pending.extend_from_slice(&bytes(data));
                while pending.len() >= grpc::PREFIX {
                    let len = u32::from_be_bytes(pending[1..5].try_into().unwrap()) as usize;
                    if pending.len() < grpc::PREFIX + len {
                        break;
                    }
                    let message: Vec<u8> = pending.drain(..grpc::PREFIX + len).skip(grpc::PREFIX).collect();
                    let _ = tell.send(Seen::Reply(Reply::of_message(variant, &message)));
                }
                continue;
            }
            Err(frame) => frame,
        };
        assert_eq!(pending, [0; 0], "the stream ended within a message");
        let (code, message) = status(frame.trailers_ref().expect("trailers"));
        let _ = tell.send(Seen::End(code, message));
    }
}
