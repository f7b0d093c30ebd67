//! The service: it joins a request's stream, the pure state, the store and the bundles, and does the I/O.
//!
//! Streams are held, not failed: while a certificate is being issued, while the bundle is unknown, while the upstream is down. A stream
//! ends when its client ends it, when its workload has ended, when the agent drains, or by an error of the client.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body as HttpBody;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{debug, warn};

use super::{
    held::Held,
    metrics::{Kind, Metrics, Trigger},
    names::{self, Directory, Target, WILDCARD},
    secret,
    stream::{Due, Names, Received, Request as StreamRequest, StreamState, TYPE_URL, Violation},
};
use crate::{
    caller::{Caller, Connection},
    clock::Clock,
    config::Limits,
    grpc::{self, Body, Incoming, Sender},
    identity::Identity,
    material::{Face, Svid},
    proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
    store::{Demand, Lease, Store},
    trust::{Bundle, BundleSet},
};

/// The service's path on the wire.
pub const SERVICE: &str = "envoy.service.secret.v3.SecretDiscoveryService";
/// How long `FetchSecrets` waits for a caller that names no deadline.
const FETCH_WAIT: Duration = Duration::from_secs(10);
/// A caller's deadline is answered this much early, so that the answer arrives.
const HEADROOM: Duration = Duration::from_millis(20);

/// The secret discovery service, for every connection.
#[derive(Debug)]
pub struct Service {
    /// Where certificates are.
    pub store: Arc<Store>,
    /// Where bundles are.
    pub trust: watch::Receiver<Arc<BundleSet>>,
    /// What names mean.
    pub directory: Directory,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// What one stream may ask.
    pub limits: Limits,
    /// What is counted.
    pub metrics: Metrics,
    /// Ends every stream.
    pub drain: CancellationToken,
}

/// What exists now, for one caller.
struct View {
    svid: Option<Arc<Svid>>,
    bundles: Arc<BundleSet>,
}

impl View {
    fn bundle(&self, target: &Target) -> Option<&Arc<Bundle>> {
        match target {
            Target::OwnBundle => self.bundles.own.as_ref(),
            Target::FederatedBundle(domain) => self.bundles.federated.get(domain),
            Target::Certificate | Target::Unknown => None,
        }
    }

    fn version(&self, target: &Target) -> Option<&str> {
        match target {
            Target::Certificate => self.svid.as_ref().map(|svid| svid.version()),
            target => self.bundle(target).map(|bundle| bundle.roots.version()),
        }
    }

    fn has_all(&self, known: &[(String, Target)]) -> bool {
        known.iter().all(|(_, target)| self.version(target).is_some())
    }

    fn resource(&self, target: &Target, face: Face, name: &str) -> Option<(Kind, Bytes)> {
        match target {
            Target::Certificate => self.svid.as_ref().map(|svid| (Kind::certificate, secret::certificate(svid, face, name))),
            target => self.bundle(target).map(|bundle| (Kind::bundle, secret::bundle(bundle, face, name))),
        }
    }
}

impl Service {
    /// Answers a call of this service; `None` when the method is not one of it.
    pub async fn call<B>(self: &Arc<Self>, connection: &Arc<Connection>, request: Request<B>) -> Option<Response<Body>>
    where
        B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
        B::Error: std::fmt::Display,
    {
        let method = request.uri().path().strip_prefix('/')?.strip_prefix(SERVICE)?.strip_prefix('/')?;
        match method {
            "StreamSecrets" => Some(self.stream(connection, request, Face::StateOfTheWorld)),
            "DeltaSecrets" => Some(self.stream(connection, request, Face::Delta)),
            "FetchSecrets" => Some(grpc::unary(self.fetch(connection, request).await)),
            _ => None,
        }
    }

    fn stream<B>(self: &Arc<Self>, connection: &Arc<Connection>, request: Request<B>, face: Face) -> Response<Body>
    where
        B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
        B::Error: std::fmt::Display,
    {
        let mut incoming = Incoming::new(request.into_body(), self.limits.message_bytes);
        let (service, connection) = (self.clone(), connection.clone());
        grpc::streaming(move |sender| async move {
            service.metrics.streams.inc();
            let _open = scopeguard(&service.metrics);
            service.drive(&connection, &mut incoming, face, sender).await
        })
    }

    /// A stream's life. The first request is read before the caller is attested: a large one must not block the connection's window.
    async fn drive<B>(&self, connection: &Connection, incoming: &mut Incoming<B>, face: Face, sender: Sender) -> Status
    where
        B: HttpBody<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let first = tokio::select! {
            () = self.drain.cancelled() => return grpc::closing(),
            first = read(incoming, face) => first,
        };
        let first = match first {
            Ok(Some(first)) => first,
            Ok(None) => return Status::ok(""),
            Err(status) => return status,
        };
        let started = Instant::now();
        let caller = tokio::select! {
            () = self.drain.cancelled() => return grpc::closing(),
            caller = connection.caller() => caller,
        };
        let caller = match caller {
            Ok(caller) => caller,
            Err(status) => return status,
        };
        let state = StreamState::new(face, self.directory.wildcard(), self.limits.names_per_stream);
        let mut stream =
            Stream { service: self, connection, caller, face, state, lease: None, started, answered: false, sent: VecDeque::new(), sender };
        if let Err(status) = stream.request(first) {
            return status;
        }
        match stream.run(incoming).await {
            Ok(()) => Status::ok(""),
            Err(status) => status,
        }
    }

    /// One answer for everything that is named. Never uses a hint: who fetches has nothing.
    async fn fetch<B>(&self, connection: &Connection, request: Request<B>) -> Result<VecDeque<Bytes>, Status>
    where
        B: HttpBody<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let wait = grpc::timeout(request.headers()).map_or(FETCH_WAIT, |t| t.saturating_sub(HEADROOM.min(t / 10)));
        // From here on everything is the caller's time: the rest of its request, its attestation, the certificate.
        let end = Instant::now() + wait;
        tokio::select! {
            biased;
            result = self.answer_by(end, connection, request.into_body()) => result,
            () = self.drain.cancelled() => Err(grpc::closing()),
            // Later than what is answered at the end itself.
            () = tokio::time::sleep_until(end + HEADROOM / 2) => Err(Status::unavailable("the caller is not yet known")),
        }
    }

    async fn answer_by<B>(&self, end: Instant, connection: &Connection, body: B) -> Result<VecDeque<Bytes>, Status>
    where
        B: HttpBody<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let message: DiscoveryRequest = Incoming::new(body, self.limits.message_bytes).only().await?;
        if !message.type_url.is_empty() && message.type_url != TYPE_URL {
            return Err(violation(&Violation::TypeUrl(message.type_url)));
        }
        let wildcard = message.resource_names.is_empty() || message.resource_names.iter().any(|n| n == WILDCARD);
        let asked = if wildcard { self.directory.wildcard().map(String::from).to_vec() } else { message.resource_names };
        if asked.len() > self.limits.names_per_stream {
            return Err(violation(&Violation::TooManyNames(self.limits.names_per_stream)));
        }
        let caller = connection.caller().await?;
        let bundles = self.trust.borrow().clone();
        let known = self.known(&asked, &caller.identity, &bundles);
        if known.is_empty() {
            let asked: Vec<_> = asked.iter().map(|name| names::excerpt(name).escape_debug().to_string()).collect();
            return Err(Status::not_found(format!("none of these names is known here: {}", asked.join(", "))));
        }
        let wants_certificate = known.iter().any(|(_, target)| *target == Target::Certificate);
        // What is there, and is not due, needs no subscription.
        let svid = if wants_certificate { self.store.at_rest(&caller.identity, self.clock.now()) } else { None };
        let view = View { svid, bundles };
        if view.has_all(&known) {
            return self.fetched(connection, &caller, &known, &view);
        }
        let lease = wants_certificate.then(|| self.store.lease(&caller.identity, Demand::Now, caller.attested.workload.pod().cloned()));
        let mut material = lease.as_ref().map(Lease::watch);
        let mut trust = self.trust.clone();
        loop {
            trust.mark_unchanged();
            let view = self.view(lease.as_ref(), &trust);
            if view.has_all(&known) || end <= Instant::now() {
                return self.fetched(connection, &caller, &known, &view);
            }
            tokio::select! {
                () = caller.attested.gone.cancelled() => return Err(ended()),
                () = news(material.as_mut()) => {}
                Ok(()) = trust.changed() => {}
                () = tokio::time::sleep_until(end) => {}
            }
        }
    }

    fn known(&self, names: &[String], identity: &Identity, bundles: &BundleSet) -> Vec<(String, Target)> {
        let mut out: Vec<(String, Target)> = Vec::with_capacity(names.len());
        for name in names {
            let target = self.directory.target(name, identity);
            if is_known(&target, bundles) && !out.iter().any(|(n, _)| n == name) {
                out.push((name.clone(), target));
            }
        }
        out
    }

    fn fetched(
        &self,
        connection: &Connection,
        caller: &Caller,
        known: &[(String, Target)],
        view: &View,
    ) -> Result<VecDeque<Bytes>, Status> {
        if connection.has_ended(caller) {
            return Err(ended());
        }
        let mut resources = Vec::with_capacity(known.len());
        let mut versions = Vec::with_capacity(known.len());
        for (name, target) in known {
            if let (Some((kind, bytes)), Some(version)) = (view.resource(target, Face::StateOfTheWorld, name), view.version(target)) {
                self.metrics.sent(kind, Trigger::subscribe);
                resources.push(bytes);
                versions.push((name.as_str(), version));
            }
        }
        if resources.is_empty() {
            return Err(Status::unavailable("not yet available; the certificate is being issued"));
        }
        let stem = view.svid.as_ref().map(|svid| stem(svid.version())).filter(|_| known.iter().any(|(_, t)| *t == Target::Certificate));
        let version = secret::response_version(stem, &versions);
        Ok(secret::response(Face::StateOfTheWorld, &version, "", resources))
    }

    /// What exists now. Material that looks expired is withheld.
    fn view(&self, lease: Option<&Lease>, trust: &watch::Receiver<Arc<BundleSet>>) -> View {
        let now = self.clock.now();
        let svid = lease.and_then(Lease::current).filter(|svid| svid.chain.validity.is_live(now));
        View { svid, bundles: trust.borrow().clone() }
    }
}

/// One stream, with all that its run changes.
struct Stream<'a> {
    service: &'a Service,
    connection: &'a Connection,
    caller: Arc<Caller>,
    face: Face,
    state: StreamState,
    lease: Option<(Lease, watch::Receiver<Option<Arc<Svid>>>)>,
    started: Instant,
    answered: bool,
    sent: VecDeque<(u64, Instant, Vec<Kind>)>,
    sender: Sender,
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
            let mut view = self.subscribe(&mut trust);
            let held_until = self.withhold_unsettled(&mut view);
            if self.connection.has_ended(&self.caller) {
                return Err(ended());
            }
            self.answer(&view, trigger).await?;
            if !asking && self.is_settled(&view) {
                return Ok(());
            }
            let caller = self.caller.clone();
            tokio::select! {
                () = caller.attested.gone.cancelled() => return Err(ended()),
                () = self.service.drain.cancelled() => return Err(grpc::closing()),
                request = read(incoming, self.face), if asking => {
                    trigger = Trigger::subscribe;
                    match request? {
                        Some(request) => self.request(request)?,
                        None => asking = false,
                    }
                }
                () = news(self.lease.as_mut().map(|(_, material)| material)) => trigger = Trigger::rotate,
                Ok(()) = trust.changed() => trigger = Trigger::rotate,
                () = until(&*self.service.clock, held_until), if held_until.is_some() => trigger = Trigger::rotate,
            }
        }
    }

    fn request(&mut self, request: StreamRequest) -> Result<(), Status> {
        let received = self.state.request(request).map_err(|error| {
            warn!(identity = %self.caller.identity, workload = %self.caller.attested.workload, cause = %error, "stream refused");
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
                debug!(%identity, %workload, nonce, ?kinds, "accepted by the client");
            }
            Some(error) => {
                kinds.iter().for_each(|kind| metrics.nacked(*kind));
                let cause: String = error.chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect();
                warn!(%identity, %workload, nonce, ?kinds, cause, "rejected by the client; it keeps what it has until there is a newer version");
            }
        }
        Ok(())
    }

    /// Keeps the lease in step with what is watched, and looks at what exists.
    fn subscribe(&mut self, trust: &mut watch::Receiver<Arc<BundleSet>>) -> View {
        let bundles = trust.borrow_and_update().clone();
        match self.demand(&bundles) {
            None => self.lease = None,
            Some(demand) => match &self.lease {
                Some((lease, _)) => lease.demand(demand),
                None => {
                    let pod = self.caller.attested.workload.pod().cloned();
                    let lease = self.service.store.lease(&self.caller.identity, demand, pod);
                    let material = lease.watch();
                    self.lease = Some((lease, material));
                }
            },
        }
        if let Some((_, material)) = &mut self.lease {
            material.mark_unchanged();
        }
        self.service.view(self.lease.as_ref().map(|(lease, _)| lease), trust)
    }

    /// What the stream needs of a certificate; none when it watches none.
    fn demand(&self, bundles: &BundleSet) -> Option<Demand> {
        if !self.state.watches().iter().any(|w| self.target(&w.name) == Target::Certificate) {
            return None;
        }
        Some(self.held(bundles).map_or(Demand::Now, |held| held.demand()))
    }

    /// The good certificate that the client says it has. One name only: a version of a SotW response tells nothing about which of
    /// several names the client has an answer for.
    fn held(&self, bundles: &BundleSet) -> Option<Held> {
        let mut certificates = self.state.watches().iter().filter(|w| self.target(&w.name) == Target::Certificate);
        let (Some(watch), None) = (certificates.next(), certificates.next()) else { return None };
        let identity = &self.caller.identity;
        let held = Held::read(watch.brought.as_deref()?, identity, self.service.clock.now())?;
        held.is_current(identity, bundles.own.as_ref().map(|b| &b.roots)).then_some(held)
    }

    fn target(&self, name: &str) -> Target {
        self.service.directory.target(name, &self.caller.identity)
    }

    /// A client that still holds a good certificate gets a fresh one only when slow clocks take it; returns when that is.
    fn withhold_unsettled(&self, view: &mut View) -> Option<SystemTime> {
        let settled_at = view.svid.as_ref()?.settled_at;
        let now = self.service.clock.now();
        let held = self.held(&view.bundles)?;
        let margin = held.not_after.duration_since(now).unwrap_or_default() / 2;
        (now < settled_at && settled_at < now + margin).then(|| {
            view.svid = None;
            settled_at
        })
    }

    fn is_settled(&self, view: &View) -> bool {
        // For a name that is not known nothing will come.
        self.state
            .is_settled(|name| is_known(&self.target(name), &view.bundles), |name| view.version(&self.target(name)).map(str::to_owned))
    }

    /// Sends what is due. A workload that ends meanwhile does not get the rest of it.
    async fn answer(&mut self, view: &View, trigger: Trigger) -> Result<(), Status> {
        let held = self.held(&view.bundles);
        let (directory, caller) = (&self.service.directory, &self.caller);
        let Some(Due { nonce, names }) = self.state.due(|name| view.version(&directory.target(name, &caller.identity)).map(str::to_owned))
        else {
            return Ok(());
        };
        let mut resources = Vec::with_capacity(names.len());
        let mut kinds = Vec::with_capacity(names.len());
        for (name, _) in &names {
            if let Some((kind, bytes)) = view.resource(&self.target(name), self.face, name) {
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
        let stem = sent.map(|(_, version)| stem(version).to_owned()).or_else(|| held.map(|held| held.stem()));
        let versions: Vec<_> = names.iter().map(|(name, version)| (&**name, &**version)).collect();
        let version = secret::response_version(stem.as_deref(), &versions);
        let identity = &self.caller.identity;
        debug!(%identity, workload = %self.caller.attested.workload, nonce, ?kinds, version, "pushed to the client");
        if self.sent.len() == 16 {
            self.sent.pop_front();
        }
        self.sent.push_back((nonce, Instant::now(), kinds));
        tokio::select! {
            biased;
            () = self.caller.attested.gone.cancelled() => {
                self.sender.take_back();
                Err(ended())
            }
            () = self.sender.send(secret::response(self.face, &version, &nonce.to_string(), resources)) => Ok(()),
        }
    }
}

/// Whether `target` will have an answer, now or soon: a certificate can be issued, and the own bundle comes.
fn is_known(target: &Target, bundles: &BundleSet) -> bool {
    match target {
        Target::Unknown => false,
        Target::FederatedBundle(domain) => bundles.federated.contains_key(domain),
        Target::Certificate | Target::OwnBundle => true,
    }
}

/// The first three parts of a certificate's version.
fn stem(version: &str) -> &str {
    version.rsplit_once('-').map_or(version, |(stem, _)| stem)
}

/// Reads a request of either face.
async fn read<B>(incoming: &mut Incoming<B>, face: Face) -> Result<Option<StreamRequest>, Status>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    Ok(match face {
        Face::StateOfTheWorld => incoming.next::<DiscoveryRequest>().await?.map(|r| StreamRequest {
            type_url: r.type_url,
            nonce: r.response_nonce,
            error: r.error_detail.map(|e| e.message),
            names: Names::All { names: r.resource_names, version: r.version_info },
        }),
        Face::Delta => incoming.next::<DeltaDiscoveryRequest>().await?.map(|r| StreamRequest {
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

/// Returns when there is something new; never without something to watch.
async fn news(material: Option<&mut watch::Receiver<Option<Arc<Svid>>>>) {
    let ended = match material {
        Some(material) => material.changed().await.is_err(),
        None => true,
    };
    if ended {
        std::future::pending::<()>().await;
    }
}

async fn until(clock: &dyn Clock, at: Option<SystemTime>) {
    match at {
        Some(at) => clock.sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn violation(error: &Violation) -> Status {
    match error {
        Violation::TypeUrl(_) => Status::invalid_argument(error.to_string()),
        Violation::TooManyNames(_) => Status::resource_exhausted(error.to_string()),
    }
}

fn ended() -> Status {
    Status::permission_denied("the workload has ended")
}

/// Counts the stream as closed when it is dropped, however it ends.
fn scopeguard(metrics: &Metrics) -> impl Drop + use<> {
    struct Open(prometheus_client::metrics::gauge::Gauge);
    impl Drop for Open {
        fn drop(&mut self) {
            self.0.dec();
        }
    }
    Open(metrics.streams.clone())
}

#[cfg(test)]
mod tests;
