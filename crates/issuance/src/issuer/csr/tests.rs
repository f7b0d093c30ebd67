//! The content of a CSR, as another parser reads it.

use std::{future::Future, task::Poll};

use cert_manager::{Csr, csr};
use futures::{FutureExt, future::poll_fn};
use workload_identity::{Profile, SpiffeId, samples::profile};
use x509_parser::{
    certification_request::X509CertificationRequest,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer,
};

use super::*;

const ID: &str = "spiffe://cluster.local/ns/shop/sa/cart";

fn identity(key: KeyType, dns_names: &[&str]) -> Identity {
    let profile = Profile { key, ..profile(ID) };
    Identity {
        spiffe_id: SpiffeId::new(ID).unwrap(),
        dns_names: dns_names.iter().map(|&name| name.to_owned()).collect(),
        profile: Arc::new(profile),
        pod_uid: None,
        account: None,
    }
}

#[tokio::test]
async fn the_request_is_an_empty_subject_and_the_names_signed_by_the_key() {
    for key_type in KeyType::ALL {
        let made = generate(&identity(key_type, &["cart.shop.svc", "cart.shop"])).await.unwrap();
        let (rest, csr) = X509CertificationRequest::from_der(&made.csr_der).unwrap();
        assert!(rest.is_empty());
        csr.verify_signature().unwrap();
        assert_eq!(csr.certification_request_info.subject.iter_rdn().count(), 0, "{key_type:?}");

        let extensions: Vec<_> = csr.requested_extensions().unwrap().collect();
        let [ParsedExtension::SubjectAlternativeName(san)] = &extensions[..] else { panic!("{key_type:?}: {extensions:?}") };
        let expected = [GeneralName::URI(ID), GeneralName::DNSName("cart.shop.svc"), GeneralName::DNSName("cart.shop")];
        assert_eq!(san.general_names, expected, "{key_type:?}");
        // The only attribute is the extension request.
        assert_eq!(csr.certification_request_info.iter_attributes().count(), 1);
    }
}

#[tokio::test]
async fn the_key_has_the_kind_and_size_that_was_asked_for() {
    let expected = [(KeyType::EcdsaP256, 256), (KeyType::EcdsaP384, 384), (KeyType::Rsa2048, 2048), (KeyType::Rsa3072, 3072)];
    for (key_type, bits) in expected {
        let made = generate(&identity(key_type, &[])).await.unwrap();
        let (_, csr) = X509CertificationRequest::from_der(&made.csr_der).unwrap();
        let public = csr.certification_request_info.subject_pki.parsed().unwrap();
        assert_eq!(public.key_size(), bits, "{key_type:?}");
        let is_rsa = matches!(public, x509_parser::public_key::PublicKey::RSA(_));
        assert_eq!(is_rsa, matches!(key_type, KeyType::Rsa2048 | KeyType::Rsa3072));
    }
}

#[tokio::test]
async fn every_request_has_a_fresh_key() {
    let identity = identity(KeyType::EcdsaP256, &[]);
    let (a, b) = (generate(&identity).await.unwrap(), generate(&identity).await.unwrap());
    assert_ne!(a.key.pkcs8_der(), b.key.pkcs8_der());
    assert_eq!(format!("{:?}", a.key), "PrivateKey(redacted)");
}

#[tokio::test]
async fn a_name_that_no_certificate_can_hold_is_named() {
    let error = generate(&identity(KeyType::EcdsaP256, &["käse.shop.svc"])).await.unwrap_err();
    assert!(matches!(&error, Error::Name(name) if name == "käse.shop.svc"), "{error}");
}

#[tokio::test]
async fn rsa_keys_are_made_one_at_a_time_and_an_abandoned_one_still_counts() {
    let (slots, identity) = (Arc::new(Semaphore::new(1)), identity(KeyType::Rsa2048, &[]));
    let taken = slots.clone().acquire_owned().await.unwrap();
    let mut waiting = Box::pin(generate_within(&identity, &slots));
    assert!((&mut waiting).now_or_never().is_none());
    // Elliptic-curve keys do not wait for the permit.
    let quick = self::identity(KeyType::EcdsaP384, &[]);
    assert!(generate_within(&quick, &slots).now_or_never().unwrap().is_ok());

    drop(taken);
    poll_fn(|cx| {
        // The first poll takes the permit and gives the work to the blocking pool.
        let _ = waiting.as_mut().poll(cx);
        Poll::Ready(())
    })
    .await;
    assert_eq!(slots.available_permits(), 0);
    drop(waiting);
    assert_eq!(slots.available_permits(), 0, "its core is busy until the key is made");
    assert!(generate_within(&identity, &slots).await.is_ok());
}

#[tokio::test]
async fn what_agents_make_is_read_for_every_kind_of_key() {
    for kind in KeyType::ALL {
        let identity = identity(kind, &["cart.shop.svc", "cart.shop"]);
        let made = generate(&identity).await.unwrap();
        let pem = Csr::from_der(&made.csr_der).pem().unwrap();
        let expected = csr::Asked { key: kind, uri: identity.spiffe_id.to_string(), dns_names: identity.dns_names.to_vec() };
        assert_eq!(csr::read(&pem), Ok(expected.clone()), "{kind:?}");
        assert_eq!(csr::read(pem.strip_suffix(b"\n").unwrap()), Ok(expected), "{kind:?}");

        // A change of any byte is rejected.
        for at in (0..made.csr_der.len()).step_by(if made.csr_der.len() > 600 { 7 } else { 1 }) {
            let mut other = made.csr_der.clone();
            other[at] ^= 1;
            assert!(csr::read(&Csr::from_der(&other).pem().unwrap()).is_err(), "{kind:?}: byte {at}");
        }
    }
}
