//! Paths of the other programs. If one is missing, the test that needs it fails and the message says how to get it.

use std::{env, path::PathBuf};

use crate::paths;

/// The proxy.
pub fn envoy() -> PathBuf {
    fetched("ENVOY", "envoy/envoy/_bin/envoy")
}

/// The oldest release of the proxy that is supported.
pub fn oldest_envoy() -> PathBuf {
    fetched("OLDEST_ENVOY", "envoy-oldest/envoy/_bin/envoy")
}

/// The gRPC client.
pub fn grpcurl() -> PathBuf {
    fetched("GRPCURL", "grpcurl")
}

/// API server and cert-manager.
pub fn controlplane() -> PathBuf {
    fetched("CONTROLPLANE", "controlplane")
}

/// The API server of the oldest Kubernetes that is supported.
pub fn oldest_apiserver() -> PathBuf {
    fetched("OLDEST_APISERVER", "kube-apiserver-oldest")
}

/// The previous version of the agent.
pub fn former() -> PathBuf {
    fetched("FORMER", "former/sds-agent")
}

/// The repository at that version.
pub fn former_source() -> PathBuf {
    former().with_file_name("source")
}

/// Vault's PKI engine and Kubernetes auth method.
pub fn vault() -> PathBuf {
    fetched("VAULT", "vault")
}

/// trust-manager's Bundle controller.
pub fn trust_manager() -> PathBuf {
    fetched("TRUSTMANAGER", "trustmanager/trustmanager")
}

/// The CRD from the module of that controller.
pub fn trust_manager_crd() -> PathBuf {
    trust_manager().with_file_name("bundles.yaml")
}

/// The metrics server.
pub fn prometheus() -> PathBuf {
    fetched("PROMETHEUS", "prometheus/usr/bin/prometheus")
}

/// Its tool for rules and metrics.
pub fn promtool() -> PathBuf {
    fetched("PROMTOOL", "prometheus/usr/bin/promtool")
}

/// The directory with kubelet, containerd and runc.
pub fn node() -> PathBuf {
    let kubelet = fetched("KUBELET", "node/kubelet");
    kubelet.parent().expect("a program lies in a folder").to_owned()
}

/// Renders the chart.
pub fn helm() -> PathBuf {
    fetched("HELM", "render/helm")
}

/// Renders the kustomizations.
pub fn kustomize() -> PathBuf {
    fetched("KUSTOMIZE", "render/kustomize")
}

/// The system call tracer.
pub fn strace() -> PathBuf {
    system("strace", "strace")
}

/// The TLS client.
pub fn openssl() -> PathBuf {
    system("openssl", "openssl")
}

/// Starts a program as another user.
pub fn setpriv() -> PathBuf {
    system("setpriv", "util-linux")
}

/// Starts a program with other limits.
pub fn prlimit() -> PathBuf {
    system("prlimit", "util-linux")
}

fn fetched(variable: &str, path: &str) -> PathBuf {
    if let Some(program) = env::var_os(variable) {
        let program = PathBuf::from(program);
        assert!(program.is_file(), "{variable}={} is no program", program.display());
        return program;
    }
    let folder = env::var_os("SDS_AGENT_TOOLS").map_or_else(|| paths::root().join("target/tools"), PathBuf::from);
    let program = folder.join(path);
    assert!(program.is_file(), "{} is missing: run `make test-tools`, or set {variable} to one of your own", program.display());
    program
}

/// Any program of the system.
pub fn system(program: &str, package: &str) -> PathBuf {
    let path = env::var_os("PATH").expect("PATH is set");
    env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| panic!("{program} is not on PATH: apt-get install {package}"))
}
