//! As many pods as a node can have, all at once: nothing of them is left behind.

use futures::future::{Either, join_all};
use test_harness::{cluster::Pod, eventually};
use tokio::time::Instant;

use super::{Node, PATIENCE, certificate, fds};

#[tokio::test]
async fn two_hundred_and_fifty_pods_at_once_leave_nothing_behind() {
    const PODS: usize = 250;
    let _turn = test_harness::turn().await;
    let node = Node::new(&certificate("1h")).await;
    let agent = node.start().await;
    let first = node.pod("many").await;
    let others = join_all((1..PODS).map(|n| {
        let node = &node;
        async move { node.cluster.pod_of(&node.namespace, "many", &format!("many-{n}"), &node.name).await }
    }));
    let pods: Vec<Pod> = std::iter::once(first).chain(others.await).collect();

    // The first round allocates what the process keeps.
    for round in 0..3 {
        let before = fds(&agent);
        let begun = Instant::now();
        let targets = join_all(pods.iter().map(|pod| node.kubelet.publish(pod, "sds"))).await;
        let published = begun.elapsed();
        assert_eq!((node.host.mounts().len(), node.directories().len(), node.listening()), (PODS, PODS, PODS));
        for index in [0, PODS / 2, PODS - 1] {
            node.assert_served(&pods[index], &targets[index]).await;
        }
        assert!((agent.metric("sds_agent_pod_sockets").await - 250.0).abs() < 0.5);

        let begun = Instant::now();
        join_all(pods.iter().map(|pod| node.kubelet.unpublish(&pod.uid, "sds"))).await;
        eprintln!("figure: {PODS} pods at once: published in {published:?}, unpublished in {:?}", begun.elapsed());
        eventually("no server listens", PATIENCE, async || match node.listening() {
            0 => Ok(()),
            left => Err(format!("{left} listen")),
        })
        .await;
        node.assert_nothing_left();
        let settled = eventually("the descriptors are back", PATIENCE, async || {
            let now = fds(&agent);
            if round == 0 || now <= before { Ok(now) } else { Err(format!("{now} and not {before}")) }
        });
        settled.await;
        assert!(agent.metric("sds_agent_pod_sockets").await < 0.5);
    }
    // Publishing and unpublishing overlap: regardless of the order, an unpublish ends the socket.
    let crossed = pods.iter().flat_map(|pod| {
        let (kubelet, uid) = (&node.kubelet, &pod.uid);
        let publish = async move { drop(kubelet.publish_as(kubelet.request(pod, "sds", &[])).await) };
        let unpublish = async move { drop(kubelet.unpublish_quietly(uid, "sds").await) };
        [Either::Left(publish), Either::Right(unpublish)]
    });
    join_all(crossed).await;
    join_all(pods.iter().map(|pod| node.kubelet.unpublish(&pod.uid, "sds"))).await;
    eventually("no server listens", PATIENCE, async || match node.listening() {
        0 => Ok(()),
        left => Err(format!("{left} listen")),
    })
    .await;
    assert_eq!((node.host.mounts(), node.directories()), (vec![], vec![]));
}
