//! The service without its rotation: the bench chooses when a certificate is published.

use std::{path::Path, sync::Arc};

use sds_server::{
    attest::unix::UnixAttestor,
    server,
    store::{Entry, Event, Store},
    trust::{self, Trust},
};
use tokio::sync::{mpsc, watch};
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
    /// Serves at `socket`. The first certificate can be published when a client has subscribed.
    pub async fn start(socket: &Path) -> Self {
        let config = agent::config(socket);
        let issuer = Timed::new();
        let trust = Trust::new(trust::Metrics::default());
        trust.source(None, "embedded").take(issuer.bundle()).expect("a small bundle");
        let (store, events) = Store::new();
        let resolver = watch::channel(Arc::new(config.resolver())).1;
        let mut server = server::Builder::new(Arc::new(UnixAttestor), resolver, store, &trust);
        server.limits = config.limits.clone();
        let sessions = server.build().await.unwrap().sessions;
        let socket = listener::bind(socket, 0o666).unwrap();
        tokio::spawn(async move {
            sessions.accept(socket.listener).await;
            drop(socket.name);
        });
        Self { issuer, events, entry: None, _trust: trust }
    }

    /// Publishes a certificate to all subscribers, and returns when the store has it.
    pub async fn publish(&mut self) {
        let entry = match &self.entry {
            Some(entry) => entry.clone(),
            None => loop {
                if let Some(Event::Wanted(entry, _)) = self.events.recv().await {
                    break self.entry.insert(entry).clone();
                }
            },
        };
        let issued = agent::issue(&entry.identity, &self.issuer).await;
        entry.publish(Arc::new(agent::verified(&entry.identity, issued, &self.issuer.bundle())));
    }
}
