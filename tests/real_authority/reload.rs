//! The configuration changes while two Envoys work: an authority is added, a file is broken, certificates are reissued by hand. No
//! request fails and no stream is closed.

use std::{fs, path::Path, time::Duration};

use serde_json::Value;
use test_harness::{
    agent::Agent,
    authority::{Second, leads_to},
    cluster::Cluster,
    envoy::{Envoy, Sds},
    eventually,
    pair::{End, Pair},
    scene::{PATIENCE, Scene, Workload},
};

/// Certificates live for ten minutes, so the first automatic renewal comes after two minutes at the earliest.
const SETTINGS: &str = "certificate: { lifetime: 10m }\nreissueOver: 3s\n";
/// A new certificate that replaces another one is published after half a minute.
const ARRIVES: Duration = Duration::from_secs(60);

/// Replaces the file by a rename, as editors do.
fn replace(file: &Path, text: &str) {
    let beside = file.with_extension("next");
    fs::write(&beside, text).unwrap();
    fs::rename(&beside, file).unwrap();
}

async fn reloads(agent: &Agent, result: &str) -> f64 {
    agent.metric_of("sds_agent_configuration_reloads_total", &[&format!("result=\"{result}\"")]).await
}

async fn until_read(agent: &Agent, result: &str, count: f64) {
    eventually("the file is read again", PATIENCE, async || match reloads(agent, result).await {
        found if found >= count => Ok(()),
        found => Err(format!("{result}: {found}")),
    })
    .await;
}

/// The number of connections and of streams that an Envoy has opened to the agent.
async fn streams(envoy: &Envoy) -> [u64; 2] {
    let stats = envoy.stats().await;
    ["sds-grpc.upstream_cx_total", "sds-grpc.upstream_rq_total"].map(|name| stats.sum(name))
}

async fn serial(agent: &Agent, workload: &Workload) -> String {
    let row = agent.certificate(&workload.id()).await.expect("a certificate");
    row["serial"].as_str().unwrap_or_default().to_owned()
}

/// The row in use: the row of a previous identity can still exist, idle.
async fn row(agent: &Agent, workload: &Workload, issuer: &str) -> Result<Value, String> {
    let rows = agent.certificates().await;
    let found = rows.iter().find(|row| row["spiffe_id"] == workload.id() && row["issuer"] == issuer && row["state"] == "valid");
    found.cloned().ok_or_else(|| format!("{rows:?}"))
}

#[tokio::test]
async fn a_change_of_authority_under_load_closes_no_stream() {
    let _turn = test_harness::turn().await;
    let cluster = Cluster::connect().await;
    let second = Second::create(&cluster).await;
    let first_root = cluster.authority().await;
    let mut scene = Scene::new(&cluster).await;
    let more = scene.dir.path().join("second.pem");
    fs::write(&more, &second.root).unwrap();
    scene.agent_pod.more_roots = vec![more];
    let [server, client] = [scene.workload("server").await, scene.workload("client").await];
    let agent = scene.agent_pod.launch(scene.dir.path(), SETTINGS).start().await;
    let (server_id, client_id) = (server.id(), client.id());
    let pair = Pair::start(
        agent.socket(),
        End { id: &server_id, sds: Sds::StateOfTheWorld, cgroup: Some(&server.cgroup) },
        End { id: &client_id, sds: Sds::Delta, cgroup: Some(&client.cgroup) },
    )
    .await;
    let load = pair.load();
    load.passes("before the change").await;
    let chain = async |workload: &Workload| workload.fetch(&agent).await["chain_pem"].as_str().unwrap().to_owned();
    assert!(leads_to(scene.dir.path(), &chain(&server).await, &first_root).await);
    let before = (streams(&pair.server).await, streams(&pair.client).await, pair.taken().await, serial(&agent, &client).await);

    // The server's service account changes to the other authority.
    let file = scene.dir.path().join("config.yaml");
    let text = fs::read_to_string(&file).unwrap();
    let profile = format!(
        "profiles: [ {{ name: moved, match: {{ namespaces: [{}], serviceAccounts: [server] }},\n  \
         issuerRef: {{ name: {}, kind: ClusterIssuer }} }} ]\n",
        scene.namespace, second.issuer
    );
    let with_profile = format!("{text}{profile}");
    replace(&file, &with_profile);
    until_read(&agent, "ok", 1.0).await;
    let begun = std::time::Instant::now();
    eventually("the server's Envoy has the other authority's certificate", ARRIVES, async || match pair.taken().await {
        [taken, _] if taken > before.2[0] => Ok(()),
        taken => Err(format!("{taken:?}")),
    })
    .await;
    eprintln!("figure: another authority's certificate {} ms after the file was read", begun.elapsed().as_millis());
    let moved = row(&agent, &server, "moved").await.unwrap();
    assert_eq!(moved["profile"], "moved");
    let chain_now = chain(&server).await;
    assert!(leads_to(scene.dir.path(), &chain_now, &second.root).await && !leads_to(scene.dir.path(), &chain_now, &first_root).await);
    assert_eq!(serial(&agent, &client).await, before.3, "the other workload keeps its certificate");
    assert_eq!(pair.taken().await, [before.2[0] + 1, before.2[1]]);

    load.passes("with another authority").await;

    // A broken file changes nothing, and is logged.
    replace(&file, &format!("{with_profile}retention: soon\n"));
    until_read(&agent, "invalid", 1.0).await;
    assert_eq!(agent.metric("sds_agent_configuration_valid").await, 0.0);
    agent.logs("the error", PATIENCE, |line| line["field"] == "retention").await;
    // The log names fields that require a restart; the file is valid again.
    replace(&file, &format!("{with_profile}workerThreads: 3\n"));
    until_read(&agent, "ok", 2.0).await;
    assert_eq!(agent.metric("sds_agent_configuration_valid").await, 1.0);
    assert_eq!(agent.metric("sds_agent_configuration_restart_required").await, 1.0);
    agent.logs("what needs a restart", PATIENCE, |line| line["fields"] == "workerThreads").await;
    let orders = agent.metric_of("sds_agent_issuances_total", &["result=\"ok\""]).await;
    assert_eq!(orders, 3.0, "two at the start and one that moved");

    load.passes("with a broken file, and a good one").await;

    // Reissues by hand three times, as an operator who is unsure whether the first call had an effect.
    let taken = pair.taken().await;
    for _ in 0..3 {
        let answer = agent.post("/reissue?over=2s").await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let answer: Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(answer["over"], "2s");
        assert!(answer["matched"].as_u64().unwrap() >= 2, "{answer}");
    }
    pair.rotated(taken, 1, ARRIVES).await;
    assert_eq!(pair.taken().await, taken.map(|count| count + 1));
    assert_eq!(agent.metric_of("sds_agent_issuances_total", &["result=\"ok\""]).await, 5.0);
    row(&agent, &server, "moved").await.unwrap();

    assert_eq!((streams(&pair.server).await, streams(&pair.client).await), (before.0, before.1), "no stream was closed");
    load.passes("reissued").await;
    pair.assert_clean(&load.stop().await).await;
    second.remove(&cluster).await;
}
