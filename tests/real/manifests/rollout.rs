//! The DaemonSet as the real controller rolls it out: pods that it has made, the scheduler has bound and the kubelet runs.

use std::{fs, net::SocketAddr, os::unix::fs::MetadataExt, path::Path, time::Duration};

use serde_json::{Value, json};

use super::site::{PATIENCE, Site, Way, exposed};
use crate::support::{
    self,
    cluster::Pod,
    envoy::{Envoy, Sds, Side},
    eventually,
    manifests::NAMESPACE,
    node::PAUSE,
    pair::Pair,
};

const SHARED: Way = Way {
    name: "shared",
    socket: "/run/sds-agent/sds.sock",
    volume: || json!({"hostPath": {"path": "/run/sds-agent", "type": "Directory"}}),
};
/// So long a bad version is watched: several of its starts.
const WATCHED: Duration = Duration::from_secs(15);
/// `EX_USAGE`: the configuration cannot be used.
const USAGE: i64 = 64;

/// Envoys in pods of their own, which demand each other's identity.
async fn pair(site: &Site) -> Pair {
    let mut pods = Vec::new();
    for name in ["server", "client"] {
        let pause = json!({"containers": [{"name": "main", "image": PAUSE, "command": ["/pause"]}]});
        pods.push(site.node.pod(&site.shop, name, &pause).await);
    }
    let (server, client) = (&pods[0], &pods[1]);
    let start = async |pod: &Pod, side: Side<'_>, sds| {
        Envoy::start_under(&site.node.words_as(pod).await, side, Path::new(SHARED.socket), sds).await
    };
    let (server_id, client_id) = (server.spiffe_id(), client.spiffe_id());
    let server = start(server, Side::Server { client: &client_id }, Sds::StateOfTheWorld).await;
    let tls = server.live().await;
    let client = start(client, Side::Client { server: &server_id, at: tls }, Sds::Delta).await;
    let entrance = client.live().await;
    Pair { server, client, tls, entrance }
}

fn inode(site: &Site) -> u64 {
    fs::metadata(site.node.path(SHARED.socket)).expect("the socket is there").ino()
}

async fn until_streams(agent: SocketAddr, least: f64) {
    eventually("the Envoys' streams are here", PATIENCE, async || {
        let page = exposed(agent).await?;
        let rows = page.lines().filter(|line| line.starts_with("sds_agent_streams{"));
        let streams: f64 = rows.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum();
        if streams >= least { Ok(()) } else { Err(format!("{streams} streams")) }
    })
    .await;
}

fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_else(|| panic!("no {path} in {value}"))
}

fn is_ready(pod: &Value) -> bool {
    pod["status"]["containerStatuses"][0]["ready"] == true
}

/// Two versions that work, one that does not, and the way back, with load on two Envoys all the while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemonset_rolls_out_without_a_gap_and_a_broken_version_stops_it() {
    let _turn = support::turn().await;
    let site = Site::controlled("shared").await;
    site.release("Deployment", "sds-agent-approver", "one", "").await;
    site.until_rolled_out("Deployment", "sds-agent-approver").await;
    site.release("DaemonSet", "sds-agent", "one", "").await;
    site.until_rolled_out("DaemonSet", "sds-agent").await;
    for (kind, workload) in [("Deployment", "sds-agent-approver"), ("DaemonSet", "sds-agent")] {
        site.ours(&site.pods(workload).await[0], kind, workload);
    }

    let pair = pair(&site).await;
    pair.request().await.unwrap();
    eventually("the first requests are consumed", PATIENCE, async || {
        let left = site.cluster.requests(NAMESPACE).await;
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    let recorder = site.cluster.record_requests(NAMESPACE).await;
    let load = pair.load();

    // As a new release of ours is installed.
    let first = inode(&site);
    let two = site.release("DaemonSet", "sds-agent", "two", "").await;
    site.until_rolled_out("DaemonSet", "sds-agent").await;
    let good = site.pods("sds-agent").await.remove(0);
    site.ours(&good, "DaemonSet", "sds-agent");
    until_streams(two, 4.0).await;
    let second = inode(&site);
    assert_ne!(second, first, "the successor has the socket");

    // One that cannot be used: every start of it ends.
    site.release("DaemonSet", "sds-agent", "three", "keys: { lockMemory: perhaps }\n").await;
    let broken = eventually("the new version has ended more than once", PATIENCE, async || {
        let pods = site.pods("sds-agent").await;
        let Some(broken) = pods.iter().find(|pod| text(pod, "/metadata/uid") != text(&good, "/metadata/uid")) else {
            return Err("there is no new pod".to_owned());
        };
        let status = &broken["status"]["containerStatuses"][0];
        let ended = ["lastState", "state"].iter().find_map(|state| status[state]["terminated"]["exitCode"].as_i64());
        match (ended, status["restartCount"].as_i64()) {
            (Some(code), Some(1..)) => {
                assert_eq!(code, USAGE, "{status}");
                Ok(broken.clone())
            }
            _ => Err(status.to_string()),
        }
    })
    .await;
    let until = tokio::time::Instant::now() + WATCHED;
    while tokio::time::Instant::now() < until {
        let pods = site.pods("sds-agent").await;
        let old = pods.iter().find(|pod| text(pod, "/metadata/uid") == text(&good, "/metadata/uid")).expect("the old pod stays");
        assert!(is_ready(old) && old["metadata"]["deletionTimestamp"].is_null(), "{old}");
        assert!(!pods.iter().any(|pod| text(pod, "/metadata/uid") == text(&broken, "/metadata/uid") && is_ready(pod)));
        assert_eq!(inode(&site), second, "the socket is the old one's");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let status = site.cluster.get(&format!("/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/sds-agent")).await["status"].take();
    assert_eq!((&status["numberAvailable"], &status["desiredNumberScheduled"]), (&json!(1), &json!(1)), "{status}");
    let words = site.node.container_log(&site.pod(&broken), "sds-agent");
    assert!(words.contains("keys.lockMemory") && words.contains("perhaps"), "{words}");
    let late = site.workload("late", &[SHARED]).await;
    site.assert_served(&late, SHARED).await;

    // And back: the one that serves is what is wanted again, and nobody notices.
    site.release_again("DaemonSet", "sds-agent", "two", two).await;
    site.until_rolled_out("DaemonSet", "sds-agent").await;
    assert_eq!(text(&site.pods("sds-agent").await[0], "/metadata/uid"), text(&good, "/metadata/uid"));
    assert_eq!(inode(&site), second);

    let tally = load.stop().await;
    pair.assert_clean(&tally, 500).await;
    let ordered: Vec<_> = recorder.seen().into_iter().flat_map(|request| request.uris).collect();
    assert_eq!(ordered, [late.spiffe_id()], "for the Envoys nothing was due");
}
