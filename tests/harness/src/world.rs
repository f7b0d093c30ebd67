//! A cluster with sds-agent installed from `daemonset/`, and the accounts that act in it.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    agent::{Agent, Launch},
    agent_pod::log_in,
    ask::Ask,
    cluster::{Cluster, Pod},
    eventually, manifests,
    plane::Plane,
    relay::Relay,
};

pub const NAMESPACE: &str = "sds-agent";
pub const PATIENCE: Duration = Duration::from_secs(60);
/// cert-manager's own approver approves no request for a ClusterIssuer, and so none for the mesh's.
pub const GUARDED: &[&str] = &["--approve-signers", "issuers.cert-manager.io/*"];
/// The lifetime in the installed configuration.
const LIFETIME: &str = "lifetime: 24h";

pub struct World {
    pub cluster: Cluster,
    pub plane: Plane,
    /// The namespace of the agents.
    pub namespace: String,
    /// The namespace of the approver.
    pub approver_namespace: String,
    dir: TempDir,
}

/// A pod, its account, and a view of the cluster with its token.
pub struct Actor {
    pub pod: Pod,
    pub node: String,
    pub cluster: Cluster,
    dir: PathBuf,
}

impl World {
    /// Starts a separate control plane, with the accounts, permissions and configuration of agents and approver. No agent and no approver
    /// runs yet.
    pub async fn start(flags: &[&str]) -> Self {
        let agents = ["base/namespace.yaml", "base/rbac.yaml", "base/config.yaml"].map(objects).concat();
        let approver = ["approver/namespace.yaml", "approver/rbac.yaml", "approver/deployment.yaml"].map(objects).concat();
        Self::start_in(flags, &[agents, approver].concat()).await
    }

    /// Installs rendered objects. Their ConfigMap and their Deployment decide about the namespaces.
    pub async fn start_in(flags: &[&str], rendered: &[Value]) -> Self {
        let (cluster, plane) = Cluster::own(flags).await;
        // Other objects need their namespace.
        let (namespaces, others): (Vec<_>, Vec<_>) = rendered.iter().partition(|object| object["kind"] == "Namespace");
        for object in namespaces.into_iter().chain(others) {
            cluster.apply(&manifests::path(object), object).await;
        }
        let of = |kind: &str, name: &str| manifests::named(rendered, kind, name)["metadata"]["namespace"].as_str().unwrap().to_owned();
        let (namespace, approver_namespace) = (of("ConfigMap", "sds-agent"), of("Deployment", "sds-agent-approver"));
        Self { cluster, plane, namespace, approver_namespace, dir: tempfile::tempdir().unwrap() }
    }

    /// Applies every object of a file of `daemonset/`.
    pub async fn install(&self, file: &str) {
        for object in objects(file) {
            self.cluster.apply(&manifests::path(&object), &object).await;
        }
    }

    /// Applies the policy; returns when the API server enforces all its parts.
    pub async fn install_policy(&self) {
        self.install("approver/policy.yaml").await;
        let probe = self.actor("probe", "sds-agent", &self.cluster.node().await).await;
        let (other, namespace) = (self.actor("probe-2", "sds-agent", &self.cluster.node().await).await, self.cluster.namespace().await);
        let target = self.cluster.pod(&namespace, "probe", &probe.node).await;
        eventually("the policy of requests is enforced", PATIENCE, async || {
            let asked = Ask::of(&probe, &target).label("elsewhere");
            match asked.create(&probe).await {
                Err(_) => Ok(()),
                Ok(made) => {
                    self.cluster.delete(&made).await;
                    Err("a request with a wrong label was accepted".to_owned())
                }
            }
        })
        .await;
        eventually("the policy of limits is enforced", PATIENCE, async || {
            let asked = Ask::of(&probe, &target).spec("duration", json!("10000h"));
            match asked.try_dry_run(&probe).await {
                Err(_) => Ok(()),
                Ok(_) => Err("a request for a longer life was accepted".to_owned()),
            }
        })
        .await;
        let other_issuer = json!({"name": "other", "kind": "ClusterIssuer", "group": "cert-manager.io"});
        let labelled = Ask::of(&probe, &target).spec("issuerRef", other_issuer);
        eventually("the policy of labels is enforced", PATIENCE, async || match labelled.create_in(&self.cluster).await {
            Err(_) => Ok(()),
            Ok(made) => {
                self.cluster.delete(&made).await;
                Err("an administrator set a label of the agents".to_owned())
            }
        })
        .await;
        let event = event(&namespace, |event| event["reportingController"] = json!("example.com/other"));
        let events = format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events?dryRun=All");
        eventually("the policy of events is enforced", PATIENCE, async || match probe.cluster.try_create(&events, &event).await {
            Err(kube::Error::Api(status)) if status.message.contains("an agent creates only short Events") => Ok(()),
            answer => Err(format!("{answer:?}")),
        })
        .await;
        let (made, approver) = (Ask::of(&probe, &target).create(&probe).await.unwrap(), self.as_approver().await);
        eventually("the policy of removals is enforced", PATIENCE, async || {
            match approver.try_delete(&format!("{made}?dryRun=All")).await {
                Err(_) => Ok(()),
                Ok(_) => Err("the approver deleted an undecided request".to_owned()),
            }
        })
        .await;
        self.cluster.delete(&made).await;
        eventually("the policy of deletions is enforced", PATIENCE, async || {
            let made = Ask::of(&probe, &target).create(&probe).await.unwrap();
            match other.cluster.try_delete(&made).await {
                Err(_) => {
                    self.cluster.delete(&made).await;
                    Ok(())
                }
                Ok(_) => Err("another node's agent deleted a request".to_owned()),
            }
        })
        .await;
    }

    /// A view of the cluster as the approver's account. It has no pod, which would count as a replica.
    pub async fn as_approver(&self) -> Cluster {
        self.impersonate(&format!("system:serviceaccount:{}:sds-agent-approver", self.approver_namespace), &[]).await
    }

    /// Makes cert-manager's own approver the account that decides, as the chart does where `approver.enabled` is false.
    pub async fn let_cert_manager_approve(&self) {
        let mut objects = manifests::helm(NAMESPACE, &["--set", "approver.enabled=false"]).await;
        objects.retain(|object| object["metadata"]["name"] == "sds-agent-approvals");
        assert_eq!(objects.len(), 2);
        for object in objects {
            self.cluster.apply(&manifests::path(&object), &object).await;
        }
    }

    /// Creates a pod of an account of the agents' namespace on `node`, with a token bound to it.
    pub async fn actor(&self, name: &str, account: &str, node: &str) -> Actor {
        let pod = self.cluster.pod_of(&self.namespace, account, name, node).await;
        self.log_in(pod, node, true).await
    }

    /// An actor for any pod; `bound` binds its token to the pod.
    pub async fn log_in(&self, pod: Pod, node: &str, bound: bool) -> Actor {
        let dir = self.dir.path().join(format!("{}-{bound}", pod.uid));
        fs::create_dir(&dir).unwrap();
        let kubeconfig = dir.join("kubeconfig");
        log_in(&self.cluster, &pod, bound, &kubeconfig).await;
        Actor { pod, node: node.to_owned(), cluster: Cluster::at(&kubeconfig).await, dir }
    }

    /// The installed configuration, with another lifetime.
    async fn configuration(&self, lifetime: &str) -> String {
        let map = self.cluster.get(&format!("/api/v1/namespaces/{}/configmaps/sds-agent", self.namespace)).await;
        let text = map["data"]["config.yaml"].as_str().unwrap().to_owned();
        assert!(text.contains(LIFETIME), "{text}");
        text.replace(LIFETIME, &format!("lifetime: {lifetime}"))
    }

    /// The installed configuration as a file of an approver, which is in another namespace than the agents, with this overlap.
    async fn configuration_of_approver(&self, lifetime: &str, overlap: &str) -> String {
        let mut text = self.configuration(lifetime).await;
        let agents = format!("system:serviceaccount:{}:sds-agent", self.namespace);
        for (section, field, value) in [
            ("  certManager:\n", "    namespace", self.namespace.clone()),
            ("approver:\n", "  overlap", overlap.to_owned()),
            ("approver:\n", "  agents", format!("[\"{agents}\"]")),
        ] {
            assert!(text.contains(section), "{text}");
            // The previous version's configuration has these fields.
            if !text.contains(&format!("\n{field}:")) {
                text = text.replace(section, &format!("{section}{field}: {value}\n"));
            }
        }
        text
    }

    /// Starts an approver with the account and permissions of `daemonset/` and waits until it is ready. Its overlap is zero, so it
    /// decides at once.
    pub async fn approver(&self, name: &str, lifetime: &str) -> Agent {
        self.approver_of(None, name, lifetime).await
    }

    /// Like [`World::approver`], with another version of the program.
    pub async fn approver_of(&self, program: Option<&Path>, name: &str, lifetime: &str) -> Agent {
        let actor = self.replica(name).await;
        let configuration = self.configuration_of_approver(lifetime, "0s").await;
        let launch = actor.environment(Launch::approver(&actor.dir, &configuration));
        program.map_or(launch.clone(), |program| launch.program(program)).start().await
    }

    /// Like [`World::approver`], with all connections to the API server through `relay`.
    pub async fn approver_through(&self, name: &str, lifetime: &str, relay: &Relay) -> Agent {
        let actor = self.replica(name).await;
        let configuration = self.configuration_of_approver(lifetime, "0s").await;
        let kubeconfig = actor.dir.join("kubeconfig");
        let direct = fs::read_to_string(&kubeconfig).unwrap();
        let relayed = actor.dir.join("relayed");
        fs::write(&relayed, direct.replace(&self.server(), &relay.address().to_string())).unwrap();
        let launch = actor.environment(Launch::approver(&actor.dir, &configuration));
        launch.env("KUBECONFIG", relayed.to_str().unwrap()).start().await
    }

    /// How to run an approver that reads the installed ConfigMap, as the Deployment does, and the lines that its configuration needs.
    pub async fn approver_of_config_map(&self, name: &str) -> (Launch, String) {
        let actor = self.replica(name).await;
        let (launch, lines) = Launch::approver_of_config_map(&actor.dir, &format!("{}/sds-agent", self.namespace));
        (actor.environment(launch), lines)
    }

    /// The API server's address: a host and a port.
    pub fn server(&self) -> String {
        self.cluster.address()["server"].as_str().unwrap().trim_start_matches("https://").to_owned()
    }

    /// Like [`World::approver`], with an overlap, and with the configuration as a mounted ConfigMap.
    pub async fn approver_with_overlap(&self, name: &str, lifetime: &str, overlap: &str) -> (Agent, Mounted) {
        let actor = self.replica(name).await;
        let configuration = self.configuration_of_approver(lifetime, overlap).await;
        let launch = actor.environment(Launch::approver(&actor.dir, &configuration));
        let mounted = Mounted::instead_of(&actor.dir.join("config.yaml"));
        (launch.start().await, mounted)
    }

    /// Creates a pod as the Deployment does.
    async fn replica(&self, name: &str) -> Actor {
        let (node, pods) = (self.cluster.node().await, format!("/api/v1/namespaces/{}/pods", self.approver_namespace));
        let deployment = objects("approver/deployment.yaml").into_iter().find(|object| object["kind"] == "Deployment").unwrap();
        let mut pod = deployment["spec"]["template"].clone();
        pod["metadata"]["name"] = json!(name);
        pod["spec"]["nodeName"] = json!(node);
        let pod = self.cluster.create(&pods, &pod).await;
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let (uid, account) = (text(&pod["metadata"]["uid"]), text(&pod["spec"]["serviceAccountName"]));
        let pod = Pod { namespace: self.approver_namespace.clone(), name: name.to_owned(), uid, service_account: account };
        self.log_in(pod, &node, true).await
    }

    /// How to run an agent as this actor.
    pub async fn agent(&self, actor: &Actor, lifetime: &str) -> Launch {
        let launch = Launch::run(&actor.dir, &self.configuration(lifetime).await);
        actor.environment(launch).env("NODE_NAME", &actor.node)
    }

    /// Creates an account that can edit all objects of `namespace`, as users can.
    pub async fn editor(&self, namespace: &str) -> Actor {
        let node = self.cluster.node().await;
        let pod = self.cluster.pod(namespace, "editor", &node).await;
        let binding = json!({
            "metadata": {"name": "editor"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"},
            "subjects": [{"kind": "ServiceAccount", "namespace": namespace, "name": "editor"}],
        });
        self.cluster.create(&format!("/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings"), &binding).await;
        self.log_in(pod, &node, true).await
    }

    /// A view of the cluster as a user with these groups, by impersonation.
    pub async fn impersonate(&self, user: &str, groups: &[&str]) -> Cluster {
        let kubeconfig = self.dir.path().join(format!("as-{user}"));
        fs::write(&kubeconfig, self.cluster.access_as(user, groups).to_string()).unwrap();
        Cluster::at(&kubeconfig).await
    }

    /// Creates a namespace in which cert-manager's validating webhook is disabled.
    pub async fn unvalidated_namespace(&self) -> String {
        let namespace = self.cluster.namespace().await;
        let labels = json!({"metadata": {"labels": {"cert-manager.io/disable-validation": "true"}}});
        self.cluster.patch(&format!("/api/v1/namespaces/{namespace}"), &labels).await;
        namespace
    }

    /// The paths of the requests in a namespace.
    pub async fn requests(&self, namespace: &str) -> Vec<String> {
        let names = self.cluster.requests(namespace).await.into_iter();
        names.map(|name| format!("/apis/cert-manager.io/v1/namespaces/{namespace}/certificaterequests/{name}")).collect()
    }

    /// The lines of the API server's audit log, each a request and its user. Needs the flag `--audit`.
    pub fn audit(&self) -> Vec<Value> {
        let log = self.plane.kubeconfig().parent().unwrap().join("audit.log");
        fs::read_to_string(log).unwrap().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

/// An Event about a pod of `namespace` as the agent writes it, with one change.
pub fn event(namespace: &str, change: impl FnOnce(&mut Value)) -> Value {
    let mut event = json!({
        "metadata": {"generateName": "app-", "namespace": namespace, "labels": {"app.kubernetes.io/managed-by": "sds-agent"}},
        "eventTime": "2026-01-02T03:04:05.000000Z", "action": "IssueCertificate", "reason": "CertificateNotIssued", "type": "Warning",
        "regarding": {"apiVersion": "v1", "kind": "Pod", "name": "app", "namespace": namespace, "uid": "u"},
        "reportingController": "sds-agent.io/agent", "reportingInstance": "sds-agent-x", "note": "why",
    });
    change(&mut event);
    event
}

/// A file that is mounted as the kubelet mounts one of a ConfigMap: its path leads through a symbolic link, which is swapped.
pub struct Mounted {
    directory: PathBuf,
    version: u32,
    pub text: String,
}

impl Mounted {
    /// Replaces an existing file.
    fn instead_of(file: &Path) -> Self {
        let text = fs::read_to_string(file).unwrap();
        let mut mounted = Self { directory: file.parent().unwrap().to_owned(), version: 0, text: String::new() };
        mounted.publish(&text);
        fs::remove_file(file).unwrap();
        symlink("..data/config.yaml", file).unwrap();
        mounted
    }

    /// Denies these nodes, one name per line.
    pub fn deny(&self, nodes: &str) {
        fs::write(self.directory.join("deniedNodes"), nodes).unwrap();
    }

    /// Publishes new content and removes the previous one.
    pub fn publish(&mut self, text: &str) {
        let at = |name: &str| self.directory.join(name);
        let (old, new) = (format!("..{}", self.version), format!("..{}", self.version + 1));
        fs::create_dir(at(&new)).unwrap();
        fs::write(at(&new).join("config.yaml"), text).unwrap();
        symlink(&new, at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        if self.version > 0 {
            fs::remove_dir_all(at(&old)).unwrap();
        }
        (self.version, self.text) = (self.version + 1, text.to_owned());
    }
}

impl Actor {
    fn environment(&self, launch: Launch) -> Launch {
        launch
            .env("KUBECONFIG", self.dir.join("kubeconfig").to_str().unwrap())
            .env("POD_NAMESPACE", &self.pod.namespace)
            .env("POD_NAME", &self.pod.name)
            .env("POD_UID", &self.pod.uid)
    }
}

/// The objects in a file of `daemonset/`.
fn objects(file: &str) -> Vec<Value> {
    manifests::documents(&manifests::read(file))
}

/// The number of pages of pods that the approver has received in its lists.
pub async fn pod_pages(approver: &Agent) -> f64 {
    approver.metric_of("sds_agent_kube_requests_total", &["verb=\"list\"", "resource=\"pods\"", "code=\"200\""]).await
}

/// Makes the approver list all pods again: it revokes the permission to watch, waits for a rejected watch and a complete list, and
/// grants the permission again.
pub async fn list_pods_again(cluster: &Cluster, approver: &Agent, relay: &Relay) {
    const ROLE: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles/sds-agent-approver";
    let listed = pod_pages(approver).await;
    let rules = cluster.get(ROLE).await["rules"].clone();
    let mut fewer = rules.clone();
    for rule in fewer.as_array_mut().expect("rules").iter_mut().filter(|rule| rule["resources"] == json!(["pods"])) {
        rule["verbs"] = json!(["get", "list"]);
    }
    cluster.patch(ROLE, &json!({"rules": fewer})).await;
    eventually("the watch is rejected", PATIENCE, async || {
        let refused = approver.metric_of("sds_agent_kube_requests_total", &["verb=\"watch\"", "resource=\"pods\"", "code=\"403\""]).await;
        if refused > 0.5 {
            return Ok(());
        }
        relay.cut();
        Err("it is accepted".to_owned())
    })
    .await;
    eventually("all pods are listed again", 5 * PATIENCE, async || {
        let now = pod_pages(approver).await;
        if now >= 2.0 * listed { Ok(()) } else { Err(format!("{listed} pages, then {now}")) }
    })
    .await;
    cluster.patch(ROLE, &json!({"rules": rules})).await;
}
