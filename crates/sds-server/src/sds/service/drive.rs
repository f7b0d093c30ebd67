//! One stream, from its first request to its end. It keeps the lease in step with the names that the client watches and with the identity
//! of the caller.
//!
//! A change of the configuration, or of the facts about the caller's pod, may give the caller another identity. The stream stays open and
//! takes a lease on the new identity before it drops the old lease. It serves the old certificate until the new one is issued and peers with slow clocks accept it. The new
//! certificate is requested at a time within the reissue window, or when the old one was to be renewed, if that is earlier.

use std::{collections::VecDeque, sync::Arc, time::SystemTime};

use agent_runtime::{clock::Clock, text};
use tokio::{sync::watch, time::Instant};
use tonic::Status;
use tracing::{debug, warn};
use workload_identity::version;

use super::{Service, View, changed, ended, is_known, violation};
use crate::{
    caller::{Caller, Changes, Connection},
    grpc::{
        self, Sender,
        request::{self, Inbox},
    },
    material::Svid,
    proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
    sds::{
        encoded::Variant,
        holdings::{self, Choice, HeldCertificate, Holdings},
        metrics::{Kind, Trigger},
        names::{FormerIds, StreamNames, Target},
        secret,
        stream::{Due, Names, Received, Request as StreamRequest, StreamState},
    },
    session::quotas::Charge,
    store::Lease,
    trust::BundleSet,
};

/// Target of the log lines of this module.
const LOG_TARGET: &str = "sds_agent::sds::service::drive";

/// Bytes of a stream's state that the reserve for each call covers: the names of an Envoy.
const FREE_BYTES: usize = 2 << 10;

impl Service {
    /// Runs a stream and returns its status. The caller is attested after the first request, so that a client that only opens streams costs
    /// no attestation.
    pub(super) async fn drive(&self, connection: &Connection, incoming: &mut Inbox, variant: Variant, sender: Sender) -> Status {
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
        let resolved = tokio::select! {
            () = self.ending.cancelled() => return grpc::closing(),
            resolved = connection.resolve() => resolved,
        };
        let (caller, changes) = match resolved {
            Ok(resolved) => resolved,
            Err(status) => return status,
        };
        let state = StreamState::new(variant, self.directory.wildcard(), self.limits.names_per_stream);
        let mut stream = Stream {
            service: self,
            connection,
            caller,
            changes,
            variant,
            state,
            lease: None,
            identity_changed: false,
            identity_since: None,
            former_ids: FormerIds::default(),
            is_without_certificate: false,
            holdings: Holdings::default(),
            certificate_nonce: None,
            started,
            answered: false,
            sent: VecDeque::new(),
            memory: incoming.charge(),
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

/// The state of one stream.
struct Stream<'a> {
    service: &'a Service,
    connection: &'a Connection,
    caller: Arc<Caller>,
    changes: Changes,
    variant: Variant,
    state: StreamState,
    lease: Option<(Lease, watch::Receiver<Option<Arc<Svid>>>)>,
    /// The lease is for a previous identity of the caller.
    identity_changed: bool,
    /// The time of the last change of the identity.
    identity_since: Option<SystemTime>,
    former_ids: FormerIds,
    /// The stream watches an unknown name and no certificate.
    is_without_certificate: bool,
    holdings: Holdings,
    /// The nonce of the last response with a certificate.
    certificate_nonce: Option<u64>,
    started: Instant,
    answered: bool,
    sent: VecDeque<(u64, Instant, Vec<Kind>)>,
    /// The bytes that the state of the stream holds, beyond those that each call reserves.
    memory: Charge,
    sender: Sender,
}

/// The state that the stream responds from.
struct Snapshot {
    view: View,
    /// The valid certificate that the client holds.
    held: Option<HeldCertificate>,
    /// The time at which a withheld certificate may be sent.
    withheld_until: Option<SystemTime>,
}

impl Stream<'_> {
    async fn run(&mut self, incoming: &mut Inbox) -> Result<(), Status> {
        let mut trust = self.service.trust.clone();
        let mut asking = true;
        let mut trigger = Trigger::subscribe;
        loop {
            if self.changes.are_pending() {
                self.reidentify().await?;
            }
            let Snapshot { view, held, withheld_until } = self.snapshot(&mut trust);
            if self.connection.has_ended(&self.caller) {
                return Err(ended());
            }
            self.answer(&view, held, trigger).await?;
            self.memory.set(self.state.held_bytes().saturating_sub(FREE_BYTES)).map_err(request::over_memory)?;
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
                () = self.changes.wait() => trigger = Trigger::rotate,
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
        let watches = self.state.watches();
        self.former_ids.keep(|name| watches.iter().any(|w| *w.name == *name));
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
                // A client may request and reject the same secret in a loop.
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
                        "rejected by the client; the client keeps its current secret until it gets a newer version"
                    );
                }
            }
        }
        Ok(())
    }

    /// Resolves the caller again with the current resolver and facts. The stream continues under another identity, and ends if the caller
    /// no longer has one.
    async fn reidentify(&mut self) -> Result<(), Status> {
        let (caller, changes) = self.connection.resolve().await?;
        self.changes = changes;
        if *caller.identity != *self.caller.identity {
            let (before, now, workload) = (&self.caller.identity, &caller.identity, &caller.attested.workload);
            debug!(target: LOG_TARGET, %workload, identity = %now, profile = %now.profile.name, %before, "the stream goes on under another identity");
            let bundles = self.service.trust.borrow().clone();
            let reported = self.reported(&bundles);
            let now = self.service.clock.now();
            self.holdings.identity_changes(&self.caller.identity, reported, now);
            let watches = self.state.watches();
            self.former_ids.identity_changes(&self.caller.identity, |name| watches.iter().any(|w| *w.name == *name));
            (self.identity_changed, self.identity_since) = (true, Some(now));
        }
        self.caller = caller;
        Ok(())
    }

    /// Keeps the lease in step with the watched names, and reads the resources that are available. A client that holds a valid certificate
    /// gets a newer one only when peers with slow clocks accept it.
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
            // They have keys, and the client no longer uses those.
            self.holdings = Holdings::default();
            self.report_unknown_name();
            return;
        }
        self.is_without_certificate = false;
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
                // The previous lease is dropped only now.
                self.lease = Some((lease, material));
                self.identity_changed = false;
            }
        }
    }

    /// Reports a stream that has no certificate because its name for it is unknown. Such a client waits, and may hold a certificate that
    /// ends.
    fn report_unknown_name(&mut self) {
        let Some(unknown) = self.state.watches().iter().find(|w| self.target(&w.name) == Target::Unknown) else { return };
        if self.is_without_certificate {
            return;
        }
        self.service.metrics.unknown_certificate_name();
        if let Some(left_out) = self.connection.permit_log("unknown name") {
            let (identity, workload) = (&self.caller.identity, &self.caller.attested.workload);
            let name = text::excerpt(&unknown.name, text::MAX_NAME_CHARS);
            warn!(
                target: LOG_TARGET, %identity,
                %workload,
                name,
                left_out,
                "the stream gets no certificate: its name is unknown; use the configured name, or the current SPIFFE ID"
            );
        }
        self.is_without_certificate = true;
    }

    /// The certificate that the client holds. After a change of the identity it is replaced within the reissue window.
    fn held(&self, bundles: &BundleSet) -> Option<HeldCertificate> {
        let now = self.service.clock.now();
        self.holdings.held(&self.caller.identity, || self.reported(bundles), || self.due_at(), now)
    }

    fn due_at(&self) -> SystemTime {
        let window = *self.service.reissue_window.borrow();
        self.identity_since.map_or(window, |since| window.from(since)).due_at(&self.caller.identity)
    }

    /// The valid certificate that the client reports. It is used only if the client watches one name for the certificate: the version of a
    /// SotW response does not show which of several names the client has a resource for.
    fn reported(&self, bundles: &BundleSet) -> Option<HeldCertificate> {
        let mut certificates = self.state.watches().iter().filter(|w| self.target(&w.name) == Target::Certificate);
        let (Some(watch), None) = (certificates.next(), certificates.next()) else { return None };
        let roots = bundles.own.as_ref().map(|bundle| &bundle.roots);
        let now = self.service.clock.now();
        HeldCertificate::reported(watch.client_reported.as_deref()?, &self.caller.identity, roots, || self.due_at(), now)
    }

    fn target(&self, name: &str) -> Target {
        let names = StreamNames { directory: &self.service.directory, identity: &self.caller.identity, former: &self.former_ids };
        names.target(name)
    }

    fn is_settled(&self, view: &View) -> bool {
        // An unknown name never gets a response.
        self.state
            .is_settled(|name| is_known(&self.target(name), &view.bundles), |name| view.version(&self.target(name)).map(str::to_owned))
    }

    /// Sends the response that is due. If the workload ends meanwhile, the rest of the response is discarded.
    async fn answer(&mut self, view: &View, held: Option<HeldCertificate>, trigger: Trigger) -> Result<(), Status> {
        let known = StreamNames { directory: &self.service.directory, identity: &self.caller.identity, former: &self.former_ids };
        let Some(Due { nonce, names, removed }) = self.state.due(|name| view.version(&known.target(name)).map(str::to_owned)) else {
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
        if !kinds.is_empty() && !std::mem::replace(&mut self.answered, true) {
            self.service.metrics.first_secret(trigger == Trigger::subscribe, self.started.elapsed());
        }
        // The prefix of the certificate in this response, or of the one that the client keeps. A rejected certificate is neither.
        let sent = names.iter().find(|(name, _)| self.target(name) == Target::Certificate);
        let version_prefix = sent.map(|(_, version)| version::prefix(version).to_owned()).or_else(|| held.map(|held| held.version_prefix));
        if sent.is_some() {
            self.holdings.sent(view.svid.as_ref(), &self.caller.identity);
            self.certificate_nonce = Some(nonce);
        }
        let versions: Vec<_> = names.iter().map(|(name, version)| (&**name, &**version)).collect();
        let version = secret::response_version(version_prefix.as_deref(), &versions);
        let identity = &self.caller.identity;
        debug!(target: LOG_TARGET, %identity, workload = %self.caller.attested.workload, nonce, ?kinds, version, removed = removed.len(), "pushed to the client");
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
            () = self.sender.send(secret::response(self.variant, &version, &nonce.to_string(), resources, &removed)) => Ok(()),
        }
    }
}

/// Reads a request of either variant.
async fn read(incoming: &mut Inbox, variant: Variant) -> Result<Option<StreamRequest>, Status> {
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
