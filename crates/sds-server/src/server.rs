//! Composes a server from its parts.

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

/// Default time for open streams to end at shutdown: 5 s. [`Builder::shutdown`] replaces it.
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
    /// Registers all metrics of the server.
    pub fn register(registry: &mut Registry) -> Self {
        Self {
            attest: attest::Metrics::register(registry),
            sds: sds::metrics::Metrics::register(registry),
            session: session::metrics::Metrics::register(registry),
        }
    }
}

/// The parts of a server. [`new`](Self::new) takes the parts without a default; every field may be changed before [`build`](Self::build).
#[derive(Debug)]
pub struct Builder {
    /// Proves which workload a caller of the socket is.
    pub attestor: Arc<dyn Attestor>,
    /// Maps workloads to identities. A new resolver applies to open streams, too. The trust domain is read once, in [`build`](Self::build):
    /// the well-known bundle name always selects the bundle of that domain.
    pub resolver: watch::Receiver<Arc<Resolver>>,
    /// The published certificates. The user of the crate publishes one for each [`Event`](crate::store::Event) of the store.
    pub store: Arc<Store>,
    /// The trust bundles.
    pub trust: watch::Receiver<Arc<BundleSet>>,
    /// The well-known resource names. Default: `default` and `ROOTCA`.
    pub names: Names,
    /// Limits for callers. Default: [`Limits::default`].
    pub limits: Limits,
    /// Timeouts of a connection. Default: [`Timeouts::default`].
    pub timeouts: Timeouts,
    /// The wall clock. Default: the system clock.
    pub clock: Arc<dyn Clock>,
    /// Reports pods that are refused or served. Default: no observer.
    pub observer: Option<Arc<dyn CallerObserver>>,
    /// The metrics. Default: metrics without a registry; see [`Metrics::register`].
    pub metrics: Metrics,
    /// The window for reissuing certificates after a change of the configuration. Default: certificates are reissued at once.
    pub reissue_window: watch::Receiver<ReissueWindow>,
    /// Ends accepting, and bounds the drain. Default: a drain of 5 s.
    pub shutdown: Shutdown,
}

impl Builder {
    /// Takes the parts without a default: `attestor` proves callers, `resolver` maps them to identities, `store` has their certificates and
    /// `trust` the bundles.
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

    /// Builds the server. It binds no socket: [`Sessions::accept`] takes a listener.
    ///
    /// # Errors
    ///
    /// If the built-in descriptors for gRPC reflection cannot be decoded.
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
            quotas: Quotas::measured(&self.limits, self.metrics.session.clone()),
            limits: self.limits,
            refusals: Arc::default(),
            timeouts: self.timeouts,
            companions: None,
            metrics: self.metrics.session,
            shutdown: self.shutdown,
            ending,
        };
        Ok(Server { service, sessions })
    }
}

/// A server. Its user binds the sockets.
#[derive(Debug)]
pub struct Server {
    /// The secret discovery service.
    pub service: Arc<Service>,
    /// Accepts connections, of one or more sockets.
    pub sessions: Sessions,
}
