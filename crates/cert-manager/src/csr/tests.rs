//! CSRs that request more than names, built by hand, and CSRs as agents make them.

use aws_lc_rs::{
    rand::SystemRandom,
    rsa::{KeyPair as RsaKeyPair, KeySize},
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _, RSA_PKCS1_SHA256},
};
use proptest::prelude::*;

use super::*;
use crate::Csr;

const ID: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const P256: &[u8] = &[0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const RSA: &[u8] = &[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];
const ECDSA_SHA256: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
const ECDSA_SHA384: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x03];
const RSA_SHA256: &[u8] = &[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0b, 0x05, 0x00];
const CHALLENGE_PASSWORD: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x07];

fn value(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let length = content.len();
    let [high, low] = u16::try_from(length).unwrap().to_be_bytes();
    let mut out = vec![tag];
    match length {
        0..=0x7f => out.push(low),
        0x80..=0xff => out.extend([0x81, low]),
        _ => out.extend([0x82, high, low]),
    }
    out.extend(content);
    out
}

fn seq(parts: &[&[u8]]) -> Vec<u8> {
    value(tag::SEQUENCE, parts)
}

fn uri(text: &str) -> Vec<u8> {
    value(tag::URI, &[text.as_bytes()])
}

fn dns(text: &str) -> Vec<u8> {
    value(tag::DNS_NAME, &[text.as_bytes()])
}

fn extension(oid: &[u8], content: &[u8]) -> Vec<u8> {
    seq(&[&value(tag::OID, &[oid]), &value(tag::OCTET_STRING, &[content])])
}

fn names(list: &[Vec<u8>]) -> Vec<u8> {
    extension(SUBJECT_ALT_NAME, &seq(&[&list.concat()]))
}

fn attribute(oid: &[u8], content: &[u8]) -> Vec<u8> {
    seq(&[&value(tag::OID, &[oid]), &value(tag::SET, &[content])])
}

fn extension_request(extensions: &[Vec<u8>]) -> Vec<u8> {
    attribute(EXTENSION_REQUEST, &seq(&[&extensions.concat()]))
}

/// The parts of a CSR. The signature covers a changed part.
struct Forge {
    pair: EcdsaKeyPair,
    version: Vec<u8>,
    subject: Vec<u8>,
    key: Option<Vec<u8>>,
    attributes: Vec<u8>,
    algorithm: &'static [u8],
}

impl Default for Forge {
    fn default() -> Self {
        Self {
            pair: EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).unwrap(),
            version: value(tag::INTEGER, &[&[0]]),
            subject: seq(&[]),
            key: None,
            attributes: extension_request(&[names(&[uri(ID)])]),
            algorithm: ECDSA_SHA256,
        }
    }
}

impl Forge {
    fn with(attributes: &[u8]) -> Self {
        Self { attributes: attributes.to_vec(), ..Self::default() }
    }

    fn named(list: &[Vec<u8>]) -> Self {
        Self::with(&extension_request(&[names(list)]))
    }

    fn info(&self) -> Vec<u8> {
        let point = self.pair.public_key().as_ref();
        let key = self.key.clone().unwrap_or_else(|| seq(&[&seq(&[P256]), &value(tag::BIT_STRING, &[&[0], point])]));
        seq(&[&self.version, &self.subject, &key, &value(tag::CONTEXT_0, &[&self.attributes])])
    }

    fn der(&self) -> Vec<u8> {
        let info = self.info();
        let signature = self.pair.sign(&SystemRandom::new(), &info).unwrap();
        seq(&[&info, &seq(&[self.algorithm]), &value(tag::BIT_STRING, &[&[0], signature.as_ref()])])
    }

    fn read(&self) -> Result<Asked, Error> {
        read_der(&self.der())
    }
}

fn refused(forge: &Forge) -> String {
    forge.read().unwrap_err().to_string()
}

#[test]
fn a_forge_that_changes_nothing_is_read() {
    assert_eq!(Forge::default().read().unwrap().uri, ID);
    let critical = seq(&[
        &value(tag::OID, &[SUBJECT_ALT_NAME]),
        &value(tag::BOOLEAN, &[&[0xff]]),
        &value(tag::OCTET_STRING, &[&seq(&[&uri(ID), &dns("a.b")])]),
    ]);
    assert_eq!(Forge::with(&extension_request(&[critical])).read().unwrap().dns_names, ["a.b"]);
}

#[test]
fn other_names_and_other_numbers_of_names_are_refused() {
    let upn = value(tag::OID, &[&[0x2b, 0x06, 0x01, 0x04, 0x01, 0x82, 0x37, 0x14, 0x02, 0x03]]);
    let other_name = value(0xa0, &[&upn, &value(0xa0, &[&value(0x0c, &[b"admin@corp"])])]);
    for (list, why) in [
        (vec![uri(ID), other_name], "asks for a name of the kind otherName; only one URI and DNS names are allowed"),
        (vec![value(0x81, &[b"a@b.c"]), uri(ID)], "asks for a name of the kind rfc822Name (an email address); only"),
        (vec![uri(ID), value(0x87, &[&[10, 0, 0, 1]])], "asks for a name of the kind iPAddress; only"),
        (vec![uri(ID), value(0xa4, &[&seq(&[])])], "asks for a name of the kind directoryName; only"),
        (vec![uri(ID), value(0x88, &[&[0x55]])], "asks for a name of the kind registeredID; only"),
        (vec![uri(ID), value(0xa6, &[ID.as_bytes()])], "asks for a name of the kind unknown to RFC 5280; only"),
        (vec![uri(ID), uri("spiffe://cluster.local/ns/kube-system/sa/root")], "asks for 2 URI names, not for one"),
        (vec![uri(ID), uri(ID)], "asks for 2 URI names, not for one"),
        (vec![dns("a.b")], "asks for 0 URI names, not for one"),
        (vec![], "asks for 0 URI names, not for one"),
        (vec![uri(ID), dns("a.b"), dns("c"), dns("A.b")], "asks for the DNS name \"A.b\" twice"),
        (vec![uri(ID), dns("")], "asks for a DNS name that is empty or not printable ASCII"),
        (vec![uri(ID), dns("a\0.b")], "asks for a DNS name that is empty or not printable ASCII"),
        (vec![uri(&format!("{ID}\n"))], "asks for a URI name that is empty or not printable ASCII"),
        (vec![uri("spiffe://käse/a")], "asks for a URI name that is empty or not printable ASCII"),
    ] {
        let found = refused(&Forge::named(&list));
        assert!(found.starts_with(why), "{found}, not {why}");
    }
}

#[test]
fn other_extensions_and_attributes_are_refused() {
    let san = || names(&[uri(ID)]);
    let not_critical =
        seq(&[&value(tag::OID, &[SUBJECT_ALT_NAME]), &value(tag::BOOLEAN, &[&[0]]), &value(tag::OCTET_STRING, &[&seq(&[&uri(ID)])])]);
    let only = "; only subject alternative names are allowed, once";
    for (attributes, why) in [
        // basicConstraints: CA
        (
            extension_request(&[san(), extension(&[0x55, 0x1d, 0x13], &seq(&[&[1, 1, 0xff]]))]),
            format!("asks for the extension 2.5.29.19{only}"),
        ),
        // nameConstraints
        (extension_request(&[extension(&[0x55, 0x1d, 0x1e], &seq(&[])), san()]), format!("asks for the extension 2.5.29.30{only}")),
        // keyUsage
        (extension_request(&[san(), extension(&[0x55, 0x1d, 0x0f], &[3, 2, 1, 6])]), format!("asks for the extension 2.5.29.15{only}")),
        (extension_request(&[san(), san()]), format!("asks for the extension 2.5.29.17{only}")),
        ([extension_request(&[san()]), extension_request(&[san()])].concat(), "has the attribute 1.2.840.113549.1.9.14; only".into()),
        (
            [attribute(CHALLENGE_PASSWORD, &value(0x0c, &[b"secret"])), extension_request(&[san()])].concat(),
            "has the attribute 1.2.840.113549.1.9.7; only an extension request is allowed, once".into(),
        ),
        (
            attribute(&[0x2b, 0x06, 0x01, 0x04, 0x01, 0x82, 0x37, 0x02, 0x01, 0x0e], &seq(&[&san()])),
            "has the attribute 1.3.6.1.4.1.311.2.1.14".into(),
        ),
        (vec![], "has no extension request, and so no name".into()),
        (extension_request(&[]), "has no extension request, and so no name".into()),
        (attribute(EXTENSION_REQUEST, &[]), "is not a PKCS#10 request in DER: the extensions is missing".into()),
        (
            attribute(EXTENSION_REQUEST, &[seq(&[&san()]), seq(&[&san()])].concat()),
            "is not a PKCS#10 request in DER: the extensions is followed".into(),
        ),
        (extension_request(&[not_critical]), "is not a PKCS#10 request in DER: an extension's criticality is malformed".into()),
        (
            extension_request(&[extension(SUBJECT_ALT_NAME, &[seq(&[&uri(ID)]), seq(&[&uri(ID)])].concat())]),
            "is not a PKCS#10 request in DER: the list of names is followed by other data".into(),
        ),
        (
            extension_request(&[seq(&[&value(tag::OID, &[SUBJECT_ALT_NAME]), &value(tag::OCTET_STRING, &[&seq(&[&uri(ID)])]), &[5, 0]])]),
            "is not a PKCS#10 request in DER: the names is followed by other data".into(),
        ),
    ] {
        let found = refused(&Forge::with(&attributes));
        assert!(found.starts_with(&why), "{found}, not {why}");
    }
}

#[test]
fn a_subject_another_version_and_trailing_bytes_are_refused() {
    let common_name = seq(&[&value(tag::OID, &[&[0x55, 0x04, 0x03]]), &value(0x0c, &[b"cart"])]);
    let subject = seq(&[&value(tag::SET, &[&common_name])]);
    assert_eq!(refused(&Forge { subject, ..Forge::default() }), "has a subject, which has to be empty");
    for version in [vec![2, 1, 1], vec![2, 2, 0, 0], vec![2, 0]] {
        assert_eq!(refused(&Forge { version, ..Forge::default() }), "is not of version 1");
    }

    let good = Forge::default().der();
    assert!(read_der(&[&good[..], &[0]].concat()).unwrap_err().to_string().ends_with("the request is followed by other data"));
    assert!(read_der(&good[..good.len() - 1]).unwrap_err().to_string().ends_with("the request is cut short"));
    // The same value with a longer encoding of its length, and with an indefinite length.
    let longer = [&[0x30, 0x83, 0], &good[2..]].concat();
    assert!(read_der(&longer).unwrap_err().to_string().ends_with("has a length that is indefinite or too large"));
    let padded = Forge::with(&[&[0x30, 0x81, 0x05], &[0; 5][..]].concat());
    assert!(refused(&padded).ends_with("an attribute has a length that is not in its shortest form"));
    assert!(read_der(&[0x30, 0x80, 0, 0]).is_err());
}

#[test]
fn a_signature_that_is_not_the_keys_is_refused() {
    let (mine, theirs) = (Forge::default(), Forge::default());
    // The key of another requester, with the own signature; and the parts of a valid CSR with the signature of another requester.
    let stolen = seq(&[&seq(&[P256]), &value(tag::BIT_STRING, &[&[0], theirs.pair.public_key().as_ref()])]);
    assert_eq!(Forge { key: Some(stolen), ..Forge::default() }.read(), Err(Error::Signature));
    let signature = theirs.pair.sign(&SystemRandom::new(), &mine.info()).unwrap();
    let swapped = seq(&[&mine.info(), &seq(&[ECDSA_SHA256]), &value(tag::BIT_STRING, &[&[0], signature.as_ref()])]);
    assert_eq!(read_der(&swapped), Err(Error::Signature));
    let unsigned = seq(&[&mine.info(), &seq(&[ECDSA_SHA256]), &value(tag::BIT_STRING, &[&[0]])]);
    assert_eq!(read_der(&unsigned), Err(Error::Signature));
    for algorithm in [ECDSA_SHA384, RSA_SHA256] {
        assert_eq!(Forge { algorithm, ..Forge::default() }.read(), Err(Error::Algorithm));
    }
}

#[test]
fn a_key_that_no_profile_has_is_refused() {
    let keyed = |algorithm: &[u8], bits: &[u8]| Forge {
        key: Some(seq(&[&seq(&[algorithm]), &value(tag::BIT_STRING, &[&[0], bits])])),
        ..Forge::default()
    };
    let point = Forge::default().pair.public_key().as_ref().to_vec();
    let compressed = [&[2 + (point[64] & 1)][..], &point[1..33]].concat();
    assert_eq!(keyed(P256, &compressed).read(), Err(Error::Key("its point is not in the uncompressed form")));
    // Not on the curve: one bit of y is changed.
    let mut off = point.clone();
    off[64] ^= 1;
    assert_eq!(keyed(P256, &off).read(), Err(Error::Signature));
    assert_eq!(keyed(P256, &[&[4][..], &[0; 64]].concat()).read(), Err(Error::Signature));
    let ed25519 = keyed(&[0x06, 0x03, 0x2b, 0x65, 0x70], &[7; 32]);
    assert_eq!(ed25519.read(), Err(Error::Key("it is neither ECDSA on P-256 or P-384 nor RSA")));

    let rsa = |modulus: &[u8], exponent: &[u8]| {
        let integer = |bytes: &[u8]| value(tag::INTEGER, &[bytes]);
        keyed(RSA, &seq(&[&integer(modulus), &integer(exponent)])).read().unwrap_err().to_string()
    };
    let modulus = |bytes: usize, last: u8| {
        let mut modulus = vec![0xab; bytes + 1];
        (modulus[0], modulus[bytes]) = (0, last);
        modulus
    };
    let wrong = |why: &str| format!("has a key that no profile allows: {why}");
    assert_eq!(rsa(&modulus(128, 1), &[1, 0, 1]), wrong("it is RSA with neither 2,048 nor 3,072 bits"));
    assert_eq!(rsa(&modulus(512, 1), &[1, 0, 1]), wrong("it is RSA with neither 2,048 nor 3,072 bits"));
    assert_eq!(rsa(&modulus(256, 1), &[3]), wrong("its exponent is not 65537"));
    assert_eq!(rsa(&modulus(256, 2), &[1, 0, 1]), wrong("its modulus is even"));
    let short = [&[0x7f][..], &modulus(255, 1)[1..]].concat();
    assert_eq!(rsa(&short, &[1, 0, 1]), wrong("it is RSA with neither 2,048 nor 3,072 bits"));
    let negative = &modulus(256, 1)[1..];
    assert!(rsa(negative, &[1, 0, 1]).ends_with("the modulus is malformed"));
    // The modulus has an allowed size, but the signature algorithm is not one of RSA.
    assert_eq!(rsa(&modulus(256, 1), &[1, 0, 1]), Error::Algorithm.to_string());
}

#[test]
fn rsa_signatures_are_checked_too() {
    let pair = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
    let key = seq(&[&seq(&[RSA]), &value(tag::BIT_STRING, &[&[0], pair.public_key().as_ref()])]);
    let info = Forge { key: Some(key), ..Forge::default() }.info();
    let mut signature = vec![0; pair.public_modulus_len()];
    pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), &info, &mut signature).unwrap();
    let request = |signature: &[u8]| seq(&[&info, &seq(&[RSA_SHA256]), &value(tag::BIT_STRING, &[&[0], signature])]);
    assert_eq!(read_der(&request(&signature)).unwrap().key, KeyType::Rsa2048);
    signature[17] ^= 1;
    assert_eq!(read_der(&request(&signature)), Err(Error::Signature));
}

#[test]
fn only_one_block_of_pem_is_read() {
    let good = Csr::from_der(&Forge::default().der()).pem().unwrap();
    let text = String::from_utf8(good.clone()).unwrap();
    assert!(read(&good).is_ok());
    for bad in [
        String::new(),
        format!("{text}{text}"),
        format!("{text}\n"),
        format!("x\n{text}"),
        text.replace("-----\nMI", "-----\nProc-Type: 4,ENCRYPTED\n\nMI"),
        text.replace('\n', "\r\n"),
        text.replace(" REQUEST-----", "-----"),
        text.replace("NEW", "").replace("BEGIN CERTIFICATE", "BEGIN NEW CERTIFICATE"),
        text.replacen("MI", "M I", 1),
        text.replacen("\n-----END", "-----END", 1),
    ] {
        assert!(matches!(read(bad.as_bytes()), Err(Error::Pem(_))), "{bad:?}");
    }
    assert_eq!(read(&vec![b'A'; MAX_BYTES + 1]), Err(Error::Size(MAX_BYTES + 1)));
}

#[test]
fn odd_object_identifiers_are_shown_within_bounds() {
    assert_eq!(Oid(vec![0x2a, 0x03]).to_string(), "1.2.3");
    assert_eq!(Oid(vec![0x88, 0x37]).to_string(), "2.999");
    assert_eq!(Oid(Vec::new()).to_string(), "");
    assert!(Oid(vec![0xff; 5000]).to_string().len() < 100);
    assert!(Oid(vec![0x7f; 5000]).to_string().len() < 200);
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_refused_and_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(read(&bytes).is_err());
        prop_assert!(read_der(&bytes).is_err());
        prop_assert!(read(&Csr::from_der(&bytes).pem().unwrap()).is_err());
    }

    /// Valid CSRs with one byte changed, removed or inserted reach more of the parser than random bytes do.
    #[test]
    fn broken_requests_are_refused_and_never_panic(at in 0_usize..200, byte in any::<u8>(), how in 0..3) {
        let good = Forge::default().der();
        let mut bad = good.clone();
        let at = at % bad.len();
        match how {
            0 => bad[at] = byte,
            1 => drop(bad.remove(at)),
            _ => bad.insert(at, byte),
        }
        prop_assert!(bad == good || read_der(&bad).is_err());
    }
}
