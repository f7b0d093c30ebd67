//! The approver under load: many requests at once, with one replica and with several.
//!
//! The limits are counts, or ratios of times of one run: none depends on the speed of the machine.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use serde_json::Value;
use test_harness::{
    agent::Agent,
    ask::{Ask, condition},
    cluster::Pod,
    eventually,
    world::{Actor, NAMESPACE, PATIENCE, World},
};

/// Number of nodes that create requests.
const NODES: usize = 4;
/// Number of requests that are created concurrently.
const CREATORS: usize = 16;
/// Number of requests in a backlog.
const BACKLOG: usize = 80;
/// Maximum number of reviews that cert-manager's webhook makes per approval, or per second: its client is limited to five per second.
const REVIEWS_PER_APPROVAL: f64 = 0.4;
const REVIEWS_PER_SECOND: f64 = 4.0;
/// Limit for the first decision after the deciding replica was killed: the lease timeout of another one, and time to write on a busy
/// machine.
const TAKEOVER: Duration = Duration::from_secs(10);

/// A node's agent, and a pod of the node.
struct Asking {
    agent: Actor,
    pod: Pod,
}

struct Load {
    world: World,
    nodes: Vec<Asking>,
}

/// The cost of a backlog.
struct Cost {
    approvals: usize,
    took: Duration,
    reviews: usize,
}

impl Load {
    /// Starts a cluster without another approver and without a signer, so that only the approver is measured.
    async fn start() -> Self {
        let without = "*,-certificaterequests-approver,-certificaterequests-issuer-ca";
        let world = World::start(&["--controllers", without, "--audit"]).await;
        let shop = world.cluster.namespace().await;
        let mut nodes = Vec::new();
        for n in 0..NODES {
            let node = world.cluster.node().await;
            let agent = world.actor(&format!("agent-{n}"), "sds-agent", &node).await;
            let pod = world.cluster.pod(&shop, &format!("app-{n}"), &node).await;
            nodes.push(Asking { agent, pod });
        }
        Self { world, nodes }
    }

    /// Creates `count` requests, of the nodes in turn, `creators` at a time.
    async fn ask(&self, count: usize, creators: usize) -> Vec<String> {
        let asks = stream::iter(self.nodes.iter().cycle().take(count))
            .map(async |Asking { agent, pod }| Ask::of(agent, pod).create(agent).await.expect("a request is created"));
        asks.buffer_unordered(creators).collect().await
    }

    /// Waits until all of these requests are approved.
    async fn approved(&self, paths: &[String]) {
        let mut open: BTreeSet<&str> = paths.iter().map(|path| path.rsplit('/').next().expect("a name")).collect();
        let list = format!("/apis/cert-manager.io/v1/namespaces/{NAMESPACE}/certificaterequests");
        eventually("all are approved", 2 * PATIENCE, async || {
            let requests = self.world.cluster.get(&list).await;
            for request in requests["items"].as_array().expect("a list") {
                assert!(condition(request, "Denied").is_none(), "{}", request["status"]);
                if condition(request, "Approved").is_some() {
                    open.remove(request["metadata"]["name"].as_str().expect("a name"));
                }
            }
            if open.is_empty() { Ok(()) } else { Err(format!("{} of {} are open", open.len(), paths.len())) }
        })
        .await;
    }

    /// The number of reviews that cert-manager's webhook has requested so far.
    fn reviews(&self) -> usize {
        let asked = self.world.audit().into_iter().filter(|line| line["objectRef"]["resource"] == "subjectaccessreviews");
        asked.filter(|line| line["user"]["username"] == "system:serviceaccount:cert-manager:cert-manager-webhook").count()
    }

    async fn backlog(&self, count: usize) -> Cost {
        let (reviews, start) = (self.reviews(), Instant::now());
        let paths = self.ask(count, CREATORS).await;
        self.approved(&paths).await;
        Cost { approvals: count, took: start.elapsed(), reviews: self.reviews() - reviews }
    }
}

impl Cost {
    /// Asserts that the approvals do not wait for the webhook's client.
    fn assert_few_reviews(&self, when: &str) {
        let reviews = f64::from(u32::try_from(self.reviews).expect("few"));
        let (each, a_second) = (reviews / self.approvals as f64, reviews / self.took.as_secs_f64());
        println!("figure: {when}: {} approvals in {:?}, {each:.2} reviews for each", self.approvals, self.took);
        assert!(each <= REVIEWS_PER_APPROVAL || a_second <= REVIEWS_PER_SECOND, "{when}: {reviews} reviews, {a_second} a second");
    }
}

/// Conflicting writes of this replica, and all its writes.
async fn conflicts(replica: &Agent) -> (f64, f64) {
    let patches = async |labels: &[&str]| replica.metric_of("sds_agent_kube_requests_total", labels).await;
    (patches(&["verb=\"patch\"", "code=\"409\""]).await, patches(&["verb=\"patch\""]).await)
}

async fn decides(replica: &Agent) -> bool {
    replica.metric("sds_agent_approver_active").await > 0.5
}

/// The causes for which it began to decide, according to its log.
fn causes(replica: &Agent) -> Vec<String> {
    let lines = replica.log().into_iter().filter(|line| line["message"] == "this replica decides now");
    lines.map(|line| line["cause"].as_str().expect("a cause").to_owned()).collect()
}

/// All parts share one control plane, because its start takes longer than each of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_requests_are_decided_quickly_by_one_replica_and_by_several() {
    let load = Load::start().await;
    let first = load.world.approver("approver-0", "24h").await;
    a_backlog_is_decided_as_fast_as_one_after_another(&load).await;
    let second = two_replicas_do_not_fight(&load, &first).await;
    a_replica_that_is_killed_is_replaced_within_seconds(&load, first, &second).await;
    a_replica_that_is_rolled_over_leaves_no_gap(&load, second).await;
}

/// A single request waits for its own creation too: with many at once, the time per request is shorter.
async fn a_backlog_is_decided_as_fast_as_one_after_another(load: &Load) {
    const ALONE: usize = BACKLOG / 4;
    let start = Instant::now();
    for _ in 0..ALONE {
        load.approved(&load.ask(1, 1).await).await;
    }
    let alone = start.elapsed() / u32::try_from(ALONE).expect("few");
    let cost = load.backlog(BACKLOG).await;
    let at_once = cost.took / u32::try_from(BACKLOG).expect("few");
    println!("figure: an approval takes {alone:?} alone, {at_once:?} of {BACKLOG} at once");
    cost.assert_few_reviews("one replica");
    // A backlog that waits for the webhook's client takes several times as long. The limit leaves room for the creation of the requests.
    assert!(at_once <= 2 * alone, "alone {alone:?}, of many {at_once:?}");
}

async fn two_replicas_do_not_fight(load: &Load, first: &Agent) -> Agent {
    let second = load.world.approver("approver-1", "24h").await;
    let before = [conflicts(first).await, conflicts(&second).await];
    load.backlog(BACKLOG).await.assert_few_reviews("two replicas");
    let after = [conflicts(first).await, conflicts(&second).await];
    let lost = after[0].0 + after[1].0 - before[0].0 - before[1].0;
    let written = after[0].1 + after[1].1 - before[0].1 - before[1].1;
    println!("figure: two replicas: {written} writes for {BACKLOG} approvals, {lost} of them conflicts");
    assert!(lost <= BACKLOG as f64 / 50.0, "{lost} conflicts");
    assert!(written <= BACKLOG as f64 * 1.02, "{written} writes");
    assert!(decides(first).await && !decides(&second).await);
    second
}

/// The replica is killed with requests open. Its pod stays unchanged, because the kubelet restarts it later.
async fn a_replica_that_is_killed_is_replaced_within_seconds(load: &Load, first: Agent, second: &Agent) {
    let paths = load.ask(BACKLOG / 2, CREATORS).await;
    first.kill().await;
    let (start, paths) = (Instant::now(), [paths, load.ask(1, 1).await].concat());
    eventually("another one decides", TAKEOVER, async || if decides(second).await { Ok(()) } else { Err(String::new()) }).await;
    let waited = start.elapsed();
    load.approved(&paths).await;
    println!("figure: another replica decides {waited:?} after the first one was killed");
    assert_eq!(causes(second), ["no other replica decided"]);
    // A controller deletes a pod that does not come back.
    load.world.cluster.delete_now("/api/v1/namespaces/sds-agent-approver/pods/approver-0").await;
}

/// As in a rollout: a new pod starts, then the old one ends, first in the API and then its process.
async fn a_replica_that_is_rolled_over_leaves_no_gap(load: &Load, mut old: Agent) {
    let new = load.world.approver("approver-2", "24h").await;
    assert!(decides(&old).await && !decides(&new).await);
    let paths = load.ask(BACKLOG / 2, CREATORS).await;
    let pod = "/api/v1/namespaces/sds-agent-approver/pods/approver-1";
    load.world.cluster.delete(pod).await;
    assert!(load.world.cluster.get(pod).await["metadata"]["deletionTimestamp"].is_string());
    eventually(
        "the new one decides",
        PATIENCE,
        async || {
            if decides(&new).await && !decides(&old).await { Ok(()) } else { Err(String::new()) }
        },
    )
    .await;
    let paths = [paths, load.ask(BACKLOG / 4, CREATORS).await].concat();
    old.terminate();
    assert!(old.exit(PATIENCE).await.success());
    load.world.cluster.delete_now(pod).await;
    load.approved(&paths).await;
    load.approved(&load.ask(BACKLOG / 4, CREATORS).await).await;
    assert_eq!(causes(&new), ["an older replica has left"], "it took over because requests waited");
    let errors: Vec<Value> = new.log().into_iter().filter(|line| line["level"] == "ERROR").collect();
    assert!(errors.is_empty(), "{errors:?}");
}
