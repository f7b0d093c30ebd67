//! Rotation with a scripted issuer.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, atomic::AtomicUsize, atomic::Ordering},
    time::UNIX_EPOCH,
};

use agent_runtime::clock::TestClock;
use futures::future::BoxFuture;
use sds_server::{
    store::{Demand, Lease},
    trust,
};
use tokio::sync::oneshot;
use workload_identity::samples::identity;

use super::super::*;
use crate::issuer::{Issuer, Order, Retry, embedded::Embedded};

/// Answer of the scripted issuer to the next order.
pub(super) enum Script {
    Issue,
    Fail(Retry),
    /// A denial, with the wait that follows.
    Deny(Duration),
    Panic,
    /// A certificate of another authority.
    Foreign,
    /// A report that the request is submitted, and then no answer.
    Pend,
    /// A report that the request is submitted, and then the next answer when the test sends it.
    Wait(oneshot::Receiver<Script>),
}

#[derive(Debug)]
pub(super) struct Scripted {
    embedded: Arc<Embedded>,
    foreign: Arc<Embedded>,
    script: Arc<Mutex<VecDeque<Script>>>,
    orders: Arc<AtomicUsize>,
    dropped: Arc<AtomicUsize>,
    evidence: Arc<Mutex<Vec<Option<PodRef>>>>,
}

impl std::fmt::Debug for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Script")
    }
}

/// Every workload may have its identity until the test makes it leave.
#[derive(Debug, Clone, Default)]
pub(super) struct Present {
    left: Arc<Mutex<Vec<Arc<Identity>>>>,
    pod_terminations: watch::Sender<u64>,
}

impl Present {
    pub(super) fn leaves(&self, who: &str) {
        self.left.lock().unwrap().push(identity(who));
        self.pod_terminations.send_modify(|pod_terminations| *pod_terminations += 1);
    }
}

impl IdentityUsers for Present {
    fn is_used(&self, identity: &Identity) -> bool {
        !self.left.lock().unwrap().iter().any(|left| **left == *identity)
    }

    fn pod_terminations(&self) -> watch::Receiver<u64> {
        self.pod_terminations.subscribe()
    }
}

pub(super) struct CountDrop(Arc<AtomicUsize>);

impl Drop for CountDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Issuer for Scripted {
    fn issue(&self, order: Order) -> BoxFuture<'static, Result<Issued, Error>> {
        self.orders.fetch_add(1, Ordering::SeqCst);
        self.evidence.lock().unwrap().push(order.evidence.clone());
        let mut next = self.script.lock().unwrap().pop_front().unwrap_or(Script::Issue);
        let (embedded, foreign) = (self.embedded.clone(), self.foreign.clone());
        let guard = CountDrop(self.dropped.clone());
        Box::pin(async move {
            if let Script::Wait(answer) = next {
                order.progress.submitted("waiting-1");
                next = answer.await.unwrap_or(Script::Issue);
            }
            match next {
                Script::Issue => embedded.issue(order).await,
                Script::Foreign => foreign.issue(order).await,
                Script::Fail(retry) => Err(Error::Failed { request: "r".into(), reason: "Test".into(), message: "scripted".into(), retry }),
                Script::Deny(wait) => {
                    let (request, reason, message) = ("r".into(), "ProfileMismatch".into(), "scripted".into());
                    Err(Error::Denied { request, reason, message, retry: Retry::After(wait) })
                }
                Script::Panic => panic!("scripted"),
                Script::Pend => {
                    let _guard = guard;
                    order.progress.submitted("pending-1");
                    std::future::pending().await
                }
                Script::Wait(_) => unreachable!("only one wait"),
            }
        })
    }
}

/// How long an entry without subscribers is kept.
pub(super) const RETENTION: Duration = Duration::from_secs(300);

pub(super) struct Bench {
    pub(super) plan: watch::Sender<Arc<Plan>>,
    pub(super) store: Arc<Store>,
    pub(super) clock: TestClock,
    pub(super) orders: Arc<AtomicUsize>,
    pub(super) dropped: Arc<AtomicUsize>,
    pub(super) evidence: Arc<Mutex<Vec<Option<PodRef>>>>,
    pub(super) script: Arc<Mutex<VecDeque<Script>>>,
    pub(super) present: Present,
    pub(super) source: trust::Source,
    pub(super) foreign: Arc<Embedded>,
    pub(super) embedded: Arc<Embedded>,
    pub(super) reissue: mpsc::Sender<Reissue>,
    pub(super) shutdown: CancellationToken,
    pub(super) task: tokio::task::JoinHandle<()>,
}

impl Bench {
    pub(super) fn new(script: impl IntoIterator<Item = Script>) -> Self {
        let bench = Self::without_bundle(script, false);
        bench.source.take(bench.embedded.bundle().unwrap()).unwrap();
        bench
    }

    pub(super) fn without_bundle(script: impl IntoIterator<Item = Script>, await_bundle: bool) -> Self {
        Self::build(script, await_bundle, |clock| Arc::new(clock))
    }

    /// Rotation uses the clock that `wrap` makes of the bench's clock.
    pub(super) fn with_clock(script: impl IntoIterator<Item = Script>, wrap: impl FnOnce(TestClock) -> Arc<dyn Clock>) -> Self {
        let bench = Self::build(script, false, wrap);
        bench.source.take(bench.embedded.bundle().unwrap()).unwrap();
        bench
    }

    fn build(script: impl IntoIterator<Item = Script>, await_bundle: bool, wrap: impl FnOnce(TestClock) -> Arc<dyn Clock>) -> Self {
        let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        let embedded = Arc::new(Embedded::new("cluster.local", Arc::new(clock.clone())).unwrap());
        let foreign = Arc::new(Embedded::new("cluster.local", Arc::new(clock.clone())).unwrap());
        let (orders, dropped, evidence) = (Arc::default(), Arc::default(), Arc::default());
        let script = Arc::new(Mutex::new(script.into_iter().collect::<VecDeque<_>>()));
        let issuer = Scripted {
            embedded: embedded.clone(),
            foreign: foreign.clone(),
            script: script.clone(),
            orders: Arc::clone(&orders),
            dropped: Arc::clone(&dropped),
            evidence: Arc::clone(&evidence),
        };
        let trust = Trust::new(trust::Metrics::default());
        let source = trust.source(None, "test");
        let (store, events) = Store::new();
        let issuers = BTreeMap::from([(IssuerName("mesh".into()), Arc::new(issuer) as Arc<dyn Issuer>)]);
        let (plan, plan_now) = watch::channel(Arc::new(Plan::new(issuers, [identity("a").profile.clone()], RETENTION)));
        let (reissue, reissues) = mpsc::channel(1);
        let present = Present::default();
        let parts = Parts {
            store: store.clone(),
            events,
            plan: plan_now,
            reissues,
            trust: trust.subscribe(),
            authorities: Some(trust.clone()),
            await_bundle,
            clock: wrap(clock.clone()),
            identity_users: Some(Arc::new(present.clone())),
            observer: None,
            metrics: Metrics::default(),
        };
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(run(parts, shutdown.clone()));
        Self { plan, store, clock, orders, dropped, evidence, script, present, source, foreign, embedded, reissue, shutdown, task }
    }

    pub(super) fn want(&self, who: &str) -> Lease {
        self.store.lease(&identity(who), Demand::Now, None)
    }

    pub(super) fn orders(&self) -> usize {
        self.orders.load(Ordering::SeqCst)
    }
}

/// Waits for material, or for material that is newer than `than`.
pub(super) async fn material(lease: &Lease, than: Option<&Arc<Svid>>) -> Arc<Svid> {
    let mut watch = lease.watch();
    let svid = tokio::time::timeout(
        Duration::from_secs(7200),
        watch.wait_for(|m| m.as_ref().is_some_and(|m| than.is_none_or(|t| !Arc::ptr_eq(m, t)))),
    )
    .await;
    svid.expect("a certificate in time").unwrap().clone().unwrap()
}

/// Runs all tasks that are ready.
pub(super) async fn settle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}
