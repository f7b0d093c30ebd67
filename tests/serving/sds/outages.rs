//! A stepped clock and an unavailable upstream: valid certificates are served, expired ones are not, and no stream fails.

use super::{
    bench::{Bench, Upstream, settle},
    client::{Client, FACES},
    *,
};

const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test(start_paused = true)]
async fn a_forward_clock_step_withholds_a_certificate_until_it_is_undone() {
    for variant in FACES {
        let b = Bench::new();
        let mut before = Client::asking(&b, variant, &["default"]).await;
        before.accepted().await;
        let svid = b.material();
        b.upstream.send_replace(Upstream::Slow);
        b.clock.step(86_400);
        let mut during = Client::asking(&b, variant, &["default", "ROOTCA"]).await;
        assert_eq!(during.accepted().await.names(), ["ROOTCA"], "an expired identity is never served");
        during.quiet(10 * MINUTE).await;
        b.clock.step(-86_400);
        let reply = during.accepted().await;
        assert!(reply.carries("default", &svid));
        before.quiet(Duration::from_secs(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_valid_certificate_is_served_while_the_upstream_is_down() {
    for variant in FACES {
        let b = Bench::new();
        let mut old = Client::asking(&b, variant, &["default"]).await;
        old.accepted().await;
        let svid = b.material();
        b.upstream.send_replace(Upstream::Down);
        old.quiet(50 * MINUTE).await;
        assert!(b.orders() > 1, "a renewal was tried");

        let mut new = Client::asking(&b, variant, &["default"]).await;
        assert!(new.accepted().await.carries("default", &svid), "what is good is served while its renewal fails");
        old.quiet(20 * MINUTE).await;
        assert!(b.clock.now() > svid.chain.validity.not_after);
        let mut late = Client::asking(&b, variant, &["default"]).await;
        late.quiet(20 * MINUTE).await;

        b.upstream.send_replace(Upstream::Up);
        for client in [&mut old, &mut new, &mut late] {
            assert!(client.accepted().await.carries("default", &b.material()));
        }
        assert!(b.material().chain.validity.is_live(b.clock.now()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_who_is_not_known_yet_waits_in_the_stream() {
    for variant in FACES {
        let b = Bench::new();
        b.know_nobody();
        let connection = b.connection();
        let mut first = Client::on(&b, &connection, variant).await;
        let mut second = Client::on(&b, &connection, variant).await;
        first.ask(&["default"]);
        second.ask(&["ROOTCA"]);
        first.quiet(60 * MINUTE).await;
        // The stream that started the attestation ends; the other stream continues with it.
        first.reset().await;
        settle().await;
        b.know_everybody();
        assert_eq!(second.accepted().await.names(), ["ROOTCA"]);
    }
}
