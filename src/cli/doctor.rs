//! `sds-agent doctor`: why a process or a pod gets its identity and its certificate, or none, step by step and with a remedy for each step
//! that fails.
//!
//! Every verdict is the agent's own: the same attestor, the same index, the same parser. Nothing is written anywhere. A check is a
//! function that returns [`report::Step`]s; they stand here in the order of the request path.

use std::{path::PathBuf, str::FromStr};

use clap::ValueEnum;

use self::{
    cluster::Cluster,
    report::{Report, Step},
};
use super::{Exit, output};
use crate::{
    attest::cgroup::Own,
    config::{Attestation, Config, Env, Loaded},
    peer::Peer,
};

mod cluster;
mod issuer;
mod process;
pub mod report;

/// The flags of `doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The agent's configuration: for its socket, its cluster and its templates
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Judge this process as if it had connected
    #[arg(long, value_name = "PID", conflicts_with = "pod", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
    /// Judge this pod, and one of its processes
    #[arg(long, value_name = "NS/NAME", requires = "config")]
    pub pod: Option<PodName>,
    /// How to print
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Text,
    /// One object: healthy, steps
    Json,
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
Run it where the agent runs, with its environment, so that it sees what the agent sees:
  kubectl exec -n sds-agent ds/sds-agent -- sds-agent doctor --config /etc/sds-agent/agent.yaml --pod shop/cart-0

Examples:
  sds-agent doctor --config agent.yaml                     the socket, the right to know the node's pods, and the issuer
  sds-agent doctor --config agent.yaml --pid 4711          which pod a process is in, and the identity it gets
  sds-agent doctor --config agent.yaml --pod shop/cart-0 -o json | jq '.steps[] | select(.result == \"failed\")'
  sds-agent doctor --pid 4711                              without a cluster: handle and cgroups only

The steps, in the order in which the agent takes them:
  socket, process, handle, own prefix, cgroups             what the node tells
  rights, pod, index, service account, profile             what the cluster tells; the last where there are profiles
  verdict                                                  what the agent would answer, and with which identity
  issuer, requests                                         who signs, and what it refused lately or keeps waiting

It reads only. Exit codes: 0 no step failed, 1 a step failed, 64 usage or configuration, 69 something is not reachable,
77 the caller, or the agent's account, may not; where several steps failed, the first one decides.";

/// Whom it is about.
enum Target {
    Nobody,
    Process(i32),
    Pod { namespace: String, name: String },
}

/// Looks and prints.
pub async fn run(args: Args, env: Env<'_>) -> Exit {
    let config = match args.config.as_deref().map(|path| Config::load(path, env)) {
        None => None,
        Some(Ok(Loaded { config, .. })) => Some(config),
        Some(Err(errors)) => {
            output::complain(format_args!("the configuration cannot be used:\n{errors}"));
            return Exit::Usage;
        }
    };
    let target = match (args.pid, args.pod) {
        (Some(pid), _) => Target::Process(pid),
        (None, Some(PodName { namespace, name })) => Target::Pod { namespace, name },
        (None, None) if config.is_some() => Target::Nobody,
        (None, None) => {
            output::complain(format_args!("nothing to look at: name --config, --pid or --pod"));
            return Exit::Usage;
        }
    };
    let mut steps = examine(config.as_ref(), target).await;
    if let Some(config) = &config {
        steps.extend(issuer::look(config).await);
    }
    let report = Report::new(steps);
    let text = if args.output == Format::Json { report.json() } else { report.text() };
    match output::say(&text) {
        Err(error) if report.healthy => output::unsaid(&error),
        _ => report.exit(),
    }
}

async fn examine(config: Option<&Config>, target: Target) -> Vec<Step> {
    let mut steps = Vec::new();
    steps.push(match config {
        Some(Config { shared_socket: Some(shared), .. }) => process::socket(shared),
        Some(_) => {
            Step::unknown("socket", "the shared socket is not enabled", Some("set sockets.shared.enabled, or look at the sockets of pods"))
        }
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
    steps.push(cluster.rights().await);
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

fn read_cgroups(pid: i32, own: &Own, steps: &mut Vec<Step>) -> Option<String> {
    let (step, uid) = process::cgroups(pid, own);
    steps.push(step);
    uid.map(|uid| uid.to_string())
}

async fn judge(config: &Config, attestor: Result<std::sync::Arc<dyn crate::attest::Attestor>, Step>, peer: &Peer) -> Step {
    match attestor {
        Ok(attestor) => cluster::verdict(config, &*attestor, peer).await,
        Err(step) => step,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cli::doctor::report::Outcome,
        config::{self, Dev},
    };

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
