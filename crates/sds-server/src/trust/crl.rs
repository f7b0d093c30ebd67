//! Certificate revocation lists (CRLs; RFC 5280, section 5) that are served with the roots of a bundle.
//!
//! A client that gets lists rejects a peer if the list of any authority in its chain is missing, ended, or not usable for another reason.
//! Envoy documents this for the field `crl` of its `CertificateValidationContext` (envoyproxy/envoy#12784). Therefore [`fit`] returns lists
//! only if Envoy accepts all known chains with them. Lists that Envoy would not use are left out, so that an older good list of the same
//! authority counts.

use std::time::SystemTime;

use agent_runtime::{clock, text};
use envoy_x509::{Certificate, Fault, KeyUsage, ListRefusal, Path, Place, RevocationList as Parsed, check_revocation, verify};
use rustls::pki_types::CertificateDer;

use crate::material::{Error, pem};

/// The revocation list of one authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevocationList {
    der: Vec<u8>,
    /// The issue time (`thisUpdate`).
    pub this_update: SystemTime,
    /// The expiry (`nextUpdate`). `None` if the list has no such field.
    pub next_update: Option<SystemTime>,
    /// The number of revoked certificates.
    pub revoked: usize,
}

impl RevocationList {
    fn parse(der: Vec<u8>, index: usize) -> Result<Self, Error> {
        let list = Parsed::from_der(&der).map_err(|why| Error::RevocationList { index, why })?;
        let time = |time: envoy_x509::Time| clock::from_unix_seconds(time.seconds().unwrap_or(0));
        let (this_update, next_update, revoked) = (time(list.this_update), list.next_update.map(time), list.revoked.len());
        Ok(Self { this_update, next_update, revoked, der })
    }

    /// The list in DER.
    pub fn der(&self) -> &[u8] {
        &self.der
    }
}

/// Reads the revocation lists of a PEM input. The result may be empty; certificates in the input are ignored.
///
/// # Errors
///
/// If the PEM is invalid or has more than [`MAX_CERTIFICATES`](crate::material::MAX_CERTIFICATES) lists, or Envoy would not read a list.
pub fn from_pem(pem: &[u8]) -> Result<Vec<RevocationList>, Error> {
    of_objects(pem::read(pem)?)
}

/// Reads the revocation lists among `objects`.
pub(crate) fn of_objects(objects: impl IntoIterator<Item = pem::Object>) -> Result<Vec<RevocationList>, Error> {
    let mut lists: Vec<RevocationList> = Vec::new();
    for object in objects.into_iter().filter(|object| object.kind == pem::Kind::RevocationList) {
        let list = RevocationList::parse(object.der, lists.len() + 1)?;
        if !lists.contains(&list) {
            lists.push(list);
        }
    }
    Ok(lists)
}

/// Returns the lists to serve at `now` with `roots`, all of which are served too: those with which Envoy accepts each of `chains`, the leaf
/// first, and each root itself. A chain that Envoy refuses without lists does not count.
///
/// # Errors
///
/// The reason why no list can be served, as a text for the operator: the first authority without a list that Envoy would use.
pub fn fit<'a>(
    roots: impl IntoIterator<Item = &'a CertificateDer<'static>>,
    chains: &[Vec<CertificateDer<'static>>],
    lists: &[RevocationList],
    now: SystemTime,
) -> Result<Vec<RevocationList>, String> {
    if lists.is_empty() {
        return Ok(Vec::new());
    }
    let seconds = i64::try_from(clock::unix_seconds(now)).unwrap_or(i64::MAX);
    let roots: Vec<Certificate<'_>> = roots.into_iter().filter_map(|root| Certificate::from_der(root).ok()).collect();
    let chains: Vec<Vec<Certificate<'_>>> =
        chains.iter().map(|chain| chain.iter().filter_map(|certificate| Certificate::from_der(certificate).ok()).collect()).collect();
    let authorities: Vec<&Certificate<'_>> = roots.iter().chain(chains.iter().flat_map(|chain| chain.iter().skip(1))).collect();
    let fitting: Vec<RevocationList> = lists.iter().filter(|list| is_usable(list, &authorities, seconds)).cloned().collect();
    let parsed: Vec<Parsed<'_>> = fitting.iter().filter_map(|list| Parsed::from_der(list.der()).ok()).collect();
    let all: Vec<Parsed<'_>> = lists.iter().filter_map(|list| Parsed::from_der(list.der()).ok()).collect();
    let check = |path: &[&Certificate<'_>]| match check_revocation(path, &parsed, seconds) {
        // A revoked certificate is the purpose of a list.
        Ok(()) | Err((_, ListRefusal::Revoked)) => Ok(()),
        Err((depth, refusal)) => {
            // The reason for which a list was left out says more than its absence.
            let refusal = match refusal {
                ListRefusal::Missing => check_revocation(path, &all, seconds).err().map_or(refusal, |(_, refusal)| refusal),
                refusal => refusal,
            };
            let authority = path.get(depth).map(|certificate| certificate.issuer.to_string()).unwrap_or_default();
            Err(format!("{}: {refusal}", text::excerpt(&authority, text::MAX_NAME_CHARS)))
        }
    };
    for chain in &chains {
        let Ok(path) = verify(chain, &roots, seconds) else { continue };
        check(&certificates_of(&path, chain, &roots))?;
    }
    for root in roots.iter().filter(|root| may_sign(root, seconds)) {
        check(&above(root, &roots))?;
    }
    Ok(fitting)
}

/// Whether one of the lists revokes a certificate on the path of `chain`, the leaf first, at `now`: peers with the lists refuse the chain.
pub fn revokes(roots: &[CertificateDer<'static>], chain: &[CertificateDer<'static>], lists: &[RevocationList], now: SystemTime) -> bool {
    let (Ok(roots), Ok(chain)) = (read(roots), read(chain)) else { return false };
    let seconds = i64::try_from(clock::unix_seconds(now)).unwrap_or(i64::MAX);
    let Ok(path) = verify(&chain, &roots, seconds) else { return false };
    let path = certificates_of(&path, &chain, &roots);
    let lists = lists.iter().filter(|list| is_usable(list, &path, seconds));
    let lists: Vec<Parsed<'_>> = lists.filter_map(|list| Parsed::from_der(list.der()).ok()).collect();
    matches!(check_revocation(&path, &lists, seconds), Err((_, ListRefusal::Revoked)))
}

fn read<'a>(certificates: &'a [CertificateDer<'static>]) -> Result<Vec<Certificate<'a>>, Fault> {
    certificates.iter().map(|der| Certificate::from_der(der)).collect()
}

/// Whether Envoy accepts the list for one of its authorities, or it is of none of them.
fn is_usable(list: &RevocationList, authorities: &[&Certificate<'_>], now: i64) -> bool {
    let Ok(list) = Parsed::from_der(list.der()) else { return false };
    let mut of = authorities.iter().filter(|authority| list.is_of(authority)).peekable();
    of.peek().is_none() || of.any(|authority| list.check(authority, now).is_ok())
}

fn certificates_of<'a, 'b>(path: &Path, chain: &'b [Certificate<'a>], roots: &'b [Certificate<'a>]) -> Vec<&'b Certificate<'a>> {
    let at = |place: &Place| match place {
        Place::Chain(index) => chain.get(*index),
        Place::Bundle(index) => roots.get(*index),
    };
    path.places.iter().filter_map(at).collect()
}

/// Whether the root is an issuer for Envoy at `now`: otherwise, a path with it needs no list of it.
fn may_sign(root: &Certificate<'_>, now: i64) -> bool {
    let has_begun = root.not_before.seconds().is_some_and(|begin| begin <= now);
    has_begun && root.extensions().is_ok_and(|own| own.key_usage.is_none_or(KeyUsage::key_cert_sign))
}

/// The root, and the authorities above it that are roots of the bundle too.
fn above<'a, 'b>(root: &'b Certificate<'a>, roots: &'b [Certificate<'a>]) -> Vec<&'b Certificate<'a>> {
    let mut path = vec![root];
    while let Some(last) = path.last().filter(|last| !last.is_self_issued()) {
        let Some(issuer) = roots.iter().find(|root| root.may_have_issued(last)) else { break };
        if path.iter().any(|known| std::ptr::eq(*known, issuer)) {
            break;
        }
        path.push(issuer);
    }
    path
}

#[cfg(any(test, feature = "testing"))]
pub mod samples;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{KeyIdMethod, KeyUsagePurpose};

    use super::{samples::Authority, *};
    use crate::material::CertificateChain;

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

    fn served(roots: &[&Authority], lists: &[RevocationList], at: SystemTime) -> Result<usize, String> {
        let roots: Vec<_> = roots.iter().map(|root| root.der()).collect();
        fit(&roots, &[], lists, at).map(|fitting| fitting.len())
    }

    #[test]
    fn each_authority_needs_a_list_that_it_has_signed() {
        let (a, b, other_a) = (Authority::new("a"), Authority::new("b"), Authority::new("a"));
        let fit = |lists: &[RevocationList]| served(&[&a, &b], lists, SystemTime::now());
        assert_eq!(fit(&[]), Ok(0));
        assert_eq!(fit(&lists(&[a.list(0, 0), b.list(1, 0)])), Ok(2));
        let missing = |name: &str| Err(format!("CN={name}: there is no list of it, or the lists of its name are of another key"));
        assert_eq!(fit(&lists(&[a.list(0, 0)])), missing("b"));
        assert_eq!(fit(&lists(&[other_a.list(0, 0), b.list(1, 0)])), missing("a"));
        let misnamed = lists(&[a.list_naming(KeyIdMethod::PreSpecified(vec![1; 20]), 0, 0), b.list(1, 0)]);
        assert_eq!(fit(&misnamed), missing("a"), "Envoy does not find the list");
        // A list of an unknown authority.
        assert_eq!(fit(&lists(&[a.list(0, 0), b.list(1, 0), Authority::new("c").list(0, 0)])), Ok(3));
    }

    #[test]
    fn an_older_list_counts_where_the_newest_is_not_usable() {
        let (a, now) = (Authority::new("a"), SystemTime::now());
        let of_tomorrow = lists(&[a.list_at(now + Duration::from_secs(86_400))]);
        assert_eq!(served(&[&a], &of_tomorrow, now), Err("CN=a: its list is not valid yet: its clock is ahead".to_owned()));
        let both = [of_tomorrow, lists(&[a.list(1, 100)])].concat();
        assert_eq!(served(&[&a], &both, now), Ok(1));
        assert_eq!(
            served(&[&a], &both, now + Duration::from_secs(7200)),
            Err("CN=a: its list is not valid yet: its clock is ahead".to_owned())
        );
        assert_eq!(served(&[&a], &lists(&[a.list(1, 7200)]), now), Err("CN=a: its list has ended".to_owned()));
    }

    #[test]
    fn a_chain_needs_lists_of_all_its_authorities() {
        let (root, now) = (Authority::new("root"), SystemTime::now());
        let below = root.below("below");
        let chain: Vec<CertificateDer<'static>> =
            CertificateChain::from_pem(&[below.leaf(), below.certificate.pem()].concat().into_bytes()).unwrap().certificates().to_vec();
        let fit = |lists: &[RevocationList]| fit(&[root.der()], std::slice::from_ref(&chain), lists, now).map(|fitting| fitting.len());
        assert!(fit(&lists(&[root.list(0, 0)])).unwrap_err().starts_with("CN=below: there is no list"));
        assert_eq!(fit(&lists(&[root.list(0, 0), below.list(0, 0)])), Ok(2));
        let revokes = |lists: &[RevocationList]| revokes(&[root.der()], &chain, lists, now);
        assert!(!revokes(&lists(&[root.list(0, 0), below.list(0, 0)])));
    }

    #[test]
    fn an_authority_that_may_not_sign_lists_has_none() {
        let a = Authority::new("a");
        let root = a.der_with("a", vec![KeyUsagePurpose::KeyCertSign]);
        let refused = fit(&[root], &[], &lists(&[a.list(0, 0)]), SystemTime::now()).unwrap_err();
        assert_eq!(refused, "CN=a: it may not sign revocation lists: its key usage has no cRLSign");
    }
}
