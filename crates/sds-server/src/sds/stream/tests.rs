use super::*;

mod wildcards;

const SOTW: Variant = Variant::Sotw;
const DELTA: Variant = Variant::Delta;

fn stream(variant: Variant) -> StreamState {
    StreamState::new(variant, ["default".into(), "ROOTCA".into()], 4)
}

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

fn sotw(names: &[&str], version: &str, nonce: &str) -> Request {
    Request { nonce: nonce.into(), names: Names::All { names: strings(names), version: version.into() }, ..Request::default() }
}

fn delta(subscribe: &[&str], unsubscribe: &[&str], nonce: &str) -> Request {
    let names = Names::Changes { subscribe: strings(subscribe), unsubscribe: strings(unsubscribe), versions: BTreeMap::new() };
    Request { nonce: nonce.into(), names, ..Request::default() }
}

fn nack(mut request: Request) -> Request {
    request.error = Some("bad".into());
    request
}

/// Every known name has version `v`.
fn all(v: &str) -> impl Fn(&str) -> Option<String> {
    move |name| ["default", "ROOTCA", "spiffe://td"].contains(&name).then(|| v.to_owned())
}

fn due(stream: &mut StreamState, v: &str) -> Option<(u64, Vec<String>)> {
    stream.due(all(v)).map(|d| (d.nonce, d.names.iter().map(|(n, _)| n.to_string()).collect()))
}

#[test]
fn a_name_is_answered_once_for_each_version() {
    for (variant, first) in [(SOTW, sotw(&["default"], "", "")), (DELTA, delta(&["default"], &[], ""))] {
        let mut s = stream(variant);
        assert_eq!(s.request(first), Ok(Received::Subscription));
        assert_eq!(due(&mut s, "v1"), Some((1, strings(&["default"]))));
        assert_eq!(due(&mut s, "v1"), None, "there is no new version");
        assert_eq!(due(&mut s, "v2"), Some((2, strings(&["default"]))));
    }
}

#[test]
fn acks_and_nacks_are_told_by_the_error_and_never_by_the_version() {
    let mut s = stream(SOTW);
    s.request(sotw(&["default"], "", "")).unwrap();
    due(&mut s, "v1");
    assert_eq!(
        s.request(nack(sotw(&["default"], "v1", "1"))),
        Ok(Received::Nack(1, "bad".into())),
        "an error is a NACK even with the new version"
    );
    assert_eq!(due(&mut s, "v1"), None, "a rejected version is not sent again");
    due(&mut s, "v2").unwrap();
    assert_eq!(s.request(sotw(&["default"], "", "2")), Ok(Received::Ack(2)), "no error is an ACK even without a version");
    assert_eq!(due(&mut s, "v2"), None);
}

#[test]
fn a_nack_that_adds_a_name_gets_the_name_and_not_the_rejected_version() {
    let mut s = stream(SOTW);
    s.request(sotw(&["default"], "", "")).unwrap();
    due(&mut s, "v1");
    s.request(nack(sotw(&["default", "ROOTCA"], "", "1"))).unwrap();
    assert_eq!(due(&mut s, "v1"), Some((2, strings(&["ROOTCA"]))));
    assert_eq!(due(&mut s, "v2"), Some((3, strings(&["default", "ROOTCA"]))));

    let mut s = stream(DELTA);
    s.request(delta(&["default"], &[], "")).unwrap();
    due(&mut s, "v1");
    s.request(nack(delta(&["ROOTCA"], &[], "1"))).unwrap();
    assert_eq!(due(&mut s, "v1"), Some((2, strings(&["ROOTCA"]))));
}

#[test]
fn sotw_ignores_a_stale_nonce_with_its_names() {
    let mut s = stream(SOTW);
    s.request(sotw(&["default"], "", "")).unwrap();
    due(&mut s, "v1");
    due(&mut s, "v2");
    assert_eq!(s.request(sotw(&[], "v1", "1")), Ok(Received::Stale));
    assert_eq!(s.request(nack(sotw(&["default"], "v1", "1"))), Ok(Received::Stale));
    assert_eq!(s.request(sotw(&["default"], "v1", "77")), Ok(Received::Stale));
    assert_eq!(s.request(sotw(&["default"], "v1", "not a number")), Ok(Received::Stale));
    assert_eq!(s.watches().len(), 1, "the names of stale requests do not count");
    assert_eq!(s.request(sotw(&["default"], "v2", "2")), Ok(Received::Ack(2)));
}

#[test]
fn sotw_applies_the_names_of_a_repeated_answer_to_the_latest_response() {
    let mut s = stream(SOTW);
    s.request(sotw(&["default"], "", "")).unwrap();
    due(&mut s, "v1");
    assert_eq!(s.request(nack(sotw(&["default"], "", "1"))), Ok(Received::Nack(1, "bad".into())));
    assert_eq!(s.request(nack(sotw(&["default", "ROOTCA"], "", "1"))), Ok(Received::Subscription), "one NACK for each response");
    assert_eq!(due(&mut s, "v1"), Some((2, strings(&["ROOTCA"]))));
    s.request(sotw(&["default", "ROOTCA"], "v1", "2")).unwrap();
    assert_eq!(s.request(nack(sotw(&["ROOTCA", "spiffe://td"], "v1", "2"))), Ok(Received::Subscription));
    assert_eq!(due(&mut s, "v1"), Some((3, strings(&["ROOTCA", "spiffe://td"]))));
}

#[test]
fn delta_answers_a_subscription_after_a_nack() {
    for resubscribe in [delta(&["default"], &[], ""), delta(&["default"], &["default"], "")] {
        let mut s = stream(DELTA);
        s.request(delta(&["default"], &[], "")).unwrap();
        due(&mut s, "v1");
        s.request(nack(delta(&[], &[], "1"))).unwrap();
        assert_eq!(due(&mut s, "v1"), None);
        s.request(resubscribe).unwrap();
        assert_eq!(due(&mut s, "v1"), Some((2, strings(&["default"]))));
    }
    // In one request, the NACK is of the response, and the subscription is newer.
    let mut s = stream(DELTA);
    s.request(delta(&["default"], &[], "")).unwrap();
    due(&mut s, "v1");
    s.request(nack(delta(&["default"], &[], "1"))).unwrap();
    assert_eq!(due(&mut s, "v1"), Some((2, strings(&["default"]))));
}

#[test]
fn a_late_nack_does_not_answer_a_later_subscription() {
    let mut s = stream(DELTA);
    s.request(delta(&["default"], &[], "")).unwrap();
    due(&mut s, "v1");
    s.request(delta(&["default"], &[], "")).unwrap();
    s.request(nack(delta(&[], &[], "1"))).unwrap();
    assert_eq!(due(&mut s, "v1"), Some((2, strings(&["default"]))));
}

#[test]
fn delta_acknowledges_each_response_and_its_names_always_count() {
    let mut s = stream(DELTA);
    s.request(delta(&["default"], &[], "")).unwrap();
    due(&mut s, "v1");
    due(&mut s, "v2");
    assert_eq!(s.request(delta(&["ROOTCA"], &[], "1")), Ok(Received::Ack(1)));
    assert_eq!(s.request(delta(&["spiffe://td"], &[], "99")), Ok(Received::Stale));
    assert_eq!(due(&mut s, "v2"), Some((3, strings(&["ROOTCA", "spiffe://td"]))));
    assert_eq!(s.request(delta(&[], &[], "2")), Ok(Received::Ack(2)));
}

#[test]
fn an_added_name_is_answered_though_its_version_is_old() {
    let mut s = stream(SOTW);
    s.request(sotw(&["default"], "", "")).unwrap();
    due(&mut s, "v1");
    s.request(sotw(&["default"], "v1", "1")).unwrap();
    s.request(sotw(&["default", "spiffe://td"], "v1", "1")).unwrap();
    assert_eq!(due(&mut s, "v1"), Some((2, strings(&["default", "spiffe://td"]))));

    let mut s = stream(DELTA);
    s.request(delta(&["default"], &[], "")).unwrap();
    due(&mut s, "v1");
    s.request(delta(&["spiffe://td"], &[], "1")).unwrap();
    assert_eq!(due(&mut s, "v1"), Some((2, strings(&["spiffe://td"]))));
}

#[test]
fn a_dropped_name_is_not_answered_and_answered_again_when_it_returns() {
    let mut s = stream(SOTW);
    s.request(sotw(&["default", "ROOTCA"], "", "")).unwrap();
    due(&mut s, "v1");
    s.request(sotw(&["ROOTCA"], "v1", "1")).unwrap();
    assert_eq!(due(&mut s, "v2"), Some((2, strings(&["ROOTCA"]))));
    s.request(sotw(&["ROOTCA", "default"], "v2", "2")).unwrap();
    assert_eq!(due(&mut s, "v2"), Some((3, strings(&["ROOTCA", "default"]))));

    let mut s = stream(DELTA);
    s.request(delta(&["default", "ROOTCA"], &[], "")).unwrap();
    due(&mut s, "v1");
    s.request(delta(&[], &["default"], "1")).unwrap();
    assert_eq!(due(&mut s, "v2"), Some((2, strings(&["ROOTCA"]))));
    s.request(delta(&["default"], &[], "2")).unwrap();
    assert_eq!(due(&mut s, "v2"), Some((3, strings(&["default"]))));
}

#[test]
fn delta_answers_a_repeated_subscription_and_sotw_does_not() {
    let mut s = stream(DELTA);
    s.request(delta(&["default"], &[], "")).unwrap();
    due(&mut s, "v1");
    s.request(delta(&["default"], &[], "1")).unwrap();
    assert_eq!(due(&mut s, "v1"), Some((2, strings(&["default"]))));

    let mut s = stream(SOTW);
    s.request(sotw(&["default", "default"], "", "")).unwrap();
    assert_eq!(due(&mut s, "v1"), Some((1, strings(&["default"]))), "a repeated name is answered once");
    s.request(sotw(&["default"], "v1", "1")).unwrap();
    assert_eq!(due(&mut s, "v1"), None);
}

#[test]
fn an_unknown_name_stays_silent_and_the_others_are_answered() {
    for (variant, first) in
        [(SOTW, sotw(&["file-root:system", "default"], "", "")), (DELTA, delta(&["file-root:system", "default"], &[], ""))]
    {
        let mut s = stream(variant);
        s.request(first).unwrap();
        assert_eq!(due(&mut s, "v1"), Some((1, strings(&["default"]))));
    }
}

#[test]
fn a_name_without_an_answer_yet_follows_when_it_has_one() {
    for (variant, first, second) in [
        (SOTW, sotw(&["default", "ROOTCA"], "", ""), vec!["default", "ROOTCA"]),
        (DELTA, delta(&["default", "ROOTCA"], &[], ""), vec!["default"]),
    ] {
        let mut s = stream(variant);
        s.request(first).unwrap();
        let bundle_only = |name: &str| (name == "ROOTCA").then(|| "v1".to_owned());
        assert_eq!(s.due(bundle_only).unwrap().names.len(), 1);
        assert_eq!(due(&mut s, "v1"), Some((2, strings(&second))));
    }
}

#[test]
fn a_version_reported_at_reconnect_is_not_sent_again() {
    let mut s = stream(SOTW);
    s.request(sotw(&["default"], "v1", "")).unwrap();
    assert_eq!(s.watches()[0].client_reported.as_deref(), Some("v1"));
    assert_eq!(due(&mut s, "v1"), None);
    assert_eq!(due(&mut s, "v2"), Some((1, strings(&["default"]))));

    let mut s = stream(DELTA);
    let versions = BTreeMap::from([("default".to_owned(), "v1".to_owned())]);
    let names = Names::Changes { subscribe: strings(&["default", "ROOTCA"]), unsubscribe: Vec::new(), versions };
    s.request(Request { names, ..Request::default() }).unwrap();
    assert_eq!(due(&mut s, "v1"), Some((1, strings(&["ROOTCA"]))));
    assert_eq!(due(&mut s, "v2"), Some((2, strings(&["default", "ROOTCA"]))));
}

#[test]
fn a_version_counts_only_in_the_first_request() {
    let mut s = stream(SOTW);
    s.request(sotw(&["default"], "", "")).unwrap();
    s.request(sotw(&["default", "ROOTCA"], "v1", "")).unwrap();
    assert_eq!(due(&mut s, "v1"), Some((1, strings(&["default", "ROOTCA"]))));
}

#[test]
fn a_nonce_of_another_stream_does_not_hide_the_first_request() {
    for (variant, first) in [(SOTW, sotw(&["default"], "", "41")), (DELTA, delta(&["default"], &[], "41"))] {
        let mut s = stream(variant);
        assert_eq!(s.request(first), Ok(Received::Subscription));
        assert_eq!(due(&mut s, "v1"), Some((1, strings(&["default"]))));
    }
}

#[test]
fn another_type_and_too_many_names_end_the_stream() {
    let mut s = stream(SOTW);
    let request = Request { type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster".into(), ..sotw(&["default"], "", "") };
    assert!(matches!(s.request(request), Err(Violation::TypeUrl(_))));
    let request = Request { type_url: TYPE_URL.into(), ..sotw(&["default"], "", "") };
    assert!(s.request(request).is_ok());
    assert_eq!(stream(SOTW).request(sotw(&["a", "b", "c", "d", "e"], "", "")), Err(Violation::TooManyNames(4)));
    assert_eq!(stream(DELTA).request(delta(&["a", "b", "c", "d", "e"], &[], "")), Err(Violation::TooManyNames(4)));
}

#[test]
fn a_message_full_of_names_costs_no_more_than_the_limit() {
    let names: Vec<String> = (0..50_000).map(|n| n.to_string()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let begun = std::time::Instant::now();
    assert_eq!(stream(SOTW).request(sotw(&names, "", "")), Err(Violation::TooManyNames(4)));
    assert_eq!(stream(DELTA).request(delta(&names, &names, "")), Err(Violation::TooManyNames(4)));
    let repeated = vec!["default"; 50_000];
    assert!(stream(SOTW).request(sotw(&repeated, "", "")).is_ok());
    assert!(begun.elapsed().as_secs() < 2, "{:?}", begun.elapsed());
}

#[test]
fn what_a_refusal_repeats_is_short() {
    let request = Request { type_url: format!("\n{}", "x".repeat(100_000)), ..sotw(&[], "", "") };
    let message = stream(SOTW).request(request).unwrap_err().to_string();
    assert!(message.len() < 300 && !message.contains('\n'), "{message}");
}

#[test]
fn a_client_that_stopped_asking_is_done_when_all_is_sent() {
    let mut s = stream(SOTW);
    s.request(sotw(&["default"], "", "")).unwrap();
    assert!(!s.is_settled(|_| true, all("v1")));
    due(&mut s, "v1");
    assert!(s.is_settled(|_| true, all("v1")));
    assert!(!s.is_settled(|_| true, |_| None), "one name has no version yet");
}
