//! Odd values: of extensions, names, times, keys and algorithms.

use aws_lc_rs::rsa::KeySize;

use super::{
    super::{
        der::{
            AUTHORITY_KEY, BASIC_CONSTRAINTS, CONSTRAINTS, DISTRIBUTION_POINTS, EXTENDED_KEY_USAGE, INHIBIT_ANY, Key, NAMES, POLICIES,
            POLICY_CONSTRAINTS, POLICY_MAPPINGS, SUBJECT_KEY, UNKNOWN, bits, extension, integer, name, name_of, octets, oid, seq, tlv,
        },
        pki::{Authority, Material, Pki},
    },
    ANY_POLICY, CLIENT, Make, POLICY_A, POLICY_B, SERVER, directory, dns, email, permits, points, policies, uri, usages,
};

const TLS_FEATURES: &str = "1.3.6.1.5.5.7.1.24";

fn features(numbers: &[u8]) -> Vec<u8> {
    tlv(0x30, &numbers.iter().flat_map(|number| integer(&[*number])).collect::<Vec<_>>())
}

/// An intermediate with this alternative name.
fn named(p: &mut Pki, general_name: &[u8]) -> Material {
    p.mid.fields.set(NAMES, false, &seq(&[general_name]));
    p.material()
}

/// An intermediate with this value of an extension, not critical.
fn mid_with(p: &mut Pki, id: &'static str, value: &[u8]) -> Material {
    p.mid.fields.set(id, false, value);
    p.material()
}

/// An intermediate with two extensions of this kind.
fn mid_with_two(p: &mut Pki, id: &'static str, value: &[u8]) -> Material {
    p.mid.fields.set(id, false, value).add("again", extension(id, false, value));
    p.material()
}

fn attribute(tag: u8, value: &[u8]) -> Vec<u8> {
    seq(&[&oid("2.5.4.3"), &tlv(tag, value)])
}

/// A distribution point with a name that is relative to that of the issuer.
fn relative(attributes: &[u8]) -> Vec<u8> {
    seq(&[&seq(&[&tlv(0xa0, &tlv(0xa1, attributes))])])
}

fn party(name: &[u8]) -> Vec<u8> {
    tlv(0xa5, &tlv(0xa1, name))
}

pub const EXTENSIONS: &[(&str, Make)] = &[
    ("TLS features of the leaf twice, the first must staple", |p| {
        p.leaf.set(TLS_FEATURES, false, &features(&[5])).add("again", extension(TLS_FEATURES, false, &features(&[17])));
        p.material()
    }),
    ("TLS features of the leaf twice, the second must staple", |p| {
        p.leaf.set(TLS_FEATURES, false, &features(&[17])).add("again", extension(TLS_FEATURES, false, &features(&[5])));
        p.material()
    }),
    ("TLS features of the intermediate twice", |p| mid_with_two(p, TLS_FEATURES, &features(&[5]))),
    ("TLS features of the root twice", |p| {
        p.root.fields.set(TLS_FEATURES, false, &features(&[5])).add("again", extension(TLS_FEATURES, false, &features(&[5])));
        p.material()
    }),
    ("broken TLS features of the leaf", |p| {
        p.leaf.set(TLS_FEATURES, false, b"x");
        p.material()
    }),
    ("critical TLS features of the leaf", |p| {
        p.leaf.set(TLS_FEATURES, true, &features(&[17]));
        p.material()
    }),
    ("extended key usage of the intermediate twice", |p| mid_with_two(p, EXTENDED_KEY_USAGE, &usages(&[SERVER, CLIENT]))),
    ("alternative names of the intermediate twice", |p| mid_with_two(p, NAMES, &seq(&[&dns("a")]))),
    ("CRL distribution points of the intermediate twice", |p| mid_with_two(p, DISTRIBUTION_POINTS, &points("http://a/x.crl"))),
    ("policies of the root twice", |p| {
        p.root.fields.set(POLICIES, false, &policies(&[POLICY_A])).add("again", extension(POLICIES, false, &policies(&[POLICY_A])));
        p.material()
    }),
    ("broken extensions that Envoy does not evaluate", |p| {
        for id in ["2.5.29.9", "2.5.29.16", "2.5.29.18", "2.5.29.46", "1.3.6.1.5.5.7.1.1", "1.3.6.1.5.5.7.1.11", "2.16.840.1.113730.1.13"] {
            p.leaf.set(id, false, b"x");
            p.mid.fields.set(id, false, b"x");
            p.root.fields.set(id, false, b"x");
        }
        p.material()
    }),
    ("an empty list of CRL distribution points", |p| mid_with(p, DISTRIBUTION_POINTS, &seq(&[]))),
    ("an empty CRL distribution point", |p| mid_with(p, DISTRIBUTION_POINTS, &seq(&[&seq(&[])]))),
    ("relative CRL distribution point", |p| mid_with(p, DISTRIBUTION_POINTS, &relative(&attribute(0x0c, b"x")))),
    ("relative CRL distribution point without attributes", |p| mid_with(p, DISTRIBUTION_POINTS, &relative(&[]))),
    ("relative CRL distribution point that is not UTF-8", |p| mid_with(p, DISTRIBUTION_POINTS, &relative(&attribute(0x0c, &[0xff])))),
    ("relative CRL distribution point with a set", |p| mid_with(p, DISTRIBUTION_POINTS, &relative(&tlv(0x31, &attribute(0x0c, b"x"))))),
    ("CRL distribution point of another issuer", |p| mid_with(p, DISTRIBUTION_POINTS, &seq(&[&seq(&[&tlv(0xa2, &directory("other"))])]))),
    ("CRL distribution point of a broken issuer", |p| mid_with(p, DISTRIBUTION_POINTS, &seq(&[&seq(&[&tlv(0xa2, &[5, 0])])]))),
    ("an alternative name of each kind", |p| {
        let other = tlv(0xa0, &[oid(UNKNOWN), tlv(0xa0, &tlv(0x0c, b"x"))].concat());
        let all = [other, email("a@b"), dns("a"), tlv(0xa3, &[]), directory("a"), party(&tlv(0x13, b"a")), uri("a:b")].concat();
        p.mid.fields.set(NAMES, false, &seq(&[&all, &tlv(0x87, &[10, 0, 0, 1]), &tlv(0x88, &[0x2a, 3])]));
        p.material()
    }),
    ("an empty list of alternative names in the intermediate", |p| mid_with(p, NAMES, &seq(&[]))),
    ("party name without a name", |p| named(p, &tlv(0xa5, &[]))),
    ("party name of a wrong string type", |p| named(p, &party(&tlv(0x16, b"a")))),
    ("party name that is not UTF-8", |p| named(p, &party(&tlv(0x0c, &[0xff])))),
    ("party name without explicit tags", |p| named(p, &tlv(0xa5, &tlv(0x81, b"a")))),
    ("X.400 address that is no DER", |p| named(p, &tlv(0xa3, &[0xff]))),
    ("other name without a value", |p| named(p, &tlv(0xa0, &oid(UNKNOWN)))),
    ("registered identifier that is broken", |p| named(p, &tlv(0x88, &[0x2a, 0x80]))),
    ("IP address of three bytes", |p| named(p, &tlv(0x87, &[10, 0, 0]))),
    ("directory name that is not UTF-8", |p| named(p, &tlv(0xa4, &name_of(&[("2.5.4.3", 0x0c, &[0xff])])))),
    ("general name of an unknown kind", |p| named(p, &tlv(0x89, b"a"))),
    ("key identifiers of no bytes", |p| {
        p.mid.fields.set(SUBJECT_KEY, false, &octets(&[]));
        p.leaf.set(AUTHORITY_KEY, false, &seq(&[&tlv(0x80, &[])]));
        p.material()
    }),
    ("authority key identifier with fields in another order", |p| {
        let serial = tlv(0x82, &p.mid.fields.serial[2..]);
        p.leaf.set(AUTHORITY_KEY, false, &seq(&[&serial, &tlv(0x80, &[1; 20])]));
        p.material()
    }),
    ("root whose authority key identifier names another key", |p| {
        p.root.fields.set(AUTHORITY_KEY, false, &seq(&[&tlv(0x80, &[1; 20])]));
        p.material()
    }),
];

/// An intermediate with one policy and this qualifier.
fn qualified(p: &mut Pki, id: &str, value: &[u8]) -> Material {
    mid_with(p, POLICIES, &seq(&[&seq(&[&oid(ANY_POLICY), &seq(&[&seq(&[&oid(id), value])])])]))
}

const STATEMENT: &str = "1.3.6.1.5.5.7.2.1";
const NOTICE: &str = "1.3.6.1.5.5.7.2.2";

pub const POLICY: &[(&str, Make)] = &[
    ("broken policy mappings of the leaf", |p| {
        p.leaf.set(POLICY_MAPPINGS, true, b"x");
        p.material()
    }),
    ("policy mappings of the leaf twice", |p| {
        let mappings = seq(&[&seq(&[&oid(POLICY_A), &oid(POLICY_B)])]);
        p.leaf.set(POLICY_MAPPINGS, false, &mappings).add("again", extension(POLICY_MAPPINGS, false, &mappings));
        p.material()
    }),
    ("broken policy mappings of the intermediate", |p| mid_with(p, POLICY_MAPPINGS, b"x")),
    ("broken policy constraints of the leaf", |p| {
        p.leaf.set(POLICY_CONSTRAINTS, true, b"x");
        p.material()
    }),
    ("broken inhibitAnyPolicy of the leaf", |p| {
        p.leaf.set(INHIBIT_ANY, true, b"x");
        p.material()
    }),
    ("intermediate that demands a policy after 2^88 certificates", |p| mid_with(p, POLICY_CONSTRAINTS, &seq(&[&tlv(0x80, &[1; 12])]))),
    ("a mapping that is inhibited", |p| {
        p.mid.fields.set(POLICY_CONSTRAINTS, true, &seq(&[&tlv(0x80, &[0]), &tlv(0x81, &[0])])).set(
            POLICIES,
            false,
            &policies(&[POLICY_A]),
        );
        let mut second = Authority::below("the second intermediate", &p.mid);
        second.fields.set(POLICIES, false, &policies(&[POLICY_A]));
        second.fields.set(POLICY_MAPPINGS, true, &seq(&[&seq(&[&oid(POLICY_A), &oid(POLICY_B)])]));
        p.leaf.set(POLICIES, false, &policies(&[POLICY_B]));
        Material { chain: vec![p.leaf_of(&second), second.fields.signed_by(&p.mid.key), p.signed_mid()], ..p.material() }
    }),
    ("statement as UTF8String", |p| qualified(p, STATEMENT, &tlv(0x0c, b"http://a/cps"))),
    ("notice as UTF8String", |p| qualified(p, NOTICE, &seq(&[&tlv(0x0c, b"text")]))),
    ("notice as BMPString", |p| qualified(p, NOTICE, &seq(&[&tlv(0x1e, &[0, b't'])]))),
    ("notice as PrintableString", |p| qualified(p, NOTICE, &seq(&[&tlv(0x13, b"text")]))),
    ("notice that is not UTF-8", |p| qualified(p, NOTICE, &seq(&[&tlv(0x0c, &[0xff])]))),
    ("notice without a text", |p| qualified(p, NOTICE, &seq(&[]))),
    ("notice that is no sequence", |p| qualified(p, NOTICE, &tlv(0x0c, b"text"))),
    ("notice with a reference", |p| {
        let reference = seq(&[&tlv(0x0c, b"organization"), &seq(&[&integer(&[1]), &integer(&[2])])]);
        qualified(p, NOTICE, &seq(&[&reference, &tlv(0x0c, b"text")]))
    }),
    ("notice with a reference without numbers", |p| qualified(p, NOTICE, &seq(&[&seq(&[&tlv(0x0c, b"organization")])]))),
    ("notice with a reference after the text", |p| {
        let reference = seq(&[&tlv(0x0c, b"organization"), &seq(&[&integer(&[1])])]);
        qualified(p, NOTICE, &seq(&[&tlv(0x0c, b"text"), &reference]))
    }),
    ("unknown qualifier", |p| qualified(p, UNKNOWN, &seq(&[]))),
];

fn below_a_second(p: &mut Pki, path_len: &[u8]) -> Material {
    p.mid.fields.set(BASIC_CONSTRAINTS, true, &seq(&[&[1, 1, 0xff], &integer(path_len)]));
    let second = Authority::below("the second intermediate", &p.mid);
    Material { chain: vec![p.leaf_of(&second), second.fields.signed_by(&p.mid.key), p.signed_mid()], ..p.material() }
}

pub const BASIC: &[(&str, Make)] = &[
    ("intermediate with path length 2^63 - 2 above an intermediate", |p| {
        below_a_second(p, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe])
    }),
    ("intermediate with path length 2^63 - 1 above an intermediate", |p| {
        below_a_second(p, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])
    }),
    ("intermediate with path length 2^63 above an intermediate", |p| below_a_second(p, &[0, 0x80, 0, 0, 0, 0, 0, 0, 0])),
];

/// An intermediate with this alternative name, below a root that permits names of `base`.
fn permitted(p: &mut Pki, base: &[u8], general_name: &[u8]) -> Material {
    p.root.fields.set(CONSTRAINTS, true, &seq(&[&tlv(0xa0, &seq(&[base]))]));
    named(p, general_name)
}

/// As [`permitted`], with a root that excludes names of `base`.
fn excluded(p: &mut Pki, base: &[u8], general_name: &[u8]) -> Material {
    p.root.fields.set(CONSTRAINTS, true, &seq(&[&tlv(0xa1, &seq(&[base]))]));
    named(p, general_name)
}

pub const NAME_CONSTRAINTS: &[(&str, Make)] = &[
    ("permitted URI, and one of the intermediate with a port", |p| permitted(p, &uri("example.org"), &uri("spiffe://example.org:8080/x"))),
    ("permitted URI, and one of the intermediate with an empty port", |p| {
        permitted(p, &uri("example.org"), &uri("spiffe://example.org:/x"))
    }),
    ("permitted URI, and one of the intermediate with a user", |p| permitted(p, &uri("example.org"), &uri("spiffe://user@example.org/x"))),
    ("permitted URI, and one of the intermediate with a query", |p| permitted(p, &uri("example.org"), &uri("spiffe://example.org?x"))),
    ("permitted URI, and one of the intermediate without a host", |p| permitted(p, &uri("example.org"), &uri("urn:uuid:1"))),
    ("permitted URI, and one of the intermediate of an IPv6 address", |p| permitted(p, &uri("example.org"), &uri("spiffe://[::1]/x"))),
    ("excluded URI, and one of the intermediate without a host", |p| excluded(p, &uri("other.example"), &uri("urn:uuid:1"))),
    ("excluded URI, and one of the intermediate with an underscore", |p| excluded(p, &uri("other.example"), &uri("spiffe://my_domain/x"))),
    ("excluded DNS: a dot, and a name that ends with two", |p| excluded(p, &dns("."), &dns("a.."))),
    ("excluded DNS name below a wildcard of the intermediate", |p| excluded(p, &dns("a.example.com"), &dns("*.example.com"))),
    ("excluded mailbox, and the same in capitals", |p| excluded(p, &email("a@example.org"), &email("A@example.org"))),
    ("excluded mailbox, and one in quotes", |p| excluded(p, &email("a@example.org"), &email("\"b\"@example.org"))),
    ("permitted IPv4 addresses, and one of the intermediate", |p| {
        permitted(p, &tlv(0x87, &[10, 0, 0, 0, 255, 0, 0, 0]), &tlv(0x87, &[10, 0, 0, 1]))
    }),
    ("permitted party name that is broken", |p| permits(p, &[tlv(0xa5, &[])])),
    ("excluded directory name without attributes", |p| {
        p.root.fields.set(CONSTRAINTS, true, &seq(&[&tlv(0xa1, &seq(&[&tlv(0xa4, &seq(&[]))]))]));
        p.material()
    }),
    ("permitted directory name with more attributes than the intermediate", |p| {
        let more = name_of(&[("2.5.4.3", 0x0c, b"the intermediate"), ("2.5.4.10", 0x0c, b"x")]);
        p.root.fields.set(CONSTRAINTS, true, &seq(&[&tlv(0xa0, &seq(&[&tlv(0xa4, &more)]))]));
        p.material()
    }),
    ("more names than Envoy compares with constraints", |p| {
        let bases: Vec<u8> = (0..600).flat_map(|number| seq(&[&dns(&format!("{number}.example"))])).collect();
        let names: Vec<u8> = (0..1800).flat_map(|number| dns(&format!("{number}.test"))).collect();
        p.root.fields.set(CONSTRAINTS, true, &seq(&[&tlv(0xa1, &bases)]));
        p.mid.fields.set(NAMES, false, &tlv(0x30, &names));
        p.material()
    }),
];

/// The ordinary certificates with an intermediate whose key is encoded in another way.
fn respelled(p: &mut Pki, respell: impl Fn(&[u8]) -> Vec<u8>) -> Material {
    const ALGORITHM: std::ops::Range<usize> = 2..23;
    let spki = p.mid.key.spki();
    p.mid.fields.spki = seq(&[&spki[ALGORITHM], &bits(&respell(&spki[ALGORITHM.end + 3..]))]);
    p.material()
}

/// The ordinary certificates with an intermediate of this key.
fn with_key(p: &mut Pki, key: Key) -> Material {
    p.mid = Authority::below_with("the intermediate", &p.root, key);
    p.mid.named_by(&mut p.leaf);
    p.material()
}

/// As [`with_key`], with an RSA key whose SubjectPublicKeyInfo has these bits.
fn with_rsa_key(p: &mut Pki, respell: impl Fn(&[u8]) -> Vec<u8>) -> Material {
    let key = Key::rsa(KeySize::Rsa2048);
    let spki = key.spki();
    with_key(p, key);
    p.mid.fields.spki = seq(&[&seq(&[&oid("1.2.840.113549.1.1.1"), &[5, 0]]), &bits(&respell(&spki))]);
    p.material()
}

/// A leaf with an RSASSA-PSS signature and parameters with this salt and trailer.
fn with_pss(p: &mut Pki, salt: u8, trailer: &[u8]) -> Material {
    let sha256 = seq(&[&oid("2.16.840.1.101.3.4.2.1"), &[5, 0]]);
    let generator = seq(&[&oid("1.2.840.113549.1.1.8"), &sha256]);
    let parameters = seq(&[&tlv(0xa0, &sha256), &tlv(0xa1, &generator), &tlv(0xa2, &integer(&[salt])), trailer]);
    let algorithm = seq(&[&oid("1.2.840.113549.1.1.10"), &parameters]);
    p.leaf.inner = Some(algorithm.clone());
    p.leaf.outer = Some(algorithm);
    with_key(p, Key::rsa_pss())
}

pub const ALGORITHMS: &[(&str, Make)] = &[
    ("a compressed point", |p| respelled(p, |point| [&[2 + (point[64] & 1)], &point[1..33]].concat())),
    ("a hybrid point", |p| respelled(p, |point| [&[6 + (point[64] & 1)], &point[1..]].concat())),
    ("a point with a byte after it", |p| respelled(p, |point| [point, &[0]].concat())),
    ("a point in a second SubjectPublicKeyInfo", |p| {
        let whole = p.mid.key.spki();
        respelled(p, |_| whole.clone())
    }),
    ("a point with unused bits", |p| {
        let spki = p.mid.key.spki();
        p.mid.fields.spki = seq(&[&spki[2..23], &tlv(3, &[&[1], &spki[26..90], &[spki[90] & 0xfe]].concat())]);
        p.material()
    }),
    ("a point without a curve", |p| {
        let spki = p.mid.key.spki();
        p.mid.fields.spki = seq(&[&seq(&[&oid("1.2.840.10045.2.1")]), &bits(&spki[26..])]);
        p.material()
    }),
    ("a point of ECDH alone", |p| {
        let spki = p.mid.key.spki();
        p.mid.fields.spki = seq(&[&seq(&[&oid("1.3.132.1.12"), &oid("1.2.840.10045.3.1.7")]), &bits(&spki[26..])]);
        p.material()
    }),
    ("an RSA key in a second SubjectPublicKeyInfo", |p| with_rsa_key(p, <[u8]>::to_vec)),
    ("an RSA key with a byte after it", |p| with_rsa_key(p, |spki| [&spki[24..], &[0]].concat())),
    ("RSASSA-PSS with the trailer in full", |p| with_pss(p, 32, &tlv(0xa3, &integer(&[1])))),
    ("RSASSA-PSS with an unknown trailer", |p| with_pss(p, 32, &tlv(0xa3, &integer(&[2])))),
    ("RSASSA-PSS with another length of the salt", |p| with_pss(p, 20, &[])),
    ("Ed25519 with NULL parameters", |p| {
        let with_null = seq(&[&oid("1.3.101.112"), &[5, 0]]);
        p.leaf.inner = Some(with_null.clone());
        p.leaf.outer = Some(with_null);
        with_key(p, Key::ed25519())
    }),
    ("Ed25519 key with NULL parameters", |p| {
        let key = Key::ed25519();
        let spki = seq(&[&seq(&[&oid("1.3.101.112"), &[5, 0]]), &key.spki()[9..]]);
        with_key(p, key);
        p.mid.fields.spki = spki;
        p.material()
    }),
    ("an empty signature of the leaf", |p| {
        p.leaf.signature = Some(bits(&[]));
        p.material()
    }),
    ("an empty signature of the root", |p| {
        p.root.fields.signature = Some(bits(&[]));
        p.material()
    }),
];

/// The ordinary certificates with another end of the intermediate.
fn mid_until(p: &mut Pki, tag: u8, text: &[u8]) -> Material {
    p.mid.fields.not_after = tlv(tag, text);
    p.material()
}

pub const TIMES: &[(&str, Make)] = &[
    ("intermediate until the end of 2049 as UTCTime", |p| mid_until(p, 0x17, b"491231235959Z")),
    ("intermediate until the end of 2049 as GeneralizedTime", |p| mid_until(p, 0x18, b"20491231235959Z")),
    ("intermediate until the begin of 2050", |p| mid_until(p, 0x18, b"20500101000000Z")),
    ("intermediate until 1950 as UTCTime", |p| mid_until(p, 0x17, b"500101000000Z")),
    ("intermediate until 9999", |p| mid_until(p, 0x18, b"99991231235959Z")),
    ("intermediate with an offset of zero", |p| mid_until(p, 0x17, b"491231235959+0000")),
    ("intermediate with an offset beyond a day", |p| mid_until(p, 0x17, b"491231235959+2400")),
    ("intermediate with an offset of 13 hours", |p| mid_until(p, 0x17, b"491231235959+1300")),
    ("intermediate with a time as UTF8String", |p| mid_until(p, 0x0c, b"491231235959Z")),
    ("leaf since the year 0", |p| {
        p.leaf.not_before = tlv(0x18, b"00000101000000Z");
        p.material()
    }),
];

pub const STRINGS: &[(&str, Make)] = &[
    ("root with a Boolean as name", |p| super::root_named(p, 0x01, &[0xff])),
    ("root with a Boolean of 1 as name", |p| super::root_named(p, 0x01, &[1])),
    ("root with NULL as name", |p| super::root_named(p, 0x05, &[])),
    ("root with an object identifier as name", |p| super::root_named(p, 0x06, &[0x2a, 3])),
    ("root with a bit string with padding bits set as name", |p| super::root_named(p, 0x03, &[1, 1])),
    ("root with a time as name", |p| super::root_named(p, 0x18, b"20200101000000Z")),
    ("root with GeneralString", |p| super::root_named(p, 0x1b, b"root")),
    ("root with an empty set as name", |p| super::root_named(p, 0x31, &[])),
    ("root with a constructed string as name", |p| super::root_named(p, 0x2c, &tlv(0x0c, b"root"))),
    ("root with a name of an unknown type", |p| super::root_named(p, 0x80, b"root")),
    ("root with a name of a private type", |p| super::root_named(p, 0xc0, b"root")),
    ("issuer with an attribute of no string type", |p| {
        p.mid.fields.subject = name_of(&[("2.5.4.3", 0x0c, b"the intermediate"), ("2.5.4.45", 0x03, &[0, 1])]);
        p.leaf.issuer.clone_from(&p.mid.fields.subject);
        p.material()
    }),
    ("issuer with NumericString, and a subject with UTF8String", |p| {
        p.mid.fields.subject = name("1");
        p.leaf.issuer = name_of(&[("2.5.4.3", 0x12, b"1")]);
        p.material()
    }),
];
