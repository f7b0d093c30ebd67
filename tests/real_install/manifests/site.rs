//! A node with the real kubelet that runs the installed manifests. The tests create the pods as the controllers of DaemonSet and
//! Deployment would, or those controllers create them.

use std::{collections::HashMap, net::SocketAddr, path::Path, sync::Mutex, time::Duration};

use serde_json::{Value, json};
use tempfile::TempDir;
use test_harness::{
    agent,
    cluster::{Cluster, Pod, name_of},
    eventually, free_port, http,
    manifests::{self, container as container_of, install, named, rendered},
    node::{Image, Node},
    plane::Plane,
    world::GUARDED,
};

pub const PATIENCE: Duration = Duration::from_secs(60);
/// Limit until a new version runs and the old one has ended after its drain.
const ROLL_OUT: Duration = Duration::from_secs(120);
/// The kinds from which controllers create pods.
const CONTROLLED: [&str; 2] = ["DaemonSet", "Deployment"];
/// The ConfigMap that the approver reads from the API server. Agents mount others.
const CONFIG_MAP: &str = "sds-agent";
/// The name in the manifests.
const IMAGE: &str = concat!("sds-agent:", env!("CARGO_PKG_VERSION"));

/// The path by which a workload reaches its socket.
#[derive(Clone, Copy)]
pub struct Way {
    pub name: &'static str,
    pub socket: &'static str,
    /// Its volume, without the name.
    pub volume: fn() -> Value,
}

pub struct Site {
    /// The rendered objects.
    pub objects: Vec<Value>,
    pub shop: String,
    ours: Mutex<Vec<Pod>>,
    /// The ports of `probes.address` and of the two addresses of `mountHelper`, for each port of `metrics.address`.
    ports: Mutex<HashMap<u16, [u16; 3]>>,
    pub node: Node,
    /// Further nodes, where there are several.
    others: Vec<Node>,
    pub cluster: Cluster,
    _plane: Plane,
    _dir: TempDir,
}

/// A pod of an agent or an approver.
pub struct Ours {
    pub pod: Pod,
    metrics: SocketAddr,
}

/// The ConfigMap for a version of a workload.
fn map_of(kind: &str, workload: &str, version: &str) -> String {
    if kind == "Deployment" { CONFIG_MAP.to_owned() } else { format!("{workload}-{version}") }
}

impl Site {
    /// Applies all objects of a mode and starts the node.
    pub async fn start(mode: &str) -> Self {
        Self::begin(mode, GUARDED, 1, |_| true).await
    }

    /// Like [`Site::start`], with the controllers of DaemonSet and Deployment and the scheduler. Objects of these two kinds are created
    /// by [`release`](Self::release).
    pub async fn controlled(mode: &str, nodes: usize) -> Self {
        let flags = [GUARDED, &["--workloads"]].concat();
        Self::begin(mode, &flags, nodes, |object| !CONTROLLED.iter().any(|kind| object["kind"] == *kind)).await
    }

    async fn begin(mode: &str, flags: &[&str], nodes: usize, installs: impl Fn(&Value) -> bool) -> Self {
        let (cluster, plane) = Cluster::own(flags).await;
        let dir = tempfile::tempdir().unwrap();
        let image = Image::of_programs(IMAGE, &dir.path().join("image"), &[agent::program()]).await;
        let objects = rendered(mode).await;
        let installed: Vec<_> = objects.iter().filter(|object| installs(object)).cloned().collect();
        install(&cluster, &installed).await;
        // Pods of these nodes have no network of their own, and the level `restricted` allows no pod the host's (`move_to_the_host`).
        let namespace = manifests::path(named(&objects, "Namespace", "sds-agent-approver"));
        cluster.patch(&namespace, &json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "privileged"}}})).await;
        let images = [image];
        let node = Node::start(&cluster, dir.path(), &images).await;
        let mut others = Vec::new();
        for _ in 1..nodes {
            others.push(Node::start(&cluster, dir.path(), &images).await);
        }
        let shop = cluster.namespace().await;
        Self { objects, shop, ours: Mutex::default(), ports: Mutex::default(), node, others, cluster, _plane: plane, _dir: dir }
    }

    /// All nodes.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        std::iter::once(&self.node).chain(&self.others)
    }

    /// The node of a pod, according to the API server.
    pub fn node_of(&self, pod: &Value) -> &Node {
        self.nodes().find(|node| pod["spec"]["nodeName"] == node.name()).unwrap_or_else(|| panic!("it is on no node: {pod}"))
    }

    /// Runs a pod of a DaemonSet or Deployment on the node and waits until it is ready. `keys` is that field of the configuration.
    pub async fn run(&self, kind: &str, workload: &str, name: &str, keys: &str) -> Ours {
        let map = if kind == "Deployment" { CONFIG_MAP } else { name };
        let metrics = self.configure(map, &format!("keys: {keys}\n")).await;
        let controller = self.cluster.get(&manifests::path(named(&self.objects, kind, workload))).await;
        let mut pod = controller["spec"]["template"].clone();
        self.move_to_the_host(&mut pod, map, metrics.port());
        pod["metadata"]["name"] = json!(name);
        pod["spec"]["nodeName"] = json!(self.node.name());
        let made = self.cluster.create(&format!("/api/v1/namespaces/{}/pods", self.namespace_of(kind, workload)), &pod).await;
        let pod = self.ours(&made, kind, workload);
        self.node.until_running(&pod).await;
        Ours { pod, metrics }
    }

    fn namespace_of(&self, kind: &str, workload: &str) -> &str {
        named(&self.objects, kind, workload)["metadata"]["namespace"].as_str().unwrap()
    }

    /// Makes a DaemonSet or Deployment run a version of its template. Each version has a separate configuration, as if the ConfigMap's
    /// name had a hash of its content; `more` is added to it. Returns the metrics address of that version's pods.
    pub async fn release(&self, kind: &str, workload: &str, version: &str, more: &str) -> SocketAddr {
        let metrics = self.configure(&map_of(kind, workload, version), more).await;
        self.release_again(kind, workload, version, metrics, |_| {}).await;
        metrics
    }

    /// Like [`release`](Self::release), for a version whose configuration exists, with a `change` of the container.
    pub async fn release_again(&self, kind: &str, workload: &str, version: &str, metrics: SocketAddr, change: impl FnOnce(&mut Value)) {
        let mut object = named(&self.objects, kind, workload).clone();
        self.move_to_the_host(&mut object["spec"]["template"], &map_of(kind, workload, version), metrics.port());
        change(&mut object["spec"]["template"]["spec"]["containers"][0]);
        if kind == "Deployment" {
            // The cluster has one node, which never becomes ready because its pods have no network.
            object["spec"]["replicas"] = json!(1);
            object["spec"]["template"]["spec"]["tolerations"] = json!([{"operator": "Exists"}]);
        }
        self.cluster.apply(&manifests::path(&object), &object).await;
    }

    /// Waits until the controller reports that all pods have the last version and are available, and that no others exist.
    pub async fn until_rolled_out(&self, kind: &str, workload: &str) {
        let path = manifests::path(named(&self.objects, kind, workload));
        let (wanted, [updated, available, all]) = match kind {
            "DaemonSet" => (self.nodes().count(), ["updatedNumberScheduled", "numberAvailable", "currentNumberScheduled"]),
            _ => (1, ["updatedReplicas", "availableReplicas", "replicas"]),
        };
        eventually(&format!("{workload} is rolled out"), ROLL_OUT, async || {
            let seen = self.cluster.get(&path).await;
            let status = &seen["status"];
            let is_seen = status["observedGeneration"] == seen["metadata"]["generation"];
            let is_wanted = |field: &&str| status[field] == wanted;
            if is_seen && [updated, available, all].iter().all(is_wanted) && self.pods(workload).await.len() == wanted {
                Ok(())
            } else {
                Err(format!("{status}\n{}", self.nodes().map(|node| node.log("kubelet")).collect::<Vec<_>>().join("\n")))
            }
        })
        .await;
    }

    /// The pods that a controller has created, the oldest first, as the API server returns them.
    pub async fn pods(&self, workload: &str) -> Vec<Value> {
        let path = format!("/api/v1/pods?labelSelector=app.kubernetes.io/name%3D{workload}");
        let mut pods = self.cluster.get(&path).await["items"].take();
        let pods = pods.as_array_mut().map(std::mem::take).unwrap_or_default();
        let mut pods: Vec<_> = pods.into_iter().map(|pod| (pod["metadata"]["creationTimestamp"].to_string(), pod)).collect();
        pods.sort_by(|(one, _), (other, _)| one.cmp(other));
        pods.into_iter().map(|(_, pod)| pod).collect()
    }

    /// Converts an object into the pod type of the tests.
    pub fn pod(&self, made: &Value) -> Pod {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let (uid, service_account) = (text(&made["metadata"]["uid"]), text(&made["spec"]["serviceAccountName"]));
        let pod = Pod { namespace: text(&made["metadata"]["namespace"]), name: name_of(made), uid, service_account };
        self.ours.lock().unwrap().push(pod.clone());
        pod
    }

    /// Like [`pod`](Self::pod); also asserts that the pod has everything that the manifest contains.
    pub fn ours(&self, made: &Value, kind: &str, workload: &str) -> Pod {
        let manifest = &named(&self.objects, kind, workload)["spec"]["template"]["spec"];
        for wanted in manifest["containers"].as_array().unwrap() {
            let got = container_of(&made["spec"], wanted["name"].as_str().unwrap());
            for key in ["securityContext", "image", "args", "livenessProbe"] {
                assert_holds(&got[key], &wanted[key], key);
            }
        }
        for key in ["securityContext", "hostPID", "serviceAccountName", "priorityClassName"] {
            assert_holds(&made["spec"][key], &manifest[key], key);
        }
        self.pod(made)
    }

    /// Writes the installed configuration under another name, with free ports and `more`. Several nodes share one network: each of their
    /// agents needs a separate configuration that listens on its node's address.
    pub async fn configure(&self, name: &str, more: &str) -> SocketAddr {
        let [metrics, probes, admin, helper_metrics, helper_probes] = [(); 5].map(|()| free_port());
        self.ports.lock().unwrap().insert(metrics, [probes, helper_metrics, helper_probes]);
        let mut map = named(&self.objects, "ConfigMap", "sds-agent").clone();
        map["metadata"]["name"] = json!(name);
        let text = map["data"]["config.yaml"].as_str().unwrap().to_owned();
        let on = |all: &str, own: &str| {
            json!(format!(
                "{text}metrics: {{ address: \"{all}:{metrics}\" }}\nprobes: {{ address: \"{all}:{probes}\" }}\n\
                 mountHelper: {{ metricsAddress: \"{all}:{helper_metrics}\", probesAddress: \"{all}:{helper_probes}\" }}\n\
                 admin: {{ address: {own}:{admin} }}\n{more}"
            ))
        };
        map["data"]["config.yaml"] = on("[::]", "127.0.0.1");
        if !self.others.is_empty() {
            for node in self.nodes() {
                map["data"][node.name()] = on(node.name(), node.name());
            }
        }
        self.cluster.apply(&manifests::path(&map), &map).await;
        SocketAddr::from(([127, 0, 0, 1], metrics))
    }

    /// Changes only what this node cannot provide. Pods have no network of their own, so they use the host's, where each needs its own
    /// ports and a configuration with them. Services have no address, so pods get that of the API server. Image, account, token, security
    /// context, mounts, probes and resources remain those of the manifest.
    fn move_to_the_host(&self, template: &mut Value, map: &str, metrics: u16) {
        let spec = &mut template["spec"];
        spec["hostNetwork"] = json!(true);
        let config = |rows: &Value| rows.as_array().into_iter().flatten().position(|row| row["name"] == "config");
        let mut files = json!({"name": map});
        let server = self.cluster.address()["server"].as_str().unwrap().trim_start_matches("https://").to_owned();
        let (host, port) = server.rsplit_once(':').expect("an address with a port");
        let [probes, helper_metrics, helper_probes] = self.ports.lock().unwrap()[&metrics];
        for container in spec["containers"].as_array_mut().unwrap() {
            if !self.others.is_empty() && container["env"].as_array().unwrap().iter().any(|row| row["name"] == "NODE_NAME") {
                let own = |node: &Node| json!({"key": node.name(), "path": format!("{}/config.yaml", node.name())});
                files["items"] = self.nodes().map(own).collect();
                let mounts = &mut container["volumeMounts"];
                let position = config(mounts).expect("the agent mounts its configuration");
                mounts[position]["subPathExpr"] = json!("$(NODE_NAME)");
            }
            for port in container["ports"].as_array_mut().unwrap() {
                port["containerPort"] = json!(match port["name"].as_str().unwrap() {
                    "probes" => probes,
                    "helper-metrics" => helper_metrics,
                    "helper-probes" => helper_probes,
                    _ => metrics,
                });
            }
            let env = container["env"].as_array_mut().unwrap();
            for (name, value) in [("KUBERNETES_SERVICE_HOST", host), ("KUBERNETES_SERVICE_PORT", port)] {
                env.push(json!({"name": name, "value": value}));
            }
        }
        if let Some(position) = config(&spec["volumes"]) {
            let volume = spec["volumes"][position]["configMap"].as_object_mut().unwrap();
            volume.extend(files.as_object_mut().map(std::mem::take).unwrap_or_default());
        }
    }

    /// Creates a workload that watches its certificate and its roots on each of these sockets, in one container for each.
    pub async fn workload(&self, name: &str, ways: &[Way]) -> Pod {
        self.node.pod(&self.shop, name, &spec(ways, follow)).await
    }

    /// Runs a pod that tries to serve on this socket itself; returns its log.
    pub async fn thief(&self, name: &str, way: Way) -> String {
        let serve = |socket: &str| ["/sds-agent", "dev", "--socket", socket, "--admin", "127.0.0.1:0"].map(str::to_owned).to_vec();
        let pod = self.node.bound_pod(&self.shop, name, &spec(&[way], serve)).await;
        let log = eventually("the program has ended, or serves", PATIENCE, async || {
            let log = self.node.container_log(&pod, &container(way));
            let seen = self.cluster.get(&pod.path()).await;
            let status = &seen["status"]["containerStatuses"][0];
            let ended = ["state", "lastState"].iter().any(|state| status[state]["terminated"].is_object());
            if ended || log.contains("sds-agent serves") { Ok(log) } else { Err(status.to_string()) }
        });
        let log = log.await;
        self.node.delete(&pod).await;
        log
    }

    /// Waits until a workload has its certificate and the roots on a socket.
    pub async fn assert_served(&self, pod: &Pod, way: Way) {
        eventually(&format!("{} is served on {}", pod.name, way.socket), PATIENCE, async || {
            let log = self.node.container_log(pod, &container(way));
            let told: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line.split_once(" stdout F ")?.1).ok()).collect();
            let roots = told.iter().any(|update| update["trusted_ca_pem"].as_str().is_some_and(|pem| pem.contains("BEGIN CERTIFICATE")));
            match told.iter().find_map(|update| update["spiffe_id"].as_str()) {
                Some(id) if roots => {
                    assert_eq!(id, pod.spiffe_id());
                    Ok(())
                }
                _ => Err(log),
            }
        })
        .await;
    }

    /// Waits until a workload has connected to the next agent.
    pub async fn assert_connected_again(&self, pod: &Pod, way: Way) {
        eventually(&format!("{} is connected again", pod.name), PATIENCE, async || {
            let log = self.node.container_log(pod, &container(way));
            if log.contains("connected again") { Ok(()) } else { Err(log) }
        })
        .await;
    }

    /// Lines of `/proc/<pid>/status` of a pod's process, as the node sees it.
    pub async fn process(&self, ours: &Ours, key: &str) -> String {
        self.process_of(&self.node.container(&ours.pod).await, key).await
    }

    /// Like [`process`](Self::process), of the container with this name.
    pub async fn process_in(&self, ours: &Ours, container: &str, key: &str) -> String {
        self.process_of(&self.node.container_of(&ours.pod, container).await, key).await
    }

    async fn process_of(&self, id: &str, key: &str) -> String {
        let tools = test_harness::tools::node().join("ctr");
        let list = self.node.run(&[tools.to_str().unwrap(), "--namespace", "k8s.io", "tasks", "list"]).await;
        let list = String::from_utf8_lossy(&list.stdout).into_owned();
        let row = list.lines().find(|line| line.starts_with(id)).unwrap_or_else(|| panic!("{id} is not in\n{list}"));
        let pid = row.split_whitespace().nth(1).expect("a pid");
        let status = self.node.run(&["cat", &format!("/proc/{pid}/status")]).await;
        let status = String::from_utf8_lossy(&status.stdout).into_owned();
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {key} in\n{status}")).trim().to_owned()
    }

    /// The metrics of a pod.
    pub async fn metrics(&self, ours: &Ours) -> String {
        exposed(ours.metrics).await.unwrap()
    }
}

/// A page of metrics.
pub async fn exposed(from: SocketAddr) -> Result<String, String> {
    http::get_ok(from, "/metrics").await
}

fn container(way: Way) -> String {
    format!("on-{}", way.name)
}

fn follow(socket: &str) -> Vec<String> {
    let words = ["/sds-agent", "fetch", "--watch", "--socket", socket, "--name", "default", "--name", "ROOTCA", "-o", "json"];
    words.map(str::to_owned).to_vec()
}

/// The spec of a pod with one container for each socket.
fn spec(ways: &[Way], command: impl Fn(&str) -> Vec<String>) -> Value {
    let containers = ways.iter().map(|way| {
        let place = Path::new(way.socket).parent().unwrap().to_str().unwrap();
        let mount = json!({"name": way.name, "mountPath": place, "readOnly": true});
        json!({"name": container(*way), "image": IMAGE, "command": command(way.socket), "volumeMounts": [mount]})
    });
    let volumes = ways.iter().map(|way| {
        let mut volume = (way.volume)();
        volume["name"] = json!(way.name);
        volume
    });
    json!({"containers": containers.collect::<Vec<_>>(), "volumes": volumes.collect::<Vec<_>>()})
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for pod in self.ours.lock().unwrap().iter() {
                let log = |node: &Node| ["sds-agent", "approver"].map(|container| node.container_log(pod, container)).concat();
                let log: String = self.nodes().map(log).collect();
                eprintln!("--- {} wrote:\n{log}---", pod.name);
            }
        }
    }
}

/// Asserts that `got` contains all of `wanted`. The API server may have added defaults.
fn assert_holds(got: &Value, wanted: &Value, what: &str) {
    match wanted {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| assert_holds(&got[key], value, &format!("{what}.{key}"))),
        _ if what.ends_with(".port") => {}
        _ => assert_eq!(got, wanted, "{what}"),
    }
}
