//! tonic's services of a socket, by the name in a request's path.

use std::{convert::Infallible, fmt};

use http::{Request, Response};
use hyper::body::Incoming;
use tonic::server::NamedService;
use tower::{Service, util::BoxCloneSyncService};

/// A service whose calls have one answer.
pub type TonicService = BoxCloneSyncService<Request<Incoming>, Response<tonic::body::Body>, Infallible>;

/// The services of a socket, by their names.
#[derive(Clone, Default)]
pub struct Table(Vec<(&'static str, TonicService)>);

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

impl Table {
    /// And this one.
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

    /// The service that `request` is for.
    pub fn find<B>(&self, request: &Request<B>) -> Option<TonicService> {
        let (service, _) = request.uri().path().strip_prefix('/')?.split_once('/')?;
        self.0.iter().find(|(name, _)| *name == service).map(|(_, service)| service.clone())
    }
}
