//! The interfaces for operators: `sds-agent certs`, the admin address, and Events on pods, with the real API server.

use std::{path::Path, time::Duration};

use serde_json::Value;
use test_harness::{
    agent::{self, Agent, Launch},
    child,
    cluster::Cluster,
    eventually,
    scene::{PATIENCE, Scene, Workload},
    signer::{Answer, Signer},
};

/// Runs `sds-agent` with arguments; returns its exit code, standard output and standard error.
async fn sds_agent(words: &[&str]) -> (Option<i32>, String, String) {
    let output = child::run(agent::program(), words, PATIENCE).await;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

async fn certs(agent: &Agent, more: &[&str]) -> (Option<i32>, String, String) {
    let admin = format!("http://{}", agent.admin());
    sds_agent(&[&["certs", "--admin", &admin], more].concat()).await
}

#[tokio::test]
async fn certs_tells_what_the_agent_holds_and_says_where_there_is_none() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let agent = Launch::dev(dir.path()).start().await;
    let (code, text, _) = certs(&agent, &[]).await;
    assert_eq!((code, text.as_str()), (Some(0), "the agent holds no certificate: no client has requested one\n"));

    let socket = dir.path().join("sds.sock");
    let fetched =
        child::succeed(agent::program(), &["fetch", "--socket", path(&socket), "--name", "default", "-o", "json"], PATIENCE).await;
    let fetched: Value = serde_json::from_str(&fetched).expect("JSON");
    let (code, text, _) = certs(&agent, &["-o", "json"]).await;
    let answer: Value = serde_json::from_str(&text).expect("JSON");
    let row = &answer["certificates"][0];
    assert_eq!(code, Some(0));
    for field in ["spiffe_id", "serial", "fingerprint_sha256", "not_before", "not_after", "dns_names"] {
        assert_eq!(row[field], fetched[field], "{field}");
    }
    assert!(!text.contains("PRIVATE KEY") && text.ends_with("}\n"));
    let (code, text, _) = certs(&agent, &[]).await;
    let serial: String = fetched["serial"].as_str().expect("a serial number").chars().take(12).collect();
    assert!(code == Some(0) && text.starts_with("IDENTITY") && text.contains(&serial), "{text}");

    let admin = agent.admin().to_string();
    agent.kill().await;
    let (code, text, words) = sds_agent(&["certs", "--admin", &admin]).await;
    assert_eq!((code, text.as_str()), (Some(69), ""));
    assert!(words.contains("cannot be reached") && words.contains("check that the agent runs here"), "{words}");
}

fn path(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}

/// A static pod has no identity and retries repeatedly. A process that the policy rejects also gets one Event.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_may_have_nothing_is_told_once() {
    let scene = Scene::new(&Cluster::connect().await).await;
    let settings = "attestationPolicy: { uids: [4242] }\n";
    let agent = scene.agent_pod.launch(scene.dir.path(), settings).start().await;
    let hash = "0123456789abcdef0123456789abcdea";
    let unnamed = Workload::of(scene.cluster.mirror_pod(&scene.namespace, "static", &scene.node, hash).await);
    let (root, quiet) = (scene.workload("root").await, scene.workload("quiet").await);
    for _ in 0..4 {
        for workload in [&unnamed, &root] {
            assert_eq!(workload.refusal(&agent, "10s").await.code, 77);
        }
    }
    let own = scene.agent_pod.pod.clone();
    for (workload, reason) in [(&unnamed, "no_service_account"), (&root, "uid_not_allowed")] {
        let told = event(&scene, workload, 1).await;
        assert_eq!((&told["type"], &told["reason"]), (&"Warning".into(), &"CallerRefused".into()));
        assert!(told["note"].as_str().is_some_and(|note| note.contains(&format!("was refused: {reason}: "))), "{told}");
        assert_eq!(told["reportingInstance"], own.name.as_str());
    }
    let written = agent.counted("sds_agent_pod_events_total", &["result=\"written\""], 2.0).await;
    assert!((written - 2.0).abs() < 0.5, "{written}");
    assert_eq!((events(&scene, &unnamed).await.len(), events(&scene, &root).await.len(), events(&scene, &quiet).await.len()), (1, 1, 0));
}

/// The agent's events on a pod, oldest first.
async fn events(scene: &Scene, workload: &Workload) -> Vec<Value> {
    let list = scene.cluster.get(&format!("/apis/events.k8s.io/v1/namespaces/{}/events", workload.pod.namespace)).await;
    let of_pod =
        |event: &&Value| event["regarding"]["uid"] == workload.pod.uid.as_str() && event["reportingController"] == "sds-agent.io/agent";
    let mut events: Vec<Value> = list["items"].as_array().expect("a list").iter().filter(of_pod).cloned().collect();
    events.sort_by_key(|event| event["eventTime"].as_str().unwrap_or_default().to_owned());
    events
}

async fn event(scene: &Scene, workload: &Workload, number: usize) -> Value {
    eventually(&format!("event {number} on {}", workload.pod.name), PATIENCE, async || {
        let all = events(scene, workload).await;
        all.get(number - 1).cloned().ok_or_else(|| format!("{all:?}"))
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trouble_is_one_event_on_the_pod_and_its_end_one_more() {
    let (cluster, _plane) = Cluster::own(&["--controllers", "*,-certificaterequests-approver,-certificaterequests-issuer-ca"]).await;
    let scene = Scene::new(&cluster).await;
    let agent = scene.agent_pod.launch(scene.dir.path(), "certificate: { lifetime: 1h }").start().await;
    let signer = Signer::start(&cluster, &scene.agent_pod.pod.namespace, Duration::from_secs(3600)).await;
    let (failing, denied, good) = (scene.workload("failing").await, scene.workload("denied").await, scene.workload("good").await);
    signer.answer(&failing.id(), Answer::Failed);
    signer.answer(&denied.id(), Answer::Denied);
    let streams = [failing.watch(agent.socket()), good.watch(agent.socket()), denied.watch(agent.socket())];

    let warning = event(&scene, &failing, 1).await;
    let says = |event: &Value, words: &str| event["note"].as_str().is_some_and(|note| note.contains(words));
    assert_eq!((&warning["type"], &warning["reason"]), (&"Warning".into(), &"CertificateNotIssued".into()));
    assert!(says(&warning, "the signer is out of ink") && says(&warning, &failing.id()), "{warning}");
    let refused = event(&scene, &denied, 1).await;
    assert!(refused["reason"] == "CertificateDenied" && says(&refused, "not on my watch"), "{refused}");

    // The failure continues, and the pod gets no second Event.
    let tries = signer.given(&failing.id()).len();
    eventually("it fails again", PATIENCE, async || {
        if signer.given(&failing.id()).len() > tries { Ok(()) } else { Err("it was not tried".to_owned()) }
    })
    .await;
    signer.answer(&failing.id(), Answer::Good);
    let over = event(&scene, &failing, 2).await;
    let serial = streams[0].update(1, PATIENCE).await["serial"].as_str().expect("a serial number").to_owned();
    assert_eq!((&over["type"], &over["reason"]), (&"Normal".into(), &"CertificateIssued".into()));
    assert!(says(&over, &serial), "{over}");

    assert_eq!((events(&scene, &failing).await.len(), events(&scene, &denied).await.len(), events(&scene, &good).await.len()), (2, 1, 0));
    assert!(agent.metric_of("sds_agent_pod_events_total", &["result=\"written\""]).await > 2.5);
    assert!(agent.metric_of("sds_agent_pod_events_total", &["result=\"failed\""]).await < 0.5);
    let row = agent.certificate(&denied.id()).await.expect("it is known");
    assert!(row["last_error"].as_str().is_some_and(|error| error.contains("not on my watch")) && row["waits_for"].is_string(), "{row}");
    let (code, text, _) = certs(&agent, &[]).await;
    assert!(code == Some(0) && text.lines().nth(1).is_some_and(|line| line.starts_with(&denied.id())), "the pressing one is first: {text}");
}
