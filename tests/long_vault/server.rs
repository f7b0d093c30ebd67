//! A Vault with an intermediate CA, set up as in `docs/guides/vault.md`, and the ClusterIssuers by which cert-manager uses it.
//!
//! The server is `tests/vault`: Vault's own PKI engine and Kubernetes auth method. It keeps its port and its files, so that it can be
//! stopped and started again. A [`Wire`] is a connection to it on which signing alone can be interrupted.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Bytes};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use test_harness::{
    cluster::{Cluster, labels},
    eventually, free_port, tools,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

const ROOT_TOKEN: &str = "root";
/// Limit until cert-manager has checked an issuer, including its own retries.
const READY: Duration = Duration::from_secs(60);
/// The namespace in which cert-manager looks for the objects that a ClusterIssuer names.
const NAMESPACE: &str = "cert-manager";

/// A running Vault. Killed when dropped.
pub struct Vault {
    dir: PathBuf,
    address: SocketAddr,
    process: Option<Child>,
    /// The root's certificate in PEM; Vault signs with an intermediate below it.
    pub root: String,
    suffix: String,
}

impl Vault {
    /// Starts a Vault with a root, an intermediate and the auth method for `cluster`. The names of its objects in the cluster end with
    /// `suffix`.
    pub async fn start(cluster: &Cluster, dir: &Path, suffix: &str) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut vault = Self { dir: dir.join("vault"), address, process: None, root: String::new(), suffix: suffix.to_owned() };
        vault.resume().await;
        vault.authorities().await;
        vault.auth(cluster).await;
        vault
    }

    /// Starts it again with its files.
    pub async fn resume(&mut self) {
        let mut command = Command::new(tools::vault());
        command.arg("--dir").arg(&self.dir).args(["--port", &self.address.port().to_string()]);
        command.env("VAULT_TOKEN", ROOT_TOKEN).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let started = tokio::task::spawn_blocking(move || {
            let mut process = command.spawn().expect("vault can be started");
            let mut line = String::new();
            BufReader::new(process.stdout.take().expect("a pipe")).read_line(&mut line).expect("vault speaks");
            assert!(line.starts_with("ready "), "vault did not start: {line:?}");
            process
        });
        self.process = Some(started.await.expect("vault starts"));
    }

    /// Stops it; connections are refused.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("it runs");
            process.wait().expect("it can be waited for");
        }
    }

    /// `vault write PATH …`
    pub async fn write(&self, path: &str, body: Value) -> Value {
        self.call("POST", path, &body).await.unwrap_or_else(|error| panic!("vault write {path}: {error}"))
    }

    /// `vault patch PATH …`
    pub async fn patch(&self, path: &str, body: Value) -> Value {
        self.call("PATCH", path, &body).await.unwrap_or_else(|error| panic!("vault patch {path}: {error}"))
    }

    async fn call(&self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        let stream = TcpStream::connect(self.address).await.map_err(|e| e.to_string())?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
        let connection = tokio::spawn(connection);
        let request = Request::builder().method(method).uri(format!("/v1/{path}")).header("host", "localhost");
        let request = request.header("x-vault-token", ROOT_TOKEN).body(Full::new(Bytes::from(body.to_string()))).expect("a request");
        let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|e| e.to_string())?.to_bytes();
        connection.abort();
        let text = String::from_utf8_lossy(&body);
        if !status.is_success() {
            return Err(format!("{status} {text}"));
        }
        Ok(if text.is_empty() { Value::Null } else { serde_json::from_str(&text).expect("JSON") })
    }

    /// Creates a root, and below it the intermediate that signs: chains of three.
    async fn authorities(&mut self) {
        for mount in ["pki_root", "pki"] {
            self.write(&format!("sys/mounts/{mount}"), json!({"type": "pki", "config": {"max_lease_ttl": "87600h"}})).await;
        }
        let root = json!({"common_name": "test root", "key_type": "ec", "ttl": "87600h"});
        let root = self.write("pki_root/root/generate/internal", root).await;
        self.root = root["data"]["certificate"].as_str().expect("a certificate").to_owned();
        let request = self.write("pki/intermediate/generate/internal", json!({"common_name": "test intermediate", "key_type": "ec"})).await;
        let request = json!({"csr": request["data"]["csr"], "common_name": "test intermediate", "ttl": "43800h", "format": "pem_bundle"});
        let signed = self.write("pki_root/root/sign-intermediate", request).await;
        self.write("pki/intermediate/set-signed", json!({"certificate": signed["data"]["certificate"]})).await;
    }

    /// Enables Kubernetes auth: the API server reviews the tokens that cert-manager sends to Vault.
    async fn auth(&self, cluster: &Cluster) {
        let namespace = cluster.namespace().await;
        let accounts = format!("/api/v1/namespaces/{namespace}/serviceaccounts");
        cluster.create(&accounts, &json!({"metadata": {"name": "vault"}})).await;
        let binding = json!({
            "metadata": {"name": format!("vault-{}", self.suffix), "labels": labels()},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:auth-delegator"},
            "subjects": [{"kind": "ServiceAccount", "namespace": namespace, "name": "vault"}],
        });
        cluster.create("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &binding).await;
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": []}});
        let token = cluster.create(&format!("{accounts}/vault/token"), &request).await;
        let address = cluster.address();
        let authority = address["certificate-authority-data"].as_str().expect("the control plane's CA");
        let authority = BASE64_STANDARD.decode(authority).expect("base64");
        self.write("sys/auth/kubernetes", json!({"type": "kubernetes"})).await;
        let config = json!({
            "kubernetes_host": address["server"],
            "kubernetes_ca_cert": String::from_utf8_lossy(&authority),
            "token_reviewer_jwt": token["status"]["token"],
        });
        self.write("auth/kubernetes/config", config).await;
    }

    /// The address on which it listens.
    pub fn server(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Creates a ClusterIssuer that signs by `role` and is reached at `server`, with its permissions in Vault and in the cluster. Returns
    /// its name when it is Ready.
    pub async fn issuer(&self, cluster: &Cluster, name: &str, role: &str, server: &str) -> String {
        let name = format!("vault-{name}-{}", self.suffix);
        let policy = format!("path \"pki/sign/{role}\" {{ capabilities = [\"create\", \"update\"] }}");
        self.write(&format!("sys/policies/acl/{name}"), json!({"policy": policy})).await;
        let login = json!({
            "bound_service_account_names": name, "bound_service_account_namespaces": NAMESPACE,
            "audience": format!("vault://{name}"), "token_policies": name, "token_ttl": "10m",
        });
        self.write(&format!("auth/kubernetes/role/{name}"), login).await;

        let metadata = json!({"name": name, "labels": labels()});
        let roles = format!("/apis/rbac.authorization.k8s.io/v1/namespaces/{NAMESPACE}");
        cluster.create(&format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts"), &json!({"metadata": metadata})).await;
        let rule = json!({"apiGroups": [""], "resources": ["serviceaccounts/token"], "resourceNames": [name], "verbs": ["create"]});
        cluster.create(&format!("{roles}/roles"), &json!({"metadata": metadata, "rules": [rule]})).await;
        let binding = json!({
            "metadata": metadata,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "namespace": NAMESPACE, "name": "cert-manager"}],
        });
        cluster.create(&format!("{roles}/rolebindings"), &binding).await;
        let auth = json!({"kubernetes": {"role": name, "mountPath": "/v1/auth/kubernetes", "serviceAccountRef": {"name": name}}});
        let issuer = json!({
            "apiVersion": "cert-manager.io/v1", "kind": "ClusterIssuer", "metadata": metadata,
            "spec": {"vault": {"server": server, "path": format!("pki/sign/{role}"), "auth": auth}},
        });
        cluster.create("/apis/cert-manager.io/v1/clusterissuers", &issuer).await;
        eventually(&format!("{name} is Ready"), READY, async || {
            let issuer = cluster.get(&format!("/apis/cert-manager.io/v1/clusterissuers/{name}")).await;
            let ready = issuer["status"]["conditions"].as_array().and_then(|all| all.iter().find(|c| c["type"] == "Ready").cloned());
            match ready {
                Some(ready) if ready["status"] == "True" => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        name
    }
}

impl Drop for Vault {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A relay to Vault, on a separate port.
pub struct Wire {
    address: SocketAddr,
    cut: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Wire {
    /// Forwards everything until `cut_signing`.
    pub async fn to(vault: &Vault) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let address = listener.local_addr().expect("its address");
        let (cut, to) = (Arc::new(AtomicBool::new(false)), vault.address);
        let told = cut.clone();
        let task = tokio::spawn(async move {
            while let Ok((caller, _)) = listener.accept().await {
                tokio::spawn(carry(caller, to, told.clone()));
            }
        });
        Self { address, cut, task }
    }

    /// The address on which it listens.
    pub fn server(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Sets whether connections end when they request a signature. Logins pass.
    pub fn cut_signing(&self, cut: bool) {
        self.cut.store(cut, Ordering::Relaxed);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Requests come one after the other, each at the beginning of a read.
async fn carry(mut caller: TcpStream, to: SocketAddr, cut: Arc<AtomicBool>) {
    let Ok(vault) = TcpStream::connect(to).await else { return };
    let (mut from_caller, mut to_caller) = caller.split();
    let (mut from_vault, mut to_vault) = vault.into_split();
    let there = async {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(read @ 1..) = from_caller.read(&mut buffer).await {
            let asks_for_a_signature = buffer[..read].starts_with(b"POST /v1/pki/sign/");
            if asks_for_a_signature && cut.load(Ordering::Relaxed) || to_vault.write_all(&buffer[..read]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = there => {}
        _ = copy(&mut from_vault, &mut to_caller) => {}
    }
}
