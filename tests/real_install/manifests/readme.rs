//! The commands of the READMEs for a cluster, in their order: the names, tags, directories and namespaces in them exist.
//!
//! kubectl is not used: the API server gets the objects that kubectl would apply. Helm is the real program.

use std::{path::Path, time::Duration};

use serde_json::Value;
use test_harness::{
    child,
    cluster::Cluster,
    manifests::{self, documents, install, kustomize, path},
    plane::Plane,
    tools,
    world::GUARDED,
};
use tokio::process::Command;

const PATIENCE: Duration = Duration::from_secs(60);
/// The control plane of the tests has an authority of this name, with another Secret.
const SEEDED: &str = "mesh-ca";

/// The shell block of a page that contains this line, as commands without comments.
fn commands(page: &str, line: &str) -> Vec<String> {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap();
    let block = text.split("```sh\n").skip(1).filter_map(|rest| rest.split("\n```").next()).find(|block| block.contains(line));
    let block = block.unwrap_or_else(|| panic!("{page} has no block with {line:?}")).replace("\\\n", " ");
    let lines = block.lines().map(|line| line.split(" #").next().unwrap().trim()).filter(|line| !line.is_empty());
    lines.flat_map(|line| line.split(" && ")).map(str::to_owned).collect()
}

struct Newcomer {
    cluster: Cluster,
    plane: Plane,
    images: Vec<String>,
}

impl Newcomer {
    async fn start() -> Self {
        let (cluster, plane) = Cluster::own(GUARDED).await;
        Self { cluster, plane, images: Vec::new() }
    }

    async fn run(&mut self, command: &str) {
        println!("figure: $ {command}");
        let words: Vec<_> = command.split_whitespace().collect();
        match words[..] {
            ["docker", "build", "-t", image, "."] => self.images.push(image.to_owned()),
            ["kubectl", "apply", "-k", folder] => {
                let objects = kustomize(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).await;
                install(&self.cluster, &objects).await;
                self.assert_images_are_there(&objects);
            }
            ["kubectl", "apply", "-f", file] => {
                let mut objects = documents(&manifests::read(file.strip_prefix("daemonset/").unwrap()));
                objects.retain(|object| object["metadata"]["name"] != SEEDED || object["kind"] != "ClusterIssuer");
                install(&self.cluster, &objects).await;
            }
            // The object exists and is ready.
            ["kubectl", "wait", _, object, _] => {
                assert_eq!(object, format!("clusterissuer/{SEEDED}"));
                self.cluster.get(&format!("/apis/cert-manager.io/v1/clusterissuers/{SEEDED}")).await;
            }
            ["kubectl", "create", "configmap", name, "-n", namespace, ..] => {
                assert_eq!((namespace, name), ("cert-manager", "mesh-roots"));
                assert!(command.contains("--from-literal=ca.crt="), "{command}");
            }
            ["helm", ..] => {
                let mut helm = Command::new(tools::helm());
                helm.args(&words[1..]).arg("--kubeconfig").arg(self.plane.kubeconfig()).current_dir(env!("CARGO_MANIFEST_DIR"));
                let output = child::finish(helm, PATIENCE).await;
                assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
                let made = self.cluster.get("/apis/apps/v1/namespaces/sds-agent/daemonsets/sds-agent").await;
                self.assert_images_are_there(&[made]);
            }
            _ => panic!("the test does not know this command: {command}"),
        }
    }

    /// Asserts that the image that was built is the one that the pods name.
    fn assert_images_are_there(&self, objects: &[Value]) {
        let pods = objects.iter().map(|object| &object["spec"]["template"]["spec"]).filter(|pod| pod.is_object());
        let mut count = 0;
        for container in pods.flat_map(|pod| pod["containers"].as_array().unwrap()) {
            let image = container["image"].as_str().unwrap();
            assert!(self.images.iter().any(|built| built == image), "{image} was never built, only {:?}", self.images);
            count += 1;
        }
        assert!(count > 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_for_a_cluster_work_as_printed() {
    let (readme, folder) = ("README.md", "daemonset/README.md");
    // The installation, and two alternatives to its second command.
    let blocks = ["kubectl apply -k daemonset/shared", "kubectl apply -k daemonset/per-pod", "helm install"];
    let all = blocks.map(|line| commands(readme, line)).concat();
    assert!(all.len() >= 8, "{all:?}");
    let mut newcomer = Newcomer::start().await;
    for command in all.iter().filter(|command| !command.starts_with("helm")) {
        newcomer.run(command).await;
    }
    for command in commands(folder, "kubectl apply -k daemonset/shared") {
        newcomer.run(&command).await;
    }
    // Helm does not adopt objects of another tool, so this part uses another cluster.
    let mut newcomer = Newcomer::start().await;
    let by_helm = |command: &&String| !command.contains(" -k ");
    for command in all.iter().filter(by_helm) {
        newcomer.run(command).await;
    }
    let namespace = newcomer.cluster.get(&path(&documents(&manifests::read("base/namespace.yaml"))[0])).await;
    assert_eq!(namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "privileged");
}
