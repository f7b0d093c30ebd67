//! Private keys, certificate chains, trust bundles, and the [`Svid`] that joins a chain with its key.
//!
//! Owns the bytes of private keys: they are in buffers that are wiped on drop, `Debug` redacts them, and they are never serialised.
//! `docs/security.md` lists the copies that this module cannot wipe: HTTP/2 buffers, and the kernel's socket buffer.

use std::{
    any::Any,
    cmp::Reverse,
    collections::HashSet,
    fmt,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use agent_runtime::{clock, text::hex};
use aws_lc_rs::digest;
use base64::{Engine, engine::general_purpose::STANDARD};
use envoy_x509::{Certificate, Fault, GeneralName, Name, Names, Time};
use rustls::pki_types::CertificateDer;
use workload_identity::{
    Identity, SpiffeId,
    version::{Authority, Digest, Version},
};
use zeroize::Zeroizing;

use crate::trust::{MAX_BUNDLE_BYTES, MAX_NAME_BYTES};

pub use pem::{BrokenPem, PemFault};

pub(crate) mod pem;

/// Maximum PEM input, in bytes: 1 MiB. A larger bundle or chain is a mistake or an attack.
pub const MAX_PEM_BYTES: usize = 1 << 20;
/// Maximum certificates, and maximum revocation lists, in one PEM input: 500.
pub const MAX_CERTIFICATES: usize = 500;

/// Bytes that are not usable as certificates or revocation lists. The messages have no content of the input, which may hold a private key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No certificate in the input.
    #[error("holds no certificate")]
    Empty,
    /// More than [`MAX_PEM_BYTES`].
    #[error("is {0} bytes long, more than the limit of {MAX_PEM_BYTES} bytes")]
    TooLarge(usize),
    /// More than [`MAX_CERTIFICATES`] certificates, or as many revocation lists.
    #[error("holds more than {MAX_CERTIFICATES} certificates")]
    TooMany,
    /// All bundles with their revocation lists would be larger than [`MAX_BUNDLE_BYTES`].
    #[error("and the other sources have {0} bytes together, more than the limit of {MAX_BUNDLE_BYTES} bytes")]
    BundleTooLarge(usize),
    /// The names of the roots of a bundle would be larger than [`MAX_NAME_BYTES`].
    #[error("and the other sources have roots whose names have {0} bytes together; a TLS server sends at most {MAX_NAME_BYTES} bytes")]
    NamesTooLarge(usize),
    /// Invalid PEM.
    #[error("is not valid PEM: {0}")]
    Pem(BrokenPem),
    /// The input is not base64, and has to be PEM in base64.
    #[error("is not base64")]
    Base64,
    /// A revocation list with invalid DER, or of an unsupported kind.
    #[error("revocation list {index} cannot be used: {why}")]
    RevocationList {
        /// The position of the list, from 1.
        index: usize,
        /// The cause.
        why: Fault,
    },
    /// A certificate that Envoy would not read.
    #[error("certificate {index} is not valid X.509: {why}")]
    X509 {
        /// The position of the certificate, from 1.
        index: usize,
        /// The cause.
        why: Fault,
    },
}

/// A private key as PKCS#8 DER. It is wiped on drop and never printed.
pub struct PrivateKey(Zeroizing<Vec<u8>>);

impl PrivateKey {
    /// Takes ownership of a PKCS#8 document.
    pub fn from_pkcs8_der(der: Zeroizing<Vec<u8>>) -> Self {
        Self(der)
    }

    /// The PKCS#8 document, in DER.
    pub fn pkcs8_der(&self) -> &[u8] {
        &self.0
    }

    /// The document as PEM, in a buffer that is wiped on drop.
    pub fn to_pem(&self) -> Zeroizing<Vec<u8>> {
        let mut out = Zeroizing::new(Vec::with_capacity(pem_len("PRIVATE KEY", self.0.len())));
        push_pem("PRIVATE KEY", &self.0, &mut out);
        out
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(redacted)")
    }
}

/// The validity period of a certificate (RFC 5280, section 4.1.2.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first time at which the certificate is valid.
    pub not_before: SystemTime,
    /// The last time at which the certificate is valid.
    pub not_after: SystemTime,
}

impl Validity {
    /// The time from `not_before` to `not_after`.
    pub fn lifetime(&self) -> Duration {
        self.not_after.duration_since(self.not_before).unwrap_or_default()
    }

    /// The remaining time at `now`; zero after the expiry.
    pub fn remaining(&self, now: SystemTime) -> Duration {
        self.not_after.duration_since(now).unwrap_or_default()
    }

    /// Whether the certificate may be served at `now`. `not_before` is not checked.
    pub fn is_live(&self, now: SystemTime) -> bool {
        now < self.not_after
    }

    /// The time from `not_before` after which peers with slow clocks accept the certificate: 60 s, or a twentieth of the lifetime if that
    /// is less.
    pub fn settling_time(&self) -> Duration {
        Duration::from_secs(60).min(self.lifetime() / 20)
    }

    /// Whether no more is left at `now` than the settling time. The next certificate would not settle before this one ends.
    pub fn ends_soon(&self, now: SystemTime) -> bool {
        self.remaining(now) <= self.settling_time()
    }
}

/// A leaf certificate with its intermediates, leaf first, and values from the leaf.
#[derive(Debug, Clone)]
pub struct CertificateChain {
    certificates: Vec<CertificateDer<'static>>,
    /// The validity period of the leaf.
    pub validity: Validity,
    /// The leaf's serial number, lower-case hexadecimal.
    pub serial: String,
    /// SHA-256 of the leaf's DER, lower-case hexadecimal.
    pub fingerprint: String,
    /// The leaf's URI SANs, in order.
    pub uris: Vec<String>,
    /// The leaf's DNS SANs, in order.
    pub dns_names: Vec<String>,
    /// Whether the leaf has SANs of other types.
    pub other_names: bool,
    /// The leaf's SubjectPublicKeyInfo, DER.
    pub public_key: Vec<u8>,
}

impl CertificateChain {
    /// Reads a chain from PEM, leaf first.
    ///
    /// # Errors
    ///
    /// If the PEM is invalid, empty or larger than the limits, or a certificate is not valid X.509. The signatures are not verified.
    pub fn from_pem(pem: &[u8]) -> Result<Self, Error> {
        let certificates = certificates_from_pem(pem)?;
        let leaf = parse(&certificates[0], 1)?;
        for (index, certificate) in certificates.iter().enumerate().skip(1) {
            parse(certificate, index + 1)?;
        }
        let extensions = leaf.extensions().map_err(|why| Error::X509 { index: 1, why })?;
        let (mut uris, mut dns_names, mut other_names) = (Vec::new(), Vec::new(), false);
        for name in extensions.names.iter().flat_map(Names::iter) {
            let text = |content: &[u8]| std::str::from_utf8(content).ok().filter(|text| text.is_ascii()).map(str::to_owned);
            match name {
                GeneralName::Uri(uri) => text(uri).map_or_else(|| other_names = true, |uri| uris.push(uri)),
                GeneralName::Dns(dns) => text(dns).map_or_else(|| other_names = true, |dns| dns_names.push(dns)),
                _ => other_names = true,
            }
        }
        let validity = Validity { not_before: time_of(leaf.not_before), not_after: time_of(leaf.not_after) };
        let serial = hex(leaf.serial());
        let public_key = leaf.public_key.der.to_vec();
        let fingerprint = hex(digest::digest(&digest::SHA256, &certificates[0]).as_ref());
        Ok(Self { certificates, validity, serial, fingerprint, uris, dns_names, other_names, public_key })
    }

    /// Puts the certificates after the leaf into the order in which clients use them best at `now`. Ended ones are left out. Of those with one
    /// name, key and issuer, the one that ends last comes first. Those that are not valid yet come last. The others keep their order.
    ///
    /// Envoy takes the first certificate that fits, and never tries another one (envoyproxy/envoy#18510).
    #[must_use]
    pub fn in_order(mut self, now: SystemTime) -> Self {
        let mut others = self.certificates.split_off(1);
        let times = |der: &CertificateDer<'_>| {
            parse(der, 1).ok().map(|certificate| (time_of(certificate.not_before), time_of(certificate.not_after)))
        };
        others.retain(|der| times(der).is_none_or(|(_, end)| now < end));
        // Certificates that different authorities have signed for one name and key lead to different roots, and keep their order.
        let authorities: Vec<_> = others.iter().map(authority_and_issuer).collect();
        let mut keyed: Vec<_> = others
            .into_iter()
            .zip(&authorities)
            .map(|(der, authority)| {
                let first = authorities.iter().position(|other| other == authority);
                let (begin, end) = times(&der).unwrap_or((now, now));
                ((begin > now, first, Reverse(end)), der)
            })
            .collect();
        keyed.sort_by_key(|(key, _)| *key);
        self.certificates.extend(keyed.into_iter().map(|(_, der)| der));
        self
    }

    /// The certificates in DER, leaf first.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// The certificates in PEM, leaf first.
    pub fn to_pem(&self) -> Vec<u8> {
        to_pem(&self.certificates)
    }
}

/// The roots of one trust domain. The bundle is never empty, keeps the order of its input and has no duplicates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustBundle {
    roots: Vec<CertificateDer<'static>>,
    authorities: Vec<Digest>,
    version: String,
    /// The earliest expiry of a root.
    pub earliest_expiry: SystemTime,
}

impl TrustBundle {
    /// Reads a bundle from PEM.
    ///
    /// # Errors
    ///
    /// If the PEM is invalid, empty or larger than the limits, or a certificate is not valid X.509. The caller keeps the last good bundle.
    pub fn from_pem(pem: &[u8]) -> Result<Self, Error> {
        Self::from_certificates(certificates_from_pem(pem)?)
    }

    /// Makes a bundle from certificates and drops duplicates.
    ///
    /// # Errors
    ///
    /// If there is no certificate, or one is not valid X.509.
    pub fn from_certificates(certificates: Vec<CertificateDer<'static>>) -> Result<Self, Error> {
        let mut roots: Vec<CertificateDer<'static>> = Vec::with_capacity(certificates.len());
        let mut authorities = Vec::with_capacity(certificates.len());
        let mut earliest_expiry: Option<SystemTime> = None;
        let mut hash = digest::Context::new(&digest::SHA256);
        for (index, certificate) in certificates.into_iter().enumerate() {
            let parsed = parse(&certificate, index + 1)?;
            let (expiry, authority) = (time_of(parsed.not_after), authority_of(&parsed));
            if roots.contains(&certificate) {
                continue;
            }
            authorities.push(authority);
            hash.update(&certificate);
            earliest_expiry = Some(earliest_expiry.map_or(expiry, |e| e.min(expiry)));
            roots.push(certificate);
        }
        let earliest_expiry = earliest_expiry.ok_or(Error::Empty)?;
        Ok(Self { roots, authorities, version: format!("b-{}", hex(&hash.finish().as_ref()[..8])), earliest_expiry })
    }

    /// The roots in DER, in order.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Whether a root has this digest, see [`authority_of_certificate`].
    pub fn has_authority(&self, authority: Digest) -> bool {
        self.authorities.contains(&authority)
    }

    /// `b-` and a digest of the content. Equal bundles have equal versions, on every node and after every restart.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The roots in PEM, in order.
    pub fn to_pem(&self) -> Vec<u8> {
        to_pem(&self.roots)
    }
}

/// A value that a server attaches to a certificate or bundle, such as its encoded forms. It is dropped with the last reference to the
/// material.
#[derive(Default)]
pub struct Attached(OnceLock<Box<dyn Any + Send + Sync>>);

impl Attached {
    /// Returns the attached value; creates it at the first use. `None` if a value of another type is attached.
    pub fn get<T: Default + Send + Sync + 'static>(&self) -> Option<&T> {
        self.0.get_or_init(|| Box::new(T::default())).downcast_ref()
    }
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Attached(redacted)")
    }
}

/// A verified certificate with its key (SPIFFE X.509-SVID), as published to all streams of one identity.
#[derive(Debug)]
pub struct Svid {
    /// The identity that the certificate was issued for.
    pub identity: Arc<Identity>,
    /// The leaf and its intermediates.
    pub chain: CertificateChain,
    /// The private key of the leaf.
    pub key: PrivateKey,
    /// The planned time of its replacement.
    pub renew_at: SystemTime,
    /// The time from which peers with slow clocks accept the certificate. A client that holds a valid certificate gets this one only then.
    pub settled_at: SystemTime,
    /// The digest of its authority, from [`authority_digest`].
    pub authority: String,
    /// The authorities on its path, see [`with_path`](Self::with_path).
    path: Box<[Digest]>,
    version: OnceLock<String>,
    /// Reserved for the server, for example for encoded forms.
    pub attached: Attached,
}

impl Svid {
    /// Joins verified parts. `authority` is the result of [`authority_digest`].
    pub fn new(
        identity: Arc<Identity>,
        chain: CertificateChain,
        key: PrivateKey,
        renew_at: SystemTime,
        settled_at: SystemTime,
        authority: String,
    ) -> Self {
        let (version, attached) = (OnceLock::new(), Attached::default());
        Self { identity, chain, key, renew_at, settled_at, authority, path: Box::default(), version, attached }
    }

    /// Sets the authorities on the path of the chain, each from [`authority_of_certificate`]: from the one that signed the leaf to the root.
    /// Without them a restarted server that has a trust bundle does not recognise the certificate, and replaces it at once.
    pub fn with_path(self, path: &[Digest]) -> Self {
        Self { path: path.into(), ..self }
    }

    /// The SPIFFE ID of the leaf.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.identity.spiffe_id
    }

    /// The version of the certificate, see [`Version`].
    pub fn version(&self) -> &str {
        self.version.get_or_init(|| {
            let version = Version {
                not_after: clock::unix_seconds(self.chain.validity.not_after),
                renew_at: clock::unix_seconds(self.renew_at),
                authority: Authority::new(&self.identity, &self.path),
                content: Digest::of(&[&self.chain.certificates[0]]),
            };
            version.to_string()
        })
    }
}

/// Returns the digest of the authority whose certificate this is: of its name and key. A certificate that was renewed with the same name and
/// key is of the same authority. `None` if it is not valid X.509.
pub fn authority_of_certificate(certificate: &CertificateDer<'_>) -> Option<Digest> {
    Some(authority_of(&parse(certificate, 1).ok()?))
}

fn authority_and_issuer(certificate: &CertificateDer<'_>) -> Option<Digest> {
    let certificate = parse(certificate, 1).ok()?;
    Some(Digest::of(&[certificate.subject.der(), certificate.public_key.der, certificate.issuer.der()]))
}

/// The length of the names of roots in the list that a TLS server sends, in bytes. Envoy sends equal names once.
pub(crate) fn names_len<'a>(roots: impl IntoIterator<Item = &'a CertificateDer<'static>>) -> usize {
    let names: HashSet<Name<'_>> = roots.into_iter().filter_map(|root| Some(parse(root, 1).ok()?.subject)).collect();
    names.iter().map(|name| name.der().len() + 2).sum()
}

fn authority_of(certificate: &Certificate<'_>) -> Digest {
    Digest::of(&[certificate.subject.der(), certificate.public_key.der])
}

/// A time with an offset, which no peer accepts, is the epoch.
fn time_of(time: Time) -> SystemTime {
    clock::from_unix_seconds(time.seconds().unwrap_or(0))
}

/// Digest of the authority of a certificate, as versions of former releases have it: the profile that it was issued under, with its epoch, and the trust anchor of its chain.
///
/// A restarted agent can compute it before it has issued any certificate, from its configuration and its trust bundle. A reported version
/// has a current authority if its digest matches for a root of the bundle.
pub fn authority_digest(profile: &[u8; 32], anchor: Option<&CertificateDer<'_>>) -> String {
    let mut hash = digest::Context::new(&digest::SHA256);
    hash.update(profile);
    // A root that was renewed with the same name and key is the same authority.
    if let Some(Ok(anchor)) = anchor.map(|anchor| parse(anchor, 1)) {
        hash.update(anchor.subject.der());
        hash.update(anchor.public_key.der);
    }
    hex(&hash.finish().as_ref()[..8])
}

/// Whether `authority` is the digest of the current profile and a root of the bundle. Without a bundle, it has to be the digest without a
/// trust anchor.
pub fn is_current_authority(authority: &str, profile: &[u8; 32], bundle: Option<&TrustBundle>) -> bool {
    match bundle {
        Some(bundle) => bundle.roots().iter().any(|root| authority_digest(profile, Some(root)) == authority),
        None => authority_digest(profile, None) == authority,
    }
}

fn certificates_from_pem(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let objects = pem::read(pem)?.into_iter().filter(|object| object.kind == pem::Kind::Certificate);
    let certificates: Vec<_> = objects.map(|object| CertificateDer::from(object.der)).collect();
    if certificates.is_empty() { Err(Error::Empty) } else { Ok(certificates) }
}

fn parse<'a>(certificate: &'a CertificateDer<'_>, index: usize) -> Result<Certificate<'a>, Error> {
    Certificate::from_der(certificate).map_err(|why| Error::X509 { index, why })
}

fn to_pem(certificates: &[CertificateDer<'_>]) -> Vec<u8> {
    let mut out = Vec::with_capacity(certificates.iter().map(|c| pem_len("CERTIFICATE", c.len())).sum());
    for certificate in certificates {
        push_pem("CERTIFICATE", certificate, &mut out);
    }
    out
}

/// Bytes of DER on one line of PEM: 64 characters (RFC 7468, section 2).
const DER_PER_LINE: usize = 48;

/// The length of a PEM block with this `label` and `der` bytes of DER, in bytes.
pub fn pem_len(label: &str, der: usize) -> usize {
    let lines = der.div_ceil(DER_PER_LINE);
    2 * label.len() + "-----BEGIN -----\n-----END -----\n".len() + der.div_ceil(3) * 4 + lines
}

/// Appends one PEM block to `out`. If the capacity suffices, `out` is not reallocated, so that no copy of a key stays behind.
pub fn push_pem(label: &str, der: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(b"-----BEGIN ");
    out.extend_from_slice(label.as_bytes());
    out.extend_from_slice(b"-----\n");
    for line in der.chunks(DER_PER_LINE) {
        let start = out.len();
        out.resize(start + line.len().div_ceil(3) * 4, 0);
        // The buffer has exactly the required size.
        let written = STANDARD.encode_slice(line, &mut out[start..]).unwrap_or(0);
        out.truncate(start + written);
        out.push(b'\n');
    }
    out.extend_from_slice(b"-----END ");
    out.extend_from_slice(label.as_bytes());
    out.extend_from_slice(b"-----\n");
}

#[cfg(any(test, feature = "testing"))]
pub mod samples;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pem_round_trips_at_every_length_without_reallocating() {
        for len in [1, 2, 3, 47, 48, 49, 96, 97, 1000] {
            let der: Vec<u8> = (0..=u8::MAX).cycle().take(len).collect();
            let mut out = Vec::with_capacity(pem_len("PRIVATE KEY", len));
            let room = out.capacity();
            push_pem("PRIVATE KEY", &der, &mut out);
            assert_eq!((out.len(), out.capacity()), (room, room), "length {len}");
            let back: rustls::pki_types::PrivatePkcs8KeyDer<'_> = rustls::pki_types::pem::PemObject::from_pem_slice(&out).unwrap();
            assert_eq!(back.secret_pkcs8_der(), der);
        }
    }

    #[test]
    fn a_key_is_never_printed() {
        let key = PrivateKey::from_pkcs8_der(Zeroizing::new(b"secret".to_vec()));
        assert_eq!(format!("{key:?}"), "PrivateKey(redacted)");
    }

    #[test]
    fn a_chain_is_ordered_for_clients_that_take_the_first_that_fits() {
        use rcgen::{CertificateParams, DnType, IsCa, Issuer, KeyPair};
        let now = SystemTime::now();
        let hour = |count: u64| Duration::from_secs(3600 * count);
        let params = |name: &str, from: SystemTime, until: SystemTime| {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            (params.not_before, params.not_after) = (from.into(), until.into());
            params
        };
        let key = KeyPair::generate().unwrap();
        let root = |name: &str| Issuer::new(params(name, now - hour(9), now + hour(9)), KeyPair::generate().unwrap());
        let (r1, r2) = (root("r1"), root("r2"));
        let of = |root: &Issuer<'_, KeyPair>, from, until| params("i", from, until).signed_by(&key, root).unwrap().der().clone();
        let leaf = of(&r1, now - hour(1), now + hour(1));
        let [ended, short, long, future] = [
            of(&r1, now - hour(5), now - hour(1)),
            of(&r1, now - hour(5), now + hour(2)),
            of(&r1, now - hour(5), now + hour(5)),
            of(&r1, now + hour(1), now + hour(8)),
        ];
        // It leads to another root, so that its place matters.
        let cross = of(&r2, now - hour(5), now + hour(9));
        let chain = [&leaf, &future, &ended, &short, &cross, &long].map(Clone::clone);
        let ordered = CertificateChain::from_pem(&to_pem(&chain)).unwrap().in_order(now);
        assert_eq!(ordered.certificates(), [leaf, long, short, cross, future]);
    }

    #[test]
    fn bundles_keep_order_drop_repetitions_and_refuse_nothing_and_garbage() {
        let (a, b) = (root("a"), root("b"));
        let pem = [to_pem(&[a.clone(), b.clone()]), to_pem(std::slice::from_ref(&a))].concat();
        let bundle = TrustBundle::from_pem(&pem).unwrap();
        assert_eq!(bundle.roots(), [a.clone(), b.clone()]);
        assert_eq!(TrustBundle::from_pem(&bundle.to_pem()).unwrap(), bundle);
        assert_ne!(TrustBundle::from_pem(&to_pem(&[b, a])).unwrap().version(), bundle.version());

        assert_eq!(TrustBundle::from_pem(b""), Err(Error::Empty));
        assert_eq!(TrustBundle::from_pem(b"no pem here"), Err(Error::Empty));
        let garbage = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(matches!(TrustBundle::from_pem(garbage), Err(Error::X509 { index: 1, .. })));
        assert!(matches!(TrustBundle::from_pem(b"-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n"), Err(Error::Pem(_))));
        assert_eq!(TrustBundle::from_pem(&vec![b' '; MAX_PEM_BYTES + 1]), Err(Error::TooLarge(MAX_PEM_BYTES + 1)));
    }

    fn root(name: &str) -> CertificateDer<'static> {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.self_signed(&key).unwrap().der().clone()
    }
}
