//! Checks an issuer's answer before it is published.
//!
//! [`verify`] is a pure function of identity, key, chain, bundle and time. The agent serves exactly the certificates that were checked: the
//! leaf first, then the others. Certificates that are on no path to a root stay in the chain. Peers ignore them, and one of them may be the
//! cross-signed root that peers with an older bundle need.
//!
//! The checks reject certificates that a peer would reject. [`envoy_x509`] verifies the path as Envoy does. Usages follow the SPIFFE X.509-SVID
//! specification (sections 4.1, 4.3 and 4.4), as Envoy and go-spiffe enforce it:
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
use envoy_x509::{Certificate, Place};
use rustls::pki_types::CertificateDer;
use sds_server::{
    material::{self, CertificateChain, PrivateKey, TrustBundle, Validity},
    trust::{BundleSet, crl},
};
use workload_identity::{Identity, KeyType, version::Digest};

/// Maximum time by which the signer's clock may be ahead of the agent's: 60 s.
pub const ALLOWED_SKEW: Duration = Duration::from_secs(60);
/// The overhead of TLS 1.3 for each certificate, in bytes.
const TLS_OVERHEAD: usize = 5;
/// Maximum size of a chain, in bytes, with the overhead of TLS 1.3 for each certificate. A peer with BoringSSL rejects a message with
/// certificates beyond 100 KiB. The message has four more bytes.
const MAX_CHAIN_BYTES: usize = 100 * 1024 - 4;
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
    /// The chain is larger than peers accept.
    #[error(
        "the chain has {0} bytes; peers accept at most {MAX_CHAIN_BYTES}: the issuer must leave out certificates that are not on the path"
    )]
    TooLarge(usize),
    /// A revocation list of the trust bundle revokes a certificate of the path.
    #[error("a revocation list of the trust bundle revokes the certificate, or that of an authority on its path")]
    Revoked,
    /// Envoy refuses the chain.
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
    /// The first certificate of the bundle on the path. `None` without a bundle.
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
    let leaf = read(leaf, 1)?;
    usages(&leaf)?;
    path(leaf, others, bundle, now.max(chain.validity.not_before))
}

/// Checks that no revocation list of the own trust domain revokes a chain that [`verify`] has accepted.
///
/// # Errors
///
/// [`Error::Revoked`]
pub fn not_revoked(chain: &CertificateChain, set: &BundleSet, now: SystemTime) -> Result<(), Error> {
    let Some(own) = set.own.as_ref().filter(|_| !set.own_crls.is_empty()) else { return Ok(()) };
    if crl::revokes(own.roots.roots(), chain.certificates(), &set.own_crls, now) { Err(Error::Revoked) } else { Ok(()) }
}

/// Checks that the leaf has this key. The error says if another certificate of the chain has it.
fn is_for(chain: &CertificateChain, public_key: &[u8]) -> Result<(), Error> {
    if chain.public_key == public_key {
        return Ok(());
    }
    let is_it = |der: &CertificateDer<'_>| Certificate::from_der(der).is_ok_and(|c| c.public_key.der == public_key);
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

fn read<'a>(der: &'a CertificateDer<'_>, index: usize) -> Result<Certificate<'a>, Error> {
    Certificate::from_der(der).map_err(|why| Error::Chain(material::Error::X509 { index, why }))
}

/// Checks that the leaf is an end-entity certificate for both sides of TLS. The path verifier checks the usages that a peer needs, and only
/// if there is a path.
fn usages(leaf: &Certificate<'_>) -> Result<(), Error> {
    let extensions = leaf.extensions().map_err(|why| Error::Chain(material::Error::X509 { index: 1, why }))?;
    if extensions.is_authority() {
        return Err(Error::Usage("is a certificate authority's"));
    }
    if let Some(usage) = extensions.key_usage {
        if !usage.digital_signature() {
            return Err(Error::Usage("has a key usage without digitalSignature"));
        }
        if usage.key_cert_sign() || usage.crl_sign() {
            return Err(Error::Usage("has the key usage of an authority (keyCertSign or cRLSign)"));
        }
    }
    if let Some(usage) = extensions.extended_key_usage {
        if !usage.server_auth {
            return Err(Error::Usage("has an extended key usage without serverAuth"));
        }
        if !usage.client_auth {
            return Err(Error::Usage("has an extended key usage without clientAuth"));
        }
    }
    if extensions.must_staple {
        return Err(Error::Usage("must be served with an OCSP response (TLS feature status_request), and the agent has none"));
    }
    Ok(())
}

/// Verifies the path to a root of the bundle. Without a bundle, the last certificate of the chain is the root.
fn path(leaf: Certificate<'_>, others: &[CertificateDer<'_>], bundle: Option<&TrustBundle>, at: SystemTime) -> Result<Verified, Error> {
    let (roots, what) = match (bundle, others) {
        (Some(bundle), _) => (bundle.roots(), "the chain does not lead to the trust bundle"),
        (None, [.., last]) => (std::slice::from_ref(last), "the chain does not lead to its own last certificate"),
        // A lone leaf without a bundle: there is no path to check.
        (None, []) => return Ok(Verified { anchor: None, path: Vec::new() }),
    };
    let mut chain = vec![leaf];
    for (index, other) in others.iter().enumerate() {
        chain.push(read(other, index + 2)?);
    }
    let parsed = roots.iter().enumerate().map(|(index, root)| read(root, index + 1)).collect::<Result<Vec<_>, _>>()?;
    let seconds = i64::try_from(clock::unix_seconds(at)).unwrap_or(i64::MAX);
    let path = envoy_x509::verify(&chain, &parsed, seconds).map_err(|refusal| Error::Path { what, why: refusal.to_string() })?;
    let bytes = others.iter().map(|other| other.len() + TLS_OVERHEAD).sum::<usize>() + chain[0].len() + TLS_OVERHEAD;
    if bytes > MAX_CHAIN_BYTES {
        return Err(Error::TooLarge(bytes));
    }
    let first = path.places.iter().find_map(|place| match place {
        Place::Bundle(index) => roots.get(*index),
        Place::Chain(_) => None,
    });
    let anchor = bundle.and(first).map(|root| (*root).clone().into_owned());
    Ok(Verified { anchor, path: longest(&chain, others, roots, &parsed, seconds) })
}

/// Returns the certificates of `bundle` on the path of `chain` at `now`.
///
/// # Errors
///
/// If a peer with this bundle would refuse the chain.
pub(crate) fn roots_of(chain: &CertificateChain, bundle: &TrustBundle, now: SystemTime) -> Result<Vec<CertificateDer<'static>>, Error> {
    let certificates: Vec<_> = chain.certificates().iter().filter_map(|certificate| read(certificate, 1).ok()).collect();
    let roots: Vec<_> = bundle.roots().iter().filter_map(|root| read(root, 1).ok()).collect();
    let seconds = i64::try_from(clock::unix_seconds(now.max(chain.validity.not_before))).unwrap_or(i64::MAX);
    let what = "the chain does not lead to the reported root";
    let path = envoy_x509::verify(&certificates, &roots, seconds).map_err(|refusal| Error::Path { what, why: refusal.to_string() })?;
    let of_bundle = path.places.iter().filter_map(|place| match place {
        Place::Bundle(index) => bundle.roots().get(*index).cloned(),
        Place::Chain(_) => None,
    });
    Ok(of_bundle.collect())
}

/// Returns the authorities on the longest path that the chain itself has to one of the roots, from the one that signed the leaf.
///
/// Envoy's path ends at the nearest trusted certificate, and continues with trusted ones that a client with another bundle does not have.
fn longest(
    chain: &[Certificate<'_>],
    others: &[CertificateDer<'_>],
    roots: &[CertificateDer<'_>],
    parsed: &[Certificate<'_>],
    at: i64,
) -> Vec<Digest> {
    let mut longest = Vec::new();
    for (root, der) in parsed.iter().zip(roots) {
        // A bundle may have hundreds of roots, and signatures are expensive.
        if !chain.iter().any(|certificate| root.may_have_issued(certificate)) {
            continue;
        }
        let Ok(path) = envoy_x509::verify(chain, std::slice::from_ref(root), at) else { continue };
        let authorities = path.places.iter().filter_map(|place| match place {
            Place::Chain(0) => None,
            Place::Chain(index) => material::authority_of_certificate(&others[index - 1]),
            Place::Bundle(_) => material::authority_of_certificate(der),
        });
        let authorities: Vec<Digest> = authorities.collect();
        if longest.len() < authorities.len() {
            longest = authorities;
        }
    }
    longest
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
