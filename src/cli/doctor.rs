//! `sds-agent doctor`: diagnoses an agent, and shows step by step why a process or a pod gets an identity and a certificate, or none. Each
//! failed step has a remedy.
//!
//! The verdicts come from the agent's own attestor, index and parser. The command reads only. A check is a function that returns
//! [`report::Step`]s; the checks are in the order of the request path.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
};

use attest_kubernetes::cgroup::HostPrefix;
use unix_peer::peer::Peer;

use self::{
    cluster::Cluster,
    report::{Report, Step},
};
use super::{
    Exit,
    check_config::outside_of_a_pod,
    output::{self, Format},
};
use crate::config::{self, Attestation, Config, Env, IssuerConfig, Loaded, TrustSource};

mod agent;
mod authority;
mod cluster;
mod cluster_trust_bundles;
mod issuer;
mod mounts;
mod node;
mod process;
pub mod report;
mod rights;
mod server;

/// The flags of `doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Configuration of the agent, with its socket, cluster and templates
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Attest this process as if it had connected
    #[arg(long, value_name = "PID", conflicts_with = "pod", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
    /// Check this pod, and attest one of its processes
    #[arg(long, value_name = "NS/NAME", requires = "config")]
    pub pod: Option<PodName>,
    /// Check the other ways to the issuers' keys, with an administrator's access (KUBECONFIG)
    #[arg(long, requires = "config", conflicts_with_all = ["pid", "pod"])]
    pub authority: bool,
    /// Format of the output: json is one object with healthy, steps
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
}

/// `NS/NAME`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodName {
    namespace: String,
    name: String,
}

impl FromStr for PodName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_name =
            |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.');
        match text.split_once('/') {
            Some((namespace, name)) if is_name(namespace) && is_name(name) => Ok(Self { namespace: namespace.into(), name: name.into() }),
            _ => Err("write the namespace and the pod's name, such as shop/cart-5d89c7b6f4-x2v9k"),
        }
    }
}

const EXAMPLES: &str = "\
Run it where the agent runs and with its environment, so that it sees the same processes, mounts and cluster:
  kubectl exec -n sds-agent ds/sds-agent -- sds-agent doctor --config /etc/sds-agent/config.yaml

Examples:
  sds-agent doctor                                         check an agent of `sds-agent dev`, without a cluster
  sds-agent doctor --config config.yaml                    check the agent, its node, its permissions and its issuer
  sds-agent doctor --config config.yaml --pid 4711         show the pod of a process, and the identity that it gets
  sds-agent doctor --config config.yaml --pod shop/cart-0 -o json | jq '.steps[] | select(.result == \"failed\")'
  sds-agent doctor --pid 4711                              check only the process and its cgroups, without a cluster
  sds-agent doctor --config config.yaml --authority        on a workstation: check the other ways to the issuers' keys

The steps without --pid and --pod:
  socket, health, directory, mounts                        the socket, its server, and its mounts in workloads
  agent, readiness, open files, memory lock                the state that the agent reports
  kernel, host pids, own prefix                            the node
  api server, clock, rights                                the cluster, and each verb that the configuration needs
  trust bundles                                            whether the server has ClusterTrustBundles, if they are configured
  verdict                                                  the identity of this process
  issuer, requests, approver                               the issuer, and requests that were refused lately or wait

The steps about a process or a pod, in the order in which the agent takes them:
  socket, process, handle, own prefix, cgroups             from the node
  rights, pod, index, service account, profile             from the cluster; the last one if there are profiles
  verdict, issuer, requests, approver                      the agent's answer, with the identity

The steps of --authority:
  signer                                                   whether the policies accept cert-manager's account
and for each issuer of the configuration:
  other issuers, certificates                              what else uses its key, and Certificates that name it
  signing requests, secret                                 accounts that obtain a certificate or the key without the approver

Terms in these names:
  handle       the pidfd of the process, which the agent keeps to notice its end
  own prefix   the beginning of cgroup paths that the agent ignores: the cgroup of the node, if the node is a container
  index        the agent's list of the pods of its node

The result of a step is ok, warning (it works, but needs attention), failed, or unknown. The command reads only.

Exit codes: 0 no step failed, 1 a step failed, 64 usage or configuration, 69 something is not reachable, such as the API
server, 77 the caller or the agent's account has no permission; if several steps failed, the first one decides.";

/// The subject of the examination.
enum Target {
    Process(i32),
    Pod { namespace: String, name: String },
}

/// Runs the checks and prints the report.
pub async fn run(args: Args, env: Env<'_>) -> Exit {
    if let (true, Some(path)) = (args.authority, args.config.as_deref()) {
        return report(args.output, authority(path, env).await);
    }
    let is_asked_for = args.pid.is_some() || args.pod.is_some();
    let config = match args.config.as_deref().map(|path| Config::load(path, env)) {
        None if is_asked_for => None,
        // Without a configuration, a process or a pod, the command checks `sds-agent dev`.
        None => match config::dev(config::Dev::default(), env) {
            Ok(config) => Some(config),
            Err(errors) => {
                output::complain(format_args!("{errors}"));
                return Exit::Usage;
            }
        },
        Some(Ok(Loaded { config, .. })) => Some(config),
        Some(Err(errors)) => {
            output::complain(format_args!("the configuration cannot be used:\n{errors}"));
            return Exit::Usage;
        }
    };
    let target = match (args.pid, args.pod) {
        (Some(pid), _) => Some(Target::Process(pid)),
        (None, Some(PodName { namespace, name })) => Some(Target::Pod { namespace, name }),
        (None, None) => None,
    };
    let mut steps = match (target, &config) {
        (Some(target), config) => examine(config.as_ref(), target).await,
        (None, Some(config)) => survey(config).await,
        (None, None) => Vec::new(),
    };
    let is_unreachable = steps.iter().any(|step| step.name == "api server" && step.result == report::Outcome::Failed);
    if let Some(config) = config.as_ref().filter(|_| !is_unreachable) {
        steps.extend(issuer::look(config).await);
    }
    report(args.output, steps)
}

/// Prints the report.
fn report(format: Format, steps: Vec<Step>) -> Exit {
    let report = Report::new(steps);
    let text = if format == Format::Json { report.json() } else { report.text() };
    match output::say(&text) {
        Err(error) if report.healthy => output::unsaid(&error),
        _ => report.exit(),
    }
}

/// Checks the authorities of the configuration's issuers. The command may run outside of a pod.
async fn authority(path: &Path, env: Env<'_>) -> Vec<Step> {
    let config = match Config::load(path, &|name: &str| outside_of_a_pod(name, env)) {
        Ok(Loaded { config, .. }) => config,
        Err(errors) => {
            let detail = format!("the configuration cannot be used:\n{errors}");
            return vec![Step::failed("configuration", Exit::Usage, detail, "correct it; sds-agent check-config shows each problem")];
        }
    };
    let issuers: Vec<_> = config.issuers.values().filter_map(issuer::of_cert_manager).collect();
    match cluster::client(&config).await {
        Ok(client) => authority::look(&client, &issuers).await,
        Err(step) => vec![step],
    }
}

/// Checks the agent, its node and its cluster.
async fn survey(config: &Config) -> Vec<Step> {
    let mut steps = Vec::new();
    let by_pod = config.attestation == Attestation::Kubernetes;
    match &config.shared_socket {
        Some(shared) => {
            let (step, server) = process::socket(shared);
            steps.push(step);
            if server.is_some() {
                steps.push(agent::health(&shared.path).await);
            }
            steps.extend(mounts::look(&shared.path, by_pod && config.node.pod.is_some(), server));
        }
        None => steps.push(without_shared_socket()),
    }
    let (told, figures) = agent::admin(config).await;
    steps.extend(told);
    steps.extend([node::open_files(config, figures.files), node::memory_lock(config, figures.memory_locked), node::kernel(config)]);
    if !by_pod && !needs_cluster(config) {
        steps.push(myself(config, None).await);
        return steps;
    }
    let (prefix, own) = process::own(config.node.pod.as_ref().map(|pod| &*pod.uid));
    if by_pod && config.shared_socket.is_some() {
        steps.push(node::host_pids(own.as_ref()));
        steps.push(prefix);
    }
    let connected = match by_pod {
        true => Cluster::connect(config).await.map(|cluster| (cluster.client().clone(), Some(cluster))),
        false => cluster::client(config).await.map(|client| (client, None)),
    };
    let (client, cluster) = match connected {
        Ok(connected) => connected,
        Err(step) => {
            steps.push(step);
            return steps;
        }
    };
    let (server, clock) = server::look(&client).await;
    let answers = server.result == report::Outcome::Ok;
    steps.push(server);
    steps.extend(clock);
    if answers {
        steps.push(rights::look(&client, &rights::needs(config)).await);
        steps.extend(cluster_trust_bundles::look(&client, config).await);
        if config.shared_socket.is_some() {
            steps.push(myself(config, cluster.as_ref().map(|cluster| (cluster, own.as_ref()))).await);
        }
    }
    steps
}

fn needs_cluster(config: &Config) -> bool {
    config.issuers.values().any(|issuer| matches!(issuer, IssuerConfig::CertManager(_)))
        || config.trust_sources.iter().chain(config.federated.values()).any(TrustSource::is_in_cluster)
}

fn without_shared_socket() -> Step {
    Step::unknown("socket", "the shared socket is not enabled", Some("set sockets.shared.enabled, or check the sockets of pods"))
}

/// The verdict about this process.
async fn myself(config: &Config, cluster: Option<(&Cluster, Option<&HostPrefix>)>) -> Step {
    let name = "verdict";
    let peer = i32::try_from(std::process::id()).map_err(std::io::Error::other).and_then(Peer::of_process);
    let peer = match peer {
        Ok(peer) => peer,
        Err(error) => {
            return Step::unknown(name, format!("this process cannot open a pidfd of itself: {error}"), Some("see the step kernel"));
        }
    };
    match cluster {
        None => judge(config, cluster::attestor(config, None), &peer).await,
        Some((cluster, own)) => match own.map(|own| process::cgroups(peer.pid, own)) {
            Some((_, Some(_))) => judge(config, cluster.attestor(config), &peer).await,
            Some((step, None)) => {
                let detail = format!("this process is in no pod and cannot be attested\n{}", step.detail);
                Step::unknown(name, detail, Some("name a process with --pid, or a pod with --pod"))
            }
            None => Step::unknown(name, "the cgroup of this process is not known", Some("see the step own prefix")),
        },
    }
}

async fn examine(config: Option<&Config>, target: Target) -> Vec<Step> {
    let mut steps = Vec::new();
    steps.push(match config {
        Some(Config { shared_socket: Some(shared), .. }) => process::socket(shared).0,
        Some(_) => without_shared_socket(),
        None => Step::unknown("socket", "its path is not known", Some("name the agent's configuration with --config")),
    });
    let (prefix, own) = process::own(config.and_then(|config| config.node.pod.as_ref()).map(|pod| &*pod.uid));
    let by_pod = config.is_none_or(|config| config.attestation == Attestation::Kubernetes);
    let mut peer = None;
    let mut uid = None;
    if let Target::Process(pid) = target {
        let (found, handle) = process::process(pid);
        steps.extend(found);
        peer = handle;
        if by_pod && peer.is_some() {
            steps.push(prefix.clone());
            uid = own.as_ref().and_then(|own| read_cgroups(pid, own, &mut steps));
        }
    }
    let Some(config) = config else {
        steps.push(Step::unknown("verdict", "the cluster was not asked", Some("name the agent's configuration with --config")));
        return steps;
    };
    if !by_pod {
        if let Some(peer) = &peer {
            steps.push(judge(config, cluster::attestor(config, None), peer).await);
        }
        return steps;
    }
    let cluster = match Cluster::connect(config).await {
        Ok(cluster) => cluster,
        Err(step) => {
            steps.push(step);
            return steps;
        }
    };
    steps.push(rights::look(cluster.client(), &rights::needs(config)).await);
    if let Target::Pod { namespace, name } = &target {
        let (step, found) = cluster.named(namespace, name).await;
        steps.push(step);
        if let (Some(found), Some(own)) = (&found, &own) {
            steps.push(prefix);
            let pid = process::of_pod(found, own).into_iter().next();
            if let Some(pid) = pid {
                let (of_process, handle) = process::process(pid);
                steps.extend(of_process);
                peer = handle;
                read_cgroups(pid, own, &mut steps);
            }
        }
        uid = found;
    }
    if let Some(uid) = &uid {
        steps.extend(cluster.known(config, uid).await);
    }
    match (&peer, &uid, &target) {
        (Some(peer), _, _) => steps.push(judge(config, cluster.attestor(config), peer).await),
        (None, Some(_), target) => steps.push(cluster::without_process(config, target)),
        _ => {}
    }
    steps
}

fn read_cgroups(pid: i32, own: &HostPrefix, steps: &mut Vec<Step>) -> Option<String> {
    let (step, uid) = process::cgroups(pid, own);
    steps.push(step);
    uid.map(|uid| uid.to_string())
}

async fn judge(config: &Config, attestor: Result<std::sync::Arc<dyn sds_server::attest::Attestor>, Step>, peer: &Peer) -> Step {
    match attestor {
        Ok(attestor) => cluster::verdict(config, &*attestor, peer).await,
        Err(step) => step,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cli::doctor::report::Outcome, config::Dev};

    #[test]
    fn a_pod_is_named_with_its_namespace() {
        assert_eq!("shop/cart-0".parse(), Ok(PodName { namespace: "shop".into(), name: "cart-0".into() }));
        for wrong in ["cart-0", "/cart", "shop/", "shop/a/b", "shop/cart?x=y", ""] {
            assert!(wrong.parse::<PodName>().is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn by_user_id_no_cluster_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let flags = Dev { socket: Some(dir.path().join("sds.sock")), ..Dev::default() };
        let config = config::dev(flags, &|_| None).unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        let steps = examine(Some(&config), Target::Process(pid)).await;
        let names: Vec<_> = steps.iter().map(|step| (step.name, step.result)).collect();
        let (ok, failed) = (Outcome::Ok, Outcome::Failed);
        assert_eq!(names, [("socket", failed), ("process", ok), ("handle", ok), ("verdict", ok)]);
        assert!(steps[3].detail.contains("spiffe://example.org/uid/"), "{steps:?}");
        assert_eq!(Report::new(steps).exit(), Exit::Unavailable);
    }

    #[tokio::test]
    async fn without_a_configuration_the_node_is_still_looked_at() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let steps = examine(None, Target::Process(pid)).await;
        let names: Vec<_> = steps.iter().map(|step| step.name).collect();
        assert_eq!(names, ["socket", "process", "handle", "own prefix", "cgroups", "verdict"]);
        assert_eq!(steps[4].result, Outcome::Failed, "the tests run in no pod: {:?}", steps[4]);
    }
}
