//! The end of streams. No state is left behind.

use http_body_util::BodyExt;
use tokio::sync::mpsc;
use tonic::Code;

use super::{
    bench::{Bench, RETENTION, Upstream, foreign_bundle, settle},
    client::{Client, Content, FACES, Reply, body, bytes, framed, status},
    *,
};

const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test(start_paused = true)]
async fn a_workloads_end_ends_its_streams_and_no_key_leaves_after_it() {
    for variant in FACES {
        let b = Bench::new();
        let (connection, mut open) = (b.connection(), Vec::new());
        for _ in 0..3 {
            let mut client = Client::on(&b, &connection, variant).await;
            client.ask(&["default"]);
            client.accepted().await;
            open.push(client);
        }
        b.terminated.cancel();
        for mut client in open {
            assert_eq!(client.end().await, (Code::PermissionDenied, "the workload has ended".into()));
        }
        let mut late = Client::on(&b, &connection, variant).await;
        late.ask(&["default"]);
        assert_eq!(late.end().await.0, Code::PermissionDenied, "although the certificate is there");
        settle().await;
        assert_eq!(b.leases(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_workload_that_ends_while_its_certificate_is_issued_never_gets_it() {
    for variant in FACES {
        let b = Bench::new();
        b.upstream.send_replace(Upstream::Slow);
        let mut client = Client::asking(&b, variant, &["default"]).await;
        client.quiet(MINUTE).await;
        b.terminated.cancel();
        b.upstream.send_replace(Upstream::Up);
        assert_eq!(client.end().await.0, Code::PermissionDenied);
    }
}

#[tokio::test(start_paused = true)]
async fn no_key_leaves_when_the_process_has_ended_though_nobody_has_been_told() {
    for variant in FACES {
        let b = Bench::new();
        b.upstream.send_replace(Upstream::Slow);
        let mut client = Client::asking(&b, variant, &["default"]).await;
        client.quiet(MINUTE).await;
        b.end_process();
        b.upstream.send_replace(Upstream::Up);
        assert_eq!(client.end().await, (Code::PermissionDenied, "the workload has ended".into()));
        assert!(b.terminated.is_cancelled(), "now every stream ends");
    }
}

#[tokio::test(start_paused = true)]
async fn what_the_transport_has_not_taken_when_a_workload_ends_stays_here() {
    let b = Bench::new();
    let mut before = Client::asking(&b, Variant::Delta, &["default"]).await;
    before.accepted().await;
    let (said, mut body) = by_hand(&b, "default").await;
    let head = bytes(body.frame().await.unwrap().unwrap().into_data().unwrap());
    assert!(head.len() < 500, "the key is in the next piece");
    b.terminated.cancel();
    let next = body.frame().await.unwrap().unwrap();
    assert_eq!(status(next.trailers_ref().expect("the status, and no key")).0, Code::PermissionDenied);
    assert!(body.frame().await.is_none());
    drop(said);
}

/// A stream whose response a test reads itself.
async fn by_hand(b: &Bench, name: &str) -> (mpsc::UnboundedSender<Bytes>, Body) {
    let (said, pieces) = mpsc::unbounded_channel();
    let request = Request::post(format!("/{SERVICE}/StreamSecrets")).body(body(pieces, Variant::Sotw)).unwrap();
    let response = b.service.call(&b.connection(), request).await.unwrap();
    said.send(framed(&DiscoveryRequest { resource_names: vec![name.into()], ..Default::default() })).unwrap();
    (said, response.into_body())
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_every_stream_whatever_it_waits_for() {
    for variant in FACES {
        let b = Bench::new();
        let mut served = Client::asking(&b, variant, &["default"]).await;
        served.accepted().await;
        let silent = Client::open(&b, variant).await;
        b.know_nobody();
        let unknown = Client::asking(&b, variant, &["default"]).await;
        settle().await;
        b.service.ending.cancel();
        for mut client in [served, silent, unknown] {
            assert_eq!(client.end().await, (Code::Unavailable, "the agent is shutting down".into()));
        }
        settle().await;
        assert_eq!((b.leases(), b.service.metrics.streams.get()), (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_has_said_its_last_is_answered_once_and_then_done() {
    for variant in FACES {
        let b = Bench::new();
        b.upstream.send_replace(Upstream::Slow);
        let mut client = Client::asking(&b, variant, &["default", "file-root:system"]).await;
        client.close();
        client.quiet(MINUTE).await;
        b.upstream.send_replace(Upstream::Up);
        assert_eq!(client.reply().await.names(), ["default"]);
        assert_eq!(client.end().await.0, Code::Ok);

        let mut nothing = Client::open(&b, variant).await;
        nothing.close();
        assert_eq!(nothing.end().await.0, Code::Ok);
        let mut unknown = Client::asking(&b, variant, &["file-root:system", "spiffe://nobody.example"]).await;
        unknown.close();
        assert_eq!(unknown.end().await.0, Code::Ok, "no response comes for a name of another provider");
        settle().await;
        assert_eq!(b.leases(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_without_identity_gets_permission_denied_or_unavailable() {
    for variant in FACES {
        let b = Bench::new();
        b.refuse(false);
        let mut client = Client::asking(&b, variant, &["default"]).await;
        assert_eq!(client.end().await, (Code::PermissionDenied, "no identity is available to this caller".into()));
        b.refuse(true);
        let connection = b.connection();
        let mut client = Client::on(&b, &connection, variant).await;
        client.ask(&["default"]);
        assert_eq!(client.end().await, (Code::Unavailable, "the caller cannot be identified right now".into()));
        b.know_everybody();
        let mut client = Client::on(&b, &connection, variant).await;
        client.ask(&["default"]);
        client.accepted().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_ended_stream_drops_its_lease_and_stops_renewals() {
    for variant in FACES {
        let b = Bench::new();
        // Twice within the retention: the second end starts the retention again.
        for _ in 0..2 {
            let mut client = Client::asking(&b, variant, &["default"]).await;
            client.accepted().await;
            assert_eq!(b.leases(), 1);
            client.reset().await;
            assert_eq!((b.leases(), b.service.metrics.streams.get()), (0, 0));
            tokio::time::sleep(RETENTION / 2).await;
        }
        tokio::time::sleep(RETENTION).await;
        assert_eq!(b.service.store.snapshot().len(), 0, "forgotten after the retention");
        let orders = b.orders();
        tokio::time::sleep(120 * MINUTE).await;
        assert_eq!(b.orders(), orders);
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_is_dropped_with_the_last_stream_and_the_retention() {
    let b = Bench::new();
    let mut client = Client::asking(&b, Variant::Sotw, &["default"]).await;
    client.accepted().await;
    let weak = Arc::downgrade(&b.material());
    client.reset().await;
    tokio::time::sleep(RETENTION - Duration::from_secs(5)).await;
    assert!(weak.upgrade().is_some());
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(weak.upgrade().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_misses_nothing_but_what_was_overtaken() {
    let b = Bench::new();
    let (_said, mut body) = by_hand(&b, "ROOTCA").await;
    let head = bytes(body.frame().await.unwrap().unwrap().into_data().unwrap());
    let mut last = None;
    for _ in 0..20 {
        last = Some(foreign_bundle(&b));
        b.source.take(last.clone().unwrap()).unwrap();
    }
    let rest = bytes(body.frame().await.unwrap().unwrap().into_data().unwrap());
    assert_eq!(head.len() + rest.len() - grpc::PREFIX, usize::try_from(u32::from_be_bytes(head[1..5].try_into().unwrap())).unwrap());
    // A second response follows, with the newest of twenty bundles.
    let mut message = Vec::new();
    for _ in 0..2 {
        message.extend(bytes(body.frame().await.unwrap().unwrap().into_data().unwrap()));
    }
    let reply = Reply::of_message(Variant::Sotw, &message[grpc::PREFIX..]);
    assert_eq!(reply.resources[0].content, Content::Bundle(last.unwrap().to_pem()));
    assert!(tokio::time::timeout(MINUTE, body.frame()).await.is_err());
}
