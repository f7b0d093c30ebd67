//! The steps about the cluster: the pod, its entry in the index, and the verdict of the attestor.

use std::{sync::Arc, time::Duration};

use agent_kube::{Call, Cause, Failure, pod::Pod};
use attest_kubernetes::pods::Pods;
use k8s_openapi::api::core::v1::Pod as ApiPod;
use kube::{Api, Client, api::ListParams};
use sds_server::attest::{Attestor, Error, Reason};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};
use unix_peer::peer::Peer;
use workload_identity::{Resolver, Workload};

use super::{Target, report::Step};
use crate::{
    app,
    cli::Exit,
    config::{Attestation, Config},
};

/// Timeout for the index of pods, and for a verdict.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

const AS_THE_AGENT: &str = "run it in the agent's pod, or set KUBECONFIG and NODE_NAME as the agent has them";

/// A client of the API server.
pub(super) async fn client(config: &Config) -> Result<Client, Step> {
    let client = agent_kube::connect(&agent_kube::Metrics::default(), config.kubernetes).await;
    client.map_err(|error| Step::failed("cluster", Exit::Unavailable, error.to_string(), AS_THE_AGENT))
}

/// The cluster as the agent sees it.
pub(super) struct Cluster {
    client: Client,
    pods: Pods,
    node: String,
    /// The watch of the index ends when this is dropped.
    _running: DropGuard,
}

impl Cluster {
    /// Connects, and starts the watch of the node's pods.
    pub(super) async fn connect(config: &Config) -> Result<Self, Step> {
        let client = client(config).await?;
        let Some(node) = config.node.node_name.as_deref() else {
            return Err(Step::failed("cluster", Exit::Usage, "NODE_NAME is not set", AS_THE_AGENT));
        };
        let mut pods = Pods::new(client.clone(), node, agent_kube::Metrics::default());
        if let Some(per_pod) = &config.per_pod {
            pods = pods.with_picks_by(&per_pod.driver_name);
        }
        let (running, shutdown) = (pods.clone(), CancellationToken::new());
        let ended = shutdown.clone();
        tokio::spawn(async move { running.run(ended).await });
        Ok(Self { client, pods, node: node.to_owned(), _running: shutdown.drop_guard() })
    }

    /// The client, for further requests.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Looks up a pod by its name. Returns its UID if it is on this node.
    pub(super) async fn named(&self, namespace: &str, pod: &str) -> (Step, Option<String>) {
        let name = "pod";
        let call = Call { verb: "list", resource: "pods", name: None, namespace: Some(namespace) };
        let parameters = ListParams::default().fields(&format!("metadata.name={pod}"));
        let list = Api::<ApiPod>::namespaced(self.client.clone(), namespace).list(&parameters).await;
        let found = match list {
            Ok(list) => list.items.into_iter().next(),
            Err(error) => return (failed(name, &Failure::of(&error, &call)), None),
        };
        let Some(found) = found else {
            let remedy = format!("look for it: kubectl get pods -n {namespace}");
            return (Step::failed(name, Exit::Failed, format!("there is no pod {namespace}/{pod}"), remedy), None);
        };
        let uid = found.metadata.uid.unwrap_or_default();
        let node = found.spec.and_then(|spec| spec.node_name).unwrap_or_else(|| "no node yet".to_owned());
        let phase = found.status.and_then(|status| status.phase).unwrap_or_else(|| "Unknown".to_owned());
        let detail = format!("{namespace}/{pod}: UID {uid}, {phase}, on {node}");
        if node != self.node {
            let remedy = "ask the agent of that node; an agent serves the pods of its own node only";
            return (Step::failed(name, Exit::Failed, format!("{detail}; this is {}", self.node), remedy), None);
        }
        (Step::ok(name, detail), Some(uid))
    }

    /// Looks up a UID in the index of this node's pods: the pod, its phase, its service account and its profile.
    pub(super) async fn known(&self, config: &Config, uid: &str) -> Vec<Step> {
        let Ok(known) = timeout(ANSWER_TIMEOUT, self.pods.wait_for(uid)).await else {
            let remedy = "see the previous step; the index needs the verbs list and watch on pods";
            return vec![Step::failed("index", Exit::Unavailable, "the index of this node's pods did not become complete", remedy)];
        };
        match known {
            Err(error) => vec![refused("index", &error)],
            Ok(known) => {
                let pod = known.pod;
                let account = match &pod.service_account {
                    Some(account) => Step::ok("service account", format!("{}/{account}", pod.pod.namespace)),
                    None if pod.mirror => Step::failed(
                        "service account",
                        Exit::NotPermitted,
                        "it is a static pod, whose service account the API server does not confirm",
                        "run it as a DaemonSet if it needs an identity",
                    ),
                    None => Step::failed("service account", Exit::NotPermitted, "it has none", "set spec.serviceAccountName"),
                };
                let mut steps = vec![Step::ok("index", format!("pod {} of this node; it has not ended", pod.pod)), account];
                if pod.service_account.is_some() && !config.profiles.is_empty() {
                    steps.push(profile(&config.resolver(), &pod));
                }
                steps
            }
        }
    }

    pub(super) fn attestor(&self, config: &Config) -> Result<Arc<dyn Attestor>, Step> {
        attestor(config, Some(self.pods.clone()))
    }
}

/// The attestor that the agent would use.
pub(super) fn attestor(config: &Config, pods: Option<Pods>) -> Result<Arc<dyn Attestor>, Step> {
    let made = app::attestor(config, pods);
    made.map_err(|error| Step::failed("verdict", Exit::Failed, format!("{error:#}"), "correct the configuration"))
}

/// The agent's verdict about this process, and its identity.
pub(super) async fn verdict(config: &Config, attestor: &dyn Attestor, peer: &Peer) -> Step {
    match timeout(ANSWER_TIMEOUT, attestor.attest(peer)).await {
        Ok(Ok(attested)) => identity(config, &attested.workload),
        Ok(Err(error)) => refused("verdict", &error),
        Err(_) => Step::failed("verdict", Exit::Unavailable, "no verdict within the timeout", "see the previous steps"),
    }
}

fn identity(config: &Config, workload: &Workload) -> Step {
    match config.resolver().resolve(workload) {
        Ok(identity) => Step::ok("verdict", format!("{workload} is {}", identity.spiffe_id)),
        Err(error) => {
            Step::failed("verdict", Exit::NotPermitted, format!("{workload}: {error}"), "correct identity.spiffeId or identity.dnsNames")
        }
    }
}

/// The profile of the pod and the rule that selects it: on the shared socket, and on each socket for which a volume selects a profile.
fn profile(resolver: &Resolver, pod: &Pod) -> Step {
    let mut detail = resolver.explain(&pod.workload());
    let mut wrong = None;
    for volume in pod.picks.keys() {
        let workload = pod.workload_at(volume);
        detail.extend(resolver.explain(&workload).into_iter().map(|line| format!("in volume {volume}: {line}")));
        wrong = wrong.or(resolver.decide(&workload).err());
    }
    match wrong {
        None => Step::ok("profile", detail.join("\n")),
        Some(_) => {
            let remedy = "correct the attribute sds-agent.io/profile of the volume, or selectable and match of the profile";
            Step::failed("profile", Exit::NotPermitted, detail.join("\n"), remedy)
        }
    }
}

/// The verdict about a pod without a visible process.
pub(super) fn without_process(config: &Config, target: &Target) -> Step {
    let detail = match (config.attestation, target) {
        (Attestation::Kubernetes, Target::Pod { .. }) => "no process of the pod is visible here, so nothing was attested",
        _ => "nothing was attested",
    };
    Step::unknown("verdict", detail, Some("the agent needs hostPID: true, and the pod a running container"))
}

fn refused(name: &'static str, error: &Error) -> Step {
    let remedy = match error.reason {
        Reason::pid_invisible => "run the agent with hostPID: true",
        Reason::no_pidfd => "the shared socket needs Linux 6.5 or newer",
        Reason::process_gone => "name a process that still runs",
        Reason::not_in_pod => "only processes of pods are served on the shared socket",
        Reason::conflicting_cgroups => "the process was moved to another cgroup: restart its pod",
        Reason::unknown_pod => "check that the pod is on this node (NODE_NAME) and in this cluster (KUBECONFIG)",
        Reason::pod_ended => "a pod that has ended is not served; its successor has another UID",
        Reason::no_service_account => "give the pod a service account; a static pod cannot have one",
        Reason::no_identity => "correct identity.spiffeId or identity.dnsNames in the configuration, or the profile that the pod selects",
        _ => "see the previous steps",
    };
    let exit = if error.temporary { Exit::Unavailable } else { Exit::NotPermitted };
    Step::failed(name, exit, error.to_string(), remedy)
}

pub(super) fn failed(name: &'static str, failure: &Failure) -> Step {
    let (exit, remedy) = match failure.cause {
        Cause::Rbac | Cause::Policy => (Exit::NotPermitted, "grant the agent's service account the permission that the message names"),
        Cause::Unauthorized => (Exit::NotPermitted, "mount a token of the agent's service account"),
        _ => (Exit::Unavailable, "check that the API server runs and that this node can reach it"),
    };
    Step::failed(name, exit, failure.to_string(), remedy)
}
