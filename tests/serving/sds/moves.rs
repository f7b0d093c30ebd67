//! Open streams when the labels of their pod change. The pod index follows the API server, and the socket is one of the pod's own.

use std::collections::BTreeMap;

use agent_kube::{fake::FakeApi, pod::picks::PROFILE};
use attest_kubernetes::{mount::MountAttestor, pods::Pods};
use serde_json::json;
use tonic::Code;
use workload_identity::{Match, Profile, Resolver, Rule};

use super::{
    bench::{Bench, SPREAD, Upstream, settle},
    client::{Client, FACES},
    fetch::fetch_names,
    *,
};

const UID: &str = "2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4e";
const VOLUME: &str = "sds";
const SETTLING: Duration = Duration::from_secs(62);
const STABLE: &str = "spiffe://cluster.local/ns/shop/sa/a";
const CANARY: &str = "spiffe://cluster.local/canary/a";

/// An agent whose callers are the pod `shop/cart-1`. Pods with the label `role: canary` get the profile `canary`.
struct World {
    api: FakeApi,
    bench: Bench,
    connection: Arc<Connection>,
}

impl World {
    async fn new(is_selectable: bool) -> Self {
        let (api, metrics) = (FakeApi::new(), agent_kube::Metrics::default());
        let mut pod = json!({"metadata": {"name": "cart-1", "namespace": "shop", "uid": UID, "labels": {"role": "stable"}}});
        pod["spec"] = json!({"nodeName": "n1", "serviceAccountName": "a"});
        if is_selectable {
            pod["metadata"]["labels"]["role"] = "canary".into();
            let csi = json!({"driver": "csi.sds-agent.io", "volumeAttributes": {PROFILE: "canary"}});
            pod["spec"]["volumes"] = json!([{"name": VOLUME, "csi": csi}]);
        }
        api.put("pods", pod);
        let pods = Pods::new(api.client(&metrics), "n1", metrics).with_picks_by("csi.sds-agent.io");
        tokio::spawn({
            let pods = pods.clone();
            async move { pods.run(CancellationToken::new()).await }
        });
        let bench = Bench::new();
        let attestor = MountAttestor::new(pods, UID.into(), VOLUME.into(), None, CancellationToken::new());
        let bench = bench.attesting_by(Arc::new(attestor));
        // No renewal is due near a change of the labels.
        let stable = Profile { lifetime: Duration::from_secs(30 * 86_400), ..(*bench.rules().default_profile).clone() };
        let profile = Profile { name: "canary".into(), spiffe_id: CANARY.into(), ..stable.clone() };
        let matches = Match { pod_labels: BTreeMap::from([("role".into(), "canary".into())]), ..Match::default() };
        let rule = Rule { matches, profile: Arc::new(profile), selectable: is_selectable };
        bench.reload(Resolver { rules: [rule].into(), default_profile: Arc::new(stable), ..bench.rules() });
        let connection = bench.connection();
        connection.caller().await.unwrap();
        Self { api, bench, connection }
    }

    /// Changes the label, and returns when the API server has sent the change.
    async fn label(&self, role: &str) {
        self.api.change("pods", "shop", "cart-1", |pod| pod["metadata"]["labels"]["role"] = role.into());
        settle().await;
    }

    fn certificate_of(&self, id: &str) -> Option<Arc<Svid>> {
        let entries = self.bench.service.store.snapshot();
        entries.iter().find(|entry| entry.identity.spiffe_id.as_str() == id).and_then(|entry| entry.current())
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_moves_to_the_profile_of_a_changed_label_and_back() {
    for (variant, name) in FACES.into_iter().flat_map(|variant| [(variant, "default"), (variant, STABLE)]) {
        let world = World::new(false).await;
        let mut client = Client::on(&world.bench, &world.connection, variant).await;
        client.ask(&[name]);
        assert!(client.accepted().await.carries(name, &world.certificate_of(STABLE).unwrap()));
        // The reissue window of the configuration is over.
        tokio::time::sleep(2 * SPREAD).await;
        for (role, id) in [("canary", CANARY), ("stable", STABLE)] {
            let (begun, before) = (Instant::now(), world.bench.orders());
            world.label(role).await;
            assert_eq!((world.bench.orders(), world.bench.leases()), (before, 1), "within the reissue window, and not at once");
            assert!(client.accepted().await.carries(name, &world.certificate_of(id).unwrap()), "{role}");
            assert!(begun.elapsed() <= SPREAD + SETTLING, "{role}: {:?}", begun.elapsed());
            assert_eq!(world.connection.caller().await.unwrap().identity.spiffe_id.as_str(), id);
        }
        assert_eq!(world.bench.service.metrics.unknown_certificate_names(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_label_that_is_changed_back_in_the_window_costs_no_order() {
    for variant in FACES {
        let world = World::new(false).await;
        let mut client = Client::on(&world.bench, &world.connection, variant).await;
        client.ask(&["default"]);
        client.accepted().await;
        let old = world.certificate_of(STABLE).unwrap();
        world.label("canary").await;
        world.label("stable").await;
        client.quiet(old.renew_at.duration_since(world.bench.clock.now()).unwrap() - Duration::from_secs(2)).await;
        assert_eq!(world.bench.orders(), 1);
        assert!(client.accepted().await.carries("default", &world.certificate_of(STABLE).unwrap()));
        tokio::time::sleep(SPREAD).await;
        assert!(world.certificate_of(CANARY).is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn a_fetch_on_the_same_connection_gets_the_identity_of_a_changed_label() {
    let world = World::new(false).await;
    let fetch = async || fetch_names(&world.bench, &world.connection, &["default"]).await;
    for (role, id) in [("stable", STABLE), ("canary", CANARY), ("stable", STABLE)] {
        world.label(role).await;
        assert!(fetch().await.unwrap().carries("default", &world.certificate_of(id).unwrap()), "{role}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_fetch_that_waits_while_a_label_changes_gets_the_new_identity() {
    let world = World::new(false).await;
    world.bench.upstream.send_replace(Upstream::Slow);
    let (answer, ()) = tokio::join!(fetch_names(&world.bench, &world.connection, &["default"]), async {
        settle().await;
        world.label("canary").await;
        world.bench.upstream.send_replace(Upstream::Up);
    });
    assert!(answer.unwrap().carries("default", &world.certificate_of(CANARY).unwrap()));
}

#[tokio::test(start_paused = true)]
async fn a_pick_that_the_label_no_longer_allows_ends_streams_and_fetches() {
    for variant in FACES {
        let world = World::new(true).await;
        let mut client = Client::on(&world.bench, &world.connection, variant).await;
        client.ask(&["default"]);
        assert!(client.accepted().await.carries("default", &world.certificate_of(CANARY).unwrap()));
        world.label("stable").await;
        let refused = (Code::PermissionDenied, "no identity is available to this caller".to_owned());
        assert_eq!(client.end().await, refused);
        assert_eq!(fetch_names(&world.bench, &world.connection, &["default"]).await.unwrap_err(), refused);
        assert_eq!(world.bench.leases(), 0);
        world.label("canary").await;
        let mut back = Client::on(&world.bench, &world.connection, variant).await;
        back.ask(&["default"]);
        back.accepted().await;
    }
}
