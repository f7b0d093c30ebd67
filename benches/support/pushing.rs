//! The service without its rotation: certificates are published at the moment that the bench chooses.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use agent_runtime::{clock::SystemClock, shutdown::Shutdown};
use sds_server::{
    attest::{self, unix::UnixAttestor},
    caller::Authenticator,
    sds::{self, names::Directory, reissue_window::ReissueWindow, service::Service},
    session::{self, Sessions, services::Services},
    store::{Entry, Event, Store},
    trust::{self, Trust},
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use unix_peer::listener;

use super::agent::{self, Timed};

/// A running service and its publisher.
pub struct Pushing {
    issuer: Timed,
    events: mpsc::UnboundedReceiver<Event>,
    entry: Option<Arc<Entry>>,
    _trust: Trust,
}

impl Pushing {
    /// Serves at `socket`; the first certificate is published as soon as somebody wants it.
    pub async fn start(socket: &Path) -> Self {
        let config = agent::config(socket);
        let issuer = Timed::new();
        let trust = Trust::new(trust::Metrics::default());
        trust.source(None, "embedded").take(issuer.bundle());
        let (store, events) = Store::new();
        let ending = CancellationToken::new();
        let service = Service {
            store,
            trust: trust.subscribe(),
            directory: Directory::new(config.names.clone(), &config.trust_domain),
            clock: Arc::new(SystemClock),
            limits: config.limits.clone(),
            metrics: sds::metrics::Metrics::default(),
            reissue_window: watch::channel(ReissueWindow::new(SystemTime::now(), Duration::ZERO, 0)).1,
            ending: ending.clone(),
        };
        let resolver = config.resolver();
        let authenticator = Authenticator {
            attestor: Arc::new(UnixAttestor),
            resolver: watch::channel(Arc::new(resolver)).1,
            metrics: attest::Metrics::default(),
            observer: None,
        };
        let sessions = Sessions {
            services: Services::new(Arc::new(service)).await.unwrap(),
            authenticator,
            limits: config.limits.clone(),
            quotas: session::quotas::Quotas::new(&config.limits),
            refusals: Arc::default(),
            metrics: session::metrics::Metrics::default(),
            shutdown: Shutdown::new(config.drain),
            ending,
            timeouts: session::Timeouts::default(),
        };
        let socket = listener::bind(socket, 0o666).unwrap();
        tokio::spawn(async move {
            sessions.accept(socket.listener).await;
            drop(socket.name);
        });
        Self { issuer, events, entry: None, _trust: trust }
    }

    /// Publishes a certificate to whoever wants it, and returns when all of this is out of its hands.
    pub async fn publish(&mut self) {
        let entry = match &self.entry {
            Some(entry) => entry.clone(),
            None => loop {
                if let Some(Event::Wanted(entry)) = self.events.recv().await {
                    break self.entry.insert(entry).clone();
                }
            },
        };
        let issued = agent::issue(&entry.identity, &self.issuer).await;
        entry.publish(Arc::new(agent::verified(&entry.identity, issued, &self.issuer.bundle())));
    }
}
