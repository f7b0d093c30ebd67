//! The configuration: one YAML file, the environment, and the command line, read once into these types.
//!
//! The only reader of the environment. Every error is reported at once, each naming the field, its value and the way out.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use agent_kube::RequestRate;
use attest_kubernetes::attestor::AttestationPolicy;
use issuance::issuer::certificate_request;
use sds_server::{limits::Limits, sds::names::Names};
use workload_identity::{IssuerName, NodeEnvironment, Profile, Resolver, Rule, TrustDomain};

use crate::{csi::PerPod, process::LockMemory, warm::WarmUp};

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
mod values;
mod warm_up;

pub use approver::Approver;
pub use certificates::renewals_per_second;
pub use dev::{Dev, dev, dev_socket};
pub use environment::{Env, process as process_environment};
pub use error::{Errors, Problem, Warning};
pub use parse::{Loaded, MAX_FILE_BYTES};
pub use template::sample as sample_workload;

/// All that the agent is told.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `trustDomain`
    pub trust_domain: TrustDomain,
    /// `sockets.shared`, where it is enabled.
    pub shared_socket: Option<SharedSocket>,
    /// `sockets.perPod`, where it is enabled.
    pub per_pod: Option<PerPod>,
    /// `attestation`
    pub attestation: Attestation,
    /// `attestationPolicy`
    pub attestation_policy: AttestationPolicy,
    /// `warmUp`, where it is enabled.
    pub warm_up: Option<WarmUp>,
    /// `identity`, `certificate` and `issuer` together: the profile of every workload that no other takes.
    pub default_profile: Arc<Profile>,
    /// `profiles`: the first that matches goes before the default.
    pub profiles: Vec<Rule>,
    /// `issuer` and those of profiles, each once, by the names that profiles use.
    pub issuers: BTreeMap<IssuerName, IssuerConfig>,
    /// `trust.sources`
    pub trust_sources: Vec<TrustSource>,
    /// `trust.federated`: other trust domains' bundles.
    pub federated: BTreeMap<TrustDomain, TrustSource>,
    /// `names`
    pub names: Names,
    /// `keys.lockMemory`
    pub lock_memory: LockMemory,
    /// `limits`
    pub limits: Limits,
    /// `kubernetes`: how fast the API server is asked.
    pub kubernetes: RequestRate,
    /// `reissueOver`: the time over which certificates are issued anew that a change of the configuration makes foreign.
    pub reissue_over: Duration,
    /// `events`: whether pods are told of trouble with their certificates.
    pub events: bool,
    /// `retention`: how long a certificate is kept after its last subscriber has gone.
    pub retention: Duration,
    /// `drain`: how long open streams may take to end at shutdown.
    pub drain: Duration,
    /// `admin.address`: loopback only.
    pub admin: SocketAddr,
    /// `metrics.address`
    pub metrics: SocketAddr,
    /// `metrics.perWorkload`: whether each service account has series of its own.
    pub metrics_per_workload: bool,
    /// `workerThreads`
    pub worker_threads: usize,
    /// `approver`; agents have no use for it.
    pub approver: Approver,
    /// The environment of a pod: `NODE_NAME`, `POD_NAMESPACE`, `POD_NAME`, `POD_UID`.
    pub node: NodeEnvironment,
}

impl Config {
    /// The rules from workloads to identities.
    pub fn resolver(&self) -> Resolver {
        let (trust_domain, default_profile) = (self.trust_domain.clone(), self.default_profile.clone());
        Resolver { trust_domain, rules: self.profiles.as_slice().into(), default_profile }
    }
}

/// The socket that every pod of the node may call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedSocket {
    /// Where it is bound; at most 100 bytes, for the temporary name beside it.
    pub path: PathBuf,
    /// Its permission bits.
    pub mode: u32,
    /// `acceptPidReuse`: serve it even where the kernel gives no handle on a caller.
    pub accept_pid_reuse: bool,
}

/// How callers are known on the shared socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attestation {
    /// Peer, cgroup, pod.
    Kubernetes,
    /// User id.
    Unix,
}

/// One upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IssuerConfig {
    /// cert-manager's CertificateRequests.
    CertManager(certificate_request::Settings),
    /// An authority in memory; for development and tests only.
    Embedded,
}

/// Where a trust bundle comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrustSource {
    /// A key of a ConfigMap, as trust-manager writes it.
    ConfigMap {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// The key within.
        key: String,
    },
    /// A PEM file, watched.
    File {
        /// Its path.
        path: PathBuf,
    },
}
