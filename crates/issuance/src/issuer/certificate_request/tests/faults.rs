//! Answers of the API server to a create or a delete.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_lost_answer_does_not_make_a_second_request() {
    for fault in [Fault::LoseAnswer, Fault::CarryOutAndHang] {
        let world = World::new();
        world.api.fail("create", CR, fault.clone(), 1);
        let (task, mut stage) = world.order("cart");
        let request = world.request().await;
        timeout(MINUTE, stage.wait_for(Option::is_some)).await.unwrap().unwrap();
        world.issue(&request);
        end(task).await.unwrap();
        world.api.until_count(CR, 0).await;
        assert!(world.api.count("create", CR) <= 2, "{fault:?}");
        assert_eq!(world.api.count("delete", CR), 1, "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_resolved_by_name_where_the_watch_is_blind() {
    let world = World::new();
    timeout(MINUTE, world.issuer.inner.requests.synced()).await.unwrap();
    world.api.until("the watch", |api| (api.count("watch", CR) == 1).then_some(())).await;
    world.api.fail("watch", CR, Fault::Hang, 1);
    world.api.cut_watches(false);
    world.api.fail("create", CR, Fault::LoseAnswer, 1);
    let (task, mut stage) = world.order("cart");
    timeout(Duration::from_secs(5), stage.wait_for(Option::is_some)).await.unwrap().unwrap();
    assert_eq!((world.api.count("create", CR), world.api.count("get", CR)), (2, 1));
    world.issue(&world.request().await);
    end(task).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_foreign_request_of_the_same_name_is_neither_used_nor_deleted() {
    let world = World::new();
    let name = world.issuer.inner.requests.agent().request_name(&identity("cart"));
    let next = format!("{}1", name.strip_suffix('0').unwrap());
    world.api.put(CR, json!({"metadata": {"name": next, "namespace": "sds-agent"}, "spec": {"request": "Zm9yZWlnbg=="}}));
    let error = end(world.order("cart").0).await.unwrap_err();
    assert!(error.to_string().contains("a request of this name exists that the agent did not make"), "{error}");
    tokio::time::sleep(MINUTE).await;
    assert_eq!(world.api.objects(CR).len(), 1);
    assert_eq!(world.api.count("delete", CR), 0);
}

#[tokio::test(start_paused = true)]
async fn a_sure_refusal_is_told_and_costs_no_delete() {
    let forbidden = json!({"kind": "Status", "code": 403, "reason": "Forbidden",
        "message": "certificaterequests.cert-manager.io is forbidden: User \"x\" cannot create resource \"certificaterequests\""});
    let busy = json!({"kind": "Status", "code": 429, "reason": "TooManyRequests", "details": {"retryAfterSeconds": 9}});
    let invalid = json!({"kind": "Status", "code": 422, "reason": "Invalid", "message": "spec.duration: nonsense"});
    for (fault, retry, text) in [
        (
            Fault::Status(403, forbidden),
            Retry::Backoff,
            "lacks the verb create on certificaterequests.cert-manager.io in namespace sds-agent",
        ),
        (Fault::Text(404, "404 page not found"), Retry::Backoff, "cert-manager's CRDs are not installed"),
        (Fault::Status(429, busy), Retry::After(Duration::from_secs(9)), "asks to wait 9 s"),
        (Fault::Status(422, invalid), Retry::Configuration, "spec.duration: nonsense"),
    ] {
        let world = World::new();
        world.api.fail("create", CR, fault, 1);
        let error = end(world.order("cart").0).await.unwrap_err();
        assert_eq!(error.retry(), retry, "{error}");
        assert!(error.to_string().contains(text), "{error}");
        tokio::time::sleep(MINUTE).await;
        assert_eq!(writes(&world.api), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_in_trouble_is_asked_a_few_times_and_cleaned_up_behind() {
    let broken = || Fault::Status(500, json!({"kind": "Status", "code": 500, "message": "etcdserver: request timed out"}));
    let world = World::new();
    world.api.fail("create", CR, broken(), 2);
    let (task, _) = world.order("cart");
    world.issue(&world.request().await);
    end(task).await.unwrap();
    assert_eq!(world.api.count("create", CR), 3);

    let world = World::new();
    world.api.fail("create", CR, broken(), 4);
    let error = end(world.order("cart").0).await.unwrap_err();
    assert_eq!(error.retry(), Retry::Backoff);
    assert!(error.to_string().contains("the API server answered 500: etcdserver: request timed out"), "{error}");
    world.api.until("a delete, to be sure", |api| (api.count("delete", CR) == 1).then_some(())).await;

    let world = World::new();
    world.api.fail("create", CR, Fault::Hang, usize::MAX);
    let error = end(world.order("cart").0).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_slow_delete_holds_nobody_up_and_is_tried_again() {
    let world = World::new();
    world.api.fail("delete", CR, Fault::Hang, 1);
    world.api.fail("delete", CR, Fault::Status(503, json!({"kind": "Status", "code": 503})), 2);
    let (task, _) = world.order("cart");
    let request = world.request().await;
    world.issue(&request);
    let start = Instant::now();
    end(task).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(1));
    world.api.until_count(CR, 0).await;
    assert_eq!(world.api.count("delete", CR), 4);
}

#[tokio::test(start_paused = true)]
async fn an_order_without_a_working_watch_fails_with_its_reason_and_recovers() {
    let api = FakeApi::new();
    let forbidden = json!({"kind": "Status", "code": 403, "reason": "Forbidden",
        "message": "certificaterequests.cert-manager.io is forbidden: User \"x\" cannot list resource \"certificaterequests\""});
    api.fail("list", CR, Fault::Status(403, forbidden), usize::MAX);
    let world = World::with(RequestNamespace::Fixed("sds-agent".into()), issuer_ref(), api);
    let error = end(world.order("cart").0).await.unwrap_err();
    assert!(error.to_string().contains("lacks the verb list on certificaterequests.cert-manager.io in namespace sds-agent"), "{error}");
    assert_eq!(error.retry(), Retry::Backoff);
    assert_eq!(writes(&world.api), (0, 0));

    world.api.heal();
    timeout(MINUTE, world.issuer.inner.requests.synced()).await.unwrap();
    let (task, _) = world.order("cart");
    world.issue(&world.request().await);
    end(task).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_missing_right_to_watch_is_asked_about_less_and_less_often() {
    let api = FakeApi::new();
    let forbidden = json!({"kind": "Status", "code": 403, "reason": "Forbidden",
        "message": "certificaterequests.cert-manager.io is forbidden: User \"x\" cannot watch resource \"certificaterequests\""});
    api.fail("watch", CR, Fault::Status(403, forbidden), usize::MAX);
    let world = World::with(RequestNamespace::Fixed("sds-agent".into()), issuer_ref(), api);
    tokio::time::sleep(60 * MINUTE).await;
    let lists = world.api.count("list", CR);
    assert!(lists <= 60 * 60 / 15 + 10, "{lists} lists in an hour");

    world.api.heal();
    timeout(2 * MINUTE, world.issuer.inner.requests.synced()).await.unwrap();
    let (task, _) = world.order("cart");
    world.issue(&world.request().await);
    end(task).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn without_the_right_to_delete_requests_are_left_to_the_sweep() {
    let world = World::new();
    let forbidden = json!({"kind": "Status", "code": 403, "reason": "Forbidden",
        "message": "certificaterequests.cert-manager.io is forbidden: User \"x\" cannot delete resource \"certificaterequests\""});
    world.api.fail("delete", CR, Fault::Status(403, forbidden), usize::MAX);
    for n in 0..20 {
        let (task, mut stage) = world.order(&format!("cart-{n}"));
        let name = timeout(MINUTE, stage.wait_for(Option::is_some)).await.unwrap().unwrap().as_ref().unwrap().request.clone();
        world.issue(&world.api.object(CR, "sds-agent", &name).unwrap());
        end(task).await.unwrap();
    }
    tokio::time::sleep(4 * MINUTE).await;
    let calls = world.api.count("delete", CR);
    assert!((1..=4).contains(&calls), "{calls} calls; no more than run at the same time");
    tokio::time::sleep(60 * MINUTE).await;
    // Each sweep tries again, and a sweep comes after 5 to 10 min.
    let calls = world.api.count("delete", CR) - calls;
    assert!((6..=4 * 12).contains(&calls), "{calls} calls in an hour");

    // The right is granted: a later sweep deletes all of them.
    world.api.heal();
    tokio::time::sleep(20 * MINUTE).await;
    assert_eq!(world.api.objects(CR).len(), 0);
}
