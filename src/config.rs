//! The configuration: one YAML file, the environment, and the command line, read once into these types.
//!
//! The only reader of the environment. Every error is reported at once, each naming the field, its value and the way out.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use crate::identity::{IssuerName, PodRef, Profile, Resolver, Rule, TrustDomain};

mod approver;
mod dev;
mod environment;
mod error;
mod issuance;
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
pub use dev::{Dev, dev, dev_socket};
pub use environment::{Env, process as process_environment};
pub use error::{Errors, Problem, Warning};
pub use issuance::renewals_per_second;
pub use parse::{Loaded, MAX_FILE_BYTES};
pub use template::sample as sample_workload;
pub use warm_up::WarmUp;

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

/// What the downward API tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeEnvironment {
    /// `NODE_NAME`: whose pods are served.
    pub node_name: Option<Arc<str>>,
    /// The agent's own pod, which owns its requests.
    pub pod: Option<PodRef>,
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

/// One socket for each pod, handed out as a CSI driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PerPod {
    /// `directory`: where they are, each in a directory of its own.
    pub directory: PathBuf,
    /// `driverName`: what pods' volumes name.
    pub driver_name: String,
    /// `kubeletDirectory`: the kubelet's own, at the same path here as there.
    pub kubelet_directory: PathBuf,
    /// `waitForCertificate`: how long a pod's start may wait for its certificate.
    pub wait_for_certificate: Duration,
}

impl PerPod {
    /// Where the kubelet calls the driver.
    pub fn driver_socket(&self) -> PathBuf {
        self.kubelet_directory.join("plugins").join(&self.driver_name).join("csi.sock")
    }

    /// Where the kubelet learns of the driver.
    pub fn registration_socket(&self) -> PathBuf {
        self.kubelet_directory.join("plugins_registry").join(format!("{}-reg.sock", self.driver_name))
    }
}

/// How callers are known on the shared socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attestation {
    /// Peer, cgroup, pod.
    Kubernetes,
    /// User id.
    Unix,
}

/// Who of a pod may fetch on the shared socket: everybody, unless told otherwise. Both lists have to let a caller through.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AttestationPolicy {
    /// `containers`: by name; empty for all.
    pub containers: Vec<Arc<str>>,
    /// `uids`: user ids as the node sees them; empty for all.
    pub uids: Vec<u32>,
}

/// One upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IssuerConfig {
    /// cert-manager's CertificateRequests.
    CertManager(CertManager),
    /// An authority in memory; for development and tests only.
    Embedded,
}

/// `issuer.certManager`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertManager {
    /// `issuerRef`
    pub issuer_ref: IssuerRef,
    /// Where the requests are created.
    pub namespace: RequestNamespace,
    /// `trustStatusCA`: take `status.ca` of issued requests as a trust bundle source. Off unless said.
    pub trust_status_ca: bool,
}

/// cert-manager's reference to an issuer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct IssuerRef {
    /// `name`
    pub name: String,
    /// `kind`
    pub kind: String,
    /// `group`
    pub group: String,
}

/// Where CertificateRequests go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RequestNamespace {
    /// One namespace, the agents' own by default.
    Fixed(String),
    /// `workload`: each into the namespace of its pod.
    Workload,
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

/// The well-known resource names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// The workload's own certificate: `default`.
    pub certificate: String,
    /// The bundle of the agent's trust domain: `ROOTCA`.
    pub bundle: String,
}

impl Default for Names {
    fn default() -> Self {
        Self { certificate: "default".into(), bundle: "ROOTCA".into() }
    }
}

/// When key memory is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMemory {
    /// Where it is allowed without a limit and there is swap.
    Auto,
    /// Or do not start.
    Always,
    /// Not at all.
    Never,
}

/// What one agent takes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections in all.
    pub connections: usize,
    /// Connections of one pod, or of one user outside of pods.
    pub connections_per_pod: usize,
    /// Streams and unary calls in all.
    pub streams: usize,
    /// Streams and unary calls at once of one pod.
    pub streams_per_pod: usize,
    /// Streams and unary calls at once on one connection.
    pub streams_per_connection: u32,
    /// How often one pod may connect, in the long run.
    pub new_connections_per_second_per_pod: u32,
    /// How often at once.
    pub new_connections_burst_per_pod: u32,
    /// Bytes in one request message.
    pub message_bytes: usize,
    /// Resource names on one stream.
    pub names_per_stream: usize,
    /// A connection without a call in progress is closed after this time.
    pub idle: Duration,
}

/// How fast one process asks the Kubernetes API, whatever for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestRate {
    /// `requestsPerSecond`, in the long run.
    pub per_second: u32,
    /// `burst`: how many at once.
    pub burst: u32,
}

impl Default for RequestRate {
    fn default() -> Self {
        Self { per_second: 20, burst: 40 }
    }
}

impl Limits {
    /// For a socket with one caller, who may have nearly all that there is: an eighth stays for others even so.
    pub fn undivided(self) -> Self {
        Self {
            connections_per_pod: self.connections,
            streams_per_pod: self.streams,
            new_connections_per_second_per_pod: 1_000_000,
            new_connections_burst_per_pod: 1_000_000,
            ..self
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            connections_per_pod: 256,
            streams: 65_536,
            streams_per_pod: 1024,
            streams_per_connection: 100,
            new_connections_per_second_per_pod: 50,
            new_connections_burst_per_pod: 200,
            message_bytes: 512 << 10,
            names_per_stream: 64,
            idle: Duration::from_secs(3600),
        }
    }
}
