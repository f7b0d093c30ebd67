//! Paths from a leaf to a root, as Envoy builds and verifies them.
//!
//! Envoy calls BoringSSL's `X509_verify_cert` with partial chains allowed, and the roots of the bundle as its store. BoringSSL builds one path:
//! it takes the first certificate that fits, from the store if it has one, otherwise from the peer's chain, and never tries another one. The
//! order of namesakes in the store depends on the release and on the number of roots, so that [`verify`] accepts a leaf only if the path is
//! valid with each of them.

use std::{cell::RefCell, collections::BTreeMap, fmt};

use crate::{
    Fault, Release,
    certificate::Certificate,
    constraints::Violation,
    extension::Side,
    policy,
    signature::{self, Unverified},
};

/// The largest number of certificates of a path, from the leaf to the root.
const MAX_PATH: usize = 102;
/// The largest number of paths that are tried, because of namesakes among the roots.
const MAX_PATHS: usize = 1000;

/// The place of a certificate in the inputs of [`verify`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// In the chain, from 0; the leaf is the first.
    Chain(usize),
    /// In the bundle, from 0.
    Bundle(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chain(0) => f.write_str("the leaf"),
            Self::Chain(index) => write!(f, "certificate {} of the chain", index + 1),
            Self::Bundle(index) => write!(f, "root {} of the bundle", index + 1),
        }
    }
}

/// A valid path: the places of its certificates, the leaf first. A path has at least one certificate of the bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// The certificates, from the leaf to the last one.
    pub places: Vec<Place>,
}

/// Why Envoy would refuse a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// The certificate at fault.
    pub place: Place,
    /// The fault.
    pub reason: Reason,
    /// The release of Envoy that refuses the chain, if the other one accepts it.
    pub release: Option<Release>,
    /// Whether Envoy accepts the chain with another root of the same name. The releases choose differently among roots of one name.
    pub depends_on_choice: bool,
}

/// The faults of a certificate in a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// No certificate with the name of its issuer is in the bundle or the chain.
    NoIssuer,
    /// A certificate with the name of its issuer exists, and its key identifier or key usage does not fit.
    IssuerDoesNotFit,
    /// It is signed by itself, and not in the bundle.
    SelfSigned,
    /// It has ended.
    Ended,
    /// It is not yet valid.
    NotBegun,
    /// Its validity has a time with an offset.
    TimeWithOffset,
    /// Its signature is not of its issuer's key.
    Signature,
    /// Its signature algorithm, or its issuer's key, is not supported.
    Algorithm,
    /// The two places for its signature algorithm differ.
    AlgorithmsDiffer,
    /// An extension cannot be read.
    Extension(Fault),
    /// It has a critical extension that Envoy does not know.
    CriticalExtension,
    /// It is not an authority, and signs a certificate of the chain.
    NotAnAuthority,
    /// Its extended key usage forbids this side of TLS.
    ExtendedKeyUsage(Side),
    /// Its key usage forbids TLS.
    KeyUsage,
    /// Its path length is shorter than the path below it.
    PathLength,
    /// A name is not permitted by the constraints of the authority at this place.
    NotPermitted(&'static str, Place),
    /// A name is excluded by the constraints of the authority at this place.
    Excluded(&'static str, Place),
    /// A name cannot be compared with the constraints of the authority at this place.
    Constraints(&'static str, Place),
    /// Its policies are broken.
    Policies(Fault),
    /// An authority demands a policy that the path does not have.
    NoPolicy,
    /// The bundle has too many roots of one name.
    TooManyPaths,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = self.place;
        match self.reason {
            Reason::NoIssuer => write!(f, "no certificate has the name of the issuer of {place}, neither in the bundle nor in the chain")?,
            Reason::IssuerDoesNotFit => write!(
                f,
                "each certificate with the name of the issuer of {place} has another key identifier (was the authority replaced?) or no \
                 keyCertSign"
            )?,
            Reason::SelfSigned => write!(f, "{place} is signed by itself and is not in the bundle")?,
            Reason::Ended => write!(f, "{place} has ended")?,
            Reason::NotBegun => write!(f, "{place} is not valid yet")?,
            Reason::TimeWithOffset => write!(f, "{place} has a time with an offset; times end with Z")?,
            Reason::Signature => write!(f, "{place} is not signed with the key of its issuer (was the authority replaced?)")?,
            Reason::Algorithm => write!(f, "{place} has a signature algorithm, or its issuer a key, that is not supported")?,
            Reason::AlgorithmsDiffer => write!(f, "{place} names two different signature algorithms")?,
            Reason::Extension(fault) => write!(f, "{place} cannot be used: {fault}")?,
            Reason::CriticalExtension => write!(f, "{place} has a critical extension that Envoy does not know")?,
            Reason::NotAnAuthority => {
                write!(f, "{place} is not a certificate authority's: its basic constraints or its key usage do not allow it to sign")?;
            }
            Reason::ExtendedKeyUsage(side) => {
                let side = if side == Side::Server { "servers (serverAuth)" } else { "clients (clientAuth)" };
                write!(f, "the extended key usage of {place} forbids TLS {side}")?;
            }
            Reason::KeyUsage => write!(f, "the key usage of {place} forbids TLS")?,
            Reason::PathLength => write!(f, "{place} has a path length that is shorter than the chain below it")?,
            Reason::NotPermitted(name, by) => write!(f, "{name} of {place} is not permitted by the name constraints of {by}")?,
            Reason::Excluded(name, by) => write!(f, "{name} of {place} is excluded by the name constraints of {by}")?,
            Reason::Constraints(why, by) => write!(f, "{place} cannot be compared with the name constraints of {by}: {why}")?,
            Reason::Policies(fault) => write!(f, "{place} cannot be used: {fault}")?,
            Reason::NoPolicy => write!(f, "an authority of {place} demands a certificate policy, and the chain has none that is valid")?,
            Reason::TooManyPaths => write!(f, "the bundle has too many roots with the names of the authorities of {place}")?,
        }
        match self.release {
            Some(release) => write!(f, " (Envoy {release} refuses it)"),
            None if self.depends_on_choice => f.write_str(" (Envoy 1.36 and 1.40 choose differently among roots of one name)"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Refusal {}

/// Verifies `chain`, the leaf first, against `bundle` at `now`, in seconds since the Unix epoch, for both sides of TLS and all supported
/// releases of Envoy. Returns the path; if namesakes allow several, the longest.
///
/// # Errors
///
/// The first reason for which Envoy would refuse the chain, with any of the possible orders of namesakes in the bundle.
///
/// # Panics
///
/// Never; an empty chain is refused.
pub fn verify(chain: &[Certificate<'_>], bundle: &[Certificate<'_>], now: i64) -> Result<Path, Refusal> {
    let signatures = Signatures::default();
    let results =
        Release::ALL.map(|release| (release, Verifier { chain, bundle, now, release, paths: 0, signatures: &signatures }.verify()));
    match results {
        [(_, Ok(path)), (_, Ok(_))] => Ok(path),
        [(_, Err(refusal)), (_, Err(_))] => Err(refusal),
        [(release, Err(refusal)), _] | [_, (release, Err(refusal))] => Err(Refusal { release: Some(release), ..refusal }),
    }
}

/// The results of signatures, each of a certificate and its issuer.
type Signatures = RefCell<BTreeMap<(Place, Place), Result<(), Reason>>>;

struct Verifier<'a, 'b> {
    chain: &'b [Certificate<'a>],
    bundle: &'b [Certificate<'a>],
    now: i64,
    release: Release,
    /// The number of paths that were tried.
    paths: usize,
    /// The results for the certificates so far, each with its issuer. Signatures are expensive, and paths have them in common.
    signatures: &'b Signatures,
}

/// The roots that may follow in a path, and the one that does.
type Choice = (Vec<usize>, usize);

impl<'a, 'b> Verifier<'a, 'b> {
    fn verify(mut self) -> Result<Path, Refusal> {
        let leaf = Place::Chain(0);
        if self.chain.is_empty() {
            return Err(refusal(leaf, Reason::NoIssuer));
        }
        let (mut longest, mut first_refusal): (Option<Path>, Option<Refusal>) = (None, None);
        for places in self.build()? {
            match self.check(&places) {
                Ok(()) if longest.as_ref().is_none_or(|path| path.places.len() < places.len()) => longest = Some(Path { places }),
                Ok(()) => {}
                Err(refusal) => first_refusal = first_refusal.or(Some(refusal)),
            }
        }
        match first_refusal {
            Some(refusal) => Err(Refusal { depends_on_choice: longest.is_some(), ..refusal }),
            None => longest.ok_or(refusal(leaf, Reason::NoIssuer)),
        }
    }

    fn at(&self, place: Place) -> &'b Certificate<'a> {
        match place {
            Place::Chain(index) => &self.chain[index],
            Place::Bundle(index) => &self.bundle[index],
        }
    }

    /// Builds the paths that BoringSSL can build with any order of namesakes in the bundle.
    fn build(&mut self) -> Result<Vec<Vec<Place>>, Refusal> {
        let mut places = vec![Place::Chain(0)];
        let (mut last, mut own_root) = (0, None);
        // The leaf is among the certificates of the peer, in which BoringSSL looks for issuers.
        let mut unused: Vec<usize> = (0..self.chain.len()).collect();
        // From the chain, until the bundle has an issuer.
        while places.len() < MAX_PATH {
            let certificate = &self.chain[last];
            certificate.extensions().map_err(|fault| refusal(Place::Chain(last), Reason::Extension(fault)))?;
            if certificate.is_self_signed() || self.issuers(certificate).next().is_some() {
                break;
            }
            let Some(found) = unused.iter().position(|index| self.chain[*index].may_have_issued(certificate)) else { break };
            last = unused.remove(found);
            places.push(Place::Chain(last));
        }
        if self.chain[last].is_self_signed() {
            if places.len() == 1 {
                return self.alone();
            }
            own_root = places.pop();
            last = index_of_last(&places);
        }
        let mut paths = Vec::new();
        self.extend(places.clone(), &mut Vec::new(), &mut paths)?;
        if paths.iter().any(|path| path.len() > places.len()) {
            return Ok(paths);
        }
        // A leaf in the bundle is trusted itself.
        if let Some(index) = self.bundle.iter().position(|root| root.der == self.chain[0].der) {
            places[0] = Place::Bundle(index);
            return Ok(vec![places]);
        }
        match own_root {
            Some(root) => Err(refusal(root, Reason::SelfSigned)),
            None => Err(refusal(Place::Chain(last), self.why_no_issuer(&self.chain[last]))),
        }
    }

    /// A leaf that is signed by itself has to be in the bundle, without a namesake.
    fn alone(&self) -> Result<Vec<Vec<Place>>, Refusal> {
        let leaf = &self.chain[0];
        let issuers: Vec<usize> = self.issuers(leaf).collect();
        let is_there = !issuers.is_empty() && issuers.iter().all(|index| self.bundle[*index].der == leaf.der);
        if is_there {
            return Ok(issuers.into_iter().map(|index| vec![Place::Bundle(index)]).collect());
        }
        Err(refusal(Place::Chain(0), Reason::SelfSigned))
    }

    /// The places in the bundle of the certificates that may have signed `certificate`.
    fn issuers(&self, certificate: &Certificate<'a>) -> impl Iterator<Item = usize> {
        (0..self.bundle.len()).filter(|index| self.bundle[*index].may_have_issued(certificate))
    }

    /// Adds each continuation of `places` within the bundle to `paths`. Of the same candidates, BoringSSL takes the same one at each place.
    fn extend(&mut self, places: Vec<Place>, choices: &mut Vec<Choice>, paths: &mut Vec<Vec<Place>>) -> Result<(), Refusal> {
        let last = places.last().map_or(&self.chain[0], |place| self.at(*place));
        let ends = places.len() >= MAX_PATH || last.is_self_signed();
        let next: Vec<usize> = if ends { Vec::new() } else { self.issuers(last).collect() };
        if next.is_empty() {
            self.paths += 1;
            if self.paths > MAX_PATHS {
                return Err(refusal(Place::Chain(0), Reason::TooManyPaths));
            }
            paths.push(places);
            return Ok(());
        }
        let chosen = choices.iter().find(|(candidates, _)| *candidates == next).map(|(_, chosen)| *chosen);
        for index in chosen.map_or_else(|| next.clone(), |index| vec![index]) {
            let mut longer = places.clone();
            longer.push(Place::Bundle(index));
            choices.push((next.clone(), index));
            self.extend(longer, choices, paths)?;
            choices.pop();
        }
        Ok(())
    }

    fn why_no_issuer(&self, certificate: &Certificate<'a>) -> Reason {
        let mut all = self.bundle.iter().chain(self.chain);
        if all.any(|other| other.subject == certificate.issuer && other.signed != certificate.signed) {
            Reason::IssuerDoesNotFit
        } else {
            Reason::NoIssuer
        }
    }

    fn check(&self, places: &[Place]) -> Result<(), Refusal> {
        self.check_extensions(places)?;
        self.check_signatures_and_times(places)?;
        self.check_names(places)?;
        self.check_policies(places)
    }

    /// Checks the certificates of the chain; BoringSSL does not check those of the bundle.
    fn check_extensions(&self, places: &[Place]) -> Result<(), Refusal> {
        let mut below = 0;
        for (depth, place) in places.iter().enumerate().take_while(|(_, place)| matches!(place, Place::Chain(_))) {
            let (certificate, refused) = (self.at(*place), |reason| refusal(*place, reason));
            let extensions = certificate.extensions().map_err(|fault| refused(Reason::Extension(fault)))?;
            if extensions.has_unknown_critical {
                return Err(refused(Reason::CriticalExtension));
            }
            if depth > 0 && !certificate.is_authority() {
                return Err(refused(Reason::NotAnAuthority));
            }
            for side in [Side::Server, Side::Client] {
                if !extensions.allows(side) {
                    return Err(refused(Reason::ExtendedKeyUsage(side)));
                }
                if depth == 0 && !extensions.allows_leaf(side) {
                    return Err(refused(Reason::KeyUsage));
                }
            }
            let is_self_issued = certificate.is_self_issued();
            let counts = depth > 1 && (self.release == Release::V1_40 || !is_self_issued);
            // BoringSSL adds one to a signed number. The largest one becomes negative.
            let is_exceeded = |allowed: u64| allowed == i64::MAX.unsigned_abs() || below > allowed.saturating_add(1);
            if counts && extensions.path_len.is_some_and(is_exceeded) {
                return Err(refused(Reason::PathLength));
            }
            if !is_self_issued || depth == 0 && self.release == Release::V1_40 {
                below += 1;
            }
        }
        Ok(())
    }

    fn check_signatures_and_times(&self, places: &[Place]) -> Result<(), Refusal> {
        for (depth, place) in places.iter().enumerate().rev() {
            let certificate = self.at(*place);
            if let Some(issuer) = places.get(depth + 1) {
                let known = self.signatures.borrow().get(&(*place, *issuer)).copied();
                let result = known.unwrap_or_else(|| check_signature(certificate, self.at(*issuer)));
                self.signatures.borrow_mut().insert((*place, *issuer), result);
                result.map_err(|reason| refusal(*place, reason))?;
            }
            let (Some(begin), Some(end)) = (certificate.not_before.seconds(), certificate.not_after.seconds()) else {
                return Err(refusal(*place, Reason::TimeWithOffset));
            };
            if begin > self.now {
                return Err(refusal(*place, Reason::NotBegun));
            }
            if end <= self.now {
                return Err(refusal(*place, Reason::Ended));
            }
        }
        Ok(())
    }

    fn check_names(&self, places: &[Place]) -> Result<(), Refusal> {
        for (depth, place) in places.iter().enumerate().rev() {
            let certificate = self.at(*place);
            if depth > 0 && certificate.is_self_issued() {
                continue;
            }
            for by in places[depth + 1..].iter().rev() {
                let Some(constraints) = self.at(*by).extensions().ok().and_then(|own| own.constraints.as_ref()) else { continue };
                constraints.check(certificate, self.release).map_err(|violation| {
                    let reason = match violation {
                        Violation::NotPermitted(name) => Reason::NotPermitted(name, *by),
                        Violation::Excluded(name) => Reason::Excluded(name, *by),
                        Violation::Unusable(why) => Reason::Constraints(why, *by),
                    };
                    refusal(*place, reason)
                })?;
            }
        }
        Ok(())
    }

    fn check_policies(&self, places: &[Place]) -> Result<(), Refusal> {
        let below = &places[..places.len().saturating_sub(1)];
        let mut path = Vec::with_capacity(below.len());
        for place in below {
            let certificate = self.at(*place);
            let extensions = certificate.extensions().map_err(|fault| refusal(*place, Reason::Extension(fault)))?;
            path.push((&extensions.policies, certificate.is_self_issued()));
        }
        policy::check(&path).map_err(|refused| match refused {
            policy::Refused::Broken(index, fault) => refusal(below[index], Reason::Policies(fault)),
            policy::Refused::None => refusal(Place::Chain(0), Reason::NoPolicy),
        })
    }
}

fn index_of_last(places: &[Place]) -> usize {
    match places.last() {
        Some(Place::Chain(index)) => *index,
        _ => 0,
    }
}

fn check_signature(certificate: &Certificate<'_>, issuer: &Certificate<'_>) -> Result<(), Reason> {
    if certificate.algorithm != certificate.signed_algorithm {
        return Err(Reason::AlgorithmsDiffer);
    }
    signature::verify(&issuer.public_key, &certificate.algorithm, certificate.signed, certificate.signature).map_err(|error| match error {
        Unverified::Unsupported => Reason::Algorithm,
        Unverified::Wrong => Reason::Signature,
    })
}

fn refusal(place: Place, reason: Reason) -> Refusal {
    Refusal { place, reason, release: None, depends_on_choice: false }
}
