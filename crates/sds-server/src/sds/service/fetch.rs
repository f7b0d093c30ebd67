//! `FetchSecrets`: one response with all requested names, within the deadline of the client.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use agent_runtime::text;
use bytes::Bytes;
use http::Request;
use tokio::{sync::watch, time::Instant};
use tonic::Status;
use workload_identity::{Identity, Resolver, version};

use super::{Service, View, changed, ended, is_known, violation};
use crate::{
    caller::{Caller, Connection},
    grpc::{self, request::Inbox},
    proto::envoy::service::discovery::v3::DiscoveryRequest,
    sds::{
        encoded::Variant,
        metrics::Trigger,
        names::{Target, WILDCARD},
        secret,
        stream::{TYPE_URL, Violation},
    },
    store::{Demand, Lease},
    trust::BundleSet,
};

/// Time that `FetchSecrets` waits if the client sets no deadline: 10 s.
const FETCH_WAIT: Duration = Duration::from_secs(10);
/// The response is sent this time before the client's deadline, so that it arrives in time.
const HEADROOM: Duration = Duration::from_millis(20);

impl Service {
    /// Returns one response with all requested names. It uses no reported version, because a client that fetches holds no certificate.
    pub(super) async fn fetch(&self, connection: &Connection, request: Request<Inbox>) -> Result<VecDeque<Bytes>, Status> {
        let wait = grpc::timeout(request.headers()).map_or(FETCH_WAIT, |t| t.saturating_sub(HEADROOM.min(t / 10)));
        // The deadline includes the rest of the request, the attestation and the issuance.
        let end = Instant::now() + wait;
        tokio::select! {
            biased;
            result = self.answer_by(end, connection, request.into_body()) => result,
            () = self.ending.cancelled() => Err(grpc::closing()),
            // Later than the response that is sent at `end`.
            () = tokio::time::sleep_until(end + HEADROOM / 2) => Err(Status::unavailable("the caller is not yet known")),
        }
    }

    async fn answer_by(&self, end: Instant, connection: &Connection, mut request: Inbox) -> Result<VecDeque<Bytes>, Status> {
        let message: DiscoveryRequest = request.only().await?;
        drop(request);
        if !message.type_url.is_empty() && message.type_url != TYPE_URL {
            return Err(violation(&Violation::TypeUrl(message.type_url)));
        }
        let wildcard = message.resource_names.is_empty() || message.resource_names.iter().any(|n| n == WILDCARD);
        let asked = if wildcard { self.directory.wildcard().map(String::from).to_vec() } else { message.resource_names };
        if asked.len() > self.limits.names_per_stream {
            return Err(violation(&Violation::TooManyNames(self.limits.names_per_stream)));
        }
        let mut rules = connection.rules();
        loop {
            // Before the caller is resolved, so that any later change is noticed.
            rules.mark_unchanged();
            let caller = connection.caller().await?;
            if let Some(answer) = self.answer_to(&caller, &asked, end, connection, &mut rules).await? {
                return Ok(answer);
            }
        }
    }

    /// The response for `caller`. `None` if the resolver has changed meanwhile: the caller may have another identity.
    async fn answer_to(
        &self,
        caller: &Caller,
        asked: &[String],
        end: Instant,
        connection: &Connection,
        rules: &mut watch::Receiver<Arc<Resolver>>,
    ) -> Result<Option<VecDeque<Bytes>>, Status> {
        let bundles = self.trust.borrow().clone();
        let known = self.known(asked, &caller.identity, &bundles);
        if known.is_empty() {
            let asked: Vec<_> = asked.iter().map(|name| text::excerpt(name, text::MAX_NAME_CHARS).escape_debug().to_string()).collect();
            return Err(Status::not_found(format!("none of these names is known here: {}", asked.join(", "))));
        }
        let wants_certificate = known.iter().any(|(_, target)| *target == Target::Certificate);
        // A certificate that is available and not due for renewal needs no lease.
        let svid = if wants_certificate { self.store.at_rest(&caller.identity, self.clock.now()) } else { None };
        let view = View { svid, bundles };
        if view.has_all(&known) {
            return self.fetched(connection, caller, &known, &view).map(Some);
        }
        let lease = wants_certificate.then(|| self.store.lease(&caller.identity, Demand::Now, caller.attested.workload.pod().cloned()));
        let mut material = lease.as_ref().map(Lease::watch);
        let mut trust = self.trust.clone();
        loop {
            trust.mark_unchanged();
            let view = self.view(lease.as_ref(), &trust);
            if view.has_all(&known) || end <= Instant::now() {
                return self.fetched(connection, caller, &known, &view).map(Some);
            }
            tokio::select! {
                () = caller.attested.terminated.cancelled() => return Err(ended()),
                () = changed(material.as_mut()) => {}
                Ok(()) = trust.changed() => {}
                Ok(()) = rules.changed() => return Ok(None),
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
            if let (Some((kind, bytes)), Some(version)) = (view.resource(target, Variant::Sotw, name), view.version(target)) {
                self.metrics.sent(kind, Trigger::subscribe);
                resources.push(bytes);
                versions.push((name.as_str(), version));
            }
        }
        if resources.is_empty() {
            return Err(Status::unavailable("not yet available; the certificate is being issued"));
        }
        let version_prefix =
            view.svid.as_ref().map(|svid| version::prefix(svid.version())).filter(|_| known.iter().any(|(_, t)| *t == Target::Certificate));
        let version = secret::response_version(version_prefix, &versions);
        Ok(secret::response(Variant::Sotw, &version, "", resources))
    }

    /// The resources that are available now. An expired certificate is withheld.
    fn view(&self, lease: Option<&Lease>, trust: &watch::Receiver<Arc<BundleSet>>) -> View {
        let now = self.clock.now();
        let svid = lease.and_then(Lease::current).filter(|svid| svid.chain.validity.is_live(now));
        View { svid, bundles: trust.borrow().clone() }
    }
}
