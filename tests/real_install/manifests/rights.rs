//! The permissions of both accounts, as the API server reports them, equal those that they need. One more is a failure, as is one less.

use std::{collections::BTreeSet, fs};

use serde_json::{Value, json};
use test_harness::{
    agent_pod::log_in,
    cluster::{Cluster, Pod},
    eventually,
    manifests::{NAMESPACE, install, rendered},
    world::GUARDED,
};

/// In every namespace.
const AGENT: [&str; 5] =
    ["create events.events.k8s.io", "get clusterissuers.cert-manager.io", "list pods", "request guardedissuers.sds-agent.io", "watch pods"];
/// In the agents' namespace, for requests.
const AGENT_OWN: [&str; 6] = [
    "create certificaterequests.cert-manager.io",
    "delete certificaterequests.cert-manager.io",
    "get certificaterequests.cert-manager.io",
    "get issuers.cert-manager.io",
    "list certificaterequests.cert-manager.io",
    "watch certificaterequests.cert-manager.io",
];
/// In the namespace of the roots.
const AGENT_ROOTS: [&str; 3] = ["get configmaps mesh-roots", "list configmaps mesh-roots", "watch configmaps mesh-roots"];
/// In every namespace.
const APPROVER: [&str; 12] = [
    "approve guardedissuers.sds-agent.io",
    "approve signers.cert-manager.io clusterissuers.cert-manager.io/mesh-ca",
    "create events",
    "delete certificaterequests.cert-manager.io",
    "get certificaterequests.cert-manager.io",
    "get pods",
    "list certificaterequests.cert-manager.io",
    "list pods",
    "patch certificaterequests/status.cert-manager.io",
    "watch certificaterequests.cert-manager.io",
    "watch pods",
    "remove guardedissuers.sds-agent.io",
];

/// In the agents' namespace.
const APPROVER_CONFIG: [&str; 2] = ["list configmaps sds-agent", "watch configmaps sds-agent"];
/// Impersonated: the approver's namespace admits no pod but its own.
const APPROVER_ACCOUNT: &str = "system:serviceaccount:sds-agent-approver:sds-agent-approver";

/// All permissions of an account in a namespace, one line for each verb and resource.
async fn rights(account: &Cluster, namespace: &str) -> BTreeSet<String> {
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": namespace},
    });
    let status = account.create("/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", &review).await["status"].take();
    let words = |rule: &Value, key: &str| -> Vec<String> {
        let list = rule[key].as_array().cloned().unwrap_or_default();
        list.iter().map(|word| word.as_str().unwrap().to_owned()).collect()
    };
    let mut lines = BTreeSet::new();
    for rule in status["resourceRules"].as_array().unwrap() {
        let names = words(rule, "resourceNames");
        let names = if names.is_empty() { vec![String::new()] } else { names };
        for (verb, group) in
            words(rule, "verbs").iter().flat_map(|verb| words(rule, "apiGroups").into_iter().map(move |group| (verb, group)))
        {
            for resource in words(rule, "resources") {
                let dot = if group.is_empty() { "" } else { "." };
                lines.extend(names.iter().map(|name| format!("{verb} {resource}{dot}{group} {name}").trim_end().to_owned()));
            }
        }
    }
    for rule in status["nonResourceRules"].as_array().into_iter().flatten() {
        lines.extend(
            words(rule, "verbs").iter().flat_map(|verb| words(rule, "nonResourceURLs").into_iter().map(move |url| format!("{verb} {url}"))),
        );
    }
    lines
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agent_and_approver_may_do_what_they_need_and_nothing_else() {
    let (cluster, _plane) = Cluster::own(GUARDED).await;
    let dir = tempfile::tempdir().unwrap();
    let node = cluster.node().await;
    install(&cluster, &rendered("both").await).await;
    let elsewhere = cluster.namespace().await;
    // The permissions of every authenticated account: discovery and self-reviews.
    let stranger = account(&cluster, cluster.pod(&elsewhere, "stranger", &node).await, dir.path()).await;
    let agent = account(&cluster, cluster.pod_of(NAMESPACE, "sds-agent", "agent", &node).await, dir.path()).await;
    let impersonated = dir.path().join("approver");
    fs::write(&impersonated, cluster.access_as(APPROVER_ACCOUNT, &[]).to_string()).unwrap();
    let approver = Cluster::at(&impersonated).await;

    for (who, account, everywhere) in [("agent", &agent, &AGENT[..]), ("approver", &approver, &APPROVER[..])] {
        for namespace in [NAMESPACE, "sds-agent-approver", "cert-manager", "kube-system", "default", &elsewhere] {
            let more: &[&str] = match (who, namespace) {
                ("agent", NAMESPACE) => &AGENT_OWN,
                ("agent", "cert-manager") => &AGENT_ROOTS,
                ("approver", NAMESPACE) => &APPROVER_CONFIG,
                _ => &[],
            };
            let expected: BTreeSet<_> = everywhere.iter().chain(more).map(|line| (*line).to_owned()).collect();
            // The authorizer may not know the new objects yet.
            eventually(&format!("the permissions of the {who} in {namespace}"), super::site::PATIENCE, async || {
                let common = rights(&stranger, namespace).await;
                let own: BTreeSet<_> = rights(account, namespace).await.difference(&common).cloned().collect();
                if own == expected { Ok(()) } else { Err(format!("{own:#?}")) }
            })
            .await;
        }
    }
}

/// The cluster with the access of a pod's account.
async fn account(cluster: &Cluster, pod: Pod, dir: &std::path::Path) -> Cluster {
    let kubeconfig = dir.join(&pod.uid);
    log_in(cluster, &pod, true, &kubeconfig).await;
    Cluster::at(&kubeconfig).await
}
