//! Several issuers in one process, against a scripted API server under a paused clock.

use std::time::{Duration, SystemTime};

use agent_kube::fake::FakeApi;
use agent_runtime::{
    clock::TestClock,
    shutdown::Shutdown,
    telemetry::{self, Format, captured::Captured},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use cert_manager::keys;
use issuance::issuer::{Error, Issued, Order, Progress};
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::timeout};
use workload_identity::{Labels, PodRef, Workload};

use super::*;
use crate::app::Base;

const CR: &str = "certificaterequests";
const HOUR: Duration = Duration::from_secs(3600);

/// Profiles `a` and `b` with requests in these namespaces; the default profile has `sds-agent`.
fn config(a: &str, b: &str) -> Config {
    let text = format!(
        "issuer: {{ certManager: {{ issuerRef: {{ name: mesh-ca, kind: ClusterIssuer }} }} }}\n\
         trust: {{ sources: [ {{ file: /etc/roots.pem }} ] }}\n\
         profiles:\n\
         - {{ name: a, match: {{ namespaces: [a] }}, namespace: {a} }}\n\
         - {{ name: b, match: {{ namespaces: [b] }}, namespace: {b} }}\n"
    );
    let env = |name: &str| match name {
        "NODE_NAME" => Some("n1".to_owned()),
        "POD_NAMESPACE" => Some("sds-agent".to_owned()),
        "POD_NAME" => Some("sds-agent-x".to_owned()),
        "POD_UID" => Some("agent-1".to_owned()),
        _ => None,
    };
    Config::parse(&text, &env).unwrap().config
}

fn fixed(names: &[&str]) -> Vec<RequestNamespace> {
    names.iter().map(|name| RequestNamespace::Fixed((*name).to_owned())).collect()
}

#[test]
fn the_scopes_of_watches_never_meet() {
    for (a, b, expected) in [
        ("sds-agent", "sds-agent", fixed(&["sds-agent"])),
        ("one", "two", fixed(&["one", "two", "sds-agent"])),
        ("one", "one", fixed(&["one", "sds-agent"])),
        ("one", "workload", vec![RequestNamespace::Workload]),
        ("workload", "workload", vec![RequestNamespace::Workload]),
    ] {
        let config = config(a, b);
        let scopes = scopes(&config);
        assert_eq!(scopes, expected, "{a} {b}");
        for issuer in config.issuers.values() {
            let IssuerConfig::CertManager(issuer) = issuer else { panic!("{issuer:?}") };
            assert_eq!(scopes.iter().filter(|scope| holds(scope, &issuer.namespace)).count(), 1, "{a} {b}");
        }
    }
}

struct World {
    api: FakeApi,
    config: Config,
    issuer_set: IssuerSet,
    last: CancellationToken,
    running: Vec<JoinHandle<()>>,
}

impl World {
    fn start(config: Config) -> Self {
        let (api, metrics) = (FakeApi::new(), agent_kube::Metrics::default());
        let status = json!({"conditions": [{"type": "Ready", "status": "True"}]});
        let issuer = json!({"metadata": {"name": "mesh-ca", "namespace": ""}, "spec": {"ca": {}}, "status": status});
        api.put("clusterissuers", issuer);
        let cluster = Cluster { client: api.client(&metrics), metrics, pods: None, node_uid: None };
        let clock: Arc<dyn Clock> = Arc::new(TestClock::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)));
        let mut base = Base::new(Shutdown::new(Duration::ZERO));
        let mut builder = Builder::new(&config, &mut base);
        builder.clock.clone_from(&clock);
        let issuer_set = issuers(&mut builder, Some(&cluster)).unwrap();
        let Builder { last, tasks, .. } = builder;
        let running = tasks.into_iter().map(tokio::spawn).collect();
        Self { api, config, issuer_set, last, running }
    }

    /// Orders a certificate for a pod in `namespace` with the profile of that pod.
    fn order(&self, namespace: &str) -> JoinHandle<Result<Issued, Error>> {
        let pod = PodRef { namespace: namespace.into(), name: "p".into(), uid: "u".into() };
        let account = Some("s".into());
        let workload = Workload::Pod { pod: pod.clone(), service_account: account, labels: Labels::default(), picked: None };
        let identity = Arc::new(self.config.resolver().resolve(&workload).unwrap());
        let issuer = &self.issuer_set.issuers[&identity.profile.issuer];
        let (progress, _) = Progress::new();
        tokio::spawn(issuer.issue(Order { identity, evidence: Some(pod), progress }))
    }

    fn sign(&self, request: &Value) {
        let text = |field: &str| request["metadata"][field].as_str().unwrap();
        let chain = sds_server::material::samples::svid(workload_identity::samples::identity("a")).0.chain;
        self.api.change(CR, text("namespace"), text("name"), |object| {
            let conditions = json!([{"type": "Approved", "status": "True"}, {"type": "Ready", "status": "True", "reason": "Issued"}]);
            object["status"] = json!({"conditions": conditions, "certificate": STANDARD.encode(chain.to_pem())});
        });
    }
}

/// First case: each profile has its own namespace. Second case: profile `b` uses the workload's, so one watch sees all namespaces.
#[tokio::test(start_paused = true)]
async fn no_issuer_deletes_the_live_requests_of_another() {
    for (a, b, expected) in [("one", "two", ["one", "sds-agent", "two"]), ("one", "workload", ["b", "one", "sds-agent"])] {
        let world = World::start(config(a, b));
        let orders: Vec<_> = ["a", "b", "elsewhere"].into_iter().map(|namespace| world.order(namespace)).collect();
        let requests = world.api.until_count(CR, 3).await;
        let places: Vec<_> = requests.iter().map(|request| request["metadata"]["namespace"].as_str().unwrap()).collect();
        assert_eq!(places, expected);
        let one_of = |key: &str| requests.iter().all(|r| r["metadata"]["labels"][key] == requests[0]["metadata"]["labels"][key]);
        assert!(one_of(keys::INSTANCE) && one_of(keys::AGENT), "one agent: {requests:?}");

        // Sweeps and new lists see the requests for hours.
        for _ in 0..4 {
            tokio::time::sleep(HOUR).await;
            world.api.cut_watches(false);
            world.api.forget_history();
        }
        assert_eq!(world.api.count("delete", CR), 0, "{a} {b}");
        assert!(orders.iter().all(|order| !order.is_finished()));

        requests.iter().for_each(|request| world.sign(request));
        for order in orders {
            timeout(HOUR, order).await.unwrap().unwrap().unwrap();
        }
        world.api.until_count(CR, 0).await;
        assert_eq!(world.api.count("delete", CR), 3, "{a} {b}");

        world.last.cancel();
        for task in world.running {
            timeout(HOUR, task).await.unwrap().unwrap();
        }
    }
}

/// Peers may still hold certificates of a removed issuer, so its roots stay and the log says so.
#[tokio::test(start_paused = true)]
async fn an_issuer_that_is_taken_out_leaves_its_roots_and_says_so() {
    let log = Captured::default();
    let (_guard, _) = telemetry::capture("info", Format::Json, log.clone()).unwrap();
    let told = |told: bool| {
        let mut config = config("one", "two");
        for issuer in config.issuers.values_mut() {
            let IssuerConfig::CertManager(issuer) = issuer else { continue };
            issuer.trust_status_ca = told && issuer.namespace == fixed(&["one"])[0];
        }
        config
    };
    let mut world = World::start(told(true));
    let words = "the roots of a removed issuer stay";
    world.issuer_set.change(&told(true)).unwrap();
    assert_eq!(log.count(words), 0, "nothing has changed");
    world.issuer_set.change(&told(false)).unwrap();
    world.issuer_set.change(&told(false)).unwrap();
    assert_eq!(log.lines(words).iter().map(|line| &line["issuer"]).collect::<Vec<_>>(), ["mesh-ca"]);
    world.last.cancel();
}
