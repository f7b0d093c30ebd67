//! Parses YAML text and the environment into a [`Config`], or returns all errors.
//!
//! Owns the fields of the file, their defaults and the rules between them. [`super::reference`] describes each field, and a test compares
//! the two. The sections about certificates and issuers are in [`super::certificates`], those about roots in
//! [`super::trust`].

#[cfg(test)]
use std::collections::BTreeSet;
use std::{
    collections::BTreeMap,
    io,
    net::{Ipv6Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use agent_runtime::{file, text};
use serde_json::Value;
use workload_identity::{IssuerName, TrustDomain};

use super::{
    Attestation, AttestationPolicy, Config, IssuerConfig, Limits, LockMemory, Names, RequestRate, approver, certificates,
    environment::{self, Env},
    error::{Errors, FieldError, Problem, Warning},
    reader::{Report, Section},
    sockets, trust, values, warm_up,
};
use crate::{admin::MountHelper, process::confinement::Policy};

/// Maximum size of the configuration file, 1 MiB.
pub const MAX_FILE_BYTES: usize = 1 << 20;
/// Maximum backoff of an Envoy that reconnects. It keeps its secrets meanwhile.
const ENVOY_RECONNECT: Duration = Duration::from_secs(30);
const DAY: Duration = Duration::from_secs(86_400);

/// A valid configuration and its warnings.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// In the order of the file.
    pub warnings: Vec<Warning>,
}

impl Config {
    /// Reads the file at `path` and the environment.
    pub fn load(path: &Path, env: Env<'_>) -> Result<Loaded, Errors> {
        let content = file::read(path, MAX_FILE_BYTES);
        Self::of_content(path, content.as_deref(), env)
    }

    /// Parses the content of the file at `path`, of which the caller reads at most one byte more than [`MAX_FILE_BYTES`].
    pub fn of_content(path: &Path, content: Result<&[u8], &io::Error>, env: Env<'_>) -> Result<Loaded, Errors> {
        let unreadable = |what: String| {
            let (path, remedy) = (path.display().to_string(), "name a readable YAML file with --config".to_owned());
            Errors(vec![Problem { path, value: None, what, remedy }])
        };
        let bytes = content.map_err(|error| unreadable(format!("cannot be read: {error}")))?;
        if bytes.len() > MAX_FILE_BYTES {
            return Err(unreadable(format!("is larger than {MAX_FILE_BYTES} bytes")));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| unreadable("is not UTF-8 text".to_owned()))?;
        Self::parse(text, env)
    }

    /// Parses YAML text and the environment.
    pub fn parse(text: &str, env: Env<'_>) -> Result<Loaded, Errors> {
        let tree = tree(text)?;
        let report = Report::default();
        let config = report.root(&tree, |root| decode(root, &report, env));
        let (problems, warnings) = report.finish();
        match config {
            Some(config) if problems.is_empty() => Ok(Loaded { config, warnings }),
            _ => Err(Errors(problems)),
        }
    }
}

fn tree(text: &str) -> Result<Value, Errors> {
    // `0666` is a file mode and `yes` may be a name: YAML must not turn them into a number or a boolean.
    let options = serde_saphyr::options! { leading_zero_numbers_as_strings: true, strict_booleans: true };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        // The message must not show the lines around the error, and its excerpt must not contain a key.
        let message = error.without_snippet().render_with_formatter(&serde_saphyr::UserMessageFormatter);
        let message = text::excerpt(&message, text::MAX_MESSAGE_CHARS);
        let (path, what) = match error.location() {
            Some(at) => {
                let suffix = format!(" at line {}, column {}", at.line(), at.column());
                let what = message.strip_suffix(&suffix).unwrap_or(&message).to_owned();
                (format!("line {}, column {}", at.line(), at.column()), what)
            }
            None => ("the file".to_owned(), message),
        };
        Errors(vec![Problem { path, value: None, what, remedy: "correct the YAML there".to_owned() }])
    })
}

/// Decodes the whole file. All sections are decoded before the first `?`, so that all errors are found.
pub(super) fn decode(root: &Section<'_>, report: &Report, env: Env<'_>) -> Option<Config> {
    let trust_domain = root.read("trustDomain", "cluster.local".into(), |v| values::text(v).map(str::to_owned));
    let trust_domain = trust_domain.and_then(|name| domain(root, &name));
    let attestation = root.read(
        "attestation",
        Attestation::Kubernetes,
        values::choice(&[("kubernetes", Attestation::Kubernetes), ("unix", Attestation::Unix)]),
    );
    let attestation_policy = root.section("attestationPolicy", policy);
    let sockets = root.section("sockets", |section| sockets::decode(section, attestation));
    if attestation_policy.as_ref().is_some_and(|told| *told != AttestationPolicy::default()) {
        if attestation == Some(Attestation::Unix) {
            root.wrong("attestationPolicy", "is about pods, which `attestation: unix` does not know", "remove it");
        } else if matches!(sockets, Some((None, _))) {
            root.warn(
                "attestationPolicy",
                "applies to callers of sockets.shared, which is not enabled: every process that can open a pod's own socket may fetch",
            );
        }
    }
    let shared = sockets.as_ref().map(|(shared, _)| shared.as_ref());
    let warm_up = root.section("warmUp", |section| warm_up::decode(section, attestation, shared));
    let pod = environment::pod(report, attestation, env);
    let context = certificates::Context { attestation, trust_domain: trust_domain.as_ref(), pod: pod.as_ref() };
    let issuance = certificates::decode(root, &context);
    let trust_sources = root.section("trust", |section| trust::decode(section, trust_domain.as_ref()));
    let names = root.section("names", names);
    let lock_memory = root.section("keys", |keys| {
        let names = [("auto", LockMemory::Auto), ("always", LockMemory::Always), ("never", LockMemory::Never)];
        keys.read("lockMemory", LockMemory::Auto, values::choice(&names))
    });
    let policies = [("auto", Policy::Auto), ("always", Policy::Always), ("never", Policy::Never)];
    let confinement = root.read("confinement", Policy::Auto, values::choice(&policies));
    let limits = root.section("limits", limits);
    let kubernetes = root.section("kubernetes", request_rate);
    let events = root.read("events", true, values::boolean);
    let retention = root.read("retention", Duration::from_secs(300), values::duration(Duration::ZERO..=DAY));
    let reissue_over = root.read("reissueOver", Duration::from_secs(600), values::duration(Duration::ZERO..=7 * DAY));
    let drain = root.read("drain", Duration::from_secs(10), values::duration(Duration::ZERO..=Duration::from_secs(600)));
    let addresses = addresses(root);
    let approver = root.section("approver", |section| approver::decode(section, pod.as_ref()));
    let worker_threads = root.read("workerThreads", 2, values::integer(1..=512));

    if retention.is_some_and(|time| time < ENVOY_RECONNECT) {
        root.warn("retention", "an Envoy that reconnects takes up to 30s, and then needs a new certificate; use 1m or more");
    }
    let (trust_sources, federated) = (trust_sources.0?, trust_sources.1?);
    let certificates::Issuance { default_profile, rules, issuers } = issuance?;
    if trust_sources.is_empty() {
        warn_of_roots(report, &issuers);
    }
    let HttpAddresses { admin, metrics, metrics_per_workload, probes, mount_helper } = addresses?;
    let (shared_socket, per_pod) = sockets?;
    Some(Config {
        trust_domain: trust_domain?,
        shared_socket,
        per_pod,
        attestation: attestation?,
        attestation_policy: attestation_policy?,
        warm_up: warm_up?,
        default_profile,
        profiles: rules,
        issuers,
        trust_sources,
        federated,
        names: names?,
        lock_memory: lock_memory?,
        confinement: confinement?,
        limits: limits?,
        kubernetes: kubernetes?,
        reissue_over: reissue_over?,
        events: events?,
        retention: retention?,
        drain: drain?,
        admin,
        metrics,
        metrics_per_workload,
        probes,
        mount_helper,
        worker_threads: usize::try_from(worker_threads?).ok()?,
        approver: approver?,
        node: pod?.node,
    })
}

/// Without trust sources, only the issuers can provide roots.
fn warn_of_roots(report: &Report, issuers: &BTreeMap<IssuerName, IssuerConfig>) {
    let rootless: Vec<&str> = issuers.iter().filter(|(_, issuer)| certificates::tells_no_roots(issuer)).map(|(name, _)| &*name.0).collect();
    match rootless.len() {
        0 => {}
        all if all == issuers.len() => report.warn(
            "trust.sources",
            "is empty: requests for the bundle (ROOTCA) are not answered and certificates are not verified against roots; \
             name the ConfigMap or file that holds the roots",
        ),
        _ => {
            let names = rootless.join(", ");
            let message = format!(
                "is empty, and these issuers provide no roots: {names}; their certificates do not chain to a root of the bundle and are \
                 not served; name the ConfigMap or file that holds the roots of all issuers"
            );
            report.warn("trust.sources", message);
        }
    }
}

fn domain(section: &Section<'_>, name: &str) -> Option<TrustDomain> {
    let told = TrustDomain::new(name);
    if told.is_err() {
        let remedy = match name.strip_prefix("spiffe://") {
            Some(rest) => format!("leave spiffe:// out: {}", rest.trim_end_matches('/')),
            None => "use 1 to 255 lower-case letters, digits, '.', '-' or '_'".to_owned(),
        };
        section.wrong("trustDomain", "is not a trust domain", remedy);
    }
    told.ok()
}

fn policy(policy: &Section<'_>) -> Option<AttestationPolicy> {
    let containers = policy.list("containers", |v| values::container(v).map(Into::into));
    let uids = policy.list("uids", |v| values::integer(0..=u64::from(u32::MAX - 1))(v).map(|uid| u32::try_from(uid).unwrap_or(u32::MAX)));
    Some(AttestationPolicy { containers: containers?, uids: uids? })
}

fn names(names: &Section<'_>) -> Option<Names> {
    let default = Names::default();
    let well_known = |v: &Value| {
        let name = values::text(v)?;
        match name {
            "ALL" => Err(FieldError::new("is the name for every bundle at once", "choose another name")),
            _ if name.starts_with("spiffe://") => {
                Err(FieldError::new("is a SPIFFE ID, which already names its own secret", "choose another name"))
            }
            _ if name.len() > 256 => Err(FieldError::new("is longer than 256 bytes", "choose a shorter name")),
            _ => Ok(name.to_owned()),
        }
    };
    let certificate = names.read("certificate", default.certificate, well_known);
    let bundle = names.read("bundle", default.bundle, well_known);
    if certificate.is_some() && certificate == bundle {
        names.wrong("bundle", "is the name of the certificate too", "give names.certificate and names.bundle different names");
    }
    Some(Names { certificate: certificate?, bundle: bundle? })
}

fn limits(limits: &Section<'_>) -> Option<Limits> {
    let default = Limits::default();
    let size = |field, default: usize, range| {
        limits.read(field, default, |v| values::integer(range)(v).map(|n| usize::try_from(n).unwrap_or(usize::MAX)))
    };
    let connections = size("connections", default.connections, 1..=1_000_000);
    let connections_per_pod = size("connectionsPerPod", default.connections_per_pod, 1..=1_000_000);
    let streams = size("streams", default.streams, 1..=10_000_000);
    let streams_per_pod = size("streamsPerPod", default.streams_per_pod, 1..=10_000_000);
    let message_bytes = size("messageBytes", default.message_bytes, (64 << 10)..=(16 << 20));
    let names_per_stream = size("namesPerStream", default.names_per_stream, 1..=10_000);
    let memory_bytes = size("memoryBytes", default.memory_bytes, (8 << 20)..=(1 << 40));
    let memory_bytes_per_pod = size("memoryBytesPerPod", default.memory_bytes_per_pod, (1 << 20)..=(1 << 40));
    let count = |field, default: u32, range| {
        limits.read(field, default, |v| values::integer(range)(v).map(|n| u32::try_from(n).unwrap_or(u32::MAX)))
    };
    let streams_per_connection = count("streamsPerConnection", default.streams_per_connection, 1..=10_000);
    let rate = count("newConnectionsPerSecondPerPod", default.new_connections_per_second_per_pod, 1..=1_000_000);
    let burst = count("newConnectionsBurstPerPod", default.new_connections_burst_per_pod, 1..=1_000_000);
    let idle = limits.read("idle", default.idle, values::duration(Duration::from_secs(10)..=30 * DAY));
    Some(Limits {
        connections: connections?,
        connections_per_pod: connections_per_pod?,
        streams: streams?,
        streams_per_pod: streams_per_pod?,
        streams_per_connection: streams_per_connection?,
        new_connections_per_second_per_pod: rate?,
        new_connections_burst_per_pod: burst?,
        message_bytes: message_bytes?,
        names_per_stream: names_per_stream?,
        memory_bytes: memory_bytes?,
        memory_bytes_per_pod: memory_bytes_per_pod?,
        idle: idle?,
    })
}

fn request_rate(kubernetes: &Section<'_>) -> Option<RequestRate> {
    let default = RequestRate::default();
    let count = |field, default: u32| {
        kubernetes.read(field, default, |v| values::integer(1..=10_000)(v).map(|n| u32::try_from(n).unwrap_or(u32::MAX)))
    };
    let per_second = count("requestsPerSecond", default.per_second);
    let burst = count("burst", default.burst);
    Some(RequestRate { per_second: per_second?, burst: burst? })
}

/// The addresses of agent and mount helper, which share the network of their pod.
struct HttpAddresses {
    admin: SocketAddr,
    metrics: SocketAddr,
    metrics_per_workload: bool,
    probes: SocketAddr,
    mount_helper: MountHelper,
}

/// `admin.address`, `metrics.address` with `metrics.perWorkload`, `probes.address` and `mountHelper`.
fn addresses(root: &Section<'_>) -> Option<HttpAddresses> {
    // The value of `field` if none of `others` has its port. The default listens on every address of the pod.
    let own = |section: &Section<'_>, field: &'static str, port: u16, others: &[(&str, Option<SocketAddr>)]| {
        let address = section.read(field, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), values::socket_address)?;
        match others.iter().find(|(_, other)| other.is_some_and(|other| overlap(address, other))) {
            Some((other, _)) => {
                section.wrong(field, format!("uses the port of {other}"), "give it a port of its own");
                None
            }
            None => Some(address),
        }
    };
    let admin = root.section("admin", |admin| {
        let address = admin.read("address", SocketAddr::from(([127, 0, 0, 1], 15090)), values::socket_address);
        if address.is_some_and(|address| !address.ip().is_loopback()) {
            let what = "is not a loopback address, and every client that reaches it could reissue certificates";
            admin.wrong("address", what, "use 127.0.0.1 or [::1]; Prometheus uses metrics.address, and the kubelet probes.address");
            return None;
        }
        address
    });
    let metrics = root.section("metrics", |metrics| {
        let address = own(metrics, "address", 15091, &[("admin.address", admin)]);
        let per_workload = metrics.read("perWorkload", false, values::boolean);
        address.zip(per_workload)
    });
    let mut others = vec![("admin.address", admin), ("metrics.address", metrics.map(|(address, _)| address))];
    let probes = root.section("probes", |probes| own(probes, "address", 15092, &others));
    others.push(("probes.address", probes));
    let mount_helper = root.section("mountHelper", |helper| {
        let metrics = own(helper, "metricsAddress", 15093, &others);
        others.push(("mountHelper.metricsAddress", metrics));
        let probes = own(helper, "probesAddress", 15094, &others);
        Some(MountHelper { metrics: metrics?, probes: probes? })
    });
    let (metrics, metrics_per_workload) = metrics?;
    Some(HttpAddresses { admin: admin?, metrics, metrics_per_workload, probes: probes?, mount_helper: mount_helper? })
}

/// Whether two listeners cannot be open at the same time. The kernel chooses a free port for port 0.
fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let is_same_port = one.port() != 0 && one.port() == other.port();
    is_same_port && (one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified())
}

/// Every field that the parser knows, collected with files that reach all sections.
#[cfg(test)]
pub(super) fn known_fields() -> BTreeSet<String> {
    let files = [
        "{ trust: { sources: [ { configMap: {}, clusterTrustBundle: { labelSelector: { matchExpressions: [ {} ] } } } ] } }",
        "{ trust: { federated: { a.b: { configMap: {}, clusterTrustBundle: { labelSelector: { matchExpressions: [ {} ] } } } } } }",
        "{ issuer: { certManager: {}, embedded: {} } }",
        "{ profiles: [ { match: {}, identity: {}, issuerRef: { name: a }, certificate: {} } ] }",
    ];
    let env = |name: &str| (name == "NODE_NAME").then(|| "n1".to_owned());
    let walked = files.into_iter().flat_map(|text| {
        let (report, tree) = (Report::default(), tree(text).unwrap_or_default());
        report.root(&tree, |root| decode(root, &report, &env));
        report.known()
    });
    walked.collect()
}

#[cfg(test)]
mod tests;
