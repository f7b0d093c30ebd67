//! The parts of the cluster's objects that stay in memory, and the pages of their lists.

use agent_kube::pod::PodObject;
use cert_manager::Request;
use kube::runtime::watcher;

use super::*;

/// Managed fields as the kubelet writes them to every pod.
fn managed_fields() -> Value {
    json!([{
        "manager": "kubelet", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1", "subresource": "status",
        "fieldsV1": {"f:status": {"f:conditions": {"k:{\"type\":\"Ready\"}": {".": {}, "f:status": {}}}, "f:phase": {}}},
    }])
}

#[test]
fn neither_a_pod_nor_a_request_keeps_managed_fields() {
    let mut pod = json!({
        "metadata": {
            "namespace": "shop", "name": "cart-1", "uid": "u-1", "labels": {"app": "cart"}, "finalizers": ["x"],
            "annotations": {"kubernetes.io/config.mirror": "h", "note": "n".repeat(10_000)},
        },
        "spec": {"nodeName": "n1", "serviceAccountName": "cart"},
    });
    pod["metadata"]["managedFields"] = managed_fields();
    let pod: PodObject = serde_json::from_str(&pod.to_string()).unwrap();
    assert_eq!((&pod.metadata.managed_fields, &pod.metadata.finalizers), (&None, &None));
    assert_eq!(pod.metadata.annotations.unwrap().into_keys().collect::<Vec<_>>(), ["kubernetes.io/config.mirror"]);
    assert_eq!(pod.metadata.labels.unwrap()["app"], "cart");

    let mut request = object("a");
    request["metadata"]["managedFields"] = managed_fields();
    request["metadata"]["finalizers"] = json!(["f".repeat(1 << 20)]);
    request["metadata"]["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u".repeat(1 << 20)}]);
    request["metadata"]["labels"] = json!({"sds-agent.io/node": "n1"});
    let request: Request = serde_json::from_str(&request.to_string()).unwrap();
    let metadata = &request.metadata;
    assert_eq!((&metadata.managed_fields, &metadata.finalizers, &metadata.owner_references), (&None, &None, &None));
    assert_eq!((metadata.labels.is_none(), metadata.annotations.as_ref().unwrap().len()), (true, 3));
}

/// A list with `resourceVersion` is answered from the API server's cache, which may ignore `limit`.
#[tokio::test(start_paused = true)]
async fn both_lists_come_in_pages() {
    let api = FakeApi::new();
    for n in 0..1_001 {
        let metadata = json!({"namespace": "shop", "name": format!("p{n}"), "uid": format!("u-{n}")});
        api.put("pods", json!({"metadata": metadata, "spec": {"nodeName": "n1", "serviceAccountName": "a"}}));
    }
    put_pod(&api);
    for n in 0..41 {
        api.put(CR, object(&format!("r{n}")));
    }
    let replica = Replica::start(&api, true);
    for n in 0..41 {
        assert_eq!(decided(&api, &format!("r{n}")).await["type"], "Approved");
    }
    let mut synced = replica.pods.synced();
    synced.wait_for(|synced| *synced).await.unwrap();
    assert!(replica.pods.watched("u-1000").is_some());
    for (plural, pages, size) in [("pods", 6, "200"), (CR, 1, "100")] {
        let queries = api.queries("list", plural);
        assert_eq!(queries.len(), pages, "{queries:?}");
        assert!(queries.iter().all(|query| query["limit"] == size && !query.contains_key("resourceVersion")), "{queries:?}");
    }
    assert_eq!(watcher::Config::default().page_size, Some(500), "the default of kube");
}

/// The API server limits labels only by the size of the object.
#[tokio::test(start_paused = true)]
async fn a_pod_with_more_labels_than_is_held_is_read_live() {
    let api = FakeApi::new();
    put_pod(&api);
    api.change("pods", "shop", "cart-1", |pod| {
        pod["metadata"]["labels"] = (0..300).map(|n| (format!("label-{n}"), json!("x".repeat(60)))).collect();
    });
    let replica = Replica::start(&api, true);
    replica.pods.synced().wait_for(|synced| *synced).await.unwrap();
    api.put(CR, object("a"));
    assert_eq!(decided(&api, "a").await["type"], "Approved");
    assert!(replica.pods.watched("u-1").is_none());
    assert_eq!(replica.metrics.live_reads.get(), 1);

    // A pod is indexed while its labels are below the limit.
    api.change("pods", "shop", "cart-1", |pod| pod["metadata"]["labels"] = json!({"app": "cart"}));
    api.put(CR, object("b"));
    assert_eq!(decided(&api, "b").await["type"], "Approved");
    assert_eq!((replica.pods.watched("u-1").is_some(), replica.metrics.live_reads.get()), (true, 1));
    api.change("pods", "shop", "cart-1", |pod| pod["metadata"]["labels"] = json!({"app": "x".repeat(20_000)}));
    api.put(CR, object("c"));
    assert_eq!(decided(&api, "c").await["type"], "Approved");
    assert_eq!((replica.pods.watched("u-1").is_none(), replica.metrics.live_reads.get()), (true, 2));
}
