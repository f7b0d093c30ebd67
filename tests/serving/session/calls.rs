//! Calls on a connection, SDS and others, and the independence of calls on one connection and of different clients.

use hyper_util::rt::TokioIo;
use sds_server::{
    proto::envoy::service::{discovery::v3::DiscoveryRequest, secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient},
    sds::service::SERVICE,
};
use tokio_stream::StreamExt;
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use super::{
    bench::{Agent, soon},
    link::{Link, names, request},
    *,
};

async fn channel(agent: &Agent) -> Channel {
    let path = agent.path.clone();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    soon("the channel", Endpoint::from_static("http://localhost").connect_with_connector(connector)).await.unwrap()
}

#[tokio::test]
async fn a_common_grpc_client_is_served() {
    let agent = Agent::start().await;
    let mut client = SecretDiscoveryServiceClient::new(channel(&agent).await);
    let ask = || DiscoveryRequest { resource_names: vec!["default".into(), "ROOTCA".into()], ..Default::default() };
    let fetched = soon("a fetch", client.fetch_secrets(ask())).await.unwrap().into_inner();
    assert_eq!(names(&fetched), ["default", "ROOTCA"]);
    let asks = tokio_stream::once(ask()).chain(tokio_stream::pending());
    let mut stream = soon("a stream", client.stream_secrets(asks)).await.unwrap().into_inner();
    let streamed = soon("a response", stream.next()).await.unwrap().unwrap();
    assert_eq!((names(&streamed), streamed.version_info), (names(&fetched), fetched.version_info));
    let error = soon("a refusal", client.fetch_secrets(DiscoveryRequest { resource_names: vec!["x".into()], ..Default::default() }));
    assert_eq!(error.await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn two_full_size_envoy_requests_arrive_before_attestation_ends() {
    let agent = Agent::start().await;
    agent.origin_cache.send_replace(false);
    let mut link = Link::connect(&agent.path).await;
    let (mut certificate, mut bundle) = (link.stream().await, link.stream().await);
    // Together larger than the connection's window: the second request gets through only when the first has been read.
    certificate.send_through(request(&["default"], 61_440)).await;
    bundle.send_through(request(&["ROOTCA"], 61_440)).await;
    agent.origin_cache.send_replace(true);
    assert_eq!(names(&certificate.reply().await), ["default"]);
    assert_eq!(names(&bundle.reply().await), ["ROOTCA"]);
    assert_eq!(agent.let_in.lock().unwrap().len(), 1, "a connection is attested once");
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_up_nobody_else() {
    let agent = Agent::start().await;
    let mut deaf = Link::with(&agent.path, h2::client::Builder::new().initial_window_size(0)).await;
    let mut silent = deaf.asking(&["default", "ROOTCA"]).await;
    silent.headers().await;
    for _ in 0..3 {
        agent.change_bundle();
        let mut link = Link::connect(&agent.path).await;
        let mut stream = link.asking(&["ROOTCA"]).await;
        assert_eq!(names(&stream.reply().await), ["ROOTCA"]);
    }
    // Other calls on the same connection are answered too: their errors need no window.
    assert_eq!(deaf.call("nothing.Here/AtAll").await.end().await.0, Code::Unimplemented);
}

#[tokio::test]
async fn health_is_told_until_the_agent_leaves() {
    let agent = Agent::start().await;
    let mut health = HealthClient::new(channel(&agent).await);
    for service in ["", SERVICE] {
        let request = HealthCheckRequest { service: service.into() };
        let answer = soon("health", health.check(request)).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving);
    }
    let unknown = HealthCheckRequest { service: "unknown".into() };
    assert_eq!(soon("health", health.check(unknown)).await.unwrap_err().code(), Code::NotFound);
    let request = HealthCheckRequest { service: SERVICE.into() };
    let mut watch = soon("a watch", health.watch(request)).await.unwrap().into_inner();
    assert_eq!(soon("health", watch.next()).await.unwrap().unwrap().status(), ServingStatus::Serving);
    agent.sessions.services.leaving().await;
    assert_eq!(soon("health", watch.next()).await.unwrap().unwrap().status(), ServingStatus::NotServing);
}

#[tokio::test]
async fn a_watch_of_the_health_holds_up_no_drain() {
    let agent = Agent::start().await;
    let mut health = HealthClient::new(channel(&agent).await);
    let mut watch = soon("a watch", health.watch(HealthCheckRequest::default())).await.unwrap().into_inner();
    soon("health", watch.next()).await.unwrap().unwrap();
    agent.sessions.shutdown.begin();
    agent.sessions.services.leaving().await;
    agent.sessions.ending.cancel();
    assert_eq!(soon("health", watch.next()).await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert_eq!(soon("the end", watch.next()).await.unwrap().unwrap_err().code(), Code::Unavailable);
    assert_eq!(soon("the drain", agent.sessions.shutdown.drained()).await, agent_runtime::shutdown::Drained::Complete);
}

macro_rules! reflects {
    ($test:ident, $version:ident) => {
        #[tokio::test]
        async fn $test() {
            use tonic_reflection::pb::$version::{
                ServerReflectionRequest, server_reflection_client::ServerReflectionClient, server_reflection_request::MessageRequest,
                server_reflection_response::MessageResponse,
            };
            let agent = Agent::start().await;
            let mut client = ServerReflectionClient::new(channel(&agent).await);
            let ask = |message| ServerReflectionRequest { host: String::new(), message_request: Some(message) };
            let asks = tokio_stream::iter([
                ask(MessageRequest::ListServices(String::new())),
                ask(MessageRequest::FileContainingSymbol(SERVICE.into())),
            ]);
            let mut answers = soon("reflection", client.server_reflection_info(asks)).await.unwrap().into_inner();
            let mut next = async || soon("an answer", answers.next()).await.unwrap().unwrap().message_response.unwrap();
            let MessageResponse::ListServicesResponse(list) = next().await else { panic!("no list") };
            let listed: Vec<_> = list.service.iter().map(|service| &*service.name).collect();
            assert!(listed.contains(&SERVICE) && listed.contains(&"grpc.health.v1.Health"), "{listed:?}");
            let MessageResponse::FileDescriptorResponse(file) = next().await else { panic!("no file") };
            assert!(!file.file_descriptor_proto.is_empty());
        }
    };
}
reflects!(reflection_v1_tells_what_is_served, v1);
reflects!(reflection_v1alpha_tells_what_is_served, v1alpha);

#[tokio::test]
async fn what_is_not_served_is_unimplemented() {
    let agent = Agent::start().await;
    let mut link = Link::connect(&agent.path).await;
    for path in [&format!("{SERVICE}/Unknown"), &format!("{SERVICE}x/FetchSecrets"), "envoy.service.cluster.v3.X/Y", "", "FetchSecrets"] {
        let (code, message) = link.call(path).await.end().await;
        assert_eq!(code, Code::Unimplemented, "{path}");
        assert!(message.contains("SDS"), "{message}");
    }
}
