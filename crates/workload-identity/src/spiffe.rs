//! SPIFFE trust domains and IDs, checked against section 2 of the SPIFFE ID specification.

use std::{fmt, sync::Arc};

use super::Error;

/// A valid SPIFFE trust domain name, such as `cluster.local` (SPIFFE ID specification, section 2.1).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Parses a trust domain name.
    ///
    /// # Errors
    ///
    /// [`Error::TrustDomain`] if `name` is empty, has more than 255 bytes, or has a character other than `a-z`, `0-9`, `.`, `-` and `_`.
    pub fn new(name: &str) -> Result<Self, Error> {
        let fine = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if name.is_empty() || name.len() > 255 || !name.bytes().all(fine) {
            return Err(Error::TrustDomain(name.to_owned()));
        }
        Ok(Self(name.into()))
    }

    /// Returns the name without `spiffe://`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns `spiffe://<name>`, the name of the secret with the domain's trust bundle.
    pub fn id(&self) -> String {
        format!("spiffe://{}", self.0)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A valid SPIFFE ID of a workload, such as `spiffe://cluster.local/ns/shop/sa/cart` (SPIFFE ID specification, sections 2 to 2.3).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId(Arc<str>);

impl SpiffeId {
    /// Parses the SPIFFE ID of a workload, which has a path.
    ///
    /// # Errors
    ///
    /// [`Error::SpiffeId`] with the cause if `id` has more than 2,048 bytes, another scheme, no path, or an invalid path segment.
    /// [`Error::TrustDomain`] if the trust domain is invalid.
    pub fn new(id: &str) -> Result<Self, Error> {
        let wrong = |why| Err(Error::SpiffeId { id: id.to_owned(), why });
        if id.len() > 2048 {
            return wrong("it is longer than 2,048 bytes");
        }
        let Some(rest) = id.strip_prefix("spiffe://") else {
            return wrong("it does not begin with spiffe://");
        };
        let Some((domain, path)) = rest.split_once('/') else {
            return wrong("it has no path");
        };
        TrustDomain::new(domain)?;
        for segment in path.split('/') {
            if segment.is_empty() {
                return wrong("a path segment is empty");
            }
            if segment == "." || segment == ".." {
                return wrong("a path segment is relative");
            }
            if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')) {
                return wrong("a path segment has a character other than letters, digits, '.', '-' and '_'");
            }
        }
        Ok(Self(id.into()))
    }

    /// Returns the name of the trust domain.
    pub fn trust_domain(&self) -> &str {
        // `new` has checked the format.
        self.0.strip_prefix("spiffe://").and_then(|rest| rest.split('/').next()).unwrap_or_default()
    }

    /// Returns the whole ID, with the scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_domains_follow_the_specification() {
        for good in ["cluster.local", "a", "td-1_x.example"] {
            assert_eq!(TrustDomain::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "Cluster.local", "a/b", "a:1", "spiffe://a", &"a".repeat(256)] {
            assert_eq!(TrustDomain::new(bad), Err(Error::TrustDomain(bad.to_owned())), "{bad}");
        }
    }

    #[test]
    fn spiffe_ids_follow_the_specification() {
        assert!(SpiffeId::new("spiffe://cluster.local/ns/a/sa/b").is_ok());
        let long = format!("spiffe://a/{}", "x".repeat(2048));
        for bad in [
            "https://a/b",
            "spiffe://a",
            "spiffe://a/",
            "spiffe://a/b/",
            "spiffe://a//b",
            "spiffe://a/../b",
            "spiffe://a/b%20",
            "spiffe://A/b",
            &long,
        ] {
            assert!(SpiffeId::new(bad).is_err(), "{bad}");
        }
    }
}
