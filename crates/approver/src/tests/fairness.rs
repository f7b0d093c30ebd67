//! Nodes with many requests beside nodes with few.

use super::*;
use crate::queue::{MAX_REQUESTS_PER_NODE, MAX_WORKERS_PER_NODE};

/// A request of the agent on `node` for the pod of [`put_pod_on`].
fn object_on(base: &Value, node: &str, name: &str) -> Value {
    let mut object = base.clone();
    object["metadata"]["name"] = json!(name);
    object["metadata"]["uid"] = json!(format!("uid-of-{name}"));
    object["metadata"]["annotations"]["sds-agent.io/pod-name"] = json!(format!("cart-{node}"));
    object["metadata"]["annotations"]["sds-agent.io/pod-uid"] = json!(format!("u-{node}"));
    object["spec"]["extra"]["authentication.kubernetes.io/node-name"] = json!([node]);
    object
}

fn put_pod_on(api: &FakeApi, node: &str) {
    api.put(
        "pods",
        json!({
            "metadata": {"namespace": "shop", "name": format!("cart-{node}"), "uid": format!("u-{node}")},
            "spec": {"nodeName": node, "serviceAccountName": "cart"}, "status": {"phase": "Running"},
        }),
    );
}

/// Requests of a node that has too many.
const FLOOD: usize = MAX_REQUESTS_PER_NODE + 40;

/// Waits until `count` requests have been decided.
async fn decided_in_all(replica: &Replica, count: usize) {
    let decided = || replica.metrics.count(Decided::approved, "none") + replica.metrics.count(Decided::denied, "TooManyRequests");
    tokio::time::timeout(Duration::from_secs(3600), async {
        while decided() < count as u64 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("{} of {count} are decided", decided()));
}

/// The backlog is there before the start. The order of decisions is that of the objects' versions.
#[tokio::test(start_paused = true)]
async fn nine_nodes_with_few_requests_are_served_before_the_tenth_has_500() {
    let api = FakeApi::new();
    let base = object("base");
    let nodes: Vec<String> = (0..10).map(|n| format!("n{n}")).collect();
    for node in &nodes {
        put_pod_on(&api, node);
        for n in 0..if node == "n0" { 1500 } else { 50 } {
            // By name, all requests of the node with many come first.
            api.put(CR, object_on(&base, node, &format!("{node}-{n}")));
        }
    }
    let replica = Replica::start(&api, true);
    decided_in_all(&replica, 1950).await;
    let mut order: Vec<(u64, String)> = api
        .objects(CR)
        .iter()
        .map(|object| {
            let version = object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
            (version, object["spec"]["extra"]["authentication.kubernetes.io/node-name"][0].as_str().unwrap().to_owned())
        })
        .collect();
    order.sort_unstable();
    for node in &nodes[1..] {
        let last = order.iter().rposition(|(_, of)| of == node).unwrap();
        let many = order[..last].iter().filter(|(_, of)| of == "n0").count();
        assert!(many < 500, "{node} has its last decision after {many} of n0");
    }
    assert_eq!(replica.metrics.count(Decided::denied, "TooManyRequests"), 0);
}

/// The agent of a compromised node creates requests at will. Those of another node take no longer than twice their own time, in decisions.
#[tokio::test(start_paused = true)]
async fn requests_beyond_the_limit_of_a_node_are_denied_and_delay_no_other_node() {
    let api = FakeApi::new();
    let base = object("base");
    for node in ["n1", "n2"] {
        put_pod_on(&api, node);
    }
    // So slow that requests arrive faster than they are decided.
    api.delay("patch", CR, Duration::from_millis(300));
    let replica = Replica::start(&api, true);
    tokio::time::sleep(Duration::from_secs(1)).await;
    for n in 0..FLOOD {
        api.put(CR, object_on(&base, "n1", &format!("n1-{n:05}")));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    for n in 0..50 {
        api.put(CR, object_on(&base, "n2", &format!("n2-{n:05}")));
    }
    decided_in_all(&replica, FLOOD + 50).await;
    // Denied requests are removed after ten minutes, and approved ones are not.
    let mut order: Vec<(u64, bool)> = api
        .objects(CR)
        .iter()
        .map(|object| {
            let version = object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
            (version, object["metadata"]["name"].as_str().unwrap().starts_with("n2"))
        })
        .collect();
    order.sort_unstable();
    let first = order.iter().position(|(_, is_other)| *is_other).unwrap();
    let last = order.iter().rposition(|(_, is_other)| *is_other).unwrap();
    assert!(last - first <= 2 * 50, "50 requests take {} decisions", last - first);
    let denied = replica.metrics.count(Decided::denied, "TooManyRequests");
    // Each denial, too, brings the node nearer to its limit.
    assert!((10..=(FLOOD - MAX_REQUESTS_PER_NODE) as u64).contains(&denied), "{denied}");
}

#[tokio::test(start_paused = true)]
async fn hanging_pod_reads_of_a_node_leave_workers_to_other_nodes() {
    let api = FakeApi::new();
    let base = object("base");
    put_pod_on(&api, "n2");
    api.fail("get", "pods", Fault::Hang, MAX_WORKERS_PER_NODE);
    let _replica = Replica::start(&api, false);
    for n in 0..100 {
        api.put(CR, object_on(&base, "n1", &format!("n1-{n}")));
    }
    api.until("all workers of the node hang", |api| (api.count("get", "pods") == MAX_WORKERS_PER_NODE).then_some(())).await;
    let start = Instant::now();
    api.put(CR, object_on(&base, "n2", "n2-0"));
    assert_eq!(decided(&api, "n2-0").await["type"], "Approved");
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

/// The number of decisions until the last of 50 requests of a node, beside `others` requests of another node. All are there from the start.
async fn decisions_until_fifty(others: usize) -> usize {
    let api = FakeApi::new();
    let base = object("base");
    for node in ["n1", "n2"] {
        put_pod_on(&api, node);
    }
    for n in 0..others {
        api.put(CR, object_on(&base, "n1", &format!("n1-{n:05}")));
    }
    for n in 0..50 {
        api.put(CR, object_on(&base, "n2", &format!("n2-{n:05}")));
    }
    let _replica = Replica::start(&api, true);
    let is_decided = |n: usize| !api.object(CR, "sds-agent", &format!("n2-{n:05}")).unwrap()["status"].is_null();
    let mut open: Vec<usize> = (0..50).collect();
    api.until("the decisions of the second node", |_| {
        open.retain(|n| !is_decided(*n));
        open.is_empty().then_some(())
    })
    .await;
    api.count("patch", CR)
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_requests_of_a_node_delay_fifty_of_another_at_most_twice() {
    let (alone, beside) = (decisions_until_fifty(0).await, decisions_until_fifty(10_000).await);
    assert!(alone == 50 && beside <= 2 * alone, "{alone} decisions alone, {beside} beside the other node");
}
