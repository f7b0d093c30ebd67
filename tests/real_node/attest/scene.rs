//! An agent on a node with pods, and callers in their cgroups.

use std::{path::Path, time::Duration};

use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;
use test_harness::{
    agent::{Agent, Launch},
    cgroups::PodCgroup,
    child::{Child, Lines},
    cluster::{AgentPod, Cluster, Pod},
};
use tokio::process::Command;
use x509_parser::{extensions::GeneralName, pem::Pem};

/// Limit for steps that take milliseconds on a quiet machine.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Timeout in milliseconds for answers that must come.
pub const LONG: &str = "20000";
/// Timeout in milliseconds for answers that must not come.
pub const WHILE: &str = "1500";

/// The agent, and two pods on its node.
pub struct Scene {
    pub cluster: Cluster,
    pub agent_pod: AgentPod,
    pub launch: Launch,
    pub agent: Agent,
    pub a: Member,
    pub b: Member,
    pub node: String,
    pub dir: TempDir,
}

/// A pod and the cgroup of its container.
pub struct Member {
    pub pod: Pod,
    pub cgroup: PodCgroup,
}

impl Scene {
    /// Starts an agent with `settings` in its configuration.
    pub async fn start(settings: &str) -> Self {
        Self::launched(settings, |_, launch| launch).await
    }

    /// Like [`Scene::start`]; `change` modifies the launch of the agent.
    pub async fn launched(settings: &str, change: impl FnOnce(&AgentPod, Launch) -> Launch) -> Self {
        let cluster = Cluster::connect().await;
        let dir = tempfile::tempdir().unwrap();
        let node = cluster.node().await;
        let agent_pod = cluster.agent(dir.path(), &node).await;
        let launch = change(&agent_pod, agent_pod.launch(dir.path(), settings));
        let agent = launch.start().await;
        let namespace = cluster.namespace().await;
        let [a, b] = [member(&cluster, &namespace, "a", &node).await, member(&cluster, &namespace, "b", &node).await];
        Self { cluster, agent_pod, launch, agent, a, b, node, dir }
    }

    /// Makes a call from a pod's process and waits for its end.
    pub async fn ask(&self, cgroup: &PodCgroup, method: &str, milliseconds: &str, names: &[&str]) -> Answer {
        self.ask_by(cgroup.command(caller()), method, milliseconds, names).await
    }

    /// Makes a call by any command.
    pub async fn ask_by(&self, mut command: Command, method: &str, milliseconds: &str, names: &[&str]) -> Answer {
        command.arg("ask").arg(self.agent.socket()).arg(method).arg(milliseconds).args(names);
        let mut child = Child::spawn("test-caller", &mut command);
        let status = child.exit(PATIENCE).await;
        assert!(status.success(), "{status}");
        Answer::read(&child.stdout().text().lines().map(str::to_owned).collect::<Vec<_>>())
    }

    /// Opens a stream from a pod's process, until dropped.
    pub fn stream(&self, cgroup: &PodCgroup, word: &str, names: &[&str]) -> Stream {
        let mut command = cgroup.command(caller());
        let child = Child::spawn("test-caller", command.arg(word).arg(self.agent.socket()).args(names));
        Stream { lines: child.stdout(), child }
    }

    /// The number of callers that were rejected for this reason.
    pub async fn refused(&self, reason: &str) -> f64 {
        self.agent.metric_of("sds_agent_attestations_total", &[&format!("reason=\"{reason}\"")]).await
    }
}

/// Creates a pod with a grace period of one minute.
pub async fn member(cluster: &Cluster, namespace: &str, name: &str, node: &str) -> Member {
    cluster.create(&format!("/api/v1/namespaces/{namespace}/serviceaccounts"), &json!({"metadata": {"name": name}})).await;
    again(cluster, namespace, name, node).await
}

/// Like [`member`], with an existing service account.
pub async fn again(cluster: &Cluster, namespace: &str, name: &str, node: &str) -> Member {
    let pods = format!("/api/v1/namespaces/{namespace}/pods");
    let pod = json!({
        "metadata": {"name": name},
        "spec": {
            "serviceAccountName": name,
            "nodeName": node,
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 60,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "main", "image": "none"}, {"name": "proxy", "image": "none"}],
        },
    });
    let pod = cluster.create(&pods, &pod).await;
    cluster.patch(&format!("{pods}/{name}/status"), &json!({"status": {"phase": "Running"}})).await;
    let uid = pod["metadata"]["uid"].as_str().expect("the API server gives each pod a UID").to_owned();
    let cgroup = PodCgroup::new(&uid);
    let pod = Pod { namespace: namespace.to_owned(), name: name.to_owned(), uid, service_account: name.to_owned() };
    Member { pod, cgroup }
}

impl Member {
    /// The path of the pod in the API.
    pub fn path(&self) -> String {
        format!("/api/v1/namespaces/{}/pods/{}", self.pod.namespace, self.pod.name)
    }
}

/// The program that calls the agent.
pub fn caller() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_test-caller"))
}

/// The result of a call.
#[derive(Debug)]
pub struct Answer {
    /// The SPIFFE IDs of all certificates in it.
    pub ids: Vec<String>,
    /// Whether it contained a private key.
    pub has_key: bool,
    /// The number of messages.
    pub messages: usize,
    /// Whether the server ended the call.
    pub ended: bool,
}

impl Answer {
    fn read(lines: &[String]) -> Self {
        let messages: Vec<Vec<u8>> = lines.iter().filter_map(|line| line.strip_prefix("message ")).map(unhex).collect();
        let texts: Vec<_> = messages.iter().map(|message| String::from_utf8_lossy(message)).collect();
        Self {
            ids: texts.iter().flat_map(|text| ids(text)).collect(),
            has_key: texts.iter().any(|text| text.contains("PRIVATE KEY")),
            messages: messages.len(),
            ended: lines.iter().any(|line| line == "end"),
        }
    }

    /// Whether the call ended without a secret.
    pub fn is_refusal(&self) -> bool {
        self.ended && self.messages == 0
    }
}

fn unhex(text: &str) -> Vec<u8> {
    let byte = |at| u8::from_str_radix(&text[at..at + 2], 16).expect("hexadecimal");
    (0..text.len()).step_by(2).map(byte).collect()
}

fn ids(text: &str) -> Vec<String> {
    let mut out = Vec::new();
    for part in text.split("-----BEGIN CERTIFICATE-----").skip(1) {
        let end = part.find("-----END CERTIFICATE-----").expect("a whole certificate");
        let pem = format!("-----BEGIN CERTIFICATE-----{}-----END CERTIFICATE-----\n", &part[..end]);
        let (pem, _) = Pem::read(std::io::Cursor::new(pem)).expect("PEM");
        let certificate = pem.parse_x509().expect("a certificate");
        let Some(names) = certificate.subject_alternative_name().expect("readable extensions") else { continue };
        out.extend(names.value.general_names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        }));
    }
    out
}

/// A call that continues.
pub struct Stream {
    child: Child,
    lines: Lines,
}

impl Stream {
    /// Waits until `count` messages have arrived in total.
    pub async fn messages(&self, count: usize) -> Answer {
        let enough =
            |lines: &[String]| (lines.iter().filter(|line| line.starts_with("message ")).count() >= count).then(|| Answer::read(lines));
        self.lines.until(&format!("{count} messages"), PATIENCE, enough).await
    }

    /// Waits until the server has closed the connection.
    pub async fn closed(&self) -> Answer {
        let enough = |lines: &[String]| (lines.last().map(String::as_str) == Some("closed")).then(|| Answer::read(lines));
        self.lines.until("the end of the connection", PATIENCE, enough).await
    }

    /// Whether the connection is open according to the output so far.
    pub fn is_open(&self) -> bool {
        !self.lines.text().lines().any(|line| line == "end" || line == "closed")
    }

    /// Kills its process.
    pub fn kill(&self) {
        self.child.signal(Signal::SIGKILL);
    }
}
