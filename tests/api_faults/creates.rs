//! Faults of creates and deletes.

use super::*;

fn busy(seconds: u64) -> Fault {
    Fault::Bytes(http(429, &["content-type: text/plain", &format!("retry-after: {seconds}")], "Too many requests, please try again later."))
}

fn broken(code: u16) -> Fault {
    let status = json!({"kind": "Status", "code": code, "message": "etcdserver: request timed out"}).to_string();
    Fault::Bytes(http(code, &["content-type: application/json"], &status))
}

/// The watch delivers nothing, so only the name shows the result of the request: a 409, and then a read of the existing object.
#[tokio::test(start_paused = true)]
async fn a_lost_response_is_resolved_by_the_name() {
    for fault in [Fault::Swallow, Fault::Half] {
        let world = World::new();
        world.watching().await;
        world.wire.fail("watch", CR, Fault::HeadAndHang, 1);
        world.wire.api.cut_watches(false);
        world.until("the watch that delivers nothing", |api| (api.count("watch", CR) == 2).then_some(())).await;
        world.wire.fail("create", CR, fault.clone(), 1);
        let lease = world.want("a");
        world.until("the request is looked up by its name", |api| (api.count("get", CR) == 1).then_some(())).await;
        assert_eq!(world.seen("create").len(), 2, "{fault:?}");
        world.assert_served(&[lease], 1).await;
        assert_eq!((world.requests(Verb::create, Code::Error), world.requests(Verb::create, Code::Status(409))), (1, 1), "{fault:?}");
        assert_eq!(world.log.lines("an earlier create had arrived").len(), 1, "{fault:?}");
        assert_eq!(world.log.lines("no new certificate").len(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_the_watch_shows_needs_no_answer() {
    let world = World::new();
    world.watching().await;
    world.wire.fail("create", CR, Fault::HeadAndHang, 1);
    let start = Instant::now();
    world.assert_served(&[world.want("a")], 1).await;
    assert!(start.elapsed() < 5 * SECOND, "{:?}", start.elapsed());
    assert_eq!(world.seen("create").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_create_that_hangs_ends_and_is_asked_again_under_the_same_name() {
    let world = World::new();
    world.watching().await;
    world.wire.fail("create", CR, Fault::Hang, 1);
    let start = Instant::now();
    world.assert_served(&[world.want("a")], 1).await;
    assert!(start.elapsed() < 32 * SECOND, "{:?}", start.elapsed());
    assert_eq!((world.seen("create").len(), world.requests(Verb::create, Code::Timeout)), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_server_in_trouble_is_asked_a_few_times_and_nobody_multiplies_them() {
    for code in [500, 503, 504] {
        let world = World::new();
        world.watching().await;
        world.wire.fail("create", CR, broken(code), 3);
        world.assert_served(&[world.want("a")], 1).await;
        assert_eq!((world.seen("create").len(), world.requests(Verb::create, Code::Status(code))), (4, 3));
        assert_eq!(world.log.lines("no new certificate").len(), 0, "the request has failed already");
    }
    let world = World::new();
    world.watching().await;
    world.wire.fail("create", CR, broken(500), 4);
    let lease = world.want("a");
    world.assert_served(&[lease], 1).await;
    assert_eq!(world.seen("create").len(), 5);
    let told = world.log.lines("no new certificate");
    assert_eq!(told.len(), 1);
    assert!(told[0]["cause"].as_str().unwrap().ends_with("the API server answered 500: etcdserver: request timed out"), "{}", told[0]);
}

#[tokio::test(start_paused = true)]
async fn a_429_with_a_header_holds_back_every_create_of_the_process() {
    let world = World::new();
    world.watching().await;
    world.wire.fail("create", CR, busy(9), 1);
    let first = world.want("a");
    world.until("the 429", |_| (!world.seen("create").is_empty()).then_some(())).await;
    let refused = Instant::now();
    tokio::time::sleep(SECOND).await;
    let leases: Vec<Lease> = ["b", "c", "d"].map(|who| world.want(who)).into_iter().chain([first]).collect();
    world.assert_served(&leases, 4).await;
    let creates = world.seen("create");
    assert_eq!(creates.len(), 5, "one try for each, and one again");
    assert!(
        creates[1..].iter().all(|seen| seen.at - refused >= 9 * SECOND),
        "{:?}",
        creates.iter().map(|s| s.at - refused).collect::<Vec<_>>()
    );
    assert_eq!(world.log.lines("the API server asks to wait").len(), 1);
    assert_eq!(world.log.lines("accepts these requests again").len(), 1);
    let failed = world.log.lines("no new certificate");
    assert_eq!(failed.len(), 1, "only the first of them has failed");
    assert!(failed[0]["cause"].as_str().unwrap().ends_with("the API server is busy and asks to wait 9 s"), "{}", failed[0]);
    assert!(world.metric("sds_agent_kube_request_wait_seconds_count{cause=\"retry_after\"}") >= 3.0);
}

#[tokio::test(start_paused = true)]
async fn a_long_retry_after_gives_the_slots_back_and_is_obeyed() {
    let world = World::new();
    world.watching().await;
    world.wire.fail("create", CR, busy(120), 1);
    let first = world.want("a");
    world.until("the 429", |_| (!world.seen("create").is_empty()).then_some(())).await;
    let refused = Instant::now();
    tokio::time::sleep(SECOND).await;
    let second = world.want("b");
    tokio::time::sleep(2 * SECOND).await;
    let waiting = world.log.lines("no new certificate");
    assert_eq!(waiting.len(), 2, "the agent itself rejects the second request at once");
    assert!(waiting[1]["retry_in_seconds"].as_u64().unwrap() >= 115, "{}", waiting[1]);
    world.assert_served(&[first, second], 2).await;
    let creates = world.seen("create");
    assert_eq!(creates.len(), 3);
    assert!(creates[1].at - refused >= 120 * SECOND && creates[1].at - refused <= 250 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn deletes_obey_too_and_a_lost_answer_of_theirs_leaves_nothing() {
    let world = World::new();
    world.watching().await;
    world.wire.fail("delete", CR, busy(20), 1);
    world.wire.fail("delete", CR, Fault::Swallow, 1);
    world.assert_served(&[world.want("a")], 1).await;
    world.until("the answer was lost", |_| (world.seen("delete").len() == 3).then_some(())).await;
    let deletes = world.seen("delete");
    assert!(deletes[1].at - deletes[0].at >= 20 * SECOND);
    tokio::time::sleep(SECOND).await;
    assert_eq!(world.requests(Verb::delete, Code::Status(404)), 1);

    // A 503 with a header from a proxy, for one of many requests.
    let world = World::new();
    world.watching().await;
    world.wire.fail("delete", CR, Fault::Bytes(http(503, &["retry-after: 15"], "shutting down")), 1);
    let leases: Vec<Lease> = (0..6).map(|n| world.want(&format!("w{n}"))).collect();
    world.assert_served(&leases, 6).await;
    let deletes = world.seen("delete");
    let held = deletes.iter().filter(|seen| seen.at - deletes[0].at < 15 * SECOND).count();
    assert!(held <= 4, "only requests in progress: {held}");
    assert_eq!(world.log.lines("the API server asks to wait").len(), 1);
}

/// A hundred new identities make two hundred writes, five times the burst.
#[tokio::test(start_paused = true)]
async fn the_process_keeps_to_its_rate_and_creates_go_first() {
    let world = World::new();
    world.watching().await;
    let start = Instant::now();
    let leases: Vec<Lease> = (0..100).map(|n| world.want(&format!("w{n}"))).collect();
    world.assert_served(&leases, 100).await;
    let mut writes: Vec<Instant> = ["create", "delete"].iter().flat_map(|verb| world.seen(verb)).map(|seen| seen.at).collect();
    writes.sort();
    assert_eq!(writes.len(), 200);
    for (n, at) in writes.iter().enumerate().skip(45) {
        assert!((*at - writes[n - 45]).as_millis() >= 200, "45 writes within {:?}", *at - writes[n - 45]);
    }
    let took = start.elapsed();
    assert!(took >= 7 * SECOND && took <= 9 * SECOND, "200 writes, 40 of them at once, at 20/s: {took:?}");
    let last = world.seen("create").last().unwrap().at - start;
    assert!(last < took - SECOND, "the last create after {last:?} of {took:?}");
    assert!(world.metric("sds_agent_kube_request_wait_seconds_count{cause=\"rate_limit\"}") >= 150.0);
}

#[tokio::test(start_paused = true)]
async fn the_four_kinds_of_403_are_told_apart_and_all_of_them_are_tried_again() {
    let forbidden = |message: &str| json!({"kind": "Status", "code": 403, "reason": "Forbidden", "message": message});
    let terminating = json!({"kind": "Status", "code": 403, "reason": "Forbidden", "message": "unable to create new content",
        "details": {"causes": [{"reason": "NamespaceTerminating", "message": "x", "field": "y"}]}});
    for (status, words) in [
        (forbidden("certificaterequests.cert-manager.io is forbidden: User \"x\" cannot create resource \"y\""), "lacks the verb create"),
        (
            forbidden("ValidatingAdmissionPolicy 'p' with binding 'b' denied request: not yours"),
            "refused by an admission policy: Validating",
        ),
        (forbidden("exceeded quota: crs, requested: 1, used: 5, limited: 5"), "refused by a quota: exceeded quota: crs"),
        (terminating, "the namespace is being deleted"),
    ] {
        let world = World::new();
        world.watching().await;
        world.wire.fail("create", CR, Fault::Bytes(http(403, &["content-type: application/json"], &status.to_string())), 1);
        world.assert_served(&[world.want("a")], 1).await;
        let told = world.log.lines("no new certificate");
        assert_eq!((told.len(), world.seen("create").len()), (1, 2), "{words}");
        assert!(told[0]["cause"].as_str().unwrap().contains(words), "{}", told[0]);
        assert_eq!(world.seen("delete").len(), 1, "a sure refusal costs no delete");
    }
}
