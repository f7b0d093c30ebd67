//! Ended requests are removed by the deciding replica.

use super::*;
use crate::retention::{KEEP_FOR, MAX_ENDED_PER_NODE};

fn names(api: &FakeApi) -> Vec<String> {
    api.objects(CR).iter().map(|request| request["metadata"]["name"].as_str().unwrap().to_owned()).collect()
}

/// A request that is decided already, with these conditions.
fn decided_before(name: &str, conditions: &Value) -> Value {
    let mut request = object(name);
    request["status"] = json!({"conditions": conditions});
    request
}

fn condition(kind: &str, status: &str, reason: &str) -> Value {
    json!({"type": kind, "status": status, "reason": reason, "lastTransitionTime": "2027-01-15T08:00:00Z"})
}

#[tokio::test(start_paused = true)]
async fn a_denied_request_is_removed_after_ten_minutes_and_a_pending_one_is_not() {
    let api = FakeApi::new();
    put_pod(&api);
    let approved = condition("Approved", "True", "approver.sds-agent.io");
    api.put(CR, decided_before("pending", &json!([approved, condition("Ready", "False", "Pending")])));
    api.put(CR, decided_before("signed", &json!([approved, condition("Ready", "True", "Issued")])));
    api.put(CR, decided_before("failed", &json!([approved, condition("Ready", "False", "Failed")])));
    api.put(CR, decided_before("invalid", &json!([condition("InvalidRequest", "True", "Username")])));
    let mut another = decided_before("another-issuer", &json!([condition("Denied", "True", "No")]));
    another["spec"]["issuerRef"]["name"] = json!("public-ca");
    api.put(CR, another);
    // It was pending for a long time before it failed.
    let mut failed_late = decided_before("failed-late", &json!([approved, condition("Ready", "False", "Failed")]));
    failed_late["status"]["conditions"][1]["lastTransitionTime"] = json!("2027-01-15T06:00:00Z");
    failed_late["status"]["failureTime"] = json!("2027-01-15T08:00:00Z");
    api.put(CR, failed_late);
    let replica = Replica::start(&api, true);
    let mut bad = object("denied");
    bad["spec"]["isCA"] = json!(true);
    api.put(CR, bad);
    assert_eq!(decided(&api, "denied").await["type"], "Denied");
    tokio::time::sleep(KEEP_FOR - Duration::from_secs(2)).await;
    assert_eq!(api.count("delete", CR), 0);
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(names(&api), ["another-issuer", "pending"]);
    assert_eq!(replica.metrics.removed.get(), 5);
}

/// The number of objects stays bounded without a ResourceQuota.
#[tokio::test(start_paused = true)]
async fn a_flood_leaves_a_bounded_number_of_objects() {
    let api = FakeApi::new();
    put_pod(&api);
    let _replica = Replica::start(&api, true);
    // The fake's pages are not a snapshot.
    api.until("it watches", |api| (api.count("watch", CR) == 1).then_some(())).await;
    for n in 0..2 * MAX_ENDED_PER_NODE {
        let mut bad = object(&format!("r{n}"));
        bad["spec"]["isCA"] = json!(true);
        api.put(CR, bad);
    }
    tokio::time::sleep(Duration::from_secs(90)).await;
    assert_eq!((names(&api).len(), api.count("delete", CR)), (MAX_ENDED_PER_NODE, MAX_ENDED_PER_NODE));
}

#[tokio::test(start_paused = true)]
async fn a_removal_that_is_forbidden_is_tried_once_a_minute() {
    let api = FakeApi::new();
    put_pod(&api);
    let forbidden = json!({"kind": "Status", "code": 403, "reason": "Forbidden", "message": "User \"x\" cannot delete resource \"certificaterequests\""});
    api.fail("delete", CR, Fault::Status(403, forbidden), usize::MAX);
    for n in 0..20 {
        api.put(CR, decided_before(&format!("r{n}"), &json!([condition("Denied", "True", "No")])));
    }
    let replica = Replica::start(&api, true);
    tokio::time::sleep(KEEP_FOR + Duration::from_secs(301)).await;
    let tries = api.count("delete", CR);
    assert!((5..=14).contains(&tries), "{tries}");
    assert_eq!(replica.metrics.errors(Step::remove), tries as u64);
    assert_eq!(names(&api).len(), 20);
}

/// A policy that was rendered for other issuers rejects the removal of one request.
#[tokio::test(start_paused = true)]
async fn a_removal_that_a_policy_rejects_delays_no_other() {
    let api = FakeApi::new();
    put_pod(&api);
    let rejected =
        json!({"kind": "Status", "code": 403, "reason": "Forbidden", "message": "ValidatingAdmissionPolicy 'x' denied request: no"});
    api.fail("delete", CR, Fault::Status(403, rejected), 5);
    for n in 0..20 {
        api.put(CR, decided_before(&format!("r{n:02}"), &json!([condition("Denied", "True", "No")])));
    }
    let _replica = Replica::start(&api, true);
    tokio::time::sleep(KEEP_FOR + Duration::from_secs(10)).await;
    assert_eq!(names(&api).len(), 5);
    tokio::time::sleep(Duration::from_secs(70)).await;
    assert_eq!(names(&api).len(), 0, "each is tried again");
}
