//! The answers of a well-behaved issuer, with one fault at a time.

use std::{
    sync::{Arc, LazyLock},
    time::UNIX_EPOCH,
};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose as Purpose, IsCa, Issuer, KeyPair, KeyUsagePurpose as Use, SanType, SignatureAlgorithm,
};
use rustls::pki_types::CertificateSigningRequestDer;
use workload_identity::{Profile, SpiffeId, samples::profile};

use super::*;
use crate::issuer::csr::{self, KeyAndCsr};

const ID: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const DNS: &str = "cart.shop.svc";
const HOUR: Duration = Duration::from_secs(3600);

/// 2027-01-15T08:00:00Z
fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

/// A certificate authority: its certificate and its signer.
struct Ca {
    certificate: Certificate,
    signer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![Use::KeyCertSign, Use::CrlSign];
        params.use_authority_key_identifier_extension = true;
        params.not_before = (now() - HOUR).into();
        params.not_after = (now() + 24 * HOUR).into();
        params
    }

    fn root(name: &str) -> Self {
        Self::root_with(Self::params(name), &rcgen::PKCS_ECDSA_P256_SHA256)
    }

    fn root_with(params: CertificateParams, algorithm: &'static SignatureAlgorithm) -> Self {
        let key = KeyPair::generate_for(algorithm).unwrap();
        Self { certificate: params.self_signed(&key).unwrap(), signer: Issuer::new(params, key) }
    }

    fn intermediate(&self, name: &str) -> Self {
        self.intermediate_with(Self::params(name))
    }

    fn intermediate_with(&self, params: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        Self { certificate: params.signed_by(&key, &self.signer).unwrap(), signer: Issuer::new(params, key) }
    }

    fn pem(&self) -> Vec<u8> {
        self.certificate.pem().into_bytes()
    }
}

fn identity(key: KeyType) -> Identity {
    let profile = Profile { key, lifetime: HOUR, ..profile(ID) };
    Identity {
        spiffe_id: SpiffeId::new(ID).unwrap(),
        dns_names: [DNS.to_owned()].into(),
        profile: Arc::new(profile),
        pod_uid: None,
        account: None,
    }
}

/// Signs as a well-behaved issuer does. `change` adds the fault.
fn sign(order: &KeyAndCsr, ca: &Ca, change: impl FnOnce(&mut CertificateParams)) -> Certificate {
    let mut request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(order.csr_der.clone())).unwrap();
    let params = &mut request.params;
    params.not_before = (now() - Duration::from_secs(10)).into();
    params.not_after = (now() + HOUR).into();
    params.key_usages = vec![Use::DigitalSignature, Use::KeyEncipherment];
    params.extended_key_usages = vec![Purpose::ServerAuth, Purpose::ClientAuth];
    change(params);
    request.signed_by(&ca.signer).unwrap()
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn dns(text: &str) -> SanType {
    SanType::DnsName(text.try_into().unwrap())
}

/// One order, its issuer, and the trust bundle.
struct World {
    identity: Identity,
    order: KeyAndCsr,
    root: Ca,
    intermediate: Ca,
    bundle: TrustBundle,
}

impl World {
    fn new(key: KeyType) -> Self {
        let identity = identity(key);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let order = runtime.block_on(csr::generate(&identity)).unwrap();
        let root = Ca::root("root");
        let intermediate = root.intermediate("intermediate");
        let bundle = bundle(&[&root]);
        Self { identity, order, root, intermediate, bundle }
    }

    fn leaf(&self, change: impl FnOnce(&mut CertificateParams)) -> Certificate {
        sign(&self.order, &self.intermediate, change)
    }

    /// The usual answer: leaf and intermediate.
    fn chain(&self, change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        [self.leaf(change).pem().into_bytes(), self.intermediate.pem()].concat()
    }

    fn verify(&self, pem: &[u8], bundle: Option<&TrustBundle>) -> Result<Accepted, Error> {
        let chain = CertificateChain::from_pem(pem)?;
        let Verified { anchor, path } = verify(&self.identity, &self.order.key, &chain, bundle, now())?;
        Ok(Accepted { chain, anchor, path })
    }
}

/// A chain that passed the checks.
#[derive(Debug)]
struct Accepted {
    chain: CertificateChain,
    anchor: Option<CertificateDer<'static>>,
    path: Vec<Digest>,
}

static P256: LazyLock<World> = LazyLock::new(|| World::new(KeyType::EcdsaP256));

fn bundle(roots: &[&Ca]) -> TrustBundle {
    TrustBundle::from_certificates(roots.iter().map(|root| root.certificate.der().clone()).collect()).unwrap()
}

fn encode(der: &[u8]) -> Vec<u8> {
    use base64::{Engine, engine::general_purpose::STANDARD};
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", STANDARD.encode(der)).into_bytes()
}

/// Each row has the fault, the answer, and a part of the expected error.
#[track_caller]
fn assert_refused(table: Vec<(&str, Vec<u8>, &str)>) {
    for (fault, pem, sentence) in table {
        match P256.verify(&pem, Some(&P256.bundle)) {
            Ok(_) => panic!("{fault}: accepted"),
            Err(error) => assert!(error.to_string().contains(sentence), "{fault}: {error}"),
        }
    }
}

#[track_caller]
fn assert_accepted(table: Vec<(&str, Vec<u8>)>) {
    for (what, pem) in table {
        let verified = P256.verify(&pem, Some(&P256.bundle)).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(verified.anchor.as_ref(), Some(P256.root.certificate.der()), "{what}");
        assert_eq!(String::from_utf8(verified.chain.to_pem()).unwrap(), String::from_utf8(pem).unwrap().replace('\r', ""), "{what}");
    }
}

#[test]
fn bytes_that_are_no_chain_are_refused() {
    let der = P256.leaf(|_| ()).der().to_vec();
    let cut = String::from_utf8(P256.chain(|_| ())).unwrap();
    assert_refused(vec![
        ("nothing", Vec::new(), "holds no certificate"),
        ("no PEM", b"<html>502</html>".to_vec(), "holds no certificate"),
        ("a key only", P256.order.key.to_pem().to_vec(), "holds no certificate"),
        ("garbage between markers", b"-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n".to_vec(), "is not valid PEM"),
        ("no end marker", cut.as_bytes()[..cut.len() - 40].to_vec(), "is not valid PEM"),
        ("truncated DER", encode(&der[..der.len() - 1]), "certificate 1 is not valid X.509"),
        ("trailing bytes", encode(&[&der[..], &[0]].concat()), "certificate 1 is not valid X.509: other bytes follow it"),
        ("DER of something else", encode(&P256.order.csr_der), "certificate 1 is not valid X.509"),
        ("a broken intermediate", [P256.leaf(|_| ()).pem().into_bytes(), encode(&[0x30, 0])].concat(), "certificate 2 is not valid X.509"),
        ("too large", vec![b'\n'; material::MAX_PEM_BYTES + 1], "more than the limit of 1048576 bytes"),
    ]);
}

#[test]
fn a_leaf_for_another_key_is_refused() {
    let other = World::new(KeyType::EcdsaP256);
    let theirs = sign(&other.order, &P256.intermediate, |_| ()).pem().into_bytes();
    let reversed = [P256.intermediate.pem(), P256.leaf(|_| ()).pem().into_bytes()].concat();
    assert_refused(vec![
        ("another key", [theirs, P256.intermediate.pem()].concat(), "public key is not the one"),
        ("the intermediate alone", P256.intermediate.pem(), "public key is not the one"),
        ("the leaf last", reversed, "certificate 2 of the chain, not the first"),
    ]);
    let p384 = World::new(KeyType::EcdsaP384);
    let chain = p384.chain(|_| ());
    let mixed =
        verify(&identity(KeyType::EcdsaP256), &p384.order.key, &CertificateChain::from_pem(&chain).unwrap(), Some(&p384.bundle), now());
    assert_eq!(mixed.unwrap_err(), Error::Key, "a key that is not of the profile's kind");
}

#[test]
fn the_names_are_exactly_those_of_the_identity() {
    let named = |names: Vec<SanType>| P256.chain(|params| params.subject_alt_names = names);
    let ip = SanType::IpAddress([127, 0, 0, 1].into());
    let email = SanType::Rfc822Name("cart@example.org".try_into().unwrap());
    let uris = "URI SANs are";
    assert_refused(vec![
        ("another identity", named(vec![uri("spiffe://cluster.local/ns/shop/sa/till"), dns(DNS)]), uris),
        ("a longer one", named(vec![uri(&format!("{ID}/x")), dns(DNS)]), uris),
        ("another case", named(vec![uri(&ID.to_uppercase()), dns(DNS)]), uris),
        ("two URIs", named(vec![uri(ID), uri("spiffe://cluster.local/ns/shop/sa/till"), dns(DNS)]), uris),
        ("the same URI twice", named(vec![uri(ID), uri(ID), dns(DNS)]), uris),
        ("no URI", named(vec![dns(DNS)]), uris),
        ("no names at all", named(vec![]), uris),
        ("a DNS name more", named(vec![uri(ID), dns(DNS), dns("till.shop.svc")]), "DNS SANs are"),
        ("a DNS name fewer", named(vec![uri(ID)]), "DNS SANs are"),
        ("a wildcard", named(vec![uri(ID), dns("*.shop.svc")]), "DNS SANs are"),
        ("an e-mail address", named(vec![uri(ID), dns(DNS), email]), "of other kinds"),
        ("an IP address", named(vec![uri(ID), dns(DNS), ip]), "of other kinds"),
    ]);
    assert_accepted(vec![
        ("another order", named(vec![dns(DNS), uri(ID)])),
        ("a common name", P256.chain(|params| params.distinguished_name.push(DnType::CommonName, "cart"))),
    ]);
}

#[test]
fn the_leaf_is_valid_now_or_within_the_skew() {
    let valid = |from: SystemTime, until: SystemTime| {
        P256.chain(|params| {
            params.not_before = from.into();
            params.not_after = until.into();
        })
    };
    let second = Duration::from_secs(1);
    assert_refused(vec![
        ("expired", valid(now() - HOUR, now() - second), "expired at 2027-01-15T07:59:59Z"),
        ("expiring this second", valid(now() - HOUR, now()), "expired at"),
        ("beyond the skew", valid(now() + ALLOWED_SKEW + second, now() + HOUR), "valid only from 2027-01-15T08:01:01Z"),
        ("ending before it begins", valid(now() + 2 * second, now() + second), "ends before it begins"),
    ]);
    assert_accepted(vec![
        ("the last second", valid(now() - HOUR, now() + second)),
        ("at the edge of the skew", valid(now() + ALLOWED_SKEW, now() + HOUR)),
    ]);
}

#[test]
fn the_leaf_is_for_both_sides_of_tls_and_not_an_authoritys() {
    let purposes = |purposes: Vec<Purpose>| P256.chain(|params| params.extended_key_usages = purposes);
    let uses = |uses: Vec<Use>| P256.chain(|params| params.key_usages = uses);
    let ca = |is_ca| P256.chain(|params| params.is_ca = is_ca);
    let faults = vec![
        ("a CA", ca(IsCa::Ca(BasicConstraints::Unconstrained)), "is a certificate authority's"),
        ("a CA of length 0", ca(IsCa::Ca(BasicConstraints::Constrained(0))), "is a certificate authority's"),
        ("no client auth", purposes(vec![Purpose::ServerAuth]), "without clientAuth"),
        ("no server auth", purposes(vec![Purpose::ClientAuth]), "without serverAuth"),
        ("another purpose", purposes(vec![Purpose::CodeSigning]), "without serverAuth"),
        // OpenSSL and BoringSSL do not accept it for TLS.
        ("any purpose", purposes(vec![Purpose::Any]), "without serverAuth"),
        ("no signatures", uses(vec![Use::KeyEncipherment]), "without digitalSignature"),
        ("signing certificates", uses(vec![Use::DigitalSignature, Use::KeyCertSign]), "keyCertSign or cRLSign"),
        ("signing CRLs", uses(vec![Use::DigitalSignature, Use::CrlSign]), "keyCertSign or cRLSign"),
    ];
    for (fault, pem, sentence) in &faults {
        // The leaf alone has no path to check, but its usages are checked.
        let leaf = pem.split_inclusive(|&b| b == b'\n').scan(false, |done, line| {
            let last = line.starts_with(b"-----END");
            (!std::mem::replace(done, *done || last)).then_some(line)
        });
        let error = P256.verify(&leaf.collect::<Vec<_>>().concat(), None).unwrap_err();
        assert!(error.to_string().contains(sentence), "{fault} without a bundle: {error}");
    }
    assert_refused(faults);
    assert_accepted(vec![
        ("no extended key usage: every use is allowed", purposes(vec![])),
        ("no key usage", uses(vec![])),
        ("digitalSignature alone", uses(vec![Use::DigitalSignature])),
        ("more purposes than needed", purposes(vec![Purpose::ServerAuth, Purpose::ClientAuth, Purpose::EmailProtection])),
        ("basic constraints that say so", ca(IsCa::ExplicitNoCa)),
    ]);
}

#[test]
fn the_chain_leads_to_a_root_of_the_bundle() {
    let leaf = P256.leaf(|_| ()).pem().into_bytes();
    let stranger = Ca::root("stranger");
    let namesake = Ca::root("root").intermediate("intermediate");
    let from_stranger = sign(&P256.order, &stranger, |_| ()).pem().into_bytes();
    let from_namesake = sign(&P256.order, &namesake, |_| ()).pem().into_bytes();
    let under = |change: fn(&mut CertificateParams)| {
        let mut params = Ca::params("changed");
        change(&mut params);
        let ca = P256.root.intermediate_with(params);
        [sign(&P256.order, &ca, |_| ()).pem().into_bytes(), ca.pem()].concat()
    };
    let unsigned = "no certificate has the name of the issuer of the leaf";
    assert_refused(vec![
        ("another root", from_stranger.clone(), unsigned),
        ("another root, brought along", [from_stranger, stranger.pem()].concat(), "certificate 2 of the chain is signed by itself"),
        ("a missing intermediate", leaf.clone(), unsigned),
        ("the root in place of the intermediate", [leaf.clone(), P256.root.pem()].concat(), unsigned),
        ("a replaced authority of the same names", [from_namesake, namesake.pem()].concat(), "was the authority replaced?"),
        ("an expired intermediate", under(|p| p.not_after = (now() - HOUR / 2).into()), "certificate 2 of the chain has ended"),
        ("an intermediate of the future", under(|p| p.not_before = (now() + HOUR).into()), "certificate 2 of the chain is not valid yet"),
        (
            "an intermediate that is no CA",
            under(|p| p.is_ca = IsCa::ExplicitNoCa),
            "certificate 2 of the chain is not a certificate authority's",
        ),
        (
            "an intermediate for servers only",
            under(|p| p.extended_key_usages = vec![Purpose::ServerAuth]),
            "the extended key usage of certificate 2 of the chain forbids TLS clients",
        ),
    ]);
}

#[test]
fn chains_of_every_shape_are_served_as_they_came() {
    let second = P256.intermediate.intermediate("second");
    let (leaf, deep) = (P256.leaf(|_| ()).pem().into_bytes(), sign(&P256.order, &second, |_| ()).pem().into_bytes());
    let direct = sign(&P256.order, &P256.root, |_| ()).pem().into_bytes();
    let (intermediate, root, stranger) = (P256.intermediate.pem(), P256.root.pem(), Ca::root("stranger").pem());
    assert_accepted(vec![
        ("leaf and intermediate", [&leaf[..], &intermediate].concat()),
        ("signed by the root", direct.clone()),
        ("signed by the root, which came along", [&direct[..], &root].concat()),
        ("a chain of three", [&deep[..], &second.pem(), &intermediate].concat()),
        ("with the root", [&deep[..], &second.pem(), &intermediate, &root].concat()),
        ("intermediates the wrong way round", [&deep[..], &intermediate, &second.pem()].concat()),
        ("an unrelated certificate behind", [&leaf[..], &intermediate, &stranger].concat()),
        ("an unrelated certificate between", [&leaf[..], &stranger, &intermediate].concat()),
        ("the intermediate twice", [&leaf[..], &intermediate, &intermediate].concat()),
        ("lines that end with CR LF", String::from_utf8(P256.chain(|_| ())).unwrap().replace('\n', "\r\n").into_bytes()),
    ]);
}

#[test]
fn the_anchor_is_the_root_that_was_reached() {
    let others: Vec<Ca> = (0..50).map(|i| Ca::root(&format!("other {i}"))).collect();
    let mut roots: Vec<&Ca> = others.iter().collect();
    roots.insert(25, &P256.root);
    let chain = P256.chain(|_| ());
    let anchor = |bundle: &TrustBundle| P256.verify(&chain, Some(bundle)).unwrap().anchor;
    assert_eq!(anchor(&bundle(&roots)).as_ref(), Some(P256.root.certificate.der()));
    // An operator may trust an intermediate, alone or with its root. The path ends at the nearest trusted certificate.
    assert_eq!(anchor(&bundle(&[&P256.intermediate, &P256.root])).as_ref(), Some(P256.intermediate.certificate.der()));

    // A root of the same name with another key is skipped by its key identifier, before and after the right one.
    let namesake = Ca::root("root");
    for roots in [[&namesake, &P256.root], [&P256.root, &namesake]] {
        assert_eq!(anchor(&bundle(&roots)).as_ref(), Some(P256.root.certificate.der()));
    }
    // Without identifiers, it depends on the release of Envoy which one is taken.
    let mut params = Ca::params("intermediate");
    params.use_authority_key_identifier_extension = false;
    let unnamed = P256.root.intermediate_with(params);
    let chain = [sign(&P256.order, &unnamed, |_| ()).pem().into_bytes(), unnamed.pem()].concat();
    assert!(P256.verify(&chain, Some(&bundle(&[&P256.root]))).is_ok());
    for roots in [[&namesake, &P256.root], [&P256.root, &namesake]] {
        let error = P256.verify(&chain, Some(&bundle(&roots))).unwrap_err();
        assert!(error.to_string().contains("certificate 2 of the chain is not signed with the key of its issuer"), "{error}");
    }
}

#[test]
fn the_path_has_every_authority_up_to_the_highest_trusted_one() {
    let digests =
        |path: &[&Ca]| path.iter().map(|ca| material::authority_of_certificate(ca.certificate.der()).unwrap()).collect::<Vec<_>>();
    let (root, first) = (&P256.root, &P256.intermediate);
    let second = first.intermediate("second");
    let deep = sign(&P256.order, &second, |_| ()).pem().into_bytes();
    let chain = [&deep[..], &first.pem(), &second.pem()].concat();
    let others: Vec<Ca> = (0..20).map(|i| Ca::root(&format!("other {i}"))).collect();
    let many: Vec<&Ca> = others.iter().chain([first, &second, root]).collect();
    let whole = digests(&[&second, first, root]);
    for (what, roots, path) in [
        ("the root", vec![root], whole.clone()),
        ("with its intermediates and others", many, whole.clone()),
        ("an intermediate alone", vec![first], digests(&[&second, first])),
        ("the signer alone", vec![&second], digests(&[&second])),
    ] {
        assert_eq!(P256.verify(&chain, Some(&bundle(&roots))).unwrap().path, path, "{what}");
    }
    // Clients of the root cannot verify a leaf whose signer is missing in the chain.
    assert_eq!(P256.verify(&deep, Some(&bundle(&[&second, first, root]))).unwrap().path, digests(&[&second]));
    assert_eq!(P256.verify(&[&chain[..], &root.pem()].concat(), None).unwrap().path, whole, "its own last certificate is the root");
    assert_eq!(P256.verify(&deep, None).unwrap().path, []);

    // A root that another one has cross-signed: the path is the longer one.
    let old = Ca::root("old");
    let cross = Ca::params("root").signed_by(root.signer.key(), &old.signer).unwrap();
    let chain = [P256.chain(|_| ()), cross.pem().into_bytes()].concat();
    assert_eq!(P256.verify(&chain, Some(&bundle(&[root, &old]))).unwrap().path, digests(&[first, root, &old]));
}

#[test]
fn an_expired_root_is_no_root_and_its_renewal_with_the_same_key_is() {
    let (mut old, new) = (Ca::params("renewed"), Ca::params("renewed"));
    old.not_after = (now() - Duration::from_secs(1)).into();
    let key = KeyPair::generate().unwrap();
    let (old, new_certificate) = (old.self_signed(&key).unwrap(), new.self_signed(&key).unwrap());
    let ca = Ca { certificate: new_certificate.clone(), signer: Issuer::new(new, key) };
    let pem = sign(&P256.order, &ca, |_| ()).pem().into_bytes();

    let expired = TrustBundle::from_certificates(vec![old.der().clone()]).unwrap();
    let error = P256.verify(&pem, Some(&expired)).unwrap_err();
    assert!(error.to_string().contains("root 1 of the bundle has ended"), "{error}");
    let renewed = TrustBundle::from_certificates(vec![new_certificate.der().clone()]).unwrap();
    assert_eq!(P256.verify(&pem, Some(&renewed)).unwrap().anchor.as_ref(), Some(new_certificate.der()));
    // An Envoy may take either. The trust bundles leave the expired one out.
    let both = TrustBundle::from_certificates(vec![old.der().clone(), new_certificate.der().clone()]).unwrap();
    assert!(P256.verify(&pem, Some(&both)).is_err());
}

#[test]
fn without_a_bundle_the_chain_must_hold_together_and_has_no_anchor() {
    let leaf = P256.leaf(|_| ()).pem().into_bytes();
    let with_root = [P256.chain(|_| ()), P256.root.pem()].concat();
    for (what, pem) in [("a lone leaf", leaf.clone()), ("a chain", P256.chain(|_| ())), ("with its root", with_root)] {
        let verified = P256.verify(&pem, None).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(verified.anchor, None, "{what}");
    }
    let error = P256.verify(&[leaf, Ca::root("stranger").pem()].concat(), None).unwrap_err();
    assert!(error.to_string().starts_with("the chain does not lead to its own last certificate"), "{error}");
}

#[test]
fn every_kind_of_key_and_authority_verifies() {
    for key in [KeyType::EcdsaP384, KeyType::Rsa2048, KeyType::Rsa3072] {
        let world = World::new(key);
        let verified = world.verify(&world.chain(|_| ()), Some(&world.bundle)).unwrap();
        assert_eq!(verified.chain.uris, [ID], "{key:?}");
        let other = World::new(key);
        assert_eq!(world.verify(&other.chain(|_| ()), Some(&other.bundle)).unwrap_err(), Error::Key, "{key:?}");
    }
    for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_RSA_SHA256, &rcgen::PKCS_ED25519] {
        let root = Ca::root_with(Ca::params("root"), algorithm);
        let pem = sign(&P256.order, &root, |_| ()).pem().into_bytes();
        assert!(P256.verify(&pem, Some(&bundle(&[&root]))).is_ok(), "{algorithm:?}");
    }
}
