//! Resource names. A name authorises nothing: it selects among the resources of the attested identity.

use workload_identity::{Identity, SpiffeId, TrustDomain};

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

/// The SPIFFE IDs that the caller of one stream had before, as far as the stream watches them as names. They stay names of its certificate:
/// the client keeps to the name that it asked by.
#[derive(Debug, Default)]
pub struct FormerIds(Vec<SpiffeId>);

impl FormerIds {
    /// Records that the identity changes from `before`. `is_watched` says whether the stream watches a name.
    pub fn identity_changes(&mut self, before: &Identity, is_watched: impl Fn(&str) -> bool) {
        let id = &before.spiffe_id;
        if !self.0.contains(id) && is_watched(id.as_str()) {
            self.0.push(id.clone());
        }
    }

    /// Forgets the names that the stream no longer watches.
    pub fn keep(&mut self, is_watched: impl Fn(&str) -> bool) {
        self.0.retain(|id| is_watched(id.as_str()));
    }

    fn contains(&self, name: &str) -> bool {
        self.0.iter().any(|id| id.as_str() == name)
    }
}

/// The names of one stream: those of the [`Directory`] for the caller's identity, and those of the caller's former identities.
#[derive(Debug, Clone, Copy)]
pub struct StreamNames<'a> {
    /// Maps names to targets.
    pub directory: &'a Directory,
    /// The current identity of the caller.
    pub identity: &'a Identity,
    /// The former names of the caller's certificate.
    pub former: &'a FormerIds,
}

impl StreamNames<'_> {
    /// Returns the target of `name`.
    pub fn target(&self, name: &str) -> Target {
        match self.directory.target(name, self.identity) {
            Target::Unknown if self.former.contains(name) => Target::Certificate,
            target => target,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use workload_identity::{IssuerName, KeyType, Profile, samples::identity};

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

    #[test]
    fn a_former_spiffe_id_stays_a_name_while_it_is_watched() {
        let directory = Directory::new(Names::default(), &TrustDomain::new("cluster.local").unwrap());
        let (before, now) = (identity("a"), identity("b"));
        let (watched, other) = (before.spiffe_id.as_str(), now.spiffe_id.as_str());
        let mut former = FormerIds::default();
        let target = |former: &FormerIds, name: &str| StreamNames { directory: &directory, identity: &now, former }.target(name);

        former.identity_changes(&before, |name| name == "default");
        assert_eq!(target(&former, watched), Target::Unknown, "the stream does not ask by it");
        former.identity_changes(&before, |name| [watched, "default"].contains(&name));
        former.keep(|name| name == watched);
        assert_eq!((target(&former, watched), target(&former, other)), (Target::Certificate, Target::Certificate));
        former.keep(|name| name == "default");
        assert_eq!(target(&former, watched), Target::Unknown, "the client has unsubscribed");
    }
}
