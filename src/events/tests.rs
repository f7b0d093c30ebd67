//! Tests the writer against an in-memory API server, with paused time.

use std::time::UNIX_EPOCH;

use agent_kube::{
    self,
    fake::{FakeApi, Fault},
};
use agent_runtime::clock::{Clock, TestClock};
use issuance::issuer::{Issuer as _, Order, Progress, Retry, embedded::Embedded};
use sds_server::store::{Demand, Lease, Store};
use serde_json::json;
use workload_identity::samples::identity;

use super::*;

fn pod(name: &str) -> PodRef {
    PodRef { namespace: "shop".into(), name: name.into(), uid: format!("uid-{name}").into() }
}

struct Bench {
    api: FakeApi,
    reporter: Reporter,
    metrics: Metrics,
    store: Arc<Store>,
}

impl Bench {
    fn new() -> Self {
        let (api, metrics) = (FakeApi::new(), Metrics::default());
        let node = NodeEnvironment { node_name: Some("n1".into()), pod: Some(pod("sds-agent-x")) };
        let (reporter, writer) = new(api.client(&agent_kube::Metrics::default()), &node, metrics.clone());
        tokio::spawn(writer.run(CancellationToken::new()));
        Self { api, reporter, metrics, store: Store::new().0 }
    }

    fn entry(&self, who: &str) -> (Lease, Arc<Entry>) {
        let id = identity(who);
        let lease = self.store.lease(&id, Demand::Now, Some(pod(who)));
        let entry = self.store.snapshot().into_iter().find(|entry| entry.identity == id).unwrap();
        (lease, entry)
    }

    fn counted(&self, result: Written) -> u64 {
        self.metrics.0.get_or_create(&ResultLabel { result }).get()
    }
}

fn denied() -> Error {
    let (request, reason, message) = ("r-1".into(), "Policy".into(), "not on my watch".into());
    Error::Denied { request, reason, message, retry: Retry::Backoff }
}

async fn svid(id: &Arc<workload_identity::Identity>) -> Svid {
    let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_700_000_000));
    let order = Order { identity: id.clone(), evidence: None, progress: Progress::new().0 };
    let issued = Embedded::new("cluster.local", Arc::new(clock.clone())).unwrap().issue(order).await.unwrap();
    let chain = issued.chain;
    Svid::new(id.clone(), chain, issued.key, clock.now(), clock.now(), String::new())
}

#[tokio::test(start_paused = true)]
async fn a_denial_is_one_warning_on_the_pod_and_its_end_one_event_more() {
    let b = Bench::new();
    let (_lease, entry) = b.entry("a");
    for _ in 0..20 {
        b.reporter.failed(&entry, &denied());
    }
    let warning = b.api.until_count("events", 1).await.remove(0);
    assert_eq!(
        [&warning["type"], &warning["reason"], &warning["action"]],
        ["Warning", "CertificateDenied", "IssueCertificate"].map(|word| json!(word)).each_ref()
    );
    let regarding = json!({"apiVersion": "v1", "kind": "Pod", "namespace": "shop", "name": "a", "uid": "uid-a"});
    assert_eq!((&warning["regarding"], &warning["metadata"]["namespace"]), (&regarding, &json!("shop")));
    assert_eq!((&warning["reportingInstance"], warning["eventTime"].is_string()), (&json!("sds-agent-x"), true));
    let message = warning["note"].as_str().unwrap();
    assert!(message.contains("request r-1 was denied: Policy: not on my watch; its clients wait"), "{message}");

    let svid = svid(&entry.identity).await;
    b.reporter.issued(&entry, &svid);
    b.reporter.issued(&entry, &svid);
    let normal = b.api.until("its end", |api| api.objects("events").into_iter().find(|event| event["type"] == "Normal")).await;
    assert!(normal["note"].as_str().is_some_and(|note| note.contains(&svid.chain.serial)), "{normal}");
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!((b.api.objects("events").len(), b.counted(Written::written)), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_may_have_nothing_is_told_once_and_that_it_may_once() {
    use attest::{CallerObserver as _, Reason};
    let b = Bench::new();
    let error = attest::Error::refused(Reason::no_identity, "it picks profile \"gold\", which is not there");
    for _ in 0..20 {
        b.reporter.refused(&pod("a"), &error);
    }
    let warning = b.api.until_count("events", 1).await.remove(0);
    assert_eq!(
        (&warning["type"], &warning["reason"], &warning["regarding"]["uid"]),
        (&json!("Warning"), &json!("CallerRefused"), &json!("uid-a"))
    );
    assert!(warning["note"].as_str().is_some_and(|note| note.contains("no_identity: it picks profile")), "{warning}");
    for _ in 0..20 {
        b.reporter.served(&pod("a"));
        b.reporter.served(&pod("b"));
    }
    let normal = b.api.until("its end", |api| api.objects("events").into_iter().find(|event| event["type"] == "Normal")).await;
    assert_eq!(normal["reason"], "CallerServed");
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!((b.api.objects("events").len(), b.counted(Written::written)), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_flood_is_bounded_and_nobody_waits_for_it() {
    let b = Bench::new();
    let entries: Vec<_> = (0..200).map(|n| b.entry(&format!("s{n}"))).collect();
    entries.iter().for_each(|(_, entry)| b.reporter.failed(entry, &denied()));
    tokio::time::sleep(Duration::from_secs(30)).await;
    let (written, dropped) = (b.counted(Written::written), b.counted(Written::dropped));
    assert_eq!((written, written + dropped), (u64::from(MAX_EVENTS_PER_MINUTE), 200));
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_written_is_counted_and_not_tried_again() {
    let b = Bench::new();
    b.api.fail("create", "events", Fault::Status(403, json!({"code": 403, "message": "x cannot create resource"})), 1);
    let (_lease, entry) = b.entry("a");
    b.reporter.failed(&entry, &denied());
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!((b.counted(Written::failed), b.api.count("create", "events"), b.api.objects("events").len()), (1, 1, 0));
}

#[test]
fn a_long_story_is_cut_where_a_character_ends() {
    let note = PodEvent { pod: pod("a"), reason: Reason::CertificatePending, message: "ü".repeat(2000) };
    let message = event(&note, "x", jiff::Timestamp::UNIX_EPOCH).note.unwrap();
    assert!(message.len() <= MAX_NOTE_BYTES && message.ends_with("ü…"), "{} bytes", message.len());
}
