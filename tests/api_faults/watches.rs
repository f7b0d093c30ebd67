//! Faults of the watch.

use agent_kube::labels::Ended;

use super::*;

impl World {
    fn lists(&self) -> usize {
        self.seen("list").len()
    }

    fn restarts(&self, reason: Ended) -> u64 {
        self.kube_metrics.restarts(Resource::certificaterequests, reason)
    }
}

/// The resource version from which a watch was requested.
fn version(seen: &Seen) -> u64 {
    let (_, rest) = seen.target.split_once("resourceVersion=").unwrap();
    rest.split('&').next().unwrap().parse().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_watch_is_resumed_from_its_last_bookmark() {
    let world = World::new();
    world.watching().await;
    let first = world.seen("watch").remove(0);
    assert!(first.target.contains("allowWatchBookmarks=true"), "{}", first.target);
    // Other clients change objects outside of the selection, so only the version increases.
    for n in 0..5 {
        world.wire.api.put("configmaps", json!({"metadata": {"name": format!("c{n}"), "namespace": "x"}}));
    }
    world.wire.api.bookmark(CR);
    tokio::time::sleep(SECOND).await;
    world.wire.api.cut_watches(false);
    world.until("the next watch", |api| (api.count("watch", CR) == 2).then_some(())).await;
    assert_eq!(version(&world.seen("watch")[1]), version(&first) + 5);
    assert_eq!(world.lists(), 1);
}

/// The watch delivers each event of a request once: created, approved, issued, deleted.
#[tokio::test(start_paused = true)]
async fn a_watch_cut_inside_an_event_resumes_without_loss_or_repeat() {
    for after in 0..4 {
        let world = World::with(|wire| wire.fail("watch", CR, Fault::CutEvent(after), 1));
        world.watching().await;
        let start = Instant::now();
        world.assert_served(&[world.want("a")], 1).await;
        world.until("the next watch", |api| (api.count("watch", CR) == 2).then_some(())).await;
        assert!(start.elapsed() < 3 * SECOND, "{:?}", start.elapsed());
        let watches = world.seen("watch");
        assert_eq!(version(&watches[1]) - version(&watches[0]), after as u64, "it resumes after the last complete event");
        assert_eq!((world.lists(), world.seen("delete").len()), (1, 1));
    }
}

/// An event ends with its line. Here the line ends with the connection, which closes without an error.
#[tokio::test(start_paused = true)]
async fn a_half_line_before_a_clean_end_is_no_event() {
    let half = "{\"type\":\"MODIFIED\",\"object\":{\"metadata\":{\"na";
    let answer = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{half}\r\n0\r\n\r\n", half.len());
    let world = World::with(|wire| wire.fail("watch", CR, Fault::Bytes(answer), 1));
    world.watching().await;
    world.assert_served(&[world.want("a")], 1).await;
    assert_eq!(world.lists(), 1);
}

/// An event that cannot be parsed could be one that an order waits for.
#[tokio::test(start_paused = true)]
async fn an_event_that_cannot_be_read_is_made_up_for_by_a_list() {
    let world = World::new();
    world.watching().await;
    let line = "<html>an intermediary has its say</html>\n";
    let answer = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{line}\r\n", line.len());
    world.wire.fail("watch", CR, Fault::Bytes(answer), 1);
    world.wire.api.cut_watches(false);
    let start = Instant::now();
    world.assert_served(&[world.want("a")], 1).await;
    assert!(start.elapsed() < 5 * SECOND, "{:?}", start.elapsed());
    assert_eq!((world.lists(), world.restarts(Ended::broken)), (2, 1));
    let told = world.log.lines("the watch does not work");
    assert_eq!((told.len(), told[0]["error"].as_str().unwrap()), (1, "the answer could not be read"));
}

#[tokio::test(start_paused = true)]
async fn a_410_in_the_head_or_in_an_event_is_answered_by_one_list() {
    let terminated = json!({"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"});
    let event = format!("{}\n", json!({"type": "ERROR", "object": terminated}));
    let head = http(410, &["content-type: application/json"], &terminated.to_string());
    let stream = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{event}\r\n0\r\n\r\n", event.len());
    for answer in [head, stream] {
        let world = World::new();
        world.watching().await;
        world.dead.lock().unwrap().insert("mesh-ca".into());
        let lease = world.want("a");
        world.wire.api.until_count(CR, 1).await;
        tokio::time::sleep(SECOND).await;
        world.wire.fail("watch", CR, Fault::Bytes(answer), 1);
        world.wire.api.cut_watches(false);
        // The certificate is issued while no watch runs.
        world.dead.lock().unwrap().clear();
        world.wire.api.put("configmaps", json!({"metadata": {"name": "x", "namespace": "x"}}));
        let start = Instant::now();
        world.assert_served(&[lease], 1).await;
        assert!(start.elapsed() < 5 * SECOND, "{:?}", start.elapsed());
        assert_eq!((world.lists(), world.restarts(Ended::expired)), (2, 1));
        assert_eq!(world.log.lines("the watch does not work").len(), 0, "that is no trouble");
    }
}

/// The stream has an event with status 500 and stays open: the watch has ended, regardless of the connection.
#[tokio::test(start_paused = true)]
async fn an_error_event_ends_a_stream_that_stays_open() {
    let event = format!("{}\n", json!({"type": "ERROR", "object": {"kind": "Status", "code": 500, "message": "etcd leader changed"}}));
    let answer = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{event}\r\n", event.len());
    let world = World::with(|wire| wire.fail("watch", CR, Fault::Bytes(answer), 1));
    let start = Instant::now();
    world.assert_served(&[world.want("a")], 1).await;
    assert!(start.elapsed() < 5 * SECOND, "{:?}", start.elapsed());
    assert_eq!((world.lists(), world.restarts(Ended::broken)), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_refused_slowly_is_asked_again() {
    let refusal = "HTTP/1.1 500 x\r\ncontent-length: 100\r\n\r\n{\"kind\"".to_owned();
    let world = World::with(|wire| wire.fail("watch", CR, Fault::Bytes(refusal), 1));
    world.assert_served(&[world.want("a")], 1).await;
    let watches = world.seen("watch");
    assert!(watches[1].at - watches[0].at < 35 * SECOND);
    assert_eq!(world.requests(Verb::watch, Code::Timeout), 1);
}

#[tokio::test(start_paused = true)]
async fn a_watch_obeys_a_retry_after_and_tells_when_it_works_again() {
    let busy = http(429, &["retry-after: 20"], "Too many requests, please try again later.");
    let world = World::with(|wire| wire.fail("watch", CR, Fault::Bytes(busy), 1));
    world.until("the second start", |api| (api.count("watch", CR) == 1).then_some(())).await;
    let watches = world.seen("watch");
    assert!(watches[1].at - watches[0].at >= 20 * SECOND);
    assert_eq!((watches.len(), world.lists()), (2, 1));
    assert_eq!(world.log.lines("the watch does not work").len(), 1);
    // No event is delivered, and the watch still counts as working.
    tokio::time::sleep(70 * SECOND).await;
    assert_eq!(world.log.lines("the watch works again").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_asked_to_wait_for_long_does_not_try_meanwhile() {
    let busy = http(429, &["retry-after: 120"], "Too many requests, please try again later.");
    let world = World::with(|wire| wire.fail("watch", CR, Fault::Bytes(busy), 1));
    world.until("the second start", |api| (api.count("watch", CR) == 1).then_some(())).await;
    let watches = world.seen("watch");
    assert!(watches[1].at - watches[0].at >= 120 * SECOND && watches[1].at - watches[0].at <= 250 * SECOND);
    assert!((1..=3).contains(&world.restarts(Ended::start_failed)), "{}", world.restarts(Ended::start_failed));
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_broke_and_has_nothing_to_tell_is_told_to_work_again() {
    let world = World::new();
    world.watching().await;
    let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".to_owned();
    world.wire.fail("watch", CR, Fault::Bytes(answer), 1);
    world.wire.api.cut_watches(false);
    world.until("another watch", |api| (api.count("watch", CR) == 2).then_some(())).await;
    assert_eq!(world.log.lines("the watch does not work").len(), 1);
    tokio::time::sleep(70 * SECOND).await;
    assert_eq!(world.log.lines("the watch works again").len(), 1);
    assert_eq!(world.lists(), 1);
}

#[tokio::test(start_paused = true)]
async fn events_out_of_order_or_twice_change_nothing() {
    for fault in (0..4).map(Fault::Swap).chain([Fault::Twice]) {
        let world = World::with(|wire| wire.fail("watch", CR, fault.clone(), 1));
        world.watching().await;
        // Two requests, so that each event is followed by another.
        let leases = [world.want("a"), world.want("b")];
        world.assert_served(&leases, 2).await;
        tokio::time::sleep(60 * SECOND).await;
        assert_eq!((world.seen("create").len(), world.seen("delete").len()), (2, 2), "{fault:?}");
        assert_eq!(world.log.lines("no new certificate").len(), 0, "{fault:?}");
    }
}
