//! Resource names. A name authorises nothing: it selects among the resources of the attested identity.

use workload_identity::{Identity, TrustDomain};

/// The explicit wildcard of the xDS protocol.
pub const WILDCARD: &str = "*";

/// The resource that a name selects for one caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The caller's own certificate and key.
    Certificate,
    /// The bundle of the server's trust domain.
    OwnBundle,
    /// The bundle of another trust domain.
    FederatedBundle(TrustDomain),
    /// Unknown. The name gets no response, and the stream stays open.
    Unknown,
}

/// The configurable resource names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// Selects the certificate of the caller. Default: `default`.
    pub certificate: String,
    /// Selects the bundle of the server's trust domain. Default: `ROOTCA`.
    pub bundle: String,
}

impl Default for Names {
    fn default() -> Self {
        Self { certificate: "default".into(), bundle: "ROOTCA".into() }
    }
}

/// Maps resource names to targets.
#[derive(Debug, Clone)]
pub struct Directory {
    names: Names,
    own_domain: String,
}

impl Directory {
    /// Uses the configured names. `spiffe://<trust domain>` also selects the bundle of `trust_domain`.
    pub fn new(names: Names, trust_domain: &TrustDomain) -> Self {
        Self { names, own_domain: trust_domain.id() }
    }

    /// The names of a wildcard subscription: the certificate and the bundle.
    pub fn wildcard(&self) -> [Box<str>; 2] {
        [self.names.certificate.as_str().into(), self.names.bundle.as_str().into()]
    }

    /// Returns the target of `name` for a caller with `identity`.
    pub fn target(&self, name: &str, identity: &Identity) -> Target {
        if name == self.names.certificate || name == identity.spiffe_id.as_str() {
            Target::Certificate
        } else if name == self.names.bundle || name == self.own_domain {
            Target::OwnBundle
        } else {
            match name.strip_prefix("spiffe://").map(TrustDomain::new) {
                Some(Ok(domain)) => Target::FederatedBundle(domain),
                _ => Target::Unknown,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use workload_identity::{IssuerName, KeyType, Profile, SpiffeId};

    use super::*;

    #[test]
    fn names_select_only_what_the_caller_may_have() {
        let profile = Profile {
            name: "default".into(),
            issuer: IssuerName("mesh".into()),
            authority: "mesh-ca".into(),
            key: KeyType::EcdsaP256,
            lifetime: Duration::from_secs(3600),
            renew_at: 0.5,
            jitter: 0.1,
            spiffe_id: "".into(),
            dns_names: Vec::new(),
            per_pod: false,
            epoch: 0,
        };
        let id = SpiffeId::new("spiffe://td/ns/a/sa/b").unwrap();
        let identity = Identity { spiffe_id: id, dns_names: [].into(), profile: Arc::new(profile), pod_uid: None, account: None };
        let directory = Directory::new(Names::default(), &TrustDomain::new("td").unwrap());
        let target = |name: &str| directory.target(name, &identity);

        assert_eq!(target("default"), Target::Certificate);
        assert_eq!(target("spiffe://td/ns/a/sa/b"), Target::Certificate);
        assert_eq!(target("ROOTCA"), Target::OwnBundle);
        assert_eq!(target("spiffe://td"), Target::OwnBundle);
        assert_eq!(target("spiffe://other.example"), Target::FederatedBundle(TrustDomain::new("other.example").unwrap()));
        for foreign in ["spiffe://td/ns/a/sa/other", "file-root:system", "kubernetes://x", "", "DEFAULT"] {
            assert_eq!(target(foreign), Target::Unknown, "{foreign}");
        }
    }
}
