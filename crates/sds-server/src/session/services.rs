//! The gRPC services of a socket, by service name. SDS uses the framing of [`grpc`]; health and reflection use tonic.

use std::{fmt, sync::Arc};

use futures::future::BoxFuture;
use http::{Request, Response};
use tonic::Status;
use tonic_health::{
    ServingStatus,
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};
use tower::ServiceExt;

use crate::{
    caller::Connection,
    grpc::{
        self, Body,
        request::{Inbox, MessageKind},
        table::Table,
    },
    proto::DESCRIPTORS,
    sds,
};

/// All services of a socket.
#[derive(Clone)]
pub struct Services {
    sds: Arc<sds::service::Service>,
    others: Arc<Table<Inbox>>,
    health: HealthReporter,
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Services")
    }
}

impl Services {
    /// SDS, health and reflection (v1 and v1alpha).
    ///
    /// # Errors
    ///
    /// If the built-in descriptors for reflection cannot be decoded.
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

    /// Sets the health status of all services to NOT_SERVING, before shutdown.
    pub async fn leaving(&self) {
        for name in ["", sds::service::SERVICE] {
            self.health.set_service_status(name, ServingStatus::NotServing).await;
        }
    }

    /// The kind of messages of a call with this path.
    pub fn kind(&self, path: &str) -> MessageKind {
        self.sds.kind(path)
    }

    /// Serves one call. The future is boxed: otherwise each open stream would reserve memory for the largest future of all calls.
    pub fn call(&self, connection: &Arc<Connection>, request: Request<Inbox>) -> BoxFuture<'static, Response<Body>> {
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
