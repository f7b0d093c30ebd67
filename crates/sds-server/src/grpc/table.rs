//! The tonic services of a socket, found by the service name in the path of a request.

use std::{convert::Infallible, fmt};

use http::{Request, Response};
use hyper::body::Incoming;
use tonic::server::NamedService;
use tower::{Service, util::BoxCloneSyncService};

/// A tonic service with its type erased. Its calls may be unary or streaming.
pub type TonicService = BoxCloneSyncService<Request<Incoming>, Response<tonic::body::Body>, Infallible>;

/// The tonic services of a socket, by service name.
#[derive(Clone, Default)]
pub struct Table(Vec<(&'static str, TonicService)>);

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

impl Table {
    /// Adds `service` under its gRPC name.
    pub fn with<S>(mut self, service: S) -> Self
    where
        S: NamedService
            + Service<Request<Incoming>, Response = Response<tonic::body::Body>, Error = Infallible>
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send,
    {
        self.0.push((S::NAME, BoxCloneSyncService::new(service)));
        self
    }

    /// Returns the service that the path of `request` names.
    pub fn find<B>(&self, request: &Request<B>) -> Option<TonicService> {
        let (service, _) = request.uri().path().strip_prefix('/')?.split_once('/')?;
        self.0.iter().find(|(name, _)| *name == service).map(|(_, service)| service.clone())
    }
}
