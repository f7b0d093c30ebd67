//! What a resource name selects. A name never authorises: it selects among what the attested identity may have.

use workload_identity::{Identity, TrustDomain};

/// The explicit wildcard of the xDS protocol.
pub const WILDCARD: &str = "*";

/// What a name stands for, for one caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The caller's own certificate and key.
    Certificate,
    /// The bundle of the agent's trust domain.
    OwnBundle,
    /// Another trust domain's bundle.
    FederatedBundle(TrustDomain),
    /// Not ours: left unanswered, and never a reason to fail the stream.
    Unknown,
}

/// The well-known resource names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// The workload's own certificate: `default`.
    pub certificate: String,
    /// The bundle of the agent's trust domain: `ROOTCA`.
    pub bundle: String,
}

impl Default for Names {
    fn default() -> Self {
        Self { certificate: "default".into(), bundle: "ROOTCA".into() }
    }
}

/// The names that the agent answers to.
#[derive(Debug, Clone)]
pub struct Directory {
    names: Names,
    own_domain: String,
}

impl Directory {
    /// The configured names, and `spiffe://<trust domain>`.
    pub fn new(names: Names, trust_domain: &TrustDomain) -> Self {
        Self { names, own_domain: trust_domain.id() }
    }

    /// What a wildcard subscription gets.
    pub fn wildcard(&self) -> [Box<str>; 2] {
        [self.names.certificate.as_str().into(), self.names.bundle.as_str().into()]
    }

    /// What `name` stands for when `identity` asks.
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
