//! The mesh's issuers, guarded by the policies, with every state of the policies' parameters: requests for other issuers are not
//! affected.

use std::fs;

use serde_json::{Value, json};

use crate::{
    agent::Agent,
    ask::{Ask, issued},
    cluster::{Pod, labels},
    eventually,
    manifests::{self, install, up_from},
    paths,
    world::{Actor, PATIENCE, World},
};

/// A cluster with the policies, a request of each kind of caller, and an issuer that the policies do not guard.
pub struct Guarded {
    pub world: World,
    pub agent: Actor,
    pod: Pod,
    pub editor: Actor,
    pub shop: String,
    _approver: Agent,
}

impl Guarded {
    /// Agents and approver run in the namespace of `world`, where everything except the policies is installed.
    pub async fn of(world: World) -> Self {
        world.install("workload-requests/rbac.yaml").await;
        let node = world.cluster.node().await;
        let agent = world.actor("agent", "sds-agent", &node).await;
        let shop = world.cluster.namespace().await;
        let pod = world.cluster.pod(&shop, "app", &node).await;
        let editor = world.editor(&shop).await;
        // A CA of the namespace itself, with the same key pair.
        let (certificate, key) = world.cluster.authority_with_key().await;
        let secret = json!({
            "metadata": {"name": "own-ca", "labels": labels()}, "type": "kubernetes.io/tls",
            "stringData": {"tls.crt": certificate, "tls.key": key},
        });
        world.cluster.create(&format!("/api/v1/namespaces/{shop}/secrets"), &secret).await;
        let issuer = json!({
            "apiVersion": "cert-manager.io/v1", "kind": "Issuer", "metadata": {"name": "own"}, "spec": {"ca": {"secretName": "own-ca"}},
        });
        world.cluster.create(&format!("/apis/cert-manager.io/v1/namespaces/{shop}/issuers"), &issuer).await;
        let approver = world.approver("approver-0", "24h").await;
        Self { world, agent, pod, editor, shop, _approver: approver }
    }

    pub fn ask(&self) -> Ask {
        Ask::of(&self.agent, &self.pod).in_namespace(&self.world.namespace)
    }

    /// Requests for other issuers are signed and can be deleted; another account's request for a guarded issuer is rejected.
    pub async fn assert_only_the_mesh_is_guarded(&self, state: &str) {
        let cluster = &self.world.cluster;
        let other = json!({"name": "own", "kind": "Issuer", "group": "cert-manager.io"});
        let ask = self.ask().in_namespace(&self.shop).unlabelled().spec("issuerRef", other);
        let path = ask.create(&self.editor).await.unwrap_or_else(|e| panic!("{state}: another issuer's request: {e}"));
        issued(cluster, &path).await;
        let note = json!({"metadata": {"annotations": {"example.com/note": "mine"}}});
        self.editor.cluster.patch(&path, &note).await;
        self.editor.cluster.try_delete(&path).await.unwrap_or_else(|e| panic!("{state}: it cannot be deleted: {e}"));
        let refusal = self.ask().in_namespace(&self.shop).unlabelled().refused(&self.editor).await;
        // In this state two policies reject the request, and the API server reports one of them.
        let is_malformed = refusal.contains("is no duration such as 24h");
        assert!(is_malformed || refusal.contains("only sds-agent may ask ClusterIssuer/mesh-ca"), "{state}: {refusal}");
    }

    /// The approver approves an agent's request, and cert-manager signs it.
    pub async fn assert_the_mesh_is_served(&self, state: &str) {
        let path = self.ask().create(&self.agent).await.unwrap_or_else(|e| panic!("{state}: an agent's request: {e}"));
        let request = issued(&self.world.cluster, &path).await;
        let approved = request["status"]["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Approved").unwrap();
        assert_eq!(approved["reason"], "approver.sds-agent.io", "{state}");
        self.agent.cluster.try_delete(&path).await.unwrap_or_else(|e| panic!("{state}: the agent cannot delete it: {e}"));
    }

    /// Waits until an agent's request with a very long lifetime is rejected with these words, or accepted if `words` is `None`.
    pub async fn until_bounded(&self, state: &str, words: Option<&str>) {
        let ask = self.ask().spec("duration", json!("10000h"));
        eventually(&format!("the API server enforces: {state}"), PATIENCE, async || match (ask.try_dry_run(&self.agent).await, words) {
            (Ok(_), None) => Ok(()),
            (Err(kube::Error::Api(status)), Some(words)) if status.message.contains(words) => Ok(()),
            (answer, _) => Err(format!("{answer:?}")),
        })
        .await;
    }

    /// Checks every state that the parameters can have in a cluster.
    pub async fn assert_no_state_of_the_parameters_matters_to_others(&self) {
        let map = format!("/api/v1/namespaces/{}/configmaps/sds-agent", self.world.namespace);
        let whole = self.world.cluster.get(&map).await;
        let mut bound = 0;
        for state in ["agentUsernames", "issuers"].iter().flat_map(|key| [(key, None), (key, Some(""))]) {
            let (key, value) = state;
            // Each state has a different bound, which shows when the API server enforces that state.
            bound += 1;
            let limit = format!("24h{bound}s");
            self.publish(&whole, &[(key, value), ("maxDuration", Some(&limit))]).await;
            let state = format!("{key} is {value:?}");
            self.until_bounded(&state, Some(&format!("above {limit}"))).await;
            self.assert_only_the_mesh_is_guarded(&state).await;
            self.assert_the_mesh_is_served(&state).await;
        }
        for value in [None, Some(""), Some(" ")] {
            let state = format!("maxDuration is {value:?}");
            self.publish(&whole, &[("maxDuration", Some("24h"))]).await;
            self.until_bounded(&state, Some("above 24h,")).await;
            self.publish(&whole, &[("maxDuration", value)]).await;
            self.until_bounded(&state, None).await;
            self.assert_only_the_mesh_is_guarded(&state).await;
            self.assert_the_mesh_is_served(&state).await;
        }
        // No account can use an issuer that only the ConfigMap names, until the policies are rendered again.
        self.publish(&whole, &[("issuers", Some("ClusterIssuer/mesh-ca\nClusterIssuer/added\n"))]).await;
        let added = json!({"name": "added", "kind": "ClusterIssuer", "group": "cert-manager.io"});
        let ask = self.ask().in_namespace(&self.shop).unlabelled().spec("issuerRef", added);
        eventually("an issuer of the ConfigMap alone is rejected", PATIENCE, async || match ask.try_dry_run(&self.editor).await {
            Err(kube::Error::Api(status)) if status.message.contains("stands in issuers of ConfigMap") => Ok(()),
            answer => Err(format!("{answer:?}")),
        })
        .await;
        // The maximum size of a ConfigMap.
        let names = "\n".repeat(900_000);
        self.publish(&whole, &[("agentUsernames", Some(&names)), ("maxDuration", Some("24h9s"))]).await;
        self.until_bounded("agentUsernames is huge", Some("above 24h9s,")).await;
        self.assert_only_the_mesh_is_guarded("agentUsernames is huge").await;
        self.assert_the_mesh_is_served("agentUsernames is huge").await;

        self.publish(&whole, &[("maxDuration", Some("a day"))]).await;
        self.until_bounded("maxDuration is no duration", Some("is no duration such as 24h")).await;
        self.assert_only_the_mesh_is_guarded("maxDuration is no duration").await;

        self.publish(&whole, &[]).await;
        self.until_bounded("all is there", Some("above 24h,")).await;
        self.world.cluster.delete(&map).await;
        self.until_bounded("no ConfigMap", None).await;
        self.assert_only_the_mesh_is_guarded("no ConfigMap").await;
        self.assert_the_mesh_is_served("no ConfigMap").await;

        // The ConfigMap of the previous version: three keys, and a configuration that names the namespace.
        let mut former = whole.clone();
        former["data"] = json!({
            "config.yaml": whole["data"]["config.yaml"], "maxDuration": "24h",
            "agentUsernames": "system:serviceaccount:sds-agent:sds-agent\n", "issuers": "ClusterIssuer/mesh-ca\n",
        });
        self.publish(&former, &[]).await;
        self.until_bounded("the previous ConfigMap", Some("above 24h,")).await;
        self.assert_only_the_mesh_is_guarded("the previous ConfigMap").await;
        self.assert_the_mesh_is_served("the previous ConfigMap").await;
    }

    /// Uses a namespace that kustomize has set, with the policies as rendered.
    pub async fn assert_another_namespace_holds_up_no_other_issuer(&self) {
        self.until_bounded("another namespace", Some("above 24h,")).await;
        // The API server loads each policy on its own.
        self.until_a_stranger_is_refused("only sds-agent may ask").await;
        self.assert_only_the_mesh_is_guarded("another namespace").await;
        self.assert_the_mesh_is_served("another namespace").await;
    }

    /// Writes the ConfigMap with these values replaced.
    pub async fn publish(&self, map: &Value, changes: &[(&str, Option<&str>)]) {
        let mut data = map["data"].clone();
        for (key, value) in changes {
            match value {
                Some(value) => data[*key] = json!(value),
                None => drop(data.as_object_mut().unwrap().remove(*key)),
            }
        }
        let maps = format!("/api/v1/namespaces/{}/configmaps", self.world.namespace);
        let _ = self.world.cluster.try_delete(&format!("{maps}/sds-agent")).await;
        self.world.cluster.create(&maps, &json!({"metadata": {"name": "sds-agent"}, "data": data})).await;
    }

    /// The previous policy reads the current ConfigMap; then the current policy replaces it.
    pub async fn upgrade(&self, former: &[Value]) {
        install(&self.world.cluster, former).await;
        self.until_a_stranger_is_refused("to agentUsernames of ConfigMap").await;
        self.assert_only_the_mesh_is_guarded("the previous policy").await;
        self.assert_the_mesh_is_served("the previous policy").await;
        self.world.install_policy().await;
        self.until_a_stranger_is_refused("guardedissuers.sds-agent.io").await;
    }

    /// Waits until the API server enforces the policy with these words.
    pub async fn until_a_stranger_is_refused(&self, words: &str) {
        let stranger = self.ask().in_namespace(&self.shop).unlabelled();
        eventually(&format!("the policy with the text {words:?} is enforced"), PATIENCE, async || {
            match stranger.try_dry_run(&self.editor).await {
                Err(kube::Error::Api(status)) if status.message.contains(words) => Ok(()),
                answer => Err(format!("{answer:?}")),
            }
        })
        .await;
    }
}

/// The rendered mode `shared` in other namespaces, by the files that daemonset/README.md prints.
pub async fn moved() -> Vec<Value> {
    let folder = tempfile::tempdir_in(paths::tmp()).unwrap();
    let up = up_from(folder.path());
    let page = manifests::read("README.md");
    let blocks = page.split("```yaml\n# mesh/").skip(1).filter_map(|rest| rest.split("\n```").next());
    let mut count = 0;
    for (name, text) in blocks.filter_map(|block| block.split_once('\n')) {
        let path = folder.path().join("mesh").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text.replace("../../sds-agent/daemonset", &format!("../../{up}/daemonset"))).unwrap();
        count += 1;
    }
    assert_eq!(count, 6, "the files of the page");
    manifests::kustomize(&folder.path().join("mesh")).await
}
