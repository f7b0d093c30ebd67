//! A Kubernetes API with the real cert-manager: the control plane that all test programs of a run share, the cluster that `KUBECONFIG`
//! names, or a control plane of one test.
//!
//! Only tests with a `node::Node` have a kubelet. Elsewhere pods are objects with a node name, and the tests start their processes. Each
//! test creates its own namespaces with the label `sds-agent-test`, by which another cluster can be cleaned up.

use std::{
    env,
    path::{Path, PathBuf},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use kube::{
    Api, Client, Config,
    api::{ApiResource, DynamicObject, GroupVersionKind, ListParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};

pub use crate::agent_pod::AgentPod;
use crate::{
    plane::{Plan, Plane},
    recorder::Recorder,
    shared_plane,
};

/// The issuer with which the control plane of the tests is seeded. Another cluster needs the same.
pub const ISSUER: &str = "mesh-ca";
pub const ROOTS: (&str, &str, &str) = ("cert-manager", "mesh-roots", "ca.crt");
/// The private CA of that issuer.
const CA_SECRET: (&str, &str) = ("cert-manager", "ca-key-pair");

/// An administrator's access to a cluster.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    kubeconfig: Kubeconfig,
}

/// The ways in which a client can change an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    MergePatch,
    JsonPatch,
    Update,
    Apply,
}

impl Write {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::MergePatch, Self::JsonPatch, Self::Update, Self::Apply];
}

/// A pod that runs according to the API server.
#[derive(Debug, Clone)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub service_account: String,
}

impl Pod {
    /// The SPIFFE ID that it must get.
    pub fn spiffe_id(&self) -> String {
        format!("spiffe://cluster.local/ns/{}/sa/{}", self.namespace, self.service_account)
    }

    /// Its path in the API.
    pub fn path(&self) -> String {
        format!("/api/v1/namespaces/{}/pods/{}", self.namespace, self.name)
    }
}

impl Cluster {
    /// Connects; the first call starts the control plane.
    pub async fn connect() -> Self {
        Self::at(&env::var_os("KUBECONFIG").map_or_else(|| shared_plane::kubeconfig().to_owned(), PathBuf::from)).await
    }

    /// The control plane that tests share, regardless of `KUBECONFIG`: it can reach servers on loopback.
    pub async fn shared() -> Self {
        Self::at(shared_plane::kubeconfig()).await
    }

    /// A separate control plane that the caller can change and stop, regardless of `KUBECONFIG`. `flags` are passed to its program.
    pub async fn own(flags: &[&str]) -> (Self, Plane) {
        let plane = Plan::new(flags).start().await;
        (Self::at(plane.kubeconfig()).await, plane)
    }

    /// The cluster with the access of this kubeconfig.
    pub async fn at(path: &Path) -> Self {
        let kubeconfig = Kubeconfig::read_from(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { client: client(kubeconfig.clone()).await, kubeconfig }
    }

    /// The `cluster` entry of a kubeconfig.
    pub fn address(&self) -> Value {
        let cluster = self.kubeconfig.clusters.first().and_then(|named| named.cluster.as_ref()).expect("a cluster");
        serde_json::to_value(cluster).expect("it was read from text")
    }

    /// A kubeconfig with which an administrator impersonates `user`: the API server checks only that user's permissions.
    pub fn access_as(&self, user: &str, groups: &[&str]) -> Value {
        let login = self.kubeconfig.auth_infos.first().and_then(|named| named.auth_info.as_ref()).expect("a user");
        let mut login = serde_json::to_value(login).expect("it was read from text");
        login["as"] = json!(user);
        login["as-groups"] = json!(groups);
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": self.address()}],
            "users": [{"name": "test", "user": login}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        })
    }

    /// Creates a node without a kubelet.
    pub async fn node(&self) -> String {
        let node = self.create("/api/v1/nodes", &json!({"metadata": {"generateName": "test-", "labels": labels()}})).await;
        name_of(&node)
    }

    /// Creates a namespace.
    pub async fn namespace(&self) -> String {
        let namespace = json!({"metadata": {"generateName": "sds-test-", "labels": labels()}});
        name_of(&self.create("/api/v1/namespaces", &namespace).await)
    }

    /// Creates a service account and a pod of it, both called `name`, running on `node`.
    pub async fn pod(&self, namespace: &str, name: &str, node: &str) -> Pod {
        self.create(&format!("/api/v1/namespaces/{namespace}/serviceaccounts"), &json!({"metadata": {"name": name}})).await;
        self.run_pod(namespace, &json!({"metadata": {"name": name}, "spec": spec(name, Some(node))})).await
    }

    /// Creates a pod of an existing service account, running on `node`.
    pub async fn pod_of(&self, namespace: &str, account: &str, name: &str, node: &str) -> Pod {
        self.run_pod(namespace, &json!({"metadata": {"name": name}, "spec": spec(account, Some(node))})).await
    }

    /// Creates a pod without a node. Until it is [bound](Self::bind), no agent sees it.
    pub async fn unbound_pod(&self, namespace: &str, name: &str) -> Pod {
        self.create(&format!("/api/v1/namespaces/{namespace}/serviceaccounts"), &json!({"metadata": {"name": name}})).await;
        self.run_pod(namespace, &json!({"metadata": {"name": name}, "spec": spec(name, None)})).await
    }

    /// Creates the mirror of a static pod. It has no service account, and its cgroups have the UID that the kubelet assigned, `hash`.
    pub async fn mirror_pod(&self, namespace: &str, name: &str, node: &str, hash: &str) -> Pod {
        let annotations = json!({"kubernetes.io/config.mirror": hash, "kubernetes.io/config.source": "file"});
        let mut spec = spec(name, Some(node));
        spec.as_object_mut().expect("an object").remove("serviceAccountName");
        let pod = self.run_pod(namespace, &json!({"metadata": {"name": name, "annotations": annotations}, "spec": spec})).await;
        Pod { uid: hash.to_owned(), ..pod }
    }

    async fn run_pod(&self, namespace: &str, pod: &Value) -> Pod {
        let pods = format!("/api/v1/namespaces/{namespace}/pods");
        let pod = self.create(&pods, pod).await;
        let name = name_of(&pod);
        self.patch(&format!("{pods}/{name}/status"), &json!({"status": {"phase": "Running"}})).await;
        Pod {
            namespace: namespace.to_owned(),
            uid: pod["metadata"]["uid"].as_str().expect("the API server gives each pod a UID").to_owned(),
            service_account: pod["spec"]["serviceAccountName"].as_str().unwrap_or_default().to_owned(),
            name,
        }
    }

    /// Binds a pod to a node, as the scheduler does.
    pub async fn bind(&self, pod: &Pod, node: &str) {
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod.name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        });
        self.create(&format!("{}/binding", pod.path()), &binding).await;
    }

    /// Creates a pod for the agent, see [`AgentPod::new`].
    pub async fn agent(&self, dir: &Path, node: &str) -> AgentPod {
        AgentPod::new(self, dir, node).await
    }

    /// The names of the CertificateRequests in a namespace.
    pub async fn requests(&self, namespace: &str) -> Vec<String> {
        let list = self.certificate_requests(namespace).list(&ListParams::default()).await.expect("the API server answers");
        list.items.into_iter().filter_map(|request| request.metadata.name).collect()
    }

    /// Records every CertificateRequest of a namespace from now on, also those that are deleted at once.
    pub async fn record_requests(&self, namespace: &str) -> Recorder {
        Recorder::start(self.certificate_requests(namespace)).await
    }

    /// The certificate of the private CA behind [`ISSUER`], in PEM.
    pub async fn authority(&self) -> String {
        self.authority_with_key().await.0
    }

    /// The certificate of the private CA, and its key.
    pub async fn authority_with_key(&self) -> (String, String) {
        let secret = self.get(&format!("/api/v1/namespaces/{}/secrets/{}", CA_SECRET.0, CA_SECRET.1)).await;
        let pem = |field: &str| {
            let encoded = secret["data"][field].as_str().unwrap_or_else(|| panic!("the CA's Secret has no {field}"));
            String::from_utf8(BASE64_STANDARD.decode(encoded).expect("base64")).expect("PEM is text")
        };
        (pem("tls.crt"), pem("tls.key"))
    }

    /// Creates an object and returns it as the server completed it.
    pub async fn create(&self, path: &str, object: &Value) -> Value {
        self.send("POST", path, "application/json", object).await
    }

    /// Creates an object and returns the error, if any.
    pub async fn try_create(&self, path: &str, object: &Value) -> kube::Result<Value> {
        self.try_send("POST", path, "application/json", object).await
    }

    /// Creates or updates an object by server-side apply; `path` is that of its kind. A field that the API server does not know is an
    /// error.
    pub async fn apply(&self, path: &str, object: &Value) -> Value {
        let path = format!("{path}?fieldManager=test&force=true&fieldValidation=Strict");
        self.send("PATCH", &path, "application/apply-patch+yaml", object).await
    }

    /// Deletes an object and returns the error, if any.
    pub async fn try_delete(&self, path: &str) -> kube::Result<Value> {
        self.try_send("DELETE", path, "application/json", &json!({})).await
    }

    /// Changes an object by a merge patch.
    pub async fn patch(&self, path: &str, change: &Value) -> Value {
        self.send("PATCH", path, "application/merge-patch+json", change).await
    }

    /// Changes an object by a strategic merge patch, as `kubectl patch` does: list items are merged by name.
    pub async fn merge(&self, path: &str, change: &Value) -> Value {
        self.send("PATCH", path, "application/strategic-merge-patch+json", change).await
    }

    /// Sets one field of the CertificateRequest at `path`, or of its subresource, by `write`, and returns the error, if any. A list is
    /// replaced as a whole, except by [`Write::Apply`], which merges a list with keys.
    pub async fn try_set(&self, write: Write, path: &str, field: &[&str], value: &Value) -> kube::Result<Value> {
        let nested = field.iter().rev().fold(value.clone(), |inner, key| json!({(*key): inner}));
        match write {
            Write::MergePatch => self.try_send("PATCH", path, "application/merge-patch+json", &nested).await,
            Write::JsonPatch => {
                // A JSON patch does not create a missing parent, so it is created here.
                let current = self.try_get(path).await?;
                let depth = (1..field.len()).find(|depth| current.pointer(&pointer(&field[..*depth])).is_none()).unwrap_or(field.len());
                let rest = field[depth..].iter().rev().fold(value.clone(), |inner, key| json!({(*key): inner}));
                let patch = json!([{"op": "add", "path": pointer(&field[..depth]), "value": rest}]);
                self.try_send("PATCH", path, "application/json-patch+json", &patch).await
            }
            // Retry if a controller has changed the object in between.
            Write::Update => loop {
                let mut object = self.try_get(path).await?;
                let place = field.iter().fold(&mut object, |inner, key| &mut inner[*key]);
                value.clone_into(place);
                match self.try_send("PUT", path, "application/json", &object).await {
                    Err(kube::Error::Api(status)) if status.code == 409 => {}
                    answer => return answer,
                }
            },
            Write::Apply => {
                let mut object = nested;
                object["apiVersion"] = json!("cert-manager.io/v1");
                object["kind"] = json!("CertificateRequest");
                object["metadata"]["name"] = json!(path.trim_end_matches("/status").rsplit('/').next());
                let path = format!("{path}?fieldManager=test-apply&force=true");
                self.try_send("PATCH", &path, "application/apply-patch+yaml", &object).await
            }
        }
    }

    /// Grants `user` these rules in the whole cluster.
    pub async fn grant(&self, user: &str, rules: &Value) {
        let rbac = "/apis/rbac.authorization.k8s.io/v1";
        self.create(&format!("{rbac}/clusterroles"), &json!({"metadata": {"name": user}, "rules": rules})).await;
        let binding = json!({
            "metadata": {"name": user},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": user},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
        });
        self.create(&format!("{rbac}/clusterrolebindings"), &binding).await;
    }

    /// Reads an object.
    pub async fn get(&self, path: &str) -> Value {
        self.send("GET", path, "application/json", &Value::Null).await
    }

    /// Reads a page of text.
    pub async fn text(&self, path: &str) -> String {
        let request = http::Request::get(path).body(Vec::new()).expect("a request");
        self.client.request_text(request).await.unwrap_or_else(|e| panic!("GET {path}: {e}"))
    }

    /// Reads an object and returns the error, if any.
    pub async fn try_get(&self, path: &str) -> kube::Result<Value> {
        self.try_send("GET", path, "application/json", &Value::Null).await
    }

    /// Deletes an object.
    pub async fn delete(&self, path: &str) -> Value {
        self.send("DELETE", path, "application/json", &json!({})).await
    }

    /// Deletes an object at once, without its grace period.
    pub async fn delete_now(&self, path: &str) -> Value {
        self.try_delete_now(path).await.unwrap_or_else(|e| panic!("DELETE {path}: {e}"))
    }

    /// Like [`delete_now`](Self::delete_now); returns the API server's refusal.
    pub async fn try_delete_now(&self, path: &str) -> kube::Result<Value> {
        self.try_send("DELETE", path, "application/json", &json!({"gracePeriodSeconds": 0})).await
    }

    async fn send(&self, method: &str, path: &str, content: &str, body: &Value) -> Value {
        self.try_send(method, path, content, body).await.unwrap_or_else(|e| panic!("{method} {path}: {e}"))
    }

    async fn try_send(&self, method: &str, path: &str, content: &str, body: &Value) -> kube::Result<Value> {
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let request = http::Request::builder().method(method).uri(path).header("content-type", content).body(body);
        self.client.request(request.expect("a request")).await
    }

    /// The CertificateRequests of a namespace.
    pub fn certificate_requests(&self, namespace: &str) -> Api<DynamicObject> {
        let kind = GroupVersionKind::gvk("cert-manager.io", "v1", "CertificateRequest");
        Api::namespaced_with(self.client.clone(), namespace, &ApiResource::from_gvk(&kind))
    }
}

/// The message of a policy's rejection.
pub fn rejection(answer: kube::Result<Value>, what: &str) -> String {
    match answer {
        Err(kube::Error::Api(status)) if status.code == 403 || status.code == 422 => status.message.clone(),
        other => panic!("{what} was not rejected: {other:?}"),
    }
}

/// A client with the login of `kubeconfig`.
pub async fn client(kubeconfig: Kubeconfig) -> Client {
    // Another test may have installed it first.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.expect("a usable kubeconfig");
    Client::try_from(config).expect("a client")
}

/// Labels of every object that a test creates outside of its namespaces, and of these.
pub fn labels() -> Value {
    json!({"sds-agent-test": "true"})
}

fn spec(account: &str, node: Option<&str>) -> Value {
    json!({
        "serviceAccountName": account,
        "nodeName": node,
        "automountServiceAccountToken": false,
        "terminationGracePeriodSeconds": 0,
        "tolerations": [{"operator": "Exists"}],
        "containers": [{"name": "main", "image": "none"}],
    })
}

/// A JSON pointer.
fn pointer(field: &[&str]) -> String {
    field.iter().map(|key| format!("/{}", key.replace('~', "~0").replace('/', "~1"))).collect()
}

/// The name that the API server has generated.
pub fn name_of(object: &Value) -> String {
    object["metadata"]["name"].as_str().expect("the API server names it").to_owned()
}
