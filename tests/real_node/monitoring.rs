//! The files for monitoring with a real Prometheus: it scrapes real agents, every panel of the dashboard has data, every rule can be
//! evaluated, and promtool reports no problem in rules and metrics.

use std::{collections::BTreeSet, fs, path::Path, process::Stdio, time::Duration};

use serde_json::Value;
use test_harness::{
    agent::{Agent, Launch},
    cgroups::PodCgroup,
    child,
    cluster::Cluster,
    envoy::Sds,
    eventually, http,
    pair::{End, Pair},
    prometheus::{self, AGENTS, APPROVERS, Prometheus, Target},
    scene::{PATIENCE, Scene, Stream, Workload},
    tools,
    world::{GUARDED, World},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::Command,
    time::timeout,
};

/// Limit until renewals have happened and Prometheus has scraped them.
const DATA: Duration = Duration::from_secs(120);

/// Panels that may have no data of an agent, and the reason.
const ELSEWHERE: [(&str, &str); 1] =
    [("kube_daemonset_status_number_unavailable", "kube-state-metrics, which no control plane of the tests runs")];

#[tokio::test]
async fn rules_pass_their_tests_and_each_is_tested() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(prometheus::file("tests/monitoring/rules_test.yaml"), dir.path().join("rules_test.yaml")).unwrap();
    let promtool = tools::promtool();
    let test = async |rules: &Value| {
        fs::write(dir.path().join("rules.yaml"), rules.to_string()).unwrap();
        let test = dir.path().join("rules_test.yaml");
        child::run(&promtool, &["test", "rules", test.to_str().unwrap()], PATIENCE).await
    };
    let rules = prometheus::rules();
    let passed = test(&rules).await;
    assert!(passed.status.success(), "{}", String::from_utf8_lossy(&passed.stderr));
    let file = dir.path().join("rules.yaml");
    let checked = child::succeed(&promtool, &["check", "rules", file.to_str().unwrap()], PATIENCE).await;
    eprintln!("figure: promtool check rules: {}", checked.split_whitespace().collect::<Vec<_>>().join(" "));

    // Each rule has a test that fails if the rule is missing, fires at once, or fires always.
    let mut broken = 0;
    for (g, group) in rules["groups"].as_array().unwrap().iter().enumerate() {
        for (r, rule) in group["rules"].as_array().unwrap().iter().enumerate() {
            for what in ["absent", "always", "at once"] {
                if what == "at once" && rule.get("for").is_none() {
                    continue;
                }
                let mut mutated = rules.clone();
                break_rule(&mut mutated["groups"][g]["rules"][r], what);
                assert!(!test(&mutated).await.status.success(), "no test fails although {} is {what}", rule["alert"]);
                broken += 1;
            }
        }
    }
    eprintln!("figure: {broken} broken rules, each detected");
}

fn break_rule(rule: &mut Value, how: &str) {
    match how {
        "absent" => rule["alert"] = "Another".into(),
        "always" => {
            let (side, _) = rule["expr"].as_str().unwrap().rsplit_once(['<', '>', '=']).unwrap();
            rule["expr"] = format!("{} > -1e12", side.trim_end_matches(['<', '>', '=', ' '])).into();
        }
        "at once" => drop(rule.as_object_mut().unwrap().remove("for")),
        _ => panic!("{how}"),
    }
}

#[tokio::test]
async fn every_panel_shows_data_of_real_agents() {
    let _turn = test_harness::turn().await;
    let cluster = Cluster::connect().await;
    let scene = Scene::new(&cluster).await;
    let agent = scene.agent_pod.launch(scene.dir.path(), "certificate: { lifetime: 20s }").start().await;
    let dev_dir = tempfile::tempdir().unwrap();
    let dev = Launch::dev(dev_dir.path()).start().await;
    let guarded = Guarded::start().await;
    let targets = [
        Target { monitor: AGENTS, address: agent.admin(), node: &scene.node },
        Target { monitor: AGENTS, address: dev.admin(), node: "laptop" },
        Target { monitor: APPROVERS, address: guarded.approver.admin(), node: "elsewhere" },
    ];
    let prometheus = Prometheus::start(dev_dir.path(), &targets).await;

    let [server, client] = [scene.workload("server").await, scene.workload("client").await];
    let (server_id, client_id) = (server.id(), client.id());
    let _pair = Pair::start(
        agent.socket(),
        End { id: &server_id, sds: Sds::StateOfTheWorld, cgroup: Some(&server.cgroup) },
        End { id: &client_id, sds: Sds::Delta, cgroup: Some(&client.cgroup) },
    )
    .await;
    reject(&server.cgroup, agent.socket()).await;

    let mut panels = queries(&scene.node);
    let count = panels.len();
    eventually("every panel has data", DATA, async || {
        // New streams and callers, in addition to those that are open.
        client.fetch(&agent).await;
        let mut empty = Vec::new();
        for (title, expr) in std::mem::take(&mut panels) {
            if prometheus.query(&expr).await?.is_empty() {
                empty.push((title, expr));
            }
        }
        panels = empty;
        if panels.is_empty() { Ok(()) } else { Err(format!("{panels:#?}")) }
    })
    .await;
    eprintln!("figure: {count} queries of the dashboard, each with data of a real Prometheus");

    // The labels in the texts of the rules are those of the scrape.
    let ready = prometheus.query("sum by (node) (sds_agent_ready{job=\"sds-agent\"})").await.unwrap();
    let nodes: BTreeSet<_> = ready.iter().map(|(labels, _)| labels["node"].as_str().unwrap()).collect();
    assert_eq!(nodes, [scene.node.as_str(), "laptop"].into());
    let jobs = prometheus.query("count by (job) (sds_agent_ready)").await.unwrap();
    let jobs: BTreeSet<_> = jobs.iter().map(|(labels, count)| format!("{} {count}", labels["job"].as_str().unwrap())).collect();
    assert_eq!(jobs, ["sds-agent 2", "sds-agent-approver 1"].map(str::to_owned).into());

    // Every rule can be evaluated on real series, and the alert for the one failure fires.
    let firing = "ALERTS{alertname=\"SdsAgentSecretsRejected\", alertstate=\"firing\"}";
    let firing = eventually("the alert for the rejected secret fires", PATIENCE, async || {
        let found = prometheus.query(firing).await?;
        if found.is_empty() { Err("nothing fires".into()) } else { Ok(found) }
    })
    .await;
    assert_eq!((&firing[0].0["node"], &firing[0].0["kind"]), (&Value::from(scene.node.as_str()), &Value::from("certificate")));
    let rules = prometheus.get("/api/v1/rules").await.unwrap();
    for rule in rules["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap()) {
        assert_eq!(rule["health"], "ok", "{rule}");
    }

    // Agent and Prometheus negotiated OpenMetrics: the other format has no units.
    let about = prometheus.get("/api/v1/metadata?metric=sds_agent_issuance_duration_seconds").await.unwrap();
    assert_eq!(about["sds_agent_issuance_duration_seconds"][0]["unit"], "seconds", "{about}");

    for agent in [&agent, &dev, &guarded.approver] {
        let page = http::get_ok(agent.admin(), "/metrics").await.unwrap();
        lint(&page).await;
        described(&page);
    }

    // The series of a workload end with its pod, in the agent and in Prometheus; those of the other workload stay.
    let of = |workload: &Workload| {
        let account = &workload.pod.service_account;
        format!("sds_agent_certificate_expiration_timestamp_seconds{{service_account=\"{account}\"}}")
    };
    assert_eq!(prometheus.query(&of(&client)).await.unwrap().len(), 1);
    cluster.delete(&client.pod.path()).await;
    eventually("its series have ended", PATIENCE, async || {
        let left = prometheus.query(&of(&client)).await?;
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    assert_eq!(prometheus.query(&of(&server)).await.unwrap().len(), 1);
}

/// A separate cluster with the approver, and an agent with a client, so that the approver has requests to decide.
struct Guarded {
    approver: Agent,
    _client: Stream,
    _workload: Workload,
    _agent: Agent,
    _world: World,
}

impl Guarded {
    async fn start() -> Self {
        const LIFETIME: &str = "20s";
        let world = World::start(GUARDED).await;
        let approver = world.approver("approver-0", LIFETIME).await;
        let (node, namespace) = (world.cluster.node().await, world.cluster.namespace().await);
        let actor = world.actor("agent-0", "sds-agent", &node).await;
        let agent = world.agent(&actor, LIFETIME).await.start().await;
        let workload = Workload::of(world.cluster.pod(&namespace, "guarded", &node).await);
        let client = workload.watch(agent.socket());
        Self { approver, _client: client, _workload: workload, _agent: agent, _world: world }
    }
}

/// Receives a certificate as a pod's process and sends a NACK.
async fn reject(pod: &PodCgroup, socket: &Path) {
    let mut command = pod.command(&tools::grpcurl());
    command.args(["-plaintext", "-d", "@", &format!("unix://{}", socket.display())]);
    command.arg("envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut grpcurl = command.spawn().unwrap();
    let (mut requests, answers) = (grpcurl.stdin.take().unwrap(), grpcurl.stdout.take().unwrap());
    requests.write_all(b"{\"resource_names\": [\"default\"]}\n").await.unwrap();
    let mut lines = BufReader::new(answers).lines();
    let nonce = timeout(PATIENCE, async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if let Some(nonce) = line.trim().strip_prefix("\"nonce\": ") {
                return nonce.trim_end_matches(',').to_owned();
            }
        }
        panic!("the stream ended without an answer");
    });
    let nonce = nonce.await.expect("a certificate in time");
    let refusal =
        format!("{{\"resource_names\": [\"default\"], \"response_nonce\": {nonce}, \"error_detail\": {{\"message\": \"as told\"}}}}\n");
    requests.write_all(refusal.as_bytes()).await.unwrap();
    drop(requests);
    // The stream ends when the agent has read the whole request.
    let ended = async { while lines.next_line().await.unwrap().is_some() {} };
    let _ = timeout(Duration::from_secs(2), ended).await;
}

/// (panel, query) of the dashboard for one node, without queries of other programs' metrics.
fn queries(node: &str) -> Vec<(String, String)> {
    let dashboard = prometheus::read("daemonset/monitoring/dashboard.json");
    let mut out = Vec::new();
    let mut left_out = 0;
    for panel in dashboard["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row") {
        let title = panel["title"].as_str().unwrap();
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{title} has no query");
        for target in targets {
            let expr = target["expr"].as_str().unwrap().replace("$__rate_interval", "30s").replace("$node", node);
            assert!(!expr.contains('$'), "{title}: {expr} has a variable that is not replaced here");
            if ELSEWHERE.iter().any(|(metric, _)| expr.contains(metric)) {
                left_out += 1;
            } else {
                out.push((title.to_owned(), expr));
            }
        }
    }
    assert_eq!(left_out, ELSEWHERE.len(), "an exemption that no panel needs, or more than one panel of a kind");
    out
}

/// promtool reads the older text format, which a client without an Accept header gets.
async fn lint(page: &str) {
    assert!(page.lines().filter(|line| line.starts_with("# TYPE ") && line.ends_with("_total counter")).count() > 5, "{page}");
    let (passed, words) = check_metrics(page).await;
    assert!(passed, "{words}");
    // Shows that the check can fail.
    let (passed, words) = check_metrics(&page.replace("process_cpu_seconds_total", "process_cpu_seconds")).await;
    assert!(!passed && words.contains("_total"), "{words}");
}

/// Whether promtool reports no problem, and its output.
async fn check_metrics(text: &str) -> (bool, String) {
    let mut command = Command::new(tools::promtool());
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut promtool = command.spawn().unwrap();
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).await.unwrap();
    let output = timeout(PATIENCE, promtool.wait_with_output()).await.unwrap().unwrap();
    let words = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    (output.status.success(), words)
}

/// Asserts that the reference has every metric of a real page.
fn described(page: &str) {
    let reference = fs::read_to_string(prometheus::file("docs/metrics.md")).unwrap();
    let mut count = 0;
    for (name, kind) in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')) {
        assert!(reference.contains(&format!("| `{name}` | {kind} |")), "docs/metrics.md does not have {name} ({kind})");
        count += 1;
    }
    let series = page.lines().filter(|line| !line.starts_with('#')).count();
    eprintln!("figure: {count} metrics in {series} series on a real page, all in docs/metrics.md");
}
