//! Open streams when the configuration changes: a stream changes to another identity without a close and without a gap.

use agent_runtime::telemetry::{self, Format, captured::Captured};
use issuance::rotation::reissue::{Reissue, Reissued, Which};
use tonic::Code;
use workload_identity::{Match, Pattern, Profile, Resolver, Rule};

use super::{
    bench::{Bench, RETENTION, SPREAD, Upstream, settle},
    client::{Client, FACES},
    *,
};

const MINUTE: Duration = Duration::from_secs(60);
/// Beyond the spread: the settling time of a certificate with a lifetime of one hour.
const SETTLING: Duration = Duration::from_secs(62);

/// The certificate of the entry with the issuer of the current rules.
fn current(b: &Bench) -> Option<Arc<Svid>> {
    let profile = b.rules().default_profile.fingerprint();
    let entries = b.service.store.snapshot();
    entries.iter().find(|entry| entry.identity.profile.fingerprint() == profile)?.current()
}

#[tokio::test(start_paused = true)]
async fn a_raised_epoch_replaces_the_certificate_within_the_window() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::asking(&b, variant, &["default"]).await;
        client.accepted().await;
        let old = b.material();
        let begun = Instant::now();
        b.raise_epoch();
        settle().await;
        assert_eq!(b.leases(), 1, "the new lease, and not the old one");
        assert_eq!(b.orders(), 1, "not at once");
        // A request with an additional name is answered with the existing secrets.
        client.ask(&["default", "ROOTCA"]);
        let reply = client.accepted().await;
        assert!(reply.names().contains(&"ROOTCA"));
        assert!(variant == Variant::Delta || reply.carries("default", &old));

        let reply = client.accepted().await;
        let new = current(&b).unwrap();
        assert!(reply.carries("default", &new) && new.chain.serial != old.chain.serial);
        assert!(begun.elapsed() <= SPREAD + SETTLING, "{:?}", begun.elapsed());
        assert!(begun.elapsed() > SETTLING / 2, "a certificate settles where there is another: {:?}", begun.elapsed());
        assert_eq!((b.orders(), b.leases()), (2, 1));
        // From here on the certificate is renewed as usual.
        let reply = client.accepted().await;
        assert!(reply.carries("default", &current(&b).unwrap()));
        assert_eq!(b.orders(), 3);
    }
}

#[tokio::test(start_paused = true)]
async fn the_old_certificate_is_served_while_the_new_issuer_is_down() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::asking(&b, variant, &["default"]).await;
        client.accepted().await;
        let old = b.material();
        b.upstream.send_replace(Upstream::Down);
        b.raise_epoch();
        let left = old.chain.validity.not_after.duration_since(b.clock.now()).unwrap();
        client.quiet(left - MINUTE).await;
        let tried = b.orders();
        assert!(tried > 2, "again and again: {tried}");
        b.upstream.send_replace(Upstream::Up);
        let reply = client.accepted().await;
        assert!(reply.carries("default", &current(&b).unwrap()));
        assert!(b.clock.now() < old.chain.validity.not_after, "never later than the end of the old one");
    }
}

#[tokio::test(start_paused = true)]
async fn another_schedule_reissues_nothing_and_counts_from_the_next_renewal_on() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::asking(&b, variant, &["default"]).await;
        client.accepted().await;
        let first = b.material();
        b.change_profile(|profile| (profile.renew_at, profile.jitter, profile.name) = (0.8, 0.0, "other".into()));
        client.quiet(first.renew_at.duration_since(b.clock.now()).unwrap() - Duration::from_secs(1)).await;
        assert_eq!((b.orders(), b.leases()), (1, 1));
        client.accepted().await;
        client.accepted().await;
        let svid = b.material();
        let share = svid.renew_at.duration_since(svid.chain.validity.not_before).unwrap().as_secs_f64() / 3600.0;
        assert!((0.79..0.81).contains(&share), "{share}");
        assert_eq!(&*svid.identity.profile.name, "other");
    }
}

#[tokio::test(start_paused = true)]
async fn going_back_before_the_new_certificate_was_ordered_costs_nothing() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::asking(&b, variant, &["default"]).await;
        client.accepted().await;
        let old = b.material();
        b.raise_epoch();
        settle().await;
        // This holds even if the old entry has been removed.
        b.change_profile(|profile| profile.epoch = 0);
        client.quiet(old.renew_at.duration_since(b.clock.now()).unwrap() - Duration::from_secs(2)).await;
        assert_eq!(b.orders(), 1);
        assert_ne!(client.accepted().await.only_version(), old.version());
        assert_eq!(b.orders(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn all_streams_of_an_identity_share_one_order_for_a_new_epoch() {
    for variant in FACES {
        let b = Bench::new();
        let mut clients = Vec::new();
        for _ in 0..20 {
            let mut client = Client::asking(&b, variant, &["default"]).await;
            client.accepted().await;
            clients.push(client);
        }
        b.raise_epoch();
        for client in &mut clients {
            assert!(client.accepted().await.carries("default", &current(&b).unwrap()));
        }
        assert_eq!((b.orders(), b.leases()), (2, 20));
    }
}

/// A profile that matches the caller's namespace `shop`.
fn shop(b: &Bench, change: impl FnOnce(&mut Profile), selectable: bool) -> Rule {
    let matches = Match { namespaces: vec![Pattern::parse("shop").unwrap()], ..Match::default() };
    let mut profile = (*b.rules().default_profile).clone();
    profile.name = "shop".into();
    change(&mut profile);
    Rule { matches, profile: Arc::new(profile), selectable }
}

#[tokio::test(start_paused = true)]
async fn a_new_spiffe_id_reaches_open_and_new_streams_of_a_connection() {
    for variant in FACES {
        let b = Bench::new();
        let connection = b.connection();
        let mut client = Client::on(&b, &connection, variant).await;
        client.ask(&["default"]);
        client.accepted().await;
        let other = "spiffe://cluster.local/shop/{serviceAccount}";
        let rule = shop(&b, |profile| profile.spiffe_id = other.into(), false);
        b.reload(Resolver { rules: [rule].into(), ..b.rules() });
        settle().await;
        // A client without a certificate does not wait for the window, and advances the order for the other stream too.
        let mut late = Client::on(&b, &connection, variant).await;
        late.ask(&["default"]);
        let reply = late.accepted().await;
        let of = |name: &str| b.service.store.snapshot().iter().find(|e| e.identity.spiffe_id.as_str() == name).and_then(|e| e.current());
        let new = of("spiffe://cluster.local/shop/a").unwrap();
        assert!(reply.carries("default", &new));
        assert!(client.accepted().await.carries("default", &new));
        assert_eq!(connection.caller().await.unwrap().identity.spiffe_id.as_str(), "spiffe://cluster.local/shop/a");
        assert_eq!(b.orders(), 2);
    }
}

/// The SPIFFE ID of the caller, and templates of others.
const ID: &str = "spiffe://cluster.local/ns/shop/sa/a";
const OTHERS: [&str; 2] = ["spiffe://cluster.local/shop/{serviceAccount}", "spiffe://cluster.local/{serviceAccount}"];

#[tokio::test(start_paused = true)]
async fn a_stream_that_asks_by_spiffe_id_gets_the_certificate_of_each_new_one() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::asking(&b, variant, &[ID]).await;
        assert!(client.accepted().await.carries(ID, &b.material()));
        for other in OTHERS {
            let begun = Instant::now();
            b.change_profile(|profile| profile.spiffe_id = other.into());
            let reply = client.accepted().await;
            let new = current(&b).unwrap();
            assert_eq!(new.spiffe_id().as_str(), other.replace("{serviceAccount}", "a"));
            assert!(reply.carries(ID, &new), "under the name that the client asked by");
            assert!(begun.elapsed() <= SPREAD + SETTLING, "{:?}", begun.elapsed());
        }
        // It is renewed under that name, and the client can ask by the new one.
        let reply = client.accepted().await;
        assert!(reply.carries(ID, &current(&b).unwrap()));
        client.ask(&[ID, "spiffe://cluster.local/a"]);
        assert!(client.accepted().await.carries("spiffe://cluster.local/a", &current(&b).unwrap()));
        assert_eq!((b.leases(), b.service.metrics.unknown_certificate_names()), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_former_spiffe_id_is_no_name_for_a_later_subscription() {
    for variant in FACES {
        let log = Captured::default();
        let (_guard, _filter) = telemetry::capture("info", Format::Json, log.clone()).unwrap();
        let b = Bench::new();
        let connection = b.connection();
        let mut client = Client::on(&b, &connection, variant).await;
        client.ask(&[ID]);
        client.accepted().await;
        let version = b.material().version().to_owned();
        b.change_profile(|profile| profile.spiffe_id = OTHERS[0].into());
        client.accepted().await;
        client.ask(&["ROOTCA"]);
        client.accepted().await;
        client.ask(&["ROOTCA", ID]);
        client.quiet(MINUTE).await;
        assert_eq!((b.leases(), b.service.metrics.unknown_certificate_names()), (0, 1));
        // The same for a client that holds a certificate of that name. Further requests on a stream count once.
        let mut back = Client::returning(&b, variant, &[ID], &version).await;
        back.quiet(MINUTE).await;
        back.ask(&[ID, "other"]);
        back.quiet(MINUTE).await;
        let mut late = Client::on(&b, &connection, variant).await;
        late.ask(&[ID]);
        late.quiet(MINUTE / 2).await;
        let mut again = Client::on(&b, &connection, variant).await;
        again.ask(&[ID]);
        again.quiet(MINUTE / 4).await;
        // With a certificate, or with a bundle alone, an unknown name is no trouble.
        Client::asking(&b, variant, &["default", ID]).await.accepted().await;
        Client::asking(&b, variant, &["ROOTCA"]).await.accepted().await;
        assert_eq!(b.service.metrics.unknown_certificate_names(), 4);
        let lines = log.lines("the stream gets no certificate");
        assert_eq!(lines.len(), 3, "each connection is a caller here, and gets one line a minute");
        assert_eq!((lines[0]["level"].as_str(), lines[0]["name"].as_str()), (Some("WARN"), Some(ID)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_keeps_no_key_of_a_certificate_that_it_does_not_watch() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::asking(&b, variant, &[ID, "ROOTCA"]).await;
        // The bundle comes first.
        while !client.accepted().await.names().contains(&ID) {}
        let old = Arc::downgrade(&b.material());
        b.change_profile(|profile| profile.spiffe_id = OTHERS[0].into());
        settle().await;
        client.ask(&["ROOTCA"]);
        client.quiet(2 * RETENTION).await;
        assert!(old.upgrade().is_none(), "the stream is the only one that could have kept it");
    }
}

/// A client cannot continue with a certificate that it has rejected, regardless of the response that contained it.
#[tokio::test(start_paused = true)]
async fn a_rejected_certificate_delays_no_order_for_another_identity() {
    for variant in FACES {
        for (rejects, orders) in [(true, 2), (false, 1)] {
            let b = Bench::new();
            let mut client = Client::asking(&b, variant, &["default"]).await;
            let reply = client.reply().await;
            if rejects {
                client.nack(&reply);
            } else {
                client.ack(&reply);
            }
            settle().await;
            let rule = shop(&b, |profile| profile.spiffe_id = "spiffe://cluster.local/shop/{serviceAccount}".into(), false);
            b.reload(Resolver { rules: [rule].into(), ..b.rules() });
            settle().await;
            assert_eq!(b.orders(), orders, "{variant:?}, rejected: {rejects}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_identity_that_was_taken_away_ends_its_streams_and_is_not_renewed() {
    for variant in FACES {
        let b = Bench::new();
        b.reload(Resolver { rules: [shop(&b, |_| {}, true)].into(), ..b.rules() });
        b.pick("shop");
        let connection = b.connection();
        let mut client = Client::on(&b, &connection, variant).await;
        client.ask(&["default"]);
        client.accepted().await;
        b.reload(Resolver { rules: [shop(&b, |_| {}, false)].into(), ..b.rules() });
        assert_eq!(client.end().await, (Code::PermissionDenied, "no identity is available to this caller".into()));
        let mut late = Client::on(&b, &connection, variant).await;
        late.ask(&["default"]);
        assert_eq!(late.end().await.0, Code::PermissionDenied);
        settle().await;
        let orders = b.orders();
        tokio::time::sleep(120 * MINUTE).await;
        assert_eq!((b.leases(), b.orders()), (0, orders));

        b.reload(Resolver { rules: [shop(&b, |_| {}, true)].into(), ..b.rules() });
        let mut back = Client::on(&b, &connection, variant).await;
        back.ask(&["default"]);
        back.accepted().await;
    }
}

#[tokio::test(start_paused = true)]
async fn certificates_held_across_a_restart_are_replaced_in_the_window() {
    for variant in FACES {
        // The epoch is raised while the agent is down, or while the client's version is held.
        for raised_before in [true, false] {
            let before = Bench::new();
            Client::asking(&before, variant, &["default"]).await.accepted().await;
            let svid = before.material();
            let b = before.restarted();
            b.source.take(b.embedded.bundle().unwrap()).unwrap();
            if raised_before {
                b.raise_epoch();
            }
            let begun = Instant::now();
            let mut client = Client::returning(&b, variant, &["default"], svid.version()).await;
            settle().await;
            if !raised_before {
                b.raise_epoch();
                settle().await;
            }
            assert_eq!(b.orders(), 0, "not at once");
            assert!(client.accepted().await.carries("default", &current(&b).unwrap()));
            assert!(begun.elapsed() <= SPREAD + SETTLING, "{:?}", begun.elapsed());
            assert_eq!(b.orders(), 1);
        }
    }
}

async fn reissue(b: &Bench, which: Which, over: Duration) -> Reissued {
    let (answer, told) = tokio::sync::oneshot::channel();
    b.reissue.send(Reissue { which, over, answer }).await.unwrap();
    told.await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn repeated_reissue_calls_replace_a_certificate_once() {
    for variant in FACES {
        let b = Bench::new();
        let mut client = Client::asking(&b, variant, &["default"]).await;
        let first = client.accepted().await.only_version().to_owned();
        let over = 2 * MINUTE;
        let begun = Instant::now();
        let all = Reissued { matched: 1, just_done: 0, retried: 0 };
        for _ in 0..5 {
            assert_eq!(reissue(&b, Which::default(), over).await, all);
        }
        assert_ne!(client.accepted().await.only_version(), first);
        assert!(begun.elapsed() <= over + SETTLING, "{:?}", begun.elapsed());
        assert_eq!(b.orders(), 2);
        let other = |id: &str| Which { spiffe_id: Some(id.into()), profile: None };
        assert_eq!(reissue(&b, other("spiffe://cluster.local/ns/shop/sa/b"), over).await.matched, 0);
        assert_eq!(reissue(&b, Which { profile: Some("nobody".into()), spiffe_id: None }, over).await.matched, 0);
        tokio::time::sleep(over).await;
        assert_eq!(reissue(&b, other("spiffe://cluster.local/ns/shop/sa/a"), Duration::ZERO).await, all);
        client.accepted().await;
        assert_eq!(b.orders(), 3);
        // A repetition right after the reissue changes nothing.
        assert_eq!(reissue(&b, Which::default(), Duration::ZERO).await, Reissued { matched: 1, just_done: 1, retried: 0 });
        client.quiet(MINUTE).await;
        assert_eq!(b.orders(), 3);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_to_reissue_is_about_what_clients_hold_too() {
    let before = Bench::new();
    Client::asking(&before, Variant::Delta, &["default"]).await.accepted().await;
    let svid = before.material();
    let b = before.restarted();
    b.source.take(b.embedded.bundle().unwrap()).unwrap();
    let mut client = Client::returning(&b, Variant::Delta, &["default"], svid.version()).await;
    settle().await;
    let begun = Instant::now();
    assert_eq!(reissue(&b, Which::default(), MINUTE).await.matched, 1);
    client.accepted().await;
    assert!(begun.elapsed() <= MINUTE + SETTLING, "{:?}", begun.elapsed());
    assert_eq!(b.orders(), 1);
}
