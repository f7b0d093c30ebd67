//! What the kubelet may ask: who the driver is, and a socket for a pod.
//!
//! A call is checked from end to end before anything is made, and never waits for the upstream longer than it says. A volume context is
//! never shown, as it may hold tokens.

use std::{sync::Arc, time::Duration};

use agent_runtime::text;
use attest_kubernetes::pods::Pods;
use sds_server::attest::Reason;
use tokio::{sync::watch, time::timeout};
use tonic::{Code, Request, Response, Status};
use tracing::warn;
use workload_identity::Resolver;

use super::{
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

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::csi::service";

/// How long the index may take to say that a pod does not exist. When it cannot tell by then, the socket is published all the same: no
/// key leaves on the kubelet's word.
const CONFIRMATION: Duration = Duration::from_secs(3);

/// Characters of a call's target path that the log shows.
const MAX_TARGET_CHARS: usize = 300;

/// Both services.
#[derive(Debug, Clone)]
pub struct Driver {
    /// `sockets.perPod`
    pub config: Arc<PerPod>,
    /// `NODE_NAME`
    pub node: Arc<str>,
    /// The sockets.
    pub sockets: Sockets,
    /// How callers are named.
    pub resolver: watch::Receiver<Arc<Resolver>>,
    /// What is counted.
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
        // The pod starts without it, too.
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
            let target = text::excerpt(target, MAX_TARGET_CHARS);
            let cause = text::excerpt(status.message(), text::MAX_MESSAGE_CHARS);
            // Each time: the kubelet backs off, up to two minutes for each volume.
            warn!(target: LOG_TARGET, ?call, ?target, code = ?status.code(), cause, "refused a call of the kubelet");
        }
        result.map(|()| Response::new(done))
    }
}

/// Asks the index about the pod, where it is complete.
async fn confirm(pods: &Pods, resolver: &Resolver, volume: &Volume) -> Result<(), Status> {
    if !*pods.synced().borrow() {
        return Ok(());
    }
    let (claim, name) = (&volume.claim, &volume.place.volume);
    match timeout(CONFIRMATION, pods.wait_for(&claim.pod.uid)).await {
        Ok(Ok(known)) => {
            claim.check(&known.pod, name).map_err(|error| Status::permission_denied(error.detail))?;
            // No service account, or a profile that it may not pick.
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
        // It publishes from the first moment on, whatever the upstream does.
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
