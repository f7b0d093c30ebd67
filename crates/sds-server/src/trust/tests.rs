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
    let (root, below) = (Authority::new("root"), Authority::new("below"));
    trust.source(None, "all").offer([root.certificate.pem(), root.list(0, 0)].concat().as_bytes()).unwrap();
    let served = || trust.subscribe().borrow().own.as_ref().unwrap().crls().len();
    let leaf = Authority::new("leaf");
    let now = SystemTime::now();
    trust.met(&chain(&[&leaf]), now);
    assert_eq!(served(), 1);
    let deep = chain(&[&leaf, &below]);
    trust.met(&deep, now);
    assert_eq!(served(), 0, "no client would accept a certificate of the intermediate");
    trust.source(None, "below").offer(below.list(0, 0).as_bytes()).unwrap();
    assert_eq!(served(), 2);
    // The last certificate of the intermediate has expired.
    let later = deep.validity.not_after + std::time::Duration::from_secs(1);
    trust.met(&chain(&[&leaf, &root]), later);
    assert_eq!(trust.offers().intermediates.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn lists_are_served_once_the_authority_without_one_has_expired() {
    let (now, hour) = (SystemTime::now(), std::time::Duration::from_secs(3600));
    let clock = clock::TestClock::new(now);
    let trust = Trust::with_clock(Metrics::default(), Arc::new(clock.clone()));
    let (current, old) = (Authority::new("current"), Authority::until("old", now + hour));
    let all = [current.certificate.pem(), old.certificate.pem(), current.list(0, 0)].concat();
    trust.source(None, "all").offer(all.as_bytes()).unwrap();
    let served = || trust.subscribe().borrow().own.as_ref().unwrap().crls().len();
    let leaf = chain(&[&Authority::new("leaf")]);
    trust.met(&leaf, clock.now());
    assert_eq!(served(), 0);
    clock.step(3602);
    trust.met(&leaf, clock.now());
    assert_eq!(served(), 1, "the old root is still in the bundle");
    assert_eq!(trust.subscribe().borrow().own.as_ref().unwrap().roots.roots().len(), 2);
    // A new offer is compared at its own time.
    trust.source(None, "more").offer(Authority::until("older", now - hour).certificate.pem().as_bytes()).unwrap();
    assert_eq!(served(), 1);
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
