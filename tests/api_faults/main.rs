//! Rotation, requests and the real client with an API server whose bytes are scripted, on a paused clock.
//!
//! For every fault of the connection, an identity gets one certificate by one executed request, no object is left behind, other
//! identities are served, and the fault is counted and logged.

#![allow(
    clippy::cast_precision_loss,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "tests write files, and fail loudly"
)]
use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
    time::{Duration, UNIX_EPOCH},
};

use agent_kube::{
    self, RequestRate,
    fake::FakeApi,
    labels::{Code, Resource, Verb},
    wire::{Fault, Seen, Wire, http},
};
use agent_runtime::{
    clock::TestClock,
    metrics::Exposition,
    telemetry::{self, Format, captured::Captured},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use cert_manager::{IssuerRef, RequestNamespace, naming::Agent};
use issuance::{
    issuer::{
        Issuer,
        certificate_request::{CertManager, Metrics as RequestMetrics, Requests, Settings},
        embedded::Embedded,
    },
    rotation::{self, plan::Plan},
};
use sds_agent::{app::inventory::Inventory, build_info};
use sds_server::{
    store::{self, Demand, Lease, Store},
    trust::{self, Trust},
};
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::subscriber::DefaultGuard;
use workload_identity::{Identity, IssuerName, NodeEnvironment, PodRef, Profile, samples::identity};

mod approver_away;
mod creates;
mod issuers;
mod keys;
mod watches;

const CR: &str = "certificaterequests";
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

/// The lower half of an agent, its API server, and a simulated cert-manager.
struct World {
    wire: Wire,
    store: Arc<Store>,
    kube_metrics: agent_kube::Metrics,
    exposition: Exposition,
    /// Names of unresponsive issuers in the cluster.
    dead: Arc<Mutex<HashSet<String>>>,
    /// The results of the next requests instead of a signature: a condition, or a complete status.
    refusals: Arc<Mutex<Vec<Value>>>,
    /// The content of `/certs`.
    inventory: Inventory,
    log: Captured,
    _log: DefaultGuard,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl World {
    fn new() -> Self {
        Self::with(|_| {})
    }

    /// With faults that exist before the agent starts.
    fn with(plan: impl FnOnce(&Wire)) -> Self {
        let log = Captured::default();
        let (guard, _) = telemetry::capture("info", Format::Json, log.clone()).unwrap();
        let wire = Wire::new(FakeApi::new());
        for name in ["mesh-ca", "other-ca"] {
            let status = json!({"conditions": [{"type": "Ready", "status": "True"}]});
            let issuer = json!({"apiVersion": "cert-manager.io/v1", "kind": "ClusterIssuer", "metadata": {"name": name, "namespace": ""},
                "spec": {"ca": {"secretName": "s"}}, "status": status});
            wire.api.put("clusterissuers", issuer);
        }
        plan(&wire);
        let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        let authority = Arc::new(Embedded::new("cluster.local", Arc::new(clock.clone())).unwrap());
        let trust = Trust::with_clock(trust::Metrics::default(), Arc::new(clock.clone()));
        trust.source(None, "test").take(authority.bundle().unwrap()).unwrap();

        let mut exposition = Exposition::new(build_info::VERSION, build_info::REVISION);
        let kube_metrics = agent_kube::Metrics::register(exposition.registry());
        let pod = PodRef { namespace: "sds-agent".into(), name: "sds-agent-x".into(), uid: "agent-1".into() };
        let agent = Agent::new(&NodeEnvironment { node_name: Some("n1".into()), pod: Some(pod) }, None, 7);
        let namespace = RequestNamespace::Fixed("sds-agent".into());
        let requests = Requests::new(
            wire.client(&kube_metrics, RequestRate::default()),
            namespace.clone(),
            Arc::new(agent),
            None,
            Arc::new(clock.clone()),
            kube_metrics.clone(),
            RequestMetrics::register(exposition.registry()),
        );
        let issuers = ["mesh", "other"].map(|name| {
            let issuer_ref = IssuerRef { name: format!("{name}-ca"), kind: "ClusterIssuer".into(), group: "cert-manager.io".into() };
            let config = Settings { issuer_ref, namespace: namespace.clone(), trust_status_ca: false };
            (IssuerName(name.into()), Arc::new(CertManager::new(requests.clone(), config, None)) as Arc<dyn Issuer>)
        });
        let (store, events) = Store::new();
        let profiles = [identity("a").profile.clone(), of_other("a").profile.clone()];
        let plan = Plan::new(issuers.into_iter().collect(), profiles, Duration::from_secs(300));
        let (plan, plan_now) = tokio::sync::watch::channel(Arc::new(plan));
        let inventory = Inventory::new(store.clone(), plan_now.clone(), Arc::new(clock.clone()));
        let node = NodeEnvironment { node_name: Some("n1".into()), pod: None };
        let event_metrics = sds_agent::events::Metrics::register(exposition.registry());
        let (reporter, writer) = sds_agent::events::new(wire.client(&kube_metrics, RequestRate::default()), &node, event_metrics);
        let parts = rotation::Parts {
            observer: Some(Arc::new(reporter)),
            metrics: rotation::metrics::Metrics::register(exposition.registry()),
            ..rotation_parts(&store, events, plan_now, &trust, &clock)
        };
        let (dead, refusals) = (Arc::default(), Arc::default());
        let cert_manager = cert_manager(wire.api.clone(), authority, Arc::clone(&dead), Arc::clone(&refusals));
        let tasks = vec![
            tokio::spawn(async move { requests.run(CancellationToken::new()).await }),
            tokio::spawn(async move {
                rotation::run(parts, CancellationToken::new()).await;
                drop((trust, plan));
            }),
            tokio::spawn(cert_manager),
            tokio::spawn(writer.run(CancellationToken::new())),
        ];
        Self { wire, store, kube_metrics, exposition, dead, refusals, inventory, log, _log: guard, tasks }
    }

    /// Returns when the agent watches its requests.
    async fn watching(&self) {
        self.until("the watch", |api| (api.count("watch", CR) > 0).then_some(())).await;
        tokio::time::sleep(SECOND).await;
    }

    async fn until<T>(&self, what: &str, condition: impl FnMut(&FakeApi) -> Option<T>) -> T {
        self.wire.api.until(what, condition).await
    }

    fn want(&self, who: &str) -> Lease {
        self.store.lease(&identity(who), Demand::Now, None)
    }

    /// Requests a certificate of the other issuer.
    fn want_other(&self, who: &str) -> Lease {
        self.store.lease(&of_other(who), Demand::Now, None)
    }

    fn seen(&self, verb: &str) -> Vec<Seen> {
        self.wire.seen(verb, CR)
    }

    fn requests(&self, verb: Verb, code: Code) -> u64 {
        self.kube_metrics.requests(verb, Resource::certificaterequests, code)
    }

    /// The value of a metric with its labels, as the exposition writes them.
    fn metric(&self, line: &str) -> f64 {
        let text = self.exposition.encode(agent_runtime::metrics::Format::OpenMetrics).unwrap();
        let found = text.lines().find_map(|l| l.strip_prefix(line)?.trim().parse().ok());
        found.unwrap_or_else(|| panic!("{line} is not in {text}"))
    }

    /// Asserts that each of `leases` has a certificate, that `carried_out` requests were made in total, that none is left, and that every
    /// fault has happened.
    async fn assert_served(&self, leases: &[Lease], carried_out: usize) {
        for lease in leases {
            let mut watch = lease.watch();
            let svid = tokio::time::timeout(HOUR, watch.wait_for(Option::is_some)).await;
            svid.expect("a certificate in time").unwrap();
        }
        self.wire.api.until_count(CR, 0).await;
        assert!(self.wire.is_done(), "a fault has not happened");
        assert_eq!(self.wire.api.created(CR), carried_out, "requests that were carried out");
        assert!((self.metric("sds_agent_issuances_total{issuer=\"mesh\",result=\"ok\"}") - leases.len() as f64).abs() < 0.5);
    }
}

/// The parts of a rotation without an observer.
fn rotation_parts(
    store: &Arc<Store>,
    events: tokio::sync::mpsc::UnboundedReceiver<store::Event>,
    plan: tokio::sync::watch::Receiver<Arc<Plan>>,
    trust: &Trust,
    clock: &TestClock,
) -> rotation::Parts {
    rotation::Parts {
        store: store.clone(),
        events,
        plan,
        reissues: tokio::sync::mpsc::channel(1).1,
        trust: trust.subscribe(),
        authorities: None,
        await_bundle: true,
        clock: Arc::new(clock.clone()),
        identity_users: None,
        observer: None,
        metrics: rotation::metrics::Metrics::default(),
    }
}

fn of_other(who: &str) -> Arc<Identity> {
    let mine = identity(who);
    let profile = Profile { issuer: IssuerName("other".into()), authority: "other".into(), ..(*mine.profile).clone() };
    Arc::new(Identity { profile: Arc::new(profile), ..(*mine).clone() })
}

/// Signs requests of responsive issuers, or applies the next planned result.
async fn cert_manager(api: FakeApi, authority: Arc<Embedded>, dead: Arc<Mutex<HashSet<String>>>, refusals: Arc<Mutex<Vec<Value>>>) {
    loop {
        let new = |api: &FakeApi| {
            let open = |object: &Value| {
                let issuer = object["spec"]["issuerRef"]["name"].as_str().unwrap();
                object["status"].is_null() && !dead.lock().unwrap().contains(issuer)
            };
            api.objects(CR).into_iter().find(open)
        };
        let mut moved = api.moved();
        let request = loop {
            moved.borrow_and_update();
            if let Some(request) = new(&api) {
                break request;
            }
            moved.changed().await.unwrap();
        };
        let [namespace, name] = ["namespace", "name"].map(|field| request["metadata"][field].as_str().unwrap());
        let refusal = refusals.lock().unwrap().pop();
        if let Some(refusal) = refusal {
            api.change(CR, namespace, name, |object| match refusal.get("status").filter(|status| status.is_object()) {
                Some(status) => object["status"] = status.clone(),
                None => object["status"]["conditions"] = json!([refusal]),
            });
            continue;
        }
        let pem = STANDARD.decode(request["spec"]["request"].as_str().unwrap()).unwrap();
        let (_, csr) = x509_parser::pem::parse_x509_pem(&pem).unwrap();
        let chain = authority.sign(csr.contents, HOUR);
        let approved = json!({"type": "Approved", "status": "True", "reason": "test"});
        api.change(CR, namespace, name, |object| object["status"]["conditions"] = json!([approved]));
        api.change(CR, namespace, name, |object| {
            let issued = json!({"type": "Ready", "status": "True", "reason": "Issued"});
            object["status"] = json!({"conditions": [approved, issued], "certificate": STANDARD.encode(chain)});
        });
    }
}
