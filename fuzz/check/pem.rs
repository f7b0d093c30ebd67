//! Properties of any PEM text, read as the chain of an issuer, as a bundle and as revocation lists.

use std::time::{Duration, SystemTime};

use sds_server::{
    material::{CertificateChain, Error, MAX_CERTIFICATES, TrustBundle},
    trust::crl,
};

/// Panics if something is accepted that cannot be written and read again, or if an error repeats the input.
pub fn check(data: &[u8]) {
    let (chain, bundle, lists) = (CertificateChain::from_pem(data), TrustBundle::from_pem(data), crl::from_pem(data));
    // A bundle has what a chain has, without what follows from the leaf.
    if let Ok(chain) = &chain {
        let bundle = bundle.as_ref().expect("every chain is a bundle");
        assert!(chain.certificates().iter().all(|certificate| bundle.roots().contains(certificate)));
        let again = CertificateChain::from_pem(&chain.to_pem()).expect("a chain is read again");
        assert_eq!((chain.certificates(), &chain.uris, &chain.dns_names), (again.certificates(), &again.uris, &again.dns_names));
    }
    if let Ok(bundle) = &bundle {
        assert!((1..=MAX_CERTIFICATES).contains(&bundle.roots().len()));
        assert_eq!(TrustBundle::from_pem(&bundle.to_pem()).as_ref(), Ok(bundle));
        let twice = [data, b"\n", data].concat();
        if let Ok(twice) = TrustBundle::from_pem(&twice) {
            assert_eq!(twice.version(), bundle.version(), "a root counts once");
        }
    }
    if let (Ok(bundle), Ok(lists)) = (&bundle, &lists) {
        for seconds in [0, 1_800_000_000] {
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            match crl::fit(bundle.roots(), &[bundle.roots().to_vec()], lists, now) {
                Ok(fitting) => assert!(fitting.iter().all(|list| lists.contains(list))),
                Err(why) => assert!(why.len() < 1000 && !why.chars().any(char::is_control), "{why:?}"),
            }
        }
    }
    let errors: [Option<Error>; 3] = [chain.err(), bundle.err(), lists.err()];
    for error in errors.into_iter().flatten() {
        judge(&error.to_string(), data);
    }
}

/// An error is one short line. It repeats no part of the input, which may be a private key.
fn judge(error: &str, data: &[u8]) {
    assert!(error.len() < 400 && !error.chars().any(char::is_control), "{error:?}");
    let text = String::from_utf8_lossy(data);
    for line in text.lines().filter(|line| line.len() >= 32 && !line.contains(' ')) {
        assert!(!error.contains(line), "{error:?} repeats a line");
    }
}
