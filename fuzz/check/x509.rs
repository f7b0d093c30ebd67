//! Properties of any certificates and revocation lists, read and verified as Envoy does. An input is a sequence of items: a byte for the
//! kind, two bytes for the length, and DER.

use envoy_x509::{Certificate, Place, RevocationList, check_revocation, verify};
use x509_parser::prelude::{FromDer, X509Certificate};

/// In the validity of the certificates of the corpus.
const NOW: i64 = 1_796_100_000;

/// Panics if a second parser reads a certificate differently, or if a path or an error is not plausible.
pub fn check(data: &[u8]) {
    let (mut chain, mut bundle, mut lists) = (Vec::new(), Vec::new(), Vec::new());
    let mut rest = data;
    while let [kind, high, low, tail @ ..] = rest {
        let len = usize::from(u16::from_be_bytes([*high, *low])).min(tail.len());
        let (der, next) = tail.split_at(len);
        match kind % 3 {
            0 => chain.extend(read(der)),
            1 => bundle.extend(read(der)),
            _ => lists.extend(RevocationList::from_der(der)),
        }
        rest = next;
    }
    let verdict = verify(&chain, &bundle, NOW);
    assert_eq!(verdict, verify(&chain, &bundle, NOW), "the same input has the same verdict");
    match verdict {
        Ok(path) => {
            assert!(path.places.iter().any(|place| matches!(place, Place::Bundle(_))), "a path has a trusted certificate");
            let certificates: Vec<&Certificate<'_>> = path
                .places
                .iter()
                .map(|place| match place {
                    Place::Chain(index) => &chain[*index],
                    Place::Bundle(index) => &bundle[*index],
                })
                .collect();
            assert!(certificates.iter().all(|certificate| certificate.not_after.seconds().is_some_and(|end| NOW < end)));
            if let Err((depth, _)) = check_revocation(&certificates, &lists, NOW) {
                assert!(depth < certificates.len());
            }
        }
        Err(refusal) => judge(&refusal.to_string()),
    }
}

fn read(der: &[u8]) -> Option<Certificate<'_>> {
    let certificate = match Certificate::from_der(der) {
        Ok(certificate) => certificate,
        Err(fault) => {
            judge(&fault.to_string());
            return None;
        }
    };
    if let Ok((rest, other)) = X509Certificate::from_der(der) {
        assert!(rest.is_empty());
        assert_eq!((certificate.subject.der(), certificate.issuer.der()), (other.subject().as_raw(), other.issuer().as_raw()));
        assert_eq!((certificate.serial(), certificate.public_key.der), (other.raw_serial(), other.public_key().raw));
    }
    Some(certificate)
}

/// An error is one short line.
fn judge(error: &str) {
    assert!(error.len() < 400 && !error.chars().any(char::is_control), "{error:?}");
}
