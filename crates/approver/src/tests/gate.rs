//! The write gate.

use super::*;

/// With slow responses of cert-manager's webhook, requests are judged concurrently and written one at a time.
#[tokio::test(start_paused = true)]
async fn decisions_are_judged_side_by_side_and_written_one_at_a_time() {
    let api = FakeApi::new();
    put_pod(&api);
    api.delay("patch", CR, Duration::from_millis(300));
    api.delay("get", "pods", Duration::from_secs(2));
    let _replica = Replica::start(&api, false);
    let start = Instant::now();
    for n in 0..MAX_WORKERS_PER_NODE {
        api.put(CR, object(&format!("r{n}")));
    }
    api.until("all are being judged", |api| (api.count("get", "pods") == MAX_WORKERS_PER_NODE).then_some(())).await;
    assert!(start.elapsed() < Duration::from_secs(1), "live reads are concurrent");
    for n in 0..MAX_WORKERS_PER_NODE {
        assert_eq!(decided(&api, &format!("r{n}")).await["type"], "Approved");
    }
    assert_eq!(api.most_at_once("patch", CR), 1);
}

#[tokio::test(start_paused = true)]
async fn while_answers_come_quickly_a_few_are_on_their_way_at_once() {
    let api = FakeApi::new();
    put_pod(&api);
    api.delay("patch", CR, Duration::from_millis(20));
    let _replica = Replica::start(&api, true);
    tokio::time::sleep(Duration::from_secs(1)).await;
    for n in 0..400 {
        api.put(CR, object(&format!("r{n}")));
    }
    for n in 0..400 {
        decided(&api, &format!("r{n}")).await;
    }
    assert_eq!(api.most_at_once("patch", CR), crate::limit::MAX_IN_FLIGHT);
}

/// One write gets no response before the client's timeout.
#[tokio::test(start_paused = true)]
async fn a_write_without_an_answer_holds_up_the_others_for_a_moment_only() {
    let api = FakeApi::new();
    put_pod(&api);
    let replica = Replica::start(&api, true);
    tokio::time::sleep(Duration::from_secs(1)).await;
    api.fail("patch", CR, Fault::Hang, 1);
    let start = Instant::now();
    for n in 0..20 {
        api.put(CR, object(&format!("r{n}")));
    }
    let approved = |api: &FakeApi| api.objects(CR).iter().filter(|o| o["status"]["conditions"][0]["type"] == "Approved").count();
    api.until("all but the stuck write", |api| (approved(api) == 19).then_some(())).await;
    assert!((Duration::from_secs(5)..Duration::from_secs(6)).contains(&start.elapsed()), "{:?}", start.elapsed());
    api.until("the stuck write", |api| (approved(api) == 20).then_some(())).await;
    // The extra slot has been taken back.
    api.delay("patch", CR, Duration::from_millis(300));
    api.forget_at_once();
    for n in 20..40 {
        api.put(CR, object(&format!("r{n}")));
    }
    api.until("all", |api| (approved(api) == 40).then_some(())).await;
    assert_eq!((api.most_at_once("patch", CR), replica.metrics.errors(Step::write)), (1, 1));
}

/// The pod is deleted while the approval of its request waits for the gate.
#[tokio::test(start_paused = true)]
async fn what_was_judged_before_it_waited_is_judged_again() {
    for watches_pods in [true, false] {
        let api = FakeApi::new();
        put_pod(&api);
        let _replica = Replica::start(&api, watches_pods);
        tokio::time::sleep(Duration::from_secs(1)).await;
        api.delay("patch", CR, Duration::from_secs(3));
        api.put(CR, object("first"));
        api.until("the first is being written", |api| (api.count("patch", CR) == 1).then_some(())).await;
        api.put(CR, object("second"));
        tokio::time::sleep(Duration::from_secs(1)).await;
        api.remove("pods", "shop", "cart-1");
        assert_eq!(decided(&api, "second").await["reason"], "PodGone", "with a watch: {watches_pods}");
        assert_eq!(decided(&api, "first").await["type"], "Approved");
    }
}

/// A denial depends on a live read, which becomes too old while it waits for the gate. The denial is written nevertheless.
#[tokio::test(start_paused = true)]
async fn a_denial_is_written_in_its_turn_however_slow_the_writes_are() {
    let api = FakeApi::new();
    put_pod(&api);
    let _replica = Replica::start(&api, true);
    tokio::time::sleep(Duration::from_secs(1)).await;
    api.delay("patch", CR, Duration::from_secs(3));
    let mut gone = object("gone");
    gone["metadata"]["annotations"]["sds-agent.io/pod-uid"] = json!("u-0");
    let start = Instant::now();
    for n in 0..5 {
        api.put(CR, object(&format!("r{n}")));
    }
    api.put(CR, gone);
    api.until("it has been judged", |api| (api.count("get", "pods") == 1).then_some(())).await;
    for n in 5..10 {
        api.put(CR, object(&format!("r{n}")));
    }
    assert_eq!(decided(&api, "gone").await["reason"], "PodGone");
    assert!(start.elapsed() <= Duration::from_secs(7 * 3), "{:?}", start.elapsed());
    assert_eq!(api.count("get", "pods"), 2, "an old live read is repeated");
}
