//! A second private CA besides the control plane's, and a check which of the two a chain leads to.

use std::{fs, path::Path};

use serde_json::json;

use crate::{
    child,
    cluster::{Cluster, labels, name_of},
    scene::PATIENCE,
    tools,
};

const CERT_MANAGER: &str = "/apis/cert-manager.io/v1";

/// A second CA and a ClusterIssuer that uses it.
pub struct Second {
    pub issuer: String,
    pub root: String,
}

impl Second {
    pub async fn create(cluster: &Cluster) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(rcgen::DnType::CommonName, "the second authority");
        let root = params.self_signed(&key).unwrap().pem();
        let secret = json!({
            "metadata": {"generateName": "second-ca-", "labels": labels()},
            "type": "kubernetes.io/tls", "stringData": {"tls.crt": root, "tls.key": key.serialize_pem()},
        });
        let secret = name_of(&cluster.create("/api/v1/namespaces/cert-manager/secrets", &secret).await);
        let issuer = json!({
            "apiVersion": "cert-manager.io/v1", "kind": "ClusterIssuer",
            "metadata": {"generateName": "second-", "labels": labels()}, "spec": {"ca": {"secretName": secret}},
        });
        let issuer = name_of(&cluster.create(&format!("{CERT_MANAGER}/clusterissuers"), &issuer).await);
        Self { issuer, root }
    }

    /// Deletes the issuer. The caller must not use it afterwards.
    pub async fn remove(self, cluster: &Cluster) {
        cluster.delete(&format!("{CERT_MANAGER}/clusterissuers/{}", self.issuer)).await;
    }
}

/// Whether openssl verifies a chain with this root as the only trust anchor. Temporary files are written into `dir`.
pub async fn leads_to(dir: &Path, chain_pem: &str, root: &str) -> bool {
    let [chain, file] = ["chain.pem", "root.pem"].map(|name| dir.join(name));
    fs::write(&chain, chain_pem).unwrap();
    fs::write(&file, root).unwrap();
    let (chain, file) = (chain.to_str().unwrap(), file.to_str().unwrap());
    let arguments = ["verify", "-no-CApath", "-no-CAstore", "-CAfile", file, "-untrusted", chain, chain];
    child::run(&tools::openssl(), &arguments, PATIENCE).await.status.success()
}
