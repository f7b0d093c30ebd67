//! Public keys of the types that profiles allow, and their signatures. Each type has one signature algorithm and one encoding.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey, VerificationAlgorithm,
};
use workload_identity::KeyType;

use super::{
    Error,
    der::{self, Element, Malformed, Reader, tag},
};

/// id-ecPublicKey with prime256v1 (RFC 5480).
const P256: &[u8] = &[0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
/// id-ecPublicKey with secp384r1 (RFC 5480).
const P384: &[u8] = &[0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];
/// rsaEncryption with its NULL (RFC 3279).
const RSA: &[u8] = &[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];

/// ecdsa-with-SHA256 (RFC 5758).
const ECDSA_SHA256: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
/// ecdsa-with-SHA384 (RFC 5758).
const ECDSA_SHA384: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x03];
/// sha256WithRSAEncryption with its NULL (RFC 4055).
const RSA_SHA256: &[u8] = &[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0b, 0x05, 0x00];

/// The only accepted RSA exponent: 65537.
const EXPONENT: &[u8] = &[1, 0, 1];

/// A public key of a type that profiles allow.
#[derive(Debug)]
pub(super) struct PublicKey<'a> {
    pub kind: KeyType,
    /// An EC point, or an RSAPublicKey in DER.
    bytes: &'a [u8],
}

impl<'a> PublicKey<'a> {
    /// Reads a SubjectPublicKeyInfo (RFC 5280, section 4.1).
    pub(super) fn read(info: &Element<'a>) -> Result<Self, Error> {
        let mut info = Reader::new(info.content);
        let algorithm = info.take(tag::SEQUENCE, "the key's algorithm")?.content;
        let bits = info.take(tag::BIT_STRING, "the key")?;
        info.end("the key")?;
        let bytes = der::whole_bytes(&bits, "the key")?;
        let kind = match algorithm {
            P256 => point(bytes, 32, KeyType::EcdsaP256)?,
            P384 => point(bytes, 48, KeyType::EcdsaP384)?,
            RSA => modulus(bytes)?,
            _ => return Err(Error::Key("it is neither ECDSA on P-256 or P-384 nor RSA")),
        };
        Ok(Self { kind, bytes })
    }

    /// Verifies that this key has signed `message`. A point that is not on its curve verifies no signature.
    pub(super) fn verify(&self, algorithm: &[u8], message: &[u8], signature: &[u8]) -> Result<(), Error> {
        let (expected, by): (&[u8], &'static dyn VerificationAlgorithm) = match self.kind {
            KeyType::EcdsaP256 => (ECDSA_SHA256, &ECDSA_P256_SHA256_ASN1),
            KeyType::EcdsaP384 => (ECDSA_SHA384, &ECDSA_P384_SHA384_ASN1),
            KeyType::Rsa2048 | KeyType::Rsa3072 => (RSA_SHA256, &RSA_PKCS1_2048_8192_SHA256),
        };
        if algorithm != expected {
            return Err(Error::Algorithm);
        }
        UnparsedPublicKey::new(by, self.bytes).verify(message, signature).map_err(|_| Error::Signature)
    }
}

fn point(bytes: &[u8], coordinate: usize, kind: KeyType) -> Result<KeyType, Error> {
    let uncompressed = bytes.first() == Some(&4) && bytes.len() == 1 + 2 * coordinate;
    if uncompressed { Ok(kind) } else { Err(Error::Key("its point is not in the uncompressed form")) }
}

fn modulus(bytes: &[u8]) -> Result<KeyType, Error> {
    let mut outer = Reader::new(bytes);
    let mut key = Reader::new(outer.take(tag::SEQUENCE, "the RSA key")?.content);
    outer.end("the RSA key")?;
    let modulus = der::positive(&key.take(tag::INTEGER, "the modulus")?, "the modulus")?;
    let exponent = der::positive(&key.take(tag::INTEGER, "the exponent")?, "the exponent")?;
    key.end("the exponent")?;
    if exponent != EXPONENT {
        return Err(Error::Key("its exponent is not 65537"));
    }
    let first = modulus.first().ok_or(Malformed::form("the modulus"))?;
    if modulus.last().is_some_and(|last| last % 2 == 0) {
        return Err(Error::Key("its modulus is even"));
    }
    match (modulus.len(), first.leading_zeros()) {
        (256, 0) => Ok(KeyType::Rsa2048),
        (384, 0) => Ok(KeyType::Rsa3072),
        _ => Err(Error::Key("it is RSA with neither 2,048 nor 3,072 bits")),
    }
}
