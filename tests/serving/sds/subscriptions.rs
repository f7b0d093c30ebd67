//! Requests, responses, ACKs and NACKs.

use tonic::Code;

use super::{
    bench::{Bench, Upstream, foreign_bundle, grown_bundle, settle},
    client::{Client, Content, FACES, Reply, framed},
    *,
};

const MINUTE: Duration = Duration::from_secs(60);

fn version_of(reply: &Reply, name: &str) -> String {
    reply.resources.iter().find(|r| r.name == name).expect("the name is answered").version.clone()
}

#[tokio::test(start_paused = true)]
async fn the_first_secret_is_held_until_it_is_issued() {
    for variant in FACES {
        let b = Bench::new();
        b.upstream.send_replace(Upstream::Slow);
        let mut client = Client::asking(&b, variant, &["default"]).await;
        client.quiet(10 * MINUTE).await;
        assert_eq!(b.orders(), 1);
        b.upstream.send_replace(Upstream::Up);
        let reply = client.accepted().await;
        assert_eq!(reply.names(), ["default"]);
        assert!(reply.carries("default", &b.material()));
        assert_eq!(reply.only_version(), b.material().version());
        client.quiet(MINUTE).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_bundle_is_pushed_when_it_comes_and_needs_no_certificate() {
    for variant in FACES {
        let b = Bench::without_bundle();
        let mut client = Client::asking(&b, variant, &["ROOTCA"]).await;
        client.quiet(MINUTE).await;
        let bundle = b.embedded.bundle().unwrap();
        b.source.take(bundle.clone()).unwrap();
        let reply = client.accepted().await;
        assert_eq!(reply.resources[0].content, Content::Bundle(bundle.to_pem()));
        assert_eq!(reply.only_version(), bundle.version().to_owned());
        client.quiet(MINUTE).await;
        assert_eq!((b.orders(), b.leases()), (0, 0), "a request for the bundle orders a certificate");
    }
}

#[tokio::test(start_paused = true)]
async fn every_rotation_is_pushed_once_before_the_old_certificate_ends() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::asking(&b, variant, &["default"]).await;
        client.accepted().await;
        for rotation in 1..=4 {
            let old = b.material();
            let reply = client.accepted().await;
            assert!(b.clock.now() < old.chain.validity.not_after);
            assert!(reply.carries("default", &b.material()));
            assert_ne!(reply.only_version(), old.version());
            assert_eq!(b.orders(), 1 + rotation, "one push for each certificate");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_sent_again_after_an_answer_of_either_kind() {
    for variant in FACES {
        for accept in [true, false] {
            let b = Bench::new();
            let mut client = Client::asking(&b, variant, &["default"]).await;
            let reply = client.reply().await;
            let answer = if accept { Client::ack } else { Client::nack };
            answer(&mut client, &reply);
            client.quiet(5 * MINUTE).await;
            let next = client.reply().await;
            assert_ne!(next.only_version(), reply.only_version(), "a client that rejected the older version gets the newer one");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_nack_with_a_new_name_returns_only_that_name() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::asking(&b, variant, &["default"]).await;
        let reply = client.reply().await;
        client.nack_and_add(&reply, "ROOTCA");
        assert_eq!(client.accepted().await.names(), ["ROOTCA"]);
        client.quiet(5 * MINUTE).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_rejected_certificate_leaves_no_hint_in_a_later_version() {
    let b = Bench::new();
    let mut client = Client::asking(&b, Variant::Sotw, &["ROOTCA", "default"]).await;
    let mut first = client.reply().await;
    while first.resources.len() < 2 {
        client.ack(&first);
        first = client.reply().await;
    }
    client.nack(&first);
    client.quiet(MINUTE).await;
    b.source.take(grown_bundle(&b)).unwrap();
    let second = client.accepted().await;
    assert_eq!(second.names(), ["ROOTCA"]);
    let version_prefix = version_prefix(b.material().version()).to_owned();
    assert!(
        !second.version.starts_with(&version_prefix),
        "the client does not have the certificate that it would claim: {}",
        second.version
    );
}

#[tokio::test(start_paused = true)]
async fn a_stale_nonce_is_ignored_except_for_delta_subscriptions() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::asking(&b, variant, &["ROOTCA"]).await;
        let first = client.reply().await;
        b.source.take(grown_bundle(&b)).unwrap();
        let second = client.reply().await;
        assert_ne!(first.nonce, second.nonce);
        client.nack_and_add(&first, "default");
        if variant == Variant::Sotw {
            client.quiet(MINUTE).await;
            assert_eq!(b.orders(), 0, "the names of a stale request are stale");
            // The client receives the newer response and acknowledges it.
            client.ack(&second);
        }
        assert!(client.accepted().await.carries("default", &b.material()));
        client.quiet(MINUTE).await;
    }
}

#[tokio::test(start_paused = true)]
async fn several_names_share_a_response_that_carries_the_held_version() {
    let b = Bench::new();
    let mut client = Client::asking(&b, Variant::Sotw, &["default", "spiffe://cluster.local/ns/shop/sa/a", "ROOTCA"]).await;
    let mut reply = client.accepted().await;
    while reply.resources.len() < 3 {
        reply = client.accepted().await;
    }
    let svid = b.material();
    assert!(reply.carries("default", &svid) && reply.carries("spiffe://cluster.local/ns/shop/sa/a", &svid));
    assert!(reply.version.starts_with(version_prefix(svid.version())) && reply.version != svid.version(), "{}", reply.version);
    client.quiet(MINUTE).await;

    let mut client = Client::asking(&b, Variant::Delta, &["default", "ROOTCA"]).await;
    let reply = client.accepted().await;
    assert_eq!(version_of(&reply, "default"), svid.version());
    assert_eq!(version_of(&reply, "ROOTCA"), b.embedded.bundle().unwrap().version().to_owned());
    client.quiet(MINUTE).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_known_does_not_wait_for_what_is_not() {
    for variant in FACES {
        let b = Bench::new();
        b.upstream.send_replace(Upstream::Slow);
        let mut client = Client::asking(&b, variant, &["default", "ROOTCA"]).await;
        assert_eq!(client.accepted().await.names(), ["ROOTCA"]);
        client.quiet(MINUTE).await;
        b.upstream.send_replace(Upstream::Up);
        let reply = client.accepted().await;
        match variant {
            Variant::Sotw => assert_eq!(reply.names(), ["default", "ROOTCA"], "all of the state, each name once"),
            Variant::Delta => assert_eq!(reply.names(), ["default"]),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_added_name_is_served_and_a_dropped_name_is_not() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::asking(&b, variant, &["ROOTCA"]).await;
        let first = client.accepted().await;
        client.ask(&["ROOTCA", "default"]);
        let mut reply = client.accepted().await;
        if reply.names() == ["ROOTCA"] {
            reply = client.accepted().await;
        }
        assert!(reply.carries("default", &b.material()));
        assert_eq!(b.leases(), 1);

        client.ask(&["ROOTCA"]);
        settle().await;
        assert_eq!(b.leases(), 0, "a dropped name holds no certificate");
        b.source.take(foreign_bundle(&b)).unwrap();
        let next = client.accepted().await;
        assert_eq!(next.names(), ["ROOTCA"]);
        assert_ne!(next.only_version(), first.only_version());
    }
}

#[tokio::test(start_paused = true)]
async fn unsubscribing_from_all_names_is_not_a_wildcard() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::asking(&b, variant, &["default"]).await;
        client.accepted().await;
        client.ask(&[]);
        client.quiet(120 * MINUTE).await;
        assert_eq!((b.leases(), b.orders()), (0, 1), "no stream needs a renewal");
        client.ask(&["default"]);
        client.accepted().await;
    }
}

#[tokio::test(start_paused = true)]
async fn names_that_are_not_ours_are_left_out_and_fail_nothing() {
    for variant in FACES {
        let b = Bench::new();
        let foreign = ["file-root:system", "spiffe://cluster.local/ns/shop/sa/other", "default"];
        let mut client = Client::asking(&b, variant, &foreign).await;
        assert_eq!(client.accepted().await.names(), ["default"]);
        client.ask(&["file-root:system", "ROOTCA"]);
        let mut reply = client.accepted().await;
        if variant == Variant::Sotw && reply.names() != ["ROOTCA"] {
            reply = client.accepted().await;
        }
        assert_eq!(reply.names(), ["ROOTCA"]);
        client.quiet(MINUTE).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_bundle_of_another_domain_is_served_by_its_name_when_it_is_there() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::asking(&b, variant, &["spiffe://partner.example", "spiffe://nobody.example"]).await;
        client.quiet(MINUTE).await;
        let bundle = foreign_bundle(&b);
        b.federated.take(bundle.clone()).unwrap();
        let reply = client.accepted().await;
        assert_eq!(reply.names(), ["spiffe://partner.example"]);
        assert_eq!(reply.resources[0].content, Content::Bundle(bundle.to_pem()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_wildcard_is_the_certificate_and_the_bundle() {
    for variant in FACES {
        for names in [&[][..], &["*"]] {
            let b = Bench::new();
            let mut client = Client::asking(&b, variant, names).await;
            let mut all = client.accepted().await.resources;
            while all.len() < 2 {
                all.extend(client.accepted().await.resources);
            }
            let mut names: Vec<_> = all.iter().map(|r| &*r.name).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names, ["ROOTCA", "default"]);
        }
    }
}

/// A request for `count` names that the agent does not provide.
fn typed(variant: Variant, type_url: &str, count: usize) -> Bytes {
    named(variant, type_url, (0..count).map(|n| format!("name-{n}")).collect())
}

fn named(variant: Variant, type_url: &str, names: Vec<String>) -> Bytes {
    let type_url = type_url.to_owned();
    match variant {
        Variant::Sotw => framed(&DiscoveryRequest { type_url, resource_names: names, ..Default::default() }),
        Variant::Delta => framed(&DeltaDiscoveryRequest { type_url, resource_names_subscribe: names, ..Default::default() }),
    }
}

#[tokio::test(start_paused = true)]
async fn another_type_of_resource_is_an_invalid_argument_and_none_is_ours() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::open(&b, variant).await;
        client.send(typed(variant, "type.googleapis.com/envoy.config.cluster.v3.Cluster", 1));
        let (code, message) = client.end().await;
        assert_eq!(code, Code::InvalidArgument);
        assert!(message.contains("envoy.config.cluster.v3.Cluster") && message.contains(TYPE_URL), "{message}");

        let mut client = Client::open(&b, variant).await;
        client.send(named(variant, "", vec!["ROOTCA".into()]));
        client.accepted().await;
        client.send(typed(variant, "type.googleapis.com/other", 0));
        assert_eq!(client.end().await.0, Code::InvalidArgument, "every request is looked at, not only the first");
    }
}

#[tokio::test(start_paused = true)]
async fn too_many_names_and_too_long_values_are_refused_with_the_limit() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::open(&b, variant).await;
        client.send(typed(variant, TYPE_URL, 4));
        client.quiet(MINUTE).await;
        client.send(typed(variant, TYPE_URL, 5));
        let (code, message) = client.end().await;
        assert_eq!((code, &*message), (Code::ResourceExhausted, "more than 4 resource names on one stream"));

        let mut client = Client::open(&b, variant).await;
        client.send(typed(variant, &"x".repeat(4096), 0));
        let (code, message) = client.end().await;
        assert_eq!((code, &*message), (Code::InvalidArgument, "type_url has 4096 bytes, and the maximum is 256"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_says_enough_and_no_more_of_what_the_client_said() {
    let b = Bench::new();
    let mut client = Client::open(&b, Variant::Sotw).await;
    client.send(typed(Variant::Sotw, &format!("evil\n{}", "x".repeat(3000)), 0));
    let (code, message) = client.end().await;
    assert_eq!(code, Code::InvalidArgument);
    assert!(message.len() < 500 && !message.contains('\n'), "{} bytes", message.len());
}

#[tokio::test(start_paused = true)]
async fn broken_messages_end_their_stream_only() {
    let b = Bench::new();
    let connection = b.connection();
    let mut good = Client::on(&b, &connection, Variant::Delta).await;
    good.ask(&["default"]);
    good.accepted().await;
    let mut broken = Client::on(&b, &connection, Variant::Sotw).await;
    broken.send([&grpc::prefix(3)[..], &[0xff; 3]].concat().into());
    assert_eq!(broken.end().await.0, Code::InvalidArgument);
    let mut cut = Client::on(&b, &connection, Variant::Sotw).await;
    cut.send(Bytes::from_static(&[0, 0, 0]));
    cut.close();
    assert_eq!(cut.end().await.0, Code::Internal);
    good.accepted().await;
}
