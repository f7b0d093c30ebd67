//! The ordinary certificates that each shape changes: a root, an intermediate, a leaf.

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};

use super::der::{
    AUTHORITY_KEY, BASIC_CONSTRAINTS, EXTENDED_KEY_USAGE, Fields, KEY_USAGE, Key, List, NAMES, SUBJECT_KEY, integer, name, octets, oid,
    seq, tlv,
};

/// The SPIFFE ID of each leaf.
pub const ID: &str = "spiffe://example.org/uid/0";

/// The certificates that one side of a connection gets.
#[derive(Clone, Default)]
pub struct Material {
    /// The leaf first.
    pub chain: Vec<Vec<u8>>,
    pub bundle: Vec<Vec<u8>>,
    pub lists: Vec<Vec<u8>>,
}

/// An authority: its key, and the fields of its certificate.
#[derive(Clone)]
pub struct Authority {
    pub key: std::sync::Arc<Key>,
    pub fields: Fields,
}

impl Authority {
    /// Signed by itself.
    pub fn root(common: &str) -> Self {
        Self::root_with(common, Key::new())
    }

    pub fn root_with(common: &str, key: Key) -> Self {
        let subject = name(common);
        let fields = authority(&subject, &subject, &key);
        Self { key: key.into(), fields }
    }

    /// Signed by `signer`.
    pub fn below(common: &str, signer: &Self) -> Self {
        Self::below_with(common, signer, Key::new())
    }

    pub fn below_with(common: &str, signer: &Self, key: Key) -> Self {
        let mut fields = authority(&name(common), &signer.fields.subject, &key);
        signer.named_by(&mut fields);
        Self { key: key.into(), fields }
    }

    /// Another certificate of this authority, signed by `signer`: a cross-signed one.
    pub fn also_below(&self, signer: &Self) -> Vec<u8> {
        let mut fields = self.fields.clone();
        fields.issuer.clone_from(&signer.fields.subject);
        fields.serial = integer(&[0x77]);
        signer.named_by(&mut fields);
        fields.signed_by(&signer.key)
    }

    /// Sets the authority key identifier that names this authority.
    pub fn named_by(&self, fields: &mut Fields) {
        fields.set(AUTHORITY_KEY, false, &seq(&[&tlv(0x80, &key_id(&self.key.spki()))]));
    }

    pub fn signed(&self) -> Vec<u8> {
        self.fields.signed_by(&self.key)
    }

    pub fn list(&self) -> List {
        let mut list = List::of(&self.fields.subject);
        list.extensions.push(super::der::extension(AUTHORITY_KEY, false, &seq(&[&tlv(0x80, &key_id(&self.key.spki()))])));
        list
    }

    /// A second root with the same name and key, as of a renewal.
    pub fn renewed(&self) -> Self {
        let mut again = self.clone();
        again.fields.serial = integer(&[0x55]);
        again
    }
}

fn authority(subject: &[u8], issuer: &[u8], key: &Key) -> Fields {
    let mut fields = Fields::new(subject, issuer, &key.spki(), 1);
    fields.set(BASIC_CONSTRAINTS, true, &seq(&[&[1, 1, 0xff]]));
    fields.set(KEY_USAGE, true, &[3, 2, 1, 0x06]);
    fields.set(SUBJECT_KEY, false, &octets(&key_id(&key.spki())));
    fields
}

pub fn key_id(spki: &[u8]) -> Vec<u8> {
    digest(&SHA1_FOR_LEGACY_USE_ONLY, spki).as_ref().to_vec()
}

/// The ordinary certificates.
pub struct Pki {
    pub root: Authority,
    pub mid: Authority,
    pub leaf: Fields,
}

impl Pki {
    /// For a leaf with this SubjectPublicKeyInfo and these DNS names.
    pub fn new(spki: &[u8], dns: &[&str]) -> Self {
        let root = Authority::root("the root");
        let mid = Authority::below("the intermediate", &root);
        let mut leaf = Fields::new(&seq(&[]), &mid.fields.subject, spki, 2);
        let names: Vec<Vec<u8>> =
            std::iter::once(tlv(0x86, ID.as_bytes())).chain(dns.iter().map(|name| tlv(0x82, name.as_bytes()))).collect();
        leaf.set(NAMES, true, &tlv(0x30, &names.concat()));
        leaf.set(KEY_USAGE, true, &[3, 2, 7, 0x80]);
        leaf.set(EXTENDED_KEY_USAGE, false, &seq(&[&oid("1.3.6.1.5.5.7.3.1"), &oid("1.3.6.1.5.5.7.3.2")]));
        mid.named_by(&mut leaf);
        Self { root, mid, leaf }
    }

    /// Makes `signer` the one that signs the leaf.
    pub fn leaf_of(&self, signer: &Authority) -> Vec<u8> {
        let mut leaf = self.leaf.clone();
        leaf.issuer.clone_from(&signer.fields.subject);
        signer.named_by(&mut leaf);
        leaf.signed_by(&signer.key)
    }

    /// The leaf, signed by the intermediate as it is now.
    pub fn signed_leaf(&self) -> Vec<u8> {
        self.leaf.signed_by(&self.mid.key)
    }

    /// The intermediate, signed by the root.
    pub fn signed_mid(&self) -> Vec<u8> {
        self.mid.fields.signed_by(&self.root.key)
    }

    /// Leaf and intermediate; the root.
    pub fn material(&self) -> Material {
        Material { chain: vec![self.signed_leaf(), self.signed_mid()], bundle: vec![self.root.signed()], lists: Vec::new() }
    }

    /// The lists of intermediate and root.
    pub fn lists(&self) -> Vec<Vec<u8>> {
        vec![self.mid.list().signed_by(&self.mid.key), self.root.list().signed_by(&self.root.key)]
    }

    /// The ordinary certificates, with these lists.
    pub fn with_lists(&self, lists: Vec<Vec<u8>>) -> Material {
        Material { lists, ..self.material() }
    }
}
