//! The agent as a pod of a cluster: its node, its permissions and its login.
//!
//! Each permission is a separate role, so that a test can revoke one and grant it again.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use kube::{Client, config::Kubeconfig};
use serde_json::{Value, json};

use crate::{
    agent::Launch,
    cluster::{self, Cluster, ISSUER, Pod, ROOTS},
    eventually,
};

/// Limit until the API server's authorizer has seen a change.
const AUTHORIZER: Duration = Duration::from_secs(30);
const GROUP: &str = "/apis/rbac.authorization.k8s.io/v1";

/// A permission of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// CertificateRequests in its own namespace.
    Requests,
    /// ClusterIssuers.
    ClusterIssuers,
    /// Issuers, everywhere.
    Issuers,
    /// Every pod.
    Pods,
    /// The ConfigMap of its trust source.
    Trust,
    /// Events on every pod.
    Events,
}

/// The permissions that an agent needs.
const LEAST: [(Right, &[&str]); 6] = [
    (Right::Requests, &["create", "get", "list", "watch", "delete"]),
    (Right::ClusterIssuers, &["get"]),
    (Right::Issuers, &[]),
    (Right::Pods, &["list", "watch"]),
    (Right::Trust, &["get", "list", "watch"]),
    (Right::Events, &["create"]),
];

/// A ConfigMap that contains roots.
#[derive(Debug, Clone)]
pub struct Roots {
    pub namespace: String,
    pub name: String,
    pub key: String,
}

/// An agent's pod, its account and its configuration.
pub struct AgentPod {
    pub pod: Pod,
    /// The value of `issuerRef` in its configuration.
    pub issuer: String,
    pub roots: Roots,
    /// Files with additional roots.
    pub more_roots: Vec<PathBuf>,
    /// YAML of `trust` in its configuration, instead of `roots` and `more_roots`.
    pub trust: Option<String>,
    cluster: Cluster,
    node: String,
    kubeconfig: PathBuf,
}

/// Writes a kubeconfig with a token of a pod's service account. `bound` binds the token to the pod.
pub async fn log_in(cluster: &Cluster, pod: &Pod, bound: bool, path: &Path) {
    let account = format!("/api/v1/namespaces/{}/serviceaccounts/{}", pod.namespace, pod.service_account);
    let bound_to = bound.then(|| json!({"kind": "Pod", "apiVersion": "v1", "name": pod.name, "uid": pod.uid}));
    let request = json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {"audiences": [], "expirationSeconds": 7200, "boundObjectRef": bound_to},
    });
    let answer = cluster.create(&format!("{account}/token"), &request).await;
    let token = answer["status"]["token"].as_str().expect("a token");
    let access = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "agent",
        "clusters": [{"name": "test", "cluster": cluster.address()}],
        "users": [{"name": "agent", "user": {"token": token}}],
        "contexts": [{"name": "agent", "context": {"cluster": "test", "user": "agent"}}],
    });
    fs::write(path, access.to_string()).expect("the kubeconfig is written");
}

impl AgentPod {
    /// Creates the pod in a new namespace, with the least permissions and a token bound to it. The kubeconfig is written into `dir`.
    pub async fn new(cluster: &Cluster, dir: &Path, node: &str) -> Self {
        let pod = cluster.pod(&cluster.namespace().await, "sds-agent", node).await;
        Self::of(cluster, dir, node, pod).await
    }

    /// Uses an existing pod, in its own namespace.
    pub async fn of(cluster: &Cluster, dir: &Path, node: &str, pod: Pod) -> Self {
        let [namespace, name, key] = [ROOTS.0, ROOTS.1, ROOTS.2].map(str::to_owned);
        let agent = Self {
            issuer: format!("{{ name: {ISSUER}, kind: ClusterIssuer }}"),
            roots: Roots { namespace, name, key },
            more_roots: Vec::new(),
            trust: None,
            cluster: cluster.clone(),
            node: node.to_owned(),
            kubeconfig: dir.join("kubeconfig"),
            pod,
        };
        for (right, verbs) in LEAST {
            agent.grant(right, verbs).await;
        }
        agent.log_in().await;
        agent
    }

    /// Another pod of the same DaemonSet on the same node, as in a surge. Its kubeconfig is written into `dir`.
    pub async fn successor(&self, dir: &Path) -> Self {
        let Pod { namespace, service_account, .. } = &self.pod;
        let pod = self.cluster.pod_of(namespace, service_account, "sds-agent-next", &self.node).await;
        let (issuer, cluster, node) = (self.issuer.clone(), self.cluster.clone(), self.node.clone());
        let (roots, more_roots, trust) = (self.roots.clone(), self.more_roots.clone(), self.trust.clone());
        let agent = Self { pod, issuer, roots, more_roots, trust, cluster, node, kubeconfig: dir.join("kubeconfig") };
        agent.log_in().await;
        agent
    }

    /// Reads the roots from a ConfigMap in the pod's namespace, which does not exist yet.
    pub async fn with_own_roots(mut self) -> Self {
        self.cluster.delete(&self.role(Right::Trust, "roles")).await;
        self.cluster.delete(&self.role(Right::Trust, "rolebindings")).await;
        self.roots = Roots { namespace: self.pod.namespace.clone(), name: "roots".into(), key: "ca.crt".into() };
        self.grant(Right::Trust, &["get", "list", "watch"]).await;
        self
    }

    async fn log_in(&self) {
        log_in(&self.cluster, &self.pod, true, &self.kubeconfig).await;
    }

    /// `run` for this cluster and this pod. `settings` is additional YAML, such as `certificate`.
    pub fn launch(&self, dir: &Path, settings: &str) -> Launch {
        self.launched(settings, |settings| Launch::run(dir, settings))
    }

    /// Like [`AgentPod::launch`], with `sockets` as given.
    pub fn launch_on(&self, dir: &Path, sockets: &str, settings: &str) -> Launch {
        self.launched(settings, |settings| Launch::run_on(dir, sockets, settings))
    }

    fn launched(&self, settings: &str, run: impl FnOnce(&str) -> Launch) -> Launch {
        let (namespace, issuer) = (&self.pod.namespace, &self.issuer);
        let Roots { namespace: roots_namespace, name: roots, key } = &self.roots;
        let files: String = self.more_roots.iter().map(|path| format!(", {{ file: {} }}", path.display())).collect();
        let trust = self.trust.clone().unwrap_or_else(|| {
            format!("{{ sources: [ {{ configMap: {{ namespace: {roots_namespace}, name: {roots}, key: {key} }} }}{files} ] }}")
        });
        let settings = format!(
            "trustDomain: cluster.local\nattestation: kubernetes\n\
             issuer: {{ certManager: {{ issuerRef: {issuer}, namespace: {namespace} }} }}\n\
             trust: {trust}\n{settings}\n"
        );
        run(&settings)
            .env("KUBECONFIG", self.kubeconfig.to_str().expect("a plain path"))
            .env("NODE_NAME", &self.node)
            .env("POD_NAMESPACE", namespace)
            .env("POD_NAME", &self.pod.name)
            .env("POD_UID", &self.pod.uid)
    }

    /// A client with this agent's token and permissions.
    pub async fn client(&self) -> Client {
        cluster::client(Kubeconfig::read_from(&self.kubeconfig).expect("the kubeconfig just written")).await
    }

    /// Like [`AgentPod::client`], for calls by path.
    pub async fn view(&self) -> Cluster {
        Cluster::at(&self.kubeconfig).await
    }

    /// Allows exactly `verbs` of `right`; returns when the API server enforces it.
    pub async fn allow(&self, right: Right, verbs: &[&str]) {
        self.cluster.patch(&self.role(right, &self.kind(right)), &json!({"rules": self.rules(right, verbs)})).await;
        for verb in ["create", "get", "list", "watch", "delete"] {
            self.until_authorized(right, verb, verbs.contains(&verb)).await;
        }
    }

    async fn until_authorized(&self, right: Right, verb: &str, wanted: bool) {
        let (group, resource, namespace, name) = self.subject(right);
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "spec": {
                "user": format!("system:serviceaccount:{}:{}", self.pod.namespace, self.pod.service_account),
                "groups": ["system:serviceaccounts", "system:authenticated"],
                "resourceAttributes": {"verb": verb, "group": group, "resource": resource, "namespace": namespace, "name": name},
            },
        });
        eventually("the authorizer knows", AUTHORIZER, async || {
            let answer = self.cluster.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", &review).await;
            match answer["status"]["allowed"].as_bool() {
                Some(allowed) if allowed == wanted => Ok(()),
                _ => Err(format!("{verb} {resource}: {}", answer["status"])),
            }
        })
        .await;
    }

    /// Creates the role and its binding.
    async fn grant(&self, right: Right, verbs: &[&str]) {
        let (kind, name) = (self.kind(right), self.name(right));
        let metadata = json!({"name": name, "labels": cluster::labels()});
        self.cluster.create(&self.path(right, &kind), &json!({"metadata": metadata, "rules": self.rules(right, verbs)})).await;
        let binding = json!({
            "metadata": metadata,
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": if self.subject(right).2.is_empty() { "ClusterRole" } else { "Role" },
                "name": name,
            },
            "subjects": [{"kind": "ServiceAccount", "namespace": self.pod.namespace, "name": self.pod.service_account}],
        });
        self.cluster.create(&self.path(right, &kind.replace("roles", "rolebindings")), &binding).await;
    }

    /// The (group, resource, namespace, name) of a permission; an empty name means all.
    fn subject(&self, right: Right) -> (&str, &str, &str, &str) {
        match right {
            Right::Requests => ("cert-manager.io", "certificaterequests", &self.pod.namespace, ""),
            Right::ClusterIssuers => ("cert-manager.io", "clusterissuers", "", ""),
            Right::Issuers => ("cert-manager.io", "issuers", "", ""),
            Right::Pods => ("", "pods", "", ""),
            Right::Events => ("events.k8s.io", "events", "", ""),
            Right::Trust => ("", "configmaps", &self.roots.namespace, &self.roots.name),
        }
    }

    fn rules(&self, right: Right, verbs: &[&str]) -> Value {
        let (group, resource, _, name) = self.subject(right);
        match (verbs, name) {
            ([], _) => json!([]),
            (_, "") => json!([{"apiGroups": [group], "resources": [resource], "verbs": verbs}]),
            _ => json!([{"apiGroups": [group], "resources": [resource], "resourceNames": [name], "verbs": verbs}]),
        }
    }

    fn name(&self, right: Right) -> String {
        format!("{}-{right:?}", self.pod.namespace).to_lowercase()
    }

    fn kind(&self, right: Right) -> String {
        if self.subject(right).2.is_empty() { "clusterroles".into() } else { "roles".into() }
    }

    fn path(&self, right: Right, kind: &str) -> String {
        match self.subject(right).2 {
            "" => format!("{GROUP}/{kind}"),
            namespace => format!("{GROUP}/namespaces/{namespace}/{kind}"),
        }
    }

    fn role(&self, right: Right, kind: &str) -> String {
        format!("{}/{}", self.path(right, kind), self.name(right))
    }
}
