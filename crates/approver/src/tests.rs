//! The approver with a scripted API server, on paused time.

use std::time::{Duration, SystemTime};

use agent_kube::fake::{FakeApi, Fault};
use agent_runtime::clock::TestClock;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use workload_identity::PodRef;

use super::*;
use crate::{
    judge::tests::{request, rules},
    metrics::{Decided, Step},
    queue::MAX_WORKERS_PER_NODE,
    rules::Rules,
};

mod changes;
mod fairness;
mod gate;
mod memory;
mod removal;
mod replicas;

const CR: &str = "certificaterequests";

struct Replica {
    metrics: Metrics,
    pods: Pods,
    active_rules: watch::Sender<Arc<ActiveRules>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Replica {
    /// Starts a replica with the test rules. Without `watches_pods`, every pod is read live.
    fn start(api: &FakeApi, watches_pods: bool) -> Self {
        Self::by(api, watches_pods, rules())
    }

    /// Starts a replica with `rules`.
    fn by(api: &FakeApi, watches_pods: bool, rules: Rules) -> Self {
        Self::of(api, None, watches_pods, rules)
    }

    /// Starts a replica with `rules` that runs in the pod `own`.
    fn of(api: &FakeApi, own: Option<PodRef>, watches_pods: bool, rules: Rules) -> Self {
        let (kube_metrics, metrics) = (agent_kube::Metrics::default(), Metrics::default());
        let client = api.client_at(&kube_metrics, RATE);
        let pods = Pods::new(client.clone(), own, None, kube_metrics.clone());
        let active_rules = watch::Sender::new(Arc::new(ActiveRules::new(rules)));
        let approver = Approver::new(Parts {
            client,
            active_rules: active_rules.subscribe(),
            pods: pods.clone(),
            clock: Arc::new(TestClock::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000))),
            instance: "approver-0".into(),
            kube_metrics,
            metrics: metrics.clone(),
        });
        let mut tasks = vec![tokio::spawn(approver.run())];
        if watches_pods {
            let pods = pods.clone();
            tasks.push(tokio::spawn(async move { pods.run().await }));
        }
        Self { metrics, pods, active_rules, tasks }
    }

    /// Replaces the rules, as a new configuration file does.
    fn change(&self, rules: Rules) {
        let newer = self.active_rules.borrow().replaced(rules, Instant::now());
        self.active_rules.send_replace(Arc::new(newer));
    }
}

fn object(name: &str) -> Value {
    let mut request = request();
    request.metadata.name = Some(name.into());
    request.metadata.uid = Some(format!("uid-of-{name}"));
    serde_json::to_value(request).unwrap()
}

fn put_pod(api: &FakeApi) {
    api.put(
        "pods",
        json!({
            "metadata": {"namespace": "shop", "name": "cart-1", "uid": "u-1"},
            "spec": {"nodeName": "n1", "serviceAccountName": "cart"}, "status": {"phase": "Running"},
        }),
    );
}

/// Waits for the condition of the decision.
async fn decided(api: &FakeApi, name: &str) -> Value {
    let find = |api: &FakeApi| {
        let request = api.objects(CR).into_iter().find(|request| request["metadata"]["name"] == name)?;
        request["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == "Approved" || c["type"] == "Denied").cloned()
    };
    api.until(&format!("a decision about {name}"), find).await
}

#[tokio::test(start_paused = true)]
async fn a_request_is_approved_by_what_the_watches_tell() {
    let api = FakeApi::new();
    put_pod(&api);
    let replica = Replica::start(&api, true);
    api.until("both watch", |api| (api.count("watch", "pods") == 1 && api.count("watch", CR) == 1).then_some(())).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    api.put(CR, object("a"));
    let condition = decided(&api, "a").await;
    let expected = json!({
        "type": "Approved", "status": "True", "reason": "approver.sds-agent.io", "lastTransitionTime": "2027-01-15T08:00:01Z",
        "message": "pod \"shop/cart-1\" on node \"n1\" may have spiffe://cluster.local/ns/shop/sa/cart",
    });
    assert_eq!(condition, expected);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((api.count("patch", CR), api.count("get", "pods"), api.objects("events").len()), (1, 0, 0));
    assert_eq!((replica.metrics.count(Decided::approved, "none"), replica.metrics.pending.get()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_the_watch_has_not_told_is_read_before_any_denial() {
    let api = FakeApi::new();
    put_pod(&api);
    let replica = Replica::start(&api, false);
    api.put(CR, object("a"));
    assert_eq!(decided(&api, "a").await["type"], "Approved");
    assert_eq!((api.count("get", "pods"), replica.metrics.live_reads.get()), (1, 1));

    api.remove("pods", "shop", "cart-1");
    api.put(CR, object("b"));
    let denied = decided(&api, "b").await;
    assert_eq!((&denied["type"], &denied["reason"]), (&json!("Denied"), &json!("PodGone")));
    let event = api.until_count("events", 1).await.remove(0);
    assert_eq!((&event["reason"], &event["type"], &event["message"]), (&json!("PodGone"), &json!("Normal"), &denied["message"]));
    assert_eq!((&event["involvedObject"]["name"], &event["involvedObject"]["uid"]), (&json!("b"), &json!("uid-of-b")));
    assert_eq!((&event["related"]["name"], &event["metadata"]["namespace"]), (&json!("cart-1"), &json!("sds-agent")));
    assert_eq!(replica.metrics.count(Decided::denied, "PodGone"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_watch_of_pods_that_is_broken_is_not_believed() {
    let api = FakeApi::new();
    put_pod(&api);
    let _replica = Replica::start(&api, true);
    api.until("it watches", |api| (api.count("watch", "pods") == 1).then_some(())).await;
    api.fail("watch", "pods", Fault::Refuse, usize::MAX);
    api.cut_watches(true);
    tokio::time::sleep(Duration::from_secs(5)).await;
    api.remove("pods", "shop", "cart-1");
    api.put(CR, object("a"));
    assert_eq!(decided(&api, "a").await["reason"], "PodGone");
}

#[tokio::test(start_paused = true)]
async fn two_replicas_write_one_decision_and_keep_the_others_conditions() {
    let api = FakeApi::new();
    put_pod(&api);
    let replicas = [Replica::start(&api, false), Replica::start(&api, false)];
    let mut other = object("a");
    other["status"] = json!({"conditions": [{"type": "Ready", "status": "False", "reason": "Pending", "message": "words"}]});
    api.put(CR, other);
    decided(&api, "a").await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let request = api.objects(CR).remove(0);
    let kinds: Vec<_> = request["status"]["conditions"].as_array().unwrap().iter().map(|c| c["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["Ready", "Approved"]);
    assert_eq!(replicas.iter().map(|r| r.metrics.count(Decided::approved, "none")).sum::<u64>(), 1);
    assert_eq!(replicas.iter().map(|r| r.metrics.pending.get()).sum::<i64>(), 0);
}

/// The request changes during the read of its pod, so the write conflicts and the request is judged again.
#[tokio::test(start_paused = true)]
async fn a_request_that_changed_meanwhile_is_judged_again() {
    let api = FakeApi::new();
    put_pod(&api);
    let slow = json!({
        "metadata": {"namespace": "shop", "name": "cart-1", "uid": "u-1"}, "spec": {"nodeName": "n1", "serviceAccountName": "cart"},
    });
    api.fail("get", "pods", Fault::Late(Duration::from_secs(5), slow), 1);
    let _replica = Replica::start(&api, false);
    api.put(CR, object("a"));
    api.until("the pod is being read", |api| (api.count("get", "pods") == 1).then_some(())).await;
    api.change(CR, "sds-agent", "a", |o| o["metadata"]["annotations"]["sds-agent.io/pod-uid"] = json!("u-0"));
    assert_eq!(decided(&api, "a").await["reason"], "PodGone");
}

#[tokio::test(start_paused = true)]
async fn a_right_that_is_missing_is_waited_for_and_does_not_hold_up_the_end() {
    let api = FakeApi::new();
    put_pod(&api);
    let forbidden = json!({"kind": "Status", "code": 403, "reason": "Forbidden", "message": "User \"x\" cannot patch resource"});
    api.fail("patch", CR, Fault::Status(403, forbidden), 8);
    let replica = Replica::start(&api, false);
    let start = Instant::now();
    for name in ["a", "b", "c"] {
        api.put(CR, object(name));
    }
    for name in ["a", "b", "c"] {
        assert_eq!(decided(&api, name).await["type"], "Approved");
    }
    let took = start.elapsed();
    assert!((Duration::from_secs(1)..Duration::from_secs(8)).contains(&took), "{took:?}");
    assert_eq!((replica.metrics.errors(Step::write), replica.metrics.count(Decided::approved, "none")), (8, 3));
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_cannot_be_read_denies_nobody() {
    let api = FakeApi::new();
    api.fail("get", "pods", Fault::Hang, 1);
    let forbidden = json!({"kind": "Status", "code": 403, "reason": "Forbidden", "message": "User \"x\" cannot get resource"});
    api.fail("get", "pods", Fault::Status(403, forbidden), 3);
    let replica = Replica::start(&api, false);
    api.put(CR, object("a"));
    api.until("four tries", |api| (api.count("get", "pods") == 4).then_some(())).await;
    assert_eq!(api.count("patch", CR), 0);
    put_pod(&api);
    assert_eq!(decided(&api, "a").await["type"], "Approved");
    assert_eq!(replica.metrics.errors(Step::read_pod), 4);
}

#[tokio::test(start_paused = true)]
async fn hanging_pod_reads_do_not_block_the_remaining_worker() {
    let api = FakeApi::new();
    put_pod(&api);
    api.fail("get", "pods", Fault::Hang, MAX_WORKERS_PER_NODE - 1);
    let _replica = Replica::start(&api, false);
    for n in 0..100 {
        api.put(CR, object(&format!("r{n}")));
    }
    let start = Instant::now();
    let approved = |api: &FakeApi| api.objects(CR).iter().filter(|o| o["status"]["conditions"][0]["type"] == "Approved").count();
    api.until("all but the hanging requests", |api| (approved(api) == 100 - (MAX_WORKERS_PER_NODE - 1)).then_some(())).await;
    assert!(start.elapsed() < Duration::from_secs(1));
    api.until("the hanging requests", |api| (approved(api) == 100).then_some(())).await;
}

#[tokio::test(start_paused = true)]
async fn who_else_approves_is_counted_once_for_each_request() {
    let api = FakeApi::new();
    let replica = Replica::start(&api, false);
    api.until("it watches", |api| (api.count("watch", CR) == 1).then_some(())).await;
    let mut approved = object("a");
    approved["status"] = json!({"conditions": [{"type": "Approved", "status": "True", "reason": "cert-manager.io"}]});
    for _ in 0..3 {
        api.put(CR, approved.clone());
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((replica.metrics.foreign.get(), api.count("patch", CR)), (1, 0));
}

/// A user creates requests in a loop: all are denied, and the Events per minute are limited.
#[tokio::test(start_paused = true)]
async fn a_flood_is_denied_and_does_not_become_one_of_events() {
    let api = FakeApi::new();
    let replica = Replica::start(&api, false);
    for n in 0..400 {
        let mut foreign = object(&format!("r{n}"));
        foreign["spec"]["username"] = json!("mallory");
        api.put(CR, foreign);
    }
    let denied = || replica.metrics.count(Decided::denied, "NotTheAgent");
    api.until("all are denied", |_| (denied() == 400).then_some(())).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((api.count("create", "events"), denied()), (300, 400));
    tokio::time::sleep(Duration::from_secs(60)).await;
    let mut foreign = object("later");
    foreign["spec"]["username"] = json!("mallory");
    api.put(CR, foreign);
    api.until("one more Event", |api| (api.count("create", "events") == 301).then_some(())).await;
}

#[tokio::test(start_paused = true)]
async fn requests_of_others_are_neither_read_nor_written() {
    let api = FakeApi::new();
    let replica = Replica::start(&api, false);
    let mut other = object("a");
    other["spec"]["issuerRef"]["name"] = json!("other");
    api.put(CR, other);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((api.count("patch", CR), api.count("get", "pods"), replica.metrics.pending.get()), (0, 0, 0));
}
