//! A node with the real kubelet, on which what was installed runs: pods as the controllers of DaemonSet and Deployment would make them.

use std::{net::SocketAddr, path::Path, sync::Mutex, time::Duration};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{GUARDED, install, rendered};
use crate::support::{
    agent,
    cluster::{Cluster, Pod, name_of},
    eventually, free_port, http,
    manifests::{self, NAMESPACE, named},
    node::{Image, Node},
    plane::Plane,
};

pub const PATIENCE: Duration = Duration::from_secs(60);
/// As the manifests name it.
const IMAGE: &str = concat!("sds-agent:", env!("CARGO_PKG_VERSION"));

/// How a workload reaches its socket.
#[derive(Clone, Copy)]
pub struct Way {
    pub name: &'static str,
    pub socket: &'static str,
    /// Its volume, but for the name.
    pub volume: fn() -> Value,
}

pub struct Site {
    /// As rendered.
    pub objects: Vec<Value>,
    pub shop: String,
    ours: Mutex<Vec<Pod>>,
    pub node: Node,
    pub cluster: Cluster,
    _plane: Plane,
    _dir: TempDir,
}

/// A pod of ours.
pub struct Ours {
    pub pod: Pod,
    metrics: SocketAddr,
}

impl Site {
    /// Applies a mode's folder, all of it, and starts the node.
    pub async fn start(mode: &str) -> Self {
        let (cluster, plane) = Cluster::own(GUARDED).await;
        let dir = tempfile::tempdir().unwrap();
        let image = Image::of_programs(IMAGE, &dir.path().join("image"), &[agent::program()]).await;
        let objects = rendered(mode).await;
        install(&cluster, &objects).await;
        let node = Node::start(&cluster, dir.path(), &[image]).await;
        let shop = cluster.namespace().await;
        Self { objects, shop, ours: Mutex::default(), node, cluster, _plane: plane, _dir: dir }
    }

    /// A pod of a DaemonSet or Deployment on the node, running and ready; `keys` is the configuration's `keys`.
    ///
    /// The template is the one that the API server has. What is changed is what this node lacks: pods have no network of their own, so they
    /// take the host's, where each needs ports of its own; and no service has an address, so they are told the API server's. The image, the
    /// account, the token, all of the security context, mounts, probes and resources are the manifest's.
    pub async fn run(&self, kind: &str, workload: &str, name: &str, keys: &str) -> Ours {
        let ours = self.bind(kind, workload, name, keys).await;
        self.node.until_running(&ours.pod).await;
        ours
    }

    async fn bind(&self, kind: &str, workload: &str, name: &str, keys: &str) -> Ours {
        let (metrics, admin) = (free_port(), free_port());
        let mut map = named(&self.objects, "ConfigMap", "sds-agent").clone();
        map["metadata"]["name"] = json!(name);
        let text = map["data"]["config.yaml"].as_str().unwrap();
        let addresses = format!("metrics: {{ address: 0.0.0.0:{metrics} }}\nadmin: {{ address: 127.0.0.1:{admin} }}\n");
        map["data"]["config.yaml"] = json!(format!("{text}{addresses}keys: {keys}\n"));
        self.cluster.apply(&manifests::path(&map), &map).await;

        let controller = self.cluster.get(&manifests::path(named(&self.objects, kind, workload))).await;
        let mut pod = controller["spec"]["template"].clone();
        pod["metadata"]["name"] = json!(name);
        let spec = &mut pod["spec"];
        spec["nodeName"] = json!(self.node.name());
        spec["hostNetwork"] = json!(true);
        let volumes = spec["volumes"].as_array_mut().unwrap();
        volumes.iter_mut().find(|volume| volume["name"] == "config").unwrap()["configMap"]["name"] = json!(name);
        let container = &mut spec["containers"][0];
        container["ports"][0]["containerPort"] = json!(metrics);
        let server = self.cluster.address()["server"].as_str().unwrap().trim_start_matches("https://").to_owned();
        let (host, port) = server.rsplit_once(':').expect("an address with a port");
        let env = container["env"].as_array_mut().unwrap();
        for (name, value) in [("KUBERNETES_SERVICE_HOST", host), ("KUBERNETES_SERVICE_PORT", port)] {
            env.push(json!({"name": name, "value": value}));
        }
        let made = self.cluster.create(&format!("/api/v1/namespaces/{NAMESPACE}/pods"), &pod).await;
        let manifest = &named(&self.objects, kind, workload)["spec"]["template"]["spec"];
        let (wanted, got) = (&manifest["containers"][0], &made["spec"]["containers"][0]);
        for key in ["securityContext", "image", "args", "livenessProbe"] {
            assert_holds(&got[key], &wanted[key], key);
        }
        for key in ["securityContext", "hostPID", "serviceAccountName", "priorityClassName"] {
            assert_holds(&made["spec"][key], &manifest[key], key);
        }
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let (uid, service_account) = (text(&made["metadata"]["uid"]), text(&made["spec"]["serviceAccountName"]));
        let pod = Pod { namespace: NAMESPACE.to_owned(), name: name_of(&made), uid, service_account };
        self.ours.lock().unwrap().push(pod.clone());
        Ours { pod, metrics: SocketAddr::from(([127, 0, 0, 1], metrics)) }
    }

    /// A workload that follows its certificate and its roots on each of these sockets, each in a container of its own.
    pub async fn workload(&self, name: &str, ways: &[Way]) -> Pod {
        self.node.pod(&self.shop, name, &spec(ways, follow)).await
    }

    /// A pod that would serve on this socket itself, with what it has said of that.
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

    /// Waits until a workload has its own certificate and the roots on a socket.
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

    /// Waits until a workload has found the next agent.
    pub async fn assert_connected_again(&self, pod: &Pod, way: Way) {
        eventually(&format!("{} is connected again", pod.name), PATIENCE, async || {
            let log = self.node.container_log(pod, &container(way));
            if log.contains("connected again") { Ok(()) } else { Err(log) }
        })
        .await;
    }

    /// Lines of `/proc/<pid>/status` of a pod's process, as the node sees it.
    pub async fn process(&self, ours: &Ours, key: &str) -> String {
        let id = self.node.container(&ours.pod).await;
        let tools = crate::support::tools::node().join("ctr");
        let list = self.node.run(&[tools.to_str().unwrap(), "--namespace", "k8s.io", "tasks", "list"]).await;
        let list = String::from_utf8_lossy(&list.stdout).into_owned();
        let row = list.lines().find(|line| line.starts_with(&id)).unwrap_or_else(|| panic!("{id} is not in\n{list}"));
        let pid = row.split_whitespace().nth(1).expect("a pid");
        let status = self.node.run(&["cat", &format!("/proc/{pid}/status")]).await;
        let status = String::from_utf8_lossy(&status.stdout).into_owned();
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {key} in\n{status}")).trim().to_owned()
    }

    /// What a pod of ours exposes.
    pub async fn metrics(&self, ours: &Ours) -> String {
        http::get_ok(ours.metrics, "/metrics").await.unwrap()
    }
}

fn container(way: Way) -> String {
    format!("on-{}", way.name)
}

fn follow(socket: &str) -> Vec<String> {
    let words = ["/sds-agent", "fetch", "--watch", "--socket", socket, "--name", "default", "--name", "ROOTCA", "-o", "json"];
    words.map(str::to_owned).to_vec()
}

/// Of a pod with a container for each way.
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
                let log = ["sds-agent", "approver"].map(|container| self.node.container_log(pod, container)).concat();
                eprintln!("--- {} wrote:\n{log}---", pod.name);
            }
        }
    }
}

/// All that `wanted` says is so; the API server may have completed it.
fn assert_holds(got: &Value, wanted: &Value, what: &str) {
    match wanted {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| assert_holds(&got[key], value, &format!("{what}.{key}"))),
        _ if what.ends_with(".port") => {}
        _ => assert_eq!(got, wanted, "{what}"),
    }
}
