//! The DaemonSet as the real controller rolls it out: the controller creates the pods, the scheduler binds them and the kubelet runs
//! them.

use std::{fs, net::SocketAddr, os::unix::fs::MetadataExt, path::Path, time::Duration};

use serde_json::{Value, json};
use test_harness::{
    cluster::Pod,
    envoy::{Envoy, Sds, Side},
    eventually,
    manifests::NAMESPACE,
    node::{Node, PAUSE},
    pair::Pair,
};
use tokio::net::UnixStream;

use super::site::{PATIENCE, Site, Way, exposed};

const SHARED: Way = Way {
    name: "shared",
    socket: "/run/sds-agent/sds.sock",
    volume: || json!({"hostPath": {"path": "/run/sds-agent", "type": "Directory"}}),
};
/// How often a bad version is checked, and the interval between two checks.
const LOOKS: usize = 30;
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);
/// `EX_USAGE`: the configuration cannot be used.
const USAGE: i64 = 64;

/// Creates a pod for an Envoy.
async fn place(node: &Node, namespace: &str, name: &str) -> Pod {
    let pause = json!({"containers": [{"name": "main", "image": PAUSE, "command": ["/pause"]}]});
    node.pod(namespace, name, &pause).await
}

async fn envoy(node: &Node, pod: &Pod, side: Side<'_>, sds: Sds) -> Envoy {
    Envoy::start_under(&node.words_as(pod).await, side, Path::new(SHARED.socket), sds).await
}

/// Starts Envoys in separate pods on these nodes, which require each other's identity.
async fn pair(site: &Site, [for_server, for_client]: [&Node; 2]) -> Pair {
    let [server, client] = [place(for_server, &site.shop, "server").await, place(for_client, &site.shop, "client").await];
    let (server_id, client_id) = (server.spiffe_id(), client.spiffe_id());
    let server = envoy(for_server, &server, Side::Server { client: &client_id }, Sds::StateOfTheWorld).await;
    let tls = server.live().await;
    let client = envoy(for_client, &client, Side::Client { server: &server_id, at: tls }, Sds::Delta).await;
    let entrance = client.live().await;
    Pair { server, client, tls, entrance }
}

/// Starts agents of version `one`, the approver, and two Envoys, and waits until all are ready.
async fn begin(site: &Site, nodes: [&Node; 2]) -> Pair {
    site.release("Deployment", "sds-agent-approver", "one", "").await;
    site.until_rolled_out("Deployment", "sds-agent-approver").await;
    site.release("DaemonSet", "sds-agent", "one", "").await;
    site.until_rolled_out("DaemonSet", "sds-agent").await;
    let pair = pair(site, nodes).await;
    pair.request().await.unwrap();
    eventually("the first requests are consumed", PATIENCE, async || {
        let left = site.cluster.requests(NAMESPACE).await;
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    pair
}

fn inode(node: &Node) -> u64 {
    fs::metadata(node.path(SHARED.socket)).expect("the socket is there").ino()
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

/// Rolls out two versions that work, one that does not, and returns to the previous one, with load on two Envoys all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemonset_rolls_out_without_a_gap_and_a_broken_version_stops_it() {
    let _turn = test_harness::turn().await;
    let site = Site::controlled("shared", 1).await;
    let pair = begin(&site, [&site.node, &site.node]).await;
    for (kind, workload) in [("Deployment", "sds-agent-approver"), ("DaemonSet", "sds-agent")] {
        site.ours(&site.pods(workload).await[0], kind, workload);
    }
    let recorder = site.cluster.record_requests(NAMESPACE).await;
    let load = pair.load();
    load.passes("before the release").await;

    // A new release of the manifests is installed.
    let first = inode(&site.node);
    let two = site.release("DaemonSet", "sds-agent", "two", "").await;
    site.until_rolled_out("DaemonSet", "sds-agent").await;
    let good = site.pods("sds-agent").await.remove(0);
    site.ours(&good, "DaemonSet", "sds-agent");
    until_streams(two, 4.0).await;
    let second = inode(&site.node);
    assert_ne!(second, first, "the successor has the socket");

    load.passes("after the release").await;

    // A version with an invalid configuration: its program ends at every start.
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
    for _ in 0..LOOKS {
        let pods = site.pods("sds-agent").await;
        let old = pods.iter().find(|pod| text(pod, "/metadata/uid") == text(&good, "/metadata/uid")).expect("the old pod stays");
        assert!(is_ready(old) && old["metadata"]["deletionTimestamp"].is_null(), "{old}");
        assert!(!pods.iter().any(|pod| text(pod, "/metadata/uid") == text(&broken, "/metadata/uid") && is_ready(pod)));
        assert_eq!(inode(&site.node), second, "the socket is the old one's");
        tokio::time::sleep(BETWEEN_LOOKS).await;
    }
    load.passes("beside the version that cannot be used").await;
    let status = site.cluster.get(&format!("/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/sds-agent")).await["status"].take();
    assert_eq!((&status["numberAvailable"], &status["desiredNumberScheduled"]), (&json!(1), &json!(1)), "{status}");
    let words = site.node.container_log(&site.pod(&broken), "sds-agent");
    assert!(words.contains("keys.lockMemory") && words.contains("perhaps"), "{words}");
    let late = site.workload("late", &[SHARED]).await;
    site.assert_served(&late, SHARED).await;

    // Rolls back: the desired version is the one that serves, and no client is disturbed.
    site.release_again("DaemonSet", "sds-agent", "two", two, |_| {}).await;
    site.until_rolled_out("DaemonSet", "sds-agent").await;
    assert_eq!(text(&site.pods("sds-agent").await[0], "/metadata/uid"), text(&good, "/metadata/uid"));
    assert_eq!(inode(&site.node), second);

    load.passes("back at the version before").await;
    let tally = load.stop().await;
    pair.assert_clean(&tally).await;
    let ordered: Vec<_> = recorder.seen().into_iter().flat_map(|request| request.uris).collect();
    assert_eq!(ordered, [late.spiffe_id()], "for the Envoys nothing was due");
}

/// A version that runs and never becomes ready reaches one node of two. Then the old agent's program on that node ends, and the
/// controller deletes its pod.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_never_becomes_ready_stays_on_one_node() {
    let _turn = test_harness::turn().await;
    let site = Site::controlled("shared", 2).await;
    let nodes: Vec<_> = site.nodes().collect();
    let pair = begin(&site, [nodes[0], nodes[1]]).await;
    let recorder = site.cluster.record_requests(NAMESPACE).await;
    let load = pair.load();
    load.passes("before the release").await;
    let first = site.pods("sds-agent").await;
    assert_eq!(first.len(), 2);
    let before: Vec<_> = nodes.iter().map(|node| inode(node)).collect();
    let is_first = |pod: &Value| first.iter().any(|old| text(old, "/metadata/uid") == text(pod, "/metadata/uid"));

    // The configured address of the API server is wrong.
    let two = site.configure("sds-agent-two", "").await;
    let nowhere = test_harness::free_port().to_string();
    let breaks = |container: &mut Value| {
        let env = container["env"].as_array_mut().unwrap();
        env.iter_mut().find(|row| row["name"] == "KUBERNETES_SERVICE_PORT").expect("the variable is set")["value"] = json!(nowhere);
    };
    site.release_again("DaemonSet", "sds-agent", "two", two, breaks).await;
    let broken = eventually("a new pod is bound", PATIENCE, async || {
        let pods = site.pods("sds-agent").await;
        let new = pods.into_iter().find(|pod| !is_first(pod)).ok_or("there is no new pod")?;
        if new["spec"]["nodeName"].is_string() { Ok(new) } else { Err(new.to_string()) }
    })
    .await;
    let (hit, broken) = (site.node_of(&broken), site.pod(&broken));
    eventually("it runs and retries", PATIENCE, async || {
        let words = hit.container_log(&broken, "sds-agent");
        if words.contains("a predecessor serves") && words.contains("the watch does not work") { Ok(()) } else { Err(words) }
    })
    .await;
    for _ in 0..LOOKS {
        let pods = site.pods("sds-agent").await;
        assert_eq!(pods.len(), 3, "the other node gets no new one: {pods:?}");
        for pod in &pods {
            assert!(pod["metadata"]["deletionTimestamp"].is_null(), "{pod}");
            assert_eq!(is_ready(pod), is_first(pod), "{pod}");
            assert_eq!(pod["status"]["containerStatuses"][0]["restartCount"], 0, "{pod}");
        }
        assert_eq!(nodes.iter().map(|node| inode(node)).collect::<Vec<_>>(), before, "the sockets are the old ones'");
        tokio::time::sleep(BETWEEN_LOOKS).await;
    }
    load.passes("beside the version that waits").await;
    let status = site.cluster.get(&format!("/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/sds-agent")).await["status"].take();
    let seen = ["desiredNumberScheduled", "numberAvailable", "numberUnavailable"].map(|field| status[field].as_u64().unwrap_or(0));
    assert_eq!(seen, [2, 2, 0], "{status}");
    // A new Envoy beside this version gets all its secrets.
    let late = place(hit, &site.shop, "late").await;
    let late_envoy = envoy(hit, &late, Side::Server { client: &late.spiffe_id() }, Sds::Delta).await;
    late_envoy.live().await;

    // The controller keeps an old pod only while it is ready. Once its program has ended, the controller deletes it.
    let old = first.iter().find(|pod| pod["spec"]["nodeName"] == hit.name()).expect("each node has one");
    hit.kill(&site.pod(old)).await;
    eventually("the controller has deleted the old pod", PATIENCE, async || {
        let pods = site.pods("sds-agent").await;
        let there = pods.iter().filter(|pod| pod["spec"]["nodeName"] == hit.name());
        let there: Vec<_> = there.map(|pod| text(pod, "/metadata/uid").to_owned()).collect();
        if there == [broken.uid.as_str()] { Ok(()) } else { Err(format!("{there:?}")) }
    })
    .await;
    eventually("the remaining agent has the socket", PATIENCE, async || {
        UnixStream::connect(hit.path(SHARED.socket)).await.map(drop).map_err(|e| e.to_string())
    })
    .await;

    load.passes("with one that waits alone on a node").await;
    let three = site.release("DaemonSet", "sds-agent", "three", "").await;
    site.until_rolled_out("DaemonSet", "sds-agent").await;
    for (node, before) in nodes.iter().zip(before) {
        let agent = SocketAddr::new(node.name().parse().expect("a node's name is its address"), three.port());
        until_streams(agent, if node.name() == hit.name() { 4.0 } else { 2.0 }).await;
        assert_ne!(inode(node), before);
    }

    load.passes("with the next version").await;
    let tally = load.stop().await;
    pair.assert_clean(&tally).await;
    let ordered: Vec<_> = recorder.seen().into_iter().flat_map(|request| request.uris).collect();
    assert_eq!(ordered, [late.spiffe_id()], "for the Envoys nothing was due");
}
