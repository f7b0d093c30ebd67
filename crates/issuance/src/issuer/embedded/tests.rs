//! The whole path of an order: key, CSR, signature, checks.

use std::time::UNIX_EPOCH;

use agent_runtime::clock::TestClock;
use workload_identity::{Identity, KeyType, Profile, SpiffeId, samples::profile};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::*;
use crate::issuer::{Progress, verify::verify};

const NOW: Duration = Duration::from_secs(1_800_000_000);

fn identity(key: KeyType, lifetime: Duration) -> Arc<Identity> {
    let id = "spiffe://example.org/uid/1000";
    let profile = Profile { key, lifetime, ..profile(id) };
    let dns_names = ["one.example".to_owned(), "two.example".to_owned()].into();
    Arc::new(Identity { spiffe_id: SpiffeId::new(id).unwrap(), dns_names, profile: Arc::new(profile), pod_uid: None, account: None })
}

fn embedded(clock: &TestClock) -> Embedded {
    Embedded::new("example.org", Arc::new(clock.clone())).unwrap()
}

async fn issue(embedded: &Embedded, identity: &Arc<Identity>) -> Issued {
    let order = Order { identity: identity.clone(), evidence: None, progress: Progress::new().0 };
    embedded.issue(order).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn every_kind_of_key_gets_a_chain_that_verifies_for_as_long_as_asked() {
    let clock = TestClock::new(UNIX_EPOCH + NOW);
    let embedded = embedded(&clock);
    let bundle = embedded.bundle().unwrap();
    let (short, long) = (Duration::from_secs(30), Duration::from_secs(86_400));
    let orders = KeyType::ALL.map(|key| (key, long)).into_iter().chain([(KeyType::EcdsaP256, short)]);
    for (key, lifetime) in orders {
        let identity = identity(key, lifetime);
        let now = clock.now();
        let issued = issue(&embedded, &identity).await;
        let verified = verify(&identity, &issued.key, &issued.chain, Some(&bundle), now).unwrap();
        assert_eq!(verified.anchor.as_ref(), bundle.roots().first());
        assert_eq!(issued.chain.certificates().len(), 2, "leaf and intermediate, not the root");
        let validity = issued.chain.validity;
        // Times in a certificate are whole seconds.
        assert!(validity.not_after <= now + lifetime && now + lifetime < validity.not_after + Duration::from_secs(1));
        assert!(validity.not_before <= now && now < validity.not_before + BACKDATE + Duration::from_secs(1));
        assert_eq!(issued.phases.len(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn only_rsa_keys_may_encipher_keys() {
    let clock = TestClock::new(UNIX_EPOCH + NOW);
    let embedded = embedded(&clock);
    for (key, expected) in [(KeyType::EcdsaP256, false), (KeyType::Rsa2048, true)] {
        let issued = issue(&embedded, &identity(key, Duration::from_secs(60))).await;
        let chain = issued.chain;
        let (_, leaf) = X509Certificate::from_der(&chain.certificates()[0]).unwrap();
        assert_eq!(leaf.key_usage().unwrap().unwrap().value.key_encipherment(), expected, "{key:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_outlives_its_signer_and_no_lifetime_is_too_long_to_count() {
    let clock = TestClock::new(UNIX_EPOCH + NOW);
    let embedded = embedded(&clock);
    let issued = issue(&embedded, &identity(KeyType::EcdsaP256, Duration::MAX)).await;
    let chain = issued.chain;
    let (_, intermediate) = X509Certificate::from_der(&chain.certificates()[1]).unwrap();
    assert_eq!(chain.validity.not_after, agent_runtime::clock::from_unix_seconds(intermediate.validity().not_after.timestamp()));
}

#[tokio::test(start_paused = true)]
async fn another_authority_of_the_same_name_is_another_authority() {
    let clock = TestClock::new(UNIX_EPOCH + NOW);
    let (before, after) = (embedded(&clock), embedded(&clock));
    let identity = identity(KeyType::EcdsaP256, Duration::from_secs(60));
    let issued = issue(&before, &identity).await;
    let error = verify(&identity, &issued.key, &issued.chain, Some(&after.bundle().unwrap()), clock.now()).unwrap_err();
    assert!(error.to_string().contains("was the authority replaced?"), "{error}");
}
