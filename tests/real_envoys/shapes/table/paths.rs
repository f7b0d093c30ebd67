//! Paths with several authorities, limits, and revocation lists.

use super::{
    super::{
        der::{
            AUTHORITY_KEY, DISTRIBUTION_POINTS, Fields, KEY_USAGE, Key, List, UNKNOWN, at, entry, extension, integer, name, oid, seq, tlv,
        },
        pki::{Authority, Material, Pki, key_id},
    },
    Make, directory, lists_with, other_root, place, scope, uri, with_roots,
};

/// A chain with this many intermediates.
fn long_chain(p: &mut Pki, count: usize) -> Material {
    let mut chain = vec![p.signed_mid()];
    let mut last = p.mid.clone();
    for number in 1..count {
        let next = Authority::below(&format!("intermediate {number}"), &last);
        chain.push(next.fields.signed_by(&last.key));
        last = next;
    }
    chain.push(p.leaf_of(&last));
    chain.reverse();
    Material { chain, ..p.material() }
}

/// A chain of this many bytes, with five more for each certificate.
pub fn large_chain(p: &mut Pki, bytes: usize) -> Material {
    let len = |chain: &[Vec<u8>]| chain.iter().map(|certificate| certificate.len() + 5).sum::<usize>();
    let mut material = p.material();
    let mut large = Authority::root("large");
    large.fields.set(UNKNOWN, false, &[0; 50_000]);
    material.chain.push(large.signed());
    let mut filler = 51_000;
    loop {
        // A signature has one of several lengths.
        large.fields.set(UNKNOWN, false, &vec![0; filler]);
        material.chain.push(large.signed());
        match len(&material.chain) {
            now if now == bytes => return material,
            now => filler = filler + bytes - now,
        }
        material.chain.pop();
    }
}

/// A bundle whose names have this many bytes, each with two more.
fn large_names(p: &mut Pki, bytes: usize) -> Material {
    const LEN: usize = 202;
    let mut material = p.material();
    let key = Key::new();
    let mut add = |len: usize, number: usize| {
        let overhead = name(&"n".repeat(len - 40)).len() + 2 - (len - 40);
        let subject = name(&format!("{number:0width$}", width = len - overhead));
        material.bundle.push(Fields::new(&subject, &subject, &key.spki(), 1).signed_by(&key));
    };
    let missing = bytes - p.root.fields.subject.len() - 2;
    let count = missing / LEN - 1;
    (0..count).for_each(|number| add(LEN, number));
    let rest = missing - count * LEN;
    add(rest / 2, count);
    add(rest - rest / 2, count + 1);
    material
}

pub const ORDERS: &[(&str, Make)] = &[
    ("50 intermediates", |p| long_chain(p, 50)),
    ("100 intermediates", |p| long_chain(p, 100)),
    ("101 intermediates", |p| long_chain(p, 101)),
    ("103 intermediates", |p| long_chain(p, 103)),
    ("a chain of 100 KiB, the overhead of TLS 1.3 included", |p| large_chain(p, 102_396)),
    ("a chain of more than 100 KiB with the overhead of TLS 1.2", |p| large_chain(p, 102_410)),
    ("a bundle of 500 roots", |p| with_roots(p, 499, 20)),
    ("a bundle whose names have 65,505 bytes", |p| large_names(p, 65_505)),
    ("a bundle whose names have 65,536 bytes", |p| large_names(p, 65_536)),
    ("a bundle of 400 roots of one long name", |p| {
        let mut material = p.material();
        let key = Key::new();
        let subject = name(&"n".repeat(200));
        for number in 0..400_usize {
            let mut fields = Fields::new(&subject, &subject, &key.spki(), 1);
            fields.serial = integer(&[&[1], &number.to_be_bytes()[6..]].concat());
            material.bundle.push(fields.signed_by(&key));
        }
        material
    }),
    ("leaf with the name of its root, which another root signed", |p| {
        p.leaf.subject.clone_from(&p.root.fields.subject);
        let other = other_root(p);
        let chain = vec![p.signed_leaf(), p.signed_mid(), p.root.also_below(&other)];
        Material { chain, bundle: vec![other.signed()], ..Material::default() }
    }),
    ("leaf without key usage with the name of its root, which another root signed", |p| {
        p.leaf.subject.clone_from(&p.root.fields.subject);
        p.leaf.drop(KEY_USAGE);
        let other = other_root(p);
        let chain = vec![p.signed_leaf(), p.signed_mid(), p.root.also_below(&other)];
        Material { chain, bundle: vec![other.signed()], ..Material::default() }
    }),
    ("leaf with the name of its issuer", |p| {
        p.leaf.subject.clone_from(&p.leaf.issuer);
        p.material()
    }),
];

pub const CROSS: &[(&str, Make)] = &[
    ("two roots that signed each other, in the bundle", |p| {
        let other = other_root(p);
        let bundle = vec![p.root.signed(), other.signed(), p.root.also_below(&other), other.also_below(&p.root)];
        Material { bundle, ..p.material() }
    }),
    ("two roots that signed each other, without their own certificates", |p| {
        let other = other_root(p);
        Material { bundle: vec![p.root.also_below(&other), other.also_below(&p.root)], ..p.material() }
    }),
    ("two roots that signed each other, in the chain", |p| {
        let other = other_root(p);
        let chain = vec![p.signed_leaf(), p.signed_mid(), p.root.also_below(&other), other.also_below(&p.root)];
        Material { chain, ..p.material() }
    }),
    ("four roots that signed each other", |p| {
        let roots = [p.root.clone(), other_root(p), Authority::root("third"), Authority::root("fourth")];
        let mut bundle: Vec<Vec<u8>> = roots.iter().map(Authority::signed).collect();
        for (one, root) in roots.iter().enumerate() {
            let others = roots.iter().enumerate().filter(|(other, _)| *other != one);
            bundle.extend(others.map(|(_, other)| root.also_below(other)));
        }
        Material { bundle, ..p.material() }
    }),
    ("root that another one signed, which a third one signed", |p| {
        let (other, third) = (other_root(p), Authority::root("third"));
        let chain = vec![p.signed_leaf(), p.signed_mid(), p.root.also_below(&other), other.also_below(&third)];
        Material { chain, bundle: vec![third.signed()], ..Material::default() }
    }),
    ("root beside its certificate by a root of tomorrow", |p| {
        let mut other = other_root(p);
        other.fields.not_before = at(80_000);
        Material { bundle: vec![p.root.signed(), p.root.also_below(&other), other.signed()], ..p.material() }
    }),
    ("root beside its certificate by an ended root", |p| {
        let mut other = other_root(p);
        other.fields.not_after = at(-60);
        Material { bundle: vec![p.root.signed(), p.root.also_below(&other), other.signed()], ..p.material() }
    }),
];

pub const ANCHORS: &[(&str, Make)] = &[
    ("the leaf in the bundle, with another signature", |p| Material {
        chain: vec![p.signed_leaf()],
        bundle: vec![p.signed_leaf()],
        ..Material::default()
    }),
    ("the leaf in the bundle, and its intermediate in the chain", |p| {
        let leaf = p.signed_leaf();
        Material { chain: vec![leaf.clone(), p.signed_mid()], bundle: vec![leaf], ..Material::default() }
    }),
    ("the leaf in the bundle, and its ended intermediate in the chain", |p| {
        p.mid.fields.not_after = at(-60);
        let leaf = p.signed_leaf();
        Material { chain: vec![leaf.clone(), p.signed_mid()], bundle: vec![leaf], ..Material::default() }
    }),
    ("the leaf and the root in the bundle", |p| {
        let mut material = p.material();
        material.bundle.push(material.chain[0].clone());
        material
    }),
    ("the intermediate and its root of tomorrow in the bundle", |p| {
        p.root.fields.not_before = at(80_000);
        let mut material = p.material();
        material.bundle.insert(0, p.signed_mid());
        material
    }),
    ("the intermediate with an unknown critical extension, in the bundle", |p| {
        p.mid.fields.set(UNKNOWN, true, b"x");
        Material { bundle: vec![p.signed_mid()], ..p.material() }
    }),
    ("an ended certificate of the intermediate in the bundle", |p| {
        let material = p.material();
        p.mid.fields.not_after = at(-60);
        p.mid.fields.serial = integer(&[0x33]);
        let mut bundle = material.bundle.clone();
        bundle.push(p.signed_mid());
        Material { bundle, ..material }
    }),
];

/// All certificates with this value of the CRL distribution points, and lists with this scope.
fn scoped(p: &mut Pki, points: &[u8], change: fn(&mut List)) -> Material {
    for fields in [&mut p.root.fields, &mut p.mid.fields, &mut p.leaf] {
        fields.set(DISTRIBUTION_POINTS, false, &seq(&[points]));
    }
    lists_with(p, change)
}

fn point(names: &[&[u8]]) -> Vec<u8> {
    seq(&[&tlv(0xa0, &tlv(0xa0, &names.concat()))])
}

fn relative(common: &str) -> Vec<u8> {
    tlv(0xa0, &tlv(0xa1, &seq(&[&oid("2.5.4.3"), &tlv(0x0c, common.as_bytes())])))
}

/// A list of the intermediate with this content of its entries.
fn entries(p: &mut Pki, content: &[&[u8]]) -> Material {
    let mut list = p.mid.list();
    list.revoked = seq(content);
    let lists = vec![list.signed_by(&p.mid.key), p.lists()[1].clone()];
    p.with_lists(lists)
}

fn reason(value: &[u8]) -> Vec<u8> {
    seq(&[&extension("2.5.29.21", false, value)])
}

pub const LISTS: &[(&str, Make)] = &[
    ("scope: a directory name, which all certificates name in capitals", |p| {
        scoped(p, &point(&[&directory("PLACE")]), |list| list.extensions.push(scope(&[&tlv(0xa0, &tlv(0xa0, &directory("place")))])))
    }),
    ("scope: two places, of which all certificates name the second", |p| {
        let second = point(&[&uri("http://c"), &uri("http://b")]);
        scoped(p, &second, |list| list.extensions.push(scope(&[&tlv(0xa0, &tlv(0xa0, &[uri("http://a"), uri("http://b")].concat()))])))
    }),
    ("scope: a place, which all certificates name for some reasons", |p| {
        let partial = seq(&[&tlv(0xa0, &tlv(0xa0, &uri("http://a/x.crl"))), &tlv(0x81, &[1, 0x06])]);
        scoped(p, &partial, |list| list.extensions.push(scope(&[&place("http://a/x.crl")])))
    }),
    ("scope: a place, and certificates with an empty distribution point", |p| {
        scoped(p, &seq(&[]), |list| list.extensions.push(scope(&[&place("http://a/x.crl")])))
    }),
    ("scope: a relative name, which all certificates name", |p| {
        scoped(p, &seq(&[&relative("x")]), |list| list.extensions.push(scope(&[&relative("x")])))
    }),
    ("scope: a relative name that is broken", |p| lists_with(p, |list| list.extensions.push(scope(&[&tlv(0xa0, &tlv(0xa1, &[5, 0]))])))),
    ("scope: attribute certificates", |p| lists_with(p, |list| list.extensions.push(scope(&[&tlv(0x85, &[0xff])])))),
    ("scope: of other issuers, as false", |p| lists_with(p, |list| list.extensions.push(scope(&[&tlv(0x84, &[0])])))),
    ("scope: twice", |p| lists_with(p, |list| list.extensions.extend([scope(&[]), scope(&[])]))),
    ("lists for users, and for authorities", |p| {
        let mut lists = Vec::new();
        for authority in [&p.mid, &p.root] {
            for tag in [0x81, 0x82] {
                let mut list = authority.list();
                list.extensions.push(scope(&[&tlv(tag, &[0xff])]));
                lists.push(list.signed_by(&authority.key));
            }
        }
        p.with_lists(lists)
    }),
    ("newer delta lists beside full ones", |p| {
        let mut lists = p.lists();
        let mut delta = lists_with(p, |list| {
            list.this_update = at(-10);
            list.extensions.push(extension("2.5.29.27", true, &integer(&[1])));
        });
        lists.append(&mut delta.lists);
        p.with_lists(lists)
    }),
    ("lists with a key identifier by issuer and serial number", |p| {
        let lists = [&p.mid, &p.root].map(|authority| {
            let mut list = authority.list();
            list.extensions.pop();
            let (issuer, serial) = (tlv(0xa4, &authority.fields.issuer), tlv(0x82, &authority.fields.serial[2..]));
            list.extensions.push(extension(AUTHORITY_KEY, false, &seq(&[&tlv(0xa1, &issuer), &serial])));
            list.signed_by(&authority.key)
        });
        p.with_lists(lists.to_vec())
    }),
    ("lists with a key identifier by another serial number", |p| {
        lists_with(p, |list| {
            list.extensions.pop();
            list.extensions.push(extension(AUTHORITY_KEY, false, &seq(&[&tlv(0x82, &[0x70])])));
        })
    }),
    ("lists with their issuer in other letters", |p| {
        lists_with(p, |list| list.issuer = if list.issuer == name("the root") { name("THE ROOT") } else { name("The  Intermediate") })
    }),
    ("lists with a broken number", |p| lists_with(p, |list| list.extensions[0] = extension("2.5.29.20", false, b"x"))),
    ("lists with a critical number", |p| lists_with(p, |list| list.extensions[0] = extension("2.5.29.20", true, &integer(&[1])))),
    ("lists of version 1 in full", |p| {
        lists_with(p, |list| {
            list.version = integer(&[0]);
            list.extensions.clear();
        })
    }),
    ("lists with a time with an offset", |p| lists_with(p, |list| list.next_update = tlv(0x17, b"490101000000+0100"))),
    ("lists until 2060", |p| lists_with(p, |list| list.next_update = tlv(0x18, b"20600101000000Z"))),
    ("entry with a broken reason", |p| entries(p, &[&entry(&[9], &reason(b"x"))])),
    ("entry with a reason as integer", |p| entries(p, &[&entry(&[9], &reason(&integer(&[1])))])),
    ("entry with two reasons", |p| {
        let one = extension("2.5.29.21", false, &tlv(10, &[1]));
        entries(p, &[&entry(&[9], &seq(&[&one, &one]))])
    }),
    ("entry with an unknown reason", |p| entries(p, &[&entry(&[9], &reason(&tlv(10, &[99])))])),
    ("entry with a broken reason before one with a critical extension", |p| {
        entries(p, &[&entry(&[9], &reason(b"x")), &entry(&[10], &seq(&[&extension(UNKNOWN, true, b"x")]))])
    }),
    ("entry with a critical extension before one with a broken reason", |p| {
        entries(p, &[&entry(&[9], &seq(&[&extension(UNKNOWN, true, b"x")])), &entry(&[10], &reason(b"x"))])
    }),
    ("entry with the issuer of its certificate", |p| {
        entries(p, &[&entry(&[9], &seq(&[&extension("2.5.29.29", false, &seq(&[&directory("x")]))]))])
    }),
    ("entry with the time of its invalidity", |p| {
        entries(p, &[&entry(&[9], &seq(&[&extension("2.5.29.24", false, &tlv(0x18, b"20200101000000Z"))]))])
    }),
    ("entry with an empty list of extensions", |p| entries(p, &[&entry(&[9], &seq(&[]))])),
    ("entry with a negative serial number", |p| entries(p, &[&entry(&[0x80], &[])])),
    ("entry with a padded serial number", |p| entries(p, &[&entry(&[0, 1], &[])])),
    ("entry without a date", |p| entries(p, &[&seq(&[&integer(&[9])])])),
    ("a list of 1,500 entries", |p| {
        let all: Vec<Vec<u8>> = (0..1500_u32).map(|number| entry(&[&[1], &number.to_be_bytes()[..]].concat(), &[])).collect();
        entries(p, &all.iter().map(|one| &one[..]).collect::<Vec<_>>())
    }),
    ("negative serial number of the leaf, and an entry of its positive one", |p| {
        p.leaf.serial = integer(&[0xff]);
        entries(p, &[&entry(&[1], &[])])
    }),
    ("list that revokes the leaf", |p| {
        let entry = seq(&[&p.leaf.serial, &at(-700)]);
        entries(p, &[&entry])
    }),
    ("list that revokes the leaf with a negative serial number", |p| {
        p.leaf.serial = integer(&[0xff]);
        entries(p, &[&entry(&[0xff], &[])])
    }),
    ("list that revokes the leaf and removes it from the list again", |p| {
        let entry = seq(&[&p.leaf.serial, &at(-700), &reason(&tlv(10, &[8]))]);
        entries(p, &[&entry])
    }),
    ("list that revokes the intermediate", |p| {
        let mut list = p.root.list();
        list.revoked = seq(&[&seq(&[&p.mid.fields.serial, &at(-700)])]);
        let lists = vec![p.lists()[0].clone(), list.signed_by(&p.root.key)];
        p.with_lists(lists)
    }),
    ("ended list that revokes the leaf", |p| {
        let mut list = p.mid.list();
        list.next_update = at(-60);
        list.revoked = seq(&[&seq(&[&p.leaf.serial, &at(-700)])]);
        let lists = vec![list.signed_by(&p.mid.key), p.lists()[1].clone()];
        p.with_lists(lists)
    }),
    ("root of tomorrow without a list, beside the right one", |p| {
        let mut other = other_root(p);
        other.fields.not_before = at(80_000);
        let mut material = p.with_lists(p.lists());
        material.bundle.push(other.signed());
        material
    }),
    ("the leaf as a trust anchor beside its root", |p| {
        let mut material = p.with_lists(p.lists());
        material.bundle.push(material.chain[0].clone());
        material
    }),
    ("root that another root signed, the other known and with a list", |p| {
        let other = other_root(p);
        let mut material = p.with_lists(p.lists());
        material.chain.push(p.root.also_below(&other));
        material.bundle = vec![other.signed()];
        material.lists.push(other.list().signed_by(&other.key));
        material
    }),
    ("root that another root signed, the other known and without a list", |p| {
        let other = other_root(p);
        let mut material = p.with_lists(p.lists());
        material.chain.push(p.root.also_below(&other));
        material.bundle = vec![other.signed()];
        material
    }),
    ("intermediate with a new key under its old name, with a list of each", |p| {
        let again = Authority::below("the intermediate", &p.mid);
        let mut material = p.with_lists(p.lists());
        material.chain = vec![p.leaf_of(&again), again.fields.signed_by(&p.mid.key), p.signed_mid()];
        material.lists.push(again.list().signed_by(&again.key));
        material
    }),
    ("intermediate with a new key under its old name, without a list of it", |p| {
        let again = Authority::below("the intermediate", &p.mid);
        let mut material = p.with_lists(p.lists());
        material.chain = vec![p.leaf_of(&again), again.fields.signed_by(&p.mid.key), p.signed_mid()];
        material
    }),
    ("a namesake of the root with a list of its own", |p| {
        let mut namesake = Authority::root("the root");
        namesake.fields.serial = integer(&[0x66]);
        let mut material = p.with_lists(p.lists());
        material.bundle.push(namesake.signed());
        material.lists.push(namesake.list().signed_by(&namesake.key));
        material
    }),
    ("list of the intermediate by its root", |p| {
        let mut list = p.mid.list();
        list.extensions.pop();
        list.extensions.push(extension(AUTHORITY_KEY, false, &seq(&[&tlv(0x80, &key_id(&p.root.key.spki()))])));
        let lists = vec![list.signed_by(&p.root.key), p.lists()[1].clone()];
        p.with_lists(lists)
    }),
];
