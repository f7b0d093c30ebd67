//! A node with the real kubelet and the real containerd, which run the pods that the API server binds to it: `tests/node`.
//!
//! It has its own mount and process namespaces, and one cgroup for everything below. Its usual directories (`/var/lib/kubelet`, `/run`)
//! are file systems in memory that only the node sees. So several nodes can exist at once, and a killed node leaves only its cgroups,
//! which are removed here. Pods have the host's network and no other. The node pulls no image: the tests build them ([`Image`]).

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
    sync::atomic::{AtomicU8, Ordering},
    time::Duration,
};

use aws_lc_rs::digest;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::{
    cgroups::Tree,
    child::{self, Child},
    cluster::{Cluster, Pod, name_of},
    eventually,
    host::{self, Mount},
    paths, tools,
};

/// Limit until pods can be bound to a node, and until a pod runs or is deleted, on a busy machine.
const START: Duration = Duration::from_secs(120);
const POD: Duration = Duration::from_secs(60);
/// Limit for a program in a container.
const PROGRAM: Duration = Duration::from_secs(30);
/// Number of log lines that are printed when a test fails.
const SHOWN_LINES: usize = 12;

/// The agent's name as a CSI driver.
pub const DRIVER: &str = "csi.sds-agent.io";
/// The image of a container that does nothing, and of the first container of every pod.
pub const PAUSE: &str = "sds-agent.test/pause:1";

/// An image for a node's containerd: a root file system and the name that pods use.
pub struct Image {
    name: String,
    root: PathBuf,
    program: String,
}

impl Image {
    /// An image of everything below `root`. It runs `program` in pods that name no command.
    pub fn new(name: &str, root: &Path, program: &str) -> Self {
        Self { name: name.to_owned(), root: root.to_owned(), program: program.to_owned() }
    }

    /// An image of programs of this machine and their shared libraries. The programs are in `/`, and the image runs the first one. The
    /// root file system is created in `root`.
    pub async fn of_programs(name: &str, root: &Path, programs: &[&Path]) -> Self {
        fs::create_dir_all(root).expect("a folder for the image");
        for program in programs {
            let file = program.file_name().expect("a program has a name");
            fs::copy(program, root.join(file)).unwrap_or_else(|e| panic!("cannot copy {}: {e}", program.display()));
            // For a static program, ldd reports this and fails.
            let libraries = child::run(&tools::system("ldd", "libc-bin"), &[program.to_str().expect("a plain path")], PROGRAM).await;
            for library in String::from_utf8_lossy(&libraries.stdout).split_whitespace().filter(|word| word.starts_with('/')) {
                let copy = root.join(library.trim_start_matches('/'));
                fs::create_dir_all(copy.parent().expect("it has one")).expect("a folder for the libraries");
                fs::copy(library, &copy).unwrap_or_else(|e| panic!("cannot copy {library}: {e}"));
            }
        }
        let first = programs.first().and_then(|program| program.file_name()).expect("a program at least");
        Self::new(name, root, &format!("/{}", first.display()))
    }

    /// Packs the image in the format of `docker save`; `work` is for temporary files.
    async fn pack(&self, work: &Path, archive: &Path) {
        fs::create_dir_all(work).expect("a folder for the pieces");
        let layer = work.join("layer.tar");
        pack(&layer, &self.root, ".").await;
        let digest = digest::digest(&digest::SHA256, &fs::read(&layer).expect("the layer just packed"));
        let digest: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = json!({
            "os": "linux", "architecture": architecture, "config": {"Entrypoint": [self.program]},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
        });
        let manifest = json!([{"Config": "config.json", "RepoTags": [self.name], "Layers": ["layer.tar"]}]);
        fs::write(work.join("config.json"), config.to_string()).expect("the image's configuration");
        fs::write(work.join("manifest.json"), manifest.to_string()).expect("the image's manifest");
        pack(archive, work, "manifest.json config.json layer.tar").await;
    }
}

async fn pack(archive: &Path, folder: &Path, names: &str) {
    let mut command = Command::new(tools::system("tar", "tar"));
    command.arg("--create").arg("--file").arg(archive).arg("--directory").arg(folder);
    command.args(["--owner=0", "--group=0"]).args(names.split(' '));
    let output = child::finish(command, PROGRAM).await;
    assert!(output.status.success(), "tar: {}", String::from_utf8_lossy(&output.stderr));
}

/// A running node. Dropping it kills and unmounts everything on it.
pub struct Node {
    // Drop order: first the processes, then their cgroups.
    processes: Child,
    cgroups: Tree,
    cluster: Cluster,
    dir: PathBuf,
    name: String,
}

impl Node {
    /// Starts containerd with these images, and a kubelet that joins `cluster`. Logs and other files are written into `dir`.
    pub async fn start(cluster: &Cluster, dir: &Path, images: &[Image]) -> Self {
        // A kubelet needs an address for its node, and accepts an address as its name. Loopback has enough of them.
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let [high, low] = u16::try_from(std::process::id() % 0xffff).expect("so small").to_be_bytes();
        let name = format!("127.{}.{high}.{low}", 100 + NEXT.fetch_add(1, Ordering::Relaxed));

        let dir = dir.join(format!("node-{name}"));
        fs::create_dir_all(dir.join("images")).expect("the node's folder");
        let access = cluster.access_as(&format!("system:node:{name}"), &["system:nodes"]);
        fs::write(dir.join("kubelet.kubeconfig"), access.to_string()).expect("the kubelet's access");
        let pause = Image::of_programs(PAUSE, &dir.join("pause"), &[&tools::node().join("pause")]).await;
        for (number, image) in [&pause].into_iter().chain(images).enumerate() {
            image.pack(&dir.join(format!("image-{number}")), &dir.join(format!("images/{number}.tar"))).await;
        }

        let root = format!("sds-agent-test-{name}");
        let cgroups = Tree::new(&root, "node");
        let mut command = cgroups.command(&tools::system("unshare", "util-linux"));
        command.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]);
        command.arg(paths::root().join("tests/node/node.sh"));
        command.arg(&dir).arg(tools::node()).arg(&name).arg(format!("/{root}"));
        let processes = Child::spawn_tied("the node", &mut command);
        let node = Self { processes, cgroups, cluster: cluster.clone(), dir, name };
        let ready = |lines: &[String]| lines.iter().any(|line| line == "ready").then_some(());
        node.processes.stdout().until("containerd with its images", START, ready).await;
        let path = format!("/api/v1/nodes/{}", node.name);
        eventually("the kubelet has joined", START, async || node.cluster.try_get(&path).await.map(drop).map_err(|e| e.to_string())).await;
        node
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The words before a program that runs on the node itself and ends with the words.
    pub fn words(&self) -> Vec<String> {
        let own = format!("/proc/{}/ns", self.processes.pid());
        let nsenter = tools::system("nsenter", "util-linux").display().to_string();
        let setpriv = tools::setpriv().display().to_string();
        let (mounts, processes) = (format!("--mount={own}/mnt"), format!("--pid={own}/pid_for_children"));
        vec![nsenter, mounts, processes, setpriv, "--pdeathsig".into(), "KILL".into()]
    }

    /// The words before a program in the cgroup of a pod's first container: it runs on the host, but belongs to that pod.
    pub async fn words_as(&self, pod: &Pod) -> Vec<String> {
        let moves = self.cgroups.moves(&self.container(pod).await);
        let mut words = self.words();
        words.extend(["sh".into(), "-c".into(), format!("{moves}exec \"$0\" \"$@\"")]);
        words
    }

    /// Runs a program on the node to its end.
    pub async fn run(&self, program: &[&str]) -> Output {
        let words = self.words();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(program);
        child::finish(command, PROGRAM).await
    }

    /// The path under which this process sees the node's `path`.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.processes.pid()))
    }

    /// The mounts below the node's `place`.
    pub fn mounts(&self, place: &str) -> Vec<Mount> {
        let mounts = host::mounts(self.processes.pid());
        mounts.into_iter().filter(|mount| mount.target.starts_with(place)).collect()
    }

    /// Binds a new pod to the node and waits until it runs. `spec` needs only containers and volumes. A service account with the pod's
    /// name is created unless `spec` names one.
    pub async fn pod(&self, namespace: &str, name: &str, spec: &Value) -> Pod {
        let pod = self.bound_pod(namespace, name, spec).await;
        self.until_running(&pod).await;
        pod
    }

    /// Waits until a pod's containers run.
    pub async fn until_running(&self, pod: &Pod) {
        eventually("the pod runs", POD, async || {
            let status = self.cluster.get(&pod.path()).await["status"].take();
            let ready = |row: &Value| row["ready"] == true;
            let all = status["containerStatuses"].as_array().is_some_and(|rows| rows.iter().all(ready));
            if status["phase"] == "Running" && all { Ok(()) } else { Err(format!("{status}\n{}", self.log("kubelet"))) }
        })
        .await;
    }

    /// Binds a new pod to the node without waiting.
    pub async fn bound_pod(&self, namespace: &str, name: &str, spec: &Value) -> Pod {
        let mut spec = spec.clone();
        if spec["serviceAccountName"].is_null() {
            let account = json!({"metadata": {"name": name}});
            self.cluster.create(&format!("/api/v1/namespaces/{namespace}/serviceaccounts"), &account).await;
        }
        let own = json!({
            "serviceAccountName": name, "nodeName": self.name, "automountServiceAccountToken": false, "enableServiceLinks": false,
            "hostNetwork": true, "terminationGracePeriodSeconds": 1, "tolerations": [{"operator": "Exists"}],
        });
        for (key, value) in own.as_object().expect("an object") {
            spec.as_object_mut().expect("an object").entry(key).or_insert_with(|| value.clone());
        }
        let pods = format!("/api/v1/namespaces/{namespace}/pods");
        let pod = self.cluster.create(&pods, &json!({"metadata": {"name": name}, "spec": spec})).await;
        Pod {
            namespace: namespace.to_owned(),
            name: name_of(&pod),
            uid: pod["metadata"]["uid"].as_str().expect("the API server gives each pod a UID").to_owned(),
            service_account: pod["spec"]["serviceAccountName"].as_str().expect("it has one").to_owned(),
        }
    }

    /// Deletes a pod and waits until the kubelet has removed it.
    pub async fn delete(&self, pod: &Pod) {
        self.cluster.delete(&pod.path()).await;
        eventually("the pod is deleted", POD, async || match self.cluster.try_get(&pod.path()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(e) => Err(e.to_string()),
            Ok(pod) => Err(format!("{}\n{}", pod["status"], self.log("kubelet"))),
        })
        .await;
    }

    /// The ID of a pod's container; of an agent's pod with several containers, that of the agent.
    pub async fn container(&self, pod: &Pod) -> String {
        let statuses = self.containers(pod).await;
        let agent = statuses.iter().find(|status| status["name"] == "sds-agent");
        id_of(agent.unwrap_or(&statuses[0]))
    }

    /// The ID of the container of a pod with this name.
    pub async fn container_of(&self, pod: &Pod, name: &str) -> String {
        let statuses = self.containers(pod).await;
        id_of(statuses.iter().find(|status| status["name"] == name).unwrap_or_else(|| panic!("no {name} in {statuses:?}")))
    }

    async fn containers(&self, pod: &Pod) -> Vec<Value> {
        let seen = self.cluster.get(&pod.path()).await;
        seen["status"]["containerStatuses"].as_array().expect("it has containers").clone()
    }

    /// Runs a program in a pod's [`container`](Self::container) to its end.
    pub async fn exec(&self, pod: &Pod, program: &[&str]) -> Output {
        let (ctr, id) = (tools::node().join("ctr"), self.container(pod).await);
        let exec_id = format!("test-{:x}", fastrand::u64(..));
        let mut words = vec![ctr.to_str().expect("a plain path"), "--namespace", "k8s.io", "tasks", "exec", "--exec-id", &exec_id, &id];
        words.extend(program);
        self.run(&words).await
    }

    /// Kills a pod's [`container`](Self::container). The kubelet restarts it.
    pub async fn kill(&self, pod: &Pod) {
        self.kill_container(self.container(pod).await).await;
    }

    /// Kills the container of a pod with this name. The kubelet restarts it.
    pub async fn kill_in(&self, pod: &Pod, name: &str) {
        self.kill_container(self.container_of(pod, name).await).await;
    }

    async fn kill_container(&self, id: String) {
        let ctr = tools::node().join("ctr");
        let output =
            self.run(&[ctr.to_str().expect("a plain path"), "--namespace", "k8s.io", "tasks", "kill", "--signal", "KILL", &id]).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The output of a container with times, of all its starts that the kubelet still keeps.
    pub fn container_log(&self, pod: &Pod, container: &str) -> String {
        let place = self.path(&format!("/var/log/pods/{}_{}_{}/{container}", pod.namespace, pod.name, pod.uid));
        let starts = fs::read_dir(place).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut starts: Vec<_> = starts.filter(|path| path.extension().is_some_and(|extension| extension == "log")).collect();
        starts.sort_by_key(|path| path.file_stem().and_then(|stem| stem.to_str()?.parse::<u32>().ok()));
        starts.into_iter().map(|path| fs::read_to_string(path).unwrap_or_default()).collect()
    }

    /// The last lines of the log of `containerd` or `kubelet`.
    pub fn log(&self, program: &str) -> String {
        let text = fs::read_to_string(self.dir.join(format!("{program}.log"))).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for program in ["containerd", "kubelet"] {
                eprintln!("--- {program} on {} wrote at last:\n{}\n---", self.name, self.log(program));
            }
        }
        self.processes.signal(Signal::SIGKILL);
    }
}

fn id_of(status: &Value) -> String {
    status["containerID"].as_str().expect("it runs").trim_start_matches("containerd://").to_owned()
}
