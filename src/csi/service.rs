//! The CSI services `Identity` and `Node` for the kubelet.
//!
//! The driver checks every field of a call before it creates anything. No log line or error has a value of the volume context, because it
//! may be a token.

use std::sync::Arc;

use agent_runtime::text;
use tonic::{Code, Request, Response, Status};
use tracing::warn;

use super::{
    metrics::{Call, Metrics},
    request,
    volumes::Volumes,
};
use crate::{
    build_info::VERSION,
    csi::proto::csi::v1::{
        GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
        NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse, NodePublishVolumeRequest,
        NodePublishVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, ProbeRequest, ProbeResponse,
        identity_server::Identity, node_server::Node,
    },
    per_pod::{PerPod, log::Cause, volume::Place},
};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::csi::service";

/// Maximum length of the target path in a log line, in characters.
const MAX_TARGET_CHARS: usize = 300;

/// Implements both services.
#[derive(Debug, Clone)]
pub struct Driver {
    /// `sockets.perPod`
    pub config: Arc<PerPod>,
    /// `NODE_NAME`
    pub node: Arc<str>,
    /// The volumes of pods.
    pub volumes: Volumes,
    /// The metrics of the driver.
    pub metrics: Metrics,
}

impl Driver {
    async fn publish(&self, request: &NodePublishVolumeRequest) -> Result<(), Status> {
        Ok(self.volumes.publish(request::check(request, &self.config)?).await?)
    }

    async fn unpublish(&self, request: &NodeUnpublishVolumeRequest) -> Result<(), Status> {
        if request.volume_id.is_empty() {
            return Err(Status::invalid_argument("volume_id is missing"));
        }
        let place = Place::of_target(&request.target_path, &self.config.kubelet_directory)?;
        Ok(self.volumes.unpublish(place).await?)
    }

    fn tell<T>(&self, call: Call, target: &str, result: Result<(), Status>, done: T) -> Result<Response<T>, Status> {
        self.metrics.called(call, result.as_ref().map_or_else(Status::code, |()| Code::Ok));
        if let Err(status) = &result {
            let place = Place::of_target(target, &self.config.kubelet_directory).ok();
            if let Some(left_out) = self.volumes.log().permit(Cause::Refused(place.clone(), call.as_str(), status.code())) {
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
        // The driver publishes volumes from its start, regardless of the agent.
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
