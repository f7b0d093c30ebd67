//! Requests that the upstream does not answer.

use sds_server::trust;

use super::*;

/// Waits until another request is due beside the one for the renewal of `current`.
async fn until_ending(b: &Bench, current: &Svid) {
    let validity = current.chain.validity;
    let ending = validity.not_after - validity.lifetime().mul_f64(0.2);
    tokio::time::sleep(ending.duration_since(b.clock.now()).unwrap()).await;
    settle().await;
}

/// A certificate near its end, with two pending requests for the next one.
struct Late {
    b: Bench,
    lease: Lease,
    first: Arc<Svid>,
    /// Answers of the requests: of the one for the renewal, and of the one beside it.
    answers: Vec<oneshot::Sender<Script>>,
}

impl Late {
    async fn start() -> Self {
        let (answers, waits): (Vec<_>, Vec<_>) = (0..2).map(|_| oneshot::channel()).unzip();
        let b = Bench::new([Script::Issue]);
        b.script.lock().unwrap().extend(waits.into_iter().map(Script::Wait));
        let lease = b.want("a");
        let first = material(&lease, None).await;
        until_ending(&b, &first).await;
        Self { b, lease, first, answers }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_request_is_replaced_before_the_certificate_ends() {
    let b = Bench::new([Script::Issue, Script::Pend]);
    let lease = b.want("a");
    let first = material(&lease, None).await;
    let second = material(&lease, Some(&first)).await;
    assert!(b.clock.now() < first.chain.validity.not_after, "replaced after its end");
    assert!(second.chain.validity.is_live(b.clock.now()));
    settle().await;
    assert_eq!((b.orders(), b.dropped.load(Ordering::SeqCst)), (3, 3), "the lost request is deleted");
}

#[tokio::test(start_paused = true)]
async fn a_lost_request_for_a_first_certificate_is_replaced() {
    let b = Bench::new([Script::Pend]);
    let (lease, start) = (b.want("a"), tokio::time::Instant::now());
    tokio::time::sleep(Duration::from_secs(15 * 60 - 1)).await;
    assert_eq!(b.orders(), 1);
    material(&lease, None).await;
    assert_eq!((start.elapsed().as_secs(), b.orders()), (15 * 60, 2));
    settle().await;
    assert_eq!(b.dropped.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn a_lost_request_of_a_caller_that_fetches_is_replaced() {
    let b = Bench::new([Script::Pend]);
    for _ in 0..15 * 60 - 1 {
        drop(b.want("a"));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(b.orders(), 1);
    for _ in 0..2 {
        drop(b.want("a"));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(b.orders(), 2);
    assert!(b.want("a").current().is_some());
}

#[tokio::test(start_paused = true)]
async fn the_first_answer_wins_and_the_other_request_is_deleted() {
    // The order whose request is answered first: the one for the renewal, or the one beside it.
    for earlier in [0, 1] {
        let Late { b, lease, first, answers } = Late::start().await;
        assert_eq!((b.orders(), b.dropped.load(Ordering::SeqCst)), (3, 1), "two requests are pending");
        let mut answers = answers.into_iter();
        let (renewal, beside) = (answers.next().unwrap(), answers.next().unwrap());
        let (wins, loses) = if earlier == 0 { (renewal, beside) } else { (beside, renewal) };
        wins.send(Script::Issue).unwrap();
        let second = material(&lease, Some(&first)).await;
        assert_eq!(b.dropped.load(Ordering::SeqCst), 3);
        assert!(loses.is_closed(), "the other request is deleted");
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(Arc::ptr_eq(&lease.current().unwrap(), &second) && b.orders() == 3);
    }
}

#[tokio::test(start_paused = true)]
async fn two_answers_in_one_instant_make_one_certificate() {
    let Late { b, lease, first, answers } = Late::start().await;
    answers.into_iter().for_each(|answer| answer.send(Script::Issue).unwrap());
    let second = material(&lease, Some(&first)).await;
    tokio::time::sleep(second.renew_at.duration_since(b.clock.now()).unwrap() - Duration::from_secs(1)).await;
    assert!(Arc::ptr_eq(&lease.current().unwrap(), &second));
    assert_eq!((b.orders(), b.dropped.load(Ordering::SeqCst)), (3, 3));
}

#[tokio::test(start_paused = true)]
async fn a_failure_of_one_request_leaves_the_other_one() {
    for failing in [0, 1] {
        let Late { b, lease, first, mut answers } = Late::start().await;
        answers.remove(failing).send(Script::Deny(Duration::from_secs(300))).unwrap();
        settle().await;
        let status = b.store.snapshot()[0].status();
        assert_eq!((status.request.as_deref(), status.last_error.is_some()), (Some("waiting-1"), true), "{failing}");
        assert_eq!((b.orders(), b.dropped.load(Ordering::SeqCst)), (3, 2));
        answers.remove(0).send(Script::Issue).unwrap();
        let second = material(&lease, Some(&first)).await;
        assert!(b.clock.now() < first.chain.validity.not_after);
        let status = b.store.snapshot()[0].status();
        assert_eq!((status.request, status.last_error, b.orders()), (None, None, 3));
        assert!(second.chain.validity.is_live(b.clock.now()));
    }
}

#[tokio::test(start_paused = true)]
async fn an_issuer_that_answers_nothing_has_at_most_two_requests_of_an_identity() {
    let b = Bench::new([Script::Issue]);
    b.script.lock().unwrap().extend((0..1000).map(|_| Script::Pend));
    let lease = b.want("a");
    let first = material(&lease, None).await;
    let until = first.chain.validity.not_after + Duration::from_secs(3600);
    while b.clock.now() < until {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(b.orders() - b.dropped.load(Ordering::SeqCst) <= 2);
    }
    // The waits before the end are at most a quarter of what is left, and later up to an hour.
    assert!((6..30).contains(&b.orders()), "{} orders", b.orders());
    b.script.lock().unwrap().clear();
    let second = material(&lease, Some(&first)).await;
    assert!(b.clock.now() < until + Duration::from_secs(3611), "the next request is answered");
    settle().await;
    assert_eq!(b.dropped.load(Ordering::SeqCst), b.orders());
    assert!(second.chain.validity.is_live(b.clock.now()));
}

/// Between the planner's decision and the start of the order, the entry may lose its profile.
#[tokio::test(start_paused = true)]
async fn an_order_that_did_not_start_is_tried_again() {
    let b = Bench::new([]);
    let parts = Parts {
        store: b.store.clone(),
        events: mpsc::unbounded_channel().1,
        plan: b.plan.subscribe(),
        reissues: mpsc::channel(1).1,
        trust: Trust::new(trust::Metrics::default()).subscribe(),
        authorities: None,
        await_bundle: false,
        clock: Arc::new(b.clock.clone()),
        identity_users: None,
        observer: None,
        metrics: Metrics::default(),
    };
    let mut rotation = Rotation::new(parts);
    let now = rotation.now();
    // The driver has no such entry.
    rotation.planner.wanted(now, 7, &Authority("mesh".into()), Some(Demand::Now));
    let (_, wake) = rotation.advance();
    assert!(wake.is_some_and(|at| at <= now.mono + Duration::from_secs(60)), "{wake:?}");
    tokio::time::sleep(Duration::from_secs(60)).await;
    let (_, wake) = rotation.advance();
    assert!(wake.is_some(), "the planner waits for the next attempt");
}
