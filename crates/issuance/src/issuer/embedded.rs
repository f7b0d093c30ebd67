//! A certificate authority in memory, for development and tests: a root and an intermediate that end with the process.
//!
//! It signs the CSR that every other issuer receives too, so that an order takes the same path as with a real upstream.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use agent_runtime::clock::Clock;
use futures::future::BoxFuture;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer as Signer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::CertificateSigningRequestDer;
use sds_server::material::{CertificateChain, TrustBundle};

use crate::issuer::{Error, Issued, Issuer, Order, Phase, Retry, csr, verify};

/// Lifetime of the root and the intermediate: 10 years.
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Maximum backdating of `notBefore`, for peers whose clocks are behind: 10 s.
const BACKDATE: Duration = Duration::from_secs(10);

/// A root and an intermediate in memory. Its certificates have the lifetime of the profile, and end with the intermediate at the latest.
pub struct Embedded {
    inner: Arc<Authority>,
    clock: Arc<dyn Clock>,
}

struct Authority {
    root: Certificate,
    intermediate: Certificate,
    signer: Signer<'static, KeyPair>,
    expires: SystemTime,
}

impl fmt::Debug for Embedded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Embedded")
    }
}

impl Embedded {
    /// Generates a root and an intermediate, named after the trust domain.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Configuration`] if a key or a certificate cannot be generated.
    pub fn new(trust_domain: &str, clock: Arc<dyn Clock>) -> Result<Self, Error> {
        let authority = Authority::new(trust_domain, clock.now())
            .map_err(|e| Error::Configuration(format!("cannot make the embedded authority: {e}")))?;
        Ok(Self { inner: Arc::new(authority), clock })
    }

    /// Returns the root as the trust bundle.
    ///
    /// # Errors
    ///
    /// Returns the error of [`TrustBundle::from_certificates`].
    pub fn bundle(&self) -> Result<TrustBundle, sds_server::material::Error> {
        TrustBundle::from_certificates(vec![self.inner.root.der().clone()])
    }

    /// Signs a CSR, for tests that play an upstream.
    #[cfg(any(test, feature = "testing"))]
    #[allow(clippy::unwrap_used, reason = "for tests alone")]
    pub fn sign(&self, csr_der: Vec<u8>, lifetime: Duration) -> Vec<u8> {
        self.inner.sign(csr_der, lifetime, self.clock.now()).unwrap()
    }
}

impl Authority {
    fn new(trust_domain: &str, now: SystemTime) -> Result<Self, rcgen::Error> {
        let root_key = KeyPair::generate()?;
        let params = authority_params(&format!("{trust_domain} development root"), BasicConstraints::Constrained(1), now);
        let root = params.self_signed(&root_key)?;
        let root_signer = Signer::new(params, root_key);

        let key = KeyPair::generate()?;
        let mut params = authority_params(&format!("{trust_domain} development intermediate"), BasicConstraints::Constrained(0), now);
        params.use_authority_key_identifier_extension = true;
        let intermediate = params.signed_by(&key, &root_signer)?;
        Ok(Self { root, intermediate, signer: Signer::new(params, key), expires: now + AUTHORITY_LIFETIME })
    }

    fn sign(&self, csr_der: Vec<u8>, lifetime: Duration, now: SystemTime) -> Result<Vec<u8>, rcgen::Error> {
        let mut request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr_der))?;
        let params = &mut request.params;
        // At most a twentieth of the lifetime is backdated.
        params.not_before = (now - BACKDATE.min(lifetime / 20)).into();
        // A certificate must not outlive its signer.
        params.not_after = (now + lifetime.min(AUTHORITY_LIFETIME)).min(self.expires).into();
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // RFC 8813 does not allow keyEncipherment with elliptic-curve keys.
        if request.public_key.algorithm() == &rcgen::PKCS_RSA_SHA256 {
            params.key_usages.push(KeyUsagePurpose::KeyEncipherment);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = request.signed_by(&self.signer)?;
        Ok([leaf.pem(), self.intermediate.pem()].concat().into_bytes())
    }
}

fn authority_params(name: &str, constraints: BasicConstraints, now: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + AUTHORITY_LIFETIME).into();
    params
}

impl Issuer for Embedded {
    fn issue(&self, order: Order) -> BoxFuture<'static, Result<Issued, Error>> {
        let (authority, clock) = (self.inner.clone(), self.clock.clone());
        Box::pin(async move {
            let start = Instant::now();
            let made = csr::generate(&order.identity).await?;
            let created = Instant::now();
            let pem = authority.sign(made.csr_der, order.identity.profile.lifetime, clock.now()).map_err(|e| Error::Failed {
                request: "embedded".into(),
                reason: "SigningFailed".into(),
                message: e.to_string(),
                retry: Retry::Backoff,
            })?;
            let phases = vec![(Phase::Create, created - start), (Phase::Sign, created.elapsed())];
            let chain = CertificateChain::from_pem(&pem).map_err(verify::Error::from)?;
            Ok(Issued { key: made.key, chain, phases })
        })
    }
}

#[cfg(test)]
mod tests;
