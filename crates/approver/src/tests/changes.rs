//! Changes of the configuration: requests under superseded rules, under new rules, and requests that are judged again.

use workload_identity::Profile;

use super::*;
use crate::queue::MAX_RESTING_PER_NODE;

const OVERLAP: Duration = Duration::from_secs(600);

/// The test rules with an overlap and a lifetime of `hours`.
fn lasting(hours: u64) -> Rules {
    let mut rules = Rules { overlap: OVERLAP, ..rules() };
    let profile = Profile { lifetime: Duration::from_secs(hours * 3600), ..(*rules.resolver.default_profile).clone() };
    rules.resolver.default_profile = profile.into();
    rules
}

/// A request for a certificate with a lifetime of `hours`.
fn asked(name: &str, hours: u64) -> Value {
    let mut request = object(name);
    request["spec"]["duration"] = json!(format!("{hours}h0m0s"));
    request
}

fn undecided(api: &FakeApi, name: &str) -> bool {
    let request = api.objects(CR).into_iter().find(|request| request["metadata"]["name"] == name).unwrap();
    request["status"]["conditions"].is_null()
}

/// The approver gets the new file before the agents.
#[tokio::test(start_paused = true)]
async fn agents_with_the_superseded_file_are_approved_in_the_overlap() {
    let api = FakeApi::new();
    put_pod(&api);
    let replica = Replica::by(&api, true, lasting(1));
    replica.change(lasting(2));
    tokio::time::sleep(OVERLAP / 2).await;
    for (name, hours) in [("former", 1), ("new", 2)] {
        api.put(CR, asked(name, hours));
        assert_eq!(decided(&api, name).await["type"], "Approved", "{name}");
    }
    assert_eq!(replica.metrics.by_superseded.get(), 1);
    tokio::time::sleep(OVERLAP).await;
    api.put(CR, asked("late", 1));
    let start = Instant::now();
    assert_eq!(decided(&api, "late").await["reason"], "ProfileMismatch");
    assert!(start.elapsed() >= Duration::from_secs(120), "a mismatch is denied only after the deferral: {:?}", start.elapsed());
    assert_eq!(replica.metrics.count(Decided::denied, "ProfileMismatch"), 1);
}

/// An agent gets the new file before the approver.
#[tokio::test(start_paused = true)]
async fn agents_that_have_the_new_file_first_wait_for_the_approvers() {
    let api = FakeApi::new();
    put_pod(&api);
    let replica = Replica::by(&api, true, lasting(1));
    api.put(CR, asked("ahead", 2));
    tokio::time::sleep(Duration::from_secs(90)).await;
    assert!(undecided(&api, "ahead"));
    let start = Instant::now();
    replica.change(lasting(2));
    assert_eq!(decided(&api, "ahead").await["type"], "Approved");
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!((replica.metrics.by_superseded.get(), replica.metrics.pending.get()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_request_of_an_issuer_that_came_later_is_looked_at_then_and_only_then() {
    let api = FakeApi::new();
    put_pod(&api);
    let mut other = lasting(1);
    other.issuers[0].issuer.name = "other-ca".into();
    let replica = Replica::by(&api, true, other.clone());
    api.put(CR, asked("early", 1));
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert!(undecided(&api, "early"));
    let lists = api.count("list", CR);
    replica.change(lasting(1));
    assert_eq!(decided(&api, "early").await["type"], "Approved");
    assert_eq!(api.count("list", CR), lists + 1);
    // A change that keeps the issuers does not list the requests again.
    replica.change(lasting(2));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(api.count("list", CR), lists + 1);
    // Requests of a removed issuer are ignored.
    replica.change(other);
    tokio::time::sleep(Duration::from_secs(1)).await;
    api.put(CR, asked("gone", 1));
    tokio::time::sleep(OVERLAP).await;
    assert!(undecided(&api, "gone"));
}

#[tokio::test(start_paused = true)]
async fn a_waiting_request_of_a_removed_agent_is_denied_at_once() {
    let api = FakeApi::new();
    put_pod(&api);
    let replica = Replica::by(&api, true, lasting(1));
    api.put(CR, asked("waits", 2));
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(undecided(&api, "waits"));
    replica.change(Rules { agents: ["system:serviceaccount:a:b".to_owned()].into(), ..lasting(2) });
    let start = Instant::now();
    assert_eq!(decided(&api, "waits").await["reason"], "NotTheAgent");
    api.put(CR, asked("later", 1));
    assert_eq!(decided(&api, "later").await["reason"], "NotTheAgent");
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(replica.metrics.count(Decided::denied, "NotTheAgent"), 2);
}

/// The rules change during the read of the pod: the request is judged by the new rules.
#[tokio::test(start_paused = true)]
async fn a_decision_by_rules_that_were_replaced_meanwhile_is_not_written() {
    let api = FakeApi::new();
    let slow = json!({
        "metadata": {"namespace": "shop", "name": "cart-1", "uid": "u-1"}, "spec": {"nodeName": "n1", "serviceAccountName": "cart"},
    });
    api.fail("get", "pods", Fault::Late(Duration::from_secs(5), slow), 1);
    let replica = Replica::by(&api, false, lasting(1));
    api.put(CR, asked("a", 1));
    api.until("the pod is being read", |api| (api.count("get", "pods") == 1).then_some(())).await;
    replica.change(Rules { agents: ["system:serviceaccount:a:b".to_owned()].into(), ..lasting(1) });
    assert_eq!(decided(&api, "a").await["reason"], "NotTheAgent");
}

/// An agent requests names that no rule allows, in a loop: `MAX_RESTING_PER_NODE` of its requests wait, the others are denied immediately.
#[tokio::test(start_paused = true)]
async fn no_more_than_so_many_requests_wait_for_a_file() {
    let api = FakeApi::new();
    put_pod(&api);
    let replica = Replica::by(&api, true, lasting(1));
    tokio::time::sleep(Duration::from_secs(1)).await;
    for n in 0..MAX_RESTING_PER_NODE + 100 {
        api.put(CR, asked(&format!("r{n}"), 2));
    }
    tokio::time::sleep(Duration::from_secs(60)).await;
    let denied = replica.metrics.count(Decided::denied, "ProfileMismatch");
    assert!((100 - WORKERS as u64..=100).contains(&denied), "{denied}");
    // The waiting requests do not delay a request that the rules allow.
    api.put(CR, asked("good", 1));
    let start = Instant::now();
    assert_eq!(decided(&api, "good").await["type"], "Approved");
    assert!(start.elapsed() < Duration::from_secs(1));
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(replica.metrics.count(Decided::denied, "ProfileMismatch"), MAX_RESTING_PER_NODE as u64 + 100);
}

/// The rules change while decisions are being written.
#[tokio::test(start_paused = true)]
async fn a_change_during_a_write_is_no_conflict_with_oneself() {
    let api = FakeApi::new();
    put_pod(&api);
    api.delay("patch", CR, Duration::from_millis(300));
    let replica = Replica::start(&api, true);
    tokio::time::sleep(Duration::from_secs(1)).await;
    for n in 0..4 {
        api.put(CR, object(&format!("r{n}")));
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let newer = replica.active_rules.borrow().denying(["another-node".to_owned()].into());
    replica.active_rules.send_replace(Arc::new(newer));
    for n in 0..4 {
        assert_eq!(decided(&api, &format!("r{n}")).await["type"], "Approved");
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((replica.metrics.conflicts.get(), replica.metrics.active.get(), replica.metrics.denied_nodes.get()), (0, 1, 1));
}

/// The test rules with requests in this namespace.
fn requesting_in(namespace: cert_manager::RequestNamespace) -> Rules {
    let mut rules = lasting(1);
    rules.issuers[0].namespace = namespace;
    rules
}

/// Requests of other namespaces are not read, so their size and number do not matter.
#[tokio::test(start_paused = true)]
async fn only_the_namespaces_of_the_agents_requests_are_watched() {
    use cert_manager::RequestNamespace::{Fixed, Workload};
    let api = FakeApi::new();
    put_pod(&api);
    let replica = Replica::by(&api, true, requesting_in(Fixed("sds-agent".into())));
    let put = |name: &str, namespace: &str| {
        let mut request = asked(name, 1);
        request["metadata"]["namespace"] = json!(namespace);
        api.put(CR, request);
    };
    put("elsewhere", "tenant");
    put("here", "sds-agent");
    assert_eq!(decided(&api, "here").await["type"], "Approved");
    assert!(undecided(&api, "elsewhere") && replica.metrics.pending.get() == 0);

    // Agents with the former file are served until they have the new one, and its namespace is watched at once.
    replica.change(requesting_in(Fixed("mesh".into())));
    put("former", "sds-agent");
    put("new", "mesh");
    for name in ["former", "new"] {
        assert_eq!(decided(&api, name).await["type"], "Approved", "{name}");
    }
    assert!(undecided(&api, "elsewhere"));

    replica.change(requesting_in(Workload));
    assert_eq!(decided(&api, "elsewhere").await["reason"], "ProfileMismatch", "the namespace is not the pod's");
}
