//! Several replicas: one decides, the others are on standby, and one of them takes over if requests stay undecided.

use super::*;
use crate::role::TAKEOVER_AFTER;

/// Upper bound of the time until a replica on standby decides: more than [`TAKEOVER_AFTER`] with the full jitter of one half.
const TAKEOVER: Duration = TAKEOVER_AFTER.saturating_add(TAKEOVER_AFTER);

/// Creates the pod of a replica, with this second as its creation time.
fn put_replica(api: &FakeApi, name: &str, second: u8) -> PodRef {
    let uid = format!("u-{name}");
    api.put(
        "pods",
        json!({
            "metadata": {
                "namespace": "sds-agent", "name": name, "uid": uid, "creationTimestamp": format!("2026-01-01T00:00:{second:02}Z"),
            },
            "spec": {"nodeName": "n1", "serviceAccountName": "sds-agent-approver"}, "status": {"phase": "Running"},
        }),
    );
    PodRef { namespace: "sds-agent".into(), name: name.into(), uid: uid.as_str().into() }
}

/// Starts two replicas, the older one first.
async fn two(api: &FakeApi) -> [Replica; 2] {
    put_pod(api);
    let [old, young] = [put_replica(api, "old", 1), put_replica(api, "young", 2)];
    let replicas = [old, young].map(|own| Replica::of(api, Some(own), true, rules()));
    for replica in &replicas {
        replica.pods.synced().wait_for(|synced| *synced).await.unwrap();
    }
    // The replicas see their rank.
    tokio::time::sleep(Duration::from_millis(10)).await;
    replicas
}

fn approvals(replicas: &[Replica]) -> Vec<u64> {
    replicas.iter().map(|replica| replica.metrics.count(Decided::approved, "none")).collect()
}

fn deciding(replicas: &[Replica]) -> Vec<i64> {
    replicas.iter().map(|replica| replica.metrics.active.get()).collect()
}

async fn ask(api: &FakeApi, names: impl IntoIterator<Item = String>) -> Duration {
    let start = Instant::now();
    let names: Vec<_> = names.into_iter().collect();
    for name in &names {
        api.put(CR, object(name));
    }
    for name in &names {
        assert_eq!(decided(api, name).await["type"], "Approved", "{name}");
    }
    start.elapsed()
}

fn names(prefix: &'static str, count: usize) -> impl Iterator<Item = String> {
    (0..count).map(move |n| format!("{prefix}{n}"))
}

#[tokio::test(start_paused = true)]
async fn the_older_one_decides_and_the_other_neither_writes_nor_reads() {
    let api = FakeApi::new();
    let replicas = two(&api).await;
    assert_eq!(deciding(&replicas), [1, 0]);
    assert!(ask(&api, names("a", 250)).await < Duration::from_secs(2));
    // Only the deciding replica reads a pod that the watch has not reported.
    let mut other = object("other");
    other["metadata"]["annotations"]["sds-agent.io/pod-uid"] = json!("u-0");
    api.put(CR, other);
    assert_eq!(decided(&api, "other").await["reason"], "PodGone");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((api.count("patch", CR), api.count("get", CR), api.count("get", "pods")), (251, 0, 1));
    assert_eq!((approvals(&replicas), deciding(&replicas)), (vec![250, 0], vec![1, 0]));
    assert_eq!(replicas.iter().map(|replica| replica.metrics.pending.get()).sum::<i64>(), 0);
}

/// A killed process leaves its pod as it was. Another process in the same pod is the first again.
#[tokio::test(start_paused = true)]
async fn a_standby_replica_takes_over_from_a_killed_one() {
    let api = FakeApi::new();
    let [old, young] = two(&api).await;
    ask(&api, names("a", 3)).await;
    drop(old);
    let waited = ask(&api, names("b", 20)).await;
    assert!((TAKEOVER_AFTER..TAKEOVER).contains(&waited), "{waited:?}");
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(ask(&api, names("c", 20)).await < Duration::from_secs(1), "it keeps deciding");

    let own = PodRef { namespace: "sds-agent".into(), name: "old".into(), uid: "u-old".into() };
    let replicas = [Replica::of(&api, Some(own), true, rules()), young];
    replicas[0].pods.synced().wait_for(|synced| *synced).await.unwrap();
    ask(&api, names("d", 200)).await;
    assert_eq!(deciding(&replicas).iter().sum::<i64>(), 1, "the replica that lost a write is on standby");
    let conflicts = replicas.iter().map(|replica| replica.metrics.conflicts.get()).sum::<u64>();
    assert!(conflicts <= 4, "{conflicts} of 200 decisions were lost until one replica went on standby");
}

/// When the deletion of the pod begins, its process still runs, and the successor decides immediately.
#[tokio::test(start_paused = true)]
async fn a_replica_that_is_being_deleted_hands_over_at_once() {
    let api = FakeApi::new();
    let [old, young] = two(&api).await;
    api.change("pods", "sds-agent", "old", |pod| pod["metadata"]["deletionTimestamp"] = json!("2026-01-02T00:00:00Z"));
    tokio::time::sleep(Duration::from_millis(10)).await;
    let replicas = [old, young];
    assert_eq!(deciding(&replicas), [0, 1]);
    assert!(ask(&api, names("a", 20)).await < Duration::from_secs(1));
    let [old, young] = replicas;
    drop(old);
    api.remove("pods", "sds-agent", "old");
    assert!(ask(&api, names("b", 20)).await < Duration::from_secs(1));
    assert_eq!(approvals(&[young]), [40]);

    // The only replica decides until its process ends.
    let alone = FakeApi::new();
    put_pod(&alone);
    let own = put_replica(&alone, "only", 1);
    alone.change("pods", "sds-agent", "only", |pod| pod["metadata"]["deletionTimestamp"] = json!("2026-01-02T00:00:00Z"));
    let _replica = Replica::of(&alone, Some(own), true, rules());
    assert!(ask(&alone, names("a", 3)).await < Duration::from_secs(1));
}

/// The first replica runs, and its write gets no response.
#[tokio::test(start_paused = true)]
async fn a_replica_that_is_alive_and_decides_nothing_is_replaced() {
    let api = FakeApi::new();
    let replicas = two(&api).await;
    api.fail("patch", CR, Fault::Hang, 1);
    api.put(CR, object("a"));
    let start = Instant::now();
    assert_eq!(decided(&api, "a").await["type"], "Approved");
    let waited = start.elapsed();
    assert!((TAKEOVER_AFTER..TAKEOVER).contains(&waited), "{waited:?}");
    assert_eq!(approvals(&replicas), [0, 1]);
}

/// While another replica decides, requests may wait longer: a second writer would slow down both.
#[tokio::test(start_paused = true)]
async fn a_long_queue_of_another_is_no_reason_to_take_over() {
    let api = FakeApi::new();
    let replicas = two(&api).await;
    api.delay("patch", CR, Duration::from_millis(150));
    let waited = ask(&api, names("a", 200)).await;
    assert!(waited > 3 * TAKEOVER, "{waited:?}");
    assert_eq!((approvals(&replicas), deciding(&replicas), api.count("patch", CR)), (vec![200, 0], vec![1, 0], 200));
}

/// cert-manager's own approver may approve for the issuer, and is faster.
#[tokio::test(start_paused = true)]
async fn a_decision_of_a_foreign_approver_puts_no_replica_on_standby() {
    let api = FakeApi::new();
    put_pod(&api);
    let replica = Replica::start(&api, true);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let conflict = json!({"kind": "Status", "code": 409, "reason": "Conflict", "message": "x", "details": {"kind": CR}});
    api.fail("patch", CR, Fault::Status(409, conflict), 1);
    let mut approved = object("a");
    approved["status"] = json!({"conditions": [{"type": "Approved", "status": "True", "reason": "cert-manager.io"}]});
    api.fail("get", CR, Fault::Late(Duration::from_millis(1), approved), 1);
    api.put(CR, object("a"));
    api.until("it has been read again", |api| (api.count("get", CR) == 1).then_some(())).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!((replica.metrics.active.get(), replica.metrics.conflicts.get()), (1, 0));
}

/// A list that began before a decision shows the request undecided.
#[tokio::test(start_paused = true)]
async fn an_old_list_with_an_own_decision_costs_no_role() {
    let api = FakeApi::new();
    put_pod(&api);
    let before = api.put(CR, object("a"));
    let replica = Replica::start(&api, true);
    assert_eq!(decided(&api, "a").await["type"], "Approved");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let list = json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1000"}, "items": [before]});
    let reads = api.count("get", CR);
    api.fail("list", CR, Fault::Late(Duration::ZERO, list), 1);
    api.forget_history();
    api.cut_watches(false);
    api.until("the request is read again", |api| (api.count("get", CR) > reads).then_some(())).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((replica.metrics.conflicts.get(), replica.metrics.active.get()), (0, 1));
}
