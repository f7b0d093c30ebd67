use super::{crl::samples::Authority, *};

fn pem(name: &str) -> Vec<u8> {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.self_signed(&key).unwrap().pem().into_bytes()
}

#[test]
fn a_bad_offer_never_replaces_a_good_bundle() {
    let trust = Trust::new(Metrics::default());
    let source = trust.source(None, "file a");
    let mut watcher = trust.subscribe();
    source.offer(&pem("a")).unwrap();
    let good = watcher.borrow_and_update().own.clone().unwrap();

    for bad in [&b""[..], b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        let refused = source.offer(bad).unwrap_err();
        assert!(refused.to_string().starts_with("trust bundle from file a "), "{refused}");
    }
    source.missing("the file was removed");
    assert!(!watcher.has_changed().unwrap());
    assert!(Arc::ptr_eq(&good, watcher.borrow().own.as_ref().unwrap()));
    assert_eq!(trust.0.metrics.refused.get_or_create(&source.label()).get(), 4);
}

#[test]
fn sources_of_a_domain_are_joined_and_equal_content_wakes_nobody() {
    let trust = Trust::new(Metrics::default());
    let (first, second) = (trust.source(None, "a"), trust.source(None, "b"));
    let (a, b) = (pem("a"), pem("b"));
    let mut watcher = trust.subscribe();
    second.offer(&b).unwrap();
    first.offer(&a).unwrap();
    let set = watcher.borrow_and_update().clone();
    assert_eq!(set.own.as_ref().unwrap().roots, TrustBundle::from_pem(&[a.clone(), b].concat()).unwrap());
    first.offer(&a).unwrap();
    assert!(!watcher.has_changed().unwrap());
}

fn chain(certificates: &[&Authority]) -> CertificateChain {
    let pem: String = certificates.iter().map(|authority| authority.certificate.pem()).collect();
    CertificateChain::from_pem(pem.as_bytes()).unwrap()
}

#[test]
fn another_domains_lists_are_not_served() {
    let trust = Trust::new(Metrics::default());
    let (partner, a) = (TrustDomain::new("partner.example").unwrap(), Authority::new("a"));
    trust.source(Some(partner.clone()), "partner").offer([a.certificate.pem(), a.list(1, 0)].concat().as_bytes()).unwrap();
    trust.met(&chain(&[&a]), SystemTime::now());
    let set = trust.subscribe().borrow().clone();
    assert!(set.federated[&partner].crls().is_empty() && !set.wants_chain);
}

#[test]
fn crls_are_served_only_when_every_root_has_one() {
    let metrics = Metrics::default();
    let trust = Trust::new(metrics.clone());
    let (roots, crls) = (trust.source(None, "roots"), trust.source(None, "lists"));
    let (a, b) = (Authority::new("a"), Authority::new("b"));
    let own = || trust.subscribe().borrow().own.clone().unwrap();
    let counts = || [State::served, State::withheld].map(|state| metrics.crls.get_or_create(&Standing { state }).get());
    // Revocation lists without roots wait for roots, and for an issued chain.
    crls.offer(a.list(1, 0).as_bytes()).unwrap();
    assert!(trust.subscribe().borrow().own.is_none());
    roots.offer(a.certificate.pem().as_bytes()).unwrap();
    assert!(own().crls().is_empty() && trust.subscribe().borrow().wants_chain);
    trust.met(&chain(&[&b]), SystemTime::now());
    assert!(!trust.subscribe().borrow().wants_chain);
    assert!(own().crls_pem().is_some_and(|pem| pem.starts_with(b"-----BEGIN X509 CRL-----")));
    assert_eq!((own().crls()[0].revoked, counts()), (1, [1, 0]));
    assert_ne!(own().version(), own().roots.version(), "other content has another version");

    for bad in [&b""[..], b"garbage", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"] {
        crls.offer(bad).unwrap_err();
    }
    assert_eq!(own().crls().len(), 1);
    // The second root has no list: clients would reject all its peers.
    roots.offer([a.certificate.pem(), b.certificate.pem()].concat().as_bytes()).unwrap();
    assert_eq!((own().crls().len(), own().roots.roots().len(), counts()), (0, 2, [0, 1]));
    assert_eq!(own().version(), own().roots.version());
    crls.offer([a.list(1, 0), b.list(0, 0)].concat().as_bytes()).unwrap();
    assert_eq!((own().crls().len(), counts()), (2, [2, 0]));
    assert!(metrics.next_update.get_or_create(&crls.label()).get() > metrics.this_update.get_or_create(&crls.label()).get());

    // An offer of lists alone removes no root, and an offer of roots alone removes no list.
    roots.offer(a.list(3, 0).as_bytes()).unwrap();
    assert_eq!(own().roots.roots().len(), 2);
    roots.offer([a.certificate.pem(), b.certificate.pem()].concat().as_bytes()).unwrap();
    assert_eq!(own().crls().len(), 2);
}

#[test]
fn an_authority_below_a_root_needs_a_list_while_its_certificates_live() {
    let trust = Trust::new(Metrics::default());
    let root = Authority::new("root");
    let below = root.below("below");
    trust.source(None, "all").offer([root.certificate.pem(), root.list(0, 0)].concat().as_bytes()).unwrap();
    let served = || trust.subscribe().borrow().own.as_ref().unwrap().crls().len();
    let now = SystemTime::now();
    let issued = |authorities: &[&Authority]| {
        let pem: String = authorities.iter().map(|authority| authority.certificate.pem()).collect();
        CertificateChain::from_pem((authorities.first().unwrap_or(&&root).leaf() + &pem).as_bytes()).unwrap()
    };
    trust.met(&issued(&[]), now);
    assert_eq!(served(), 1);
    let deep = issued(&[&below]);
    trust.met(&deep, now);
    assert_eq!(served(), 0, "no client would accept a certificate of the intermediate");
    trust.source(None, "below").offer(below.list(0, 0).as_bytes()).unwrap();
    assert_eq!(served(), 2);
    // The last certificate of the intermediate has expired.
    let later = deep.validity.not_after + std::time::Duration::from_secs(1);
    trust.met(&issued(&[]), later);
    assert_eq!(trust.offers().chains.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_ended_root_is_left_out_at_its_end_and_the_last_one_stays() {
    let (now, second) = (SystemTime::now(), std::time::Duration::from_secs(1));
    let clock = clock::TestClock::new(now);
    let trust = Trust::with_clock(Metrics::default(), Arc::new(clock.clone()));
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(trust.clone().run(shutdown.clone()));
    let (current, old) = (Authority::until("current", now + 7200 * second), Authority::until("old", now + 3600 * second));
    trust.source(None, "all").offer([old.certificate.pem(), current.certificate.pem(), current.list(0, 0)].concat().as_bytes()).unwrap();
    trust.met(&chain(&[&Authority::new("leaf")]), now);
    let mut watcher = trust.subscribe();
    let own = || trust.subscribe().borrow().own.clone().unwrap();
    assert_eq!((own().roots.roots().len(), own().crls().len()), (2, 0), "the old root has no list");
    // The list ends before the old root does, and is issued again.
    tokio::time::timeout(3700 * second, watcher.changed()).await.expect("the old root has ended").unwrap();
    assert_eq!(own().roots.roots(), [current.der()]);
    trust.source(None, "lists").offer(current.list_at(now + 3500 * second).as_bytes()).unwrap();
    assert_eq!(own().crls().len(), 1);
    let last = own();
    tokio::time::sleep(3700 * second).await;
    assert_eq!(own().roots, last.roots, "the last bundle stays although its root has ended");
    shutdown.cancel();
    running.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_step_of_the_clock_and_back_loses_no_root_and_no_list() {
    let (now, day) = (SystemTime::now(), std::time::Duration::from_secs(86_400));
    let clock = clock::TestClock::new(now);
    let trust = Trust::with_clock(Metrics::default(), Arc::new(clock.clone()));
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(trust.clone().run(shutdown.clone()));
    let (short, long) = (Authority::until("short", now + 30 * day), Authority::until("long", now + 3000 * day));
    let lists = short.list(0, 0) + &long.list(0, 0);
    trust.source(None, "all").offer([short.certificate.pem(), long.certificate.pem(), lists].concat().as_bytes()).unwrap();
    trust.met(&chain(&[&Authority::until("leaf", now + 3000 * day)]), now);
    let served = || {
        let own = trust.subscribe().borrow().own.clone().unwrap();
        (own.roots.roots().len(), own.crls().len())
    };
    assert_eq!(served(), (2, 2));
    for (step, expected) in [(60, (1, 0)), (-60, (2, 2)), (-10, (2, 2)), (10, (2, 2))] {
        clock.step(step * 86_400);
        tokio::time::sleep(std::time::Duration::from_secs(120)).await;
        if step != -10 {
            assert_eq!(served(), expected, "{step}");
        }
    }
    shutdown.cancel();
    running.await.unwrap();
}

#[test]
fn an_offer_that_was_too_large_is_taken_when_another_source_shrinks() {
    let trust = Trust::new(Metrics::default());
    let long =
        |from: u32| -> String { (from..from + 40).map(|number| Authority::new(&format!("{number:0900}")).certificate.pem()).collect() };
    let [a, same, b] = ["a", "same", "b"].map(|name| trust.source(None, name));
    let (first, second, small) = (long(0), long(100), Authority::new("small").certificate.pem());
    a.offer(first.as_bytes()).unwrap();
    same.offer(first.as_bytes()).expect("equal roots count once");
    let count = || trust.subscribe().borrow().own.as_ref().map_or(0, |own| own.roots.roots().len());
    assert!(matches!(b.offer(second.as_bytes()).unwrap_err().cause, material::Error::NamesTooLarge(_)));
    a.offer(small.as_bytes()).unwrap();
    assert_eq!(count(), 41, "the first ones are still in the other source");
    same.offer(small.as_bytes()).unwrap();
    let all = trust.subscribe().borrow().own.clone().unwrap();
    assert_eq!((count(), all.roots.roots().ends_with(TrustBundle::from_pem(second.as_bytes()).unwrap().roots())), (41, true));
}

#[test]
fn roots_and_lists_of_one_source_are_judged_apart() {
    let trust = Trust::new(Metrics::default());
    let source = trust.source(None, "all");
    let (a, b) = (Authority::new("a"), Authority::new("b"));
    let garbage = "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
    let refused = source.offer([a.certificate.pem(), garbage.to_owned()].concat().as_bytes()).unwrap_err();
    assert!(matches!(refused.cause, material::Error::RevocationList { index: 1, .. }));
    let roots = || trust.subscribe().borrow().own.clone().unwrap().roots.clone();
    assert_eq!(roots().roots(), [a.der()]);
    // A usable list is taken beside roots that are not.
    let bad_root = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    source.offer([bad_root.to_owned(), a.list(1, 0)].concat().as_bytes()).unwrap_err();
    trust.met(&chain(&[&b]), SystemTime::now());
    let own = trust.subscribe().borrow().own.clone().unwrap();
    assert_eq!((own.roots.roots(), own.crls().len()), (&[a.der()][..], 1));
}

#[test]
fn all_sources_together_have_a_limit() {
    let trust = Trust::new(Metrics::default());
    let good = Authority::new("good");
    trust.source(None, "good").offer(good.certificate.pem().as_bytes()).unwrap();
    let long: String = (0..100).map(|number| Authority::new(&format!("{number:0900}")).certificate.pem()).collect();
    let refused = trust.source(None, "long names").offer(long.as_bytes()).unwrap_err();
    assert!(matches!(refused.cause, material::Error::NamesTooLarge(len) if len > MAX_NAME_BYTES), "{refused}");
    assert_eq!(trust.subscribe().borrow().own.clone().unwrap().roots.roots(), [good.der()]);
}

#[test]
fn domains_are_kept_apart() {
    let trust = Trust::new(Metrics::default());
    let partner = TrustDomain::new("partner.example").unwrap();
    trust.source(None, "own").offer(&pem("a")).unwrap();
    let own = trust.subscribe().borrow().own.clone().unwrap();
    trust.source(Some(partner.clone()), "partner").offer(&pem("b")).unwrap();
    let set = trust.subscribe().borrow().clone();
    assert!(Arc::ptr_eq(&own, set.own.as_ref().unwrap()), "a change of another domain does not replace the own bundle");
    assert!(set.federated.contains_key(&partner));
}
