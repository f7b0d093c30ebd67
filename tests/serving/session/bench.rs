//! A socket that is served, with a real store and rotation, and an attestor that answers when a test opens it.

use std::{collections::BTreeMap, path::PathBuf, sync::Mutex};

use agent_runtime::clock::{Clock, SystemClock};
use futures::future::BoxFuture;
use issuance::{
    issuer::{Issuer, embedded::Embedded},
    rotation::{self, plan::Plan},
};
use sds_server::{
    attest::{self, Attested, Attestor, Method},
    sds,
    store::Store,
    trust::{self, Trust},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use unix_peer::listener;
use workload_identity::{IssuerName, Labels, PodRef, Resolver, TrustDomain, Workload, samples::identity};

use super::*;

/// A limit that no expected event reaches on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Awaits an event, with a limit.
pub async fn soon<T>(what: &str, event: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, event).await.unwrap_or_else(|_| panic!("{what} did not come"))
}

/// Polls until `condition` holds, for states that send no event.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    soon(what, async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// Accepts callers while it is open, each with a separate token.
#[derive(Debug)]
struct TestAttestor {
    open: watch::Receiver<bool>,
    let_in: Arc<Mutex<Vec<CancellationToken>>>,
}

impl Attestor for TestAttestor {
    fn method(&self) -> Method {
        Method::unix
    }

    fn attest<'a>(&'a self, _peer: &'a Peer) -> BoxFuture<'a, Result<Attested, attest::Error>> {
        Box::pin(async move {
            self.open.clone().wait_for(|open| *open).await.unwrap();
            let terminated = CancellationToken::new();
            self.let_in.lock().unwrap().push(terminated.clone());
            let pod = PodRef { namespace: "shop".into(), name: "cart-1".into(), uid: "u1".into() };
            Ok(Attested {
                workload: Workload::Pod { pod, service_account: Some("a".into()), labels: Labels::default(), picked: None },
                facts: None,
                terminated,
            })
        })
    }
}

pub struct Agent {
    pub path: PathBuf,
    pub sessions: Sessions,
    pub sds: Arc<sds::service::Service>,
    pub origin_cache: watch::Sender<bool>,
    /// One token for each attested connection, in that order.
    pub let_in: Arc<Mutex<Vec<CancellationToken>>>,
    pub source: trust::Source,
    pub accepting: JoinHandle<()>,
    _directory: tempfile::TempDir,
}

/// Limit of a drain.
pub const DRAIN: Duration = Duration::from_millis(300);

impl Agent {
    pub async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut Sessions)) -> Self {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let embedded = Embedded::new("cluster.local", clock.clone()).unwrap();
        let trust = Trust::new(trust::Metrics::default());
        let source = trust.source(None, "own");
        source.take(embedded.bundle().unwrap()).unwrap();
        let (store, events) = Store::new();
        let issuers = BTreeMap::from([(IssuerName("mesh".into()), Arc::new(embedded) as Arc<dyn Issuer>)]);
        let plan = Plan::new(issuers, [identity("a").profile.clone()], Duration::from_secs(300));
        let (plan, reissues) = (watch::channel(Arc::new(plan)).1, mpsc::channel(1).1);
        let parts = rotation::Parts {
            store: store.clone(),
            events,
            plan,
            reissues,
            trust: trust.subscribe(),
            authorities: None,
            await_bundle: false,
            clock: clock.clone(),
            identity_users: None,
            observer: None,
            metrics: rotation::metrics::Metrics::default(),
        };
        tokio::spawn(rotation::run(parts, CancellationToken::new()));

        let resolver = Resolver::single(TrustDomain::new("cluster.local").unwrap(), identity("a").profile.clone());
        let (origin_cache, open) = watch::channel(true);
        let let_in: Arc<Mutex<Vec<CancellationToken>>> = Arc::default();
        let attestor = Arc::new(TestAttestor { open, let_in: let_in.clone() });
        let mut server = server::Builder::new(attestor, watch::channel(Arc::new(resolver)).1, store, &trust);
        server.shutdown = Shutdown::new(DRAIN);
        let Server { service: sds, mut sessions } = server.build().await.unwrap();
        change(&mut sessions);
        sessions.quotas = quotas::Quotas::new(&sessions.limits);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sds.sock");
        let bound = listener::bind(&path, 0o666).unwrap();
        let accepting = tokio::spawn(sessions.clone().accept(bound.listener));
        Self { path, sessions, sds, origin_cache, let_in, source, accepting, _directory: directory }
    }

    /// The number of subscriptions to certificates.
    pub fn leases(&self) -> usize {
        self.sds.store.snapshot().iter().map(|entry| entry.subscribers()).sum()
    }

    pub fn streams(&self) -> i64 {
        self.sds.metrics.streams.get()
    }

    /// Changes the roots, so that the service has an update to push.
    pub fn change_bundle(&self) {
        let other = Embedded::new("cluster.local", Arc::new(SystemClock)).unwrap();
        self.source.take(other.bundle().unwrap()).unwrap();
    }
}
