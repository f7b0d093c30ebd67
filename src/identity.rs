//! Who a workload is: SPIFFE IDs, trust domains, profiles, and the rule that turns an attested [`Workload`] into an [`Identity`].
//!
//! Owns the naming rules of the SPIFFE ID specification (a trust domain of at most 255 bytes, an ID of at most 2,048 bytes) and the
//! operator's templates. A caller owes nothing: a value of these types has been checked. Nothing here reads a clock or does I/O.

use std::{
    fmt,
    hash::{Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use aws_lc_rs::digest;

/// Why a string is no SPIFFE name, or a workload has no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The trust domain breaks the SPIFFE ID specification, section 2.1.
    #[error("trust domain {0:?} is not valid: use 1 to 255 lower-case letters, digits, '.', '-' or '_'")]
    TrustDomain(String),
    /// The SPIFFE ID breaks the specification, section 2.
    #[error("SPIFFE ID {id:?} is not valid: {why}")]
    SpiffeId {
        /// The rejected text.
        id: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A template names a field that this kind of workload does not have.
    #[error("template {template:?} asks for {{{field}}}, which a workload of this kind does not have")]
    Template {
        /// The template as configured.
        template: String,
        /// The unknown placeholder.
        field: String,
    },
    /// The workload runs without a service account (a static pod).
    #[error("pod {pod} has no service account and therefore no identity")]
    NoServiceAccount {
        /// `namespace/name`.
        pod: String,
    },
}

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

/// One pod, as the evidence for a request.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PodRef {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its UID: a pod recreated under the same name is another pod.
    pub uid: Arc<str>,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What attestation proved about a caller.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Workload {
    /// A pod on this node.
    Pod {
        /// The pod itself.
        pod: PodRef,
        /// The service account it runs as; static pods have none.
        service_account: Option<Arc<str>>,
    },
    /// A process of a local user, for development and bare machines.
    Unix {
        /// The effective user id at connect time.
        uid: u32,
    },
}

impl Workload {
    /// The pod, where there is one.
    pub fn pod(&self) -> Option<&PodRef> {
        match self {
            Self::Pod { pod, .. } => Some(pod),
            Self::Unix { .. } => None,
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod { pod, .. } => write!(f, "pod {pod}"),
            Self::Unix { uid } => write!(f, "uid {uid}"),
        }
    }
}

/// The kind and size of a certificate's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyType {
    /// ECDSA on P-256: the default, and the one every peer accepts.
    EcdsaP256,
    /// ECDSA on P-384: between two Envoys only with TLS 1.3 set on the upstream.
    EcdsaP384,
    /// RSA with 2,048 bits.
    Rsa2048,
    /// RSA with 3,072 bits.
    Rsa3072,
}

impl KeyType {
    /// Every kind, in the order in which they are offered.
    pub const ALL: [Self; 4] = [Self::EcdsaP256, Self::EcdsaP384, Self::Rsa2048, Self::Rsa3072];

    /// The name used in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::EcdsaP256 => "ecdsa-p256",
            Self::EcdsaP384 => "ecdsa-p384",
            Self::Rsa2048 => "rsa-2048",
            Self::Rsa3072 => "rsa-3072",
        }
    }
}

/// The name of one configured issuer; each has its own queue and its own trouble.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IssuerName(pub Arc<str>);

impl fmt::Display for IssuerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the operator wants for a class of workloads. Two profiles with the same [`fingerprint`](Self::fingerprint) issue alike.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// Its name: `default`, or the place in the list of profiles.
    pub name: Arc<str>,
    /// Which issuer signs.
    pub issuer: IssuerName,
    /// The key to make.
    pub key: KeyType,
    /// The lifetime to ask for; what comes back is believed.
    pub lifetime: Duration,
    /// The share of the lifetime after which a certificate is renewed, 0 to 1.
    pub renew_at: f64,
    /// The spread around `renew_at`, as a share of it.
    pub jitter: f64,
    /// The SPIFFE ID's template.
    pub spiffe_id: Arc<str>,
    /// DNS names' templates.
    pub dns_names: Vec<Arc<str>>,
    /// One certificate for each pod, not for each service account.
    pub per_pod: bool,
    /// Raising it makes every certificate of the profile foreign, so that it is issued anew.
    pub epoch: u64,
}

impl Profile {
    /// A digest of all that decides what a certificate of this profile is. Neither the schedule nor the profile's place in the list
    /// is part of it: changing those reissues nothing.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hash = digest::Context::new(&digest::SHA256);
        let mut field = |bytes: &[u8]| {
            hash.update(&(bytes.len() as u64).to_be_bytes());
            hash.update(bytes);
        };
        field(self.issuer.0.as_bytes());
        field(self.key.as_str().as_bytes());
        field(&self.lifetime.as_secs().to_be_bytes());
        field(self.spiffe_id.as_bytes());
        for name in &self.dns_names {
            field(name.as_bytes());
        }
        field(&[u8::from(self.per_pod)]);
        field(&self.epoch.to_be_bytes());
        let mut out = [0; 32];
        out.copy_from_slice(hash.finish().as_ref());
        out
    }
}

/// What one certificate is for: the key of the store. Callers with equal identities share a certificate.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The URI SAN.
    pub spiffe_id: SpiffeId,
    /// The DNS SANs.
    pub dns_names: Arc<[String]>,
    /// How to issue.
    pub profile: Arc<Profile>,
    /// The pod, where the profile gives every pod a certificate of its own.
    pub pod_uid: Option<Arc<str>>,
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        self.spiffe_id == other.spiffe_id
            && self.pod_uid == other.pod_uid
            && self.dns_names == other.dns_names
            && (Arc::ptr_eq(&self.profile, &other.profile) || self.profile.fingerprint() == other.profile.fingerprint())
    }
}

impl Eq for Identity {}

impl Hash for Identity {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.spiffe_id.hash(state);
        self.pod_uid.hash(state);
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.spiffe_id.fmt(f)
    }
}

/// The rule from workloads to identities, as configured.
#[derive(Debug, Clone)]
pub struct Resolver {
    /// The agent's own trust domain.
    pub trust_domain: TrustDomain,
    /// The profile of everything that no other rule takes.
    pub default_profile: Arc<Profile>,
}

impl Resolver {
    /// The identity of `workload`.
    pub fn resolve(&self, workload: &Workload) -> Result<Identity, Error> {
        if let Workload::Pod { pod, service_account: None } = workload {
            return Err(Error::NoServiceAccount { pod: pod.to_string() });
        }
        let profile = &self.default_profile;
        let spiffe_id = SpiffeId::new(&self.render(&profile.spiffe_id, workload)?)?;
        let dns_names = profile.dns_names.iter().map(|t| self.render(t, workload)).collect::<Result<_, _>>()?;
        let pod_uid = workload.pod().filter(|_| profile.per_pod).map(|pod| pod.uid.clone());
        Ok(Identity { spiffe_id, dns_names, profile: profile.clone(), pod_uid })
    }

    fn render(&self, template: &str, workload: &Workload) -> Result<String, Error> {
        render(template, |field| placeholder(field, &self.trust_domain, workload))
    }
}

/// What a template's `{field}` stands for; a kind of workload does not have every field.
pub fn placeholder(field: &str, trust_domain: &TrustDomain, workload: &Workload) -> Option<String> {
    match (field, workload) {
        ("trustDomain", _) => Some(trust_domain.to_string()),
        ("namespace", Workload::Pod { pod, .. }) => Some(pod.namespace.to_string()),
        ("podName", Workload::Pod { pod, .. }) => Some(pod.name.to_string()),
        ("podUid", Workload::Pod { pod, .. }) => Some(pod.uid.to_string()),
        ("serviceAccount", Workload::Pod { service_account: Some(name), .. }) => Some(name.to_string()),
        ("uid", Workload::Unix { uid }) => Some(uid.to_string()),
        _ => None,
    }
}

/// Replaces each `{field}` of `template` by what `value` says; a field without a value is an error that names it.
pub fn render(template: &str, value: impl Fn(&str) -> Option<String>) -> Result<String, Error> {
    let mut out = String::with_capacity(template.len() + 32);
    let mut rest = template;
    while let Some(open) = rest.find('{') {
        out.push_str(&rest[..open]);
        let after = &rest[open + 1..];
        let end = after.find('}').unwrap_or(after.len());
        let field = &after[..end];
        match value(field) {
            Some(text) => out.push_str(&text),
            None => return Err(Error::Template { template: template.to_owned(), field: field.to_owned() }),
        }
        rest = after.get(end + 1..).unwrap_or_default();
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An identity for the tests of other modules.
    pub(crate) fn identity(service_account: &str) -> Arc<Identity> {
        Arc::new(resolver(profile(ISTIO)).resolve(&pod(Some(service_account), "u1")).unwrap())
    }

    fn profile(template: &str) -> Profile {
        Profile {
            name: "default".into(),
            issuer: IssuerName("mesh".into()),
            key: KeyType::EcdsaP256,
            lifetime: Duration::from_secs(3600),
            renew_at: 0.5,
            jitter: 0.1,
            spiffe_id: template.into(),
            dns_names: vec!["{serviceAccount}.{namespace}.svc".into()],
            per_pod: false,
            epoch: 0,
        }
    }

    fn resolver(profile: Profile) -> Resolver {
        Resolver { trust_domain: TrustDomain::new("cluster.local").unwrap(), default_profile: Arc::new(profile) }
    }

    fn pod(service_account: Option<&str>, uid: &str) -> Workload {
        Workload::Pod {
            pod: PodRef { namespace: "shop".into(), name: "cart-1".into(), uid: uid.into() },
            service_account: service_account.map(Into::into),
        }
    }

    const ISTIO: &str = "spiffe://{trustDomain}/ns/{namespace}/sa/{serviceAccount}";

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

    #[test]
    fn a_pod_gets_the_identity_of_its_service_account() {
        let identity = resolver(profile(ISTIO)).resolve(&pod(Some("cart"), "u1")).unwrap();
        assert_eq!(identity.spiffe_id.as_str(), "spiffe://cluster.local/ns/shop/sa/cart");
        assert_eq!(&*identity.dns_names, ["cart.shop.svc".to_owned()]);
    }

    #[test]
    fn siblings_share_an_identity_unless_the_profile_says_per_pod() {
        let shared = resolver(profile(ISTIO));
        assert_eq!(shared.resolve(&pod(Some("cart"), "u1")).unwrap(), shared.resolve(&pod(Some("cart"), "u2")).unwrap());
        let own = resolver(Profile { per_pod: true, ..profile(ISTIO) });
        assert_ne!(own.resolve(&pod(Some("cart"), "u1")).unwrap(), own.resolve(&pod(Some("cart"), "u2")).unwrap());
    }

    #[test]
    fn a_static_pod_has_no_identity() {
        let error = resolver(profile(ISTIO)).resolve(&pod(None, "u1")).unwrap_err();
        assert_eq!(error.to_string(), "pod shop/cart-1 has no service account and therefore no identity");
    }

    #[test]
    fn a_template_that_does_not_fit_names_the_field() {
        let error = resolver(profile(ISTIO)).resolve(&Workload::Unix { uid: 7 }).unwrap_err();
        assert!(error.to_string().contains("{namespace}"), "{error}");
    }

    #[test]
    fn the_epoch_changes_the_fingerprint_and_the_schedule_does_not() {
        let base = profile(ISTIO);
        assert_ne!(base.fingerprint(), Profile { epoch: 1, ..base.clone() }.fingerprint());
        assert_eq!(base.fingerprint(), Profile { renew_at: 0.7, ..base.clone() }.fingerprint());
    }
}
