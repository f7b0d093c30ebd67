use std::time::{Duration, UNIX_EPOCH};

use agent_runtime::clock::TestClock;
use issuance::issuer::{Issuer as _, Order, Progress, embedded::Embedded};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, text},
    registry::Registry,
};
use sds_server::{material::Svid, store::Lease};
use workload_identity::{Identity, samples::identity};

use super::*;

/// Registers the gauges with one certificate of a service account, for the metrics reference.
pub(crate) fn sample(registry: &mut Registry) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let node = Node::new(registry);
        let lease = node.lease("a", Demand::Now);
        node.publish("a").await;
        registry.register_collector(Box::new(Kept { _lease: lease }));
    });
}

/// Keeps a certificate in use as long as the registry exists.
#[derive(Debug)]
struct Kept {
    _lease: Lease,
}

impl Collector for Kept {
    fn encode(&self, _encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        Ok(())
    }
}

/// A plan with one profile for all identities.
fn plan() -> watch::Receiver<Arc<Plan>> {
    let plan = Plan::new(std::collections::BTreeMap::new(), [identity("a").profile.clone()], Duration::ZERO);
    watch::channel(Arc::new(plan)).1
}

/// A store, with certificates of one hour whose renewal is planned after half an hour.
struct Node {
    clock: TestClock,
    store: Arc<Store>,
}

impl Node {
    fn new(registry: &mut Registry) -> Self {
        let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        let (store, _events) = Store::new();
        let inventory = Inventory::new(store.clone(), plan(), Arc::new(clock.clone())).per_workload(true);
        registry.register_collector(Box::new(inventory));
        Self { clock, store }
    }

    fn lease(&self, who: &str, demand: Demand) -> Lease {
        self.store.lease(&identity(who), demand, None)
    }

    fn entry(&self, id: &Arc<Identity>) -> Arc<Entry> {
        self.store.snapshot().into_iter().find(|entry| entry.identity == *id).unwrap()
    }

    async fn publish(&self, who: &str) {
        let id = identity(who);
        let (progress, _stage) = Progress::new();
        let order = Order { identity: id.clone(), evidence: None, progress };
        let issued = Embedded::new("cluster.local", Arc::new(self.clock.clone())).unwrap().issue(order).await.unwrap();
        let chain = issued.chain;
        let renew_at = self.clock.now() + Duration::from_secs(1800);
        let svid = Svid::new(id.clone(), chain, issued.key, renew_at, self.clock.now(), String::new());
        self.entry(&id).publish(Arc::new(svid));
    }
}

fn page(registry: &Registry) -> String {
    let mut page = String::new();
    text::encode(&mut page, registry).unwrap();
    page
}

fn overdue(registry: &Registry) -> f64 {
    let page = page(registry);
    let value = page.lines().find_map(|line| line.strip_prefix("certificate_renewal_overdue_ratio "));
    value.unwrap().parse().unwrap()
}

#[tokio::test(start_paused = true)]
async fn what_nobody_subscribes_to_is_idle_and_alarms_nobody() {
    let mut registry = Registry::default();
    let node = Node::new(&mut registry);
    let count = |state: &str| {
        let page = page(&registry);
        (page.contains(&format!("certificates{{state=\"{state}\"}} 1")), page.contains("\ncertificate_earliest_expiration"))
    };

    let lease = node.lease("a", Demand::Now);
    assert_eq!(count("pending"), (true, false));
    node.publish("a").await;
    assert_eq!(count("valid"), (true, true));
    tokio::time::advance(Duration::from_secs(2000)).await;
    assert_eq!(count("overdue"), (true, true));
    drop(lease);
    assert_eq!(count("idle"), (true, false), "it has no subscriber, so it is not renewed");
    tokio::time::advance(Duration::from_secs(2000)).await;
    assert_eq!((count("idle"), overdue(&registry)), ((true, false), 0.0));
    let _lease = node.lease("a", Demand::Now);
    assert_eq!(count("expired"), (true, true));
}

/// The embedded issuer backdates `notBefore`, so the test uses the window from the planned renewal on and not the lifetime of one hour.
#[tokio::test(start_paused = true)]
async fn a_certificate_is_overdue_by_the_share_of_its_own_time() {
    let mut registry = Registry::default();
    let node = Node::new(&mut registry);
    assert_eq!(overdue(&registry), 0.0, "there is no certificate");
    let _a = node.lease("a", Demand::Now);
    assert_eq!(overdue(&registry), 0.0, "the certificate is not issued yet");
    node.publish("a").await;
    let window = {
        let svid = node.entry(&identity("a")).current().unwrap();
        svid.chain.validity.not_after.duration_since(svid.renew_at).unwrap()
    };
    tokio::time::advance(Duration::from_secs(1800)).await;
    assert_eq!(overdue(&registry), 0.0, "the renewal is due now");
    tokio::time::advance(window / 4).await;
    assert!((overdue(&registry) - 0.25).abs() < 1e-3, "{}", overdue(&registry));

    // The largest share of all certificates counts, also that of one that a client holds from before a restart.
    let (now, half) = (node.clock.now(), Duration::from_secs(50));
    let _b = node.lease("b", Demand::Held { renew_at: now - half, not_after: now + half });
    assert!((overdue(&registry) - 0.5).abs() < 1e-3, "{}", overdue(&registry));
    assert!(page(&registry).contains("certificates{state=\"held_by_client\"} 1"));
    tokio::time::advance(half * 2).await;
    assert_eq!(overdue(&registry), 1.0);
    assert!(page(&registry).contains("certificates{state=\"expired\"} 1"), "its client holds nothing that is valid");
}

#[tokio::test(start_paused = true)]
async fn a_workloads_series_come_and_go_with_its_certificate() {
    let mut registry = Registry::default();
    let node = Node::new(&mut registry);
    let series = |name: &str, who: &str| format!("\n{name}{{namespace=\"shop\",service_account=\"{who}\"}} ");
    let names = ["certificate_expiration_timestamp_seconds", "certificate_renewal_timestamp_seconds"];
    let shown = |who: &str| names.map(|name| page(&registry).contains(&series(name, who)));

    let (a, _b) = (node.lease("a", Demand::Now), node.lease("b", Demand::Now));
    assert_eq!(shown("a"), [false; 2], "no certificate is issued yet");
    node.publish("a").await;
    node.publish("b").await;
    assert_eq!((shown("a"), shown("b")), ([true; 2], [true; 2]));
    // A second certificate of the same account: the earlier end counts.
    let other = Arc::new(Identity { dns_names: [].into(), ..(*identity("a")).clone() });
    let (renew_at, not_after) = (UNIX_EPOCH + Duration::from_secs(5), UNIX_EPOCH + Duration::from_secs(7));
    let second = node.store.lease(&other, Demand::Held { renew_at, not_after }, None);
    for (name, value) in names.iter().zip(["7", "5"]) {
        let line = format!("{}{value}\n", series(name, "a"));
        assert!(page(&registry).contains(&line), "{line}");
    }
    drop(second);

    let entry = node.entry(&identity("a"));
    drop(a);
    assert!(node.store.forget(&entry, Duration::ZERO));
    assert_eq!((shown("a"), shown("b")), ([false; 2], [true; 2]));
}

#[tokio::test(start_paused = true)]
async fn without_being_told_no_series_names_a_workload() {
    let (store, _events) = Store::new();
    let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_700_000_000));
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Inventory::new(store.clone(), plan(), Arc::new(clock.clone()))));
    let node = Node { clock, store };
    let _lease = node.lease("a", Demand::Now);
    node.publish("a").await;
    let page = page(&registry);
    assert!(page.contains("certificates{state=\"valid\"} 1"));
    assert!(!page.contains("service_account") && !page.contains("shop"), "{page}");
}

#[tokio::test(start_paused = true)]
async fn a_row_has_every_field_and_says_why_it_waits() {
    let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_700_000_000));
    let (store, _events) = Store::new();
    let inventory = Inventory::new(store.clone(), plan(), Arc::new(clock.clone()));
    let pod = workload_identity::PodRef { namespace: "shop".into(), name: "cart-0".into(), uid: "u".into() };
    let _leases = [Some(pod.clone()), Some(pod), None].map(|pod| store.lease(&identity("a"), Demand::Now, pod));
    let row = || inventory.rows().remove(0);
    let fields = [
        "dns_names",
        "fingerprint_sha256",
        "issuer",
        "last_error",
        "next_attempt",
        "not_after",
        "not_before",
        "pods",
        "profile",
        "renew_at",
        "request",
        "serial",
        "spiffe_id",
        "state",
        "subscribers",
        "waits_for",
    ];
    assert_eq!(row().as_object().unwrap().keys().collect::<Vec<_>>(), fields);
    assert_eq!((&row()["state"], &row()["subscribers"], &row()["pods"]), (&json!("pending"), &json!(3), &json!(["shop/cart-0"])));
    let why = || row()["waits_for"].as_str().unwrap_or_default().to_owned();
    assert!(why().starts_with("its turn: "), "{}", row());

    let entry = store.snapshot().remove(0);
    entry.set_status(|status| status.request = Some("r".into()));
    assert_eq!(why(), "the issuer's answer");
    entry.set_status(|status| status.waits_for = Some("an approver".into()));
    assert_eq!(why(), "an approver");
    let next = clock.now() + Duration::from_secs(9);
    entry.set_status(|status| *status = Status { next_attempt: Some(next), last_error: Some("no".into()), ..Status::default() });
    assert!(why().starts_with("the next attempt: "), "{}", row());
}
