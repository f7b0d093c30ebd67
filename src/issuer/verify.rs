//! The checks between an issuer's answer and its publication.
//!
//! A pure function of (order, answer, bundle, now). Exactly the bytes that were checked are served.

use std::time::{Duration, SystemTime};

use aws_lc_rs::{
    encoding::{AsDer, PublicKeyX509Der},
    rsa,
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use rustls::pki_types::{CertificateDer, UnixTime};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use crate::{
    clock,
    identity::{Identity, KeyType},
    material::{self, CertificateChain, PrivateKey, TrustBundle},
};

/// How far the signer's clock may be ahead of ours.
pub const ALLOWED_SKEW: Duration = Duration::from_secs(60);

/// Why a certificate must not be served. The caller keeps what it has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not PEM, not X.509, empty, or too large.
    #[error("the chain {0}")]
    Chain(#[from] material::Error),
    /// The leaf is for another key.
    #[error("the leaf's public key is not the one that was asked for")]
    Key,
    /// The URI SANs are not exactly the identity.
    #[error(
        "the leaf's URI SANs are {found:?}, not exactly [{expected:?}]; the issuer may rewrite or drop names (Vault: allowed_uri_sans, use_csr_sans)"
    )]
    SpiffeId {
        /// What was asked for.
        expected: String,
        /// What came.
        found: Vec<String>,
    },
    /// DNS names that the identity does not have, or lacks.
    #[error("the leaf's DNS SANs are {found:?}, not {expected:?}")]
    DnsNames {
        /// What was asked for.
        expected: Vec<String>,
        /// What came.
        found: Vec<String>,
    },
    /// SANs of kinds that were not asked for.
    #[error("the leaf has subject alternative names of other kinds than URI and DNS")]
    OtherNames,
    /// Past its end.
    #[error("the leaf expired at {0}")]
    Expired(String),
    /// Before its beginning.
    #[error("the leaf is valid only from {from}, more than {} s from now: is this node's clock behind?", ALLOWED_SKEW.as_secs())]
    NotYetValid {
        /// Its notBefore.
        from: String,
    },
    /// Wrong usages, a CA certificate, or a chain that leads to none of the roots.
    #[error("{what}: {why}")]
    Path {
        /// What was checked.
        what: &'static str,
        /// The verifier's words.
        why: String,
    },
}

/// What passed.
#[derive(Debug)]
pub struct Verified {
    /// The chain as it will be served.
    pub chain: CertificateChain,
    /// The root that it leads to, where there is a bundle.
    pub anchor: Option<CertificateDer<'static>>,
}

/// Checks the chain of `pem` for `identity` and `key` at `now`; with a bundle, that it leads to one of its roots.
pub fn verify(identity: &Identity, key: &PrivateKey, pem: &[u8], bundle: Option<&TrustBundle>, now: SystemTime) -> Result<Verified, Error> {
    let chain = CertificateChain::from_pem(pem)?;
    if public_key(identity.profile.key, key).as_deref() != Some(&chain.public_key) {
        return Err(Error::Key);
    }
    if chain.uris.len() != 1 || chain.uris[0] != identity.spiffe_id.as_str() {
        return Err(Error::SpiffeId { expected: identity.spiffe_id.to_string(), found: chain.uris });
    }
    if !same_names(&chain.dns_names, &identity.dns_names) {
        return Err(Error::DnsNames { expected: identity.dns_names.to_vec(), found: chain.dns_names });
    }
    if chain.other_names {
        return Err(Error::OtherNames);
    }
    let validity = chain.validity;
    if !validity.is_live(now) {
        return Err(Error::Expired(clock::rfc3339(validity.not_after)));
    }
    if validity.not_before > now + ALLOWED_SKEW {
        return Err(Error::NotYetValid { from: clock::rfc3339(validity.not_before) });
    }
    let anchor = path(&chain, bundle, now.max(validity.not_before))?;
    Ok(Verified { chain, anchor })
}

/// Both usages, not a CA, and the path to a root. Without a bundle the chain's own last certificate stands in for the root.
fn path(chain: &CertificateChain, bundle: Option<&TrustBundle>, at: SystemTime) -> Result<Option<CertificateDer<'static>>, Error> {
    let certificates = chain.certificates();
    let unreadable = |why: webpki::Error| Error::Path { what: "the leaf cannot be read", why: why.to_string() };
    let leaf = EndEntityCert::try_from(&certificates[0]).map_err(unreadable)?;
    let roots = match bundle {
        Some(bundle) => bundle.roots(),
        None if certificates.len() > 1 => &certificates[certificates.len() - 1..],
        // A lone leaf and no bundle: nothing to build a path to.
        None => return Ok(None),
    };
    let anchors: Vec<_> = roots.iter().filter_map(|root| anchor_from_trusted_cert(root).ok().map(|a| (a, root))).collect();
    let trusted: Vec<_> = anchors.iter().map(|(anchor, _)| anchor.clone()).collect();
    let at = UnixTime::since_unix_epoch(Duration::from_secs(clock::unix_seconds(at)));
    let mut found = None;
    for (usage, what) in [
        (KeyUsage::server_auth(), "as a server's certificate it does not lead to the trust bundle"),
        (KeyUsage::client_auth(), "as a client's certificate it does not lead to the trust bundle"),
    ] {
        let path = leaf
            .verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &trusted, &certificates[1..], at, usage, None, None)
            .map_err(|why| Error::Path { what, why: why.to_string() })?;
        found = anchors
            .iter()
            .find(|(a, _)| a.subject == path.anchor().subject && a.subject_public_key_info == path.anchor().subject_public_key_info);
    }
    Ok(bundle.and(found).map(|(_, root)| (*root).clone()))
}

fn same_names(a: &[String], b: &[String]) -> bool {
    let sorted = |names: &[String]| {
        let mut names = names.to_vec();
        names.sort_unstable();
        names
    };
    sorted(a) == sorted(b)
}

/// The SubjectPublicKeyInfo that belongs to `key`.
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
