//! Certificate revocation lists (CRLs; RFC 5280, section 5) that are served with the roots of a bundle.
//!
//! A client that gets lists rejects a peer if the list of any authority in its chain is missing, expired, or not signed by the authority.
//! Envoy documents this for the field `crl` of its `CertificateValidationContext` (envoyproxy/envoy#12784). Therefore [`fit`] returns lists
//! only if each known authority has one.
//!
//! An expired list is still served. The metric `crl_next_update_timestamp_seconds` shows the expiry in advance.

use std::time::SystemTime;

use agent_runtime::{clock, text};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use x509_parser::{
    certificate::X509Certificate, extensions::ParsedExtension, prelude::FromDer, revocation_list::CertificateRevocationList,
};

use crate::material::{BrokenPem, Error, MAX_CERTIFICATES, fault_of};

/// The revocation list of one authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevocationList {
    der: Vec<u8>,
    /// The name of the authority, in DER.
    issuer: Vec<u8>,
    /// The issue time (`thisUpdate`).
    pub this_update: SystemTime,
    /// The expiry (`nextUpdate`). `None` if the list has no such field.
    pub next_update: Option<SystemTime>,
    /// The number of revoked certificates.
    pub revoked: usize,
}

impl RevocationList {
    fn parse(der: &[u8], index: usize) -> Result<Self, Error> {
        let broken = |why: String| Error::RevocationList { index, why };
        let (rest, list) = CertificateRevocationList::from_der(der).map_err(|error| broken(fault_of(&error).to_owned()))?;
        if !rest.is_empty() {
            return Err(broken(format!("{} bytes follow it", rest.len())));
        }
        // A delta CRL, or a CRL with a limited scope, has a critical extension (RFC 5280, section 5.2). A client that does not know the
        // extension would misread the list.
        if let Some(extension) = list.extensions().iter().find(|extension| extension.critical) {
            let oid = text::excerpt(&extension.oid.to_string(), text::MAX_NAME_CHARS);
            return Err(broken(format!("it has the critical extension {oid}; only complete lists can be served")));
        }
        Ok(Self {
            issuer: list.issuer().as_raw().to_vec(),
            this_update: clock::from_unix_seconds(list.last_update().timestamp()),
            next_update: list.next_update().map(|time| clock::from_unix_seconds(time.timestamp())),
            revoked: list.iter_revoked_certificates().count(),
            der: der.to_vec(),
        })
    }

    /// The list in DER.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// Whether a client assigns the list to `authority`: by the signature, and by the key identifiers if both have one.
    fn is_of(&self, authority: &X509Certificate<'_>) -> bool {
        let Ok((_, list)) = CertificateRevocationList::from_der(&self.der) else { return false };
        let told = list.extensions().iter().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref().map(|id| id.0),
            _ => None,
        });
        let own = authority.extensions().iter().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0),
            _ => None,
        });
        told.zip(own).is_none_or(|(told, own)| told == own) && list.verify_signature(authority.public_key()).is_ok()
    }
}

/// Reads the revocation lists of a PEM input. The result may be empty; certificates in the input are ignored.
///
/// # Errors
///
/// If the PEM is invalid or has more than [`MAX_CERTIFICATES`] lists, a list is not valid DER, or a list has a critical extension.
pub fn from_pem(pem: &[u8]) -> Result<Vec<RevocationList>, Error> {
    let mut lists: Vec<RevocationList> = Vec::new();
    let mut blocks = CertificateRevocationListDer::pem_slice_iter(pem);
    let mut rest = blocks.remainder();
    while let Some(list) = blocks.next() {
        if lists.len() == MAX_CERTIFICATES {
            return Err(Error::TooMany);
        }
        let list = list.map_err(|error| Error::Pem(BrokenPem::of(&error, pem, rest, lists.len())))?;
        let list = RevocationList::parse(&list, lists.len() + 1)?;
        if !lists.contains(&list) {
            lists.push(list);
        }
        rest = blocks.remainder();
    }
    Ok(lists)
}

/// Returns the lists to serve at `now` with `authorities`, which must be parsable certificates: the newest list of each, and all lists of
/// other authorities. An authority that has expired needs no list, because clients accept no certificate of it.
///
/// # Errors
///
/// The reason why no list can be served, as a text for the operator: an authority has no list that it has signed, or must not sign lists.
pub fn fit<'a>(
    authorities: impl Iterator<Item = &'a CertificateDer<'static>>,
    lists: &[RevocationList],
    now: SystemTime,
) -> Result<Vec<RevocationList>, String> {
    let mut fitting: Vec<RevocationList> = Vec::new();
    if lists.is_empty() {
        return Ok(fitting);
    }
    let mut known = Vec::new();
    for authority in authorities {
        let Ok((_, authority)) = X509Certificate::from_der(authority) else { continue };
        if not_after(&authority) < now {
            continue;
        }
        let (name, raw) = (text::excerpt(&authority.subject().to_string(), text::MAX_NAME_CHARS), authority.subject().as_raw());
        if authority.key_usage().ok().flatten().is_some_and(|usage| !usage.value.crl_sign()) {
            return Err(format!("{name} may not sign revocation lists: its key usage has no cRLSign"));
        }
        let own = || lists.iter().filter(|list| list.issuer == raw);
        let newest = own().filter(|list| list.is_of(&authority)).max_by_key(|list| list.this_update);
        match newest {
            Some(list) if fitting.contains(list) => {}
            Some(list) => fitting.push(list.clone()),
            None if own().next().is_some() => {
                return Err(format!("the revocation list of {name} is not signed by its key, or names another key"));
            }
            None => return Err(format!("there is no revocation list of {name}")),
        }
        known.push(raw.to_vec());
    }
    fitting.extend(lists.iter().filter(|list| !known.contains(&list.issuer)).cloned());
    Ok(fitting)
}

/// Returns the first time from `now` on after which one of `authorities` has expired, so that [`fit`] has another result.
pub fn next_expiry<'a>(authorities: impl Iterator<Item = &'a CertificateDer<'static>>, now: SystemTime) -> Option<SystemTime> {
    authorities.filter_map(|authority| Some(not_after(&X509Certificate::from_der(authority).ok()?.1))).filter(|at| *at >= now).min()
}

fn not_after(authority: &X509Certificate<'_>) -> SystemTime {
    clock::from_unix_seconds(authority.validity().not_after.timestamp())
}

#[cfg(any(test, feature = "testing"))]
pub mod samples;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{KeyIdMethod, KeyUsagePurpose};

    use super::{samples::Authority, *};

    fn lists(pem: &[String]) -> Vec<RevocationList> {
        from_pem(pem.concat().as_bytes()).unwrap()
    }

    #[test]
    fn lists_are_read_beside_certificates_and_what_is_none_is_refused() {
        let authority = Authority::new("a");
        let read = lists(&[authority.certificate.pem(), authority.list(2, 0)]);
        assert_eq!((read.len(), read[0].revoked), (1, 2));
        assert_eq!(read[0].next_update.unwrap().duration_since(read[0].this_update).unwrap(), Duration::from_secs(3600));
        assert_eq!(lists(&[authority.certificate.pem()]), []);
        let garbage = b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
        assert!(matches!(from_pem(garbage), Err(Error::RevocationList { index: 1, .. })));
    }

    #[test]
    fn each_authority_needs_a_list_that_it_has_signed() {
        let (a, b, other_a) = (Authority::new("a"), Authority::new("b"), Authority::new("a"));
        let both = [a.der(), b.der()];
        let fit = |lists: &[RevocationList]| super::fit(both.iter(), lists, SystemTime::now()).map(|fitting| fitting.len());
        assert_eq!(fit(&[]), Ok(0));
        assert_eq!(fit(&lists(&[a.list(0, 0), b.list(1, 0)])), Ok(2));
        assert_eq!(fit(&lists(&[a.list(0, 0)])), Err("there is no revocation list of CN=b".to_owned()));
        let forged = lists(&[other_a.list(0, 0), b.list(1, 0)]);
        assert_eq!(fit(&forged), Err("the revocation list of CN=a is not signed by its key, or names another key".to_owned()));
        let misnamed = lists(&[a.list_naming(KeyIdMethod::PreSpecified(vec![1; 20]), 0, 0), b.list(1, 0)]);
        assert_eq!(fit(&misnamed), fit(&forged), "Envoy does not find the list");
        // A list of an intermediate authority.
        assert_eq!(fit(&lists(&[a.list(0, 0), b.list(1, 0), Authority::new("c").list(0, 0)])), Ok(3));
    }

    #[test]
    fn two_authorities_of_one_name_have_a_list_each_and_the_newest_counts() {
        let (old, new) = (Authority::new("a"), Authority::new("a"));
        let all = lists(&[old.list(1, 100), old.list(2, 0), new.list(3, 0)]);
        let fitting = fit([old.der(), new.der()].iter(), &all, SystemTime::now()).unwrap();
        assert_eq!(fitting.iter().map(|list| list.revoked).collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn an_expired_authority_needs_no_list() {
        let (now, second) = (SystemTime::now(), Duration::from_secs(1));
        let (current, old) = (Authority::new("a"), Authority::until("b", now - 10 * second));
        let both = [current.der(), old.der()];
        let served = |at| fit(both.iter(), &lists(&[current.list(1, 0)]), at).map(|fitting| fitting.len());
        assert_eq!(served(now), Ok(1));
        assert_eq!(served(now - 20 * second), Err("there is no revocation list of CN=b".to_owned()), "it had not expired");
        assert_eq!(next_expiry(both.iter(), now - 20 * second).map(clock::unix_seconds), Some(clock::unix_seconds(now - 10 * second)));
        assert!(next_expiry(both.iter(), now).is_some_and(|at| at > now), "that of the other authority");
    }

    #[test]
    fn who_may_not_sign_lists_has_none() {
        let a = Authority::with("a", vec![KeyUsagePurpose::KeyCertSign]);
        let refused = fit([a.der()].iter(), &lists(&[Authority::new("a").list(0, 0)]), SystemTime::now()).unwrap_err();
        assert_eq!(refused, "CN=a may not sign revocation lists: its key usage has no cRLSign");
    }
}
