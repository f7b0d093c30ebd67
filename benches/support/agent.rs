//! The real agent on a socket, with the embedded issuer and attestors that need no cluster.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime},
};

use agent_runtime::{clock::SystemClock, shutdown::Shutdown};
use futures::future::BoxFuture;
use issuance::issuer::{self, Issued, Issuer, Order, Phase, Progress, embedded::Embedded, verify};
use sds_agent::{
    app::{self, Base, Deps},
    config::{self, Config, Dev},
};
use sds_server::{
    attest::{Attested, Attestor, Error, Method},
    material::{Svid, TrustBundle},
    trust::{self, Trust},
};
use tokio_util::sync::CancellationToken;
use unix_peer::peer::Peer;
use workload_identity::{Identity, Workload};

/// Each connection has a different user, and so a different identity.
#[derive(Debug, Default)]
pub struct Everybody(AtomicU32);

impl Attestor for Everybody {
    fn method(&self) -> Method {
        Method::unix
    }

    fn attest<'a>(&'a self, _: &'a Peer) -> BoxFuture<'a, Result<Attested, Error>> {
        let workload = Workload::Unix { uid: self.0.fetch_add(1, Ordering::Relaxed) };
        Box::pin(std::future::ready(Ok(Attested { workload, facts: None, terminated: CancellationToken::new() })))
    }
}

/// The embedded issuer. It records the time of each signature, which an agent can only wait for.
#[derive(Debug, Clone)]
pub struct Timed(Arc<Embedded>, Arc<Mutex<Duration>>);

impl Timed {
    /// Creates a new authority.
    pub fn new() -> Self {
        Self(Arc::new(Embedded::new("example.org", Arc::new(SystemClock)).unwrap()), Arc::default())
    }

    /// The root.
    pub fn bundle(&self) -> TrustBundle {
        self.0.bundle().unwrap()
    }

    /// The time of the last signature.
    pub fn last(&self) -> Duration {
        *self.1.lock().unwrap()
    }
}

impl Issuer for Timed {
    fn issue(&self, order: Order) -> BoxFuture<'static, Result<Issued, issuer::Error>> {
        let (issued, last) = (self.0.issue(order), self.1.clone());
        Box::pin(async move {
            let issued = issued.await?;
            *last.lock().unwrap() = issued.phases.iter().filter(|(phase, _)| *phase == Phase::Sign).map(|(_, took)| *took).sum();
            Ok(issued)
        })
    }
}

/// The configuration of `sds-agent dev`, with certificates that live for a day.
pub fn config(socket: &Path) -> Config {
    let flags = Dev {
        socket: Some(socket.to_owned()),
        lifetime: Some(Duration::from_secs(86_400)),
        trust_domain: None,
        admin: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
    };
    config::dev(flags, &|_| None).unwrap()
}

/// Starts an agent at `socket`.
pub async fn start(socket: &Path, attestor: Arc<dyn Attestor>, issuer: Timed) {
    start_as(&config(socket), attestor, issuer).await;
}

/// Starts an agent with a configuration.
pub async fn start_as(config: &Config, attestor: Arc<dyn Attestor>, issuer: Timed) {
    let trust = Trust::new(trust::Metrics::default());
    trust.source(None, "embedded").take(issuer.bundle()).expect("a small bundle");
    let issuers: BTreeMap<_, Arc<dyn Issuer>> = config.issuers.keys().map(|name| (name.clone(), Arc::new(issuer.clone()) as _)).collect();
    let deps = Deps {
        clock: Arc::new(SystemClock),
        attestor,
        holder_attestor: Arc::new(sds_agent::handover::holder::SameUser),
        pods: None,
        issuer_set: issuers.into(),
        trust,
        await_bundle: false,
        observer: None,
        caller_observer: None,
        tasks: Vec::new(),
        last: CancellationToken::new(),
    };
    let bound = app::build_with(config, Base::new(Shutdown::new(config.drain)), deps).await.unwrap();
    tokio::spawn(bound.run());
}

/// The identity of a user.
pub fn identity(config: &Config, uid: u32) -> Arc<Identity> {
    let resolver = config.resolver();
    Arc::new(resolver.resolve(&Workload::Unix { uid }).unwrap())
}

/// A signed chain and its key.
pub async fn issue(identity: &Arc<Identity>, issuer: &Timed) -> Issued {
    issuer.issue(Order { identity: identity.clone(), evidence: None, progress: Progress::new().0 }).await.unwrap()
}

/// A verified certificate, ready to be published.
pub fn verified(identity: &Arc<Identity>, issued: Issued, roots: &TrustBundle) -> Svid {
    verify::verify(identity, &issued.key, &issued.chain, Some(roots), SystemTime::now()).unwrap();
    let validity = issued.chain.validity;
    Svid::new(identity.clone(), issued.chain, issued.key, validity.not_after, validity.not_before, "0123456789abcdef".into())
}
