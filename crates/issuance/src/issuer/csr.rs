//! Generates a key and the PKCS#10 request for it (RFC 2986).
//!
//! The CSR has an empty subject and one extension: the subject alternative names, the URI first and then the DNS names. It has no key usage
//! and no extended key usage, because cert-manager compares those with `spec.usages`, the extended ones in order
//! (cert-manager/cert-manager#6182). The key exists as a key pair of `aws-lc-rs` and as a PKCS#8 document that is wiped on drop. No other
//! copy is made.

use std::sync::{Arc, LazyLock};

use aws_lc_rs::{
    encoding::{AsDer, Pkcs8V1Der},
    rand::SystemRandom,
    rsa::{KeyPair as RsaKeyPair, KeySize},
    signature::{self, ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use rcgen::{CertificateParams, DistinguishedName, PublicKeyData, SanType, SignatureAlgorithm, SigningKey, string::Ia5String};
use sds_server::material::PrivateKey;
use tokio::sync::Semaphore;
use workload_identity::{Identity, KeyType};
use zeroize::Zeroizing;

/// Why a key or a CSR could not be generated.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The random source or the key generator failed.
    #[error("generating the {} key failed", .0.as_str())]
    Generate(KeyType),
    /// A certificate cannot hold the name.
    #[error("name {0:?} cannot be a subject alternative name: use ASCII only")]
    Name(String),
    /// Signing or encoding the CSR failed.
    #[error("signing the CSR failed: {0}")]
    Sign(String),
    /// The task that generates RSA keys ended without a result.
    #[error("the key worker was cancelled")]
    Cancelled,
}

/// A key and its CSR.
#[derive(Debug)]
pub struct KeyAndCsr {
    /// The private key.
    pub key: PrivateKey,
    /// The CSR: PKCS#10 in DER. It is not secret, but is never logged.
    pub csr_der: Vec<u8>,
}

/// Allows one RSA key generation at a time. It takes tens of milliseconds of a CPU core.
static RSA: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(1)));

/// Generates a key of the profile's type, and its CSR. RSA keys are generated on the blocking pool, one at a time.
///
/// # Errors
///
/// Returns [`Error::Generate`] if the key generator fails, [`Error::Name`] if a name is not ASCII, [`Error::Sign`] if the CSR cannot be
/// signed or encoded, and [`Error::Cancelled`] if the task on the blocking pool is lost.
///
/// # Cancel safety
///
/// Dropping the future discards the key. RSA generation that has begun runs to its end, and delays the next RSA key until then.
pub async fn generate(identity: &Identity) -> Result<KeyAndCsr, Error> {
    generate_within(identity, &RSA).await
}

async fn generate_within(identity: &Identity, rsa: &Arc<Semaphore>) -> Result<KeyAndCsr, Error> {
    let key_type = identity.profile.key;
    let key = match key_type {
        KeyType::EcdsaP256 | KeyType::EcdsaP384 => Key::generate(key_type)?,
        KeyType::Rsa2048 | KeyType::Rsa3072 => {
            let permit = rsa.clone().acquire_owned().await.map_err(|_| Error::Cancelled)?;
            // The blocking task owns the permit, not the waiting order: an abandoned order counts until its CPU core is free.
            let made = tokio::task::spawn_blocking(move || {
                let key = Key::generate(key_type);
                drop(permit);
                key
            });
            made.await.map_err(|_| Error::Cancelled)??
        }
    };
    let csr_der = request(identity, &key)?;
    Ok(KeyAndCsr { key: key.into_private(), csr_der })
}

fn request(identity: &Identity, key: &Key) -> Result<Vec<u8>, Error> {
    let name = |text: &str| Ia5String::try_from(text).map_err(|_| Error::Name(text.to_owned()));
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names.push(SanType::URI(name(identity.spiffe_id.as_str())?));
    for dns in identity.dns_names.iter() {
        params.subject_alt_names.push(SanType::DnsName(name(dns)?));
    }
    let csr = params.serialize_request(key).map_err(|e| Error::Sign(e.to_string()))?;
    Ok(csr.der().to_vec())
}

enum Pair {
    Ecdsa(EcdsaKeyPair),
    Rsa(RsaKeyPair),
}

/// A key pair that signs for `rcgen`, and its PKCS#8 document, which is wiped on drop.
struct Key {
    pair: Pair,
    pkcs8: Zeroizing<Vec<u8>>,
    algorithm: &'static SignatureAlgorithm,
}

impl Key {
    fn generate(key_type: KeyType) -> Result<Self, Error> {
        let failed = |_| Error::Generate(key_type);
        let ecdsa = |scheme, algorithm| -> Result<Self, Error> {
            let pair = EcdsaKeyPair::generate(scheme).map_err(failed)?;
            let pkcs8 = Zeroizing::new(pair.to_pkcs8v1().map_err(failed)?.as_ref().to_vec());
            Ok(Self { pair: Pair::Ecdsa(pair), pkcs8, algorithm })
        };
        let rsa = |size| -> Result<Self, Error> {
            let pair = RsaKeyPair::generate(size).map_err(failed)?;
            let document: Pkcs8V1Der<'_> = pair.as_der().map_err(failed)?;
            let pkcs8 = Zeroizing::new(document.as_ref().to_vec());
            Ok(Self { pair: Pair::Rsa(pair), pkcs8, algorithm: &rcgen::PKCS_RSA_SHA256 })
        };
        match key_type {
            KeyType::EcdsaP256 => ecdsa(&ECDSA_P256_SHA256_ASN1_SIGNING, &rcgen::PKCS_ECDSA_P256_SHA256),
            KeyType::EcdsaP384 => ecdsa(&ECDSA_P384_SHA384_ASN1_SIGNING, &rcgen::PKCS_ECDSA_P384_SHA384),
            KeyType::Rsa2048 => rsa(KeySize::Rsa2048),
            KeyType::Rsa3072 => rsa(KeySize::Rsa3072),
        }
    }

    fn into_private(self) -> PrivateKey {
        PrivateKey::from_pkcs8_der(self.pkcs8)
    }
}

impl PublicKeyData for Key {
    fn der_bytes(&self) -> &[u8] {
        match &self.pair {
            Pair::Ecdsa(pair) => pair.public_key().as_ref(),
            Pair::Rsa(pair) => pair.public_key().as_ref(),
        }
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.algorithm
    }
}

impl SigningKey for Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let rng = SystemRandom::new();
        let failed = |_| rcgen::Error::RemoteKeyError;
        match &self.pair {
            Pair::Ecdsa(pair) => Ok(pair.sign(&rng, message).map_err(failed)?.as_ref().to_vec()),
            Pair::Rsa(pair) => {
                let mut out = vec![0; pair.public_modulus_len()];
                pair.sign(&signature::RSA_PKCS1_SHA256, &rng, message, &mut out).map_err(failed)?;
                Ok(out)
            }
        }
    }
}

#[cfg(test)]
mod tests;
