//! A Kubernetes API with the real cert-manager: one control plane for the whole test binary, or the cluster that `KUBECONFIG` names.
//!
//! There is no kubelet: pods are objects that say where they run, and their processes are started by the tests. Every test has
//! namespaces of its own, labelled `sds-agent-test`, which a borrowed cluster can be cleared of by that label.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use futures::StreamExt;
use kube::{
    Api, Client, Config,
    api::{ApiResource, DynamicObject, GroupVersionKind, ListParams},
    config::{KubeConfigOptions, Kubeconfig},
    runtime::{WatchStreamExt, watcher},
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use x509_parser::{certification_request::X509CertificationRequest, extensions::GeneralName, prelude::FromDer};

use super::{agent::Launch, eventually, tools};

/// What the control plane of the tests is seeded with; a borrowed cluster needs the same.
pub const ISSUER: &str = "mesh-ca";
const ROOTS: (&str, &str, &str) = ("cert-manager", "mesh-roots", "ca.crt");
/// The private CA of that issuer.
const CA_SECRET: (&str, &str) = ("cert-manager", "ca-key-pair");

const WATCH_START: Duration = Duration::from_secs(30);

/// An administrator's access.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    kubeconfig: Kubeconfig,
}

/// A pod that runs as far as the API server knows.
#[derive(Debug, Clone)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub service_account: String,
}

impl Pod {
    /// The SPIFFE id that it must get.
    pub fn spiffe_id(&self) -> String {
        format!("spiffe://cluster.local/ns/{}/sa/{}", self.namespace, self.service_account)
    }
}

/// Where an agent runs, what it may do, and how it logs in.
pub struct AgentPod {
    pub pod: Pod,
    node: String,
    kubeconfig: PathBuf,
}

impl Cluster {
    /// Connects; the first call starts the control plane.
    pub async fn connect() -> Self {
        let path = env::var_os("KUBECONFIG").map_or_else(|| control_plane().kubeconfig.clone(), PathBuf::from);
        let kubeconfig = Kubeconfig::read_from(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { client: client(kubeconfig.clone()).await, kubeconfig }
    }

    /// A node without a kubelet.
    pub async fn node(&self) -> String {
        let node = self.create("/api/v1/nodes", &json!({"metadata": {"generateName": "test-", "labels": labels()}})).await;
        name_of(&node)
    }

    /// A fresh namespace.
    pub async fn namespace(&self) -> String {
        let namespace = json!({"metadata": {"generateName": "sds-test-", "labels": labels()}});
        name_of(&self.create("/api/v1/namespaces", &namespace).await)
    }

    /// A service account and a pod of it, both called `name`, running on `node`.
    pub async fn pod(&self, namespace: &str, name: &str, node: &str) -> Pod {
        self.create(&format!("/api/v1/namespaces/{namespace}/serviceaccounts"), &json!({"metadata": {"name": name}})).await;
        let pods = format!("/api/v1/namespaces/{namespace}/pods");
        let pod = json!({
            "metadata": {"name": name},
            "spec": {
                "serviceAccountName": name,
                "nodeName": node,
                "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 0,
                "tolerations": [{"operator": "Exists"}],
                "containers": [{"name": "main", "image": "none"}],
            },
        });
        let pod = self.create(&pods, &pod).await;
        self.patch(&format!("{pods}/{name}/status"), &json!({"status": {"phase": "Running"}})).await;
        Pod {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: pod["metadata"]["uid"].as_str().expect("the API server gives each pod a UID").to_owned(),
            service_account: name.to_owned(),
        }
    }

    /// A pod for the agent in a fresh namespace, with the least rights, and a token bound to that pod. The kubeconfig goes into `dir`.
    pub async fn agent(&self, dir: &Path, node: &str) -> AgentPod {
        let pod = self.pod(&self.namespace().await, "sds-agent", node).await;
        self.grant(&pod).await;

        let account = format!("/api/v1/namespaces/{}/serviceaccounts/{}", pod.namespace, pod.service_account);
        let bound_to = json!({"kind": "Pod", "apiVersion": "v1", "name": pod.name, "uid": pod.uid});
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"audiences": [], "expirationSeconds": 7200, "boundObjectRef": bound_to},
        });
        let answer = self.create(&format!("{account}/token"), &request).await;
        let token = answer["status"]["token"].as_str().expect("a token");

        let kubeconfig = dir.join("kubeconfig");
        let cluster = self.kubeconfig.clusters.first().and_then(|named| named.cluster.clone()).expect("a cluster");
        let access = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "agent",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "agent", "user": {"token": token}}],
            "contexts": [{"name": "agent", "context": {"cluster": "test", "user": "agent"}}],
        });
        fs::write(&kubeconfig, access.to_string()).expect("the kubeconfig is written");
        AgentPod { pod, node: node.to_owned(), kubeconfig }
    }

    /// What an agent needs and nothing else: its requests, its issuer, its trust, and the pods.
    async fn grant(&self, pod: &Pod) {
        let (namespace, account) = (&pod.namespace, &pod.service_account);
        let cert_manager = json!(["cert-manager.io"]);
        let wide = format!("{namespace}-{account}");
        let cluster_rules = json!([
            {"apiGroups": cert_manager, "resources": ["clusterissuers"], "verbs": ["get"]},
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]},
        ]);
        self.role(None, &wide, pod, cluster_rules).await;
        let own_rules = json!([
            {"apiGroups": cert_manager, "resources": ["certificaterequests"], "verbs": ["create", "get", "list", "watch", "delete"]},
            {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]},
        ]);
        self.role(Some(namespace), account, pod, own_rules).await;
        let trust_rules =
            json!([{"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [ROOTS.1], "verbs": ["get", "list", "watch"]}]);
        self.role(Some(ROOTS.0), &wide, pod, trust_rules).await;
    }

    async fn role(&self, namespace: Option<&str>, name: &str, owner: &Pod, rules: Value) {
        let group = "/apis/rbac.authorization.k8s.io/v1";
        let (kind, path) = match namespace {
            Some(namespace) => ("Role", format!("{group}/namespaces/{namespace}/role")),
            None => ("ClusterRole", format!("{group}/clusterrole")),
        };
        let metadata = json!({"name": name, "labels": labels()});
        self.create(&format!("{path}s"), &json!({"metadata": metadata, "rules": rules})).await;
        let binding = json!({
            "metadata": metadata,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name},
            "subjects": [{"kind": "ServiceAccount", "namespace": owner.namespace, "name": owner.service_account}],
        });
        self.create(&format!("{path}bindings"), &binding).await;
    }

    /// The names of the CertificateRequests in a namespace.
    pub async fn requests(&self, namespace: &str) -> Vec<String> {
        let list = self.certificate_requests(namespace).list(&ListParams::default()).await.expect("the API server answers");
        list.items.into_iter().filter_map(|request| request.metadata.name).collect()
    }

    /// Records every CertificateRequest of a namespace from now on, also those deleted at once.
    pub async fn record_requests(&self, namespace: &str) -> Recorder {
        let seen = Arc::<Mutex<BTreeMap<String, Request>>>::default();
        let (started, mut ready) = tokio::sync::watch::channel(false);
        let requests = self.certificate_requests(namespace);
        let kept = seen.clone();
        let task = tokio::spawn(async move {
            let mut events = std::pin::pin!(watcher(requests, watcher::Config::default()).default_backoff());
            while let Some(event) = events.next().await {
                match event {
                    Ok(watcher::Event::InitDone) => drop(started.send_replace(true)),
                    Ok(watcher::Event::InitApply(object) | watcher::Event::Apply(object)) => {
                        let request = Request::read(&object);
                        kept.lock().expect("not poisoned").entry(request.uid.clone()).or_insert(request);
                    }
                    _ => {}
                }
            }
        });
        let listed = tokio::time::timeout(WATCH_START, ready.wait_for(|listed| *listed)).await;
        listed.expect("the watch starts in time").expect("the watch goes on");
        Recorder { seen, task }
    }

    /// The certificate of the private CA behind [`ISSUER`], in PEM.
    pub async fn authority(&self) -> String {
        let secret = self.get(&format!("/api/v1/namespaces/{}/secrets/{}", CA_SECRET.0, CA_SECRET.1)).await;
        let encoded = secret["data"]["tls.crt"].as_str().expect("the CA's Secret has a certificate");
        String::from_utf8(BASE64_STANDARD.decode(encoded).expect("base64")).expect("PEM is text")
    }

    /// Creates an object; gives it as the server completed it.
    pub async fn create(&self, path: &str, object: &Value) -> Value {
        self.send("POST", path, "application/json", object).await
    }

    /// Merges into an object.
    pub async fn patch(&self, path: &str, change: &Value) -> Value {
        self.send("PATCH", path, "application/merge-patch+json", change).await
    }

    /// Reads an object.
    pub async fn get(&self, path: &str) -> Value {
        self.send("GET", path, "application/json", &Value::Null).await
    }

    /// Deletes an object.
    pub async fn delete(&self, path: &str) -> Value {
        self.send("DELETE", path, "application/json", &json!({})).await
    }

    async fn send(&self, method: &str, path: &str, content: &str, body: &Value) -> Value {
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let request = http::Request::builder().method(method).uri(path).header("content-type", content).body(body);
        let answer = self.client.request(request.expect("a request")).await;
        answer.unwrap_or_else(|e| panic!("{method} {path}: {e}"))
    }

    fn certificate_requests(&self, namespace: &str) -> Api<DynamicObject> {
        let kind = GroupVersionKind::gvk("cert-manager.io", "v1", "CertificateRequest");
        Api::namespaced_with(self.client.clone(), namespace, &ApiResource::from_gvk(&kind))
    }
}

impl AgentPod {
    /// `run` against this cluster as this pod; `settings` is more YAML, such as `certificate`.
    pub fn launch(&self, dir: &Path, settings: &str) -> Launch {
        let (namespace, (roots_namespace, roots, key)) = (&self.pod.namespace, ROOTS);
        let settings = format!(
            "trustDomain: cluster.local\nattestation: kubernetes\n\
             issuer: {{ certManager: {{ issuerRef: {{ name: {ISSUER}, kind: ClusterIssuer }}, namespace: {namespace} }} }}\n\
             trust: {{ sources: [ {{ configMap: {{ namespace: {roots_namespace}, name: {roots}, key: {key} }} }} ] }}\n{settings}\n"
        );
        Launch::run(dir, &settings)
            .env("KUBECONFIG", self.kubeconfig.to_str().expect("a plain path"))
            .env("NODE_NAME", &self.node)
            .env("POD_NAMESPACE", namespace)
            .env("POD_NAME", &self.pod.name)
            .env("POD_UID", &self.pod.uid)
    }

    /// The cluster as this agent sees it, with its token and its rights.
    pub async fn client(&self) -> Client {
        client(Kubeconfig::read_from(&self.kubeconfig).expect("the kubeconfig just written")).await
    }
}

/// A CertificateRequest that was seen.
#[derive(Debug, Clone)]
pub struct Request {
    pub name: String,
    uid: String,
    /// Unix seconds.
    pub created: i64,
    /// The URI SANs of its CSR.
    pub uris: Vec<String>,
}

impl Request {
    fn read(object: &DynamicObject) -> Self {
        let encoded = object.data["spec"]["request"].as_str().expect("a request holds a CSR");
        let text = BASE64_STANDARD.decode(encoded).expect("base64");
        let (_, pem) = x509_parser::pem::parse_x509_pem(&text).expect("PEM");
        let (_, csr) = X509CertificationRequest::from_der(&pem.contents).expect("a CSR");
        let names = csr.requested_extensions().into_iter().flatten().filter_map(|extension| match extension {
            x509_parser::extensions::ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
            _ => None,
        });
        let uris = names.flatten().filter_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        });
        Self {
            name: object.metadata.name.clone().unwrap_or_default(),
            uid: object.metadata.uid.clone().expect("the API server gives a UID"),
            created: object.metadata.creation_timestamp.as_ref().expect("and a creation time").0.as_second(),
            uris: uris.collect(),
        }
    }
}

/// Watches CertificateRequests until dropped.
pub struct Recorder {
    seen: Arc<Mutex<BTreeMap<String, Request>>>,
    task: JoinHandle<()>,
}

impl Recorder {
    /// Those seen so far, oldest first.
    pub fn seen(&self) -> Vec<Request> {
        let mut seen: Vec<_> = self.seen.lock().expect("not poisoned").values().cloned().collect();
        seen.sort_by_key(|request| request.created);
        seen
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct ControlPlane {
    kubeconfig: PathBuf,
    // It ends when its standard input does: with this process, however that ends.
    _alive: (Child, ChildStdin),
}

fn control_plane() -> &'static ControlPlane {
    static CONTROL_PLANE: OnceLock<ControlPlane> = OnceLock::new();
    CONTROL_PLANE.get_or_init(|| {
        let mut child = Command::new(tools::controlplane())
            .arg("--dir")
            .arg(control_plane_files())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the control plane can be started");
        let stdin = child.stdin.take().expect("a pipe");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("the control plane speaks");
        let kubeconfig = line.trim_end().strip_prefix("ready ").map(PathBuf::from);
        let kubeconfig = kubeconfig.unwrap_or_else(|| panic!("the control plane did not start (it said {line:?}); its words are above"));
        ControlPlane { kubeconfig, _alive: (child, stdin) }
    })
}

/// A folder below `target/tmp`, named after this process. Its logs stay for a look after a failure; the next run takes them away.
fn control_plane_files() -> PathBuf {
    const PREFIX: &str = "controlplane-";
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    for entry in fs::read_dir(folder).expect("cargo has made target/tmp").flatten() {
        let owner = entry.file_name().to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            fs::remove_dir_all(entry.path()).expect("an earlier run's files can be removed");
        }
    }
    folder.join(format!("{PREFIX}{}", std::process::id()))
}

async fn client(kubeconfig: Kubeconfig) -> Client {
    // Another test may have been first; either way there is a provider.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.expect("a usable kubeconfig");
    Client::try_from(config).expect("a client")
}

fn labels() -> Value {
    json!({"sds-agent-test": "true"})
}

fn name_of(object: &Value) -> String {
    object["metadata"]["name"].as_str().expect("the API server names it").to_owned()
}

/// A request like an agent's, by a token bound to its pod: cert-manager signs it, and records the pod and the node. It shows that
/// the control plane is what the other tests take it for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_control_plane_issues_and_records_who_asked() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let cluster = Cluster::connect().await;
    let node = cluster.node().await;
    let agent = cluster.agent(dir.path(), &node).await;
    let namespace = &agent.pod.namespace;
    let recorder = cluster.record_requests(namespace).await;

    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let id = "spiffe://cluster.local/ns/a/sa/b";
    params.subject_alt_names = vec![rcgen::SanType::URI(id.try_into().expect("a URI"))];
    let csr = params.serialize_request(&key).expect("a CSR").pem().expect("PEM");

    let as_agent = Cluster { client: agent.client().await, kubeconfig: cluster.kubeconfig.clone() };
    let requests = format!("/apis/cert-manager.io/v1/namespaces/{namespace}/certificaterequests");
    let request = json!({
        "apiVersion": "cert-manager.io/v1", "kind": "CertificateRequest",
        "metadata": {"generateName": "test-"},
        "spec": {
            "issuerRef": {"name": ISSUER, "kind": "ClusterIssuer", "group": "cert-manager.io"},
            "request": BASE64_STANDARD.encode(csr),
            "duration": "30s",
            "usages": ["digital signature", "key encipherment", "server auth", "client auth"],
        },
    });
    let request = as_agent.create(&requests, &request).await;
    let extra = &request["spec"]["extra"];
    assert_eq!(extra["authentication.kubernetes.io/node-name"], json!([node]));
    assert_eq!(extra["authentication.kubernetes.io/pod-uid"], json!([agent.pod.uid]));
    assert!(extra["authentication.kubernetes.io/node-uid"].is_array(), "{extra}");

    let path = format!("{requests}/{}", name_of(&request));
    let certificate = eventually("the request is issued", Duration::from_secs(30), async || {
        let request = as_agent.get(&path).await;
        request["status"]["certificate"].as_str().map(str::to_owned).ok_or_else(|| request["status"].to_string())
    });
    assert!(!certificate.await.is_empty());
    as_agent.delete(&path).await;
    assert!(cluster.requests(namespace).await.is_empty());
    assert_eq!(recorder.seen().iter().map(|seen| seen.uris.clone()).collect::<Vec<_>>(), [[id.to_owned()]]);

    // And no more than that: an agent may not approve, nor read Secrets.
    for (verb, path) in [("GET", "/api/v1/secrets"), ("GET", "/api/v1/namespaces/cert-manager/secrets/ca-key-pair")] {
        let request = http::Request::builder().method(verb).uri(path).body(Vec::new()).expect("a request");
        let refused = as_agent.client.request::<Value>(request).await.expect_err("it has no right to");
        assert!(matches!(&refused, kube::Error::Api(status) if status.code == 403), "{refused}");
    }
}
