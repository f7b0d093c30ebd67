//! `FetchSecrets`: one response with all requested names, within the deadline of the client.
//!
//! A certificate that is not due for renewal is served without a lease. If it is due, the call takes a lease, so that rotation orders the
//! next certificate, and still serves the current one. A call waits for the next one only if the current one ends within its settling time,
//! and serves the current one at the deadline.

use std::{
    collections::VecDeque,
    time::{Duration, SystemTime},
};

use agent_runtime::{clock, text};
use bytes::Bytes;
use http::Request;
use tokio::time::Instant;
use tonic::Status;
use workload_identity::{Identity, version};

use super::{Service, View, changed, ended, is_known, violation};
use crate::{
    caller::{Caller, Changes, Connection},
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
        loop {
            let (caller, mut changes) = connection.resolve().await?;
            if let Some(answer) = self.answer_to(&caller, &asked, end, connection, &mut changes).await? {
                return Ok(answer);
            }
        }
    }

    /// The response for `caller`. `None` if there were changes meanwhile: the caller may have another identity.
    async fn answer_to(
        &self,
        caller: &Caller,
        asked: &[String],
        end: Instant,
        connection: &Connection,
        changes: &mut Changes,
    ) -> Result<Option<VecDeque<Bytes>>, Status> {
        let bundles = self.trust.borrow().clone();
        let known = self.known(asked, &caller.identity, &bundles);
        if known.is_empty() {
            let asked: Vec<_> = asked.iter().map(|name| text::excerpt(name, text::MAX_NAME_CHARS).escape_debug().to_string()).collect();
            return Err(Status::not_found(format!("none of these names is known here: {}", asked.join(", "))));
        }
        let wants_certificate = known.iter().any(|(_, target)| *target == Target::Certificate);
        let svid = if wants_certificate { self.store.at_rest(&caller.identity, self.clock.now()) } else { None };
        let view = View { svid, bundles };
        if view.has_all(&known) {
            return self.fetched(connection, caller, &known, &view, None).map(Some);
        }
        let lease = wants_certificate.then(|| self.store.lease(&caller.identity, Demand::Now, caller.attested.workload.pod().cloned()));
        let mut material = lease.as_ref().map(Lease::watch);
        let mut trust = self.trust.clone();
        loop {
            trust.mark_unchanged();
            let current = lease.as_ref().and_then(Lease::current);
            let now = self.clock.now();
            // An expired certificate is withheld.
            let svid = current.clone().filter(|svid| svid.chain.validity.is_live(now));
            let ends_soon = svid.as_ref().is_some_and(|svid| svid.chain.validity.ends_soon(now));
            let view = View { svid, bundles: trust.borrow().clone() };
            if (view.has_all(&known) && !ends_soon) || end <= Instant::now() {
                let not_after = current.map(|svid| svid.chain.validity.not_after);
                return self.fetched(connection, caller, &known, &view, not_after).map(Some);
            }
            tokio::select! {
                () = caller.attested.terminated.cancelled() => return Err(ended()),
                () = changed(material.as_mut()) => {}
                Ok(()) = trust.changed() => {}
                () = changes.wait() => return Ok(None),
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

    /// The response with the resources in `view`. `not_after` is the end of the certificate, which may be in the past.
    fn fetched(
        &self,
        connection: &Connection,
        caller: &Caller,
        known: &[(String, Target)],
        view: &View,
        not_after: Option<SystemTime>,
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
            return Err(Status::unavailable(match not_after {
                Some(at) => format!("the certificate expired at {}, and the next one is not issued yet", clock::rfc3339(at)),
                None => "not yet available; the certificate is being issued".to_owned(),
            }));
        }
        let version_prefix =
            view.svid.as_ref().map(|svid| version::prefix(svid.version())).filter(|_| known.iter().any(|(_, t)| *t == Target::Certificate));
        let version = secret::response_version(version_prefix, &versions);
        Ok(secret::response(Variant::Sotw, &version, "", resources, &[]))
    }
}
