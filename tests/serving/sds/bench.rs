//! The parts around the service: an issuer that can be down, an attestor that a test controls, and a clock that can be stepped.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::UNIX_EPOCH,
};

use agent_runtime::clock::TestClock;
use futures::future::BoxFuture;
use issuance::{
    issuer::{self, Issued, Issuer, Order, Retry, embedded::Embedded},
    rotation::{self, plan::Plan, reissue::Reissue},
};
use sds_server::{
    attest::{self, Attested, Attestor, Method, Reason, origin::Origin},
    caller::{Authenticator, Refusals},
    material::TrustBundle,
    trust::{self, Trust},
};
use unix_peer::peer::Peer;
use workload_identity::{IssuerName, Labels, PodRef, Profile, Resolver, TrustDomain, Workload, samples::identity};

use super::*;

/// The upstream's reaction to orders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upstream {
    /// Signs at once.
    Up,
    /// Fails at once.
    Down,
    /// Accepts orders and answers them when it is up again.
    Slow,
}

#[derive(Debug)]
struct Scripted {
    embedded: Arc<Embedded>,
    upstream: watch::Receiver<Upstream>,
    orders: Arc<AtomicUsize>,
}

impl Issuer for Scripted {
    fn issue(&self, order: Order) -> BoxFuture<'static, Result<Issued, issuer::Error>> {
        self.orders.fetch_add(1, Ordering::SeqCst);
        let (embedded, mut upstream) = (self.embedded.clone(), self.upstream.clone());
        Box::pin(async move {
            order.progress.submitted("test");
            if *upstream.borrow() == Upstream::Down {
                let (action, message) = ("ordering".into(), "down".into());
                return Err(issuer::Error::Api { action, message, retry: Retry::Backoff });
            }
            upstream.wait_for(|u| *u == Upstream::Up).await.unwrap();
            embedded.issue(order).await
        })
    }
}

/// The attestor's result for every caller; `None` until a test sets it.
pub type Verdict = Option<Result<Attested, attest::Error>>;

#[derive(Debug)]
struct Told {
    verdict: watch::Receiver<Verdict>,
    holds: Arc<AtomicBool>,
}

impl Attestor for Told {
    fn method(&self) -> Method {
        Method::kubernetes
    }

    fn attest<'a>(&'a self, _peer: &'a Peer) -> BoxFuture<'a, Result<Attested, attest::Error>> {
        let mut verdict = self.verdict.clone();
        Box::pin(async move { verdict.wait_for(Option::is_some).await.unwrap().clone().unwrap() })
    }

    fn still_holds(&self, _peer: &Peer) -> bool {
        self.holds.load(Ordering::SeqCst)
    }
}

/// An agent without sockets.
pub struct Bench {
    pub service: Arc<Service>,
    pub clock: TestClock,
    pub source: trust::Source,
    pub federated: trust::Source,
    pub upstream: watch::Sender<Upstream>,
    pub verdict: watch::Sender<Verdict>,
    pub terminated: CancellationToken,
    holds: Arc<AtomicBool>,
    pub embedded: Arc<Embedded>,
    orders: Arc<AtomicUsize>,
    authenticator: Authenticator,
    resolver: watch::Sender<Arc<Resolver>>,
    issuers: BTreeMap<IssuerName, Arc<dyn Issuer>>,
    plan: watch::Sender<Arc<Plan>>,
    reissue_window: watch::Sender<ReissueWindow>,
    pub reissue: mpsc::Sender<Reissue>,
}

/// The time over which certificates are reissued after a change.
pub const SPREAD: Duration = Duration::from_secs(600);

/// The time for which a subscription without subscribers is kept.
pub const RETENTION: Duration = Duration::from_secs(300);

impl Bench {
    /// All parts are ready: the bundle, an upstream that signs, an attestor that accepts every caller.
    pub fn new() -> Self {
        let bench = Self::without_bundle();
        bench.source.take(bench.embedded.bundle().unwrap()).unwrap();
        bench
    }

    /// The bundle does not exist yet.
    pub fn without_bundle() -> Self {
        let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        let embedded = Arc::new(Embedded::new("cluster.local", Arc::new(clock.clone())).unwrap());
        Self::of(clock, embedded)
    }

    /// A restarted agent: it has no state and no bundle yet, and uses the same upstream.
    pub fn restarted(&self) -> Self {
        Self::of(self.clock.clone(), self.embedded.clone())
    }

    fn of(clock: TestClock, embedded: Arc<Embedded>) -> Self {
        let orders: Arc<AtomicUsize> = Arc::default();
        let (upstream, upstream_now) = watch::channel(Upstream::Up);
        let issuer = Scripted { embedded: embedded.clone(), upstream: upstream_now, orders: orders.clone() };
        let trust = Trust::new(trust::Metrics::default());
        let partner = TrustDomain::new("partner.example").unwrap();
        let (source, federated) = (trust.source(None, "own"), trust.source(Some(partner), "partner"));
        let (store, events) = Store::new();
        let issuers = BTreeMap::from([(IssuerName("mesh".into()), Arc::new(issuer) as Arc<dyn Issuer>)]);
        let (plan, plan_now) = watch::channel(Arc::new(Plan::new(issuers.clone(), [identity("a").profile.clone()], RETENTION)));
        let (reissue, reissues) = mpsc::channel(8);
        let parts = rotation::Parts {
            store: store.clone(),
            events,
            plan: plan_now,
            reissues,
            trust: trust.subscribe(),
            authorities: None,
            await_bundle: false,
            clock: Arc::new(clock.clone()),
            identity_users: None,
            observer: None,
            metrics: rotation::metrics::Metrics::default(),
        };
        tokio::spawn(rotation::run(parts, CancellationToken::new()));

        let domain = TrustDomain::new("cluster.local").unwrap();
        let (reissue_window, spread_now) = watch::channel(ReissueWindow::new(clock.now(), SPREAD, 1));
        let service = Service {
            store,
            trust: trust.subscribe(),
            directory: Directory::new(sds_server::sds::names::Names::default(), &domain),
            clock: Arc::new(clock.clone()),
            limits: Limits { message_bytes: 4096, names_per_stream: 4, ..Limits::default() },
            metrics: Metrics::default(),
            reissue_window: spread_now,
            ending: CancellationToken::new(),
        };
        let terminated = CancellationToken::new();
        let (verdict, verdict_now) = watch::channel(Some(Ok(attested("a", &terminated))));
        let resolver = Resolver::single(domain, identity("a").profile.clone());
        let (resolver, resolver_now) = watch::channel(Arc::new(resolver));
        let holds = Arc::new(AtomicBool::new(true));
        let attestor = Arc::new(Told { verdict: verdict_now, holds: holds.clone() });
        let authenticator = Authenticator { attestor, resolver: resolver_now, metrics: attest::Metrics::default(), observer: None };
        Self {
            service: Arc::new(service),
            clock,
            source,
            federated,
            upstream,
            verdict,
            terminated,
            holds,
            embedded,
            orders,
            authenticator,
            resolver,
            issuers,
            plan,
            reissue_window,
            reissue,
        }
    }

    /// The same agent with another attestor, for new connections.
    pub fn attesting_by(mut self, attestor: Arc<dyn Attestor>) -> Self {
        self.authenticator.attestor = attestor;
        self
    }

    /// A new connection.
    pub fn connection(&self) -> Arc<Connection> {
        Arc::new(Connection::new(Peer::without_process(1000), self.authenticator.clone()))
    }

    /// A new connection from this pod.
    pub fn connection_of(&self, pod: &str, refusals: &Arc<Refusals>) -> Arc<Connection> {
        let connection = Connection::new(Peer::without_process(1000), self.authenticator.clone());
        Arc::new(connection.coming_from(Origin::Pod(pod.into()), refusals.clone()))
    }

    /// From now on callers get a profile of another epoch: earlier certificates do not match it.
    pub fn raise_epoch(&self) {
        self.change_profile(|profile| profile.epoch += 1);
    }

    /// From now on callers get another profile.
    pub fn change_profile(&self, change: impl FnOnce(&mut Profile)) {
        let mut next = (**self.resolver.borrow()).clone();
        let mut profile = (*next.default_profile).clone();
        change(&mut profile);
        next.default_profile = Arc::new(profile);
        self.reload(next);
    }

    /// Applies another configuration, as a reload does.
    pub fn reload(&self, next: Resolver) {
        let profiles = next.rules.iter().map(|rule| &rule.profile).chain([&next.default_profile]).cloned();
        self.plan.send_replace(Arc::new(Plan::new(self.issuers.clone(), profiles, RETENTION)));
        self.reissue_window.send_replace(ReissueWindow::new(self.clock.now(), SPREAD, 1));
        self.resolver.send_replace(Arc::new(next));
    }

    /// The rules in force.
    pub fn rules(&self) -> Resolver {
        (**self.resolver.borrow()).clone()
    }

    /// From now on the attestor accepts no caller, until a result is sent.
    pub fn know_nobody(&self) {
        self.verdict.send_replace(None);
    }

    /// The caller selects this profile by its volume.
    pub fn pick(&self, profile: &str) {
        let mut attested = attested("a", &self.terminated);
        if let Workload::Pod { picked, .. } = &mut attested.workload {
            *picked = Some(profile.into());
        }
        self.verdict.send_replace(Some(Ok(attested)));
    }

    pub fn know_everybody(&self) {
        self.verdict.send_replace(Some(Ok(attested("a", &self.terminated))));
    }

    /// The process that connected has ended, and no event has been sent about it yet.
    pub fn end_process(&self) {
        self.holds.store(false, Ordering::SeqCst);
    }

    pub fn refuse(&self, temporary: bool) {
        let error = attest::Error { reason: Reason::unknown_pod, detail: "the evidence, for the log".into(), temporary, pod: None };
        self.verdict.send_replace(Some(Err(error)));
    }

    /// The number of orders that the upstream has received.
    pub fn orders(&self) -> usize {
        self.orders.load(Ordering::SeqCst)
    }

    /// The number of subscriptions to certificates.
    pub fn leases(&self) -> usize {
        self.service.store.snapshot().iter().map(|entry| entry.subscribers()).sum()
    }

    /// The published material of the only identity.
    pub fn material(&self) -> Arc<Svid> {
        let entries = self.service.store.snapshot();
        assert_eq!(entries.len(), 1);
        entries[0].current().expect("a published certificate")
    }
}

fn attested(service_account: &str, terminated: &CancellationToken) -> Attested {
    let pod = PodRef { namespace: "shop".into(), name: "cart-1".into(), uid: "u1".into() };
    Attested {
        workload: Workload::Pod { pod, service_account: Some(service_account.into()), labels: Labels::default(), picked: None },
        facts: None,
        terminated: terminated.clone(),
    }
}

/// Runs every task until all of them wait.
pub async fn settle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

/// The bundle of `bench` with an additional root: issued certificates stay valid.
pub fn grown_bundle(bench: &Bench) -> TrustBundle {
    let (own, other) = (bench.embedded.bundle().unwrap(), foreign_bundle(bench));
    TrustBundle::from_certificates([own.roots(), other.roots()].concat()).unwrap()
}

/// The roots of another authority.
pub fn foreign_bundle(bench: &Bench) -> TrustBundle {
    Embedded::new("cluster.local", Arc::new(bench.clock.clone())).unwrap().bundle().unwrap()
}
