//! Wildcard subscriptions beside subscriptions to names.

use super::{
    bench::{Bench, foreign_bundle, grown_bundle, settle},
    client::{Client, FACES},
    *,
};

/// A bench whose certificate is issued.
async fn warm() -> Bench {
    let b = Bench::new();
    let mut client = Client::asking(&b, Variant::Delta, &["default"]).await;
    client.accepted().await;
    client.reset().await;
    settle().await;
    b
}

#[tokio::test(start_paused = true)]
async fn a_name_that_the_wildcard_covers_is_still_renewed_after_its_end() {
    for variant in FACES {
        let b = warm().await;
        let mut client = Client::asking(&b, variant, &["*", "default"]).await;
        assert_eq!(client.accepted().await.names(), ["default", "ROOTCA"]);
        client.ask(&["*"]);
        if variant == Variant::Delta {
            assert!(client.accepted().await.carries("default", &b.material()), "the client does not know whether it still has the name");
        }
        client.quiet(Duration::from_secs(60)).await;
        assert_eq!(b.leases(), 1);
        let reply = client.accepted().await;
        assert!(reply.carries("default", &b.material()) && b.orders() == 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_name_stays_when_a_wildcard_comes_and_goes() {
    for variant in FACES {
        let b = warm().await;
        let mut client = Client::asking(&b, variant, &["default"]).await;
        client.accepted().await;
        client.ask(&["default", "*"]);
        assert_eq!(client.accepted().await.names(), ["default", "ROOTCA"]);
        client.ask(&["default"]);
        settle().await;
        b.source.take(grown_bundle(&b)).unwrap();
        client.quiet(Duration::from_secs(60)).await;
        let reply = client.accepted().await;
        assert!(reply.names() == ["default"] && reply.carries("default", &b.material()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_name_beside_the_wildcard_is_reported_as_removed() {
    let b = warm().await;
    let mut client = Client::asking(&b, Variant::Delta, &["*", "spiffe://partner.example"]).await;
    assert_eq!(client.accepted().await.names(), ["default", "ROOTCA"]);
    client.ask(&["*"]);
    let reply = client.accepted().await;
    assert_eq!((reply.names().len(), &reply.removed[..]), (0, &["spiffe://partner.example".to_owned()][..]));
    b.federated.take(foreign_bundle(&b)).unwrap();
    client.quiet(Duration::from_secs(60)).await;
}

#[tokio::test(start_paused = true)]
async fn an_empty_list_in_an_ack_keeps_the_wildcard() {
    for variant in FACES {
        let b = warm().await;
        let mut client = Client::asking(&b, variant, &[]).await;
        assert_eq!(client.accepted().await.names(), ["default", "ROOTCA"]);
        let reply = client.accepted().await;
        assert!(reply.carries("default", &b.material()) && b.orders() == 2, "its renewal is pushed");
    }
}
