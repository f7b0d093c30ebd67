//! Clients that reconnect with the version of the certificate that they hold: none is issued early, and invalid versions are ignored.

use agent_runtime::clock;
use workload_identity::{Resolver, TrustDomain};

use super::{
    bench::{Bench, SPREAD, foreign_bundle, settle},
    client::{Client, FACES},
    *,
};

const MINUTE: Duration = Duration::from_secs(60);

/// A restarted agent with its bundle, and the certificate that a client got before.
async fn restarted() -> (Bench, Arc<Svid>) {
    let (b, svid) = restarted_without_bundle().await;
    b.source.take(b.embedded.bundle().unwrap()).unwrap();
    (b, svid)
}

async fn restarted_without_bundle() -> (Bench, Arc<Svid>) {
    let before = Bench::new();
    let mut client = Client::asking(&before, Variant::Delta, &["default"]).await;
    client.accepted().await;
    let svid = before.material();
    (before.restarted(), svid)
}

fn renew_at(svid: &Svid) -> SystemTime {
    // The version has a resolution of one second.
    clock::from_unix_seconds(i64::try_from(clock::unix_seconds(svid.renew_at)).unwrap())
}

#[tokio::test(start_paused = true)]
async fn a_returning_client_gets_the_next_certificate_when_it_is_due() {
    for variant in FACES {
        let (b, svid) = restarted().await;
        let mut client = Client::returning(&b, variant, &["default"], svid.version()).await;
        let due = renew_at(&svid).duration_since(b.clock.now()).unwrap();
        client.quiet(due - Duration::from_secs(1)).await;
        assert_eq!(b.orders(), 0);
        let reply = client.accepted().await;
        assert!(reply.carries("default", &b.material()));
        assert!(b.clock.now() >= renew_at(&svid) && b.clock.now() < svid.chain.validity.not_after);
        assert_eq!(b.orders(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_version_of_the_former_release_waits_for_its_renewal() {
    for variant in FACES {
        let (b, svid) = restarted().await;
        let (not_after, renew_at) = (clock::unix_seconds(svid.chain.validity.not_after), clock::unix_seconds(svid.renew_at));
        let former = format!("{not_after}-{renew_at}-{}-fedcba9876543210", svid.authority);
        let mut client = Client::returning(&b, variant, &["default"], &former).await;
        let due = clock::from_unix_seconds(renew_at.cast_signed()).duration_since(b.clock.now()).unwrap();
        client.quiet(due - Duration::from_secs(1)).await;
        assert_eq!(b.orders(), 0);
        assert!(client.accepted().await.only_version().contains("-v2."), "the next version has the new format");
        assert_eq!(b.orders(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn another_trust_domain_replaces_every_certificate_in_the_window() {
    for variant in FACES {
        let (b, svid) = restarted().await;
        b.reload(Resolver { trust_domain: TrustDomain::new("other.example").unwrap(), ..b.rules() });
        let begun = Instant::now();
        let mut client = Client::returning(&b, variant, &["default"], svid.version()).await;
        settle().await;
        assert_eq!(b.orders(), 0, "not at once");
        assert!(client.accepted().await.carries("default", &b.material()));
        assert_eq!(b.material().spiffe_id().as_str(), "spiffe://other.example/ns/shop/sa/a");
        assert!(begun.elapsed() <= SPREAD + Duration::from_secs(62), "{:?}", begun.elapsed());
        assert_eq!(b.orders(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn the_bundle_is_sent_at_once_while_the_certificate_is_held() {
    let (b, svid) = restarted().await;
    let version_prefix = version_prefix(svid.version()).to_owned();
    let combined = format!("{version_prefix}-0000000000000000");
    let mut client = Client::returning(&b, Variant::Sotw, &["default", "ROOTCA"], &combined).await;
    let reply = client.accepted().await;
    assert_eq!(reply.names(), ["ROOTCA"]);
    assert!(reply.version.starts_with(&format!("{version_prefix}-")), "{}", reply.version);
    client.quiet(MINUTE).await;
    assert_eq!(b.orders(), 0);

    // The client can reconnect with that version again.
    let again = b.restarted();
    again.source.take(again.embedded.bundle().unwrap()).unwrap();
    let mut client = Client::returning(&again, Variant::Sotw, &["default", "ROOTCA"], &reply.version).await;
    assert_eq!(client.accepted().await.version, reply.version);
    client.quiet(MINUTE).await;
    assert_eq!(again.orders(), 0);

    let (b, svid) = restarted().await;
    let mut client = Client::returning(&b, Variant::Delta, &["default", "ROOTCA"], svid.version()).await;
    assert_eq!(client.accepted().await.names(), ["ROOTCA"]);
    client.quiet(MINUTE).await;
    assert_eq!(b.orders(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_hint_that_is_odd_foreign_or_over_is_no_hint() {
    let (_, svid) = restarted().await;
    let now = clock::unix_seconds(svid.renew_at) - 1000;
    let authority = &svid.authority;
    let tail = "fedcba9876543210";
    for version in [
        "v1".to_owned(),
        svid.version().to_uppercase(),
        format!("{}-{}-0123456789abcdef-{tail}", now + 3600, now + 1800),
        format!("{}-{}-{authority}-{tail}", now + 30 * 86_400, now + 1800),
        format!("{}-{}-{authority}-{tail}", 1_600_000_000, 1_500_000_000),
    ] {
        for variant in FACES {
            let (b, _) = restarted().await;
            let mut client = Client::returning(&b, variant, &["default"], &version).await;
            let begun = Instant::now();
            client.accepted().await;
            assert!(begun.elapsed() < Duration::from_secs(1), "{version}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn another_profile_makes_every_hint_foreign() {
    let (b, svid) = restarted().await;
    b.change_profile(|profile| profile.lifetime *= 2);
    let mut client = Client::returning(&b, Variant::Delta, &["default"], svid.version()).await;
    let begun = Instant::now();
    client.accepted().await;
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn another_clients_certificate_replaces_a_held_one_after_settling() {
    for variant in FACES {
        let (b, svid) = restarted().await;
        let mut held = Client::returning(&b, variant, &["default"], svid.version()).await;
        held.quiet(MINUTE).await;
        let mut other = Client::asking(&b, variant, &["default"]).await;
        let begun = Instant::now();
        assert!(other.accepted().await.carries("default", &b.material()));
        assert!(begun.elapsed() < Duration::from_secs(1), "a client without a certificate does not wait");

        let settled_at = b.material().settled_at;
        assert!(settled_at > b.clock.now());
        let reply = held.accepted().await;
        assert!(b.clock.now() >= settled_at);
        assert!(reply.carries("default", &b.material()));
        assert_eq!(b.orders(), 1);
        held.quiet(MINUTE).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_later_bundle_without_the_reported_authority_triggers_an_order() {
    for variant in FACES {
        let (b, svid) = restarted_without_bundle().await;
        let mut client = Client::returning(&b, variant, &["default"], svid.version()).await;
        client.quiet(MINUTE).await;
        assert_eq!(b.orders(), 0, "without a bundle the client's version is accepted");
        b.source.take(foreign_bundle(&b)).unwrap();
        settle().await;
        assert!(b.orders() >= 1);
        // A certificate of this authority is valid once its root is trusted again.
        b.source.take(b.embedded.bundle().unwrap()).unwrap();
        assert!(client.accepted().await.carries("default", &b.material()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_hint_that_is_overtaken_by_the_clock_is_a_demand() {
    let (b, svid) = restarted().await;
    let mut client = Client::returning(&b, Variant::Delta, &["default"], svid.version()).await;
    client.quiet(MINUTE).await;
    b.clock.step(7200);
    let begun = Instant::now();
    client.accepted().await;
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_version_under_two_names_tells_nothing_about_either() {
    let (b, svid) = restarted().await;
    let names = ["default", "spiffe://cluster.local/ns/shop/sa/a"];
    let mut client = Client::returning(&b, Variant::Sotw, &names, svid.version()).await;
    let begun = Instant::now();
    assert_eq!(client.accepted().await.names(), names);
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn who_comes_back_to_the_same_agent_with_the_same_version_is_sent_nothing() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::asking(&b, variant, &["default"]).await;
        let version = client.accepted().await.only_version().to_owned();
        client.reset().await;
        let mut client = Client::returning(&b, variant, &["default"], &version).await;
        client.quiet(5 * MINUTE).await;
        assert_ne!(client.accepted().await.only_version(), version);
    }
}
