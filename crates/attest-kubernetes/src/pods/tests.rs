//! The index against a scripted API server, under a paused clock.

use agent_kube::{
    fake::{FakeApi, Fault},
    pod::{Pod, PodObject},
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::*;

const MINUTE: Duration = Duration::from_secs(60);

struct World {
    api: FakeApi,
    pods: Pods,
    _running: JoinHandle<()>,
}

impl World {
    fn new(api: FakeApi) -> Self {
        let metrics = agent_kube::Metrics::default();
        let pods = Pods::new(api.client(&metrics), "n1", metrics);
        Self::running(api, pods)
    }

    fn running(api: FakeApi, pods: Pods) -> Self {
        let running = tokio::spawn({
            let pods = pods.clone();
            async move { pods.run(CancellationToken::new()).await }
        });
        Self { api, pods, _running: running }
    }

    async fn synced(api: FakeApi) -> Self {
        let world = Self::new(api);
        timeout(MINUTE, world.pods.synced().wait_for(|s| *s)).await.unwrap().unwrap();
        world
    }

    fn waiting(&self, uid: &'static str) -> JoinHandle<Result<Known, Error>> {
        let pods = self.pods.clone();
        tokio::spawn(async move { pods.wait_for(uid).await })
    }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(5 * MINUTE, future).await.expect("did not happen in time")
}

fn pod(name: &str, uid: &str, node: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop", "uid": uid, "labels": {"app": name}},
        "spec": {"nodeName": node, "serviceAccountName": "cart", "containers": []}, "status": {"phase": "Running"}})
}

fn list(pods: &[Value]) -> Fault {
    Fault::Status(200, body(pods))
}

fn body(pods: &[Value]) -> Value {
    json!({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": pods})
}

#[tokio::test(start_paused = true)]
async fn a_pod_is_known_by_its_uid_with_its_facts() {
    let api = FakeApi::new();
    api.put("pods", pod("a", "u-a", "n1"));
    let world = World::synced(api).await;
    let known = soon(world.pods.wait_for("u-a")).await.unwrap();
    assert_eq!((known.pod.pod.to_string().as_str(), known.pod.service_account.as_deref()), ("shop/a", Some("cart")));
    assert_eq!(known.pod.labels.get("app"), Some("a"));
    assert_eq!((known.pod.host_network, known.pod.mirror, known.pod.ended), (false, false, false));
    assert!(!known.terminated.is_cancelled());
    assert_eq!((world.api.count("list", "pods"), world.api.count("watch", "pods")), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_pod_is_somebody_on_each_of_its_sockets_and_a_live_read_says_the_same() {
    let (api, metrics) = (FakeApi::new(), agent_kube::Metrics::default());
    let volume =
        |name: &str, driver: &str, attributes: Value| json!({"name": name, "csi": {"driver": driver, "volumeAttributes": attributes}});
    let mut object = pod("a", "u-a", "n1");
    object["spec"]["volumes"] = json!([
        volume("sds", "csi.sds-agent.io", json!({"sds-agent.io/profile": "gold"})),
        volume("plain", "csi.sds-agent.io", json!({})),
        volume("foreign", "csi.example", json!({"sds-agent.io/profile": "lead"})),
    ]);
    let object = api.put("pods", object);
    let pods = Pods::new(api.client(&metrics), "n1", metrics).with_picks_by("csi.sds-agent.io");
    let world = World::running(api, pods);
    let known = soon(world.pods.wait_for("u-a")).await.unwrap();
    let picked = |workload: &Workload| match workload {
        Workload::Pod { picked, labels, .. } if labels.get("app") == Some("a") => picked.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(picked(&known.pod.workload()), None);
    for (volume, wanted) in [("sds", Some("gold")), ("plain", None), ("foreign", None), ("none", None)] {
        assert_eq!(picked(&known.pod.workload_at(volume)).as_deref(), wanted, "{volume}");
    }
    assert_eq!(world.pods.workloads().iter().map(picked).collect::<Vec<_>>(), [None, Some("gold".into())]);

    let slim: PodObject = serde_json::from_value(object).unwrap();
    assert_eq!(Pod::of(&slim, Some("csi.sds-agent.io")).as_ref(), Some(&*known.pod));
    assert!(Pod::of(&slim, None).unwrap().picks.is_empty(), "without per-pod sockets no profile is picked");
}

#[tokio::test(start_paused = true)]
async fn changed_labels_are_announced_and_a_changed_status_is_not() {
    let api = FakeApi::new();
    api.put("pods", pod("a", "u-a", "n1"));
    let world = World::synced(api).await;
    let mut facts = soon(world.pods.wait_for("u-a")).await.unwrap().facts.subscribe();
    let label = |value: &str| world.api.change("pods", "shop", "a", |pod| pod["metadata"]["labels"]["app"] = value.into());
    world.api.change("pods", "shop", "a", |pod| pod["status"]["phase"] = "Pending".into());
    assert!(timeout(MINUTE, facts.changed()).await.is_err(), "the status is no fact about the workload");
    label("b");
    soon(facts.changed()).await.unwrap();
    let known = soon(world.pods.wait_for("u-a")).await.unwrap();
    assert_eq!(*facts.borrow_and_update(), known.pod.workload());
    assert_eq!(known.pod.labels.get("app"), Some("b"));

    // A change that a new list reports.
    world.api.cut_watches(false);
    world.api.forget_history();
    label("c");
    soon(facts.changed()).await.unwrap();
    world.api.remove("pods", "shop", "a");
    soon(known.terminated.cancelled()).await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_not_there_yet_is_awaited_without_polling() {
    let api = FakeApi::new();
    api.fail("list", "pods", Fault::Refuse, 1000);
    let world = World::new(api);
    let mut waiting = world.waiting("u-a");
    assert!(timeout(2 * MINUTE, &mut waiting).await.is_err(), "the index is not complete");
    world.api.put("pods", pod("a", "u-a", "n1"));
    world.api.heal();
    soon(waiting).await.unwrap().unwrap();

    // When the index is complete, the pod's event ends the wait without the result of the live read.
    world.api.fail("list", "pods", Fault::Hang, 1);
    let waiting = world.waiting("u-b");
    world.api.until("the live read", |api| (api.count("list", "pods") > 1).then_some(())).await;
    world.api.put("pods", pod("b", "u-b", "n1"));
    soon(waiting).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_unknown_uid_costs_one_live_read_for_all_who_ask() {
    let api = FakeApi::new();
    api.put("pods", pod("elsewhere", "u-else", "n2"));
    let world = World::synced(api).await;
    let all: Vec<_> = (0..100).map(|_| world.waiting("u-else")).collect();
    for waiting in all {
        let error = soon(waiting).await.unwrap().unwrap_err();
        assert_eq!((error.reason, error.temporary), (Reason::unknown_pod, true));
    }
    assert!(world.api.count("list", "pods") <= 3, "{}", world.api.count("list", "pods"));

    world.api.fail("list", "pods", Fault::Refuse, 1);
    let error = soon(world.pods.wait_for("u-other")).await.unwrap_err();
    assert_eq!((error.reason, error.temporary), (Reason::unreadable, true));
}

/// Containers have outlived their pod, and the agent started after the pod was deleted.
#[tokio::test(start_paused = true)]
async fn live_reads_for_an_unknown_uid_are_limited_to_two_a_minute() {
    let world = World::synced(FakeApi::new()).await;
    let (lists, start) = (world.api.count("list", "pods"), tokio::time::Instant::now());
    let mut asked = 0;
    while start.elapsed() < 10 * MINUTE {
        let error = soon(world.pods.wait_for("u-old")).await.unwrap_err();
        assert_eq!((error.reason, error.temporary), (Reason::unknown_pod, true));
        asked += 1;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let lists = world.api.count("list", "pods") - lists;
    assert!(asked > 500 && lists <= 21, "{lists} lists for {asked} questions");

    // Another unknown UID gets its own live read at once. The first UID is served as soon as the watch reports its pod.
    let start = tokio::time::Instant::now();
    soon(world.pods.wait_for("u-new")).await.unwrap_err();
    assert!(start.elapsed() <= LIVE_READ_INTERVAL, "{:?}", start.elapsed());
    world.api.put("pods", pod("old", "u-old", "n1"));
    timeout(Duration::from_millis(1), world.pods.wait_for("u-old")).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_live_read_may_know_a_pod_before_the_watch_does() {
    let world = World::synced(FakeApi::new()).await;
    world.api.until("the watch", |api| (api.count("watch", "pods") == 1).then_some(())).await;
    world.api.fail("watch", "pods", Fault::Hang, 1);
    world.api.cut_watches(false);
    world.api.put("pods", pod("a", "u-a", "n1"));
    timeout(Duration::from_secs(5), world.pods.wait_for("u-a")).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_pod_token_is_cancelled_when_the_pod_ends_and_not_before() {
    let api = FakeApi::new();
    api.put("pods", pod("a", "u-a", "n1"));
    api.put("pods", pod("b", "u-b", "n1"));
    let world = World::synced(api).await;
    let (a, b) = (soon(world.pods.wait_for("u-a")).await.unwrap(), soon(world.pods.wait_for("u-b")).await.unwrap());

    world.api.change("pods", "shop", "a", |o| o["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z"));
    assert!(timeout(MINUTE, a.terminated.cancelled()).await.is_err());
    world.api.remove("pods", "shop", "a");
    soon(a.terminated.cancelled()).await;
    let lists = world.api.count("list", "pods");
    let error = soon(world.pods.wait_for("u-a")).await.unwrap_err();
    assert_eq!((error.reason, error.temporary), (Reason::pod_ended, false));
    assert_eq!(world.api.count("list", "pods"), lists, "containers that outlive their pod cause no further live read");

    world.api.change("pods", "shop", "b", |o| o["status"]["phase"] = json!("Succeeded"));
    soon(b.terminated.cancelled()).await;
    let error = soon(world.pods.wait_for("u-b")).await.unwrap_err();
    assert_eq!((error.reason, error.temporary), (Reason::pod_ended, false));
    assert_eq!(soon(world.pods.live()).await.unwrap(), HashSet::new());
}

#[tokio::test(start_paused = true)]
async fn a_list_that_lacks_pods_is_confirmed_before_a_stream_ends() {
    let api = FakeApi::new();
    for name in ["a", "b"] {
        api.put("pods", pod(name, &format!("u-{name}"), "n1"));
    }
    let world = World::synced(api).await;
    let (a, b) = (soon(world.pods.wait_for("u-a")).await.unwrap(), soon(world.pods.wait_for("u-b")).await.unwrap());

    // The stale cache contains no pod, storage contains both.
    world.api.fail("list", "pods", list(&[]), 1);
    world.api.forget_history();
    world.api.cut_watches(false);
    world.api.until("relist and confirmation", |api| (api.count("list", "pods") >= 3).then_some(())).await;
    assert!(timeout(MINUTE, a.terminated.cancelled()).await.is_err());

    // One pod was deleted, but live reads fail three times.
    world.api.cut_watches(false);
    world.api.remove("pods", "shop", "a");
    world.api.forget_history();
    world.api.fail("list", "pods", list(&[pod("b", "u-b", "n1")]), 1);
    world.api.fail("list", "pods", Fault::Refuse, 3);
    soon(a.terminated.cancelled()).await;
    assert!(!b.terminated.is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_deleted_pod_does_not_come_back_with_an_old_list_and_its_name_may() {
    let api = FakeApi::new();
    api.put("pods", pod("a", "u-1", "n1"));
    let world = World::synced(api).await;
    let first = soon(world.pods.wait_for("u-1")).await.unwrap();
    world.api.remove("pods", "shop", "a");
    soon(first.terminated.cancelled()).await;
    world.api.put("pods", pod("a", "u-2", "n1"));
    let second = soon(world.pods.wait_for("u-2")).await.unwrap();
    assert!(!second.terminated.is_cancelled());

    world.api.fail("list", "pods", list(&[pod("a", "u-1", "n1")]), 1);
    world.api.forget_history();
    world.api.cut_watches(false);
    world.api.until("relist and confirmation", |api| (api.count("list", "pods") >= 3).then_some(())).await;
    assert_eq!(soon(world.pods.wait_for("u-1")).await.unwrap_err().reason, Reason::pod_ended);
    assert!(!second.terminated.is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_static_pod_has_no_service_account_under_either_of_its_uids() {
    let api = FakeApi::new();
    let mut mirror = pod("static", "u-mirror", "n1");
    mirror["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "u-kubelet"});
    api.put("pods", mirror);
    let mut forged = pod("forged", "u-forged", "n1");
    forged["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "u-a"});
    api.put("pods", forged);
    api.put("pods", pod("a", "u-a", "n1"));
    let world = World::synced(api).await;
    for uid in ["u-mirror", "u-kubelet"] {
        let known = soon(world.pods.wait_for(uid)).await.unwrap();
        assert_eq!((known.pod.mirror, &known.pod.service_account), (true, &None), "{uid}");
    }
    assert_eq!(&*soon(world.pods.wait_for("u-a")).await.unwrap().pod.pod.name, "a", "a real UID takes precedence over an annotation");
}

#[tokio::test(start_paused = true)]
async fn waiting_for_an_unknown_container_times_out() {
    let mut a = pod("a", "u-a", "n1");
    a["status"]["containerStatuses"] = json!([{"name": "main", "containerID": "cri-o://c1"}]);
    let api = FakeApi::new();
    api.put("pods", a);
    let world = World::synced(api.clone()).await;
    assert_eq!(soon(world.pods.wait_for("u-a")).await.unwrap().pod.containers, []);

    let metrics = agent_kube::Metrics::default();
    let pods = Pods::new(api.client(&metrics), "n1", metrics).with_containers();
    let world = World::running(api, pods);
    soon(world.pods.wait_for("u-a")).await.unwrap();
    assert_eq!(&*soon(world.pods.wait_for_container("u-a", "c1")).await.unwrap(), "main");
    let error = soon(world.pods.wait_for_container("u-a", "c2")).await.unwrap_err();
    assert_eq!((error.reason, error.temporary), (Reason::unknown_container, true));

    let pods = world.pods.clone();
    let waiting = tokio::spawn(async move { pods.wait_for_container("u-a", "c2").await });
    world.api.change("pods", "shop", "a", |o| o["status"]["phase"] = json!("Failed"));
    assert_eq!(soon(waiting).await.unwrap().unwrap_err().reason, Reason::pod_ended);
}

#[tokio::test(start_paused = true)]
async fn each_end_of_a_pod_is_a_departure_and_nothing_else_is() {
    let api = FakeApi::new();
    for name in ["a", "b"] {
        api.put("pods", pod(name, &format!("u-{name}"), "n1"));
    }
    let world = World::synced(api).await;
    let mut pod_terminations = world.pods.pod_terminations();
    assert_eq!((*pod_terminations.borrow(), world.pods.workloads().len()), (0, 2));
    world.api.change("pods", "shop", "a", |o| o["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z"));
    assert!(timeout(MINUTE, pod_terminations.changed()).await.is_err(), "a pod that drains has not ended");
    world.api.change("pods", "shop", "b", |o| o["status"]["phase"] = json!("Succeeded"));
    soon(pod_terminations.wait_for(|count| *count == 1)).await.unwrap();
    assert_eq!(world.pods.workloads().len(), 1);
    world.api.remove("pods", "shop", "a");
    soon(pod_terminations.wait_for(|count| *count >= 2)).await.unwrap();
    assert_eq!(world.pods.workloads().len(), 0);
}

/// A pod that a list lacks is in doubt. Only a live read that begins later decides: the pod may be younger than a live read that is under
/// way.
#[tokio::test(start_paused = true)]
async fn a_live_read_that_is_older_than_the_doubt_ends_nobody() {
    let api = FakeApi::new();
    api.put("pods", pod("a", "u-a", "n1"));
    let world = World::synced(api).await;
    let a = soon(world.pods.wait_for("u-a")).await.unwrap();

    // A live read for another pod is under way. Its response contains no pod, and arrives after the doubt has arisen.
    world.api.fail("list", "pods", Fault::Late(Duration::from_secs(20), body(&[])), 1);
    let other = world.waiting("u-other");
    world.api.until("the live read", |api| (api.count("list", "pods") == 2).then_some(())).await;
    world.api.fail("list", "pods", list(&[]), 1);
    world.api.forget_history();
    world.api.cut_watches(false);
    assert_eq!(soon(other).await.unwrap().unwrap_err().reason, Reason::unknown_pod);
    assert!(timeout(MINUTE, a.terminated.cancelled()).await.is_err());
    soon(world.pods.wait_for("u-a")).await.unwrap();
}
