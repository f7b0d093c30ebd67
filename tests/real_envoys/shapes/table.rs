//! The shapes: each is one change of ordinary certificates.

use super::{
    der::{
        AUTHORITY_KEY, BASIC_CONSTRAINTS, CONSTRAINTS, DISTRIBUTION_POINTS, EXTENDED_KEY_USAGE, Fields, INHIBIT_ANY, KEY_USAGE, Key, NAMES,
        POLICIES, POLICY_CONSTRAINTS, POLICY_MAPPINGS, SUBJECT_KEY, UNKNOWN, at, bits, entry, extension, integer, name, name_of, octets,
        oid, seq, tlv,
    },
    pki::{Authority, Material, Pki, key_id},
};
use aws_lc_rs::rsa::KeySize;

mod paths;
mod values;

type Make = fn(&mut Pki) -> Material;

/// One shape.
pub struct Shape {
    pub group: &'static str,
    pub name: &'static str,
    /// The DNS names of the leaf.
    pub dns: &'static [&'static str],
    make: Make,
}

impl Shape {
    /// The shape with a leaf of this SubjectPublicKeyInfo.
    pub fn make(&self, spki: &[u8]) -> Material {
        (self.make)(&mut Pki::new(spki, self.dns))
    }
}

/// All shapes, by group.
pub fn all() -> Vec<Shape> {
    let mut shapes = Vec::new();
    let mut group = |group, dns, list: &[(&'static str, Make)]| {
        shapes.extend(list.iter().map(|(name, make)| Shape { group, name, dns, make: *make }));
    };
    group("ordinary", &[], ORDINARY);
    group("key usage", &[], KEY_USAGES);
    group("basic constraints", &[], BASIC);
    group("basic constraints", &[], values::BASIC);
    group("extended key usage", &[], EXTENDED);
    group("name constraints", &["a.example.org"], NAME_CONSTRAINTS);
    group("name constraints", &["a.example.org"], values::NAME_CONSTRAINTS);
    group("extensions", &[], EXTENSIONS);
    group("extensions", &[], values::EXTENSIONS);
    group("policies", &[], POLICY);
    group("policies", &[], values::POLICY);
    group("algorithms", &[], ALGORITHMS);
    group("algorithms", &[], values::ALGORITHMS);
    group("serial numbers", &[], SERIALS);
    group("times", &[], TIMES);
    group("times", &[], values::TIMES);
    group("names", &[], STRINGS);
    group("names", &[], values::STRINGS);
    group("versions", &[], VERSIONS);
    group("encoding", &[], ENCODING);
    group("order and duplicates", &[], ORDERS);
    group("order and duplicates", &[], paths::ORDERS);
    group("cross-signing and renewal", &[], CROSS);
    group("cross-signing and renewal", &[], paths::CROSS);
    group("namesakes", &[], NAMESAKES);
    group("trust anchors", &[], ANCHORS);
    group("trust anchors", &[], paths::ANCHORS);
    group("revocation lists", &[], LISTS);
    group("revocation lists", &[], paths::LISTS);
    shapes
}

const CA_SIGN: &[u8] = &[1, 0x06];

const ORDINARY: &[(&str, Make)] = &[
    ("an intermediate and a root", |p| p.material()),
    ("a root alone", |p| Material { chain: vec![p.leaf_of(&p.root)], bundle: vec![p.root.signed()], ..Material::default() }),
    ("no key identifiers", |p| {
        for fields in [&mut p.root.fields, &mut p.mid.fields, &mut p.leaf] {
            fields.drop(SUBJECT_KEY).drop(AUTHORITY_KEY);
        }
        p.material()
    }),
    ("a chain with its root", |p| {
        let mut material = p.material();
        material.chain.push(p.root.signed());
        material
    }),
    ("a leaf with a subject", |p| {
        p.leaf.subject = name("workload");
        p.leaf.set(NAMES, false, &tlv(0x30, &tlv(0x86, super::pki::ID.as_bytes())));
        p.material()
    }),
];

const KEY_USAGES: &[(&str, Make)] = &[
    ("root without keyCertSign", |p| {
        p.root.fields.usage(&[1, 0x02]);
        p.material()
    }),
    ("intermediate without keyCertSign", |p| {
        p.mid.fields.usage(&[1, 0x02]);
        p.material()
    }),
    ("root without key usage", |p| {
        p.root.fields.drop(KEY_USAGE);
        p.material()
    }),
    ("intermediate without key usage", |p| {
        p.mid.fields.drop(KEY_USAGE);
        p.material()
    }),
    ("leaf without key usage", |p| {
        p.leaf.drop(KEY_USAGE);
        p.material()
    }),
    ("leaf with keyEncipherment alone", |p| {
        p.leaf.usage(&[5, 0x20]);
        p.material()
    }),
    ("leaf with keyAgreement alone", |p| {
        p.leaf.usage(&[3, 0x08]);
        p.material()
    }),
    ("leaf with keyCertSign", |p| {
        p.leaf.usage(&[2, 0x84]);
        p.material()
    }),
    ("leaf with an empty key usage", |p| {
        p.leaf.usage(&[0]);
        p.material()
    }),
    ("root with a key usage of nine bits", |p| {
        p.root.fields.usage(&[7, 0x06, 0x80]);
        p.material()
    }),
    ("root with a key usage with padding bits set", |p| {
        p.root.fields.usage(&[1, 0x07]);
        p.material()
    }),
    ("intermediate with a key usage that is no bit string", |p| {
        p.mid.fields.set(KEY_USAGE, true, &octets(CA_SIGN));
        p.material()
    }),
    ("root with a key usage that is not critical", |p| {
        p.root.fields.set(KEY_USAGE, false, &tlv(3, CA_SIGN));
        p.material()
    }),
];

const BASIC: &[(&str, Make)] = &[
    ("intermediate without basic constraints", |p| {
        p.mid.fields.drop(BASIC_CONSTRAINTS);
        p.material()
    }),
    ("intermediate with CA false", |p| {
        p.mid.fields.set(BASIC_CONSTRAINTS, true, &seq(&[]));
        p.material()
    }),
    ("root without basic constraints", |p| {
        p.root.fields.drop(BASIC_CONSTRAINTS);
        p.material()
    }),
    ("root with CA false", |p| {
        p.root.fields.set(BASIC_CONSTRAINTS, true, &seq(&[]));
        p.material()
    }),
    ("basic constraints that are not critical", |p| {
        p.root.fields.set(BASIC_CONSTRAINTS, false, &seq(&[&[1, 1, 0xff]]));
        p.mid.fields.set(BASIC_CONSTRAINTS, false, &seq(&[&[1, 1, 0xff]]));
        p.material()
    }),
    ("intermediate with path length 0", |p| {
        p.mid.fields.set(BASIC_CONSTRAINTS, true, &seq(&[&[1, 1, 0xff], &integer(&[0])]));
        p.material()
    }),
    ("root with path length 0 above an intermediate", |p| {
        p.root.fields.set(BASIC_CONSTRAINTS, true, &seq(&[&[1, 1, 0xff], &integer(&[0])]));
        p.material()
    }),
    ("intermediate with path length 0 above an intermediate", |p| below_a_second(p, 0)),
    ("intermediate with path length 1 above an intermediate", |p| below_a_second(p, 1)),
    ("intermediate with path length 0 above a self-issued intermediate", |p| {
        p.mid.fields.set(BASIC_CONSTRAINTS, true, &seq(&[&[1, 1, 0xff], &integer(&[0])]));
        let again = Authority::below("the intermediate", &p.mid);
        Material { chain: vec![p.leaf_of(&again), again.fields.signed_by(&p.mid.key), p.signed_mid()], ..p.material() }
    }),
    ("self-issued intermediate with path length 0 above an intermediate", |p| {
        let mut again = Authority::below("the intermediate", &p.mid);
        again.fields.set(BASIC_CONSTRAINTS, true, &seq(&[&[1, 1, 0xff], &integer(&[0])]));
        let last = Authority::below("the last", &again);
        let chain = vec![p.leaf_of(&last), last.fields.signed_by(&again.key), again.fields.signed_by(&p.mid.key), p.signed_mid()];
        Material { chain, ..p.material() }
    }),
    ("intermediate with a path length and CA false", |p| {
        p.mid.fields.set(BASIC_CONSTRAINTS, true, &seq(&[&integer(&[0])]));
        p.material()
    }),
    ("root with a path length and CA false", |p| {
        p.root.fields.set(BASIC_CONSTRAINTS, true, &seq(&[&integer(&[0])]));
        p.material()
    }),
    ("intermediate with a negative path length", |p| {
        p.mid.fields.set(BASIC_CONSTRAINTS, true, &seq(&[&[1, 1, 0xff], &integer(&[0xff])]));
        p.material()
    }),
    ("intermediate with a path length of ten bytes", |p| {
        p.mid.fields.set(BASIC_CONSTRAINTS, true, &seq(&[&[1, 1, 0xff], &integer(&[1; 10])]));
        p.material()
    }),
    ("intermediate with CA true as 1", |p| {
        p.mid.fields.set(BASIC_CONSTRAINTS, true, &seq(&[&[1, 1, 1]]));
        p.material()
    }),
    ("root with CA true as 1", |p| {
        p.root.fields.set(BASIC_CONSTRAINTS, true, &seq(&[&[1, 1, 1]]));
        p.material()
    }),
    ("leaf with CA false in full", |p| {
        p.leaf.set(BASIC_CONSTRAINTS, true, &seq(&[&[1, 1, 0]]));
        p.material()
    }),
    ("leaf with CA true", |p| {
        p.leaf.set(BASIC_CONSTRAINTS, true, &seq(&[&[1, 1, 0xff]]));
        p.material()
    }),
];

fn below_a_second(p: &mut Pki, path_len: u8) -> Material {
    p.mid.fields.set(BASIC_CONSTRAINTS, true, &seq(&[&[1, 1, 0xff], &integer(&[path_len])]));
    let second = Authority::below("the second intermediate", &p.mid);
    Material { chain: vec![p.leaf_of(&second), second.fields.signed_by(&p.mid.key), p.signed_mid()], ..p.material() }
}

fn usages(ids: &[&str]) -> Vec<u8> {
    tlv(0x30, &ids.iter().map(|id| oid(id)).collect::<Vec<_>>().concat())
}

const SERVER: &str = "1.3.6.1.5.5.7.3.1";
const CLIENT: &str = "1.3.6.1.5.5.7.3.2";
const ANY_USAGE: &str = "2.5.29.37.0";
const CODE: &str = "1.3.6.1.5.5.7.3.3";

const EXTENDED: &[(&str, Make)] = &[
    ("intermediate for servers and clients", |p| {
        p.mid.fields.set(EXTENDED_KEY_USAGE, false, &usages(&[SERVER, CLIENT]));
        p.material()
    }),
    ("intermediate for servers alone", |p| {
        p.mid.fields.set(EXTENDED_KEY_USAGE, false, &usages(&[SERVER]));
        p.material()
    }),
    ("intermediate for any usage", |p| {
        p.mid.fields.set(EXTENDED_KEY_USAGE, false, &usages(&[ANY_USAGE]));
        p.material()
    }),
    ("root for code alone", |p| {
        p.root.fields.set(EXTENDED_KEY_USAGE, true, &usages(&[CODE]));
        p.material()
    }),
    ("leaf without extended key usage", |p| {
        p.leaf.drop(EXTENDED_KEY_USAGE);
        p.material()
    }),
    ("leaf for any usage", |p| {
        p.leaf.set(EXTENDED_KEY_USAGE, false, &usages(&[ANY_USAGE]));
        p.material()
    }),
    ("leaf for clients alone", |p| {
        p.leaf.set(EXTENDED_KEY_USAGE, false, &usages(&[CLIENT]));
        p.material()
    }),
    ("leaf with an empty list of usages", |p| {
        p.leaf.set(EXTENDED_KEY_USAGE, false, &usages(&[]));
        p.material()
    }),
    ("leaf with critical usages and an unknown one", |p| {
        p.leaf.set(EXTENDED_KEY_USAGE, true, &usages(&[SERVER, CLIENT, UNKNOWN]));
        p.material()
    }),
];

/// Name constraints: permitted and excluded subtrees, each a general name.
fn constraints(permitted: &[Vec<u8>], excluded: &[Vec<u8>]) -> Vec<u8> {
    let list = |tag, names: &[Vec<u8>]| {
        if names.is_empty() { Vec::new() } else { tlv(tag, &names.iter().map(|name| seq(&[name])).collect::<Vec<_>>().concat()) }
    };
    seq(&[&list(0xa0, permitted), &list(0xa1, excluded)])
}

fn uri(base: &str) -> Vec<u8> {
    tlv(0x86, base.as_bytes())
}

fn dns(base: &str) -> Vec<u8> {
    tlv(0x82, base.as_bytes())
}

fn email(base: &str) -> Vec<u8> {
    tlv(0x81, base.as_bytes())
}

fn directory(common: &str) -> Vec<u8> {
    tlv(0xa4, &name(common))
}

fn permits(p: &mut Pki, permitted: &[Vec<u8>]) -> Material {
    p.mid.fields.set(CONSTRAINTS, true, &constraints(permitted, &[]));
    p.material()
}

fn excludes(p: &mut Pki, excluded: &[Vec<u8>]) -> Material {
    p.mid.fields.set(CONSTRAINTS, true, &constraints(&[], excluded));
    p.material()
}

const NAME_CONSTRAINTS: &[(&str, Make)] = &[
    ("permitted URI: the trust domain", |p| permits(p, &[uri("example.org")])),
    ("permitted URI: the trust domain, in capitals", |p| permits(p, &[uri("EXAMPLE.org")])),
    ("permitted URI: the trust domain, with a dot at its end", |p| permits(p, &[uri("example.org.")])),
    ("permitted URI: another domain", |p| permits(p, &[uri("other.example")])),
    ("permitted URI: another domain and the trust domain", |p| permits(p, &[uri("other.example"), uri("example.org")])),
    ("permitted URI: domains below the trust domain", |p| permits(p, &[uri(".example.org")])),
    ("permitted URI: domains below org", |p| permits(p, &[uri(".org")])),
    ("permitted URI: empty", |p| permits(p, &[uri("")])),
    ("permitted URI: a whole SPIFFE ID", |p| permits(p, &[uri("spiffe://example.org")])),
    ("permitted URI: a name with an underscore, beside the trust domain", |p| permits(p, &[uri("example.org"), uri("my_domain")])),
    ("permitted URI: a name with an underscore, before the trust domain", |p| permits(p, &[uri("my_domain"), uri("example.org")])),
    ("permitted URI: an IPv4 address", |p| permits(p, &[uri("10.0.0.1")])),
    ("excluded URI: another domain", |p| excludes(p, &[uri("other.example")])),
    ("excluded URI: the trust domain", |p| excludes(p, &[uri("example.org")])),
    ("excluded URI: a name with an underscore", |p| excludes(p, &[uri("my_domain")])),
    ("permitted DNS: the name", |p| permits(p, &[dns("a.example.org")])),
    ("permitted DNS: the domain", |p| permits(p, &[dns("example.org")])),
    ("permitted DNS: the domain, with a dot at its start", |p| permits(p, &[dns(".example.org")])),
    ("permitted DNS: the domain, with a dot at its end", |p| permits(p, &[dns("example.org.")])),
    ("permitted DNS: another domain", |p| permits(p, &[dns("other.example")])),
    ("permitted DNS: empty", |p| permits(p, &[dns("")])),
    ("excluded DNS: the domain", |p| excludes(p, &[dns("example.org")])),
    ("excluded DNS: empty", |p| excludes(p, &[dns("")])),
    ("permitted URI and DNS", |p| permits(p, &[uri("example.org"), dns("example.org")])),
    ("permitted email", |p| permits(p, &[email("example.org")])),
    ("excluded email", |p| excludes(p, &[email("example.org")])),
    ("permitted email, and an email address in the subject of the intermediate", |p| {
        p.root.fields.set(CONSTRAINTS, true, &constraints(&[email("example.org")], &[]));
        p.mid.fields.subject = name_of(&[("1.2.840.113549.1.9.1", 0x16, b"ca@other.example")]);
        p.leaf.issuer.clone_from(&p.mid.fields.subject);
        p.material()
    }),
    ("permitted IPv4 addresses", |p| permits(p, &[tlv(0x87, &[10, 0, 0, 0, 255, 0, 0, 0])])),
    ("permitted directory name, and a leaf without subject", |p| permits(p, &[directory("workload")])),
    ("permitted directory name of the leaf", |p| {
        p.leaf.subject = name("workload");
        permits(p, &[directory("workload")])
    }),
    ("permitted directory name of the leaf, in capitals and with blanks", |p| {
        p.leaf.subject = name("workload one");
        permits(p, &[directory(" WORKLOAD  One ")])
    }),
    ("permitted directory name of another", |p| {
        p.leaf.subject = name("workload");
        permits(p, &[directory("other")])
    }),
    ("excluded directory name of the leaf", |p| {
        p.leaf.subject = name("workload");
        excludes(p, &[directory("workload")])
    }),
    ("permitted directory name of the root for its intermediate", |p| {
        p.root.fields.set(CONSTRAINTS, true, &constraints(&[directory("other")], &[]));
        p.material()
    }),
    ("permitted other name", |p| permits(p, &[tlv(0xa0, &[oid(UNKNOWN), tlv(0xa0, &tlv(0x0c, b"x"))].concat())])),
    ("permitted registered identifier", |p| permits(p, &[tlv(0x88, &[0x2a, 3])])),
    ("a minimum for a URI", |p| {
        let subtree = seq(&[&uri("example.org"), &tlv(0x80, &[0])]);
        p.mid.fields.set(CONSTRAINTS, true, &seq(&[&tlv(0xa0, &subtree)]));
        p.material()
    }),
    ("a minimum for an email address", |p| {
        let subtree = seq(&[&email("example.org"), &tlv(0x80, &[0])]);
        p.mid.fields.set(CONSTRAINTS, true, &seq(&[&tlv(0xa0, &subtree)]));
        p.material()
    }),
    ("constraints of the root: the trust domain", |p| {
        p.root.fields.set(CONSTRAINTS, true, &constraints(&[uri("example.org")], &[]));
        p.material()
    }),
    ("constraints of the root: another domain", |p| {
        p.root.fields.set(CONSTRAINTS, true, &constraints(&[uri("other.example")], &[]));
        p.material()
    }),
    ("constraints that are not critical: another domain", |p| {
        p.mid.fields.set(CONSTRAINTS, false, &constraints(&[uri("other.example")], &[]));
        p.material()
    }),
    ("constraints of the leaf", |p| {
        p.leaf.set(CONSTRAINTS, true, &constraints(&[uri("other.example")], &[]));
        p.material()
    }),
    ("empty constraints", |p| permits(p, &[])),
    ("broken constraints", |p| {
        p.mid.fields.set(CONSTRAINTS, true, &octets(b"x"));
        p.material()
    }),
    ("broken constraints of the root", |p| {
        p.root.fields.set(CONSTRAINTS, true, &octets(b"x"));
        p.material()
    }),
    ("permitted DNS with a wildcard", |p| permits(p, &[dns("*.example.org")])),
];

const EXTENSIONS: &[(&str, Make)] = &[
    ("unknown critical extension of the leaf", |p| {
        p.leaf.set(UNKNOWN, true, &octets(b"x"));
        p.material()
    }),
    ("unknown critical extension of the intermediate", |p| {
        p.mid.fields.set(UNKNOWN, true, &octets(b"x"));
        p.material()
    }),
    ("unknown critical extension of the root", |p| {
        p.root.fields.set(UNKNOWN, true, &octets(b"x"));
        p.material()
    }),
    ("unknown extension", |p| {
        p.leaf.set(UNKNOWN, false, b"x");
        p.material()
    }),
    ("unknown extension twice", |p| {
        p.leaf.set(UNKNOWN, false, b"x").add("again", extension(UNKNOWN, false, b"y"));
        p.material()
    }),
    ("basic constraints of the intermediate twice", |p| {
        p.mid.fields.add("again", extension(BASIC_CONSTRAINTS, true, &seq(&[&[1, 1, 0xff]])));
        p.material()
    }),
    ("basic constraints of the root twice", |p| {
        p.root.fields.add("again", extension(BASIC_CONSTRAINTS, true, &seq(&[&[1, 1, 0xff]])));
        p.material()
    }),
    ("subject key identifier of the root twice", |p| {
        p.root.fields.add("again", extension(SUBJECT_KEY, false, &octets(&key_id(&p.root.key.spki()))));
        p.material()
    }),
    ("critical key identifiers", |p| {
        let (own, of) = (octets(&key_id(&p.mid.key.spki())), seq(&[&tlv(0x80, &key_id(&p.root.key.spki()))]));
        p.mid.fields.set(SUBJECT_KEY, true, &own).set(AUTHORITY_KEY, true, &of);
        p.material()
    }),
    ("critical key identifier of the root", |p| {
        let own = octets(&key_id(&p.root.key.spki()));
        p.root.fields.set(SUBJECT_KEY, true, &own);
        p.material()
    }),
    ("broken subject key identifier of the root", |p| {
        p.root.fields.set(SUBJECT_KEY, false, b"x");
        p.material()
    }),
    ("broken CRL distribution points of the leaf", |p| {
        p.leaf.set(DISTRIBUTION_POINTS, false, b"x");
        p.material()
    }),
    ("CRL distribution points", |p| {
        p.leaf.set(DISTRIBUTION_POINTS, false, &points("http://a/x.crl"));
        p.mid.fields.set(DISTRIBUTION_POINTS, false, &points("http://a/y.crl"));
        p.material()
    }),
    ("critical CRL distribution points of the leaf", |p| {
        p.leaf.set(DISTRIBUTION_POINTS, true, &points("http://a/x.crl"));
        p.material()
    }),
    ("leaf that must staple", |p| {
        p.leaf.set("1.3.6.1.5.5.7.1.24", false, &seq(&[&integer(&[5])]));
        p.material()
    }),
    ("leaf that must staple, among other TLS features", |p| {
        p.leaf.set("1.3.6.1.5.5.7.1.24", false, &seq(&[&integer(&[5]), &integer(&[17])]));
        p.material()
    }),
    ("leaf with another TLS feature", |p| {
        p.leaf.set("1.3.6.1.5.5.7.1.24", false, &seq(&[&integer(&[17])]));
        p.material()
    }),
    ("extension with critical false in full", |p| {
        p.leaf.add(UNKNOWN, seq(&[&oid(UNKNOWN), &[1, 1, 0], &octets(b"x")]));
        p.material()
    }),
    ("root with an extension with critical false in full", |p| {
        p.root.fields.add(UNKNOWN, seq(&[&oid(UNKNOWN), &[1, 1, 0], &octets(b"x")]));
        p.material()
    }),
    ("root with an extension with critical true as 1", |p| {
        p.root.fields.add(UNKNOWN, seq(&[&oid(UNKNOWN), &[1, 1, 1], &octets(b"x")]));
        p.material()
    }),
    ("Netscape certificate type", |p| {
        p.root.fields.set("2.16.840.1.113730.1.1", false, &bits(&[0x07]));
        p.mid.fields.set("2.16.840.1.113730.1.1", false, &bits(&[0x07]));
        p.material()
    }),
    ("authority information and Microsoft's template", |p| {
        let place = seq(&[&oid("1.3.6.1.5.5.7.48.1"), &uri("http://ocsp.example")]);
        p.leaf.set("1.3.6.1.5.5.7.1.1", false, &seq(&[&place]));
        p.leaf.set("1.3.6.1.4.1.311.21.7", false, &seq(&[&oid(UNKNOWN), &integer(&[100]), &integer(&[1])]));
        p.mid.fields.set("1.3.6.1.4.1.311.21.1", false, &integer(&[0]));
        p.material()
    }),
    ("critical authority information of the leaf", |p| {
        let place = seq(&[&oid("1.3.6.1.5.5.7.48.1"), &uri("http://ocsp.example")]);
        p.leaf.set("1.3.6.1.5.5.7.1.1", true, &seq(&[&place]));
        p.material()
    }),
    ("alternative names of the intermediate", |p| {
        p.mid.fields.set(NAMES, false, &seq(&[&uri("spiffe://example.org")]));
        p.root.fields.set(NAMES, false, &seq(&[&uri("spiffe://example.org")]));
        p.material()
    }),
    ("broken alternative names of the root", |p| {
        p.root.fields.set(NAMES, false, &octets(b"x"));
        p.material()
    }),
];

fn points(place: &str) -> Vec<u8> {
    seq(&[&seq(&[&tlv(0xa0, &tlv(0xa0, &uri(place)))])])
}

fn policies(ids: &[&str]) -> Vec<u8> {
    tlv(0x30, &ids.iter().map(|id| seq(&[&oid(id)])).collect::<Vec<_>>().concat())
}

const POLICY_A: &str = "1.3.6.1.4.1.55555.2";
const POLICY_B: &str = "1.3.6.1.4.1.55555.3";
const ANY_POLICY: &str = "2.5.29.32.0";

const POLICY: &[(&str, Make)] = &[
    ("critical policies of the leaf", |p| {
        p.leaf.set(POLICIES, true, &policies(&[POLICY_A]));
        p.material()
    }),
    ("policies with qualifiers", |p| {
        let practice = seq(&[&oid("1.3.6.1.5.5.7.2.1"), &tlv(0x16, b"http://a/cps")]);
        p.mid.fields.set(POLICIES, false, &seq(&[&seq(&[&oid(ANY_POLICY), &seq(&[&practice])])]));
        p.material()
    }),
    ("the same policy twice in the leaf", |p| {
        p.leaf.set(POLICIES, false, &policies(&[POLICY_A, POLICY_A]));
        p.material()
    }),
    ("an empty list of policies in the leaf", |p| {
        p.leaf.set(POLICIES, false, &policies(&[]));
        p.material()
    }),
    ("an empty list of policies in the root", |p| {
        p.root.fields.set(POLICIES, false, &policies(&[]));
        p.material()
    }),
    ("intermediate that demands a policy", |p| {
        p.mid.fields.set(POLICY_CONSTRAINTS, true, &seq(&[&tlv(0x80, &[0])]));
        p.material()
    }),
    ("intermediate that demands a policy after one certificate", |p| {
        p.mid.fields.set(POLICY_CONSTRAINTS, true, &seq(&[&tlv(0x80, &[1])]));
        p.material()
    }),
    ("root that demands a policy", |p| {
        p.root.fields.set(POLICY_CONSTRAINTS, true, &seq(&[&tlv(0x80, &[0])]));
        p.material()
    }),
    ("intermediate that demands a policy, which all have", |p| {
        p.mid.fields.set(POLICY_CONSTRAINTS, true, &seq(&[&tlv(0x80, &[0])])).set(POLICIES, false, &policies(&[POLICY_A]));
        p.leaf.set(POLICIES, false, &policies(&[POLICY_A]));
        p.material()
    }),
    ("intermediate that demands a policy, and another one in the leaf", |p| {
        p.mid.fields.set(POLICY_CONSTRAINTS, true, &seq(&[&tlv(0x80, &[0])])).set(POLICIES, false, &policies(&[POLICY_A]));
        p.leaf.set(POLICIES, false, &policies(&[POLICY_B]));
        p.material()
    }),
    ("intermediate that demands a policy, with a mapping to that of the leaf", |p| {
        p.mid.fields.set(POLICY_CONSTRAINTS, true, &seq(&[&tlv(0x80, &[0])])).set(POLICIES, false, &policies(&[POLICY_A]));
        p.mid.fields.set(POLICY_MAPPINGS, true, &seq(&[&seq(&[&oid(POLICY_A), &oid(POLICY_B)])]));
        p.leaf.set(POLICIES, false, &policies(&[POLICY_B]));
        p.material()
    }),
    ("any policy, inhibited and demanded", |p| {
        p.mid.fields.set(POLICY_CONSTRAINTS, true, &seq(&[&tlv(0x80, &[0])])).set(POLICIES, false, &policies(&[ANY_POLICY]));
        p.mid.fields.set(INHIBIT_ANY, true, &integer(&[0]));
        p.leaf.set(POLICIES, false, &policies(&[ANY_POLICY]));
        p.material()
    }),
    ("empty policy constraints of the intermediate", |p| {
        p.mid.fields.set(POLICY_CONSTRAINTS, true, &seq(&[]));
        p.material()
    }),
    ("broken policies of the intermediate", |p| {
        p.mid.fields.set(POLICIES, false, b"x");
        p.material()
    }),
    ("a mapping from any policy", |p| {
        p.mid.fields.set(POLICY_MAPPINGS, true, &seq(&[&seq(&[&oid(ANY_POLICY), &oid(POLICY_B)])]));
        p.material()
    }),
    ("a negative inhibitAnyPolicy", |p| {
        p.mid.fields.set(INHIBIT_ANY, true, &integer(&[0xff]));
        p.material()
    }),
];

/// The ordinary certificates with authorities of this key.
fn of_keys(p: &mut Pki, root: Key, mid: Key) -> Material {
    p.root = Authority::root_with("the root", root);
    p.mid = Authority::below_with("the intermediate", &p.root, mid);
    p.mid.named_by(&mut p.leaf);
    p.material()
}

const ECDSA_SHA256: &str = "1.2.840.10045.4.3.2";

const ALGORITHMS: &[(&str, Make)] = &[
    ("P-384 authorities", |p| of_keys(p, Key::p384(), Key::p384())),
    ("P-521 authorities", |p| of_keys(p, Key::p521(), Key::p521())),
    ("RSA-2048 authorities", |p| of_keys(p, Key::rsa(KeySize::Rsa2048), Key::rsa(KeySize::Rsa2048))),
    ("RSA-4096 root, P-256 intermediate", |p| of_keys(p, Key::rsa(KeySize::Rsa4096), Key::new())),
    ("RSASSA-PSS signatures", |p| of_keys(p, Key::rsa_pss(), Key::rsa_pss())),
    ("Ed25519 authorities", |p| of_keys(p, Key::ed25519(), Key::ed25519())),
    ("two different algorithms in the leaf", |p| {
        p.leaf.outer = Some(seq(&[&oid("1.2.840.10045.4.3.3")]));
        p.material()
    }),
    ("two different algorithms in the root", |p| {
        p.root.fields.outer = Some(seq(&[&oid("1.2.840.10045.4.3.3")]));
        p.material()
    }),
    ("ECDSA with NULL parameters", |p| {
        let with_null = seq(&[&oid(ECDSA_SHA256), &[5, 0]]);
        p.leaf.outer = Some(with_null.clone());
        p.leaf.inner = Some(with_null);
        p.material()
    }),
    ("RSA without NULL parameters", |p| {
        let without = seq(&[&oid("1.2.840.113549.1.1.11")]);
        p.mid.fields.outer = Some(without.clone());
        p.mid.fields.inner = Some(without);
        p.root = Authority::root_with("the root", Key::rsa(KeySize::Rsa2048));
        p.root.named_by(&mut p.mid.fields);
        p.material()
    }),
    ("ECDSA with other parameters", |p| {
        let odd = seq(&[&oid(ECDSA_SHA256), &octets(b"x")]);
        p.leaf.outer = Some(odd.clone());
        p.leaf.inner = Some(odd);
        p.material()
    }),
    ("an unknown signature algorithm of the leaf", |p| {
        p.leaf.outer = Some(seq(&[&oid(UNKNOWN)]));
        p.leaf.inner = Some(seq(&[&oid(UNKNOWN)]));
        p.material()
    }),
    ("an unknown signature algorithm of the root", |p| {
        p.root.fields.outer = Some(seq(&[&oid(UNKNOWN)]));
        p.root.fields.inner = Some(seq(&[&oid(UNKNOWN)]));
        p.material()
    }),
    ("a wrong signature of the leaf", |p| {
        p.leaf.signature = Some(bits(&Key::new().sign(b"other")));
        p.material()
    }),
    ("a wrong signature of the root", |p| {
        p.root.fields.signature = Some(bits(&Key::new().sign(b"other")));
        p.material()
    }),
    ("a signature of the leaf with unused bits", |p| {
        p.leaf.signature = Some(tlv(3, &[4, 0x30, 0x00]));
        p.material()
    }),
    ("a root with a key of an unknown algorithm, beside the right one", |p| {
        let mut odd = Authority::root("odd");
        odd.fields.spki = seq(&[&seq(&[&oid(UNKNOWN)]), &bits(b"x")]);
        let mut material = p.material();
        material.bundle.push(odd.signed());
        material
    }),
    ("a root with a key that is no point, beside the right one", |p| {
        let mut odd = Authority::root("odd");
        let curve = seq(&[&oid("1.2.840.10045.2.1"), &oid("1.2.840.10045.3.1.7")]);
        odd.fields.spki = seq(&[&curve, &bits(&[4; 65])]);
        let mut material = p.material();
        material.bundle.push(odd.signed());
        material
    }),
    ("a root with an RSA key without parameters, beside the right one", |p| {
        let mut odd = Authority::root("odd");
        odd.fields.spki = seq(&[&seq(&[&oid("1.2.840.113549.1.1.1")]), &bits(b"x")]);
        let mut material = p.material();
        material.bundle.push(odd.signed());
        material
    }),
];

const SERIALS: &[(&str, Make)] = &[
    ("zero", |p| with_serial(p, &integer(&[0]))),
    ("negative", |p| with_serial(p, &integer(&[0x80]))),
    ("21 bytes", |p| with_serial(p, &integer(&[1; 21]))),
    ("120 bytes", |p| with_serial(p, &integer(&[1; 120]))),
    ("a padding byte", |p| with_serial(p, &integer(&[0, 1]))),
    ("empty", |p| with_serial(p, &integer(&[]))),
    ("no integer", |p| with_serial(p, &octets(&[1]))),
    ("the same for all", |p| {
        for fields in [&mut p.root.fields, &mut p.mid.fields, &mut p.leaf] {
            fields.serial = integer(&[1]);
        }
        p.material()
    }),
    ("a padding byte in the leaf", |p| {
        p.leaf.serial = integer(&[0, 1]);
        p.material()
    }),
];

/// A root with this serial number, and a leaf with a similar one.
fn with_serial(p: &mut Pki, serial: &[u8]) -> Material {
    p.root.fields.serial = serial.to_vec();
    p.material()
}

const TIMES: &[(&str, Make)] = &[
    ("root since 1950 as GeneralizedTime", |p| begins(p, 0x18, b"19500101000000Z")),
    ("root since 1950 as UTCTime", |p| begins(p, 0x17, b"500101000000Z")),
    ("root since 2020 as GeneralizedTime", |p| begins(p, 0x18, b"20200101000000Z")),
    ("root since 1900", |p| begins(p, 0x18, b"19000101000000Z")),
    ("root since the year 0", |p| begins(p, 0x18, b"00000101000000Z")),
    ("root with a time without seconds", |p| begins(p, 0x17, b"2001010000Z")),
    ("root with a time with an offset", |p| begins(p, 0x17, b"200101000000+0100")),
    ("root with a time with fractions", |p| begins(p, 0x18, b"20200101000000.5Z")),
    ("root with a GeneralizedTime with an offset", |p| begins(p, 0x18, b"20200101000000+0100")),
    ("root with a 13th month", |p| begins(p, 0x17, b"201301000000Z")),
    ("root with 29 February in a year without it", |p| begins(p, 0x17, b"210229000000Z")),
    ("root with a leap second", |p| begins(p, 0x17, b"161231235960Z")),
    ("root until 9999", |p| {
        p.root.fields.not_after = tlv(0x18, b"99991231235959Z");
        p.material()
    }),
    ("leaf until 2060", |p| {
        p.leaf.not_after = tlv(0x18, b"20600101000000Z");
        p.material()
    }),
    ("leaf since 2020 as GeneralizedTime", |p| {
        p.leaf.not_before = tlv(0x18, b"20200101000000Z");
        p.material()
    }),
    ("intermediate that ends before it begins", |p| {
        p.mid.fields.not_before = at(-60);
        p.mid.fields.not_after = at(-120);
        p.material()
    }),
    ("ended leaf", |p| {
        p.leaf.not_after = at(-60);
        p.material()
    }),
    ("leaf of tomorrow", |p| {
        p.leaf.not_before = at(80_000);
        p.material()
    }),
    ("ended intermediate", |p| {
        p.mid.fields.not_after = at(-60);
        p.material()
    }),
    ("intermediate of tomorrow", |p| {
        p.mid.fields.not_before = at(80_000);
        p.material()
    }),
    ("ended root", |p| {
        p.root.fields.not_after = at(-60);
        p.material()
    }),
    ("root of tomorrow", |p| {
        p.root.fields.not_before = at(80_000);
        p.material()
    }),
    ("ended root beside the right one", |p| {
        let mut ended = Authority::root("ended");
        ended.fields.not_after = at(-60);
        let mut material = p.material();
        material.bundle.insert(0, ended.signed());
        material
    }),
    ("ended intermediate beside the right one", |p| {
        let mut ended = Authority::below("ended", &p.root);
        ended.fields.not_after = at(-60);
        let mut material = p.material();
        material.chain.push(ended.fields.signed_by(&p.root.key));
        material
    }),
];

fn begins(p: &mut Pki, tag: u8, text: &[u8]) -> Material {
    p.root.fields.not_before = tlv(tag, text);
    p.material()
}

const STRINGS: &[(&str, Make)] = &[
    ("root with UTF8String that is not UTF-8", |p| root_named(p, 0x0c, &[b'a', 0xff])),
    ("root with UTF8String of characters beyond ASCII", |p| root_named(p, 0x0c, "Wurzel für alle 🌳".as_bytes())),
    ("root with PrintableString", |p| root_named(p, 0x13, b"root")),
    ("root with PrintableString of other characters", |p| root_named(p, 0x13, b"root_@*")),
    ("root with T61String of Latin-1", |p| root_named(p, 0x14, &[b'r', 0xfc])),
    ("root with IA5String beyond ASCII", |p| root_named(p, 0x16, &[b'r', 0xfc])),
    ("root with BMPString", |p| root_named(p, 0x1e, &[0, b'r', 0, b'o'])),
    ("root with BMPString of odd length", |p| root_named(p, 0x1e, &[0, b'r', 0])),
    ("root with BMPString of half a character", |p| root_named(p, 0x1e, &[0xd8, 0x00])),
    ("root with UniversalString", |p| root_named(p, 0x1c, &[0, 0, 0, b'r'])),
    ("root with UniversalString of odd length", |p| root_named(p, 0x1c, &[0, 0, b'r'])),
    ("root with UniversalString beyond Unicode", |p| root_named(p, 0x1c, &[0, 0x11, 0, 0])),
    ("root with NumericString of letters", |p| root_named(p, 0x12, b"root")),
    ("root with an integer as name", |p| root_named(p, 0x02, &[1])),
    ("root with a padded integer as name", |p| root_named(p, 0x02, &[0, 1])),
    ("root with a sequence as name", |p| root_named(p, 0x30, &[5, 0])),
    ("root with an empty name", |p| root_named(p, 0x0c, b"")),
    ("root with a NUL in its name", |p| root_named(p, 0x0c, b"a\0b")),
    ("issuer in other letters", |p| issued_by(p, &name("THE Intermediate"))),
    ("issuer with other blanks", |p| issued_by(p, &name(" the   intermediate "))),
    ("issuer with a tab as a blank", |p| issued_by(p, &name("the\tintermediate"))),
    ("issuer in another string type", |p| issued_by(p, &name_of(&[("2.5.4.3", 0x13, b"the intermediate")]))),
    ("issuer in BMPString", |p| {
        let wide: Vec<u8> = "the intermediate".encode_utf16().flat_map(u16::to_be_bytes).collect();
        issued_by(p, &name_of(&[("2.5.4.3", 0x1e, &wide)]))
    }),
    ("issuer with another attribute", |p| issued_by(p, &name_of(&[("2.5.4.10", 0x0c, b"the intermediate")]))),
    ("issuer in capitals beyond ASCII", |p| {
        p.mid.fields.subject = name("für alle");
        issued_by(p, &name("FÜR ALLE"))
    }),
    ("issuer with attributes in another order", |p| {
        let two = |first: (&str, &[u8]), second: (&str, &[u8])| name_of(&[(first.0, 0x0c, first.1), (second.0, 0x0c, second.1)]);
        p.mid.fields.subject = two(("2.5.4.10", b"o"), ("2.5.4.3", b"c"));
        issued_by(p, &two(("2.5.4.3", b"c"), ("2.5.4.10", b"o")))
    }),
    ("issuer with a set in another order", |p| {
        let (a, b) = (seq(&[&oid("2.5.4.10"), &tlv(0x0c, b"o")]), seq(&[&oid("2.5.4.3"), &tlv(0x0c, b"c")]));
        p.mid.fields.subject = seq(&[&tlv(0x31, &[b.clone(), a.clone()].concat())]);
        issued_by(p, &seq(&[&tlv(0x31, &[a, b].concat())]))
    }),
    ("root with an empty set in its name", |p| {
        p.root.fields.subject = seq(&[&tlv(0x31, &[])]);
        p.root.fields.issuer.clone_from(&p.root.fields.subject);
        p.mid.fields.issuer.clone_from(&p.root.fields.subject);
        p.material()
    }),
    ("root with a name without attributes", |p| {
        p.root.fields.subject = seq(&[]);
        p.root.fields.issuer.clone_from(&p.root.fields.subject);
        p.mid.fields.issuer.clone_from(&p.root.fields.subject);
        p.material()
    }),
    ("root with a name of 10,000 characters", |p| root_named(p, 0x0c, &[b'a'; 10_000])),
    ("broken root beside the right one", |p| {
        let mut odd = Authority::root("odd");
        odd.fields.subject = name_of(&[("2.5.4.3", 0x0c, &[0xff])]);
        let mut material = p.material();
        material.bundle.push(odd.signed());
        material
    }),
];

fn root_named(p: &mut Pki, tag: u8, value: &[u8]) -> Material {
    p.root.fields.subject = name_of(&[("2.5.4.3", tag, value)]);
    p.root.fields.issuer.clone_from(&p.root.fields.subject);
    p.mid.fields.issuer.clone_from(&p.root.fields.subject);
    p.material()
}

fn issued_by(p: &mut Pki, issuer: &[u8]) -> Material {
    p.leaf.issuer = issuer.to_vec();
    p.material()
}

fn version(content: &[u8]) -> Vec<u8> {
    tlv(0xa0, &integer(content))
}

const VERSIONS: &[(&str, Make)] = &[
    ("root of version 1", |p| {
        bare(&mut p.root.fields, Vec::new());
        p.material()
    }),
    ("root of version 1 in full", |p| {
        bare(&mut p.root.fields, version(&[0]));
        p.material()
    }),
    ("root of version 1 with extensions", |p| {
        p.root.fields.version = Vec::new();
        p.material()
    }),
    ("root of version 2", |p| {
        bare(&mut p.root.fields, version(&[1]));
        p.material()
    }),
    ("root of version 2 with extensions", |p| {
        p.root.fields.version = version(&[1]);
        p.material()
    }),
    ("root of version 4", |p| {
        p.root.fields.version = version(&[3]);
        p.material()
    }),
    ("root of a negative version", |p| {
        p.root.fields.version = version(&[0xff]);
        p.material()
    }),
    ("root of a padded version", |p| {
        p.root.fields.version = version(&[0, 2]);
        p.material()
    }),
    ("intermediate of version 1", |p| {
        bare(&mut p.mid.fields, Vec::new());
        p.material()
    }),
    ("root of version 1 in the chain", |p| {
        bare(&mut p.root.fields, Vec::new());
        let mut material = p.material();
        material.chain.push(p.root.signed());
        material
    }),
    ("root with unique identifiers", |p| {
        p.root.fields.unique_ids = [tlv(0x81, &[0, 1]), tlv(0x82, &[0, 1])].concat();
        p.material()
    }),
    ("root of version 1 with unique identifiers", |p| {
        bare(&mut p.root.fields, Vec::new());
        p.root.fields.unique_ids = tlv(0x81, &[0, 1]);
        p.material()
    }),
];

/// Without extensions, with this version.
fn bare(fields: &mut Fields, version: Vec<u8>) {
    fields.version = version;
    fields.extensions.clear();
}

/// The same element with a length that is longer than necessary. Panics if the element is longer than 127 bytes.
fn padded(element: &[u8]) -> Vec<u8> {
    [&[element[0], 0x81, element[1]], &element[2..]].concat()
}

const ENCODING: &[(&str, Make)] = &[
    ("root with bytes after it", |p| {
        let mut material = p.material();
        material.bundle[0].push(0);
        material
    }),
    ("leaf with bytes after it", |p| {
        let mut material = p.material();
        material.chain[0].push(0);
        material
    }),
    ("root with an element after its signature", |p| {
        p.root.fields.tail = integer(&[1]);
        p.material()
    }),
    ("root with a length that is too long, in its serial number", |p| {
        p.root.fields.serial = padded(&p.root.fields.serial);
        p.material()
    }),
    ("root with a length that is too long, in its signature", |p| {
        let signature = p.root.key.sign(b"the signature of a root is not verified");
        p.root.fields.signature = Some(padded(&bits(&signature)));
        p.material()
    }),
    ("root with an indefinite length", |p| {
        p.root.fields.serial = [&[0x22, 0x80][..], &integer(&[1]), &[0, 0]].concat();
        p.material()
    }),
    ("root with an empty list of extensions", |p| {
        p.root.fields.raw_extensions = Some(tlv(0xa3, &seq(&[])));
        p.material()
    }),
    ("root with an extension that has a further field", |p| {
        p.root.fields.add(UNKNOWN, seq(&[&oid(UNKNOWN), &octets(b"x"), &integer(&[1])]));
        p.material()
    }),
    ("root with an extension whose value is a constructed string", |p| {
        p.root.fields.add(UNKNOWN, seq(&[&oid(UNKNOWN), &tlv(0x24, &octets(b"x"))]));
        p.material()
    }),
    ("root with an extension with a broken identifier", |p| {
        p.root.fields.add(UNKNOWN, seq(&[&tlv(6, &[0x2a, 0x80, 1]), &octets(b"x")]));
        p.material()
    }),
    ("root with an unknown context field", |p| {
        p.root.fields.unique_ids = tlv(0xa5, &integer(&[1]));
        p.material()
    }),
    ("root with a key usage with bytes after it", |p| {
        p.root.fields.set(KEY_USAGE, true, &[&tlv(3, CA_SIGN)[..], &[0]].concat());
        p.material()
    }),
    ("intermediate with basic constraints with bytes after them", |p| {
        p.mid.fields.set(BASIC_CONSTRAINTS, true, &[&seq(&[&[1, 1, 0xff]])[..], &[0]].concat());
        p.material()
    }),
];

const ORDERS: &[(&str, Make)] = &[
    ("two intermediates in the wrong order", |p| {
        let second = Authority::below("the second intermediate", &p.mid);
        Material { chain: vec![p.leaf_of(&second), p.signed_mid(), second.fields.signed_by(&p.mid.key)], ..p.material() }
    }),
    ("the intermediate twice", |p| {
        let mut material = p.material();
        material.chain.push(material.chain[1].clone());
        material
    }),
    ("the leaf twice", |p| {
        let mut material = p.material();
        material.chain.insert(1, material.chain[0].clone());
        material
    }),
    ("the root twice in the bundle", |p| {
        let mut material = p.material();
        material.bundle.push(material.bundle[0].clone());
        material
    }),
    ("an unrelated certificate in the chain", |p| {
        let mut material = p.material();
        material.chain.push(Authority::root("unrelated").signed());
        material
    }),
    ("a broken unrelated certificate in the chain", |p| {
        let mut odd = Authority::root("odd");
        odd.fields.serial = integer(&[0, 1]);
        let mut material = p.material();
        material.chain.push(odd.signed());
        material
    }),
    ("the intermediate first", |p| {
        let mut material = p.material();
        material.chain.swap(0, 1);
        material
    }),
    ("the intermediate is missing", |p| {
        let mut material = p.material();
        material.chain.pop();
        material
    }),
    ("a chain of 60 KB", |p| {
        let mut material = p.material();
        let mut large = Authority::root("large");
        large.fields.set(UNKNOWN, false, &[0; 58_000]);
        material.chain.push(large.signed());
        material
    }),
    ("a chain of 110 KB", |p| paths::large_chain(p, 110_000)),
    ("eight intermediates", |p| {
        let mut chain = vec![p.signed_mid()];
        let mut last = p.mid.clone();
        for number in 0..7 {
            let next = Authority::below(&format!("intermediate {number}"), &last);
            chain.insert(0, next.fields.signed_by(&last.key));
            last = next;
        }
        chain.insert(0, p.leaf_of(&last));
        Material { chain, ..p.material() }
    }),
    ("a bundle of 400 roots", |p| with_roots(p, 400, 20)),
    ("a bundle whose names have 60 KB", |p| with_roots(p, 300, 180)),
    ("a bundle whose names have 70 KB", |p| with_roots(p, 350, 180)),
];

/// Adds `count` roots with names of `len` characters.
fn with_roots(p: &mut Pki, count: usize, len: usize) -> Material {
    let mut material = p.material();
    let key = Key::new();
    for number in 0..count {
        let subject = name(&format!("{number:0len$}"));
        material.bundle.push(Fields::new(&subject, &subject, &key.spki(), 1).signed_by(&key));
    }
    material
}

fn other_root(p: &Pki) -> Authority {
    let _ = p;
    Authority::root("the other root")
}

const CROSS: &[(&str, Make)] = &[
    ("intermediate of two roots, both known", |p| {
        let other = other_root(p);
        let chain = vec![p.signed_leaf(), p.signed_mid(), p.mid.also_below(&other)];
        Material { chain, bundle: vec![p.root.signed(), other.signed()], ..Material::default() }
    }),
    ("intermediate of two roots, the first known", |p| {
        let chain = vec![p.signed_leaf(), p.signed_mid(), p.mid.also_below(&other_root(p))];
        Material { chain, ..p.material() }
    }),
    ("intermediate of two roots, the second known", |p| {
        let chain = vec![p.signed_leaf(), p.mid.also_below(&other_root(p)), p.signed_mid()];
        Material { chain, ..p.material() }
    }),
    ("root that another root signed, both known", |p| {
        let other = other_root(p);
        let chain = vec![p.signed_leaf(), p.signed_mid(), p.root.also_below(&other)];
        Material { chain, bundle: vec![p.root.signed(), other.signed()], ..Material::default() }
    }),
    ("root that another root signed, the other known", |p| {
        let other = other_root(p);
        let chain = vec![p.signed_leaf(), p.signed_mid(), p.root.also_below(&other)];
        Material { chain, bundle: vec![other.signed()], ..Material::default() }
    }),
    ("root that an ended root signed, the right one known", |p| {
        let mut other = other_root(p);
        other.fields.not_after = at(-60);
        let chain = vec![p.signed_leaf(), p.signed_mid(), p.root.also_below(&other)];
        Material { chain, bundle: vec![other.signed(), p.root.signed()], ..Material::default() }
    }),
    ("ended root before its renewal", |p| {
        let renewed = p.root.renewed();
        p.root.fields.not_after = at(-60);
        Material { bundle: vec![p.root.signed(), renewed.signed()], ..p.material() }
    }),
    ("ended root after its renewal", |p| {
        let renewed = p.root.renewed();
        p.root.fields.not_after = at(-60);
        Material { bundle: vec![renewed.signed(), p.root.signed()], ..p.material() }
    }),
    ("root before its renewal of tomorrow", |p| {
        let mut renewed = p.root.renewed();
        renewed.fields.not_before = at(80_000);
        Material { bundle: vec![p.root.signed(), renewed.signed()], ..p.material() }
    }),
    ("root after its renewal of tomorrow", |p| {
        let mut renewed = p.root.renewed();
        renewed.fields.not_before = at(80_000);
        Material { bundle: vec![renewed.signed(), p.root.signed()], ..p.material() }
    }),
    ("root beside its renewal", |p| Material { bundle: vec![p.root.signed(), p.root.renewed().signed()], ..p.material() }),
    ("ended intermediate before its renewal", |p| {
        let renewed = p.signed_mid();
        p.mid.fields.not_after = at(-60);
        p.mid.fields.serial = integer(&[0x33]);
        Material { chain: vec![p.signed_leaf(), p.signed_mid(), renewed], ..p.material() }
    }),
    ("ended intermediate after its renewal", |p| {
        let renewed = p.signed_mid();
        p.mid.fields.not_after = at(-60);
        p.mid.fields.serial = integer(&[0x33]);
        Material { chain: vec![p.signed_leaf(), renewed, p.signed_mid()], ..p.material() }
    }),
    ("intermediate of tomorrow before the present one", |p| {
        let present = p.signed_mid();
        p.mid.fields.not_before = at(80_000);
        p.mid.fields.serial = integer(&[0x33]);
        Material { chain: vec![p.signed_leaf(), p.signed_mid(), present], ..p.material() }
    }),
    ("root with a new key under the old name, in the chain", |p| {
        let mut new = Authority::root("the root");
        new.fields.serial = integer(&[0x44]);
        let chain = vec![p.signed_leaf(), p.signed_mid(), new.also_below(&p.root)];
        Material { chain, ..p.material() }
    }),
];

/// Two roots of one name with different keys, with or without key identifiers.
fn namesakes(p: &mut Pki, with_ids: bool, right_first: bool) -> Material {
    let mut other = Authority::root("the root");
    other.fields.serial = integer(&[0x66]);
    if !with_ids {
        for fields in [&mut p.root.fields, &mut other.fields, &mut p.mid.fields] {
            fields.drop(SUBJECT_KEY).drop(AUTHORITY_KEY);
        }
        p.leaf.drop(AUTHORITY_KEY);
    }
    let mut bundle = vec![p.root.signed(), other.signed()];
    if !right_first {
        bundle.reverse();
    }
    Material { bundle, ..p.material() }
}

/// `count` roots of one name, the right one at this place.
fn many(p: &mut Pki, count: usize, place: usize, with_ids: bool) -> Material {
    let others: Vec<Key> = (0..4).map(|_| Key::new()).collect();
    let mut bundle = Vec::new();
    for number in 0..count {
        let key = &others[number % others.len()];
        let mut fields = p.root.fields.clone();
        fields.serial = integer(&[&[1][..], &number.to_be_bytes()[6..]].concat());
        fields.spki = key.spki();
        // Another identifier for each, as if it were the key's.
        fields.set(SUBJECT_KEY, false, &octets(format!("{number:020}").as_bytes()));
        if !with_ids {
            fields.drop(SUBJECT_KEY);
        }
        bundle.push(fields.signed_by(key));
    }
    if !with_ids {
        p.root.fields.drop(SUBJECT_KEY);
        p.mid.fields.drop(AUTHORITY_KEY);
    }
    bundle.insert(place, p.root.signed());
    Material { bundle, ..p.material() }
}

const NAMESAKES: &[(&str, Make)] = &[
    ("with key identifiers, the right one first", |p| namesakes(p, true, true)),
    ("with key identifiers, the right one last", |p| namesakes(p, true, false)),
    ("without key identifiers, the right one first", |p| namesakes(p, false, true)),
    ("without key identifiers, the right one last", |p| namesakes(p, false, false)),
    ("150 with key identifiers, the right one last", |p| many(p, 150, 150, true)),
    ("150 without key identifiers, the right one last", |p| many(p, 150, 150, false)),
    ("intermediates without key identifiers, the right one last", |p| {
        let mut other = Authority::below("the intermediate", &p.root);
        other.fields.serial = integer(&[0x66]);
        other.fields.drop(SUBJECT_KEY);
        p.mid.fields.drop(SUBJECT_KEY);
        p.leaf.drop(AUTHORITY_KEY);
        Material { chain: vec![p.signed_leaf(), other.fields.signed_by(&p.root.key), p.signed_mid()], ..p.material() }
    }),
    ("intermediates without key identifiers, the right one first", |p| {
        let mut other = Authority::below("the intermediate", &p.root);
        other.fields.serial = integer(&[0x66]);
        other.fields.drop(SUBJECT_KEY);
        p.mid.fields.drop(SUBJECT_KEY);
        p.leaf.drop(AUTHORITY_KEY);
        Material { chain: vec![p.signed_leaf(), p.signed_mid(), other.fields.signed_by(&p.root.key)], ..p.material() }
    }),
    ("a key identifier that names another key", |p| {
        p.leaf.set(AUTHORITY_KEY, false, &seq(&[&tlv(0x80, &[7; 20])]));
        p.material()
    }),
    ("an authority without a key identifier, which the leaf names", |p| {
        p.mid.fields.drop(SUBJECT_KEY);
        p.material()
    }),
    ("key identifier by issuer and serial number", |p| {
        let (issuer, serial) = (tlv(0xa4, &p.root.fields.subject), p.mid.fields.serial[2..].to_vec());
        p.leaf.set(AUTHORITY_KEY, false, &seq(&[&tlv(0xa1, &issuer), &tlv(0x82, &serial)]));
        p.material()
    }),
    ("key identifier by another serial number", |p| {
        let issuer = tlv(0xa4, &p.root.fields.subject);
        p.leaf.set(AUTHORITY_KEY, false, &seq(&[&tlv(0xa1, &issuer), &tlv(0x82, &[0x70])]));
        p.material()
    }),
    ("key identifier by another issuer", |p| {
        let (issuer, serial) = (tlv(0xa4, &name("other")), p.mid.fields.serial[2..].to_vec());
        p.leaf.set(AUTHORITY_KEY, false, &seq(&[&tlv(0xa1, &issuer), &tlv(0x82, &serial)]));
        p.material()
    }),
    ("broken authority key identifier of the leaf", |p| {
        p.leaf.set(AUTHORITY_KEY, false, b"x");
        p.material()
    }),
];

const ANCHORS: &[(&str, Make)] = &[
    ("the intermediate alone in the bundle", |p| {
        let mut material = p.material();
        material.bundle = vec![p.signed_mid()];
        material
    }),
    ("the intermediate and its root in the bundle", |p| {
        let mut material = p.material();
        material.bundle.insert(0, p.signed_mid());
        material
    }),
    ("the intermediate and its ended root in the bundle", |p| {
        p.root.fields.not_after = at(-60);
        let mut material = p.material();
        material.bundle.insert(0, p.signed_mid());
        material
    }),
    ("the leaf in the bundle", |p| {
        let leaf = p.signed_leaf();
        Material { chain: vec![leaf.clone()], bundle: vec![leaf], ..Material::default() }
    }),
    ("another root", |p| Material { bundle: vec![Authority::root("another").signed()], ..p.material() }),
    ("another root of the same name", |p| Material { bundle: vec![Authority::root("the root").signed()], ..p.material() }),
];

fn scope(parts: &[&[u8]]) -> Vec<u8> {
    extension("2.5.29.28", true, &seq(parts))
}

fn place(text: &str) -> Vec<u8> {
    tlv(0xa0, &tlv(0xa0, &uri(text)))
}

/// Lists of root and intermediate, each changed.
fn lists_with(p: &mut Pki, change: fn(&mut super::der::List)) -> Material {
    let lists = [&p.mid, &p.root].map(|authority| {
        let mut list = authority.list();
        change(&mut list);
        list.signed_by(&authority.key)
    });
    p.with_lists(lists.to_vec())
}

const LISTS: &[(&str, Make)] = &[
    ("lists of both authorities", |p| p.with_lists(p.lists())),
    ("no list of the intermediate", |p| p.with_lists(p.lists()[1..].to_vec())),
    ("no list of the root", |p| p.with_lists(p.lists()[..1].to_vec())),
    ("ended lists", |p| lists_with(p, |list| list.next_update = at(-60))),
    ("ended lists beside older good ones", |p| {
        let mut lists = lists_with(p, |list| list.next_update = at(-60)).lists;
        lists.extend(lists_with(p, |list| list.this_update = at(-1200)).lists);
        p.with_lists(lists)
    }),
    ("lists of tomorrow", |p| lists_with(p, |list| list.this_update = at(80_000))),
    ("lists of tomorrow beside good older ones", |p| {
        let mut lists = lists_with(p, |list| list.this_update = at(80_000)).lists;
        lists.extend(p.lists());
        p.with_lists(lists)
    }),
    ("lists with a wrong signature beside good older ones", |p| {
        let key = Key::new();
        let mut lists: Vec<_> = [&p.mid, &p.root]
            .map(|authority| {
                let mut list = authority.list();
                list.this_update = at(-60);
                list.signed_by(&key)
            })
            .to_vec();
        lists.extend(p.lists());
        p.with_lists(lists)
    }),
    ("lists without nextUpdate", |p| lists_with(p, |list| list.next_update = Vec::new())),
    ("lists without a key identifier", |p| {
        lists_with(p, |list| {
            list.extensions.pop();
        })
    }),
    ("lists of version 1", |p| {
        lists_with(p, |list| {
            list.version = Vec::new();
            list.extensions.clear();
        })
    }),
    ("lists with entries", |p| {
        lists_with(p, |list| {
            list.revoked = seq(&[&entry(&[9], &[]), &entry(&[0, 0x99], &seq(&[&extension("2.5.29.21", false, &tlv(10, &[1]))]))]);
        })
    }),
    ("lists with an empty list of entries", |p| lists_with(p, |list| list.revoked = seq(&[]))),
    ("lists with a critical extension of an entry", |p| {
        lists_with(p, |list| list.revoked = seq(&[&entry(&[9], &seq(&[&extension(UNKNOWN, true, b"x")]))]))
    }),
    ("lists with an unknown extension", |p| lists_with(p, |list| list.extensions.push(extension(UNKNOWN, false, b"x")))),
    ("lists with an unknown critical extension", |p| lists_with(p, |list| list.extensions.push(extension(UNKNOWN, true, b"x")))),
    ("delta lists", |p| lists_with(p, |list| list.extensions.push(extension("2.5.29.27", true, &integer(&[1]))))),
    ("delta lists, not critical", |p| lists_with(p, |list| list.extensions.push(extension("2.5.29.27", false, &integer(&[1]))))),
    ("scope: a place", |p| lists_with(p, |list| list.extensions.push(scope(&[&place("http://a/x.crl")])))),
    ("scope: a place, not critical", |p| {
        lists_with(p, |list| list.extensions.push(extension("2.5.29.28", false, &seq(&[&place("http://a/x.crl")]))))
    }),
    ("scope: a place, which all certificates name", |p| {
        for fields in [&mut p.root.fields, &mut p.mid.fields, &mut p.leaf] {
            fields.set(DISTRIBUTION_POINTS, false, &points("http://a/x.crl"));
        }
        lists_with(p, |list| list.extensions.push(scope(&[&place("http://a/x.crl")])))
    }),
    ("scope: a place, which leaf and intermediate name", |p| {
        for fields in [&mut p.mid.fields, &mut p.leaf] {
            fields.set(DISTRIBUTION_POINTS, false, &points("http://a/x.crl"));
        }
        lists_with(p, |list| list.extensions.push(scope(&[&place("http://a/x.crl")])))
    }),
    ("scope of the intermediate's list: a place, which the leaf names", |p| {
        p.leaf.set(DISTRIBUTION_POINTS, false, &points("http://a/x.crl"));
        let mut list = p.mid.list();
        list.extensions.push(scope(&[&place("http://a/x.crl")]));
        p.with_lists(vec![list.signed_by(&p.mid.key), p.lists()[1].clone()])
    }),
    ("scope of the intermediate's list: certificates of users", |p| {
        let mut list = p.mid.list();
        list.extensions.push(scope(&[&tlv(0x81, &[0xff])]));
        p.with_lists(vec![list.signed_by(&p.mid.key), p.lists()[1].clone()])
    }),
    ("scope: certificates of authorities", |p| lists_with(p, |list| list.extensions.push(scope(&[&tlv(0x82, &[0xff])])))),
    ("scope: empty", |p| lists_with(p, |list| list.extensions.push(scope(&[])))),
    ("scope: some reasons", |p| lists_with(p, |list| list.extensions.push(scope(&[&tlv(0x83, &[1, 0x06])])))),
    ("scope: of other issuers", |p| lists_with(p, |list| list.extensions.push(scope(&[&tlv(0x84, &[0xff])])))),
    ("scope: broken", |p| lists_with(p, |list| list.extensions.push(extension("2.5.29.28", true, b"x")))),
    ("authorities without cRLSign", |p| {
        p.root.fields.usage(&[2, 0x04]);
        p.mid.fields.usage(&[2, 0x04]);
        p.with_lists(p.lists())
    }),
    ("the intermediate as the trust anchor", |p| Material { bundle: vec![p.signed_mid()], ..p.with_lists(p.lists()[..1].to_vec()) }),
    ("ended root without a list, beside the right one", |p| {
        let mut ended = Authority::root("ended");
        ended.fields.not_after = at(-60);
        let mut material = p.with_lists(p.lists());
        material.bundle.insert(0, ended.signed());
        material
    }),
    ("a second root without a list", |p| {
        let mut material = p.with_lists(p.lists());
        material.bundle.push(Authority::root("second").signed());
        material
    }),
    ("an unrelated list", |p| {
        let other = Authority::root("other");
        let mut lists = p.lists();
        lists.push(other.list().signed_by(&other.key));
        p.with_lists(lists)
    }),
    ("an unreadable list beside good ones", |p| {
        let other = Authority::root("other");
        let mut list = other.list();
        list.version = integer(&[2]);
        let mut lists = p.lists();
        lists.push(list.signed_by(&other.key));
        p.with_lists(lists)
    }),
    ("lists that revoke another certificate of the intermediate", |p| {
        let mut list = p.mid.list();
        list.revoked = seq(&[&entry(&[0x10, 0x03], &[])]);
        p.with_lists(vec![list.signed_by(&p.mid.key), p.lists()[1].clone()])
    }),
    ("lists of another key under the same name", |p| {
        let other = Authority::root("the root");
        p.with_lists(vec![p.lists()[0].clone(), other.list().signed_by(&other.key)])
    }),
    ("each list twice", |p| p.with_lists([p.lists(), p.lists()].concat())),
];
