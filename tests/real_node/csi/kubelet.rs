//! A kubelet from the point of view of a CSI driver: it finds the registration socket, calls it, reports the result, and then calls the
//! driver with its own paths and the volume contexts of pods.
//!
//! Registration uses grpc-go with the `:authority` that the kubelet sends: the path of the socket, percent-encoded.

use std::{
    collections::HashMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::future::BoxFuture;
use http::{Request, Response, Uri};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use sds_agent::csi::proto::csi::v1::{
    GetPluginInfoRequest, NodeGetCapabilitiesRequest, NodeGetInfoRequest, NodePublishVolumeRequest, NodeUnpublishVolumeRequest,
    VolumeCapability,
    identity_client::IdentityClient,
    node_client::NodeClient,
    volume_capability::{AccessType, MountVolume},
};
use serde_json::{Value, json};
use test_harness::{child, cluster::Pod, eventually, node::DRIVER, tools};
use tokio::{net::UnixStream, time::timeout};
use tonic::{Status, body::Body};

/// The kubelet's own timeout.
const CALL: Duration = Duration::from_secs(120);
const START: Duration = Duration::from_secs(30);

/// A kubelet.
#[derive(Clone)]
pub struct Kubelet {
    directory: PathBuf,
}

impl Kubelet {
    /// Creates a kubelet with its files in `directory`.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    pub fn registration_socket(&self) -> PathBuf {
        self.directory.join("plugins_registry").join(format!("{DRIVER}-reg.sock"))
    }

    pub fn driver_socket(&self) -> PathBuf {
        self.directory.join("plugins").join(DRIVER).join("csi.sock")
    }

    /// Finds the driver and registers it.
    pub async fn register(&self) {
        let socket = self.registration_socket();
        eventually("the registration socket", START, async || socket.exists().then_some(()).ok_or_else(|| "it is not there".into())).await;
        let info = self.ask("GetInfo", &json!({})).await;
        assert_eq!(info["type"], "CSIPlugin", "{info}");
        assert_eq!(info["name"], DRIVER);
        assert_eq!(info["supportedVersions"], json!(["1.0.0"]));
        let endpoint = self.driver_socket();
        assert_eq!(info["endpoint"].as_str(), endpoint.to_str());

        let mut identity = self.identity().await.expect("the driver's socket");
        let told = identity.get_plugin_info(GetPluginInfoRequest {}).await.expect("the driver identifies itself").into_inner();
        assert_eq!(told.name, DRIVER);
        let mut node = self.node().await.expect("the driver's socket");
        node.node_get_capabilities(NodeGetCapabilitiesRequest {}).await.expect("and what it can do");
        let told = node.node_get_info(NodeGetInfoRequest {}).await.expect("and where it is").into_inner();
        assert!(!told.node_id.is_empty());
        self.ask("NotifyRegistrationStatus", &json!({"pluginRegistered": true})).await;
    }

    /// Makes one call of the registration as grpc-go does for a kubelet.
    pub async fn ask(&self, method: &str, message: &Value) -> Value {
        let socket = self.registration_socket();
        let (protos, message) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("proto"), message.to_string());
        let (authority, address) = (percent_encoded(&socket), format!("unix://{}", socket.display()));
        let method = format!("pluginregistration.Registration/{method}");
        let protos = protos.to_str().expect("a plain path");
        let mut arguments = vec!["-plaintext", "-authority", &authority, "-import-path", protos];
        arguments.extend(["-proto", "pluginregistration/v1/registration.proto", "-d", &message, &address, &method]);
        let answer = child::succeed(&tools::grpcurl(), &arguments, START).await;
        serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{method}: {e}: {answer}"))
    }

    /// The target path of a pod's volume.
    pub fn target(&self, uid: &str, volume: &str) -> PathBuf {
        self.directory.join("pods").join(uid).join("volumes/kubernetes.io~csi").join(volume).join("mount")
    }

    /// The publish request for a pod's volume with these attributes.
    pub fn request(&self, pod: &Pod, volume: &str, attributes: &[(&str, &str)]) -> NodePublishVolumeRequest {
        let own = [
            ("csi.storage.k8s.io/pod.name", pod.name.as_str()),
            ("csi.storage.k8s.io/pod.namespace", &pod.namespace),
            ("csi.storage.k8s.io/pod.uid", &pod.uid),
            ("csi.storage.k8s.io/serviceAccount.name", &pod.service_account),
            ("csi.storage.k8s.io/ephemeral", "true"),
        ];
        // The kubelet's own attributes take precedence if the CSIDriver object requests them.
        let context: HashMap<_, _> = attributes.iter().chain(&own).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        NodePublishVolumeRequest {
            volume_id: format!("csi-{}-{volume}", pod.uid),
            target_path: self.target(&pod.uid, volume).display().to_string(),
            volume_capability: Some(VolumeCapability { access_type: Some(AccessType::Mount(MountVolume::default())) }),
            readonly: true,
            secrets: HashMap::new(),
            volume_context: context,
        }
    }

    /// Publishes a volume and returns its target.
    pub async fn publish(&self, pod: &Pod, volume: &str) -> PathBuf {
        let request = self.request(pod, volume, &[]);
        self.publish_as(request).await.unwrap_or_else(|status| panic!("publish: {status:?}"))
    }

    /// Publishes any request. Like the kubelet, it creates the parent directory of the target, and removes it after an error.
    pub async fn publish_as(&self, request: NodePublishVolumeRequest) -> Result<PathBuf, Status> {
        let target = PathBuf::from(&request.target_path);
        let is_its_own = target.starts_with(self.directory.join("pods")) && !request.target_path.contains("/../");
        let was_there = target.symlink_metadata().is_ok();
        let answer = self.call_publish(request).await;
        // The kubelet does not remove a mount point. This code cannot see mounts of the host, and a removal would unmount it.
        if answer.is_err() && is_its_own && !was_there {
            for empty in target.ancestors().take_while(|path| !path.ends_with("pods")) {
                let _ = fs::remove_dir(empty);
            }
        }
        answer.map(|_| target)
    }

    /// Calls publish, and leaves the directories as they are afterwards.
    pub async fn call_publish(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        let target = Path::new(&request.target_path);
        let is_its_own = target.starts_with(self.directory.join("pods")) && !request.target_path.contains("/../");
        if let Some(parent) = target.parent().filter(|_| is_its_own) {
            // The driver has to reject a path that no file system accepts.
            let _ = fs::create_dir_all(parent);
        }
        let mut node = self.node().await?;
        timeout(CALL, node.node_publish_volume(request)).await.expect("the driver answers in time").map(drop)
    }

    /// Calls unpublish for a volume.
    pub async fn unpublish_quietly(&self, uid: &str, volume: &str) -> Result<(), Status> {
        let target_path = self.target(uid, volume).display().to_string();
        let request = NodeUnpublishVolumeRequest { volume_id: format!("csi-{uid}-{volume}"), target_path };
        let mut node = self.node().await?;
        timeout(CALL, node.node_unpublish_volume(request)).await.expect("the driver answers in time").map(drop)
    }

    /// Unpublishes a volume and removes the directories that were created for it.
    pub async fn unpublish(&self, uid: &str, volume: &str) {
        self.unpublish_quietly(uid, volume).await.unwrap_or_else(|status| panic!("unpublish: {status:?}"));
        let target = self.target(uid, volume);
        assert!(!target.exists(), "the driver leaves the target behind");
        for own in target.ancestors().skip(1).take(4) {
            let _ = fs::remove_dir(own);
        }
    }

    async fn identity(&self) -> Result<IdentityClient<Connection>, Status> {
        Ok(IdentityClient::with_origin(self.dial().await?, Uri::from_static("http://localhost")))
    }

    async fn node(&self) -> Result<NodeClient<Connection>, Status> {
        Ok(NodeClient::with_origin(self.dial().await?, Uri::from_static("http://localhost")))
    }

    /// Opens a connection for each call, as the kubelet does.
    async fn dial(&self) -> Result<Connection, Status> {
        let unavailable = |error: &dyn std::error::Error| Status::unavailable(format!("the driver's socket: {error}"));
        let stream = UnixStream::connect(self.driver_socket()).await.map_err(|error| unavailable(&error))?;
        let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(|error| unavailable(&error))?;
        tokio::spawn(connection);
        Ok(Connection(sender))
    }
}

/// grpc-go encodes a name that is not a valid authority in this way.
fn percent_encoded(path: &Path) -> String {
    let mut out = String::new();
    for byte in path.to_str().expect("a plain path").bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            other => write!(out, "%{other:02X}").expect("writing to a string"),
        }
    }
    out
}

/// The sending half of a connection.
#[derive(Clone)]
struct Connection(http2::SendRequest<Body>);

impl tower::Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
