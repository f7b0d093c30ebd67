//! Certificates (RFC 5280, section 4), as BoringSSL reads them.

use crate::{
    Fault,
    der::{self, Element, Reader},
    extension::{self, Extensions},
    name::Name,
    signature::{Algorithm, PublicKey},
    time::{self, Time},
};

/// A certificate that Envoy reads.
///
/// The signature is not verified here. A value of an extension that Envoy cannot read does not make the certificate unreadable for it, but no
/// path can have the certificate: [`extensions`](Self::extensions) returns the fault.
#[derive(Debug, Clone)]
pub struct Certificate<'a> {
    /// The whole certificate.
    pub(crate) der: &'a [u8],
    /// The signed part, in DER.
    pub(crate) signed: &'a [u8],
    version: u8,
    serial: &'a [u8],
    pub(crate) algorithm: Algorithm<'a>,
    /// The algorithm that the signed part names.
    pub(crate) signed_algorithm: Algorithm<'a>,
    /// The name of the authority that signed the certificate.
    pub issuer: Name<'a>,
    /// The name of the owner of the key.
    pub subject: Name<'a>,
    /// The first time at which the certificate is valid.
    pub not_before: Time,
    /// The first time at which the certificate is no longer valid.
    pub not_after: Time,
    /// The owner's key.
    pub public_key: PublicKey<'a>,
    pub(crate) signature: &'a [u8],
    extensions: Result<Extensions<'a>, Fault>,
}

impl<'a> Certificate<'a> {
    /// Reads one certificate in DER.
    ///
    /// # Errors
    ///
    /// If Envoy would not read it. A bundle or chain with such a certificate is rejected by Envoy as a whole.
    pub fn from_der(der: &'a [u8]) -> Result<Self, Fault> {
        let mut outer = Reader::new(der);
        let mut parts = outer.inner(der::SEQUENCE).ok_or(Fault("it is not a sequence of DER"))?;
        if !outer.is_empty() {
            return Err(Fault("other bytes follow it"));
        }
        let signed = parts.next(der::SEQUENCE).ok_or(Fault("its signed part is not a sequence of DER"))?;
        let algorithm = Algorithm::read(&mut parts)?;
        let signature = parts.get_with_any_length(der::BIT_STRING).and_then(der::bits).ok_or(Fault("its signature is broken"))?;
        if !parts.is_empty() {
            return Err(Fault("other bytes follow its signature"));
        }
        // A signature has no unused bits; BoringSSL reads it, and never verifies it.
        let signature = if signature.1 == 0 { signature.0 } else { &[] };
        Self::signed(der, signed, algorithm, signature)
    }

    /// Returns the certificate of a `TRUSTED CERTIFICATE` of OpenSSL, without the trust settings that follow it.
    ///
    /// # Errors
    ///
    /// If the settings are broken, reject a use of the certificate, or trust it for other uses than TLS servers and clients.
    pub fn without_trust_settings(der: &[u8]) -> Result<&[u8], Fault> {
        let mut parts = Reader::new(der);
        let certificate = parts.next(der::SEQUENCE).ok_or(Fault("it is not a sequence of DER"))?;
        if parts.is_empty() {
            return Ok(certificate.whole);
        }
        let mut settings = parts.inner(der::SEQUENCE).filter(|_| parts.is_empty()).ok_or(Fault("its trust settings are broken"))?;
        while let Some(setting) = settings.any() {
            if setting.tag == der::constructed(0) || setting.tag == der::SEQUENCE && !extension::allows_tls(setting.content) {
                return Err(Fault("its trust settings do not allow TLS servers and clients"));
            }
        }
        if settings.is_empty() { Ok(certificate.whole) } else { Err(Fault("its trust settings are broken")) }
    }

    fn signed(der: &'a [u8], signed: Element<'a>, algorithm: Algorithm<'a>, signature: &'a [u8]) -> Result<Self, Fault> {
        let mut fields = Reader::new(signed.content);
        let version = version(&mut fields)?;
        let serial =
            fields.get(der::INTEGER).filter(|serial| der::is_integer(serial)).ok_or(Fault("its serial number is not an integer of DER"))?;
        let signed_algorithm = Algorithm::read(&mut fields)?;
        let issuer = Name::read(&mut fields)?;
        let (not_before, not_after) = validity(&mut fields)?;
        let subject = Name::read(&mut fields)?;
        let public_key = PublicKey::read(&mut fields)?;
        for number in [1, 2] {
            if version >= 2 && fields.is_next(der::context(number)) {
                fields.get(der::context(number)).and_then(der::bits).ok_or(Fault("a unique identifier is broken"))?;
            }
        }
        let mut list = Vec::new();
        if version == 3 && fields.is_next(der::constructed(3)) {
            let mut wrapper = fields.inner(der::constructed(3)).ok_or(Fault("its extensions are broken"))?;
            list = extension::list(&mut wrapper)?;
            if !wrapper.is_empty() {
                return Err(Fault("other bytes follow its extensions"));
            }
        }
        if !fields.is_empty() {
            return Err(Fault("it has fields that its version does not have, or in another order"));
        }
        let mut certificate = Self {
            der,
            signed: signed.whole,
            version,
            serial,
            algorithm,
            signed_algorithm,
            issuer,
            subject,
            not_before,
            not_after,
            public_key,
            signature,
            extensions: Err(Fault("they were not read")),
        };
        certificate.extensions = Extensions::read(&list);
        Ok(certificate)
    }

    /// The length of its DER, in bytes.
    #[allow(clippy::len_without_is_empty, reason = "a certificate is never empty")]
    pub fn len(&self) -> usize {
        self.der.len()
    }

    /// The serial number: the content of its integer.
    pub fn serial(&self) -> &'a [u8] {
        self.serial
    }

    /// The extensions.
    ///
    /// # Errors
    ///
    /// If Envoy cannot read the value of an extension that it knows. Envoy then refuses each path with the certificate.
    pub fn extensions(&self) -> Result<&Extensions<'a>, Fault> {
        self.extensions.as_ref().map_err(|fault| *fault)
    }

    /// Whether subject and issuer are equal.
    pub fn is_self_issued(&self) -> bool {
        self.subject == self.issuer
    }

    /// Whether Envoy ends a path here: subject and issuer are equal, and the key identifiers do not say otherwise.
    pub(crate) fn is_self_signed(&self) -> bool {
        self.is_self_issued() && self.extensions().is_ok_and(|own| own.may_sign_certificates() && self.is_named_by(own))
    }

    /// Whether it is an authority for paths. Version 1 has no extensions: such a certificate is an authority if it is a root.
    pub(crate) fn is_authority(&self) -> bool {
        self.extensions().is_ok_and(|own| own.may_sign_certificates() && (own.is_authority() || self.version == 1 && self.is_self_signed()))
    }

    /// Whether this certificate may have signed `other`: by the names, the key identifiers, and the key usage.
    pub fn may_have_issued(&self, other: &Self) -> bool {
        let (Ok(own), Ok(others)) = (self.extensions(), other.extensions()) else { return false };
        self.subject == other.issuer && own.may_sign_certificates() && self.is_named_by(others)
    }

    /// Whether the authority key identifier of `other` does not name another certificate than this one.
    pub(crate) fn is_named_by(&self, other: &Extensions<'_>) -> bool {
        other.authority.as_ref().is_none_or(|id| self.is_identified_by(id))
    }

    pub(crate) fn is_identified_by(&self, id: &extension::AuthorityKeyId<'_>) -> bool {
        let own = self.extensions().ok().and_then(|own| own.key_id);
        id.key_id.zip(own).is_none_or(|(named, own)| named == own)
            && id.serial.is_none_or(|serial| serial == self.serial)
            && id.issuer.as_ref().is_none_or(|issuer| *issuer == self.issuer)
    }
}

fn version(fields: &mut Reader<'_>) -> Result<u8, Fault> {
    let Some(mut wrapper) = fields.is_next(der::constructed(0)).then(|| fields.inner(der::constructed(0))).flatten() else { return Ok(1) };
    let version = wrapper.get(der::INTEGER).and_then(der::unsigned).filter(|_| wrapper.is_empty());
    match version.ok_or(Fault("its version is not an integer of DER"))? {
        Some(0) => Ok(1),
        Some(1) => Ok(2),
        Some(2) => Ok(3),
        _ => Err(Fault("its version is none of 1, 2 and 3")),
    }
}

fn validity(fields: &mut Reader<'_>) -> Result<(Time, Time), Fault> {
    let broken = Fault("its validity is broken: times are UTCTime or GeneralizedTime, with seconds and Z");
    let mut times = fields.inner(der::SEQUENCE).ok_or(broken)?;
    let mut next = || times.any().and_then(|time| time::parse(&time)).ok_or(broken);
    let both = (next()?, next()?);
    if times.is_empty() { Ok(both) } else { Err(broken) }
}
