//! The approver is away for twelve hours, while agents request, pods end and start, and an agent restarts. Then it decides the backlog.

use approver::{ActiveRules, Approver, Pods, rules::Rules};
use futures::{FutureExt, future::BoxFuture};
use issuance::issuer::certificate_request::LivePods;
use workload_identity::{Resolver, TrustDomain, samples};

use super::*;

const NODES: usize = 3;
/// Identities of a node.
const EACH: usize = 40;
const AGENT: &str = "system:serviceaccount:sds-agent:sds-agent";

/// The agents' pods, all of which run.
#[derive(Debug)]
struct Running;

impl LivePods for Running {
    fn live(&self) -> BoxFuture<'_, Option<HashSet<Arc<str>>>> {
        async { Some((0..NODES).map(|node| Arc::from(format!("agent-{node}"))).collect()) }.boxed()
    }
}

struct Cluster {
    api: FakeApi,
    clock: TestClock,
    authority: Arc<Embedded>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// An agent process and the leases of its callers.
struct Process {
    store: Arc<Store>,
    leases: Vec<Lease>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn account(node: usize, number: usize) -> String {
    format!("app-{node}-{number}")
}

fn pod_of(node: usize, number: usize) -> PodRef {
    let name = account(node, number);
    PodRef { namespace: "shop".into(), name: name.as_str().into(), uid: format!("uid-of-{name}").into() }
}

impl Cluster {
    fn new() -> Self {
        let api = FakeApi::new();
        let status = json!({"conditions": [{"type": "Ready", "status": "True"}]});
        api.put("clusterissuers", json!({"metadata": {"name": "mesh-ca", "namespace": ""}, "spec": {"ca": {}}, "status": status}));
        // cert-manager's webhook copies the requester and the claims of its token.
        api.admit(|plural, object| {
            if plural == CR {
                let node = object["metadata"]["labels"]["sds-agent.io/node"].as_str().unwrap().to_owned();
                let claim = |name: &str| format!("authentication.kubernetes.io/{name}");
                object["spec"]["username"] = json!(AGENT);
                object["spec"]["extra"] = json!({
                    claim("node-name"): [node], claim("node-uid"): [format!("uid-of-{node}")],
                    claim("pod-name"): ["sds-agent-x"], claim("pod-uid"): ["x"],
                });
            }
        });
        let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        let authority = Arc::new(Embedded::new("cluster.local", Arc::new(clock.clone())).unwrap());
        let signer = tokio::spawn(sign_approved(api.clone(), authority.clone()));
        Self { api, clock, authority, tasks: vec![signer] }
    }

    fn start_pod(&self, node: usize, number: usize) {
        let PodRef { namespace, name, uid } = pod_of(node, number);
        let spec = json!({"nodeName": format!("n{node}"), "serviceAccountName": &*name});
        let metadata = json!({"namespace": &*namespace, "name": &*name, "uid": &*uid});
        self.api.put("pods", json!({"metadata": metadata, "spec": spec, "status": {"phase": "Running"}}));
    }

    /// Starts the agent of a node. A restart has another `boot`.
    fn agent(&self, node: usize, boot: u64) -> Process {
        let metrics = agent_kube::Metrics::default();
        let pod = PodRef { namespace: "sds-agent".into(), name: format!("sds-agent-{node}").into(), uid: format!("agent-{node}").into() };
        let environment = NodeEnvironment { node_name: Some(format!("n{node}").into()), pod: Some(pod) };
        let (namespace, clock) = (RequestNamespace::Fixed("sds-agent".into()), Arc::new(self.clock.clone()));
        let requests = Requests::new(
            self.api.client(&metrics),
            namespace.clone(),
            Arc::new(Agent::new(&environment, None, boot)),
            Some(Arc::new(Running)),
            clock.clone(),
            metrics,
            RequestMetrics::default(),
        );
        let issuer_ref = IssuerRef { name: "mesh-ca".into(), kind: "ClusterIssuer".into(), group: "cert-manager.io".into() };
        let settings = Settings { issuer_ref, namespace, trust_status_ca: false };
        let issuer = Arc::new(CertManager::new(requests.clone(), settings, None)) as Arc<dyn Issuer>;
        let (store, events) = Store::new();
        let profile = identity("a").profile.clone();
        let plan = Plan::new([(profile.issuer.clone(), issuer)].into(), [profile], Duration::from_secs(300));
        let (plan, plan_now) = tokio::sync::watch::channel(Arc::new(plan));
        let trust = Trust::with_clock(trust::Metrics::default(), Arc::new(self.clock.clone()));
        trust.source(None, "test").take(self.authority.bundle().unwrap()).unwrap();
        let parts = rotation_parts(&store, events, plan_now, &trust, &self.clock);
        let tasks = vec![
            tokio::spawn(async move { requests.run(CancellationToken::new()).await }),
            tokio::spawn(async move {
                rotation::run(parts, CancellationToken::new()).await;
                drop((trust, plan));
            }),
        ];
        Process { store, leases: Vec::new(), tasks }
    }

    /// Starts the approver with the rules of the agents' configuration.
    fn start_approver(&mut self) {
        let metrics = agent_kube::Metrics::default();
        let client = self.api.client_at(&metrics, approver::RATE);
        let profile = identity("a").profile.clone();
        let issuer = IssuerRef { name: "mesh-ca".into(), kind: "ClusterIssuer".into(), group: "cert-manager.io".into() };
        let guarded =
            approver::rules::Guarded { name: profile.issuer.clone(), issuer, namespace: RequestNamespace::Fixed("sds-agent".into()) };
        let rules = Rules {
            agents: [AGENT.to_owned()].into(),
            issuers: vec![guarded],
            resolver: Resolver::single(TrustDomain::new("cluster.local").unwrap(), profile),
            annotations: Vec::new(),
            overlap: Duration::ZERO,
        };
        let pods = Pods::new(client.clone(), None, None, metrics.clone());
        let approver = Approver::new(approver::Parts {
            client,
            active_rules: tokio::sync::watch::channel(Arc::new(ActiveRules::new(rules))).1,
            pods: pods.clone(),
            clock: Arc::new(self.clock.clone()),
            instance: "approver-0".into(),
            kube_metrics: metrics,
            metrics: approver::Metrics::default(),
        });
        self.tasks.push(tokio::spawn(async move { pods.run().await }));
        self.tasks.push(tokio::spawn(approver.run()));
    }
}

impl Process {
    fn serve(&mut self, node: usize, numbers: impl IntoIterator<Item = usize>) {
        for number in numbers {
            let identity = samples::identity(&account(node, number));
            self.leases.push(self.store.lease(&identity, Demand::Now, Some(pod_of(node, number))));
        }
    }
}

/// Signs each approved request. Panics if one is denied.
async fn sign_approved(api: FakeApi, authority: Arc<Embedded>) {
    let mut moved = api.moved();
    loop {
        moved.borrow_and_update();
        for request in api.objects(CR) {
            let conditions = request["status"]["conditions"].as_array().cloned().unwrap_or_default();
            assert!(conditions.iter().all(|condition| condition["type"] != "Denied"), "{}", request["status"]);
            if conditions.is_empty() || !request["status"]["certificate"].is_null() {
                continue;
            }
            let pem = STANDARD.decode(request["spec"]["request"].as_str().unwrap()).unwrap();
            let (_, csr) = x509_parser::pem::parse_x509_pem(&pem).unwrap();
            let chain = STANDARD.encode(authority.sign(csr.contents, HOUR));
            let [namespace, name] = ["namespace", "name"].map(|field| request["metadata"][field].as_str().unwrap());
            api.change(CR, namespace, name, |object| {
                object["status"]["conditions"].as_array_mut().unwrap().push(json!({"type": "Ready", "status": "True", "reason": "Issued"}));
                object["status"]["certificate"] = json!(chain);
            });
        }
        moved.changed().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn twelve_hours_without_an_approver_deny_no_request_of_an_honest_agent() {
    let mut cluster = Cluster::new();
    let mut agents: Vec<Process> = (0..NODES).map(|node| cluster.agent(node, 1)).collect();
    for (node, agent) in agents.iter_mut().enumerate() {
        (0..EACH).for_each(|number| cluster.start_pod(node, number));
        agent.serve(node, 0..EACH);
    }
    cluster.api.until_count(CR, NODES * EACH).await;

    tokio::time::sleep(3 * HOUR).await;
    // Ten pods of a node end, and ten others start.
    (0..10).for_each(|number| cluster.api.remove("pods", "shop", &account(0, number)));
    agents[0].leases.drain(..10);
    tokio::time::sleep(2 * HOUR).await;
    (EACH..EACH + 10).for_each(|number| cluster.start_pod(0, number));
    agents[0].serve(0, EACH..EACH + 10);
    tokio::time::sleep(2 * HOUR).await;
    // The process of an agent is killed twice. Its keys are lost, and its requests stay behind.
    for boot in 2..4 {
        agents[1] = cluster.agent(1, boot);
        agents[1].serve(1, 0..EACH);
        tokio::time::sleep(HOUR).await;
    }
    tokio::time::sleep(3 * HOUR).await;
    let waiting = cluster.api.objects(CR);
    assert!(waiting.iter().all(|request| request["status"].is_null()), "a request was decided");
    assert!(waiting.len() <= 2 * NODES * EACH, "{} requests wait", waiting.len());

    cluster.start_approver();
    for agent in &agents {
        assert_eq!(agent.leases.len(), EACH);
        for lease in &agent.leases {
            let mut watch = lease.watch();
            let svid = tokio::time::timeout(HOUR, watch.wait_for(Option::is_some)).await;
            svid.expect("a certificate in time").unwrap();
        }
    }
    assert!(!cluster.tasks[0].is_finished(), "a request was denied");
}
