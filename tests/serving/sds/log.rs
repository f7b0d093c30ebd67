//! Log lines that clients cause: one for each pod and cause, regardless of the number of occurrences.

use agent_runtime::{
    telemetry::{self, Format, captured::Captured},
    text::test_keys::Key,
};
use issuance::rotation::reissue::{Reissue, Which};
use sds_server::{caller::Refusals, proto::google::rpc::Status as RpcStatus};
use tonic::Code;

use super::{
    bench::{Bench, settle},
    client::{Client, FACES, framed},
    *,
};

/// How often the client repeats the action.
const TIMES: u64 = 1000;

#[tokio::test(start_paused = true)]
async fn a_client_that_rejects_in_a_loop_is_one_line_and_every_time_is_counted() {
    let log = Captured::default();
    let (_guard, _filter) = telemetry::capture("info", Format::Json, log.clone()).unwrap();
    let bench = Bench::new();
    let mut client = Client::asking(&bench, Variant::Delta, &["ROOTCA"]).await;
    for _ in 0..TIMES {
        let reply = client.reply().await;
        client.nack_and_ask_again(&reply);
    }
    client.reply().await;
    assert_eq!(bench.service.metrics.nacks(Kind::bundle), TIMES);
    assert_eq!(log.count("rejected by the client"), 1);
    // The next line has the number of suppressed ones.
    tokio::time::advance(Duration::from_secs(60)).await;
    let mut other = Client::asking(&bench, Variant::Delta, &["ROOTCA"]).await;
    let reply = other.reply().await;
    other.nack(&reply);
    settle().await;
    let lines = log.lines("rejected by the client");
    assert_eq!(lines.len(), 2, "another connection is another caller here");
}

#[tokio::test(start_paused = true)]
async fn rejections_are_logged_once_a_minute_per_pod_with_their_count() {
    let log = Captured::default();
    let (_guard, _filter) = telemetry::capture("info", Format::Json, log.clone()).unwrap();
    let (bench, refusals) = (Bench::new(), Arc::<Refusals>::default());
    let reject = async |pod: &str, names: &[&str]| {
        let mut client = Client::on(&bench, &bench.connection_of(pod, &refusals), Variant::Sotw).await;
        client.ask(names);
        let reply = client.reply().await;
        client.nack(&reply);
        settle().await;
    };
    let left_out = || log.lines("rejected by the client").iter().map(|line| line["left_out"].as_u64().unwrap()).collect::<Vec<_>>();
    for _ in 0..50 {
        reject("u1", &["ROOTCA"]).await;
    }
    assert_eq!(left_out(), [0]);
    reject("u2", &["ROOTCA"]).await;
    reject("u1", &["default"]).await;
    assert_eq!(left_out(), [0, 0, 0], "another pod, and another kind of secret");
    tokio::time::advance(Duration::from_secs(60)).await;
    reject("u1", &["ROOTCA"]).await;
    assert_eq!(left_out(), [0, 0, 0, 49]);
}

#[tokio::test(start_paused = true)]
async fn streams_that_are_refused_in_a_loop_are_one_line_for_each_cause() {
    let log = Captured::default();
    let (_guard, _filter) = telemetry::capture("info", Format::Json, log.clone()).unwrap();
    let (bench, refusals) = (Bench::new(), Arc::<Refusals>::default());
    let connection = bench.connection_of("u1", &refusals);
    for variant in FACES {
        for _ in 0..TIMES {
            let mut client = Client::on(&bench, &connection, variant).await;
            client.ask(&["a", "b", "c", "d", "e"]);
            assert_eq!(client.end().await.0, Code::ResourceExhausted);
        }
        for number in 0..TIMES {
            let mut client = Client::on(&bench, &connection, variant).await;
            // The field is the same in the messages of both variants.
            let type_url = format!("another type {number}");
            client.send(match variant {
                Variant::Sotw => framed(&DiscoveryRequest { type_url, ..Default::default() }),
                Variant::Delta => framed(&DeltaDiscoveryRequest { type_url, ..Default::default() }),
            });
            assert_eq!(client.end().await.0, Code::InvalidArgument);
        }
    }
    assert_eq!(log.count("stream refused"), 2);
    assert_eq!(log.take().lines().count(), 3, "and the certificate that was issued is a line");
}

#[tokio::test(start_paused = true)]
async fn calls_to_reissue_in_a_loop_are_one_line() {
    let log = Captured::default();
    let (_guard, _filter) = telemetry::capture("info", Format::Json, log.clone()).unwrap();
    let bench = Bench::new();
    for number in 0..TIMES {
        let (answer, told) = tokio::sync::oneshot::channel();
        let which = Which { spiffe_id: Some(format!("spiffe://cluster.local/{number}")), profile: None };
        bench.reissue.send(Reissue { which, over: Duration::ZERO, answer }).await.unwrap();
        assert_eq!(told.await.unwrap().matched, 0);
    }
    assert_eq!(log.count("certificates are reissued as asked"), 1);
}

/// In a name, a type URL, the client's description of itself, and its error detail of a NACK.
#[tokio::test(start_paused = true)]
async fn a_key_in_what_a_client_says_is_neither_logged_nor_answered() {
    let key = Key::ecdsa();
    let log = Captured::default();
    let (_guard, _filter) = telemetry::capture("debug", Format::Json, log.clone()).unwrap();
    let bench = Bench::new();
    for (name, text) in key.some_texts() {
        let mut told = String::new();
        // Each case uses a new caller, so that every line is written.
        let mut client = Client::open(&bench, Variant::Sotw).await;
        client.ask(&["default"]);
        let reply = client.reply().await;
        let error_detail = Some(RpcStatus { code: 13, message: text.clone() });
        let nack = DiscoveryRequest {
            resource_names: vec!["default".into(), text.clone()],
            response_nonce: reply.nonce.clone(),
            version_info: text.clone(),
            error_detail,
            ..Default::default()
        };
        client.send(framed(&nack));
        settle().await;
        for request in [
            DiscoveryRequest { type_url: text.clone(), ..Default::default() },
            DiscoveryRequest {
                resource_names: [text.clone(); 1].into_iter().cycle().enumerate().map(|(at, text)| format!("{at}{text}")).take(5).collect(),
                ..Default::default()
            },
        ] {
            let mut client = Client::open(&bench, Variant::Sotw).await;
            client.send(framed(&request));
            told += &client.end().await.1;
        }
        told += &log.take();
        assert_eq!(key.leak_in(&told), None, "{name}: {told}");
        told.lines().for_each(|line| assert!(line.len() < 4096, "{name}: {} bytes", line.len()));
        assert!(told.contains("rejected by the client") && told.contains("stream refused"), "{told}");
    }
}
