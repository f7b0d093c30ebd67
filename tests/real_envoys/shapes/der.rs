//! Certificates and revocation lists that no library writes: each field is DER of the test's own.

use std::time::{Duration, SystemTime};

use aws_lc_rs::{
    encoding::AsDer,
    rand::SystemRandom,
    rsa::{KeyPair as RsaKey, KeySize},
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, ECDSA_P521_SHA512_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair,
        KeyPair, RSA_PKCS1_SHA256, RSA_PSS_SHA256,
    },
};
use time::OffsetDateTime;

/// One element. Panics if the content is 64 KiB or more.
pub fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let len = u16::try_from(content.len()).unwrap_or_else(|_| panic!("{} bytes", content.len()));
    let [high, low] = len.to_be_bytes();
    let header = match (high, low) {
        (0, low) if low < 0x80 => vec![tag, low],
        (0, low) => vec![tag, 0x81, low],
        _ => vec![tag, 0x82, high, low],
    };
    [&header, content].concat()
}

pub fn seq(parts: &[&[u8]]) -> Vec<u8> {
    tlv(0x30, &parts.concat())
}

pub fn integer(content: &[u8]) -> Vec<u8> {
    tlv(2, content)
}

pub fn octets(content: &[u8]) -> Vec<u8> {
    tlv(4, content)
}

pub fn bits(content: &[u8]) -> Vec<u8> {
    tlv(3, &[&[0], content].concat())
}

/// An object identifier from its text.
pub fn oid(text: &str) -> Vec<u8> {
    let arcs: Vec<u32> = text.split('.').map(|arc| arc.parse().expect("an arc")).collect();
    let mut content = vec![];
    for arc in std::iter::once(arcs[0] * 40 + arcs[1]).chain(arcs[2..].iter().copied()) {
        let groups = (0..5).rev().map(|group| (arc >> (7 * group)).to_be_bytes()[3] & 0x7f).skip_while(|group| *group == 0);
        let groups: Vec<u8> = groups.collect();
        let (last, first) = groups.split_last().map_or((0, &[][..]), |(last, first)| (*last, first));
        content.extend(first.iter().map(|group| group | 0x80));
        content.push(last);
    }
    tlv(6, &content)
}

/// A name of attributes, each with its type, the tag of its value, and the value.
pub fn name_of(attributes: &[(&str, u8, &[u8])]) -> Vec<u8> {
    let sets = attributes.iter().map(|(kind, tag, value)| tlv(0x31, &seq(&[&oid(kind), &tlv(*tag, value)])));
    tlv(0x30, &sets.collect::<Vec<_>>().concat())
}

/// A name with a common name, as UTF8String.
pub fn name(common: &str) -> Vec<u8> {
    name_of(&[("2.5.4.3", 0x0c, common.as_bytes())])
}

/// A time of this many seconds from now, in the form of RFC 5280.
pub fn at(seconds: i64) -> Vec<u8> {
    let offset = Duration::from_secs(seconds.unsigned_abs());
    let now = SystemTime::now();
    let time = OffsetDateTime::from(if seconds < 0 { now - offset } else { now + offset });
    let text = format!("{:02}{:02}{:02}{:02}{:02}Z", u8::from(time.month()), time.day(), time.hour(), time.minute(), time.second());
    if time.year() < 2050 {
        tlv(0x17, format!("{:02}{text}", time.year() % 100).as_bytes())
    } else {
        tlv(0x18, format!("{:04}{text}", time.year()).as_bytes())
    }
}

/// A key that signs, and its signature algorithm.
pub enum Key {
    P256(EcdsaKeyPair, Vec<u8>),
    P384(EcdsaKeyPair),
    P521(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
    Rsa(Box<RsaKey>),
    RsaPss(Box<RsaKey>),
}

impl Key {
    pub fn new() -> Self {
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new()).expect("a key");
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, document.as_ref()).expect("a key");
        Self::P256(pair, document.as_ref().to_vec())
    }

    pub fn p384() -> Self {
        Self::P384(EcdsaKeyPair::generate(&ECDSA_P384_SHA384_ASN1_SIGNING).expect("a key"))
    }

    pub fn p521() -> Self {
        Self::P521(EcdsaKeyPair::generate(&ECDSA_P521_SHA512_ASN1_SIGNING).expect("a key"))
    }

    pub fn ed25519() -> Self {
        Self::Ed25519(Ed25519KeyPair::generate().expect("a key"))
    }

    pub fn rsa(size: KeySize) -> Self {
        Self::Rsa(Box::new(RsaKey::generate(size).expect("a key")))
    }

    pub fn rsa_pss() -> Self {
        Self::RsaPss(Box::new(RsaKey::generate(KeySize::Rsa2048).expect("a key")))
    }

    /// The PKCS#8 document of a P-256 key.
    pub fn pkcs8(&self) -> &[u8] {
        match self {
            Self::P256(_, document) => document,
            _ => panic!("not a P-256 key"),
        }
    }

    /// The SubjectPublicKeyInfo.
    pub fn spki(&self) -> Vec<u8> {
        let ec = |pair: &EcdsaKeyPair| {
            let der: aws_lc_rs::encoding::PublicKeyX509Der<'_> = pair.public_key().as_der().expect("a key");
            der.as_ref().to_vec()
        };
        match self {
            Self::P256(pair, _) | Self::P384(pair) | Self::P521(pair) => ec(pair),
            Self::Ed25519(pair) => seq(&[&seq(&[&oid("1.3.101.112")]), &bits(pair.public_key().as_ref())]),
            Self::Rsa(pair) | Self::RsaPss(pair) => {
                let der: aws_lc_rs::encoding::PublicKeyX509Der<'_> = pair.public_key().as_der().expect("a key");
                der.as_ref().to_vec()
            }
        }
    }

    /// The algorithm identifier of its signatures.
    pub fn algorithm(&self) -> Vec<u8> {
        match self {
            Self::P256(..) => seq(&[&oid("1.2.840.10045.4.3.2")]),
            Self::P384(_) => seq(&[&oid("1.2.840.10045.4.3.3")]),
            Self::P521(_) => seq(&[&oid("1.2.840.10045.4.3.4")]),
            Self::Ed25519(_) => seq(&[&oid("1.3.101.112")]),
            Self::Rsa(_) => seq(&[&oid("1.2.840.113549.1.1.11"), &[5, 0]]),
            Self::RsaPss(_) => {
                let sha256 = seq(&[&oid("2.16.840.1.101.3.4.2.1"), &[5, 0]]);
                let generator = seq(&[&oid("1.2.840.113549.1.1.8"), &sha256]);
                let parameters = seq(&[&tlv(0xa0, &sha256), &tlv(0xa1, &generator), &tlv(0xa2, &integer(&[32]))]);
                seq(&[&oid("1.2.840.113549.1.1.10"), &parameters])
            }
        }
    }

    pub fn sign(&self, content: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        let rsa = |pair: &RsaKey, padding| {
            let mut signature = vec![0; pair.public_modulus_len()];
            pair.sign(padding, &random, content, &mut signature).expect("a signature");
            signature
        };
        match self {
            Self::P256(pair, _) | Self::P384(pair) | Self::P521(pair) => {
                pair.sign(&random, content).expect("a signature").as_ref().to_vec()
            }
            Self::Ed25519(pair) => pair.sign(content).as_ref().to_vec(),
            Self::Rsa(pair) => rsa(pair, &RSA_PKCS1_SHA256),
            Self::RsaPss(pair) => rsa(pair, &RSA_PSS_SHA256),
        }
    }
}

/// An extension.
pub fn extension(id: &str, is_critical: bool, value: &[u8]) -> Vec<u8> {
    let critical: &[u8] = if is_critical { &[1, 1, 0xff] } else { &[] };
    seq(&[&oid(id), critical, &octets(value)])
}

pub const KEY_USAGE: &str = "2.5.29.15";
pub const BASIC_CONSTRAINTS: &str = "2.5.29.19";
pub const EXTENDED_KEY_USAGE: &str = "2.5.29.37";
pub const NAMES: &str = "2.5.29.17";
pub const SUBJECT_KEY: &str = "2.5.29.14";
pub const AUTHORITY_KEY: &str = "2.5.29.35";
pub const CONSTRAINTS: &str = "2.5.29.30";
pub const POLICIES: &str = "2.5.29.32";
pub const POLICY_MAPPINGS: &str = "2.5.29.33";
pub const POLICY_CONSTRAINTS: &str = "2.5.29.36";
pub const INHIBIT_ANY: &str = "2.5.29.54";
pub const DISTRIBUTION_POINTS: &str = "2.5.29.31";
pub const UNKNOWN: &str = "1.3.6.1.4.1.55555.1";

/// The fields of a certificate.
#[derive(Clone)]
pub struct Fields {
    pub version: Vec<u8>,
    /// The element.
    pub serial: Vec<u8>,
    /// In place of the algorithm of the signer, in the signed part.
    pub inner: Option<Vec<u8>>,
    /// In place of the algorithm of the signer, beside the signature.
    pub outer: Option<Vec<u8>>,
    pub issuer: Vec<u8>,
    pub not_before: Vec<u8>,
    pub not_after: Vec<u8>,
    pub subject: Vec<u8>,
    pub spki: Vec<u8>,
    /// Between the key and the extensions.
    pub unique_ids: Vec<u8>,
    /// Each with its identifier.
    pub extensions: Vec<(&'static str, Vec<u8>)>,
    /// In place of the element that wraps the extensions.
    pub raw_extensions: Option<Vec<u8>>,
    /// In place of the signature's element.
    pub signature: Option<Vec<u8>>,
    /// After the other fields of the certificate.
    pub tail: Vec<u8>,
}

impl Fields {
    pub fn new(subject: &[u8], issuer: &[u8], spki: &[u8], serial: u8) -> Self {
        Self {
            version: tlv(0xa0, &integer(&[2])),
            serial: integer(&[0x10, serial]),
            inner: None,
            outer: None,
            issuer: issuer.to_vec(),
            not_before: at(-3600),
            not_after: at(86_400),
            subject: subject.to_vec(),
            spki: spki.to_vec(),
            unique_ids: Vec::new(),
            extensions: Vec::new(),
            raw_extensions: None,
            signature: None,
            tail: Vec::new(),
        }
    }

    /// Sets an extension, in its place if it is there.
    pub fn set(&mut self, id: &'static str, is_critical: bool, value: &[u8]) -> &mut Self {
        let encoded = extension(id, is_critical, value);
        match self.extensions.iter_mut().find(|(known, _)| *known == id) {
            Some((_, old)) => *old = encoded,
            None => self.extensions.push((id, encoded)),
        }
        self
    }

    /// Adds an extension in any encoding, also beside another one of its kind.
    pub fn add(&mut self, id: &'static str, encoded: Vec<u8>) -> &mut Self {
        self.extensions.push((id, encoded));
        self
    }

    pub fn drop(&mut self, id: &str) -> &mut Self {
        self.extensions.retain(|(known, _)| *known != id);
        self
    }

    pub fn usage(&mut self, bits: &[u8]) -> &mut Self {
        self.set(KEY_USAGE, true, &tlv(3, bits))
    }

    pub fn signed_by(&self, key: &Key) -> Vec<u8> {
        let algorithm = key.algorithm();
        let extensions = match &self.raw_extensions {
            Some(raw) => raw.clone(),
            None if self.extensions.is_empty() => Vec::new(),
            None => {
                let all: Vec<&[u8]> = self.extensions.iter().map(|(_, encoded)| &encoded[..]).collect();
                tlv(0xa3, &seq(&all))
            }
        };
        let signed = seq(&[
            &self.version,
            &self.serial,
            self.inner.as_ref().unwrap_or(&algorithm),
            &self.issuer,
            &seq(&[&self.not_before, &self.not_after]),
            &self.subject,
            &self.spki,
            &self.unique_ids,
            &extensions,
        ]);
        let signature = self.signature.clone().unwrap_or_else(|| bits(&key.sign(&signed)));
        seq(&[&signed, self.outer.as_ref().unwrap_or(&algorithm), &signature, &self.tail])
    }
}

/// The fields of a revocation list.
#[derive(Clone)]
pub struct List {
    pub version: Vec<u8>,
    pub issuer: Vec<u8>,
    pub this_update: Vec<u8>,
    pub next_update: Vec<u8>,
    /// The element with the entries.
    pub revoked: Vec<u8>,
    pub extensions: Vec<Vec<u8>>,
}

impl List {
    pub fn of(issuer: &[u8]) -> Self {
        Self {
            version: integer(&[1]),
            issuer: issuer.to_vec(),
            this_update: at(-600),
            next_update: at(86_400),
            revoked: Vec::new(),
            extensions: vec![extension("2.5.29.20", false, &integer(&[1]))],
        }
    }

    pub fn signed_by(&self, key: &Key) -> Vec<u8> {
        let algorithm = key.algorithm();
        let all: Vec<&[u8]> = self.extensions.iter().map(|encoded| &encoded[..]).collect();
        let extensions = if all.is_empty() { Vec::new() } else { tlv(0xa0, &seq(&all)) };
        let signed = seq(&[&self.version, &algorithm, &self.issuer, &self.this_update, &self.next_update, &self.revoked, &extensions]);
        seq(&[&signed, &algorithm, &bits(&key.sign(&signed))])
    }
}

/// An entry of a list.
pub fn entry(serial: &[u8], extensions: &[u8]) -> Vec<u8> {
    seq(&[&integer(serial), &at(-700), extensions])
}
