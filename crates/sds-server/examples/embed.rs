//! An SDS server for one user: `cargo run -p sds-server --example embed -- /tmp/sds.sock "$(id -u)"`
#![allow(clippy::print_stderr, missing_docs, reason = "an example has no log")]

use std::{env, error::Error, future::ready, path::Path, sync::Arc, time::Duration, time::SystemTime};

use futures::future::BoxFuture;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use sds_server::attest::{self, Attested, Attestor, Method, Reason};
use sds_server::material::{CertificateChain, PrivateKey, Svid, authority_digest};
use sds_server::{server::Builder, store::Event, store::Store, trust};
use tokio::{sync::mpsc, sync::watch, time::sleep};
use unix_peer::{listener, peer::Peer};
use workload_identity::{Identity, Profile, Resolver, TrustDomain, Workload};

const LIFETIME: Duration = Duration::from_secs(10);
type Failure = Box<dyn Error + Send + Sync>;

/// Serves one user and rejects all others.
#[derive(Debug)]
struct OneUser(u32);

impl Attestor for OneUser {
    fn method(&self) -> Method {
        Method::unix
    }

    fn attest<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Result<Attested, attest::Error>> {
        let attested = Attested { workload: Workload::Unix { uid: peer.uid }, facts: None, terminated: Default::default() };
        let other = || attest::Error::refused(Reason::uid_not_allowed, format!("user {} is not served", peer.uid));
        Box::pin(ready(if peer.uid == self.0 { Ok(attested) } else { Err(other()) }))
    }
}

fn issue(identity: &Arc<Identity>, issuer: &Issuer<'_, KeyPair>) -> Result<Svid, Failure> {
    let (key, now) = (KeyPair::generate()?, SystemTime::now());
    let mut leaf = CertificateParams::default();
    (leaf.not_before, leaf.not_after) = (now.into(), (now + LIFETIME).into());
    leaf.subject_alt_names = vec![SanType::URI(identity.spiffe_id.to_string().try_into()?)];
    let chain = CertificateChain::from_pem(leaf.signed_by(&key, issuer)?.pem().as_bytes())?;
    let (key, authority) =
        (PrivateKey::from_pkcs8_der(key.serialize_der().into()), authority_digest(&identity.profile.fingerprint(), None));
    Ok(Svid::new(identity.clone(), chain, key, now + LIFETIME / 2, now, authority))
}

/// Issues a certificate for each identity while it has a subscriber.
async fn publish(mut events: mpsc::UnboundedReceiver<Event>, issuer: Arc<Issuer<'static, KeyPair>>) {
    while let Some(event) = events.recv().await {
        let Event::Wanted(entry, _) = event else { continue };
        let issuer = issuer.clone();
        tokio::spawn(async move {
            while entry.is_leased() && entry.current().is_none_or(|svid| svid.renew_at <= SystemTime::now()) {
                match issue(&entry.identity, &issuer) {
                    Ok(svid) => entry.publish(Arc::new(svid)),
                    Err(error) => eprintln!("no certificate for {}: {error}", entry.identity),
                }
                sleep(LIFETIME / 2 + Duration::from_millis(10)).await;
            }
        });
    }
}

/// Serves SDS on `socket` to `user`.
///
/// # Errors
///
/// If the authority or the server cannot be created, or the socket cannot be bound.
pub async fn serve(socket: &Path, user: u32) -> Result<(), Failure> {
    let (mut ca, ca_key) = (CertificateParams::default(), KeyPair::generate()?);
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let trust = trust::Trust::new(trust::Metrics::default());
    trust.source(None, "the example's authority").offer(ca.self_signed(&ca_key)?.pem().as_bytes())?;
    let (store, events) = Store::new();
    tokio::spawn(publish(events, Arc::new(Issuer::new(ca, ca_key))));
    let profile = Arc::new(Profile::new("spiffe://{trustDomain}/uid/{uid}", LIFETIME));
    let resolver = Arc::new(Resolver::single(TrustDomain::new("example.org")?, profile));
    let server = Builder::new(Arc::new(OneUser(user)), watch::channel(resolver).1, store, &trust).build().await?;
    server.sessions.accept(listener::bind(socket, 0o666)?.listener).await;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let argument = |n| env::args().nth(n).ok_or("usage: embed SOCKET UID");
    serve(argument(1)?.as_ref(), argument(2)?.parse()?).await
}
