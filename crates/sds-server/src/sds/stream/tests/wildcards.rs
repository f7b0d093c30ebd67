//! Wildcard subscriptions beside subscriptions to names.

use super::*;

/// The names and the removed names of the response that is due.
fn answer(s: &mut StreamState, v: &str) -> Option<(Vec<String>, Vec<String>)> {
    let due = s.due(all(v))?;
    let names = due.names.iter().map(|(name, _)| name.to_string()).collect();
    Some((names, due.removed.iter().map(ToString::to_string).collect()))
}

fn resources(names: &[&str]) -> Option<(Vec<String>, Vec<String>)> {
    Some((strings(names), Vec::new()))
}

fn removed(names: &[&str]) -> Option<(Vec<String>, Vec<String>)> {
    Some((Vec::new(), strings(names)))
}

fn delta_stream(first: Request) -> StreamState {
    let mut s = stream(DELTA);
    s.request(first).unwrap();
    answer(&mut s, "v1");
    s
}

#[test]
fn a_first_empty_list_and_a_star_are_wildcards() {
    for (variant, first) in
        [(SOTW, sotw(&[], "", "")), (DELTA, delta(&[], &[], "")), (SOTW, sotw(&["*"], "", "")), (DELTA, delta(&["*"], &[], ""))]
    {
        let mut s = stream(variant);
        s.request(first).unwrap();
        assert_eq!(answer(&mut s, "v1"), resources(&["default", "ROOTCA"]));
    }
}

#[test]
fn empty_lists_remain_a_wildcard_until_a_name_is_sent() {
    let mut s = stream(SOTW);
    s.request(sotw(&[], "", "")).unwrap();
    answer(&mut s, "v1");
    assert_eq!(s.request(sotw(&[], "v1", "1")), Ok(Received::Ack(1)));
    assert_eq!(answer(&mut s, "v2"), resources(&["default", "ROOTCA"]), "an ACK does not unsubscribe");
    // The sequence of the protocol's page.
    s.request(sotw(&["*", "spiffe://td"], "v2", "2")).unwrap();
    assert_eq!(answer(&mut s, "v2"), resources(&["default", "ROOTCA", "spiffe://td"]));
    s.request(sotw(&["spiffe://td"], "v2", "3")).unwrap();
    assert_eq!(answer(&mut s, "v3"), resources(&["spiffe://td"]));
    s.request(sotw(&[], "v3", "4")).unwrap();
    assert_eq!((answer(&mut s, "v4"), s.watches().len()), (None, 0), "now an empty list is nothing");
}

#[test]
fn sotw_unsubscribes_from_a_wildcard_by_an_empty_list() {
    let mut s = stream(SOTW);
    s.request(sotw(&["*"], "", "")).unwrap();
    answer(&mut s, "v1");
    s.request(sotw(&[], "v1", "1")).unwrap();
    assert_eq!((answer(&mut s, "v2"), s.watches().len()), (None, 0));
}

#[test]
fn delta_keeps_a_name_that_the_wildcard_covers_and_answers() {
    let mut s = delta_stream(delta(&["*", "default"], &[], ""));
    s.request(delta(&[], &["default"], "")).unwrap();
    assert_eq!(answer(&mut s, "v1"), resources(&["default"]), "the client does not know whether it still has the name");
    assert_eq!(answer(&mut s, "v2"), resources(&["default", "ROOTCA"]));
}

#[test]
fn delta_reports_a_name_that_the_wildcard_does_not_cover_as_removed() {
    for name in ["spiffe://td", "unknown"] {
        let mut s = delta_stream(delta(&["*", name], &[], ""));
        s.request(delta(&[], &[name], "")).unwrap();
        assert_eq!(answer(&mut s, "v1"), removed(&[name]));
        assert_eq!(answer(&mut s, "v2"), resources(&["default", "ROOTCA"]));
        assert_eq!(s.request(delta(&[], &[], "2")), Ok(Received::Ack(2)));
    }
}

#[test]
fn delta_keeps_explicit_names_when_the_wildcard_ends() {
    let mut s = delta_stream(delta(&["default"], &[], ""));
    s.request(delta(&["*"], &[], "")).unwrap();
    assert_eq!(answer(&mut s, "v1"), resources(&["default", "ROOTCA"]));
    s.request(delta(&[], &["*"], "")).unwrap();
    assert_eq!(answer(&mut s, "v1"), None);
    assert_eq!(answer(&mut s, "v2"), resources(&["default"]));
    s.request(delta(&[], &["default"], "")).unwrap();
    assert_eq!((answer(&mut s, "v3"), s.watches().len()), (None, 0));
}

#[test]
fn delta_ignores_an_unsubscription_from_a_name_that_is_not_explicit() {
    for first in [delta(&[], &[], ""), delta(&["*"], &[], "")] {
        let mut s = delta_stream(first);
        s.request(delta(&[], &["ROOTCA", "spiffe://td"], "")).unwrap();
        assert_eq!(answer(&mut s, "v1"), None);
        assert_eq!(answer(&mut s, "v2"), resources(&["default", "ROOTCA"]));
    }
}

#[test]
fn delta_ends_a_legacy_wildcard_by_its_star() {
    let mut s = delta_stream(delta(&[], &[], ""));
    s.request(delta(&["spiffe://td"], &[], "")).unwrap();
    assert_eq!(answer(&mut s, "v1"), resources(&["spiffe://td"]), "beside the wildcard");
    s.request(delta(&[], &["*"], "")).unwrap();
    assert_eq!(answer(&mut s, "v2"), resources(&["spiffe://td"]));
    s.request(delta(&[], &["spiffe://td"], "")).unwrap();
    // Empty lists are no longer a wildcard.
    s.request(delta(&[], &[], "")).unwrap();
    assert_eq!((answer(&mut s, "v3"), s.watches().len()), (None, 0));
}

#[test]
fn a_name_that_is_both_is_answered_once_and_reported_once() {
    let mut s = stream(DELTA);
    let versions = BTreeMap::from([("default".to_owned(), "v1".to_owned())]);
    let names = Names::Changes { subscribe: strings(&["*", "default"]), unsubscribe: Vec::new(), versions };
    s.request(Request { names, ..Request::default() }).unwrap();
    assert_eq!(answer(&mut s, "v1"), resources(&["ROOTCA"]), "the client has the version that it reports");
    s.request(delta(&["default", "*"], &[], "")).unwrap();
    assert_eq!(answer(&mut s, "v1"), resources(&["default", "ROOTCA"]));
}

#[test]
fn a_name_that_returns_before_the_answer_is_not_removed() {
    let mut s = delta_stream(delta(&["*", "spiffe://td"], &[], ""));
    s.request(delta(&[], &["spiffe://td"], "")).unwrap();
    s.request(delta(&["spiffe://td"], &[], "")).unwrap();
    assert_eq!(answer(&mut s, "v1"), resources(&["spiffe://td"]));
}

#[test]
fn sotw_answers_a_name_that_was_sent_for_the_wildcard_only() {
    let mut s = stream(SOTW);
    s.request(sotw(&["*"], "", "")).unwrap();
    answer(&mut s, "v1");
    s.request(sotw(&["*", "default"], "v1", "1")).unwrap();
    assert_eq!(answer(&mut s, "v1"), resources(&["default", "ROOTCA"]));
    s.request(sotw(&["default"], "v1", "2")).unwrap();
    assert_eq!(answer(&mut s, "v1"), None);
    s.request(sotw(&["default", "*"], "v1", "2")).unwrap();
    assert_eq!(answer(&mut s, "v1"), resources(&["default", "ROOTCA"]));
}

#[test]
fn a_wildcard_counts_as_the_names_that_it_covers() {
    let mut s = delta_stream(delta(&["*", "a", "b"], &[], ""));
    assert_eq!(s.request(delta(&["default"], &[], "")), Ok(Received::Subscription));
    assert_eq!(s.request(delta(&["c"], &[], "")), Err(Violation::TooManyNames(4)));
}
