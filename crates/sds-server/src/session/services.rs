//! What a socket serves, by the service's name in the request's path: SDS by framing of our own, health and reflection by tonic.

use std::{fmt, sync::Arc};

use futures::future::BoxFuture;
use http::{Request, Response};
use hyper::body::Incoming;
use tonic::Status;
use tonic_health::{
    ServingStatus,
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};
use tower::ServiceExt;

use crate::{
    caller::Connection,
    grpc::{self, Body, table::Table},
    proto::DESCRIPTORS,
    sds,
};

/// Every service of a socket.
#[derive(Clone)]
pub struct Services {
    sds: Arc<sds::service::Service>,
    others: Arc<Table>,
    health: HealthReporter,
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Services")
    }
}

impl Services {
    /// SDS with health and reflection (v1 and v1alpha) beside it. Fails only if the descriptors that were built in are broken.
    pub async fn new(sds: Arc<sds::service::Service>) -> Result<Self, tonic_reflection::server::Error> {
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let health = HealthReporter::new();
        health.set_service_status(sds::service::SERVICE, ServingStatus::Serving).await;
        let others = Table::default()
            .with(HealthServer::new(HealthService::from_health_reporter(health.clone())))
            .with(reflection().build_v1()?)
            .with(reflection().build_v1alpha()?);
        Ok(Self { sds, others: Arc::new(others), health })
    }

    /// Tells health checks that the agent is about to go.
    pub async fn leaving(&self) {
        for name in ["", sds::service::SERVICE] {
            self.health.set_service_status(name, ServingStatus::NotServing).await;
        }
    }

    /// Answers one call. Boxed: a connection keeps as much room for each open stream as the largest of all calls' futures needs.
    pub fn call(&self, connection: &Arc<Connection>, request: Request<Incoming>) -> BoxFuture<'static, Response<Body>> {
        let sds = self.sds.clone();
        if let Some(other) = self.others.find(&request) {
            return Box::pin(async move {
                let Ok(response) = other.oneshot(request).await;
                response.map(|body| Body::tonic(body, sds.ending.clone()))
            });
        }
        let connection = connection.clone();
        Box::pin(async move {
            let unknown = || Status::unimplemented("this socket serves SDS v3, health and reflection");
            sds.call(&connection, request).await.unwrap_or_else(|| grpc::unary(Err(unknown())))
        })
    }
}
