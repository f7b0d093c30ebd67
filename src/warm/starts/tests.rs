//! Tests with pods of a scripted API server, a real rotation with an in-memory issuer, and paused time.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, SystemTime},
};

use agent_kube::fake::FakeApi;
use agent_runtime::clock::{self, TestClock};
use futures::future::BoxFuture;
use issuance::{
    issuer::{self, Issued, Issuer, Order, embedded::Embedded},
    rotation::{self, plan::Plan},
};
use sds_server::{
    store::Store,
    trust::{self, Trust},
};
use serde_json::{Value, json};
use tokio::{sync::watch, time::sleep};

use super::*;
use crate::{
    config::Config,
    warm::{
        LEASE_HANDOVER,
        metrics::{Ended, Metrics},
    },
};

const MINUTE: Duration = Duration::from_secs(60);
const MOUNT: &str = "/run/sds-agent";

/// An issuer that counts orders, and completes them only if the test says so.
#[derive(Debug)]
struct Counting {
    embedded: Embedded,
    orders: Arc<AtomicUsize>,
    answers: bool,
}

impl Issuer for Counting {
    fn issue(&self, order: Order) -> BoxFuture<'static, Result<Issued, issuer::Error>> {
        self.orders.fetch_add(1, Ordering::SeqCst);
        if self.answers { Box::pin(self.embedded.issue(order)) } else { Box::pin(std::future::pending()) }
    }
}

struct World {
    api: FakeApi,
    pods: Pods,
    store: Arc<Store>,
    orders: Arc<AtomicUsize>,
    metrics: Metrics,
    clock: TestClock,
    drain: CancellationToken,
}

impl World {
    /// Starts an agent against `api`. Pods may be there already or follow.
    async fn start(api: FakeApi, warm_up: &str) -> Self {
        Self::with_issuer(api, warm_up, true).await
    }

    async fn with_issuer(api: FakeApi, warm_up: &str, answers: bool) -> Self {
        let text = format!(
            "issuer: {{ certManager: {{ issuerRef: {{ name: mesh-ca, kind: ClusterIssuer }} }} }}\n\
             certificate: {{ lifetime: 60s }}\nwarmUp: {{ enabled: true, {warm_up} }}\n"
        );
        let config = Config::parse(&text, &|name| (name == "NODE_NAME").then(|| "n1".to_owned())).unwrap().config;
        let clock = TestClock::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        let (store, events) = Store::new();
        let (_, resolver) = watch::channel(Arc::new(config.resolver()));
        let (orders, drain) = (Arc::new(AtomicUsize::new(0)), CancellationToken::new());
        let embedded = Embedded::new("cluster.local", Arc::new(clock.clone())).unwrap();
        let trust = Trust::new(trust::Metrics::default());
        trust.source(None, "test").take(embedded.bundle().unwrap()).unwrap();
        let counting: Arc<dyn Issuer> = Arc::new(Counting { embedded, orders: orders.clone(), answers });
        let issuers = BTreeMap::from([(config.default_profile.issuer.clone(), counting)]);
        let plan = Plan::new(issuers, [config.default_profile.clone()], MINUTE);
        tokio::spawn(rotation::run(
            rotation::Parts {
                store: store.clone(),
                events,
                plan: watch::channel(Arc::new(plan)).1,
                reissues: tokio::sync::mpsc::channel(1).1,
                trust: trust.subscribe(),
                authorities: None,
                await_bundle: false,
                clock: Arc::new(clock.clone()),
                identity_users: None,
                observer: None,
                metrics: rotation::metrics::Metrics::default(),
            },
            drain.clone(),
        ));
        let kube_metrics = agent_kube::Metrics::default();
        let pods = Pods::new(api.client(&kube_metrics), "n1", kube_metrics);
        let metrics = Metrics::default();
        let warmer = Prefetcher { store: store.clone(), resolver, metrics: metrics.clone(), lines: Arc::default() };
        let rule = Rule::new(config.warm_up.as_ref().unwrap(), &config.shared_socket.unwrap().path);
        tokio::spawn(Starts::new(warmer, rule, Arc::new(clock.clone()), &pods).run(drain.clone()));
        let (running, ending) = (pods.clone(), drain.clone());
        tokio::spawn(async move { running.run(ending).await });
        pods.synced().wait_for(|synced| *synced).await.unwrap();
        sleep(Duration::from_secs(1)).await;
        Self { api, pods, store, orders, metrics, clock, drain }
    }

    fn orders(&self) -> usize {
        self.orders.load(Ordering::SeqCst)
    }

    /// The service accounts for which a lease is held.
    fn held(&self) -> Vec<String> {
        let entries = self.store.snapshot().into_iter().filter(|entry| entry.is_leased());
        let mut names: Vec<_> = entries.map(|entry| entry.identity.to_string().rsplit_once('/').unwrap().1.to_owned()).collect();
        names.sort_unstable();
        names
    }

    fn ended(&self) -> [u64; 3] {
        [Ended::called, Ended::unused, Ended::gone].map(|ended| self.metrics.count(ended))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.drain.cancel();
    }
}

/// A pod whose containers have not started, and which mounts the socket's directory. Its service account has the name of the pod.
fn starting(name: &str) -> Value {
    let volumes = json!([{"name": "sds", "hostPath": {"path": MOUNT}}]);
    json!({
        "metadata": {"name": name, "namespace": "shop", "uid": format!("u-{name}"), "labels": {"app": name}},
        "spec": {"nodeName": "n1", "serviceAccountName": name, "volumes": volumes}, "status": {"phase": "Pending"},
    })
}

fn running(name: &str) -> Value {
    let mut pod = starting(name);
    pod["status"] = json!({"phase": "Running", "containerStatuses": [{"name": "c", "containerID": "containerd://1"}]});
    pod
}

#[tokio::test(start_paused = true)]
async fn a_starting_pod_is_warmed_up_until_its_first_call() {
    let api = FakeApi::new();
    api.put("pods", running("before"));
    let world = World::start(api, "").await;
    assert_eq!((world.orders(), world.held()), (0, vec![]));

    world.api.put("pods", starting("cart"));
    sleep(Duration::from_secs(1)).await;
    assert_eq!((world.orders(), world.held()), (1, vec!["cart".to_owned()]));
    let entry = world.store.snapshot().remove(0);
    assert!(entry.current().is_some(), "the certificate is there before the first call");
    assert_eq!(entry.evidence(None).unwrap().to_string(), "shop/cart");

    // The pod runs, which is not a second start, and calls.
    world.api.put("pods", running("cart"));
    sleep(Duration::from_secs(1)).await;
    world.pods.wait_for("u-cart").await.unwrap().first_call.cancel();
    sleep(LEASE_HANDOVER / 2).await;
    assert_eq!(world.held(), ["cart"], "the lease is held until the caller has its own");
    sleep(LEASE_HANDOVER).await;
    assert_eq!((world.held(), world.ended()), (vec![], [1, 0, 0]));
}

#[tokio::test(start_paused = true)]
async fn a_new_list_warms_up_who_starts_and_nobody_else() {
    let world = World::start(FakeApi::new(), "").await;
    world.api.put("pods", starting("cart"));
    sleep(Duration::from_secs(1)).await;
    world.pods.wait_for("u-cart").await.unwrap().first_call.cancel();
    sleep(2 * LEASE_HANDOVER).await;
    assert_eq!(world.held(), [""; 0]);

    // While the watch is down, pods start and run, and one has not started yet; `cart` is unchanged.
    world.api.fail("watch", "pods", agent_kube::fake::Fault::Refuse, 3);
    world.api.cut_watches(true);
    for pod in [running("came-and-runs"), starting("starts")] {
        world.api.put("pods", pod);
    }
    let mut sidecar = starting("sidecar-runs");
    sidecar["status"]["initContainerStatuses"] = json!([{"name": "istio-proxy", "containerID": "containerd://2"}]);
    world.api.put("pods", sidecar);
    world.api.forget_history();
    world.api.until("a new list", |api| (api.count("list", "pods") >= 2).then_some(())).await;
    sleep(Duration::from_secs(5)).await;
    assert_eq!(world.held(), ["starts"]);
    // A pod that is missing in one list and present in the next is not a new pod.
    world.api.forget_history();
    world.api.cut_watches(true);
    world.api.until("one more", |api| (api.count("list", "pods") >= 3).then_some(())).await;
    sleep(Duration::from_secs(5)).await;
    assert_eq!(world.held(), ["starts"]);
    assert_eq!(world.ended(), [1, 0, 0]);
}

/// The agent is restarted while pods start. It warms up pods that have not started, except one that has been stuck for over 10 min.
#[tokio::test(start_paused = true)]
async fn a_restart_warms_up_starting_pods_until_their_timeout() {
    let api = FakeApi::new();
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    for (name, ago) in [("new", 120), ("stuck", 700)] {
        let mut pod = starting(name);
        pod["status"]["startTime"] = json!(clock::rfc3339(now - Duration::from_secs(ago)));
        api.put("pods", pod);
    }
    let mut leaves = starting("leaves");
    leaves["metadata"]["deletionTimestamp"] = json!(clock::rfc3339(now));
    api.put("pods", leaves);
    let world = World::start(api, "").await;
    assert_eq!(world.held(), ["new"]);
    sleep(FIRST_CALL_TIMEOUT - 2 * MINUTE).await;
    assert_eq!((world.held(), world.ended()), (vec![], [0, 1, 0]));
    assert!(clock::unix_seconds(world.clock.now()) < 1_800_000_000 + 600);
}

#[tokio::test(start_paused = true)]
async fn who_never_calls_is_renewed_for_a_while_and_then_no_more() {
    let world = World::start(FakeApi::new(), "").await;
    world.api.put("pods", starting("cart"));
    sleep(FIRST_CALL_TIMEOUT - MINUTE).await;
    assert_eq!(world.held(), ["cart"]);
    let renewed = world.orders();
    assert!(renewed > 9, "{renewed} orders of certificates that live for a minute");
    sleep(2 * MINUTE + Duration::from_secs(1)).await;
    assert_eq!((world.held(), world.ended()), (vec![], [0, 1, 0]));
    sleep(MINUTE).await;
    let last = world.orders();
    sleep(20 * MINUTE).await;
    assert_eq!((world.orders(), world.store.snapshot().len()), (last, 0));
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_pod_is_the_end_of_its_lease() {
    let world = World::start(FakeApi::new(), "").await;
    for name in ["deleted", "failed"] {
        world.api.put("pods", starting(name));
    }
    sleep(Duration::from_secs(1)).await;
    assert_eq!(world.held(), ["deleted", "failed"]);
    world.api.remove("pods", "shop", "deleted");
    world.api.change("pods", "shop", "failed", |pod| pod["status"]["phase"] = json!("Failed"));
    sleep(Duration::from_secs(1)).await;
    assert_eq!((world.held(), world.ended()), (vec![], [0, 0, 2]));
}

/// On a booting node every pod is warmed up, but only a few at once, so that callers are not delayed.
#[tokio::test(start_paused = true)]
async fn a_node_that_boots_orders_few_at_once() {
    let silent = World::with_issuer(FakeApi::new(), "", false).await;
    let answering = World::start(FakeApi::new(), "").await;
    for n in 0..100 {
        silent.api.put("pods", starting(&format!("p{n}")));
        answering.api.put("pods", starting(&format!("p{n}")));
    }
    sleep(Duration::from_secs(5)).await;
    assert_eq!((silent.held().len(), silent.orders()), (MAX_CONCURRENT, MAX_CONCURRENT));
    assert_eq!((answering.held().len(), answering.orders() >= 100), (100, true));
    // A pod that calls before its turn needs no lease.
    silent.pods.wait_for("u-p99").await.unwrap().first_call.cancel();
    sleep(2 * LEASE_HANDOVER).await;
    assert_eq!(silent.ended(), [1, 0, 0]);
    sleep(FIRST_CALL_TIMEOUT).await;
    assert_eq!((silent.held(), silent.ended()), (vec![], [1, 99, 0]));
}

#[tokio::test(start_paused = true)]
async fn labels_do_it_too_and_static_pods_or_others_are_left_alone() {
    let api = FakeApi::new();
    let world = World::start(api, "socketMount: false, podLabels: { mesh: \"on\", tier: gold }").await;
    let labelled = |name: &str, labels: Value| {
        let mut pod = starting(name);
        pod["metadata"]["labels"] = labels;
        pod
    };
    let gold = json!({"mesh": "on", "tier": "gold", "more": "x"});
    let mut mirror = labelled("static", gold.clone());
    mirror["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "hash"});
    for pod in [
        labelled("both", gold),
        labelled("one", json!({"mesh": "on"})),
        labelled("other", json!({"mesh": "on", "tier": "lead"})),
        starting("mounts"),
        mirror,
    ] {
        world.api.put("pods", pod);
    }
    sleep(Duration::from_secs(1)).await;
    assert_eq!(world.held(), ["both"]);
    world.drain.cancel();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(world.held(), [""; 0], "a draining agent holds no such leases");
}

#[test]
fn the_sockets_directory_is_reached_by_itself_and_from_above_and_below() {
    let reached = |path: &str| reaches(Path::new(path), Path::new("/run/sds-agent"));
    for path in
        ["/run/sds-agent", "/run/sds-agent/", "/run//sds-agent", "/var/run/sds-agent", "/run/sds-agent/sds.sock", "/run", "/var/run"]
    {
        assert!(reached(path), "{path}");
    }
    for path in ["/", "/run/sds", "/run/sds-agent-pods", "/var/lib/sds-agent", "/var", "", "run/sds-agent"] {
        assert!(!reached(path), "{path}");
    }
    assert!(reaches(Path::new("/run/x"), Path::new("/var/run/x")));
}
