//! Certificate profiles: how certificates of a class of workloads are issued.

use std::{fmt, sync::Arc, time::Duration};

use aws_lc_rs::digest;

/// Algorithm and size of a certificate's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyType {
    /// ECDSA on P-256: the default, which every peer accepts.
    EcdsaP256,
    /// ECDSA on P-384. Two Envoys can use it only if TLS 1.3 is set on the upstream.
    EcdsaP384,
    /// RSA with 2,048 bits.
    Rsa2048,
    /// RSA with 3,072 bits.
    Rsa3072,
}

impl KeyType {
    /// Every key type, in the order in which error messages list them.
    pub const ALL: [Self; 4] = [Self::EcdsaP256, Self::EcdsaP384, Self::Rsa2048, Self::Rsa3072];

    /// Returns the name used in the configuration, such as `ecdsa-p256`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::EcdsaP256 => "ecdsa-p256",
            Self::EcdsaP384 => "ecdsa-p384",
            Self::Rsa2048 => "rsa-2048",
            Self::Rsa3072 => "rsa-3072",
        }
    }
}

/// Name of one configured issuer. Each issuer has its own queue and its own backoff.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IssuerName(pub Arc<str>);

impl fmt::Display for IssuerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How certificates of a class of workloads are issued and renewed. Two profiles with the same [`fingerprint`](Self::fingerprint) issue
/// the same certificates.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// Name of the profile: `default`, or the configured one.
    pub name: Arc<str>,
    /// Name of the issuer that signs.
    pub issuer: IssuerName,
    /// The issuer object and the namespace of the requests, such as
    /// `ClusterIssuer mesh-ca of cert-manager.io in namespace sds-agent`. The operator can give the name of an issuer to another object;
    /// this field then differs.
    pub authority: Arc<str>,
    /// Type of the generated keys.
    pub key: KeyType,
    /// Requested lifetime. The issuer may return a certificate with another one, which is accepted.
    pub lifetime: Duration,
    /// Share of the lifetime after which a certificate is renewed, 0 to 1.
    pub renew_at: f64,
    /// Random spread around `renew_at`, as a share of it.
    pub jitter: f64,
    /// Template of the SPIFFE ID.
    pub spiffe_id: Arc<str>,
    /// Templates of the DNS names.
    pub dns_names: Vec<Arc<str>>,
    /// Whether each pod has its own certificate, instead of one for each service account.
    pub per_pod: bool,
    /// Part of the fingerprint. A higher value makes every certificate of the profile be issued again.
    pub epoch: u64,
}

impl Profile {
    /// Creates a profile named `default` that uses the issuer `default` and ECDSA keys on P-256. Certificates are renewed after half of
    /// `lifetime`, with a jitter of 0.1, and have the SPIFFE ID of the template `spiffe_id` and no DNS names.
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

    /// Returns the SHA-256 digest of the fields that determine the content of a certificate. The renewal schedule, the name of the profile
    /// and the name of the issuer are not included: a change of those reissues no certificate.
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
