//! `FetchSecrets`: one response within the caller's deadline.

use http_body_util::BodyExt;
use tokio::sync::mpsc;
use tonic::Code;

use super::{
    bench::{Bench, RETENTION, Upstream, settle},
    client::{Client, Reply, body, framed, status},
    *,
};

/// In paused time this limit costs nothing.
const PATIENCE: Duration = Duration::from_secs(24 * 3600);

pub type Answer = Result<Reply, (Code, String)>;

/// A call of a client. `deadline` is its `grpc-timeout`.
struct Call<'a> {
    bench: &'a Bench,
    request: DiscoveryRequest,
    deadline: Option<&'a str>,
}

fn call<'a>(bench: &'a Bench, names: &[&str]) -> Call<'a> {
    let names = names.iter().map(|n| (*n).to_owned()).collect();
    Call { bench, request: DiscoveryRequest { resource_names: names, ..Default::default() }, deadline: None }
}

impl<'a> Call<'a> {
    fn within(mut self, deadline: &'a str) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// The response, and the time that it took.
    async fn answer(self) -> (Answer, Duration) {
        let (say, pieces) = mpsc::unbounded_channel();
        say.send(framed(&self.request)).unwrap();
        drop(say);
        let begun = Instant::now();
        (fetch(self.bench, pieces, self.deadline).await, begun.elapsed())
    }
}

async fn fetch(bench: &Bench, pieces: mpsc::UnboundedReceiver<Bytes>, deadline: Option<&str>) -> Answer {
    fetch_on(bench, &bench.connection(), pieces, deadline).await
}

/// Fetches `names` on a connection.
pub async fn fetch_names(bench: &Bench, connection: &Arc<Connection>, names: &[&str]) -> Answer {
    let (say, pieces) = mpsc::unbounded_channel();
    say.send(framed(&call(bench, names).request)).unwrap();
    drop(say);
    fetch_on(bench, connection, pieces, None).await
}

async fn fetch_on(bench: &Bench, connection: &Arc<Connection>, pieces: mpsc::UnboundedReceiver<Bytes>, deadline: Option<&str>) -> Answer {
    let mut request = Request::post(format!("/{SERVICE}/FetchSecrets"));
    if let Some(deadline) = deadline {
        request = request.header("grpc-timeout", deadline);
    }
    let first_call = bench.service.call(connection, request.body(body(pieces, Variant::Sotw)).unwrap());
    let response = tokio::time::timeout(PATIENCE, first_call).await.expect("an answer in time").unwrap();
    if response.headers().contains_key("grpc-status") {
        return Err(status(response.headers()));
    }
    let collected = response.into_body().collect().await.unwrap();
    assert_eq!(status(collected.trailers().unwrap()).0, Code::Ok);
    Ok(Reply::of_message(Variant::Sotw, &collected.to_bytes()[grpc::PREFIX..]))
}

async fn warm(bench: &Bench) {
    Client::asking(bench, Variant::Delta, &["default"]).await.accepted().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_there_is_answered_at_once() {
    let b = Bench::new();
    warm(&b).await;
    let (answer, took) = call(&b, &["default", "ROOTCA", "file-root:system", "default"]).answer().await;
    let reply = answer.unwrap();
    assert_eq!(reply.names(), ["default", "ROOTCA"]);
    assert!(reply.carries("default", &b.material()));
    assert!(reply.version.starts_with(version_prefix(b.material().version())) && reply.nonce.is_empty());
    assert_eq!(took, Duration::ZERO);
    let (answer, _) = call(&b, &["default"]).within("99999999H").answer().await;
    assert_eq!(answer.unwrap().only_version(), b.material().version());
}

#[tokio::test(start_paused = true)]
async fn a_cold_certificate_is_waited_for_until_the_callers_deadline() {
    let b = Bench::new();
    b.upstream.send_replace(Upstream::Slow);
    let (answer, took) = call(&b, &["default"]).within("3S").answer().await;
    assert_eq!(answer, Err((Code::Unavailable, "not yet available; the certificate is being issued".into())));
    assert!(took < Duration::from_secs(3) && took > Duration::from_millis(2900), "a little before the deadline: {took:?}");

    let (answer, took) = tokio::join!(call(&b, &["default"]).within("60S").answer(), async {
        tokio::time::sleep(Duration::from_secs(40)).await;
        b.upstream.send_replace(Upstream::Up);
    })
    .0;
    assert!(answer.unwrap().carries("default", &b.material()));
    assert!(took >= Duration::from_secs(40) && took < Duration::from_secs(41), "{took:?}");
    settle().await;
    assert_eq!((b.leases(), b.orders()), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn without_a_deadline_a_caller_waits_ten_seconds() {
    let b = Bench::new();
    b.upstream.send_replace(Upstream::Slow);
    let (answer, took) = call(&b, &["default"]).answer().await;
    assert_eq!(answer.unwrap_err().0, Code::Unavailable);
    assert_eq!(took.as_secs(), 10);
}

#[tokio::test(start_paused = true)]
async fn what_is_known_of_several_names_is_the_answer_at_the_deadline() {
    let b = Bench::new();
    b.upstream.send_replace(Upstream::Slow);
    let (answer, took) = call(&b, &["default", "ROOTCA"]).within("3S").answer().await;
    let reply = answer.unwrap();
    assert_eq!(reply.names(), ["ROOTCA"]);
    assert!(reply.version.starts_with("b-"));
    assert!(took < Duration::from_secs(3) && took > Duration::from_millis(2900), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn the_time_that_attestation_takes_is_the_callers_time() {
    let b = Bench::new();
    b.upstream.send_replace(Upstream::Slow);
    b.know_nobody();
    let (answer, took) = tokio::join!(call(&b, &["default", "ROOTCA"]).within("10S").answer(), async {
        tokio::time::sleep(Duration::from_secs(6)).await;
        b.know_everybody();
    })
    .0;
    assert_eq!(answer.map(|reply| reply.names().join(",")), Ok("ROOTCA".into()));
    assert!(took < Duration::from_secs(10), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_caller_who_stays_unknown_is_told_so_in_time() {
    let b = Bench::new();
    b.know_nobody();
    let (answer, took) = call(&b, &["default"]).within("2S").answer().await;
    assert_eq!(answer, Err((Code::Unavailable, "the caller is not yet known".into())));
    assert!(took < Duration::from_secs(2), "{took:?}");
    let (answer, took) = call(&b, &["default"]).answer().await;
    assert_eq!((answer.unwrap_err().0, took.as_secs()), (Code::Unavailable, 10));
}

#[tokio::test(start_paused = true)]
async fn names_that_nobody_has_are_not_found_and_named() {
    let b = Bench::new();
    for names in [&["file-root:system", "spiffe://nobody.example"][..], &["spiffe://cluster.local/ns/shop/sa/other"]] {
        let (answer, took) = call(&b, names).answer().await;
        let (code, message) = answer.unwrap_err();
        assert_eq!(code, Code::NotFound);
        assert!(names.iter().all(|name| message.contains(name)), "{message}");
        assert_eq!(took, Duration::ZERO);
    }
    let long = "x".repeat(1000);
    let (code, message) = call(&b, &[&long, &long, &long]).answer().await.0.unwrap_err();
    assert!(code == Code::NotFound && message.len() < 1000, "{} bytes", message.len());
    assert_eq!(b.orders(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_wildcard_is_the_certificate_and_the_bundle() {
    let b = Bench::new();
    for names in [&[][..], &["*"]] {
        assert_eq!(call(&b, names).answer().await.0.unwrap().names(), ["default", "ROOTCA"]);
    }
}

#[tokio::test(start_paused = true)]
async fn who_fetches_has_nothing_whatever_version_it_names() {
    let b = Bench::new();
    let first = call(&b, &["default"]).answer().await.0.unwrap();
    let mut again = call(&b, &["default"]);
    again.request.version_info.clone_from(&first.version);
    assert_eq!(again.answer().await.0.unwrap().version, first.version, "the same version is sent again");

    let restarted = b.restarted();
    restarted.source.take(restarted.embedded.bundle().unwrap()).unwrap();
    let mut cold = call(&restarted, &["default"]);
    cold.request.version_info.clone_from(&first.version);
    let (answer, took) = cold.answer().await;
    assert!(answer.unwrap().carries("default", &restarted.material()));
    assert!(took < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn an_expired_certificate_is_not_fetched() {
    let b = Bench::new();
    warm(&b).await;
    b.upstream.send_replace(Upstream::Down);
    b.clock.step(86_400);
    let (answer, took) = call(&b, &["default"]).within("3S").answer().await;
    assert_eq!(answer.unwrap_err().0, Code::Unavailable);
    assert!(took > Duration::from_secs(2));
}

#[tokio::test(start_paused = true)]
async fn refusals_ends_and_drains_end_a_fetch() {
    let b = Bench::new();
    b.refuse(false);
    let refused = call(&b, &["default"]).answer().await.0;
    assert_eq!(refused, Err((Code::PermissionDenied, "no identity is available to this caller".into())));
    b.refuse(true);
    assert_eq!(call(&b, &["default"]).answer().await.0.unwrap_err().0, Code::Unavailable);
    b.know_everybody();
    let other = DiscoveryRequest { type_url: "type.googleapis.com/other".into(), ..Default::default() };
    let wrong = Call { bench: &b, request: other, deadline: None };
    assert_eq!(wrong.answer().await.0.unwrap_err().0, Code::InvalidArgument);
    assert_eq!(call(&b, &["a", "b", "c", "d", "e"]).answer().await.0.unwrap_err().0, Code::ResourceExhausted);

    b.upstream.send_replace(Upstream::Slow);
    let (ended, ()) = tokio::join!(call(&b, &["default"]).answer(), async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        b.terminated.cancel();
    });
    assert_eq!(ended.0.unwrap_err().0, Code::PermissionDenied);

    let b = Bench::new();
    call(&b, &["default"]).answer().await.0.unwrap();
    b.end_process();
    assert_eq!(call(&b, &["default"]).answer().await.0.unwrap_err().0, Code::PermissionDenied, "although the certificate is there");

    let b = Bench::new();
    b.upstream.send_replace(Upstream::Slow);
    let (drained, ()) = tokio::join!(call(&b, &["default"]).answer(), async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        b.service.ending.cancel();
    });
    assert_eq!(drained.0, Err((Code::Unavailable, "the agent is shutting down".into())));
    assert_eq!(drained.1, Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn an_unfinished_request_obeys_its_deadline_and_the_drain() {
    let b = Bench::new();
    let (say, pieces) = mpsc::unbounded_channel();
    let begun = Instant::now();
    let answer = fetch(&b, pieces, Some("2S")).await;
    assert_eq!(answer.unwrap_err().0, Code::Unavailable);
    assert!(begun.elapsed() < Duration::from_secs(2));
    drop(say);

    let (_say, pieces) = mpsc::unbounded_channel();
    let (answer, ()) = tokio::join!(fetch(&b, pieces, None), async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        b.service.ending.cancel();
    });
    assert_eq!(answer, Err((Code::Unavailable, "the agent is shutting down".into())));
}

#[tokio::test(start_paused = true)]
async fn fetching_again_and_again_leaves_nothing_behind() {
    let b = Bench::new();
    for _ in 0..3 {
        call(&b, &["default"]).answer().await.0.unwrap();
        tokio::time::sleep(RETENTION / 2).await;
    }
    assert_eq!((b.leases(), b.orders()), (0, 1));
    tokio::time::sleep(RETENTION).await;
    assert_eq!(b.service.store.snapshot().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_fetch_that_waits_across_a_reload_returns_the_new_identity() {
    let b = Bench::new();
    b.upstream.send_replace(Upstream::Slow);
    let change = async {
        settle().await;
        assert_eq!(b.orders(), 1);
        b.raise_epoch();
        settle().await;
        assert_eq!(b.orders(), 2, "an order without a certificate is not delayed");
        b.upstream.send_replace(Upstream::Up);
    };
    let ((answer, took), ()) = tokio::join!(call(&b, &["default"]).answer(), change);
    let reply = answer.unwrap();
    let entries = b.service.store.snapshot();
    let new = entries.iter().find(|entry| entry.identity.profile.epoch == 1).and_then(|entry| entry.current()).unwrap();
    assert!(reply.carries("default", &new) && took < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_fetch_after_a_reload_returns_the_new_identity_at_once() {
    let b = Bench::new();
    warm(&b).await;
    let old = b.material();
    b.raise_epoch();
    let (answer, took) = call(&b, &["default"]).answer().await;
    assert!(!answer.unwrap().carries("default", &old) && took < Duration::from_secs(1));
}

/// Lifetime of the certificates.
const LIFETIME: Duration = Duration::from_secs(3600);

/// The time that is left of the certificate in the only resource of `reply`.
fn left(b: &Bench, reply: &Reply) -> Duration {
    let not_after = reply.only_version().split('-').next().unwrap().parse().unwrap();
    agent_runtime::clock::from_unix_seconds(not_after).duration_since(b.clock.now()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_polling_client_never_gets_a_certificate_near_its_end() {
    let b = Bench::new();
    let (mut least, mut versions) = (LIFETIME, std::collections::BTreeSet::new());
    let begun = Instant::now();
    while begun.elapsed() < 5 * LIFETIME {
        let (answer, took) = call(&b, &["default"]).answer().await;
        let reply = answer.unwrap();
        assert_eq!(took, Duration::ZERO, "a certificate that is due is served while the next one is issued");
        least = least.min(left(&b, &reply));
        versions.insert(reply.version);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(least > LIFETIME.mul_f64(1.0 - 0.9), "{least:?}");
    // The last certificate may still settle.
    assert!((versions.len()..=versions.len() + 1).contains(&b.orders()), "{} orders for {} certificates", b.orders(), versions.len());
    assert_eq!(b.leases(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_polling_client_is_served_to_the_end_and_then_told_of_it() {
    let b = Bench::new();
    let first = call(&b, &["default"]).answer().await.0.unwrap();
    let not_after = b.material().chain.validity.not_after;
    b.upstream.send_replace(Upstream::Down);
    let end = Instant::now() + left(&b, &first);
    while Instant::now() + Duration::from_secs(11) < end {
        let (answer, took) = call(&b, &["default"]).answer().await;
        let reply = answer.unwrap();
        assert_eq!(reply.version, first.version);
        // Near the end, a call waits for the next one until its deadline.
        let ends_soon = b.material().chain.validity.settling_time();
        let expected = if left(&b, &reply) + took <= ends_soon { 10 } else { 0 };
        assert_eq!(took.as_secs(), expected, "with {:?} left", left(&b, &reply));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    tokio::time::sleep_until(end).await;
    let orders = b.orders();
    assert!(orders > 3, "the renewal was tried {orders} times");
    let expired = format!("the certificate expired at {}, and the next one is not issued yet", agent_runtime::clock::rfc3339(not_after));
    while end.elapsed() < LIFETIME {
        let (answer, took) = call(&b, &["default"]).answer().await;
        assert_eq!((answer, took.as_secs()), (Err((Code::Unavailable, expired.clone())), 10));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    // As for a stream, attempts are at most 5 min apart.
    assert!(b.orders() > orders + 10, "{} orders after the end", b.orders() - orders);
    b.upstream.send_replace(Upstream::Up);
    let (answer, took) = call(&b, &["default"]).within("301S").answer().await;
    assert_ne!(answer.unwrap().version, first.version);
    assert!(took <= Duration::from_secs(300), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_fetch_near_the_end_gets_the_next_certificate() {
    let b = Bench::new();
    let first = call(&b, &["default"]).answer().await.0.unwrap();
    b.upstream.send_replace(Upstream::Slow);
    while left(&b, &first) > Duration::from_secs(30) {
        assert_eq!(call(&b, &["default"]).within("1S").answer().await.0.unwrap().version, first.version);
        tokio::time::sleep(Duration::from_secs(20)).await;
    }
    let answer = call(&b, &["default"]).answer();
    let ((answer, took), ()) = tokio::join!(answer, async {
        tokio::time::sleep(Duration::from_secs(4)).await;
        b.upstream.send_replace(Upstream::Up);
    });
    assert_ne!(answer.unwrap().version, first.version);
    assert_eq!(took.as_secs(), 4);
}
