//! One stream from its first request to its end: it keeps a lease in step with what the client watches and who the caller is.
//!
//! A change of the configuration may give the caller another identity. The stream stays open: it takes a lease on the new one before it
//! lets go of the old one, serves the old certificate until the new one is there and has settled, and asks for that at a moment within
//! the time chosen for it, or when the old one was to be renewed.

use std::{collections::VecDeque, sync::Arc, time::SystemTime};

use agent_runtime::{clock::Clock, text};
use bytes::Bytes;
use http_body::Body as HttpBody;
use tokio::{sync::watch, time::Instant};
use tonic::Status;
use tracing::{debug, warn};
use workload_identity::{Resolver, version};

use super::{Service, View, changed, ended, is_known, violation};
use crate::{
    caller::{Caller, Connection},
    grpc::{self, Incoming, Sender},
    material::Svid,
    proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
    sds::{
        encoded::Variant,
        holdings::{self, Choice, HeldCertificate, Holdings},
        metrics::{Kind, Trigger},
        names::Target,
        secret,
        stream::{Due, Names, Received, Request as StreamRequest, StreamState},
    },
    store::Lease,
    trust::BundleSet,
};

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::sds::service::drive";

impl Service {
    /// A stream's life. The first request is read before the caller is attested: a large one must not block the connection's window.
    pub(super) async fn drive<B>(&self, connection: &Connection, incoming: &mut Incoming<B>, variant: Variant, sender: Sender) -> Status
    where
        B: HttpBody<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let first = tokio::select! {
            () = self.ending.cancelled() => return grpc::closing(),
            first = read(incoming, variant) => first,
        };
        let first = match first {
            Ok(Some(first)) => first,
            Ok(None) => return Status::ok(""),
            Err(status) => return status,
        };
        let started = Instant::now();
        let mut rules = connection.rules();
        // Before the caller is named: what changes from here on is noticed.
        rules.mark_unchanged();
        let caller = tokio::select! {
            () = self.ending.cancelled() => return grpc::closing(),
            caller = connection.caller() => caller,
        };
        let caller = match caller {
            Ok(caller) => caller,
            Err(status) => return status,
        };
        let state = StreamState::new(variant, self.directory.wildcard(), self.limits.names_per_stream);
        let mut stream = Stream {
            service: self,
            connection,
            caller,
            rules,
            variant,
            state,
            lease: None,
            identity_changed: false,
            holdings: Holdings::default(),
            certificate_nonce: None,
            started,
            answered: false,
            sent: VecDeque::new(),
            sender,
        };
        if let Err(status) = stream.request(first) {
            return status;
        }
        match stream.run(incoming).await {
            Ok(()) => Status::ok(""),
            Err(status) => status,
        }
    }
}

/// One stream, with all that its run changes.
struct Stream<'a> {
    service: &'a Service,
    connection: &'a Connection,
    caller: Arc<Caller>,
    rules: watch::Receiver<Arc<Resolver>>,
    variant: Variant,
    state: StreamState,
    lease: Option<(Lease, watch::Receiver<Option<Arc<Svid>>>)>,
    /// The lease is of an identity that the caller had before.
    identity_changed: bool,
    holdings: Holdings,
    /// The response that carried the last certificate.
    certificate_nonce: Option<u64>,
    started: Instant,
    answered: bool,
    sent: VecDeque<(u64, Instant, Vec<Kind>)>,
    sender: Sender,
}

/// What is there for the stream at one moment.
struct Snapshot {
    view: View,
    /// The good certificate that the client holds.
    held: Option<HeldCertificate>,
    /// When a certificate that is withheld from the client may be sent.
    withheld_until: Option<SystemTime>,
}

impl Stream<'_> {
    async fn run<B>(&mut self, incoming: &mut Incoming<B>) -> Result<(), Status>
    where
        B: HttpBody<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let mut trust = self.service.trust.clone();
        let mut asking = true;
        let mut trigger = Trigger::subscribe;
        loop {
            if self.rules.has_changed().unwrap_or(false) {
                self.reidentify().await?;
            }
            let Snapshot { view, held, withheld_until } = self.snapshot(&mut trust);
            if self.connection.has_ended(&self.caller) {
                return Err(ended());
            }
            self.answer(&view, held, trigger).await?;
            if !asking && self.is_settled(&view) {
                return Ok(());
            }
            let caller = self.caller.clone();
            tokio::select! {
                () = caller.attested.terminated.cancelled() => return Err(ended()),
                () = self.service.ending.cancelled() => return Err(grpc::closing()),
                request = read(incoming, self.variant), if asking => {
                    trigger = Trigger::subscribe;
                    match request? {
                        Some(request) => self.request(request)?,
                        None => asking = false,
                    }
                }
                () = changed(self.lease.as_mut().map(|(_, material)| material)) => trigger = Trigger::rotate,
                Ok(()) = trust.changed() => trigger = Trigger::rotate,
                Ok(()) = self.rules.changed() => {
                    self.rules.mark_changed();
                    trigger = Trigger::rotate;
                }
                () = until(&*self.service.clock, withheld_until), if withheld_until.is_some() => trigger = Trigger::rotate,
            }
        }
    }

    fn request(&mut self, request: StreamRequest) -> Result<(), Status> {
        let received = self.state.request(request).map_err(|error| {
            if let Some(left_out) = self.connection.permit_log(error.as_str()) {
                let (identity, workload) = (&self.caller.identity, &self.caller.attested.workload);
                warn!(target: LOG_TARGET, %identity, %workload, cause = %error, left_out, "stream refused");
            }
            violation(&error)
        })?;
        let (nonce, error) = match received {
            Received::Ack(nonce) => (nonce, None),
            Received::Nack(nonce, error) => (nonce, Some(error)),
            Received::Subscription | Received::Stale => return Ok(()),
        };
        let Some(index) = self.sent.iter().position(|(n, _, _)| *n == nonce) else { return Ok(()) };
        let Some((_, at, kinds)) = self.sent.remove(index) else { return Ok(()) };
        let metrics = &self.service.metrics;
        let (identity, workload) = (&self.caller.identity, &self.caller.attested.workload);
        match error {
            None => {
                kinds.iter().for_each(|kind| metrics.acked(*kind, at.elapsed()));
                debug!(target: LOG_TARGET, %identity, %workload, nonce, ?kinds, "accepted by the client");
            }
            Some(error) => {
                if self.certificate_nonce == Some(nonce) {
                    self.holdings.rejected();
                }
                kinds.iter().for_each(|kind| metrics.nacked(*kind));
                // A client may ask for the same again, and reject that, in a loop.
                let what = if kinds.contains(&Kind::certificate) { "certificate rejected" } else { "bundle rejected" };
                if let Some(left_out) = self.connection.permit_log(what) {
                    let cause = text::excerpt(&error, text::MAX_MESSAGE_CHARS);
                    warn!(
                        target: LOG_TARGET, %identity,
                        %workload,
                        nonce,
                        ?kinds,
                        cause,
                        left_out,
                        "rejected by the client; it keeps what it has until there is a newer version"
                    );
                }
            }
        }
        Ok(())
    }

    /// Names the caller by the rules as they are now. The stream goes on under another identity, and ends where there is none any more.
    async fn reidentify(&mut self) -> Result<(), Status> {
        self.rules.mark_unchanged();
        let caller = self.connection.caller().await?;
        if *caller.identity != *self.caller.identity {
            let (before, now, workload) = (&self.caller.identity, &caller.identity, &caller.attested.workload);
            debug!(target: LOG_TARGET, %workload, identity = %now, profile = %now.profile.name, %before, "the stream goes on under another identity");
            let bundles = self.service.trust.borrow().clone();
            let reported = self.reported(&bundles);
            self.holdings.identity_changes(&self.caller.identity, reported, self.service.clock.now());
            self.identity_changed = true;
        }
        self.caller = caller;
        Ok(())
    }

    /// Keeps the lease in step with what is watched, and looks at what exists: also until when it is withheld, because a client that still
    /// holds a good certificate gets a fresh one only when slow clocks take it.
    fn snapshot(&mut self, trust: &mut watch::Receiver<Arc<BundleSet>>) -> Snapshot {
        let bundles = trust.borrow_and_update().clone();
        let held = self.held(&bundles);
        self.subscribe(held.as_ref());
        let current = self.lease.as_ref().and_then(|(lease, _)| lease.current());
        let Choice { svid, withheld_until } = self.holdings.choose(current, held.as_ref(), self.service.clock.now());
        Snapshot { view: View { svid, bundles }, held, withheld_until }
    }

    fn subscribe(&mut self, held: Option<&HeldCertificate>) {
        if !self.state.watches().iter().any(|w| self.target(&w.name) == Target::Certificate) {
            self.lease = None;
            return;
        }
        let demand = holdings::demand(held);
        match &mut self.lease {
            Some((lease, material)) if !self.identity_changed => {
                lease.demand(demand);
                material.mark_unchanged();
            }
            _ => {
                let pod = self.caller.attested.workload.pod().cloned();
                let lease = self.service.store.lease(&self.caller.identity, demand, pod);
                let mut material = lease.watch();
                material.mark_unchanged();
                // Only now the one before ends.
                self.lease = Some((lease, material));
                self.identity_changed = false;
            }
        }
    }

    /// What the client holds, and when it is to be replaced: for what a change of the configuration has made foreign, within the time that
    /// was chosen for that.
    fn held(&self, bundles: &BundleSet) -> Option<HeldCertificate> {
        let now = self.service.clock.now();
        self.holdings.held(&self.caller.identity, || self.reported(bundles), || self.due_at(), now)
    }

    fn due_at(&self) -> SystemTime {
        self.service.reissue_window.borrow().due_at(&self.caller.identity)
    }

    /// The good certificate that the client says it has. One name only: a version of a SotW response tells nothing about which of
    /// several names the client has an answer for.
    fn reported(&self, bundles: &BundleSet) -> Option<HeldCertificate> {
        let mut certificates = self.state.watches().iter().filter(|w| self.target(&w.name) == Target::Certificate);
        let (Some(watch), None) = (certificates.next(), certificates.next()) else { return None };
        let roots = bundles.own.as_ref().map(|bundle| &bundle.roots);
        let now = self.service.clock.now();
        HeldCertificate::reported(watch.client_reported.as_deref()?, &self.caller.identity, roots, || self.due_at(), now)
    }

    fn target(&self, name: &str) -> Target {
        self.service.directory.target(name, &self.caller.identity)
    }

    fn is_settled(&self, view: &View) -> bool {
        // For a name that is not known nothing will come.
        self.state
            .is_settled(|name| is_known(&self.target(name), &view.bundles), |name| view.version(&self.target(name)).map(str::to_owned))
    }

    /// Sends what is due. A workload that ends meanwhile does not get the rest of it.
    async fn answer(&mut self, view: &View, held: Option<HeldCertificate>, trigger: Trigger) -> Result<(), Status> {
        let (directory, caller) = (&self.service.directory, &self.caller);
        let Some(Due { nonce, names }) = self.state.due(|name| view.version(&directory.target(name, &caller.identity)).map(str::to_owned))
        else {
            return Ok(());
        };
        let mut resources = Vec::with_capacity(names.len());
        let mut kinds = Vec::with_capacity(names.len());
        for (name, _) in &names {
            if let Some((kind, bytes)) = view.resource(&self.target(name), self.variant, name) {
                self.service.metrics.sent(kind, trigger);
                kinds.push(kind);
                resources.push(bytes);
            }
        }
        if !std::mem::replace(&mut self.answered, true) {
            self.service.metrics.first_secret(trigger == Trigger::subscribe, self.started.elapsed());
        }
        // Of the certificate that is in this response, or that the client keeps. One that it rejected is neither.
        let sent = names.iter().find(|(name, _)| self.target(name) == Target::Certificate);
        let version_prefix = sent.map(|(_, version)| version::prefix(version).to_owned()).or_else(|| held.map(|held| held.version_prefix));
        if sent.is_some() {
            self.holdings.sent(view.svid.as_ref(), &self.caller.identity);
            self.certificate_nonce = Some(nonce);
        }
        let versions: Vec<_> = names.iter().map(|(name, version)| (&**name, &**version)).collect();
        let version = secret::response_version(version_prefix.as_deref(), &versions);
        let identity = &self.caller.identity;
        debug!(target: LOG_TARGET, %identity, workload = %self.caller.attested.workload, nonce, ?kinds, version, "pushed to the client");
        if self.sent.len() == 16 {
            self.sent.pop_front();
        }
        self.sent.push_back((nonce, Instant::now(), kinds));
        tokio::select! {
            biased;
            () = self.caller.attested.terminated.cancelled() => {
                self.sender.take_back();
                Err(ended())
            }
            () = self.sender.send(secret::response(self.variant, &version, &nonce.to_string(), resources)) => Ok(()),
        }
    }
}

/// Reads a request of either variant.
async fn read<B>(incoming: &mut Incoming<B>, variant: Variant) -> Result<Option<StreamRequest>, Status>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    Ok(match variant {
        Variant::Sotw => incoming.next::<DiscoveryRequest>().await?.map(|r| StreamRequest {
            type_url: r.type_url,
            nonce: r.response_nonce,
            error: r.error_detail.map(|e| e.message),
            names: Names::All { names: r.resource_names, version: r.version_info },
        }),
        Variant::Delta => incoming.next::<DeltaDiscoveryRequest>().await?.map(|r| StreamRequest {
            type_url: r.type_url,
            nonce: r.response_nonce,
            error: r.error_detail.map(|e| e.message),
            names: Names::Changes {
                subscribe: r.resource_names_subscribe,
                unsubscribe: r.resource_names_unsubscribe,
                versions: r.initial_resource_versions.into_iter().collect(),
            },
        }),
    })
}

async fn until(clock: &dyn Clock, at: Option<SystemTime>) {
    match at {
        Some(at) => clock.sleep_until(at).await,
        None => std::future::pending().await,
    }
}
