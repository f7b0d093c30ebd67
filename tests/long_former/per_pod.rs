//! Per-pod sockets: upgrade from the version in which the privileged agent is the CSI driver, and the way back.

use std::path::Path;

use test_harness::{
    agent::{self, Agent},
    cluster::Cluster,
    envoy::{Envoy, Sds, Side},
    host::{Host, IN_POD},
    pair::Pair,
    tools,
};

use super::{PATIENCE, has_streams};

#[allow(dead_code, reason = "shared with real_node")]
#[path = "../real_node/csi/kubelet.rs"]
mod kubelet;

use kubelet::Kubelet;

async fn end(mut process: Agent) {
    process.terminate();
    assert!(process.exit(PATIENCE).await.success());
}

/// One container becomes two, and one again, with requests between two Envoys all the time. The directories and mounts of pods stay.
#[tokio::test]
async fn an_upgrade_to_the_mount_helper_and_the_way_back_lose_no_request() {
    let _turn = test_harness::turn().await;
    let cluster = Cluster::connect().await;
    let dirs = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let place = dirs[0].path();
    let host = Host::new(place).await;
    let (name, namespace) = (cluster.node().await, cluster.namespace().await);
    let agent_pod = cluster.agent(place, &name).await;
    let places = format!("directory: {}, kubeletDirectory: {}", place.join("pods").display(), host.kubelet().display());
    let sockets = format!("{{ shared: {{ enabled: false }}, perPod: {{ enabled: true, {places} }} }}");
    let settings = "certificate: { lifetime: 1h }";
    let former = agent_pod.launch_on(dirs[1].path(), &sockets, settings).program(&tools::former()).under(host.container());
    let new = agent_pod.launch_on(dirs[2].path(), &sockets, settings);
    let (helper, new) = (new.mount_helper().under(host.container()), new.under(host.unprivileged()));
    let kubelet = Kubelet::new(&host.kubelet());

    let first = former.start().await;
    kubelet.register().await;
    let (server, client) = (cluster.pod(&namespace, "server", &name).await, cluster.pod(&namespace, "client", &name).await);
    let (server_id, client_id) = (server.spiffe_id(), client.spiffe_id());
    let targets = [kubelet.publish(&server, "sds").await, kubelet.publish(&client, "sds").await];
    let socket = Path::new(IN_POD).join("socket");
    let start = async |target: &Path, side: Side<'_>, sds| Envoy::start_under(&host.pod(target), side, &socket, sds).await;
    let one = start(&targets[0], Side::Server { client: &client_id }, Sds::StateOfTheWorld).await;
    let tls = one.live().await;
    let other = start(&targets[1], Side::Client { server: &server_id, at: tls }, Sds::Delta).await;
    let entrance = other.live().await;
    let pair = Pair { server: one, client: other, tls, entrance };
    pair.request().await.unwrap();
    let mounts = host.mounts();

    let load = pair.load();
    load.passes("with the former version").await;
    end(first).await;
    load.passes("between the versions").await;
    let helper = helper.spawn();
    let upgraded = new.start().await;
    kubelet.register().await;
    has_streams(&upgraded).await;
    load.passes("with this version").await;
    assert_eq!(host.mounts(), mounts, "the mounts of running pods stay");
    let late = cluster.pod(&namespace, "late", &name).await;
    let late_target = kubelet.publish(&late, "sds").await;
    end(upgraded).await;
    end(helper).await;
    let back = former.start().await;
    kubelet.register().await;
    has_streams(&back).await;
    load.passes("with the former version again").await;
    let tally = load.stop().await;
    pair.assert_clean(&tally).await;
    drop(pair);

    // The former version serves what this one has published, and removes it.
    let fetch = format!("'{}' fetch --socket {IN_POD}/socket --name default -o json --timeout 20s", agent::program().display());
    let output = host.in_pod(&late_target, &fetch).await;
    assert!(String::from_utf8_lossy(&output.stdout).contains(&late.spiffe_id()), "{output:?}");
    for pod in [&server, &client, &late] {
        kubelet.unpublish(&pod.uid, "sds").await;
    }
    assert_eq!(host.mounts(), []);
    let left: Vec<_> = std::fs::read_dir(place.join("pods")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name == ".view"), "{left:?}");
}
