//! CertificateRequests written by a test: what an agent would write, and every forgery that an attacker could try.

use base64::{Engine, prelude::BASE64_STANDARD};
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, KeyPair, SanType, SignatureAlgorithm};
use serde_json::{Value, json};

use crate::{
    cluster::{Cluster, ISSUER, Pod, name_of},
    eventually,
    world::{Actor, NAMESPACE, PATIENCE},
};

#[derive(Clone)]
pub struct Ask {
    /// The object, complete except for its CSR.
    pub object: Value,
    pub namespace: String,
    names: Vec<SanType>,
    extensions: Vec<CustomExtension>,
    subject: DistinguishedName,
    algorithm: &'static SignatureAlgorithm,
}

impl Ask {
    /// The request that `agent` would create for `pod`, by the installed configuration.
    pub fn of(agent: &Actor, pod: &Pod) -> Self {
        let object = json!({
            "apiVersion": "cert-manager.io/v1", "kind": "CertificateRequest",
            "metadata": {
                "generateName": "test-",
                "labels": {"sds-agent.io/node": agent.node},
                "annotations": {
                    "sds-agent.io/node-name": agent.node,
                    "sds-agent.io/pod-namespace": pod.namespace,
                    "sds-agent.io/pod-name": pod.name,
                    "sds-agent.io/pod-uid": pod.uid,
                },
            },
            "spec": {
                "issuerRef": {"name": ISSUER, "kind": "ClusterIssuer", "group": "cert-manager.io"},
                "duration": "24h",
                "usages": ["digital signature", "key encipherment", "server auth", "client auth"],
            },
        });
        Self {
            object,
            namespace: NAMESPACE.to_owned(),
            names: vec![uri(&pod.spiffe_id())],
            extensions: Vec::new(),
            subject: DistinguishedName::new(),
            algorithm: &rcgen::PKCS_ECDSA_P256_SHA256,
        }
    }

    pub fn spec(mut self, field: &str, value: Value) -> Self {
        self.object["spec"][field] = value;
        self
    }

    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.object["metadata"]["annotations"][key] = json!(value);
        self
    }

    pub fn label(mut self, node: &str) -> Self {
        self.object["metadata"]["labels"]["sds-agent.io/node"] = json!(node);
        self
    }

    /// Removes the labels, which only an agent may set.
    pub fn unlabelled(mut self) -> Self {
        self.object["metadata"]["labels"] = json!({});
        self
    }

    pub fn owner(mut self, pod: &Pod) -> Self {
        self.object["metadata"]["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "Pod", "name": pod.name, "uid": pod.uid}]);
        self
    }

    pub fn in_namespace(self, namespace: &str) -> Self {
        Self { namespace: namespace.to_owned(), ..self }
    }

    /// Adds a name.
    pub fn and(mut self, name: SanType) -> Self {
        self.names.push(name);
        self
    }

    /// Replaces the pod's name.
    pub fn named(self, name: SanType) -> Self {
        Self { names: vec![name], ..self }
    }

    pub fn extension(mut self, oid: &[u64], content: &[u8]) -> Self {
        self.extensions.push(CustomExtension::from_oid_content(oid, content.to_vec()));
        self
    }

    pub fn common_name(mut self, name: &str) -> Self {
        self.subject.push(rcgen::DnType::CommonName, name);
        self
    }

    pub fn key(self, algorithm: &'static SignatureAlgorithm) -> Self {
        Self { algorithm, ..self }
    }

    /// Creates the request as `actor` and returns its path.
    pub async fn create(&self, actor: &Actor) -> kube::Result<String> {
        self.create_in(&actor.cluster).await
    }

    /// Sends the request as a dry run, which creates nothing.
    pub async fn try_dry_run(&self, actor: &Actor) -> kube::Result<String> {
        self.send(&actor.cluster, "?dryRun=All").await
    }

    /// Creates the request with the account of this cluster view.
    pub async fn create_in(&self, cluster: &Cluster) -> kube::Result<String> {
        self.send(cluster, "").await
    }

    async fn send(&self, cluster: &Cluster, query: &str) -> kube::Result<String> {
        let mut params = CertificateParams::default();
        (params.distinguished_name, params.subject_alt_names) = (self.subject.clone(), self.names.clone());
        params.custom_extensions.clone_from(&self.extensions);
        let key = KeyPair::generate_for(self.algorithm).expect("a key");
        let csr = params.serialize_request(&key).expect("a CSR").pem().expect("PEM");
        let mut object = self.object.clone();
        object["spec"]["request"] = json!(BASE64_STANDARD.encode(csr));
        let requests = format!("/apis/cert-manager.io/v1/namespaces/{}/certificaterequests", self.namespace);
        let made = cluster.try_create(&format!("{requests}{query}"), &object).await?;
        Ok(format!("{requests}/{}", name_of(&made)))
    }

    /// The API server's error when it rejects the request.
    pub async fn refused(&self, actor: &Actor) -> String {
        self.refused_in(&actor.cluster).await
    }

    pub async fn refused_in(&self, cluster: &Cluster) -> String {
        match self.create_in(cluster).await {
            Err(kube::Error::Api(status)) if status.code == 403 => status.message.clone(),
            other => panic!("{} was not rejected: {other:?}", self.object),
        }
    }
}

pub fn uri(id: &str) -> SanType {
    SanType::URI(id.try_into().expect("a URI"))
}

pub fn dns(name: &str) -> SanType {
    SanType::DnsName(name.try_into().expect("a name"))
}

/// The condition of this type, if its status is true.
pub fn condition<'a>(request: &'a Value, kind: &str) -> Option<&'a Value> {
    request["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == kind && c["status"] == "True")
}

/// Waits until the approver denies the request; returns reason and message. Asserts that no certificate was signed.
pub async fn denied(cluster: &Cluster, path: &str) -> (String, String) {
    eventually("a denial", PATIENCE, async || {
        let request = cluster.get(path).await;
        assert!(condition(&request, "Approved").is_none() && request["status"]["certificate"].is_null(), "{}", request["status"]);
        let denied = condition(&request, "Denied").ok_or_else(|| format!("{path}: {}", request["status"]))?;
        let text = |field: &str| denied[field].as_str().unwrap_or_default().to_owned();
        Ok((text("reason"), text("message")))
    })
    .await
}

/// Waits for the certificate.
pub async fn issued(cluster: &Cluster, path: &str) -> Value {
    eventually("a certificate", PATIENCE, async || {
        let request = cluster.get(path).await;
        if request["status"]["certificate"].is_string() { Ok(request) } else { Err(format!("{path}: {}", request["status"])) }
    })
    .await
}
