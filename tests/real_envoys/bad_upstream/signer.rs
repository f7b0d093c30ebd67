//! The wrong answers of an approver or signer, each for a separate workload, all at the same time.

use std::time::Duration;

use futures::future::join_all;
use test_harness::{
    agent::Agent,
    cluster::Cluster,
    eventually,
    scene::{PATIENCE, Scene, Stream, Workload},
    signer::{Answer, Signer},
};

use super::failures;

const LIFETIME: Duration = Duration::from_secs(40);

/// The workload, the answer, the label by which it is counted, and the texts in the log about the cause and the remedy.
const CASES: [(&str, Answer, &str, [&str; 2]); 9] = [
    ("denied", Answer::Denied, "denied", ["was denied: Policy: not on my watch", "kubectl describe"]),
    ("failed", Answer::Failed, "failed", ["failed: Failed: the signer is out of ink", "kubectl describe"]),
    ("expired", Answer::Expired, "invalid_certificate", ["the leaf expired at ", "is the issuer's clock or this node's wrong?"]),
    ("early", Answer::NotYetValid, "invalid_certificate", ["the leaf is valid only from ", "is this node's clock behind?"]),
    (
        "key",
        Answer::WrongKey,
        "invalid_certificate",
        ["the leaf's public key is not the one", "the issuer must sign the key of the request"],
    ),
    (
        "name",
        Answer::WrongName,
        "invalid_certificate",
        ["the leaf's URI SANs are [\"spiffe://cluster.local/ns/elsewhere", "allowed_uri_sans"],
    ),
    ("garbage", Answer::Garbage, "invalid_certificate", ["certificate 1 is not valid X.509", "the issuer must return certificates in PEM"]),
    ("words", Answer::Words, "invalid_certificate", ["the chain holds no certificate", "the issuer must return certificates in PEM"]),
    ("nothing", Answer::Nothing, "invalid_certificate", ["the chain holds no certificate", "the issuer must return certificates in PEM"]),
];

/// Number of failures of an identity before the assertions. The wait after a denial is long.
fn enough(answer: Answer) -> usize {
    if answer == Answer::Denied { 1 } else { 2 }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_a_signer_answers_the_good_certificate_stays() {
    let without = "*,-certificaterequests-approver,-certificaterequests-issuer-ca";
    let (cluster, _plane) = Cluster::own(&["--controllers", without]).await;
    let scene = Scene::new(&cluster).await;
    let signer = Signer::start(&cluster, &scene.agent_pod.pod.namespace, LIFETIME).await;
    let settings = format!("certificate: {{ lifetime: {}s, renewAt: 0.1, jitter: 0 }}", LIFETIME.as_secs());
    let agent = scene.agent_pod.launch(scene.dir.path(), &settings).start().await;

    let workloads = join_all(CASES.map(|(name, ..)| scene.workload(name))).await;
    let streams: Vec<Stream> = workloads.iter().map(|workload| workload.watch(agent.socket())).collect();
    let first = join_all(streams.iter().map(|stream| stream.update(1, PATIENCE))).await;
    for (workload, case) in workloads.iter().zip(CASES) {
        signer.answer(&workload.id(), case.1);
    }
    eventually("every workload has seen its trouble", PATIENCE, async || {
        let seen = |workload: &Workload, answer| failures(&agent, &workload.id()).len() >= enough(answer);
        let missing = workloads.iter().zip(CASES).filter(|(workload, case)| !seen(workload, case.1)).map(|(_, case)| case.0);
        let missing: Vec<_> = missing.collect();
        if missing.is_empty() { Ok(()) } else { Err(format!("not {missing:?}")) }
    })
    .await;

    for (((workload, case), stream), first) in workloads.iter().zip(CASES).zip(&streams).zip(&first) {
        assert_eq!(stream.updates().len(), 1, "{}: something was pushed", case.0);
        stream.assert_undisturbed();
        // A client that reconnects gets the valid certificate, and does not advance the next attempt.
        assert_eq!(workload.fetch(&agent).await["serial"], first["serial"], "{}", case.0);
    }
    assert_told(&agent, &workloads).await;
    assert_backed_off(&signer, &workloads);
    assert_one_refusal_is_left(&scene, &signer, &workloads).await;

    for workload in &workloads {
        signer.answer(&workload.id(), Answer::Good);
    }
    for ((workload, case), stream) in workloads.iter().zip(CASES).zip(&streams) {
        let next = stream.update(2, PATIENCE).await;
        let good = signer.good(&workload.id());
        assert!(good.iter().any(|serial| next["serial"] == **serial), "{}: {next} is not of {good:?}", case.0);
        assert!(agent.certificate(&workload.id()).await.expect("its row")["last_error"].is_null(), "{}", case.0);
        stream.assert_undisturbed();
    }
}

/// Asserts that each failure has one log line with its cause and remedy, and one count.
async fn assert_told(agent: &Agent, workloads: &[Workload]) {
    for (workload, (name, _, _, words)) in workloads.iter().zip(CASES) {
        let told = failures(agent, &workload.id());
        for line in &told {
            let cause = line["cause"].as_str().expect("a cause");
            assert!(words.iter().all(|word| cause.contains(word)), "{name}: {cause}");
            assert_eq!(line["level"], "WARN");
            assert_eq!(line["message"], "no new certificate; the one in use stays");
        }
        let row = agent.certificate(&workload.id()).await.expect("its row");
        assert_eq!(row["last_error"], told.last().expect("a failure")["cause"], "{name}");
    }
    for result in ["denied", "failed", "invalid_certificate"] {
        let all = async || {
            let told = workloads.iter().zip(CASES).filter(|(_, case)| case.2 == result).map(|(w, _)| failures(agent, &w.id()).len());
            (told.sum::<usize>(), agent.metric_of("sds_agent_issuances_total", &[&format!("result=\"{result}\"")]).await)
        };
        eventually("every logged failure was counted", PATIENCE, async || {
            let (told, counted) = all().await;
            #[expect(clippy::cast_precision_loss, reason = "a few")]
            if (counted - told as f64).abs() < 0.5 { Ok(()) } else { Err(format!("{result}: {told} logged, {counted} counted")) }
        })
        .await;
    }
}

/// Asserts that no retry came at once, and none soon after a denial, although clients have connected in between.
fn assert_backed_off(signer: &Signer, workloads: &[Workload]) {
    for (workload, (name, answer, ..)) in workloads.iter().zip(CASES) {
        let bad: Vec<_> = signer.given(&workload.id()).into_iter().filter(|given| given.answer == answer).collect();
        for pair in bad.windows(2) {
            let wait = pair[1].at - pair[0].at;
            let least = if answer == Answer::Denied { 5.0 } else { 0.45 };
            assert!(wait.as_secs_f64() >= least, "{name}: again after {wait:?}");
        }
    }
}

/// The last request of a failure stays for diagnosis; requests with a certificate have been deleted.
async fn assert_one_refusal_is_left(scene: &Scene, signer: &Signer, workloads: &[Workload]) {
    eventually("only the last refusals are left", PATIENCE, async || {
        let left = scene.requests().await;
        for (workload, (name, answer, ..)) in workloads.iter().zip(CASES) {
            let given = signer.given(&workload.id());
            let kept: Vec<_> = given.iter().filter(|given| left.contains(&given.name)).collect();
            let wanted = matches!(answer, Answer::Denied | Answer::Failed).then(|| &given.last().expect("a refusal").name);
            // One further request may be in progress.
            if kept.len() != usize::from(wanted.is_some()) || kept.first().map(|kept| &kept.name) != wanted {
                return Err(format!("{name}: of {given:?} there are {kept:?}"));
            }
        }
        Ok(())
    })
    .await;
    for (workload, (_, answer, _, words)) in workloads.iter().zip(CASES) {
        if let (Answer::Denied | Answer::Failed, Some(last)) = (answer, signer.given(&workload.id()).pop()) {
            let namespace = &scene.agent_pod.pod.namespace;
            let path = format!("/apis/cert-manager.io/v1/namespaces/{namespace}/certificaterequests/{}", last.name);
            let request = scene.cluster.get(&path).await;
            assert_eq!(request["metadata"]["annotations"]["sds-agent.io/spiffe-id"], workload.id());
            let said = words[0].rsplit(": ").next().expect("words");
            assert!(request["status"]["conditions"].to_string().contains(said), "{request}");
        }
    }
}
