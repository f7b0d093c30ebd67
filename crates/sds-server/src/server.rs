//! All parts of a server, joined.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use agent_runtime::{
    clock::{Clock, SystemClock},
    shutdown::Shutdown,
};
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use workload_identity::Resolver;

use crate::{
    attest::{self, Attestor, CallerObserver},
    caller::Authenticator,
    limits::Limits,
    sds::{
        self,
        names::{Directory, Names},
        reissue_window::ReissueWindow,
        service::Service,
    },
    session::{self, Sessions, Timeouts, quotas::Quotas, services::Services},
    store::Store,
    trust::{BundleSet, Trust},
};

/// How long open streams may take to end, unless the user of the crate gives a [`Shutdown`].
const DRAIN: Duration = Duration::from_secs(5);

/// The metrics of a server.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// Attestations.
    pub attest: attest::Metrics,
    /// Streams and secrets.
    pub sds: sds::metrics::Metrics,
    /// Connections.
    pub session: session::metrics::Metrics,
}

impl Metrics {
    /// Registers them all.
    pub fn register(registry: &mut Registry) -> Self {
        Self {
            attest: attest::Metrics::register(registry),
            sds: sds::metrics::Metrics::register(registry),
            session: session::metrics::Metrics::register(registry),
        }
    }
}

/// A server that is not built yet. [`new`](Self::new) takes the parts that have no default. Each field may be set before
/// [`build`](Self::build).
#[derive(Debug)]
pub struct Builder {
    /// How callers of the socket are proven.
    pub attestor: Arc<dyn Attestor>,
    /// How they are named; a change reaches open streams. The trust domain stays that of the first: its bundle has the well-known name.
    pub resolver: watch::Receiver<Arc<Resolver>>,
    /// Where certificates are published; the user of the crate does that, for each [`Event`](crate::store::Event) of it.
    pub store: Arc<Store>,
    /// The trust bundles.
    pub trust: watch::Receiver<Arc<BundleSet>>,
    /// The well-known resource names: `default` and `ROOTCA`.
    pub names: Names,
    /// The limits of callers.
    pub limits: Limits,
    /// Timeouts of connections.
    pub timeouts: Timeouts,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Is called about pods that are not served; none unless set.
    pub observer: Option<Arc<dyn CallerObserver>>,
    /// The metrics; they are on a page only after [`Metrics::register`].
    pub metrics: Metrics,
    /// Over which time certificates are issued anew that a change of the configuration has made foreign; at once unless set.
    pub reissue_window: watch::Receiver<ReissueWindow>,
    /// The end of accepting, and the drain; 5 s unless set.
    pub shutdown: Shutdown,
}

impl Builder {
    /// A server for callers that `attestor` proves and `resolver` names, of certificates in `store` and bundles in `trust`.
    pub fn new(attestor: Arc<dyn Attestor>, resolver: watch::Receiver<Arc<Resolver>>, store: Arc<Store>, trust: &Trust) -> Self {
        Self {
            attestor,
            resolver,
            store,
            trust: trust.subscribe(),
            names: Names::default(),
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            clock: Arc::new(SystemClock),
            observer: None,
            metrics: Metrics::default(),
            reissue_window: watch::channel(ReissueWindow::new(SystemTime::now(), Duration::ZERO, 0)).1,
            shutdown: Shutdown::new(DRAIN),
        }
    }

    /// Joins the parts. Nothing is bound: [`Sessions::accept`] takes a listener.
    ///
    /// # Errors
    ///
    /// Where the descriptors that are built in cannot be read.
    pub async fn build(self) -> Result<Server, tonic_reflection::server::Error> {
        let ending = CancellationToken::new();
        let service = Arc::new(Service {
            store: self.store,
            trust: self.trust,
            directory: Directory::new(self.names, &self.resolver.borrow().trust_domain),
            clock: self.clock,
            limits: self.limits.clone(),
            metrics: self.metrics.sds,
            reissue_window: self.reissue_window,
            ending: ending.clone(),
        });
        let sessions = Sessions {
            services: Services::new(service.clone()).await?,
            authenticator: Authenticator {
                attestor: self.attestor,
                resolver: self.resolver,
                metrics: self.metrics.attest,
                observer: self.observer,
            },
            quotas: Quotas::new(&self.limits),
            limits: self.limits,
            refusals: Arc::default(),
            timeouts: self.timeouts,
            metrics: self.metrics.session,
            shutdown: self.shutdown,
            ending,
        };
        Ok(Server { service, sessions })
    }
}

/// A server whose sockets are its user's to bind.
#[derive(Debug)]
pub struct Server {
    /// The secret discovery service.
    pub service: Arc<Service>,
    /// Accepts the connections of any number of sockets.
    pub sessions: Sessions,
}
