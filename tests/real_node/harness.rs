//! Checks of the tests themselves.

use std::{
    fs::{self, File},
    path::Path,
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
};
use serde_json::json;
use test_harness::{
    cgroups::PodCgroup,
    child::Child,
    cluster::{Cluster, ISSUER, name_of},
    eventually,
    load::Load,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    process::Command,
};

/// With this delay a load of a fixed duration would have almost no requests.
const SLOW: Duration = Duration::from_millis(50);
/// Limit for two control planes, on a busy machine.
const START: Duration = Duration::from_secs(180);

#[tokio::test]
async fn a_load_passes_its_phases_however_slow_its_target_is() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap();
    tokio::spawn(async move {
        for number in 0.. {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut request = [0; 1024];
                assert_ne!(stream.read(&mut request).await.unwrap(), 0);
                tokio::time::sleep(SLOW).await;
                // The last phase sees failures.
                let (status, body) = if number < 60 { ("200 OK", "well") } else { ("503 Unavailable", "ill") };
                let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
                // A stopped load does not read.
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    let load = Load::start(target, "well");
    load.passes("one").await;
    load.passes("two").await;
    let tally = load.stop().await;
    assert!(tally.requests >= 104, "{tally:?}");
    assert!(matches!(&tally.phases[..], [one, two] if one.starts_with("one: 5") && two.starts_with("two: 5")), "{tally:?}");
    assert!(tally.failed > 0 && tally.failures[0].contains("503"), "{tally:?}");
}

#[tokio::test]
async fn a_process_is_in_its_pods_cgroup_in_every_hierarchy() {
    let uid = "0f6b1d6e-7f2a-4c39-9f0e-5f3d1c2b4a59";
    let cgroup = PodCgroup::new(uid);
    let output = cgroup.command(Path::new("cat")).arg("/proc/self/cgroup").output().await.expect("cat runs");
    let lines = String::from_utf8(output.stdout).expect("text");
    assert_eq!(lines.lines().count(), fs::read_to_string("/proc/self/cgroup").expect("/proc is mounted").lines().count());
    for line in lines.lines() {
        assert!(line.contains(&format!("/kubepods/burstable/pod{uid}/")), "{line}");
    }
    let folders = cgroup.paths();
    drop(cgroup);
    assert!(folders.iter().all(|folder| !folder.exists()), "they are left behind");
}

/// A request like an agent's, with a token bound to its pod: cert-manager signs it, and records the pod and the node. This shows that the
/// control plane behaves as the other tests assume.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_control_plane_issues_and_records_who_asked() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let cluster = Cluster::connect().await;
    let node = cluster.node().await;
    let agent = cluster.agent(dir.path(), &node).await;
    let namespace = &agent.pod.namespace;
    let recorder = cluster.record_requests(namespace).await;

    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let id = "spiffe://cluster.local/ns/a/sa/b";
    params.subject_alt_names = vec![rcgen::SanType::URI(id.try_into().expect("a URI"))];
    let csr = params.serialize_request(&key).expect("a CSR").pem().expect("PEM");

    let as_agent = agent.view().await;
    let requests = format!("/apis/cert-manager.io/v1/namespaces/{namespace}/certificaterequests");
    let request = json!({
        "apiVersion": "cert-manager.io/v1", "kind": "CertificateRequest",
        "metadata": {"generateName": "test-"},
        "spec": {
            "issuerRef": {"name": ISSUER, "kind": "ClusterIssuer", "group": "cert-manager.io"},
            "request": BASE64_STANDARD.encode(csr),
            "duration": "30s",
            "usages": ["digital signature", "key encipherment", "server auth", "client auth"],
        },
    });
    let request = as_agent.create(&requests, &request).await;
    let extra = &request["spec"]["extra"];
    assert_eq!(extra["authentication.kubernetes.io/node-name"], json!([node]));
    assert_eq!(extra["authentication.kubernetes.io/pod-uid"], json!([agent.pod.uid]));
    assert!(extra["authentication.kubernetes.io/node-uid"].is_array(), "{extra}");

    let path = format!("{requests}/{}", name_of(&request));
    let certificate = eventually("the request is issued", Duration::from_secs(30), async || {
        let request = as_agent.get(&path).await;
        request["status"]["certificate"].as_str().map(str::to_owned).ok_or_else(|| request["status"].to_string())
    });
    assert!(!certificate.await.is_empty());
    as_agent.delete(&path).await;
    assert!(cluster.requests(namespace).await.is_empty());
    assert_eq!(recorder.seen().iter().map(|seen| seen.uris.clone()).collect::<Vec<_>>(), [[id.to_owned()]]);

    // The agent has no further permission: it can neither approve nor read Secrets.
    for path in ["/api/v1/secrets", "/api/v1/namespaces/cert-manager/secrets/ca-key-pair"] {
        let refused = as_agent.try_get(path).await.expect_err("it has no right to");
        assert!(matches!(&refused, kube::Error::Api(status) if status.code == 403), "{refused}");
    }
}

/// Set for the child process, so that `--include-ignored` starts no second control plane.
const CHILD: &str = "SDS_AGENT_TEST_SHARED_PLANE";

/// Two test programs, one after the other, below a program of the name `cargo`.
#[tokio::test]
async fn test_programs_of_a_run_share_a_control_plane_that_ends_with_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let cargo = dir.path().join("cargo");
    fs::copy("/bin/sh", &cargo).unwrap();
    let this = std::env::current_exe().unwrap();
    let test = format!("{} --exact harness::child_that_uses_the_shared_control_plane --ignored --nocapture", this.display());
    let mut command = Command::new(cargo);
    command.args(["-c", &format!("{test}; {test}; echo both; read -r line")]).env(CHILD, "");
    let mut run = Child::spawn_tied("cargo", &mut command);
    let output =
        run.stdout().until("both have run", START, |lines| lines.iter().any(|line| line == "both").then(|| lines.join("\n"))).await;
    let found: Vec<_> = output.lines().filter_map(|line| line.split_once("shared: ")).map(|(_, path)| path.to_owned()).collect();
    assert!(found.len() == 2 && found[0] == found[1], "{output}");
    let lock = Path::new(&found[0]).with_file_name("lock");
    let is_running = || Flock::lock(File::open(&lock).unwrap(), FlockArg::LockExclusiveNonblock).is_err();
    assert!(is_running(), "it has ended before the run");
    assert_ne!(Path::new(&found[0]), test_harness::shared_plane::kubeconfig(), "another run's is another");

    run.signal(Signal::SIGKILL);
    run.exit(START).await;
    eventually("the control plane has ended", START, async || if is_running() { Err("it runs".to_owned()) } else { Ok(()) }).await;
}

#[tokio::test]
#[ignore = "a test program of a run"]
async fn child_that_uses_the_shared_control_plane() {
    if std::env::var_os(CHILD).is_some() {
        Cluster::shared().await.get("/version").await;
        println!("shared: {}", test_harness::shared_plane::kubeconfig().display());
    }
}
