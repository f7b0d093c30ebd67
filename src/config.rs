//! The configuration: one YAML file, the environment, and the command line, read once into these types.
//!
//! Only this module reads the environment. All errors are reported together; each names the field, its value and the fix.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use agent_kube::RequestRate;
use attest_kubernetes::attestor::AttestationPolicy;
use issuance::issuer::certificate_request;
use sds_server::{limits::Limits, sds::names::Names};
use workload_identity::{IssuerName, NodeEnvironment, Profile, Resolver, Rule, TrustDomain};

use crate::{
    admin,
    per_pod::PerPod,
    process::{LockMemory, confinement::Policy},
    warm::WarmUp,
};

mod approver;
mod certificates;
mod dev;
mod environment;
mod error;
pub mod live;
mod parse;
mod reader;
pub mod reference;
pub mod reloads;
mod sockets;
mod template;
mod trust;
mod values;
mod warm_up;

pub use approver::Approver;
pub use certificates::renewals_per_second;
pub use dev::{Dev, dev, dev_socket};
pub use environment::{Env, process as process_environment};
pub use error::{Errors, Problem, Warning};
pub use parse::{Loaded, MAX_FILE_BYTES};
pub use template::sample as sample_workload;
pub use trust::{BundleSelection, InlinePem, TrustSource};
pub(crate) use values::{is_dns_label, is_dns_name};

/// The whole configuration of the agent.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `trustDomain`
    pub trust_domain: TrustDomain,
    /// `sockets.shared`; `None` if it is disabled.
    pub shared_socket: Option<SharedSocket>,
    /// `sockets.perPod`; `None` if it is disabled.
    pub per_pod: Option<PerPod>,
    /// `attestation`
    pub attestation: Attestation,
    /// `attestationPolicy`
    pub attestation_policy: AttestationPolicy,
    /// `warmUp`; `None` if it is disabled.
    pub warm_up: Option<WarmUp>,
    /// `identity`, `certificate` and `issuer` together: the profile of every workload that no other profile matches.
    pub default_profile: Arc<Profile>,
    /// `profiles`: the first that matches takes precedence over the default profile.
    pub profiles: Vec<Rule>,
    /// `issuer` and the issuers of profiles, each once, under the name that profiles use.
    pub issuers: BTreeMap<IssuerName, IssuerConfig>,
    /// `trust.sources`
    pub trust_sources: Vec<TrustSource>,
    /// `trust.federated`: other trust domains' bundles.
    pub federated: BTreeMap<TrustDomain, TrustSource>,
    /// `names`
    pub names: Names,
    /// `confinement`
    pub confinement: Policy,
    /// `keys.lockMemory`
    pub lock_memory: LockMemory,
    /// `limits`
    pub limits: Limits,
    /// `kubernetes`: rate limit for requests to the API server.
    pub kubernetes: RequestRate,
    /// `reissueOver`: the time over which certificates are replaced that a change of the configuration makes outdated.
    pub reissue_over: Duration,
    /// `events`: whether Kubernetes Events report problems with the certificates of pods.
    pub events: bool,
    /// `retention`: how long a certificate is kept after its last subscriber has ended.
    pub retention: Duration,
    /// `drain`: how long open streams may take to end at shutdown.
    pub drain: Duration,
    /// `admin.address`: loopback only.
    pub admin: SocketAddr,
    /// `metrics.address`
    pub metrics: SocketAddr,
    /// `probes.address`
    pub probes: SocketAddr,
    /// `mountHelper`
    pub mount_helper: admin::MountHelper,
    /// `metrics.perWorkload`: whether each service account has its own series.
    pub metrics_per_workload: bool,
    /// `workerThreads`
    pub worker_threads: usize,
    /// `approver`; agents do not use it.
    pub approver: Approver,
    /// The environment of a pod: `NODE_NAME`, `POD_NAMESPACE`, `POD_NAME`, `POD_UID`.
    pub node: NodeEnvironment,
}

impl Config {
    /// The addresses of the HTTP listeners.
    pub fn http_addresses(&self) -> admin::Addresses {
        admin::Addresses { admin: self.admin, metrics: self.metrics, probes: self.probes }
    }

    /// The rules that map workloads to identities.
    pub fn resolver(&self) -> Resolver {
        let (trust_domain, default_profile) = (self.trust_domain.clone(), self.default_profile.clone());
        Resolver { trust_domain, rules: self.profiles.as_slice().into(), default_profile }
    }
}

/// The socket that every pod of the node may call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedSocket {
    /// The path of the socket, at most 100 bytes: the agent first binds a longer temporary name in the same directory.
    pub path: PathBuf,
    /// Its permission bits.
    pub mode: u32,
    /// `acceptPidReuse`: serve the socket even if the kernel gives no pidfd of a caller.
    pub accept_pid_reuse: bool,
}

/// How callers on the shared socket are identified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attestation {
    /// By the process, its cgroup and its pod.
    Kubernetes,
    /// By the user id.
    Unix,
}

/// One issuer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IssuerConfig {
    /// cert-manager's CertificateRequests.
    CertManager(certificate_request::Settings),
    /// A certificate authority in memory, for development and tests only.
    Embedded,
}
