//! The tonic services of a socket, found by the service name in the path of a request.

use std::{convert::Infallible, fmt};

use http::{Request, Response};
use hyper::body::Incoming;
use tonic::server::NamedService;
use tower::{Service, util::BoxCloneSyncService};

/// A tonic service for requests with the body `B`, with its type erased. Its calls may be unary or streaming.
pub type TonicService<B = Incoming> = BoxCloneSyncService<Request<B>, Response<tonic::body::Body>, Infallible>;

/// The tonic services of a socket, by service name.
pub struct Table<B = Incoming>(Vec<(&'static str, TonicService<B>)>);

impl<B> Default for Table<B> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<B> fmt::Debug for Table<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

impl<B> Table<B> {
    /// Adds `service` under its gRPC name.
    pub fn with<S>(mut self, service: S) -> Self
    where
        S: NamedService + Service<Request<B>, Response = Response<tonic::body::Body>, Error = Infallible> + Clone + Send + Sync + 'static,
        S::Future: Send,
        B: 'static,
    {
        self.0.push((S::NAME, BoxCloneSyncService::new(service)));
        self
    }

    /// Returns the service that the path of `request` names.
    pub fn find<A>(&self, request: &Request<A>) -> Option<TonicService<B>> {
        let (service, _) = request.uri().path().strip_prefix('/')?.split_once('/')?;
        self.0.iter().find(|(name, _)| *name == service).map(|(_, service)| service.clone())
    }
}
