//! The service for the mount helper.
//!
//! A call that the agent cannot serve now ends with UNAVAILABLE, and the mount helper publishes the volume without it. Any other error is a
//! refusal, which the kubelet reports in an Event on the pod. No error has a value of the kubelet's call.

use std::{sync::Arc, time::Duration};

use attest_kubernetes::pods::Pods;
use futures::future::join_all;
use sds_server::attest::Reason;
use tokio::{sync::watch, time::timeout};
use tonic::{Request, Response, Status};
use tracing::warn;
use workload_identity::{PodRef, Resolver};

use super::sockets::Sockets;
use crate::per_pod::{
    CONFIRMATION,
    interface::{
        FindEndedRequest, FindEndedResponse, ServeRequest, ServeResponse, WithdrawRequest, WithdrawResponse, pod_sockets_server::PodSockets,
    },
    volume::{Place, Volume},
};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::pod_sockets::service";

/// Implements the service.
#[derive(Debug, Clone)]
pub struct Service {
    /// The agent's own pod.
    pub own: Option<PodRef>,
    /// `waitForCertificate`
    pub wait: Duration,
    /// The sockets of pods.
    pub sockets: Sockets,
    /// Derives the identity of a pod.
    pub resolver: watch::Receiver<Arc<Resolver>>,
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

impl Service {
    /// Returns whether the pod of `place` no longer exists: the complete pod index and a read of the API server confirm that.
    async fn has_ended(&self, place: &Place) -> Result<bool, Status> {
        match self.sockets.pods().wait_for(&place.uid).await {
            Err(error) if error.reason == Reason::unknown_pod => Ok(true),
            // The pod exists, or the index knows that it has ended: the kubelet unpublishes its volumes.
            Ok(_) => Ok(false),
            Err(error) if !error.temporary => Ok(false),
            Err(_) => Err(Status::unavailable("the API server does not say whether a pod exists")),
        }
    }
}

#[tonic::async_trait]
impl PodSockets for Service {
    async fn serve(&self, request: Request<ServeRequest>) -> Result<Response<ServeResponse>, Status> {
        let volume = Volume::try_from(request.into_inner())?;
        if !self.sockets.is_served(&volume).await? {
            let resolver = self.resolver.borrow().clone();
            confirm(self.sockets.pods(), &resolver, &volume).await?;
            let served = self.sockets.serve(volume).await?;
            // After a timeout the pod starts without its certificate.
            let _ = timeout(self.wait, served.issued.cancelled()).await;
        }
        Ok(Response::new(ServeResponse {}))
    }

    async fn withdraw(&self, request: Request<WithdrawRequest>) -> Result<Response<WithdrawResponse>, Status> {
        self.sockets.withdraw(Place::try_from(request.into_inner().volume)?).await?;
        Ok(Response::new(WithdrawResponse {}))
    }

    async fn find_ended(&self, request: Request<FindEndedRequest>) -> Result<Response<FindEndedResponse>, Status> {
        let pods = self.sockets.pods();
        let ending = |_| Status::unavailable("the agent is ending");
        pods.synced().wait_for(|synced| *synced).await.map_err(ending)?;
        // If the index does not have the agent's own pod, it is that of another node.
        if let Some(own) = &self.own
            && let Err(cause) = pods.wait_for(&own.uid).await
        {
            warn!(target: LOG_TARGET, pod = %own, %cause, "the agent's own pod is not on NODE_NAME; sockets of unknown pods are kept");
            return Err(Status::failed_precondition("the agent's own pod is not on NODE_NAME"));
        }
        let places = request.into_inner().volumes.into_iter().map(|volume| Place::try_from(Some(volume))).collect::<Result<Vec<_>, _>>()?;
        let known = join_all(places.iter().map(|place| self.has_ended(place))).await;
        let mut volumes = Vec::new();
        for (place, has_ended) in places.iter().zip(known) {
            if has_ended? {
                volumes.push(place.into());
            }
        }
        Ok(Response::new(FindEndedResponse { volumes }))
    }
}
