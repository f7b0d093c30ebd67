use super::*;

fn request(name: &str, version: &str) -> Request {
    let mut request = Request::new(name, cert_manager::CertificateRequestSpec::default());
    request.metadata.namespace = Some("n".into());
    request.metadata.resource_version = Some(version.into());
    request
}

fn seen(queue: &mut Queue, request: Request, by_an_agent: bool, now: Instant) {
    let node = node(&request, by_an_agent);
    queue.seen(request, node, 0, now);
}

fn next(queue: &mut Queue) -> Option<(String, String)> {
    queue.pop(|_| 0).map(|(key, item)| (key.1, item.request.unwrap().metadata.resource_version.clone().unwrap()))
}

#[test]
fn one_worker_at_a_time_and_what_changed_meanwhile_is_looked_at_again() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    seen(&mut queue, request("a", "1"), true, now);
    seen(&mut queue, request("b", "1"), true, now);
    seen(&mut queue, request("a", "2"), true, now);
    assert_eq!(next(&mut queue), Some(("a".into(), "2".into())));
    seen(&mut queue, request("a", "3"), true, now);
    assert_eq!(next(&mut queue), Some(("b".into(), "1".into())));
    assert_eq!(next(&mut queue), None);
    let (a, b) = (("n".to_owned(), "a".to_owned()), ("n".to_owned(), "b".to_owned()));
    queue.settled(&a);
    queue.settled(&b);
    assert_eq!(next(&mut queue), Some(("a".into(), "3".into())));
    queue.settled(&a);
    assert!(queue.is_empty() && queue.ready.is_empty());
}

#[test]
fn failures_rest_ever_longer_and_what_is_gone_does_not_come_back() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let a = ("n".to_owned(), "a".to_owned());
    seen(&mut queue, request("a", "1"), true, now);
    let mut pauses = Vec::new();
    for _ in 0..9 {
        queue.pop(|_| 0).unwrap();
        pauses.push(queue.failed(&a).unwrap().as_millis());
        seen(&mut queue, request("a", "2"), true, now);
        assert_eq!(next(&mut queue), None, "a change does not end the backoff");
        queue.rested(&a);
    }
    assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]);
    queue.gone(&a);
    assert_eq!(next(&mut queue), None);
    assert_eq!(queue.failed(&a), None);
    queue.rested(&a);
    assert!(queue.is_empty());
}

#[test]
fn waiting_requests_are_judged_again_when_the_rules_change() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let [a, b] = ["a", "b"].map(|name| ("n".to_owned(), name.to_owned()));
    seen(&mut queue, request("a", "1"), true, now);
    seen(&mut queue, request("b", "1"), true, now);
    let first = (next(&mut queue), next(&mut queue));
    assert!(first.0.is_some() && first.1.is_some() && queue.waits(&a) && next(&mut queue).is_none());
    queue.wake();
    assert_eq!((next(&mut queue), next(&mut queue)), (Some(("a".into(), "1".into())), None));
    assert!(!queue.waits(&b), "the rules changed while the worker had it");
    assert_eq!(next(&mut queue), Some(("b".into(), "1".into())));
    queue.gone(&a);
    assert!(!queue.waits(&a), "the request was removed");
}

#[test]
fn what_is_given_back_is_the_next_and_what_is_gone_meanwhile_is_not() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    assert!(!queue.has_ready());
    for name in ["a", "b", "c"] {
        seen(&mut queue, request(name, "1"), true, now);
    }
    let a = ("n".to_owned(), "a".to_owned());
    assert!(next(&mut queue).is_some());
    seen(&mut queue, request("a", "2"), true, now);
    queue.given_back(&a);
    assert_eq!(next(&mut queue), Some(("a".into(), "2".into())));
    queue.gone(&a);
    queue.given_back(&a);
    queue.gone(&("n".to_owned(), "b".to_owned()));
    assert!(queue.has_ready());
    assert_eq!(next(&mut queue), Some(("c".into(), "1".into())));
    assert!(!queue.has_ready() && queue.len() == 1, "a worker has c");
}

/// Rules that remove an issuer and add it again have this effect.
#[test]
fn a_request_that_returns_during_its_work_is_queued_again() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let a = ("n".to_owned(), "a".to_owned());
    let begun = |queue: &mut Queue| {
        seen(queue, request("a", "1"), true, now);
        assert!(next(queue).is_some());
        queue.gone(&a);
    };
    begun(&mut queue);
    seen(&mut queue, request("a", "2"), true, now);
    assert_eq!(next(&mut queue), None, "at most one worker at a time");
    queue.settled(&a);
    assert_eq!(next(&mut queue), Some(("a".into(), "2".into())));
    assert!(queue.failed(&a).is_some(), "a failure of the second worker counts");
    queue.gone(&a);

    begun(&mut queue);
    queue.wake();
    queue.settled(&a);
    begun(&mut queue);
    assert_eq!(queue.failed(&a), None);
    begun(&mut queue);
    assert!(!queue.waits(&a));
    begun(&mut queue);
    queue.retain(|_| false);
    queue.settled(&a);
    assert!(queue.is_empty() && next(&mut queue).is_none());
}

#[test]
fn requests_that_a_list_lacks_are_removed() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    seen(&mut queue, request("a", "1"), true, now);
    seen(&mut queue, request("b", "1"), true, now);
    queue.retain(|(_, name)| name == "b");
    assert_eq!((next(&mut queue), next(&mut queue)), (Some(("b".into(), "1".into())), None));
    assert_eq!(queue.len(), 1);
}

fn request_on(node: &str, name: &str, created: i64) -> Request {
    let mut request = request(name, "1");
    let created = k8s_openapi::jiff::Timestamp::from_second(created).unwrap();
    request.metadata.creation_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(created));
    request.spec.extra.insert(claims::NODE_NAME.to_owned(), vec![node.to_owned()]);
    request
}

/// Ten thousand requests of one node, and fifty of another that come later.
#[test]
fn a_flood_of_a_node_is_bounded_and_delays_another_node_by_its_own_time() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    for n in 0..MAX_TRACKED_PER_NODE + 500 {
        seen(&mut queue, request_on("flood", &format!("f{n}"), 100), true, now);
    }
    for n in 0..50 {
        seen(&mut queue, request_on("other", &format!("o{n}"), 200), true, now);
    }
    assert_eq!(queue.len(), MAX_TRACKED_PER_NODE + 50);
    let objects = |queue: &Queue| queue.entries.values().filter(|entry| entry.item.request.is_some()).count();
    assert_eq!(objects(&queue), MAX_OBJECTS_PER_NODE + 50);
    let mut decisions = 0;
    let mut left = 50;
    while left > 0 {
        let (key, _) = queue.pop(|_| 0).unwrap();
        decisions += 1;
        left -= usize::from(key.1.starts_with('o'));
        queue.settled(&key);
    }
    assert!(decisions <= 100, "{decisions}");
    assert!(!queue.needs_list());

    // The newest are denied, as long as the node has too many.
    let mut beyond = 0;
    while let Some((key, item)) = queue.pop(|_| 0) {
        beyond += usize::from(item.is_beyond);
        queue.settled(&key);
    }
    assert!(queue.is_empty() && queue.shares.is_empty() && queue.ready.is_empty());
    assert!(beyond > (MAX_TRACKED_PER_NODE - MAX_REQUESTS_PER_NODE) / 2, "{beyond}");
    assert!(queue.needs_list(), "a list brings the requests that were not tracked");
    assert!(!queue.needs_list());
}

#[test]
fn a_backlog_of_an_honest_agent_is_judged_and_not_denied() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    for n in 0..MAX_REQUESTS_PER_NODE {
        seen(&mut queue, request_on("n1", &format!("r{n}"), 100), true, now);
    }
    let mut judged = 0;
    while let Some((key, item)) = queue.pop(|_| 0) {
        assert!(!item.is_beyond);
        judged += 1;
        queue.settled(&key);
    }
    assert_eq!(judged, MAX_REQUESTS_PER_NODE);
}

#[test]
fn a_node_occupies_a_part_of_the_workers() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    for n in 0..20 {
        seen(&mut queue, request_on("n1", &format!("r{n}"), 100), true, now);
    }
    let mut working: Vec<_> = std::iter::from_fn(|| queue.pop(|_| 0)).map(|(key, _)| key).collect();
    assert_eq!(working.len(), MAX_WORKERS_PER_NODE);
    assert!(queue.has_ready());
    queue.settled(&working.pop().unwrap());
    assert!(queue.pop(|_| 0).is_some() && queue.pop(|_| 0).is_none());
}

#[test]
fn a_large_object_is_not_held_and_an_outsider_takes_no_turn_of_a_node() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let mut large = request_on("n1", "large", 100);
    large.spec.duration = Some(format!("{}3600s", "0".repeat(MAX_HELD_BYTES)));
    seen(&mut queue, large.clone(), true, now);
    assert!(queue.pop(|_| 0).unwrap().1.request.is_none(), "it is read when it is its turn");
    let small = request_on("n1", "small", 100);
    seen(&mut queue, small.clone(), true, now);
    large.metadata.name = Some("small".into());
    seen(&mut queue, large, true, now);
    assert_eq!(queue.shares["n1"].objects, 0, "it has grown");

    for n in 0..=MAX_REQUESTS_PER_NODE {
        seen(&mut queue, request_on("n1", &format!("outsider{n}"), 100), false, now);
    }
    assert_eq!((queue.shares["n1"].tracked, queue.shares[""].tracked), (2, MAX_REQUESTS_PER_NODE + 1));
}

#[test]
fn a_decision_ends_a_request_although_its_change_was_reported_meanwhile() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let a = ("n".to_owned(), "a".to_owned());
    seen(&mut queue, request("a", "1"), true, now);
    queue.pop(|_| 0).unwrap();
    queue.wake();
    queue.decided(&a, "");
    assert!(queue.is_empty() && queue.shares.is_empty());
    // Another object of the same name is another request.
    seen(&mut queue, request("a", "1"), true, now);
    queue.pop(|_| 0).unwrap();
    let mut recreated = request("a", "2");
    recreated.metadata.uid = Some("other".into());
    seen(&mut queue, recreated, true, now);
    queue.decided(&a, "");
    assert_eq!(queue.pop(|_| 0).unwrap().1.uid, "other".into());
}

#[test]
fn requests_of_a_node_that_may_rest_are_limited() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    for n in 0..=MAX_RESTING_PER_NODE {
        seen(&mut queue, request_on("n1", &format!("r{n:03}"), 100), true, now);
    }
    for _ in 0..MAX_RESTING_PER_NODE {
        let (key, item) = queue.pop(|_| 0).unwrap();
        assert!(item.may_rest && queue.waits(&key));
    }
    let (key, item) = queue.pop(|_| 0).unwrap();
    assert!(!item.may_rest);
    queue.settled(&key);
    queue.wake();
    assert!(queue.pop(|_| 0).unwrap().1.may_rest);
}

/// A node whose signer is down may have as many approved requests as undecided ones, together.
#[test]
fn approved_requests_that_wait_for_their_signer_count_towards_the_limit() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let arrives = |queue: &mut Queue, name: &str, approved: usize| {
        queue.seen(request_on("n1", name, 100), "n1".into(), approved, now);
        let (key, item) = queue.pop(|_| approved).unwrap();
        queue.settled(&key);
        item.is_beyond
    };
    assert!(!arrives(&mut queue, "a", MAX_REQUESTS_PER_NODE - 1));
    assert!(arrives(&mut queue, "b", MAX_REQUESTS_PER_NODE));
    queue.seen(request_on("n1", "c", 100), "n1".into(), MAX_REQUESTS_PER_NODE, now);
    assert!(!queue.pop(|_| MAX_REQUESTS_PER_NODE - 1).unwrap().1.is_beyond, "one was signed before its turn");
}
