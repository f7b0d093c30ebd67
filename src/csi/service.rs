//! The CSI services `Identity` and `Node` for the kubelet.
//!
//! The driver checks every field of a call before it creates anything. A publish call waits at most 3 s for the pod index, and at most
//! `waitForCertificate` for a certificate. No log line or error has a value of the volume context, because it may be a token.

use std::{sync::Arc, time::Duration};

use agent_runtime::text;
use attest_kubernetes::pods::Pods;
use sds_server::attest::Reason;
use tokio::{sync::watch, time::timeout};
use tonic::{Code, Request, Response, Status};
use tracing::warn;
use workload_identity::Resolver;

use super::{
    log::Cause,
    metrics::{Call, Metrics},
    sockets::Sockets,
    volume::{Place, Volume},
};
use crate::{
    build_info::VERSION,
    csi::{
        PerPod,
        proto::csi::v1::{
            GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
            NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse, NodePublishVolumeRequest,
            NodePublishVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, ProbeRequest, ProbeResponse,
            identity_server::Identity, node_server::Node,
        },
    },
};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::csi::service";

/// Time limit for the pod index to report that a pod does not exist. After it the driver publishes the socket without confirmation: no key
/// is sent before the index confirms the pod.
const CONFIRMATION: Duration = Duration::from_secs(3);

/// Maximum length of the target path in a log line, in characters.
const MAX_TARGET_CHARS: usize = 300;

/// Implements both services.
#[derive(Debug, Clone)]
pub struct Driver {
    /// `sockets.perPod`
    pub config: Arc<PerPod>,
    /// `NODE_NAME`
    pub node: Arc<str>,
    /// The sockets of pods.
    pub sockets: Sockets,
    /// Derives the identity of a pod.
    pub resolver: watch::Receiver<Arc<Resolver>>,
    /// The metrics of the driver.
    pub metrics: Metrics,
}

impl Driver {
    async fn publish(&self, request: &NodePublishVolumeRequest) -> Result<(), Status> {
        let volume = Volume::check(request, &self.config)?;
        if self.sockets.is_published(&volume).await? {
            return Ok(());
        }
        let resolver = self.resolver.borrow().clone();
        confirm(self.sockets.pods(), &resolver, &volume).await?;
        let published = self.sockets.publish(volume).await?;
        // After a timeout the pod starts without its certificate.
        let _ = timeout(self.config.wait_for_certificate, published.issued.cancelled()).await;
        Ok(())
    }

    async fn unpublish(&self, request: &NodeUnpublishVolumeRequest) -> Result<(), Status> {
        if request.volume_id.is_empty() {
            return Err(Status::invalid_argument("volume_id is missing"));
        }
        let place = Place::of_target(&request.target_path, &self.config.kubelet_directory)?;
        Ok(self.sockets.unpublish(place).await?)
    }

    fn tell<T>(&self, call: Call, target: &str, result: Result<(), Status>, done: T) -> Result<Response<T>, Status> {
        self.metrics.called(call, result.as_ref().map_or_else(Status::code, |()| Code::Ok));
        if let Err(status) = &result {
            let place = Place::of_target(target, &self.config.kubelet_directory).ok();
            if let Some(left_out) = self.sockets.log().permit(Cause::Refused(place.clone(), call, status.code())) {
                let (pod_uid, volume) = place.map(|place| (place.uid, place.volume)).unzip();
                let target = text::excerpt(target, MAX_TARGET_CHARS);
                let cause = text::excerpt(status.message(), text::MAX_MESSAGE_CHARS);
                // In JSON, the field `target` of the line itself takes precedence over this one.
                warn!(
                    target: LOG_TARGET, ?call,
                    pod_uid = pod_uid.as_deref(),
                    volume = volume.as_deref(),
                    ?target,
                    code = ?status.code(),
                    cause,
                    left_out,
                    "refused a call of the kubelet"
                );
            }
        }
        result.map(|()| Response::new(done))
    }
}

/// Checks the volume against the pod index, if the index is in sync.
async fn confirm(pods: &Pods, resolver: &Resolver, volume: &Volume) -> Result<(), Status> {
    if !*pods.synced().borrow() {
        return Ok(());
    }
    let (claim, name) = (&volume.claim, &volume.place.volume);
    match timeout(CONFIRMATION, pods.wait_for(&claim.pod.uid)).await {
        Ok(Ok(known)) => {
            claim.check(&known.pod, name).map_err(|error| Status::permission_denied(error.detail))?;
            // An error means that the pod has no service account, or picks a profile that it may not pick.
            let decided = resolver.decide(&known.pod.workload_at(name));
            decided.map(drop).map_err(|error| Status::failed_precondition(error.to_string()))
        }
        Ok(Err(error)) if error.reason == Reason::unknown_pod => Err(Status::not_found(error.detail)),
        Ok(Err(error)) if !error.temporary => Err(Status::failed_precondition(error.detail)),
        Ok(Err(_)) | Err(_) => Ok(()),
    }
}

#[tonic::async_trait]
impl Identity for Driver {
    async fn get_plugin_info(&self, _: Request<GetPluginInfoRequest>) -> Result<Response<GetPluginInfoResponse>, Status> {
        let (name, vendor_version) = (self.config.driver_name.clone(), VERSION.to_owned());
        Ok(Response::new(GetPluginInfoResponse { name, vendor_version }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        Ok(Response::new(GetPluginCapabilitiesResponse {}))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        // The driver publishes sockets from its start, regardless of the API server and issuers.
        Ok(Response::new(ProbeResponse { ready: Some(true) }))
    }
}

#[tonic::async_trait]
impl Node for Driver {
    async fn node_publish_volume(&self, request: Request<NodePublishVolumeRequest>) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let result = self.publish(&request).await;
        self.tell(Call::publish, &request.target_path, result, NodePublishVolumeResponse {})
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let result = self.unpublish(&request).await;
        self.tell(Call::unpublish, &request.target_path, result, NodeUnpublishVolumeResponse {})
    }

    async fn node_get_capabilities(&self, _: Request<NodeGetCapabilitiesRequest>) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        Ok(Response::new(NodeGetCapabilitiesResponse {}))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse { node_id: self.node.to_string() }))
    }
}
