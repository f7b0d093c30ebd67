//! Values for tests.
#![allow(clippy::unwrap_used, reason = "for tests only")]

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SerialNumber,
};
use rustls::pki_types::CertificateDer;

/// An authority that can sign revocation lists.
#[derive(Debug)]
pub struct Authority {
    /// The self-signed certificate of the authority.
    pub certificate: rcgen::Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// An authority that may sign certificates and revocation lists.
    pub fn new(name: &str) -> Self {
        Self::of(name, |params| params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign])
    }

    /// A certificate of the same name and key with these key usages, in DER.
    pub fn der_with(&self, name: &str, usages: Vec<KeyUsagePurpose>) -> CertificateDer<'static> {
        let mut params = Self::params(name);
        params.key_usages = usages;
        params.self_signed(self.issuer.key()).unwrap().der().clone()
    }

    /// An authority that expires at `not_after`.
    pub fn until(name: &str, not_after: SystemTime) -> Self {
        Self::of(name, |params| {
            (params.key_usages, params.not_after) = (vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign], not_after.into());
        })
    }

    fn of(name: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = Self::params(name);
        change(&mut params);
        let certificate = params.self_signed(&key).unwrap();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    }

    /// An authority that this one has signed.
    pub fn below(&self, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = Self::params(name);
        (params.key_usages, params.use_authority_key_identifier_extension) =
            (vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign], true);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// A leaf that this authority has signed, in PEM.
    pub fn leaf(&self) -> String {
        let mut params = CertificateParams::default();
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) =
            ((SystemTime::now() - Duration::from_secs(60)).into(), (SystemTime::now() + Duration::from_secs(3600)).into());
        params.signed_by(&KeyPair::generate().unwrap(), &self.issuer).unwrap().pem()
    }

    /// The certificate in DER.
    pub fn der(&self) -> CertificateDer<'static> {
        self.certificate.der().clone()
    }

    /// A list with `revoked` certificates, issued `age` seconds ago, in PEM.
    pub fn list(&self, revoked: u64, age: u64) -> String {
        self.list_naming(KeyIdMethod::Sha256, revoked, age)
    }

    /// A list that is issued at `now`, in PEM.
    pub fn list_at(&self, now: SystemTime) -> String {
        self.list_of(KeyIdMethod::Sha256, 0, now)
    }

    /// The same list with the key identifier `key`.
    pub fn list_naming(&self, key: KeyIdMethod, revoked: u64, age: u64) -> String {
        self.list_of(key, revoked, SystemTime::now() - Duration::from_secs(age))
    }

    fn list_of(&self, key: KeyIdMethod, revoked: u64, now: SystemTime) -> String {
        let revoked = (0..revoked).map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(serial + 1),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + Duration::from_secs(3600)).into(),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: key,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}
