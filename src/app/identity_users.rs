//! Finds the pods of this node that use an identity: joins the pod index with the resolver.

use std::sync::Arc;

use attest_kubernetes::pods::Pods;
use issuance::rotation::IdentityUsers;
use tokio::sync::watch;
use workload_identity::{Identity, Resolver};

/// The node's pods, by the identity that the resolver derives for them.
#[derive(Debug)]
pub(super) struct PodsByIdentity {
    pods: Pods,
    resolver: watch::Receiver<Arc<Resolver>>,
}

impl PodsByIdentity {
    /// Uses `pods`, with the identities that `resolver` derives.
    pub(super) fn new(pods: Pods, resolver: watch::Receiver<Arc<Resolver>>) -> Self {
        Self { pods, resolver }
    }
}

impl IdentityUsers for PodsByIdentity {
    fn is_used(&self, identity: &Identity) -> bool {
        let resolver = self.resolver.borrow().clone();
        self.pods.workloads().iter().any(|workload| resolver.resolve(workload).is_ok_and(|theirs| theirs == *identity))
    }

    fn pod_terminations(&self) -> watch::Receiver<u64> {
        self.pods.pod_terminations()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use agent_kube::fake::FakeApi;
    use serde_json::json;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::config::Config;

    /// The key of an identity that a pod picks in a volume must stay while the pod lives, although no caller of the shared socket has it.
    #[tokio::test(start_paused = true)]
    async fn what_a_pod_picks_is_claimed_by_it_and_what_it_may_not_pick_is_not() {
        let text = "issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }\n\
                    profiles:\n\
                    - { name: gold, match: { namespaces: [shop] }, selectable: true, certificate: { lifetime: 2h } }\n\
                    - { name: lead, match: { namespaces: [other] }, selectable: true, certificate: { lifetime: 3h } }\n";
        let env = |name: &str| (name == "NODE_NAME").then(|| "n1".to_owned());
        let resolver = Config::parse(text, &env).unwrap().config.resolver();
        let volume = |name: &str| json!({"name": name, "csi": {"driver": "d", "volumeAttributes": {"sds-agent.io/profile": name}}});
        let (api, metrics) = (FakeApi::new(), agent_kube::Metrics::default());
        let spec = json!({"nodeName": "n1", "serviceAccountName": "cart", "volumes": [volume("gold"), volume("lead")]});
        api.put("pods", json!({"metadata": {"name": "p", "namespace": "shop", "uid": "u"}, "spec": spec}));
        let pods = Pods::new(api.client(&metrics), "n1", metrics).with_picks_by("d");
        let running = pods.clone();
        tokio::spawn(async move { running.run(CancellationToken::new()).await });
        let known = tokio::time::timeout(Duration::from_secs(60), pods.wait_for("u")).await.unwrap().unwrap();

        let workload = known.pod.workload();
        let (_sender, receiver) = watch::channel(Arc::new(resolver.clone()));
        let identity_users = PodsByIdentity::new(pods, receiver);
        let is_used = |profile| identity_users.is_used(&resolver.identity(profile, &workload).unwrap());
        assert!(is_used(&resolver.default_profile) && is_used(&resolver.rules[0].profile));
        assert!(!is_used(&resolver.rules[1].profile));
    }
}
