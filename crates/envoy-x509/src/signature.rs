//! Public keys and signatures.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA1_ASN1, ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA384_ASN1, ECDSA_P256_SHA512_ASN1, ECDSA_P384_SHA256_ASN1,
    ECDSA_P384_SHA384_ASN1, ECDSA_P384_SHA512_ASN1, ECDSA_P521_SHA1_ASN1, ECDSA_P521_SHA224_ASN1, ECDSA_P521_SHA256_ASN1,
    ECDSA_P521_SHA384_ASN1, ECDSA_P521_SHA512_ASN1, ED25519, RSA_PKCS1_1024_8192_SHA1_FOR_LEGACY_USE_ONLY,
    RSA_PKCS1_1024_8192_SHA256_FOR_LEGACY_USE_ONLY, RSA_PKCS1_1024_8192_SHA512_FOR_LEGACY_USE_ONLY, RSA_PKCS1_2048_8192_SHA384,
    RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512, UnparsedPublicKey, VerificationAlgorithm,
};

use crate::{
    Fault,
    der::{self, Element, Reader},
};

/// An algorithm identifier.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Algorithm<'a> {
    id: &'a [u8],
    parameters: Option<Element<'a>>,
}

impl PartialEq for Algorithm<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id && self.parameters.map(|it| it.whole) == other.parameters.map(|it| it.whole)
    }
}

impl<'a> Algorithm<'a> {
    pub(crate) fn read(reader: &mut Reader<'a>) -> Result<Self, Fault> {
        let broken = Fault("an algorithm identifier is broken");
        let mut fields = reader.inner(der::SEQUENCE).ok_or(broken)?;
        let id = der::object(&mut fields).ok_or(broken)?;
        let parameters = if fields.is_empty() { None } else { Some(fields.any().ok_or(broken)?) };
        if let Some(parameters) = &parameters {
            der::check_any(parameters).map_err(|_| broken)?;
        }
        if fields.is_empty() { Ok(Self { id, parameters }) } else { Err(broken) }
    }

    /// Whether the parameters are absent or NULL. BoringSSL accepts both for all algorithms with a digest in their identifier.
    fn has_no_parameters(&self) -> bool {
        self.parameters.is_none_or(|parameters| parameters.tag == der::NULL)
    }
}

/// The key of a certificate.
#[derive(Debug, Clone, Copy)]
pub struct PublicKey<'a> {
    /// The SubjectPublicKeyInfo in DER.
    pub der: &'a [u8],
    algorithm: Algorithm<'a>,
    key: &'a [u8],
}

const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];
const EC: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
const ED25519_ID: &[u8] = &[0x2b, 0x65, 0x70];
/// In bytes.
const ED25519_LEN: usize = 32;
const P256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const P384: &[u8] = &[0x2b, 0x81, 0x04, 0x00, 0x22];
const P521: &[u8] = &[0x2b, 0x81, 0x04, 0x00, 0x23];
const RSASSA_PSS: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0a];
const MGF1: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x08];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Rsa,
    P256,
    P384,
    P521,
    Ed25519,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Digest {
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
}

impl<'a> PublicKey<'a> {
    /// Reads a SubjectPublicKeyInfo. A key of an unknown algorithm is read; it verifies no signature.
    pub(crate) fn read(reader: &mut Reader<'a>) -> Result<Self, Fault> {
        let broken = Fault("its public key is broken");
        let element = reader.next(der::SEQUENCE).ok_or(broken)?;
        let mut fields = Reader::new(element.content);
        let algorithm = Algorithm::read(&mut fields)?;
        let (key, unused) = fields.get(der::BIT_STRING).and_then(der::bits).ok_or(broken)?;
        // BoringSSL reads a key with unused bits, and cannot use it.
        let key = if unused == 0 { key } else { &[] };
        if fields.is_empty() { Ok(Self { der: element.whole, algorithm, key }) } else { Err(broken) }
    }

    fn kind(&self) -> Option<Kind> {
        let parameters = self.algorithm.parameters;
        match self.algorithm.id {
            RSA => parameters.is_some_and(|parameters| parameters.tag == der::NULL && self.is_rsa_key()).then_some(Kind::Rsa),
            EC => match parameters.filter(|parameters| parameters.tag == der::OBJECT && self.is_point())?.content {
                P256 => Some(Kind::P256),
                P384 => Some(Kind::P384),
                P521 => Some(Kind::P521),
                _ => None,
            },
            ED25519_ID => (parameters.is_none() && self.key.len() == ED25519_LEN).then_some(Kind::Ed25519),
            _ => None,
        }
    }

    /// Whether the key is an `RSAPublicKey`. `aws-lc-rs` reads other forms too.
    fn is_rsa_key(&self) -> bool {
        let Some(mut numbers) = der::only(self.key, der::SEQUENCE).map(Reader::new) else { return false };
        let mut next = || numbers.get(der::INTEGER).is_some_and(der::is_integer);
        next() && next() && numbers.is_empty()
    }

    /// Whether the key has the form of a point, compressed or not. `aws-lc-rs` reads other forms too.
    fn is_point(&self) -> bool {
        matches!(self.key.first(), Some(2..=4))
    }
}

/// Why a signature does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unverified {
    /// The algorithm, or the signer's key, is of a kind that is not supported.
    Unsupported,
    /// The signature is of another key, or of other content.
    Wrong,
}

/// Verifies that `signature` of `content`, made with `algorithm`, is of `key`.
pub(crate) fn verify(key: &PublicKey<'_>, algorithm: &Algorithm<'_>, content: &[u8], signature: &[u8]) -> Result<(), Unverified> {
    let kind = key.kind().ok_or(Unverified::Unsupported)?;
    let method = method(kind, algorithm).ok_or(Unverified::Unsupported)?;
    UnparsedPublicKey::new(method, key.key).verify(content, signature).map_err(|_| Unverified::Wrong)
}

fn method(kind: Kind, algorithm: &Algorithm<'_>) -> Option<&'static dyn VerificationAlgorithm> {
    if kind == Kind::Ed25519 {
        return (algorithm.id == ED25519_ID && algorithm.parameters.is_none()).then_some(&ED25519);
    }
    if algorithm.id == RSASSA_PSS {
        return match pss_digest(algorithm).filter(|_| kind == Kind::Rsa)? {
            Digest::Sha256 => Some(&RSA_PSS_2048_8192_SHA256),
            Digest::Sha384 => Some(&RSA_PSS_2048_8192_SHA384),
            Digest::Sha512 => Some(&RSA_PSS_2048_8192_SHA512),
            Digest::Sha1 | Digest::Sha224 => None,
        };
    }
    let digest = digest(algorithm.id, kind == Kind::Rsa).filter(|_| algorithm.has_no_parameters())?;
    match (kind, digest) {
        (Kind::Rsa, Digest::Sha1) => Some(&RSA_PKCS1_1024_8192_SHA1_FOR_LEGACY_USE_ONLY),
        (Kind::Rsa, Digest::Sha256) => Some(&RSA_PKCS1_1024_8192_SHA256_FOR_LEGACY_USE_ONLY),
        (Kind::Rsa, Digest::Sha384) => Some(&RSA_PKCS1_2048_8192_SHA384),
        (Kind::Rsa, Digest::Sha512) => Some(&RSA_PKCS1_1024_8192_SHA512_FOR_LEGACY_USE_ONLY),
        (Kind::P256, Digest::Sha1) => Some(&ECDSA_P256_SHA1_ASN1),
        (Kind::P256, Digest::Sha256) => Some(&ECDSA_P256_SHA256_ASN1),
        (Kind::P256, Digest::Sha384) => Some(&ECDSA_P256_SHA384_ASN1),
        (Kind::P256, Digest::Sha512) => Some(&ECDSA_P256_SHA512_ASN1),
        (Kind::P384, Digest::Sha256) => Some(&ECDSA_P384_SHA256_ASN1),
        (Kind::P384, Digest::Sha384) => Some(&ECDSA_P384_SHA384_ASN1),
        (Kind::P384, Digest::Sha512) => Some(&ECDSA_P384_SHA512_ASN1),
        (Kind::P521, Digest::Sha1) => Some(&ECDSA_P521_SHA1_ASN1),
        (Kind::P521, Digest::Sha224) => Some(&ECDSA_P521_SHA224_ASN1),
        (Kind::P521, Digest::Sha256) => Some(&ECDSA_P521_SHA256_ASN1),
        (Kind::P521, Digest::Sha384) => Some(&ECDSA_P521_SHA384_ASN1),
        (Kind::P521, Digest::Sha512) => Some(&ECDSA_P521_SHA512_ASN1),
        _ => None,
    }
}

/// The digest of a signature algorithm for keys of this kind.
fn digest(id: &[u8], is_rsa: bool) -> Option<Digest> {
    const RSA_WITH: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
    const ECDSA_WITH: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04];
    if is_rsa {
        return match id.strip_prefix(RSA_WITH)? {
            [5] => Some(Digest::Sha1),
            [14] => Some(Digest::Sha224),
            [11] => Some(Digest::Sha256),
            [12] => Some(Digest::Sha384),
            [13] => Some(Digest::Sha512),
            _ => None,
        };
    }
    match id.strip_prefix(ECDSA_WITH)? {
        [1] => Some(Digest::Sha1),
        [3, 1] => Some(Digest::Sha224),
        [3, 2] => Some(Digest::Sha256),
        [3, 3] => Some(Digest::Sha384),
        [3, 4] => Some(Digest::Sha512),
        _ => None,
    }
}

/// The digest of RSASSA-PSS parameters (RFC 4055, section 3.1). BoringSSL accepts them with one digest, a salt of its length, and nothing
/// else.
fn pss_digest(algorithm: &Algorithm<'_>) -> Option<Digest> {
    let parameters = algorithm.parameters.filter(|parameters| parameters.tag == der::SEQUENCE)?;
    let mut fields = Reader::new(parameters.content);
    let read = |mut reader: Reader<'_>| -> Option<Digest> {
        let algorithm = Algorithm::read(&mut reader).ok().filter(|_| reader.is_empty())?;
        sha2(&algorithm)
    };
    let digest = read(fields.inner(der::constructed(0))?)?;
    let mut generator = fields.inner(der::constructed(1))?;
    let mgf1 = Algorithm::read(&mut generator).ok().filter(|mgf1| mgf1.id == MGF1 && generator.is_empty())?;
    let of_generator = read(Reader::new(mgf1.parameters?.whole))?;
    let salt = der::only(fields.get(der::constructed(2))?, der::INTEGER).and_then(der::unsigned)??;
    // The only trailer is the default, which DER leaves out. BoringSSL reads it nevertheless.
    let trailer = fields.optional(der::constructed(3))?;
    let has_usual_trailer = trailer.is_none_or(|trailer| der::only(trailer, der::INTEGER) == Some(&[1]));
    let is_usual = of_generator == digest && salt == u64::from(digest.len()) && has_usual_trailer && fields.is_empty();
    is_usual.then_some(digest)
}

fn sha2(algorithm: &Algorithm<'_>) -> Option<Digest> {
    const SHA2: &[u8] = &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02];
    if !algorithm.has_no_parameters() {
        return None;
    }
    match algorithm.id.strip_prefix(SHA2)? {
        [1] => Some(Digest::Sha256),
        [2] => Some(Digest::Sha384),
        [3] => Some(Digest::Sha512),
        _ => None,
    }
}

impl Digest {
    /// In bytes.
    fn len(self) -> u8 {
        match self {
            Self::Sha1 => 20,
            Self::Sha224 => 28,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }
}
