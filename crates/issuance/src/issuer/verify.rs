//! Checks an issuer's answer before it is published.
//!
//! [`verify`] is a pure function of identity, key, chain, bundle and time. The agent serves exactly the certificates that were checked, in
//! the issuer's order: the leaf first, then the others. Certificates that are on no path to a root stay in the chain. Peers ignore them,
//! and one of them may be the cross-signed root that peers with an older bundle need.
//!
//! The checks reject certificates that a peer would reject. Usages follow the SPIFFE X.509-SVID specification (sections 4.1, 4.3 and 4.4),
//! as Envoy and go-spiffe enforce it:
//!
//! - An absent extended key usage allows every use (RFC 5280, section 4.2.1.12). A present one must name `serverAuth` and `clientAuth`.
//! - A present key usage must have `digitalSignature`, and must have neither `keyCertSign` nor `cRLSign`.

use std::time::{Duration, SystemTime};

use agent_runtime::{clock, text};
use aws_lc_rs::{
    encoding::{AsDer, PublicKeyX509Der},
    rsa,
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use sds_server::material::{self, CertificateChain, PrivateKey, TrustBundle, Validity};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use workload_identity::{Identity, KeyType, version::Digest};
use x509_parser::prelude::{FromDer, X509Certificate, X509Error};

/// Maximum time by which the signer's clock may be ahead of the agent's: 60 s.
pub const ALLOWED_SKEW: Duration = Duration::from_secs(60);
/// Maximum number of a certificate's names that an error shows.
const MAX_SHOWN_NAMES: usize = 8;

/// Why a certificate must not be served. The caller keeps the certificate in use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The chain is not PEM or not X.509, is empty, or is too large.
    #[error("the chain {0}; the issuer must return certificates in PEM, the leaf first")]
    Chain(#[from] material::Error),
    /// No certificate of the chain has the key of the order, or that key is not of the profile's type.
    #[error("the leaf's public key is not the one that was asked for; the issuer must sign the key of the request")]
    Key,
    /// A certificate after the first one has the key of the order.
    #[error("certificate {index} of the chain, not the first, is for the key that was asked for; the leaf must come first")]
    Order {
        /// Position of that certificate, from 1.
        index: usize,
    },
    /// The URI SANs are not exactly the SPIFFE ID of the identity.
    #[error(
        "the leaf's URI SANs are {found:?}, not exactly [{expected:?}]; the issuer may rewrite or drop names (Vault: allowed_uri_sans, use_csr_sans)"
    )]
    SpiffeId {
        /// The SPIFFE ID of the identity.
        expected: String,
        /// The URI SANs of the leaf.
        found: Vec<String>,
    },
    /// The DNS SANs are not those of the identity.
    #[error("the leaf's DNS SANs are {found:?}, not {expected:?}")]
    DnsNames {
        /// The DNS names of the identity.
        expected: Vec<String>,
        /// The DNS SANs of the leaf.
        found: Vec<String>,
    },
    /// The leaf has SANs of other kinds than URI and DNS.
    #[error("the leaf has subject alternative names of other kinds than URI and DNS")]
    OtherNames,
    /// The leaf has expired.
    #[error("the leaf expired at {0}: is the issuer's clock or this node's wrong?")]
    Expired(String),
    /// The leaf becomes valid later than [`ALLOWED_SKEW`] from now.
    #[error("the leaf is valid only from {from}, more than {} s from now: is this node's clock behind?", ALLOWED_SKEW.as_secs())]
    NotYetValid {
        /// `notBefore` of the leaf.
        from: String,
    },
    /// `notAfter` is not later than `notBefore`.
    #[error("the leaf's validity ends before it begins")]
    Validity,
    /// The leaf is a certificate of a CA, or has a usage that peers reject.
    #[error("the leaf {0}")]
    Usage(&'static str),
    /// No path leads to a root.
    #[error("{what}: {why}")]
    Path {
        /// The check that failed.
        what: &'static str,
        /// The finding of the path verifier.
        why: String,
    },
}

/// Result of a successful check.
#[derive(Debug)]
pub struct Verified {
    /// The root to which the chain leads. `None` without a bundle.
    pub anchor: Option<CertificateDer<'static>>,
    /// The authorities on the longest path to a root, from the one that signed the leaf. Empty for a lone leaf without a bundle.
    pub path: Vec<Digest>,
}

/// Checks `chain` for `identity` and `key` at `now`.
///
/// With a `bundle`, the chain must lead to one of its roots that has not expired. Without one, it must lead to its own last certificate.
///
/// # Errors
///
/// Returns the first [`Error`] found. The checks are, in order: key, SPIFFE ID, DNS names, other names, validity, usages, path.
pub fn verify(
    identity: &Identity,
    key: &PrivateKey,
    chain: &CertificateChain,
    bundle: Option<&TrustBundle>,
    now: SystemTime,
) -> Result<Verified, Error> {
    is_for(chain, &public_key(identity.profile.key, key).ok_or(Error::Key)?)?;
    if !matches!(&chain.uris[..], [uri] if uri == identity.spiffe_id.as_str()) {
        return Err(Error::SpiffeId { expected: identity.spiffe_id.to_string(), found: shown(&chain.uris) });
    }
    if !same_names(&chain.dns_names, &identity.dns_names) {
        return Err(Error::DnsNames { expected: identity.dns_names.to_vec(), found: shown(&chain.dns_names) });
    }
    if chain.other_names {
        return Err(Error::OtherNames);
    }
    in_time(chain.validity, now)?;
    let (leaf, others) = chain.certificates().split_first().ok_or(Error::Chain(material::Error::Empty))?;
    usages(leaf)?;
    path(leaf, others, bundle, now.max(chain.validity.not_before))
}

/// Checks that the leaf has this key. The error says if another certificate of the chain has it.
fn is_for(chain: &CertificateChain, public_key: &[u8]) -> Result<(), Error> {
    if chain.public_key == public_key {
        return Ok(());
    }
    let is_it = |der: &CertificateDer<'_>| X509Certificate::from_der(der).is_ok_and(|(_, c)| c.public_key().raw == public_key);
    match chain.certificates().iter().position(is_it) {
        Some(place) => Err(Error::Order { index: place + 1 }),
        None => Err(Error::Key),
    }
}

fn in_time(validity: Validity, now: SystemTime) -> Result<(), Error> {
    if validity.not_after <= validity.not_before {
        return Err(Error::Validity);
    }
    if !validity.is_live(now) {
        return Err(Error::Expired(clock::rfc3339(validity.not_after)));
    }
    if validity.not_before > now + ALLOWED_SKEW {
        return Err(Error::NotYetValid { from: clock::rfc3339(validity.not_before) });
    }
    Ok(())
}

/// Checks that the leaf is an end-entity certificate for both sides of TLS. The path verifier checks only extended key usages, and only if
/// there is a path.
fn usages(leaf: &CertificateDer<'_>) -> Result<(), Error> {
    let broken = |why: X509Error| Error::Chain(material::Error::X509 { index: 1, why: material::fault(&why).to_owned() });
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|why| broken(why.into()))?;
    if leaf.basic_constraints().map_err(broken)?.is_some_and(|constraints| constraints.value.ca) {
        return Err(Error::Usage("is a certificate authority's"));
    }
    if let Some(usage) = leaf.key_usage().map_err(broken)? {
        if !usage.value.digital_signature() {
            return Err(Error::Usage("has a key usage without digitalSignature"));
        }
        if usage.value.key_cert_sign() || usage.value.crl_sign() {
            return Err(Error::Usage("has the key usage of an authority (keyCertSign or cRLSign)"));
        }
    }
    if let Some(usage) = leaf.extended_key_usage().map_err(broken)? {
        if !usage.value.server_auth {
            return Err(Error::Usage("has an extended key usage without serverAuth"));
        }
        if !usage.value.client_auth {
            return Err(Error::Usage("has an extended key usage without clientAuth"));
        }
    }
    Ok(())
}

/// Builds the path to a root that has not expired, for both usages. Without a bundle, the last certificate of the chain is the root.
///
/// The verifier's path ends at the nearest trusted certificate, which may be an intermediate of a root that is trusted too.
fn path(leaf: &CertificateDer<'_>, others: &[CertificateDer<'_>], bundle: Option<&TrustBundle>, at: SystemTime) -> Result<Verified, Error> {
    let unreadable = |why: webpki::Error| Error::Path { what: "the leaf cannot be read", why: kind(&why) };
    let leaf = EndEntityCert::try_from(leaf).map_err(unreadable)?;
    let (roots, what) = match (bundle, others) {
        (Some(bundle), _) => (bundle.roots(), "the chain does not lead to the trust bundle"),
        (None, [.., last]) => (std::slice::from_ref(last), "the chain does not lead to its own last certificate"),
        // A lone leaf without a bundle: there is no path to check.
        (None, []) => return Ok(Verified { anchor: None, path: Vec::new() }),
    };
    // The verifier does not check the validity of a trust anchor (RFC 5280, section 6.1.1; rustls/webpki-roots#70). Peers do.
    let live: Vec<&CertificateDer<'_>> = roots.iter().filter(|root| is_live(root, at)).collect();
    let anchors: Vec<TrustAnchor<'_>> = live.iter().filter_map(|root| anchor_from_trusted_cert(root).ok()).collect();
    if anchors.is_empty() {
        return Err(Error::Path { what, why: "every root has expired or cannot be read".to_owned() });
    }
    let time = UnixTime::since_unix_epoch(Duration::from_secs(clock::unix_seconds(at)));
    let mut found = None;
    for usage in [KeyUsage::server_auth(), KeyUsage::client_auth()] {
        let path = leaf
            .verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &anchors, others, time, usage, None, None)
            .map_err(|why| Error::Path { what, why: in_words(&why) })?;
        let anchor = path.anchor();
        found = live.iter().find(|root| {
            anchor_from_trusted_cert(root)
                .is_ok_and(|root| root.subject == anchor.subject && root.subject_public_key_info == anchor.subject_public_key_info)
        });
    }
    let anchor = bundle.and(found).map(|root| (*root).clone().into_owned());
    let paths = live.iter().map(|root| authorities(&leaf, others, root, time));
    Ok(Verified { anchor, path: paths.max_by_key(Vec::len).unwrap_or_default() })
}

/// Returns the authorities on the path to `root`, from the one that signed the leaf. Empty if no path leads there.
fn authorities(leaf: &EndEntityCert<'_>, others: &[CertificateDer<'_>], root: &CertificateDer<'_>, time: UnixTime) -> Vec<Digest> {
    let Ok(anchor) = anchor_from_trusted_cert(root) else { return Vec::new() };
    // A bundle may have hundreds of roots, and signatures are expensive.
    let is_issuer = |subject: &[u8]| *subject == *anchor.subject;
    if !is_issuer(leaf.issuer()) && !others.iter().any(|other| EndEntityCert::try_from(other).is_ok_and(|other| is_issuer(other.issuer())))
    {
        return Vec::new();
    }
    let (anchors, usage) = (std::slice::from_ref(&anchor), KeyUsage::server_auth());
    let Ok(path) = leaf.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, anchors, others, time, usage, None, None) else {
        return Vec::new();
    };
    let below = path.intermediate_certificates().map(|authority| material::authority_of_certificate(&authority.der()));
    below.chain([material::authority_of_certificate(root)]).flatten().collect()
}

fn is_live(root: &CertificateDer<'_>, at: SystemTime) -> bool {
    X509Certificate::from_der(root).is_ok_and(|(_, root)| clock::from_unix_seconds(root.validity().not_after.timestamp()) > at)
}

/// Describes errors that have a usual cause. For other errors, returns the verifier's name of the error.
fn in_words(error: &webpki::Error) -> String {
    match error {
        webpki::Error::UnknownIssuer => "no root has signed it, neither directly nor through the intermediates of the chain".to_owned(),
        webpki::Error::InvalidSignatureForPublicKey => "a signer of the right name has another key: was the authority replaced?".to_owned(),
        webpki::Error::CertExpired { not_after, .. } => {
            let at = clock::from_unix_seconds(i64::try_from(not_after.as_secs()).unwrap_or(i64::MAX));
            format!("an intermediate expired at {}", clock::rfc3339(at))
        }
        webpki::Error::CertNotValidYet { .. } => "an intermediate is not valid yet".to_owned(),
        webpki::Error::EndEntityUsedAsCa => "an intermediate is not a certificate authority's".to_owned(),
        webpki::Error::RequiredEkuNotFoundContext(_) => "an intermediate's extended key usage forbids TLS servers or clients".to_owned(),
        other => kind(other),
    }
}

/// Returns the verifier's name of an error, without values from a certificate.
fn kind(error: &webpki::Error) -> String {
    format!("{error:?}").chars().take_while(char::is_ascii_alphanumeric).collect()
}

/// Returns up to [`MAX_SHOWN_NAMES`] names of a certificate, as excerpts.
fn shown(names: &[String]) -> Vec<String> {
    names.iter().take(MAX_SHOWN_NAMES).map(|name| text::excerpt(name, text::MAX_NAME_CHARS)).collect()
}

fn same_names(a: &[String], b: &[String]) -> bool {
    let sorted = |names: &[String]| {
        let mut names = names.to_vec();
        names.sort_unstable();
        names
    };
    sorted(a) == sorted(b)
}

/// Returns the SubjectPublicKeyInfo of `key`.
fn public_key(key_type: KeyType, key: &PrivateKey) -> Option<Vec<u8>> {
    let ecdsa = |scheme| -> Option<Vec<u8>> {
        let pair = EcdsaKeyPair::from_pkcs8(scheme, key.pkcs8_der()).ok()?;
        let der: PublicKeyX509Der<'_> = pair.public_key().as_der().ok()?;
        Some(der.as_ref().to_vec())
    };
    match key_type {
        KeyType::EcdsaP256 => ecdsa(&ECDSA_P256_SHA256_ASN1_SIGNING),
        KeyType::EcdsaP384 => ecdsa(&ECDSA_P384_SHA384_ASN1_SIGNING),
        KeyType::Rsa2048 | KeyType::Rsa3072 => {
            let pair = rsa::KeyPair::from_pkcs8(key.pkcs8_der()).ok()?;
            let der: PublicKeyX509Der<'_> = pair.public_key().as_der().ok()?;
            Some(der.as_ref().to_vec())
        }
    }
}

#[cfg(test)]
mod tests;
