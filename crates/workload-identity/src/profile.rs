//! Profiles: what the operator wants of the certificates of a class of workloads.

use std::{fmt, sync::Arc, time::Duration};

use aws_lc_rs::digest;

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
    /// Its name: `default`, or the one that the operator gave it.
    pub name: Arc<str>,
    /// Which issuer signs.
    pub issuer: IssuerName,
    /// Who that issuer is and where it is asked, such as `ClusterIssuer mesh-ca of cert-manager.io in namespace sds-agent`: an issuer's name
    /// may move to another, this may not.
    pub authority: Arc<str>,
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
    /// A profile named `default`, of an issuer of that name, for ECDSA keys on P-256: certificates are renewed after half of `lifetime`, give
    /// or take a tenth of that, and name the workload by the template `spiffe_id` alone.
    pub fn new(spiffe_id: &str, lifetime: Duration) -> Self {
        Self {
            name: "default".into(),
            issuer: IssuerName("default".into()),
            authority: "default".into(),
            key: KeyType::EcdsaP256,
            lifetime,
            renew_at: 0.5,
            jitter: 0.1,
            spiffe_id: spiffe_id.into(),
            dns_names: Vec::new(),
            per_pod: false,
            epoch: 0,
        }
    }

    /// A digest of all that decides what a certificate of this profile is. The schedule, the profile's name and place in the list, and
    /// its issuer's name are no part of it: changing those reissues nothing.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hash = digest::Context::new(&digest::SHA256);
        let mut field = |bytes: &[u8]| {
            hash.update(&(bytes.len() as u64).to_be_bytes());
            hash.update(bytes);
        };
        field(self.authority.as_bytes());
        field(self.key.as_str().as_bytes());
        field(&self.lifetime.as_secs().to_be_bytes());
        field(self.spiffe_id.as_bytes());
        field(&(self.dns_names.len() as u64).to_be_bytes());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{ISTIO, profile};

    #[test]
    fn the_fingerprint_covers_certificate_content_and_not_names() {
        let base = profile(ISTIO);
        let changed = |change: fn(&mut Profile)| {
            let mut profile = base.clone();
            change(&mut profile);
            profile.fingerprint() != base.fingerprint()
        };
        let certificates: [fn(&mut Profile); 7] = [
            |p| p.epoch = 1,
            |p| p.authority = "ClusterIssuer other of cert-manager.io".into(),
            |p| p.key = KeyType::Rsa2048,
            |p| p.lifetime = Duration::from_secs(7200),
            |p| p.spiffe_id = "spiffe://{trustDomain}/{namespace}/{serviceAccount}".into(),
            |p| p.dns_names.clear(),
            |p| p.per_pod = true,
        ];
        for (index, change) in certificates.into_iter().enumerate() {
            assert!(changed(change), "{index}");
        }
        let rest: [fn(&mut Profile); 4] =
            [|p| p.renew_at = 0.7, |p| p.jitter = 0.0, |p| p.name = "other".into(), |p| p.issuer = IssuerName("other".into())];
        for (index, change) in rest.into_iter().enumerate() {
            assert!(!changed(change), "{index}");
        }
    }
}
