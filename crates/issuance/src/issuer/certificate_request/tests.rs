//! Orders against a scripted API server, on a paused clock.

use std::{collections::HashSet, time::SystemTime};

use agent_kube::{
    self,
    fake::{FakeApi, Fault},
};
use agent_runtime::clock::TestClock;
use base64::{Engine, engine::general_purpose::STANDARD};
use cert_manager::{IssuerRef, RequestNamespace, keys, naming::Agent};
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use workload_identity::{Identity, IssuerName, NodeEnvironment, Profile, SpiffeId, samples::profile};

use super::*;
use crate::issuer::{Pending, Progress};

mod faults;
mod setup;
mod vault_words;

const CR: &str = "certificaterequests";
const MINUTE: Duration = Duration::from_secs(60);

/// The certificate that cert-manager's issuer returns. Orders do not verify it, so that any certificate will do.
static CHAIN: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| {
    let params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
});

#[derive(Debug, Default)]
struct Pods(Option<HashSet<Arc<str>>>);

impl LivePods for Pods {
    fn live(&self) -> BoxFuture<'_, Option<HashSet<Arc<str>>>> {
        Box::pin(std::future::ready(self.0.clone()))
    }
}

/// An agent, its issuer, and its API server.
struct World {
    api: FakeApi,
    requests: Requests,
    issuer: CertManager,
    metrics: Metrics,
    shutdown: CancellationToken,
    running: JoinHandle<()>,
}

fn issuer_ref() -> IssuerRef {
    IssuerRef { name: "mesh-ca".into(), kind: "ClusterIssuer".into(), group: "cert-manager.io".into() }
}

fn node() -> NodeEnvironment {
    let pod = PodRef { namespace: "sds-agent".into(), name: "sds-agent-x".into(), uid: "agent-1".into() };
    NodeEnvironment { node_name: Some("n1".into()), pod: Some(pod) }
}

impl World {
    fn new() -> Self {
        Self::with(RequestNamespace::Fixed("sds-agent".into()), issuer_ref(), FakeApi::new())
    }

    fn with(namespace: RequestNamespace, issuer_ref: IssuerRef, api: FakeApi) -> Self {
        Self::on(None, namespace, issuer_ref, api)
    }

    fn on(node_uid: Option<&str>, namespace: RequestNamespace, issuer_ref: IssuerRef, api: FakeApi) -> Self {
        api.put("clusterissuers", ready_issuer("ClusterIssuer", "mesh-ca", json!({"ca": {"secretName": "s"}})));
        let (kube_metrics, metrics) = (agent_kube::Metrics::default(), Metrics::default());
        let pods = Pods(Some(["agent-1".into(), "sibling".into()].into()));
        let requests = Requests::new(
            api.client(&kube_metrics),
            namespace.clone(),
            Arc::new(Agent::new(&node(), node_uid.map(str::to_owned), 7)),
            Some(Arc::new(pods)),
            Arc::new(TestClock::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000))),
            kube_metrics,
            metrics.clone(),
        );
        let config = Settings { issuer_ref, namespace, trust_status_ca: false };
        let shutdown = CancellationToken::new();
        let running = tokio::spawn({
            let (requests, shutdown) = (requests.clone(), shutdown.clone());
            async move { requests.run(shutdown).await }
        });
        Self { api, issuer: CertManager::new(requests.clone(), config, None), requests, metrics, shutdown, running }
    }

    /// Starts an order for a service account.
    fn order(&self, account: &str) -> (JoinHandle<Result<Issued, Error>>, tokio::sync::watch::Receiver<Option<Pending>>) {
        let (progress, stage) = Progress::new();
        let order = Order { identity: Arc::new(identity(account)), evidence: Some(pod()), progress };
        (tokio::spawn(self.issuer.issue(order)), stage)
    }

    /// Returns the only request.
    async fn request(&self) -> Value {
        self.api.until_count(CR, 1).await.remove(0)
    }

    fn condition(&self, request: &Value, kind: &str, status: &str, reason: &str) {
        self.says(request, kind, status, reason, "words");
    }

    fn says(&self, request: &Value, kind: &str, status: &str, reason: &str, message: &str) {
        self.api.change(CR, text(request, "namespace"), text(request, "name"), |object| {
            let condition = json!({"type": kind, "status": status, "reason": reason, "message": message});
            match object.pointer_mut("/status/conditions") {
                Some(Value::Array(conditions)) => conditions.push(condition),
                _ => object["status"]["conditions"] = json!([condition]),
            }
        });
    }

    fn issue(&self, request: &Value) {
        self.condition(request, "Approved", "True", "cert-manager.io");
        self.api.change(CR, text(request, "namespace"), text(request, "name"), |object| {
            object["status"]["certificate"] = json!(STANDARD.encode(&*CHAIN));
            object["status"]["conditions"].as_array_mut().unwrap().push(json!({"type": "Ready", "status": "True", "reason": "Issued"}));
        });
    }
}

fn ready_issuer(kind: &str, name: &str, mut spec: Value) -> Value {
    let ready = json!({"conditions": [{"type": "Ready", "status": "True"}]});
    spec["x"] = json!(1);
    json!({"apiVersion": "cert-manager.io/v1", "kind": kind, "metadata": {"name": name, "namespace": ""}, "spec": spec, "status": ready})
}

fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object["metadata"][field].as_str().unwrap()
}

fn pod() -> PodRef {
    PodRef { namespace: "shop".into(), name: "cart-1".into(), uid: "pod-1".into() }
}

fn identity(account: &str) -> Identity {
    let template = "spiffe://cluster.local/ns/{namespace}/sa/{serviceAccount}";
    let profile = Profile { issuer: IssuerName("default".into()), ..profile(template) };
    let spiffe_id = SpiffeId::new(&format!("spiffe://cluster.local/ns/shop/sa/{account}")).unwrap();
    Identity { spiffe_id, dns_names: Arc::new([]), profile: Arc::new(profile), pod_uid: None, account: None }
}

async fn end<T>(task: JoinHandle<T>) -> T {
    timeout(60 * MINUTE, task).await.expect("never ended").unwrap()
}

/// Number of creates and deletes by the agent.
fn writes(api: &FakeApi) -> (usize, usize) {
    (api.count("create", CR), api.count("delete", CR))
}

#[tokio::test(start_paused = true)]
async fn a_certificate_costs_two_writes_and_the_request_tells_who_asks() {
    let world = World::new();
    let (task, mut stage) = world.order("cart");
    let request = world.request().await;
    let name = text(&request, "name").to_owned();
    timeout(MINUTE, stage.wait_for(|s| matches!(s, Some(pending) if *pending.request == *name))).await.unwrap().unwrap();

    let metadata = &request["metadata"];
    assert_eq!(metadata["labels"][keys::NODE], "n1");
    assert_eq!(metadata["labels"][keys::AGENT], "agent-1");
    for (key, value) in [
        (keys::NODE_NAME, "n1"),
        (keys::AGENT_POD, "sds-agent/sds-agent-x"),
        (keys::POD_NAMESPACE, "shop"),
        (keys::POD_NAME, "cart-1"),
        (keys::POD_UID, "pod-1"),
        (keys::PROFILE, "default"),
        (keys::SPIFFE_ID, "spiffe://cluster.local/ns/shop/sa/cart"),
    ] {
        assert_eq!(metadata["annotations"][key], value, "{key}");
    }
    let owner = json!([{"apiVersion": "v1", "kind": "Pod", "name": "sds-agent-x", "uid": "agent-1"}]);
    assert_eq!(metadata["ownerReferences"], owner);
    assert_eq!(request["spec"]["duration"], "3600s");
    assert_eq!(request["spec"]["isCA"], false);

    world.issue(&request);
    let issued = end(task).await.unwrap();
    assert_eq!(issued.chain.to_pem(), CHAIN.as_bytes());
    assert_eq!(issued.phases.iter().map(|(phase, _)| *phase).collect::<Vec<_>>(), [Phase::Create, Phase::Approve, Phase::Sign]);
    world.api.until_count(CR, 0).await;
    tokio::time::sleep(30 * MINUTE).await;
    assert_eq!(writes(&world.api), (1, 1));
    assert_eq!((world.api.count("list", CR), world.api.count("watch", CR)), (1, 1 + 30 * 60 / 295));
}

#[tokio::test(start_paused = true)]
async fn refusals_say_why_and_when_to_ask_again() {
    for (kind, status, reason, retry, text) in [
        ("Denied", "True", "NotYourPod", Retry::After(5 * MINUTE), "was denied: NotYourPod: words"),
        ("Denied", "True", "PodGone", Retry::Now, "was denied: PodGone: words"),
        ("Denied", "True", "ProfileMismatch", Retry::Backoff, "was denied: ProfileMismatch: words"),
        ("Denied", "True", "WrongIdentity", Retry::Backoff, "was denied: WrongIdentity: words"),
        ("Denied", "True", "WrongNode", Retry::After(5 * MINUTE), "was denied: WrongNode: words"),
        ("Ready", "False", "Failed", Retry::Backoff, "failed: Failed: words"),
        ("InvalidRequest", "True", "BadUsages", Retry::Configuration, "cert-manager does not accept the request: words"),
    ] {
        let world = World::new();
        let (task, _) = world.order("cart");
        let request = world.request().await;
        world.condition(&request, kind, status, reason);
        let error = end(task).await.unwrap_err();
        assert_eq!(error.retry(), retry, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_last_refused_request_of_an_identity_stays_ten_minutes() {
    let world = World::new();
    for account in ["cart", "cart", "till"] {
        let (task, _) = world.order(account);
        let find = |api: &FakeApi| api.objects(CR).into_iter().find(|o| o["status"].is_null());
        let request = world.api.until("a new request", find).await;
        world.condition(&request, "Ready", "False", "Failed");
        end(task).await.unwrap_err();
    }
    let left = world.api.until_count(CR, 2).await;
    assert_eq!(writes(&world.api), (3, 1), "the first failure made room for the second");
    tokio::time::sleep(9 * MINUTE).await;
    assert_eq!(world.api.objects(CR), left);
    world.api.until_count(CR, 0).await;
    assert_eq!(writes(&world.api), (3, 3));
}

#[tokio::test(start_paused = true)]
async fn a_pending_request_outlives_every_trouble_of_the_watch() {
    let world = World::new();
    let (mut task, _) = world.order("cart");
    let request = world.request().await;
    let mut still_pending = async |why: &str| assert!(timeout(61 * MINUTE, &mut task).await.is_err(), "{why}");

    still_pending("an hour without an answer").await;
    world.api.cut_watches(true);
    world.api.cut_watches(false);
    still_pending("cut watches").await;
    world.api.cut_watches(false);
    world.api.forget_history();
    still_pending("410 Gone").await;
    for verb in ["list", "watch"] {
        world.api.fail(verb, CR, Fault::Refuse, usize::MAX);
    }
    world.api.cut_watches(true);
    world.api.forget_history();
    still_pending("an hour without an API server").await;
    world.api.heal();

    world.issue(&request);
    end(task).await.unwrap();
    world.api.until_count(CR, 0).await;
    assert_eq!(writes(&world.api), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn news_that_the_watch_missed_are_read_from_the_list() {
    let world = World::new();
    let (task, _) = world.order("cart");
    let request = world.request().await;
    world.api.fail("watch", CR, Fault::Status(500, json!({"kind": "Status", "code": 500, "message": "etcd"})), 3);
    world.api.cut_watches(false);
    world.issue(&request);
    world.api.forget_history();
    end(task).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_deleted_or_relabelled_request_fails_its_order() {
    let deleted = |world: &World, name: &str| world.api.remove(CR, "sds-agent", name);
    let relabelled = |world: &World, name: &str| world.api.change(CR, "sds-agent", name, |o| o["metadata"]["labels"] = json!({}));
    for lose in [&deleted as &dyn Fn(&World, &str), &relabelled] {
        let world = World::new();
        let (task, mut stage) = world.order("cart");
        let request = world.request().await;
        timeout(MINUTE, stage.wait_for(Option::is_some)).await.unwrap().unwrap();
        lose(&world, text(&request, "name"));
        let error = end(task).await.unwrap_err();
        assert_eq!(error.retry(), Retry::Backoff);
        assert!(error.to_string().contains("another client deleted or relabelled the request"), "{error}");
        world.api.until_count(CR, 0).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_deleted_while_the_watch_is_down_fails_its_order() {
    let world = World::new();
    let (task, mut stage) = world.order("cart");
    let first = world.request().await;
    timeout(MINUTE, stage.wait_for(Option::is_some)).await.unwrap().unwrap();
    world.api.fail("watch", CR, Fault::Refuse, 2);
    world.api.cut_watches(false);
    world.api.remove(CR, "sds-agent", text(&first, "name"));
    world.api.forget_history();
    assert_eq!(end(task).await.unwrap_err().retry(), Retry::Backoff);
}

#[tokio::test(start_paused = true)]
async fn an_abandoned_order_leaves_nothing() {
    let world = World::new();
    let (task, _) = world.order("cart");
    world.request().await;
    task.abort();
    world.api.until_count(CR, 0).await;

    // The order is abandoned during the create. The request is deleted when the watch shows it.
    world.api.fail("create", CR, Fault::CarryOutAndHang, 1);
    let (task, _) = world.order("cart");
    world.api.until("the create", |api| (api.count("create", CR) == 2).then_some(())).await;
    task.abort();
    world.api.until_count(CR, 0).await;
}

#[tokio::test(start_paused = true)]
async fn requests_of_gone_agents_are_swept_and_those_of_a_live_sibling_are_not() {
    let api = FakeApi::new();
    let left = |name: &str, agent: &str, node: &str| {
        let labels = json!({keys::NODE: node, keys::AGENT: agent, keys::INSTANCE: name});
        api.put(CR, json!({"metadata": {"name": name, "namespace": "sds-agent", "labels": labels}, "spec": {}}));
    };
    left("of-the-past", "agent-1", "n1");
    left("of-the-dead", "agent-0", "n1");
    left("of-a-sibling", "sibling", "n1");
    left("of-another-node", "agent-9", "n2");
    let world = World::with(RequestNamespace::Fixed("sds-agent".into()), issuer_ref(), api);
    let names: Vec<_> = world.api.until_count(CR, 2).await.iter().map(|o| text(o, "name").to_owned()).collect();
    assert_eq!(names, ["of-a-sibling", "of-another-node"]);
    tokio::time::sleep(30 * MINUTE).await;
    assert_eq!(world.api.objects(CR).len(), 2);
    assert_eq!(world.metrics.orphans(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_end_deletes_what_is_open_and_takes_five_seconds_at_most() {
    let world = World::new();
    let (task, _) = world.order("cart");
    world.request().await;
    world.shutdown.cancel();
    tokio::task::yield_now().await;
    task.abort();
    timeout(Duration::from_secs(1), world.running).await.unwrap().unwrap();
    assert_eq!(world.api.objects(CR).len(), 0);

    let world = World::new();
    let (task, _) = world.order("cart");
    world.request().await;
    world.api.fail("delete", CR, Fault::Hang, usize::MAX);
    task.abort();
    world.shutdown.cancel();
    timeout(deleter::SHUTDOWN_TIMEOUT + Duration::from_millis(1), world.running).await.unwrap().unwrap();
}

/// The policy compares the label with the UID in the token, which changes if the Node is recreated under its name.
#[tokio::test(start_paused = true)]
async fn a_recreated_node_gets_requests_with_its_new_uid() {
    let world = World::on(Some("u-1"), RequestNamespace::Fixed("sds-agent".into()), issuer_ref(), FakeApi::new());
    for uid in ["u-1", "u-2"] {
        world.requests.node_is(uid);
        let (order, _) = world.order("a");
        let request = world.request().await;
        assert_eq!(
            (&request["metadata"]["labels"][keys::NODE_UID], &request["metadata"]["labels"][keys::NODE]),
            (&json!(uid), &json!("n1"))
        );
        world.condition(&request, "Denied", "True", "WrongNode");
        assert!(matches!(order.await.unwrap(), Err(Error::Denied { .. })), "the watch shows the answer");
        world.api.remove(CR, "sds-agent", text(&request, "name"));
    }
}

/// Agents of the previous version set no label with the UID.
#[tokio::test(start_paused = true)]
async fn the_sweep_deletes_orphans_of_the_previous_version() {
    let api = FakeApi::new();
    for (name, agent, uid) in
        [("former", "gone", None), ("of-a-sibling", "sibling", None), ("orphan", "gone", Some("u-1")), ("elsewhere", "gone", Some("u-9"))]
    {
        let mut labels = json!({keys::NODE: "n1", keys::AGENT: agent, keys::INSTANCE: "i"});
        if let Some(uid) = uid {
            labels[keys::NODE_UID] = json!(uid);
        }
        api.put(CR, json!({"metadata": {"namespace": "sds-agent", "name": name, "labels": labels}}));
    }
    let world = World::on(Some("u-1"), RequestNamespace::Fixed("sds-agent".into()), issuer_ref(), api);
    let left = world.api.until_count(CR, 2).await;
    assert_eq!(left.iter().map(|request| text(request, "name")).collect::<Vec<_>>(), ["elsewhere", "of-a-sibling"]);
}
