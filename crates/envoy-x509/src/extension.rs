//! The extensions of certificates that decide about a path (RFC 5280, section 4.2).

use crate::{
    Fault,
    constraints::{NameConstraints, Names},
    der::{self, Reader},
    name::Name,
    policy::Policies,
};

pub(crate) const SUBJECT_KEY_ID: &[u8] = &[0x55, 0x1d, 14];
const KEY_USAGE: &[u8] = &[0x55, 0x1d, 15];
const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 17];
const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 19];
pub(crate) const ISSUING_DISTRIBUTION_POINT: &[u8] = &[0x55, 0x1d, 28];
const NAME_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 30];
const DISTRIBUTION_POINTS: &[u8] = &[0x55, 0x1d, 31];
const CERTIFICATE_POLICIES: &[u8] = &[0x55, 0x1d, 32];
const POLICY_MAPPINGS: &[u8] = &[0x55, 0x1d, 33];
pub(crate) const AUTHORITY_KEY_ID: &[u8] = &[0x55, 0x1d, 35];
const POLICY_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 36];
const EXTENDED_KEY_USAGE: &[u8] = &[0x55, 0x1d, 37];
const INHIBIT_ANY_POLICY: &[u8] = &[0x55, 0x1d, 54];
/// The feature `status_request` alone, as Envoy compares it.
const STATUS_REQUEST: &[u8] = &[0x30, 0x03, 0x02, 0x01, 0x05];
/// TLS features (RFC 7633).
const TLS_FEATURES: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x01, 24];

/// The extensions that BoringSSL evaluates. A critical one of another kind makes the certificate unusable in a path.
const SUPPORTED: &[&[u8]] = &[
    KEY_USAGE,
    SUBJECT_ALT_NAME,
    BASIC_CONSTRAINTS,
    NAME_CONSTRAINTS,
    CERTIFICATE_POLICIES,
    POLICY_MAPPINGS,
    POLICY_CONSTRAINTS,
    EXTENDED_KEY_USAGE,
    INHIBIT_ANY_POLICY,
];

const SERVER_AUTH: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 1];
const CLIENT_AUTH: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 2];

/// One extension as it is encoded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extension<'a> {
    pub(crate) id: &'a [u8],
    pub(crate) is_critical: bool,
    pub(crate) value: &'a [u8],
}

/// Reads a sequence of extensions.
pub(crate) fn list<'a>(reader: &mut Reader<'a>) -> Result<Vec<Extension<'a>>, Fault> {
    let broken = Fault("an extension is not encoded in DER");
    let mut extensions = reader.inner(der::SEQUENCE).ok_or(broken)?;
    let mut list = Vec::new();
    while !extensions.is_empty() {
        let mut fields = extensions.inner(der::SEQUENCE).ok_or(broken)?;
        let id = der::object(&mut fields).ok_or(broken)?;
        let is_critical = match fields.optional(der::BOOLEAN).ok_or(broken)? {
            Some(content) => der::flag(content).ok_or(broken)?,
            None => false,
        };
        let value = fields.get(der::OCTET_STRING).filter(|_| fields.is_empty()).ok_or(broken)?;
        list.push(Extension { id, is_critical, value });
    }
    Ok(list)
}

/// The value of the extension with this identifier. An error if there are several.
pub(crate) fn find<'a>(list: &[Extension<'a>], id: &[u8]) -> Result<Option<&'a [u8]>, Fault> {
    let mut found = list.iter().filter(|extension| extension.id == id).map(|extension| extension.value);
    match (found.next(), found.next()) {
        (value, None) => Ok(value),
        _ => Err(Fault("an extension is there twice")),
    }
}

/// A key usage (RFC 5280, section 4.2.1.3), and the octets that BoringSSL evaluates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyUsage(u8);

impl KeyUsage {
    /// `digitalSignature`.
    pub fn digital_signature(self) -> bool {
        self.0 & 0x80 != 0
    }

    /// `keyCertSign`.
    pub fn key_cert_sign(self) -> bool {
        self.0 & 0x04 != 0
    }

    /// `cRLSign`.
    pub fn crl_sign(self) -> bool {
        self.0 & 0x02 != 0
    }

    fn has_any(self, usages: u8) -> bool {
        self.0 & usages != 0
    }
}

/// The side of TLS that a certificate is used on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The peer is a server.
    Server,
    /// The peer is a client.
    Client,
}

/// An extended key usage (RFC 5280, section 4.2.1.12).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtendedKeyUsage {
    /// `serverAuth`.
    pub server_auth: bool,
    /// `clientAuth`.
    pub client_auth: bool,
}

/// An authority key identifier (RFC 5280, section 4.2.1.1).
#[derive(Debug, Clone)]
pub(crate) struct AuthorityKeyId<'a> {
    pub(crate) key_id: Option<&'a [u8]>,
    pub(crate) issuer: Option<Name<'a>>,
    pub(crate) serial: Option<&'a [u8]>,
}

impl<'a> AuthorityKeyId<'a> {
    pub(crate) fn read(value: &'a [u8]) -> Result<Self, Fault> {
        let broken = Fault("its authority key identifier is broken");
        let mut fields = sequence(value, broken)?;
        let key_id = fields.optional(der::context(0)).ok_or(broken)?;
        let issuer = match fields.optional(der::constructed(1)).ok_or(broken)? {
            Some(names) => Names::read(names).map_err(|_| broken)?.first_directory(),
            None => None,
        };
        let serial = fields.optional(der::context(2)).ok_or(broken)?;
        if !fields.is_empty() || serial.is_some_and(|serial| !der::is_integer(serial)) {
            return Err(broken);
        }
        Ok(Self { key_id, issuer, serial })
    }
}

/// A place where the authority publishes its revocation list (RFC 5280, section 4.2.1.13).
#[derive(Debug, Clone)]
pub(crate) struct DistributionPoint<'a> {
    pub(crate) place: Option<Place<'a>>,
    /// Whether it is for some reasons of revocation, or for lists of another issuer. BoringSSL does not use such lists.
    pub(crate) is_partial: bool,
}

/// The name of a distribution point.
#[derive(Debug, Clone)]
pub(crate) enum Place<'a> {
    Full(Names<'a>),
    /// Relative to the name of the issuer. Envoy 1.40 finds it equal to none.
    Relative,
}

impl<'a> Place<'a> {
    pub(crate) fn read(content: &'a [u8]) -> Result<Self, Fault> {
        let broken = Fault("the name of a distribution point is broken");
        let mut choice = Reader::new(content);
        let element = choice.any().filter(|_| choice.is_empty()).ok_or(broken)?;
        if element.tag == der::constructed(0) {
            Names::read(element.content).map(Self::Full).map_err(|_| broken)
        } else if element.tag == der::constructed(1) {
            Name::check_relative(element.content).map(|()| Self::Relative).map_err(|_| broken)
        } else {
            Err(broken)
        }
    }
}

fn distribution_points(value: &[u8]) -> Result<Vec<DistributionPoint<'_>>, Fault> {
    let broken = Fault("its CRL distribution points are broken");
    let mut list = sequence(value, broken)?;
    let mut points = Vec::new();
    while !list.is_empty() {
        let mut fields = list.inner(der::SEQUENCE).ok_or(broken)?;
        let place = fields.optional(der::constructed(0)).ok_or(broken)?.map(Place::read).transpose()?;
        let reasons = fields.optional(der::context(1)).ok_or(broken)?;
        let issuer = fields.optional(der::constructed(2)).ok_or(broken)?;
        let is_broken =
            issuer.is_some_and(|names| Names::read(names).is_err()) || reasons.is_some_and(|reasons| der::bits(reasons).is_none());
        if is_broken || !fields.is_empty() {
            return Err(broken);
        }
        points.push(DistributionPoint { place, is_partial: reasons.is_some() || issuer.is_some() });
    }
    Ok(points)
}

/// The extensions of one certificate.
#[derive(Debug, Clone)]
pub struct Extensions<'a> {
    is_authority: bool,
    /// The number of further authorities that may be between this one and the leaf.
    pub(crate) path_len: Option<u64>,
    /// The key usage, if there is one.
    pub key_usage: Option<KeyUsage>,
    /// The extended key usage, if there is one.
    pub extended_key_usage: Option<ExtendedKeyUsage>,
    /// The subject key identifier, if there is one.
    pub key_id: Option<&'a [u8]>,
    pub(crate) authority: Option<AuthorityKeyId<'a>>,
    /// The subject alternative names. `None` without the extension.
    pub names: Option<Names<'a>>,
    pub(crate) constraints: Option<NameConstraints<'a>>,
    pub(crate) distribution_points: Vec<DistributionPoint<'a>>,
    pub(crate) policies: Result<Policies<'a>, Fault>,
    pub(crate) has_unknown_critical: bool,
    /// Whether TLS peers must get an OCSP response with the certificate (RFC 7633). Envoy rejects a certificate with this extension and
    /// without a response.
    pub must_staple: bool,
}

impl<'a> Extensions<'a> {
    pub(crate) fn read(list: &[Extension<'a>]) -> Result<Self, Fault> {
        let value = |id| find(list, id);
        let (is_authority, path_len) = value(BASIC_CONSTRAINTS)?.map_or(Ok((false, None)), basic_constraints)?;
        Ok(Self {
            is_authority,
            path_len,
            key_usage: value(KEY_USAGE)?.map(key_usage).transpose()?,
            extended_key_usage: value(EXTENDED_KEY_USAGE)?.map(extended_key_usage).transpose()?,
            key_id: value(SUBJECT_KEY_ID)?.map(key_id).transpose()?,
            authority: value(AUTHORITY_KEY_ID)?.map(AuthorityKeyId::read).transpose()?,
            names: value(SUBJECT_ALT_NAME)?.map(alt_names).transpose()?,
            constraints: value(NAME_CONSTRAINTS)?.map(NameConstraints::read).transpose()?,
            distribution_points: value(DISTRIBUTION_POINTS)?.map(distribution_points).transpose()?.unwrap_or_default(),
            policies: policies(list),
            has_unknown_critical: list.iter().any(|extension| extension.is_critical && !SUPPORTED.contains(&extension.id)),
            must_staple: list.iter().find(|extension| extension.id == TLS_FEATURES).is_some_and(|found| found.value == STATUS_REQUEST),
        })
    }

    /// Whether the basic constraints make it an authority.
    pub fn is_authority(&self) -> bool {
        self.is_authority
    }

    /// Whether the key usage, if there is one, allows signatures of certificates.
    pub(crate) fn may_sign_certificates(&self) -> bool {
        self.key_usage.is_none_or(KeyUsage::key_cert_sign)
    }

    /// Whether the extended key usage, if there is one, allows this side of TLS.
    pub(crate) fn allows(&self, side: Side) -> bool {
        self.extended_key_usage.is_none_or(|usage| match side {
            Side::Server => usage.server_auth,
            Side::Client => usage.client_auth,
        })
    }

    /// Whether the key usage, if there is one, allows a leaf on this side of TLS.
    pub(crate) fn allows_leaf(&self, side: Side) -> bool {
        const SIGNATURE_OR_AGREEMENT: u8 = 0x80 | 0x08;
        const ENCIPHERMENT: u8 = 0x20;
        let usages = match side {
            Side::Server => SIGNATURE_OR_AGREEMENT | ENCIPHERMENT,
            Side::Client => SIGNATURE_OR_AGREEMENT,
        };
        self.key_usage.is_none_or(|usage| usage.has_any(usages))
    }
}

fn policies<'a>(list: &[Extension<'a>]) -> Result<Policies<'a>, Fault> {
    Policies::read(
        find(list, CERTIFICATE_POLICIES)?,
        find(list, POLICY_MAPPINGS),
        find(list, POLICY_CONSTRAINTS)?,
        find(list, INHIBIT_ANY_POLICY)?,
    )
}

/// The elements of a value that is one sequence.
pub(crate) fn sequence(value: &[u8], fault: Fault) -> Result<Reader<'_>, Fault> {
    der::only(value, der::SEQUENCE).map(Reader::new).ok_or(fault)
}

fn basic_constraints(value: &[u8]) -> Result<(bool, Option<u64>), Fault> {
    let broken = Fault("its basic constraints are broken");
    let mut fields = sequence(value, broken)?;
    let is_authority = match fields.optional(der::BOOLEAN).ok_or(broken)? {
        Some(content) => der::flag(content).ok_or(broken)?,
        None => false,
    };
    let path_len = fields.optional(der::INTEGER).ok_or(broken)?;
    if !fields.is_empty() {
        return Err(broken);
    }
    match path_len {
        None => Ok((is_authority, None)),
        Some(_) if !is_authority => Err(Fault("its basic constraints have a path length and are not of an authority")),
        Some(content) => Ok((true, der::unsigned(content).ok_or(broken)?)),
    }
}

fn key_usage(value: &[u8]) -> Result<KeyUsage, Fault> {
    let (bits, _) = der::only(value, der::BIT_STRING).and_then(der::bits).ok_or(Fault("its key usage is broken"))?;
    Ok(KeyUsage(bits.first().copied().unwrap_or(0)))
}

fn extended_key_usage(value: &[u8]) -> Result<ExtendedKeyUsage, Fault> {
    let broken = Fault("its extended key usage is broken");
    let mut list = sequence(value, broken)?;
    let mut usage = ExtendedKeyUsage { server_auth: false, client_auth: false };
    while !list.is_empty() {
        let id = der::object(&mut list).ok_or(broken)?;
        usage.server_auth |= id == SERVER_AUTH;
        usage.client_auth |= id == CLIENT_AUTH;
    }
    Ok(usage)
}

/// Whether a list of trusted uses has both sides of TLS, or every use.
pub(crate) fn allows_tls(list: &[u8]) -> bool {
    const ANY: &[u8] = &[0x55, 0x1d, 0x25, 0x00];
    let mut list = Reader::new(list);
    let (mut server, mut client) = (false, false);
    while let Some(id) = der::object(&mut list) {
        server |= id == SERVER_AUTH || id == ANY;
        client |= id == CLIENT_AUTH || id == ANY;
    }
    server && client
}

fn key_id(value: &[u8]) -> Result<&[u8], Fault> {
    der::only(value, der::OCTET_STRING).ok_or(Fault("its subject key identifier is broken"))
}

fn alt_names(value: &[u8]) -> Result<Names<'_>, Fault> {
    let broken = Fault("its subject alternative names are broken");
    der::only(value, der::SEQUENCE).ok_or(broken).and_then(|content| Names::read(content).map_err(|_| broken))
}
