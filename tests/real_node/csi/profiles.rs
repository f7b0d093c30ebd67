//! Profiles that a pod selects by its own volume.

use serde_json::{Value, json};
use test_harness::{cluster::Pod, node::DRIVER};
use tonic::Code;
use x509_parser::pem::Pem;

use super::Node;

const PROFILE: &str = "sds-agent.io/profile";

/// A pod whose spec has these volumes of the driver, each with the profile that it selects.
async fn pod(node: &Node, name: &str, volumes: &[(&str, Option<&str>)]) -> Pod {
    let accounts = format!("/api/v1/namespaces/{}/serviceaccounts", node.namespace);
    node.cluster.create(&accounts, &json!({"metadata": {"name": name}})).await;
    let volume = |(name, picked): &(&str, Option<&str>)| {
        let attributes = picked.map_or_else(|| json!({}), |picked| json!({PROFILE: picked}));
        json!({"name": name, "csi": {"driver": DRIVER, "readOnly": true, "volumeAttributes": attributes}})
    };
    let pod = json!({
        "metadata": {"name": name},
        "spec": {
            "serviceAccountName": name, "nodeName": node.name, "automountServiceAccountToken": false,
            "tolerations": [{"operator": "Exists"}], "containers": [{"name": "main", "image": "none"}],
            "volumes": volumes.iter().map(volume).collect::<Vec<_>>(),
        },
    });
    let created = node.cluster.create(&format!("/api/v1/namespaces/{}/pods", node.namespace), &pod).await;
    let uid = created["metadata"]["uid"].as_str().unwrap().to_owned();
    Pod { namespace: node.namespace.clone(), name: name.to_owned(), uid, service_account: name.to_owned() }
}

fn lifetime(certificate: &Value) -> i64 {
    let chain = certificate["chain_pem"].as_str().unwrap().to_owned();
    let leaf = Pem::iter_from_buffer(chain.as_bytes()).next().unwrap().unwrap();
    let leaf = leaf.parse_x509().unwrap();
    leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp()
}

#[tokio::test]
async fn a_pod_picks_a_selectable_profile_by_its_volume_and_no_other() {
    let settings = "certificate: { lifetime: 2h }\n\
                    profiles:\n\
                    - { name: short, match: { serviceAccounts: [cart] }, selectable: true, certificate: { lifetime: 1h } }\n\
                    - { name: gold, match: { podLabels: { tier: gold } }, certificate: { lifetime: 3h } }\n";
    let node = Node::new(settings).await;
    let agent = node.start().await;
    let cart = pod(&node, "cart", &[("plain", None), ("short", Some("short")), ("gold", Some("gold"))]).await;
    let other = pod(&node, "other", &[("short", Some("short")), ("none", Some("none"))]).await;
    let publish = async |pod: &Pod, volume: &str, picked: Option<&str>| {
        let attributes: Vec<_> = picked.iter().map(|picked| (PROFILE, *picked)).collect();
        node.kubelet.publish_as(node.kubelet.request(pod, volume, &attributes)).await
    };

    // Two sockets of one pod, each with a different profile.
    let targets = [publish(&cart, "plain", None).await.unwrap(), publish(&cart, "short", Some("short")).await.unwrap()];
    for (target, seconds) in targets.iter().zip([7200, 3600]) {
        let certificate = node.fetch(target, "socket").await.unwrap();
        assert_eq!((certificate["spiffe_id"].as_str(), lifetime(&certificate)), (Some(cart.spiffe_id().as_str()), seconds));
    }

    for (pod, volume, picked, code, words) in [
        (&cart, "gold", Some("gold"), Code::FailedPrecondition, "profiles[1] is not selectable"),
        (&other, "none", Some("none"), Code::FailedPrecondition, "no profile of this name is configured"),
        (&other, "short", Some("short"), Code::FailedPrecondition, "service account other is not among its serviceAccounts"),
        // The kubelet's call names another profile than the pod's spec.
        (&cart, "plain-2", Some("short"), Code::PermissionDenied, "its picked profile"),
        (&other, "short", None, Code::PermissionDenied, "its picked profile"),
    ] {
        let status = publish(pod, volume, picked).await.unwrap_err();
        assert!(status.code() == code && status.message().contains(words), "{volume}: {status:?}");
    }

    // After a restart no call names the profile; the pod's spec does.
    agent.kill().await;
    let _agent = node.start().await;
    let certificate = node.fetch(&targets[1], "socket").await.unwrap();
    assert_eq!(lifetime(&certificate), 3600);

    for volume in ["plain", "short"] {
        node.kubelet.unpublish(&cart.uid, volume).await;
    }
    node.assert_nothing_left();
}
