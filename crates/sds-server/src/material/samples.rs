//! Values for tests.
#![allow(clippy::unwrap_used, reason = "for tests only")]

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use workload_identity::Identity;
use zeroize::Zeroizing;

use super::{CertificateChain, PrivateKey, Svid, TrustBundle};

/// Returns a certificate for `identity` and the root that issued it. Its renewal is due at its expiry.
pub fn svid(identity: Arc<Identity>) -> (Svid, TrustBundle) {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = ca.self_signed(&ca_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut leaf = CertificateParams::new(identity.dns_names.to_vec()).unwrap();
    leaf.subject_alt_names.push(SanType::URI(identity.spiffe_id.to_string().try_into().unwrap()));
    let leaf = leaf.signed_by(&key, &Issuer::from_params(&ca, &ca_key)).unwrap();
    let chain = CertificateChain::from_pem(leaf.pem().as_bytes()).unwrap();
    let validity = chain.validity;
    let key = PrivateKey::from_pkcs8_der(Zeroizing::new(key.serialize_der()));
    let svid = Svid::new(identity, chain, key, validity.not_after, validity.not_before, "0123456789abcdef".into());
    (svid, TrustBundle::from_pem(root.pem().as_bytes()).unwrap())
}
