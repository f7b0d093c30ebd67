//! Revocation lists (RFC 5280, section 5), as Envoy reads, chooses and applies them.
//!
//! Envoy checks each certificate of a path against a list of its issuer, the root against its own. It chooses one list for each by a score
//! without the signature, so that a list with a wrong signature can hide a good one.

use std::fmt;

use crate::{
    Fault,
    certificate::Certificate,
    der::{self, Reader},
    extension::{self, AUTHORITY_KEY_ID, AuthorityKeyId, Extension, ISSUING_DISTRIBUTION_POINT, Place},
    name::Name,
    signature::{self, Algorithm},
    time::{self, Time},
};

/// The extension that gives the reason of a revocation.
const REASON_CODE: &[u8] = &[0x55, 0x1d, 21];

/// A revocation list that Envoy reads. The signature is not verified here.
#[derive(Debug, Clone)]
pub struct RevocationList<'a> {
    signed: &'a [u8],
    algorithm: Algorithm<'a>,
    signed_algorithm: Algorithm<'a>,
    signature: &'a [u8],
    /// The name of the authority.
    pub issuer: Name<'a>,
    /// The time of issue.
    pub this_update: Time,
    /// The time at which the next list is issued, from which Envoy refuses all certificates of the authority.
    pub next_update: Option<Time>,
    /// The serial numbers of the revoked certificates: the content of their integers.
    pub revoked: Vec<&'a [u8]>,
    authority: Option<AuthorityKeyId<'a>>,
    scope: Option<Scope<'a>>,
    has_unknown_critical: bool,
}

/// The certificates that a list is about (`issuingDistributionPoint`).
#[derive(Debug, Clone)]
struct Scope<'a> {
    place: Option<Place<'a>>,
    only_users: bool,
    only_authorities: bool,
    only_attributes: bool,
    /// For some reasons of revocation, or for certificates of other issuers, or contradictory. Envoy never uses such a list.
    is_unusable: bool,
}

impl<'a> RevocationList<'a> {
    /// Reads one list in DER.
    ///
    /// # Errors
    ///
    /// If Envoy would not read it. A secret with such a list is rejected by Envoy as a whole.
    pub fn from_der(der: &'a [u8]) -> Result<Self, Fault> {
        let mut outer = Reader::new(der);
        let mut parts = outer.inner(der::SEQUENCE).ok_or(Fault("it is not a sequence of DER"))?;
        if !outer.is_empty() {
            return Err(Fault("other bytes follow it"));
        }
        let signed = parts.next(der::SEQUENCE).ok_or(Fault("its signed part is not a sequence of DER"))?;
        let algorithm = Algorithm::read(&mut parts)?;
        let (signature, unused) = parts.get(der::BIT_STRING).and_then(der::bits).ok_or(Fault("its signature is broken"))?;
        if !parts.is_empty() {
            return Err(Fault("other bytes follow its signature"));
        }
        let mut fields = Reader::new(signed.content);
        let has_version = match fields.optional(der::INTEGER).ok_or(Fault("its version is broken"))? {
            None => false,
            Some([1]) => true,
            Some([0]) => return Err(Fault("its version 1 is not left out (Envoy 1.40 rejects it)")),
            Some(_) => return Err(Fault("its version is neither 1 nor 2")),
        };
        let signed_algorithm = Algorithm::read(&mut fields)?;
        let issuer = Name::read(&mut fields)?;
        let broken_time = Fault("a time is broken: times are UTCTime or GeneralizedTime, with seconds and Z");
        let this_update = fields.any().and_then(|element| time::parse(&element)).ok_or(broken_time)?;
        let next_update = if fields.is_next(der::UTC_TIME) || fields.is_next(der::GENERALIZED_TIME) {
            Some(fields.any().and_then(|element| time::parse(&element)).ok_or(broken_time)?)
        } else {
            None
        };
        let mut list = Self {
            signed: signed.whole,
            algorithm,
            signed_algorithm,
            signature: if unused == 0 { signature } else { &[] },
            issuer,
            this_update,
            next_update,
            revoked: Vec::new(),
            authority: None,
            scope: None,
            has_unknown_critical: false,
        };
        if fields.is_next(der::SEQUENCE) {
            list.read_entries(fields.inner(der::SEQUENCE).ok_or(Fault("its entries are broken"))?, has_version)?;
        }
        if fields.is_next(der::constructed(0)) {
            let mut wrapper = fields.inner(der::constructed(0)).ok_or(Fault("its extensions are broken"))?;
            let extensions = extension::list(&mut wrapper)?;
            if extensions.is_empty() || !wrapper.is_empty() || !has_version {
                return Err(Fault("its extensions are empty, or its version has none"));
            }
            list.read_extensions(&extensions)?;
        }
        if fields.is_empty() { Ok(list) } else { Err(Fault("it has fields that a revocation list does not have, or in another order")) }
    }

    fn read_entries(&mut self, mut entries: Reader<'a>, may_extend: bool) -> Result<(), Fault> {
        let broken = Fault("an entry is broken");
        // From a broken reason on, BoringSSL does not evaluate the extensions of entries.
        let mut evaluates = true;
        while !entries.is_empty() {
            let mut fields = entries.inner(der::SEQUENCE).ok_or(broken)?;
            let serial = fields.get(der::INTEGER).filter(|serial| der::is_integer(serial)).ok_or(broken)?;
            fields.any().and_then(|element| time::parse(&element)).ok_or(broken)?;
            if !fields.is_empty() {
                let extensions = extension::list(&mut fields)?;
                if evaluates && extensions.is_empty() {
                    return Err(Fault("an entry has an empty list of extensions (Envoy 1.40 rejects it)"));
                }
                if !fields.is_empty() || evaluates && !may_extend {
                    return Err(broken);
                }
                let is_reason = |value| der::only(value, der::ENUMERATED).is_some_and(der::is_integer);
                evaluates &= extension::find(&extensions, REASON_CODE).is_ok_and(|value| value.is_none_or(is_reason));
                self.has_unknown_critical |= evaluates && extensions.iter().any(|extension| extension.is_critical);
            }
            self.revoked.push(serial);
        }
        Ok(())
    }

    fn read_extensions(&mut self, list: &[Extension<'a>]) -> Result<(), Fault> {
        self.authority = extension::find(list, AUTHORITY_KEY_ID)?.map(AuthorityKeyId::read).transpose()?;
        self.scope = extension::find(list, ISSUING_DISTRIBUTION_POINT)?.map(Scope::read).transpose()?;
        let is_known = |id: &[u8]| id == ISSUING_DISTRIBUTION_POINT || id == AUTHORITY_KEY_ID;
        self.has_unknown_critical |= list.iter().any(|extension| extension.is_critical && !is_known(extension.id));
        Ok(())
    }

    /// Whether Envoy takes it for a list of `authority`: by the name and the key identifier. The signature is not verified.
    pub fn is_of(&self, authority: &Certificate<'_>) -> bool {
        self.issuer == authority.subject && self.authority.as_ref().is_none_or(|id| authority.is_identified_by(id))
    }

    /// Checks the list for certificates of `authority` at `now`, in seconds since the Unix epoch, apart from its scope.
    ///
    /// # Errors
    ///
    /// The reason for which Envoy would refuse all certificates of the authority.
    pub fn check(&self, authority: &Certificate<'_>, now: i64) -> Result<(), ListRefusal> {
        if authority.extensions().ok().and_then(|own| own.key_usage).is_some_and(|usage| !usage.crl_sign()) {
            return Err(ListRefusal::KeyUsage);
        }
        match self.this_update.seconds() {
            Some(begin) if begin <= now => {}
            Some(_) => return Err(ListRefusal::NotBegun),
            None => return Err(ListRefusal::Time),
        }
        match self.next_update.map(Time::seconds) {
            Some(Some(end)) if end <= now => return Err(ListRefusal::Ended),
            Some(None) => return Err(ListRefusal::Time),
            _ => {}
        }
        let signed = self.algorithm == self.signed_algorithm
            && signature::verify(&authority.public_key, &self.algorithm, self.signed, self.signature).is_ok();
        if !signed {
            return Err(ListRefusal::Signature);
        }
        if self.has_unknown_critical { Err(ListRefusal::CriticalExtension) } else { Ok(()) }
    }

    /// Whether the list is about `certificate`.
    ///
    /// # Errors
    ///
    /// [`ListRefusal::Scope`] if it is not.
    pub fn check_scope(&self, certificate: &Certificate<'_>) -> Result<(), ListRefusal> {
        let Some(scope) = &self.scope else { return Ok(()) };
        let (points, is_authority) = match certificate.extensions() {
            Ok(own) => (&own.distribution_points[..], own.is_authority()),
            Err(_) => (&[][..], false),
        };
        let excludes = if is_authority { scope.only_users } else { scope.only_authorities };
        let mut usable = points.iter().filter(|point| !point.is_partial);
        let is_at = usable.any(|point| match (&point.place, &scope.place) {
            (Some(Place::Full(one)), Some(Place::Full(other))) => one.intersects(other),
            (None, _) | (_, None) => true,
            _ => false,
        });
        let is_about = !scope.is_unusable && !scope.only_attributes && !excludes && (is_at || scope.place.is_none());
        if is_about { Ok(()) } else { Err(ListRefusal::Scope) }
    }
}

impl<'a> Scope<'a> {
    fn read(value: &'a [u8]) -> Result<Self, Fault> {
        let broken = Fault("its issuing distribution point is broken");
        let mut fields = extension::sequence(value, broken)?;
        let place = fields.optional(der::constructed(0)).ok_or(broken)?.map(Place::read).transpose()?;
        let mut flag = |number| match fields.optional(der::context(number)).ok_or(broken)? {
            Some(content) if number == 3 => der::bits(content).map(|_| true).ok_or(broken),
            Some(content) => der::flag(content).ok_or(broken),
            None => Ok(false),
        };
        let (only_users, only_authorities, some_reasons) = (flag(1)?, flag(2)?, flag(3)?);
        let (is_indirect, only_attributes) = (flag(4)?, flag(5)?);
        if !fields.is_empty() {
            return Err(broken);
        }
        let restrictions = [only_users, only_authorities, only_attributes].into_iter().filter(|is_set| *is_set).count();
        let is_unusable = restrictions > 1 || is_indirect || some_reasons;
        Ok(Self { place, only_users, only_authorities, only_attributes, is_unusable })
    }
}

/// Why Envoy would refuse a certificate because of revocation lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ListRefusal {
    /// There is no list of its issuer, or only lists that name another key.
    Missing,
    /// The authority's key usage does not allow it to sign lists.
    KeyUsage,
    /// The list is not about the certificate.
    Scope,
    /// The list is not valid yet: the authority's clock is ahead.
    NotBegun,
    /// The list has ended.
    Ended,
    /// A time of the list has an offset.
    Time,
    /// The list is not signed with the authority's key.
    Signature,
    /// The list has a critical extension that Envoy does not know.
    CriticalExtension,
    /// The certificate is revoked.
    Revoked,
}

impl fmt::Display for ListRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "there is no list of it, or the lists of its name are of another key",
            Self::KeyUsage => "it may not sign revocation lists: its key usage has no cRLSign",
            Self::Scope => "its list is restricted to other certificates, by an issuingDistributionPoint",
            Self::NotBegun => "its list is not valid yet: its clock is ahead",
            Self::Ended => "its list has ended",
            Self::Time => "a time of its list has an offset",
            Self::Signature => "its list is not signed by its key",
            Self::CriticalExtension => "its list has a critical extension that Envoy does not know",
            Self::Revoked => "the certificate is revoked",
        })
    }
}

impl std::error::Error for ListRefusal {}

/// Checks each certificate of a path, from the leaf to the root, against the lists, at `now`.
///
/// # Errors
///
/// The position in the path of the first certificate that Envoy would refuse, and the reason.
pub fn check_revocation(path: &[&Certificate<'_>], lists: &[RevocationList<'_>], now: i64) -> Result<(), (usize, ListRefusal)> {
    for (depth, certificate) in path.iter().enumerate() {
        check_one(path, depth, certificate, lists, now).map_err(|refusal| (depth, refusal))?;
    }
    Ok(())
}

fn check_one(
    path: &[&Certificate<'_>],
    depth: usize,
    certificate: &Certificate<'_>,
    lists: &[RevocationList<'_>],
    now: i64,
) -> Result<(), ListRefusal> {
    let next = path.get(depth + 1).or(path.last()).copied();
    // The best score so far, and the lists with it, each with its issuer.
    let (mut best, mut equal) = ((0, i64::MIN), Vec::new());
    for list in lists.iter().filter(|list| list.issuer == certificate.issuer) {
        if list.scope.as_ref().is_some_and(|scope| scope.is_unusable) {
            continue;
        }
        // The issuer of the list is the next certificate of the path, or a later one with its name.
        let is_next = |authority: &&Certificate<'_>| list.authority.as_ref().is_none_or(|id| authority.is_identified_by(id));
        let later = || path.iter().skip(depth + 2).copied().find(|authority| list.is_of(authority));
        let (issuer, of_next) = match next.filter(is_next) {
            Some(next) => (next, true),
            None => match later() {
                Some(later) => (later, false),
                None => continue,
            },
        };
        let in_time = list.this_update.seconds().is_some_and(|begin| begin <= now)
            && list.next_update.is_none_or(|end| end.seconds().is_some_and(|end| end > now));
        let score = u32::from(!list.has_unknown_critical) << 4
            | u32::from(list.check_scope(certificate).is_ok()) << 3
            | u32::from(in_time) << 2
            | u32::from(of_next) << 1;
        let rank = (score, list.this_update.seconds().unwrap_or(i64::MIN));
        if equal.is_empty() || rank > best {
            (best, equal) = (rank, vec![(list, issuer)]);
        } else if rank == best {
            equal.push((list, issuer));
        }
    }
    if equal.is_empty() {
        return Err(ListRefusal::Missing);
    }
    // The order of equal lists is not defined: each has to do.
    for (list, issuer) in equal {
        list.check_scope(certificate)?;
        list.check(issuer, now)?;
        if list.revoked.contains(&certificate.serial()) {
            return Err(ListRefusal::Revoked);
        }
    }
    Ok(())
}
