//! The caller of one connection. It is attested once, at the first request, and gets its identity from the current resolver and from the
//! current facts about its workload.
//!
//! The HTTP/2 handshake never waits for attestation: a client that only connects gets the server's SETTINGS at once.

use std::{sync::Arc, time::Instant};

use agent_runtime::telemetry::hush::{self, LogLimiter};
use parking_lot::Mutex;
use tokio::sync::{Notify, OnceCell, watch};
use tonic::Status;
use tracing::{debug, warn};
use unix_peer::peer::Peer;
use workload_identity::{Identity, Resolver, Workload};

use crate::attest::{self, Attested, Attestor, Method, Reason, origin::Origin};

/// Target of the log lines of this module.
const LOG_TARGET: &str = "sds_agent::caller";

/// An attested caller and its identity.
#[derive(Debug)]
pub struct Caller {
    /// The attested workload, with the facts that gave the identity. `attested.terminated` ends its streams.
    pub attested: Attested,
    /// The identity, from the resolver and the facts that were current when the caller was resolved.
    pub identity: Arc<Identity>,
}

/// The changes after which a caller has to be [resolved](Connection::resolve) again: those of the resolver, and those of the facts about
/// its workload.
#[derive(Debug)]
pub struct Changes {
    resolver: watch::Receiver<Arc<Resolver>>,
    facts: Option<watch::Receiver<Workload>>,
}

impl Changes {
    /// Whether there was a change.
    pub fn are_pending(&self) -> bool {
        let has_changed = |facts: &watch::Receiver<Workload>| facts.has_changed().unwrap_or(false);
        self.resolver.has_changed().unwrap_or(false) || self.facts.as_ref().is_some_and(has_changed)
    }

    /// Returns when there is a change. It stays [pending](Self::are_pending) until the caller is resolved again.
    ///
    /// # Cancel safety
    ///
    /// The future can be dropped and created again without losing a change.
    pub async fn wait(&mut self) {
        let resolver = noticed(&mut self.resolver);
        match &mut self.facts {
            Some(facts) => tokio::select! {
                () = resolver => {}
                () = noticed(facts) => {}
            },
            None => resolver.await,
        }
    }
}

/// Returns when the value has changed, and leaves the change to be seen. Pending forever if the value can no longer change.
async fn noticed<T>(value: &mut watch::Receiver<T>) {
    if value.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
    value.mark_changed();
}

/// Attests callers and maps them to identities. One for each socket.
#[derive(Debug, Clone)]
pub struct Authenticator {
    /// Proves which workload a caller of this socket is.
    pub attestor: Arc<dyn Attestor>,
    /// Maps workloads to identities.
    pub resolver: watch::Receiver<Arc<Resolver>>,
    /// Metrics of attestation.
    pub metrics: attest::Metrics,
    /// Observes which pods are refused and which are served.
    pub observer: Option<Arc<dyn attest::CallerObserver>>,
}

impl Authenticator {
    /// The cause of a log line about callers from `origin`; the log limiter joins lines with equal causes. `is_proven` is `true` if the
    /// caller is attested.
    ///
    /// On a socket for pods, all unproven callers outside of pods share one cause, because they can choose their user IDs.
    pub fn cause(&self, origin: &Origin, what: &'static str, is_proven: bool) -> Cause {
        let is_proven = is_proven || self.attestor.method() == Method::unix;
        let is_known = is_proven || matches!(origin, Origin::Pod(_));
        Cause { origin: is_known.then(|| origin.clone()), what, is_proven }
    }
}

/// The caller of one connection, attested or not yet.
#[derive(Debug)]
pub struct Connection {
    peer: Peer,
    authenticator: Authenticator,
    attested: OnceCell<Attested>,
    /// The caller, and the resolver that gave its identity. The caller has the facts.
    named: Mutex<Option<(Arc<Resolver>, Arc<Caller>)>>,
    known: Notify,
    origin: Origin,
    refusals: Arc<Refusals>,
}

/// Limits log lines about refused callers, and about clients that reject secrets.
pub type Refusals = LogLimiter<Cause>;

/// The key of the log limiter: lines with equal causes are joined.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Cause {
    /// `None` if callers cannot be distinguished.
    origin: Option<Origin>,
    what: &'static str,
    is_proven: bool,
}

impl Cause {
    /// A cause without a caller.
    pub fn unattributed(what: &'static str) -> Self {
        Self { origin: None, what, is_proven: false }
    }
}

impl hush::Cause for Cause {
    fn is_proven(&self) -> bool {
        self.is_proven
    }
}

/// Message for a caller that can never be served. Only the log has the cause.
const REFUSED_MESSAGE: &str = "no identity is available to this caller";
/// Message for a caller that cannot be attested now.
const RETRY_MESSAGE: &str = "the caller cannot be identified right now";

impl Connection {
    /// A connection of `peer` that is not attested yet. Its origin is the user ID of the peer, until [`coming_from`](Self::coming_from)
    /// sets another one.
    pub fn new(peer: Peer, authenticator: Authenticator) -> Self {
        let origin = Origin::User(peer.uid);
        Self {
            peer,
            authenticator,
            attested: OnceCell::new(),
            named: Mutex::default(),
            known: Notify::new(),
            origin,
            refusals: Arc::default(),
        }
    }

    /// Sets the origin of the connection, and the log limiter that it shares with other connections.
    pub fn coming_from(self, origin: Origin, refusals: Arc<Refusals>) -> Self {
        Self { origin, refusals, ..self }
    }

    /// The credentials of the peer.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Returns the caller and its current identity. The first call attests the caller, and waits as long as the attestor does. Failures are
    /// not cached: the next call tries again.
    ///
    /// # Errors
    ///
    /// - PERMISSION_DENIED: the caller can never be served.
    /// - UNAVAILABLE: the caller cannot be attested now.
    ///
    /// The message is generic; the log has the cause.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops an attestation that is in progress. The next call starts it again.
    pub async fn caller(&self) -> Result<Arc<Caller>, Status> {
        let attested = self.attested.get_or_try_init(|| async {
            let start = Instant::now();
            let result = self.identify().await;
            self.authenticator.metrics.observe(
                self.authenticator.attestor.method(),
                result.as_ref().map(|_| ()),
                start.elapsed().as_secs_f64(),
            );
            result
        });
        let attested = attested.await;
        // After the cell has been set, so that a woken task finds the value.
        self.known.notify_waiters();
        attested.and_then(|attested| self.named(attested)).map_err(|error| {
            self.log(&error);
            if let Some((observer, pod)) = self.authenticator.observer.as_ref().zip(error.pod.as_ref()) {
                observer.refused(pod, &error);
            }
            if error.temporary { Status::unavailable(RETRY_MESSAGE) } else { Status::permission_denied(REFUSED_MESSAGE) }
        })
    }

    /// Whether the caller has been attested.
    pub fn is_attested(&self) -> bool {
        self.attested.get().is_some()
    }

    /// Returns the caller with its current identity, and the changes from then on. Otherwise like [`caller`](Self::caller).
    ///
    /// # Errors
    ///
    /// The errors of [`caller`](Self::caller).
    pub async fn resolve(&self) -> Result<(Arc<Caller>, Changes), Status> {
        // Marked before the caller is resolved, so that any later change is noticed.
        let mut resolver = self.authenticator.resolver.clone();
        resolver.mark_unchanged();
        let mut facts = self.attested.get().and_then(|attested| attested.facts.clone());
        if let Some(facts) = &mut facts {
            facts.mark_unchanged();
        }
        let caller = self.caller().await?;
        // After the first attestation, changes count from the attestation on.
        let facts = facts.or_else(|| caller.attested.facts.clone());
        Ok((caller, Changes { resolver, facts }))
    }

    /// Attests the caller. A caller without an identity is refused, and the attestation is not kept.
    async fn identify(&self) -> Result<Attested, attest::Error> {
        let attested = self.authenticator.attestor.attest(&self.peer).await?;
        self.named(&attested)?;
        Ok(attested)
    }

    /// Returns the caller with its identity from the current resolver and facts. Refuses a workload for which the resolver has no identity.
    fn named(&self, attested: &Attested) -> Result<Arc<Caller>, attest::Error> {
        let mut named = self.named.lock();
        let (resolver, workload) = (self.authenticator.resolver.borrow().clone(), attested.current());
        if let Some((by, caller)) = &*named
            && Arc::ptr_eq(by, &resolver)
            && caller.attested.workload == workload
        {
            return Ok(caller.clone());
        }
        let attested = Attested { workload, ..attested.clone() };
        let pod = attested.workload.pod();
        let identity = resolver.resolve(&attested.workload).map_err(|error| {
            let refused = attest::Error::refused(Reason::no_identity, error.to_string());
            attest::Error { pod: pod.cloned(), ..refused }
        })?;
        debug!(target: LOG_TARGET, peer = ?self.peer, workload = %attested.workload, %identity, again = named.is_some(), "caller named");
        let caller = Arc::new(Caller { attested, identity: Arc::new(identity) });
        *named = Some((resolver, caller.clone()));
        drop(named);
        if let Some((observer, pod)) = self.authenticator.observer.as_ref().zip(caller.attested.workload.pod()) {
            observer.served(pod);
        }
        Ok(caller)
    }

    /// Whether the workload of `caller` has ended. Once `true`, it stays `true`.
    ///
    /// Call this before a key is sent. `attested.terminated` may be cancelled a moment late: the process that connected has just ended, and
    /// another process still holds the connection.
    pub fn has_ended(&self, caller: &Caller) -> bool {
        let terminated = &caller.attested.terminated;
        if !terminated.is_cancelled() && !self.authenticator.attestor.still_holds(&self.peer) {
            terminated.cancel();
        }
        terminated.is_cancelled()
    }

    /// Whether to log `what` about this caller now. `Some` has the number of equal lines that were left out since the last one. The limit
    /// is one line for each cause, origin and minute.
    pub fn permit_log(&self, what: &'static str) -> Option<u64> {
        self.line_is_due(what, self.attested.get().is_some())
    }

    fn line_is_due(&self, what: &'static str, is_proven: bool) -> Option<u64> {
        self.refusals.permit(self.authenticator.cause(&self.origin, what, is_proven), tokio::time::Instant::now())
    }

    /// Logs a refusal. A caller that retries in a loop gets one line a minute.
    fn log(&self, error: &attest::Error) {
        match self.line_is_due(error.reason.as_str(), error.pod.is_some() || self.attested.get().is_some()) {
            Some(0) => warn!(target: LOG_TARGET, peer = ?self.peer, cause = %error, "caller not served"),
            Some(left_out) => {
                warn!(target: LOG_TARGET, peer = ?self.peer, origin = %self.origin, left_out, cause = %error, "caller not served");
            }
            None => debug!(target: LOG_TARGET, peer = ?self.peer, cause = %error, "caller not served, again"),
        }
    }

    /// Returns when the workload of this connection has ended. Pending while the caller is not attested.
    ///
    /// # Cancel safety
    ///
    /// The future can be dropped and created again without losing the event.
    pub async fn terminated(&self) {
        loop {
            let known = self.known.notified();
            if let Some(attested) = self.attested.get() {
                attested.terminated.cancelled().await;
                return;
            }
            known.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::net::UnixStream,
        sync::atomic::{AtomicBool, Ordering},
    };

    use agent_runtime::telemetry::{Format, capture, captured::Captured};
    use futures::future::BoxFuture;
    use tokio_util::sync::CancellationToken;
    use workload_identity::{PodRef, Profile, TrustDomain, samples::profile};

    use super::*;

    /// Attests every caller, until the test sets the flag to `false`.
    #[derive(Debug)]
    struct Fickle(AtomicBool);

    impl Attestor for Fickle {
        fn method(&self) -> Method {
            Method::unix
        }

        fn attest<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Result<Attested, attest::Error>> {
            let workload = workload_identity::Workload::Unix { uid: peer.uid };
            Box::pin(std::future::ready(Ok(Attested { workload, facts: None, terminated: CancellationToken::new() })))
        }

        fn still_holds(&self, _peer: &Peer) -> bool {
            self.0.load(Ordering::SeqCst)
        }
    }

    /// Gives each user ID an identity.
    fn by_uid() -> Resolver {
        let profile = Profile { dns_names: Vec::new(), ..profile("spiffe://{trustDomain}/uid/{uid}") };
        Resolver::single(TrustDomain::new("example.org").unwrap(), Arc::new(profile))
    }

    #[tokio::test]
    async fn a_caller_ends_for_good_when_its_proof_no_longer_holds() {
        let resolver = by_uid();
        let attestor = Arc::new(Fickle(AtomicBool::new(true)));
        let authenticator = Authenticator {
            attestor: attestor.clone(),
            resolver: watch::channel(Arc::new(resolver)).1,
            metrics: attest::Metrics::default(),
            observer: None,
        };
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let connection = Connection::new(Peer::of(&ours).unwrap(), authenticator);
        let caller = connection.caller().await.unwrap();
        assert!(!connection.has_ended(&caller));
        attestor.0.store(false, Ordering::SeqCst);
        assert!(connection.has_ended(&caller));
        connection.terminated().await;
        attestor.0.store(true, Ordering::SeqCst);
        assert!(connection.has_ended(&caller), "an ended caller stays ended");
    }

    /// Refuses every caller with this error.
    #[derive(Debug)]
    struct Refusing(attest::Error);

    impl Attestor for Refusing {
        fn method(&self) -> Method {
            Method::kubernetes
        }

        fn attest<'a>(&'a self, _: &'a Peer) -> BoxFuture<'a, Result<Attested, attest::Error>> {
            Box::pin(std::future::ready(Err(self.0.clone())))
        }
    }

    /// Makes one call from `origin`, which is refused.
    async fn refused(origin: Origin, error: attest::Error, refusals: &Arc<Refusals>) {
        let resolver = by_uid();
        let authenticator = Authenticator {
            attestor: Arc::new(Refusing(error)),
            resolver: watch::channel(Arc::new(resolver)).1,
            metrics: attest::Metrics::default(),
            observer: None,
        };
        let connection = Connection::new(Peer::without_process(0), authenticator).coming_from(origin, refusals.clone());
        connection.caller().await.unwrap_err();
    }

    fn of_a_pod(number: usize) -> (Origin, attest::Error) {
        let uid: Arc<str> = format!("u{number}").into();
        let pod = PodRef { namespace: "shop".into(), name: "cart-1".into(), uid: uid.clone() };
        (Origin::Pod(uid), attest::Error::refused(Reason::no_service_account, "it has none").by(&pod))
    }

    #[tokio::test(start_paused = true)]
    async fn callers_that_have_ended_are_one_cause_and_do_not_silence_a_pod() {
        let log = Captured::default();
        let (_guard, _filter) = capture("info", Format::Json, log.clone()).unwrap();
        let refusals = Arc::<Refusals>::default();
        let ended = attest::Error::refused(Reason::process_gone, "it has ended");
        for uid in 0..5000 {
            refused(Origin::User(uid), ended.clone(), &refusals).await;
        }
        assert_eq!(log.count("caller not served"), 1);
        for number in 0..2 {
            let (pod, error) = of_a_pod(number);
            refused(pod, error, &refusals).await;
        }
        assert_eq!(log.count("no_service_account"), 2);
        tokio::time::advance(std::time::Duration::from_secs(60)).await;
        refused(Origin::User(7), ended, &refusals).await;
        assert_eq!(log.lines("caller not served")[3]["left_out"], 4999);
    }

    #[tokio::test(start_paused = true)]
    async fn unknown_pods_leave_places_for_known_ones_and_are_reported() {
        let log = Captured::default();
        let (_guard, _filter) = capture("info", Format::Json, log.clone()).unwrap();
        let refusals = Arc::<Refusals>::default();
        for number in 0..5000 {
            let uid = format!("made up {number}").as_str().into();
            refused(Origin::Pod(uid), attest::Error::refused(Reason::unknown_pod, "no such pod"), &refusals).await;
        }
        assert_eq!(log.count("too many different causes"), 1);
        let (pod, error) = of_a_pod(1);
        refused(pod, error, &refusals).await;
        assert_eq!(log.count("no_service_account"), 1);
    }
}
