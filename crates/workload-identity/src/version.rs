//! The SDS resource version of a certificate.
//!
//! The format is `<notAfter>-<renewAt>-<authority>-<content>`: Unix seconds in decimal, and two digests of 16 lower-case hexadecimal
//! digits. A client that reconnects sends the version of the resource that it holds. So an agent that has restarted, and stores nothing
//! on disk, learns that the client has a valid certificate, and until when.

use std::{fmt, str::FromStr};

/// Length of each digest, in characters.
const DIGEST_CHARS: usize = 16;
/// Maximum number of digits of a time: more than an X.509 time needs.
const MAX_SECONDS_CHARS: usize = 12;

/// A parsed resource version of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// `notAfter` of the certificate, in Unix seconds.
    pub not_after: u64,
    /// Time of the renewal, in Unix seconds.
    pub renew_at: u64,
    /// Digest of the profile and the trust anchor.
    pub authority: String,
    /// Digest of the leaf certificate.
    pub content: String,
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
        let mut parts = text.split('-');
        let mut next = || parts.next().ok_or(NoVersion);
        let (not_after, renew_at) = (seconds(next()?)?, seconds(next()?)?);
        let (authority, content) = (digest(next()?)?, digest(next()?)?);
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

fn digest(text: &str) -> Result<String, NoVersion> {
    let is_digest = text.len() == DIGEST_CHARS && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if is_digest { Ok(text.to_owned()) } else { Err(NoVersion) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(
            not_after in 0..1_000_000_000_000_u64,
            renew_at in 0..1_000_000_000_000_u64,
            authority in "[0-9a-f]{16}",
            content in "[0-9a-f]{16}",
        ) {
            let version = Version { not_after, renew_at, authority, content };
            let text = version.to_string();
            prop_assert_eq!(prefix(&text), version.prefix());
            prop_assert_eq!(text.parse(), Ok(version));
        }
    }

    #[test]
    fn everything_else_is_refused() {
        let digests = "0123456789abcdef-fedcba9876543210";
        for text in [
            "",
            "v1",
            digests,
            &format!("1--{digests}"),
            &format!("+2-1-{digests}"),
            &format!("99999999999999999999-1-{digests}"),
            &format!("2-1-{digests}-x"),
            "2-1-0123456789ABCDEF-fedcba9876543210",
            "2-1-0123-fedcba9876543210",
            "2-1-0123456789abcdef",
        ] {
            assert_eq!(text.parse::<Version>(), Err(NoVersion), "{text}");
        }
    }
}
