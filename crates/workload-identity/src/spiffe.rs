//! SPIFFE trust domains and IDs, checked against the SPIFFE ID specification, sections 2 and 2.1.

use std::{fmt, sync::Arc};

use super::Error;

/// A SPIFFE trust domain name, such as `cluster.local`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Checks `name` against the SPIFFE ID specification.
    pub fn new(name: &str) -> Result<Self, Error> {
        let fine = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if name.is_empty() || name.len() > 255 || !name.bytes().all(fine) {
            return Err(Error::TrustDomain(name.to_owned()));
        }
        Ok(Self(name.into()))
    }

    /// The bare name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `spiffe://<name>`: the name under which the domain's bundle is served.
    pub fn id(&self) -> String {
        format!("spiffe://{}", self.0)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A complete SPIFFE ID with a path, such as `spiffe://cluster.local/ns/shop/sa/cart`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId(Arc<str>);

impl SpiffeId {
    /// Checks `id` against the SPIFFE ID specification; a workload's ID has a path.
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

    /// The trust domain's name.
    pub fn trust_domain(&self) -> &str {
        // Checked when it was made.
        self.0.strip_prefix("spiffe://").and_then(|rest| rest.split('/').next()).unwrap_or_default()
    }

    /// The whole ID.
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
