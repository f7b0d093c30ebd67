//! The SDS resource version of a certificate.
//!
//! The format is `<notAfter>-<renewAt>-<authority>-<content>`: Unix seconds in decimal, the authority that issued the certificate, and a
//! digest of the leaf certificate. A client that reconnects sends the version of the resource that it holds. So an agent that has
//! restarted, and stores nothing on disk, learns that the client has a valid certificate, until when, and which authority issued it.
//!
//! The authority is `v2.<trust domain>.<profile>`, followed by `.<level>` for each authority on the certificate's path, from the one that
//! signed the leaf to the root. Former releases wrote one digest of profile and root instead; such a version is still read. Every digest
//! has 16 lower-case hexadecimal digits. A version has at most [`MAX_CHARS`] characters. It is a scheduling hint and authorises nothing.

use std::{fmt, str::FromStr};

use aws_lc_rs::digest;

use crate::Identity;

/// Length of each digest, in characters.
const DIGEST_CHARS: usize = 16;
/// Maximum number of digits of a time: more than an X.509 time needs.
const MAX_SECONDS_CHARS: usize = 12;
/// Mark of the format.
const MARK: &str = "v2";
/// Maximum number of levels in a version. Of a longer path, the lowest levels and the root are kept.
pub const MAX_LEVELS: usize = 5;
/// Maximum length of a version, in characters.
pub const MAX_CHARS: usize = 2 * (MAX_SECONDS_CHARS + 1) + MARK.len() + (MAX_LEVELS + 3) * (DIGEST_CHARS + 1);

/// The first 8 bytes of a SHA-256 digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(u64);

impl Digest {
    /// Returns the digest of `parts`, one after the other.
    pub fn of(parts: &[&[u8]]) -> Self {
        let mut hash = digest::Context::new(&digest::SHA256);
        parts.iter().for_each(|part| hash.update(part));
        Self::first_bytes(hash.finish().as_ref())
    }

    /// Shortens a digest.
    pub fn first_bytes(digest: &[u8]) -> Self {
        Self(digest.iter().take(8).fold(0, |value, byte| (value << 8) | u64::from(*byte)))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for Digest {
    type Err = NoVersion;

    fn from_str(text: &str) -> Result<Self, NoVersion> {
        let is_digest = text.len() == DIGEST_CHARS && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if is_digest { u64::from_str_radix(text, 16).map(Self).map_err(|_| NoVersion) } else { Err(NoVersion) }
    }
}

/// The authority that issued a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authority {
    /// Trust domain, profile and path, each comparable alone.
    Path {
        /// Digest of the trust domain of the SPIFFE ID.
        trust_domain: Digest,
        /// The first bytes of the fingerprint of the profile.
        profile: Digest,
        /// Digests of the authorities on the path, from the one that signed the leaf to the root. Empty if the path is not known.
        levels: Vec<Digest>,
    },
    /// Written by a former release: one digest of the profile and the root. It shows neither the trust domain nor the intermediates.
    Former(Digest),
}

impl Authority {
    /// The authority of a certificate for `identity` with this path. Of more than [`MAX_LEVELS`] levels, the root and the lowest are kept.
    pub fn new(identity: &Identity, levels: &[Digest]) -> Self {
        let levels = match levels {
            [low @ .., root] if levels.len() > MAX_LEVELS => low.iter().take(MAX_LEVELS - 1).chain([root]).copied().collect(),
            levels => levels.to_vec(),
        };
        Self::Path { trust_domain: trust_domain(identity), profile: Digest::first_bytes(&identity.profile.fingerprint()), levels }
    }
}

/// Returns the digest of the trust domain of `identity`.
pub fn trust_domain(identity: &Identity) -> Digest {
    Digest::of(&[identity.spiffe_id.trust_domain().as_bytes()])
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path { trust_domain, profile, levels } => {
                write!(f, "{MARK}.{trust_domain}.{profile}")?;
                levels.iter().try_for_each(|level| write!(f, ".{level}"))
            }
            Self::Former(digest) => digest.fmt(f),
        }
    }
}

impl FromStr for Authority {
    type Err = NoVersion;

    fn from_str(text: &str) -> Result<Self, NoVersion> {
        let Some(digests) = text.strip_prefix(MARK) else { return text.parse().map(Self::Former) };
        let digests = digests.strip_prefix('.').ok_or(NoVersion)?.split('.').take(MAX_LEVELS + 3);
        match &digests.map(str::parse).collect::<Result<Vec<_>, _>>()?[..] {
            [trust_domain, profile, levels @ ..] if levels.len() <= MAX_LEVELS => {
                Ok(Self::Path { trust_domain: *trust_domain, profile: *profile, levels: levels.to_vec() })
            }
            _ => Err(NoVersion),
        }
    }
}

/// A parsed resource version of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// `notAfter` of the certificate, in Unix seconds.
    pub not_after: u64,
    /// Time of the renewal, in Unix seconds.
    pub renew_at: u64,
    /// The authority that issued the certificate.
    pub authority: Authority,
    /// Digest of the leaf certificate.
    pub content: Digest,
}

impl Version {
    /// Returns the version without the digest of the content. A response that makes the client keep its certificate has a version with
    /// this prefix.
    pub fn prefix(&self) -> String {
        format!("{}-{}-{}", self.not_after, self.renew_at, self.authority)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}-{}", self.not_after, self.renew_at, self.authority, self.content)
    }
}

/// The text is not the version of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is not of the form <notAfter>-<renewAt>-<authority>-<content>")]
pub struct NoVersion;

impl FromStr for Version {
    type Err = NoVersion;

    fn from_str(text: &str) -> Result<Self, NoVersion> {
        if text.len() > MAX_CHARS {
            return Err(NoVersion);
        }
        let mut parts = text.split('-');
        let mut next = || parts.next().ok_or(NoVersion);
        let (not_after, renew_at) = (seconds(next()?)?, seconds(next()?)?);
        let (authority, content) = (next()?.parse()?, next()?.parse()?);
        if parts.next().is_some() { Err(NoVersion) } else { Ok(Self { not_after, renew_at, authority, content }) }
    }
}

/// Returns the [prefix](Version::prefix) of the text of a version.
pub fn prefix(version: &str) -> &str {
    version.rsplit_once('-').map_or(version, |(prefix, _)| prefix)
}

fn seconds(text: &str) -> Result<u64, NoVersion> {
    let is_number = !text.is_empty() && text.len() <= MAX_SECONDS_CHARS && text.bytes().all(|b| b.is_ascii_digit());
    if is_number { text.parse().map_err(|_| NoVersion) } else { Err(NoVersion) }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::samples::identity;

    fn authorities() -> impl Strategy<Value = Authority> {
        let digest = || any::<u64>().prop_map(Digest);
        let path = (digest(), digest(), vec(digest(), 0..=MAX_LEVELS));
        let path = path.prop_map(|(trust_domain, profile, levels)| Authority::Path { trust_domain, profile, levels });
        prop_oneof![path, digest().prop_map(Authority::Former)]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            not_after in 0..1_000_000_000_000_u64,
            renew_at in 0..1_000_000_000_000_u64,
            authority in authorities(),
            content in any::<u64>().prop_map(Digest),
        ) {
            let version = Version { not_after, renew_at, authority, content };
            let text = version.to_string();
            prop_assert!(text.len() <= MAX_CHARS);
            prop_assert_eq!(prefix(&text), version.prefix());
            prop_assert_eq!(text.parse(), Ok(version));
        }
    }

    #[test]
    fn a_version_of_five_levels_has_fewer_than_200_characters() {
        let levels: Vec<Digest> = (0..7).map(Digest).collect();
        let Authority::Path { levels: kept, .. } = Authority::new(&identity("a"), &levels) else { panic!("a path") };
        assert_eq!(kept, [0, 1, 2, 3, 6].map(Digest), "the lowest levels and the root");
        let authority = Authority::new(&identity("a"), &levels[..MAX_LEVELS]);
        let longest = Version { not_after: 999_999_999_999, renew_at: 999_999_999_999, authority, content: Digest(u64::MAX) };
        assert_eq!(longest.to_string().len(), MAX_CHARS);
        const { assert!(MAX_CHARS < 200) };
    }

    #[test]
    fn a_version_of_a_former_release_is_read_as_such() {
        let version: Version = "1700003600-1700001800-0123456789abcdef-fedcba9876543210".parse().unwrap();
        assert_eq!(version.authority, Authority::Former(Digest(0x0123_4567_89ab_cdef)));
        assert_eq!(version.prefix(), "1700003600-1700001800-0123456789abcdef");
    }

    #[test]
    fn everything_else_is_refused() {
        let (digest, content) = ("0123456789abcdef", "fedcba9876543210");
        let digests = format!("{digest}-{content}");
        let of_levels = |levels: usize| format!("2-1-v2{}-{content}", format!(".{digest}").repeat(2 + levels));
        assert!(of_levels(0).parse::<Version>().is_ok() && of_levels(MAX_LEVELS).parse::<Version>().is_ok());
        for text in [
            "",
            "v1",
            &digests,
            &format!("1--{digests}"),
            &format!("+2-1-{digests}"),
            &format!("99999999999999999999-1-{digests}"),
            &format!("2-1-{digests}-x"),
            "2-1-0123456789ABCDEF-fedcba9876543210",
            "2-1-0123-fedcba9876543210",
            "2-1-+123456789abcdef-fedcba9876543210",
            "2-1-0123456789abcdef",
            &of_levels(MAX_LEVELS + 1),
            &of_levels(MAX_LEVELS + 2),
            &of_levels(10_000),
            &format!("2-1-v2-{content}"),
            &format!("2-1-v2.-{content}"),
            &format!("2-1-v2.{digest}-{content}"),
            &format!("2-1-v2.{digest}.{digest}.-{content}"),
            &format!("2-1-v2{digest}.{digest}-{content}"),
            &format!("2-1-v3.{digest}.{digest}-{content}"),
            &format!("2-1-v2.{digest}.0123-{content}"),
            &format!("2-1-v2.{digest}.{}-{content}", digest.to_uppercase()),
            &format!("2-1-v2.{digest}.{digest}"),
        ] {
            assert_eq!(text.parse::<Version>(), Err(NoVersion), "{text}");
        }
    }
}
