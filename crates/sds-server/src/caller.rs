//! The caller of one connection: attested when it first asks for something, once, and named by the rules as they are.
//!
//! The socket's side of the HTTP/2 handshake never waits for this: a client that only connects is answered at once.

use std::{sync::Arc, time::Instant};

use agent_runtime::telemetry::hush::{self, LogLimiter};
use parking_lot::Mutex;
use tokio::sync::{Notify, OnceCell, watch};
use tonic::Status;
use tracing::{debug, warn};
use unix_peer::peer::Peer;
use workload_identity::{Identity, Resolver};

use crate::attest::{self, Attested, Attestor, Method, Reason, origin::Origin};

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::caller";

/// A proven caller and what it may have.
#[derive(Debug)]
pub struct Caller {
    /// Who it is; `attested.terminated` ends its streams.
    pub attested: Attested,
    /// What it may have, by the rules of the moment in which it was named.
    pub identity: Arc<Identity>,
}

/// Attests and names callers; one for each socket.
#[derive(Debug, Clone)]
pub struct Authenticator {
    /// How callers of this socket are known.
    pub attestor: Arc<dyn Attestor>,
    /// How they are named.
    pub resolver: watch::Receiver<Arc<Resolver>>,
    /// What is counted.
    pub metrics: attest::Metrics,
    /// Who hears of pods that are not served.
    pub observer: Option<Arc<dyn attest::CallerObserver>>,
}

impl Authenticator {
    /// What makes lines about callers from `origin` the same; `is_proven` where the caller has been attested. Callers that are in no pod,
    /// or have ended, are one where pods are served: their user ids are theirs to choose.
    pub fn cause(&self, origin: &Origin, what: &'static str, is_proven: bool) -> Cause {
        let is_proven = is_proven || self.attestor.method() == Method::unix;
        let is_known = is_proven || matches!(origin, Origin::Pod(_));
        Cause { origin: is_known.then(|| origin.clone()), what, is_proven }
    }
}

/// One connection's caller, not yet known or known.
#[derive(Debug)]
pub struct Connection {
    peer: Peer,
    authenticator: Authenticator,
    attested: OnceCell<Attested>,
    /// The name, and the rules that gave it.
    named: Mutex<Option<(Arc<Resolver>, Arc<Caller>)>>,
    known: Notify,
    origin: Origin,
    refusals: Arc<Refusals>,
}

/// Lines of the log about callers that are refused, and about clients that refuse what they get.
pub type Refusals = LogLimiter<Cause>;

/// What makes two lines about callers the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Cause {
    /// None where callers cannot be distinguished.
    origin: Option<Origin>,
    what: &'static str,
    is_proven: bool,
}

impl Cause {
    /// About no caller in particular.
    pub fn unattributed(what: &'static str) -> Self {
        Self { origin: None, what, is_proven: false }
    }
}

impl hush::Cause for Cause {
    fn is_proven(&self) -> bool {
        self.is_proven
    }
}

/// What a caller that can never be served is told. The cause goes to the log.
const REFUSED_MESSAGE: &str = "no identity is available to this caller";
/// What a caller that cannot be judged now is told.
const RETRY_MESSAGE: &str = "the caller cannot be identified right now";

impl Connection {
    /// A fresh connection of `peer`.
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

    /// The same, one of several that come from `origin` and are told of in one place.
    pub fn coming_from(self, origin: Origin, refusals: Arc<Refusals>) -> Self {
        Self { origin, refusals, ..self }
    }

    /// The peer.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Who is calling, and what it may have now. The first call attests, and may wait as long as the attestor does; failures are not
    /// remembered.
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
        // After the cell has been set: who wakes finds it.
        self.known.notify_waiters();
        attested.and_then(|attested| self.named(attested)).map_err(|error| {
            self.log(&error);
            if let Some((observer, pod)) = self.authenticator.observer.as_ref().zip(error.pod.as_ref()) {
                observer.refused(pod, &error);
            }
            if error.temporary { Status::unavailable(RETRY_MESSAGE) } else { Status::permission_denied(REFUSED_MESSAGE) }
        })
    }

    /// The rules as they come: a caller that was named before another set has to be named again.
    pub fn rules(&self) -> watch::Receiver<Arc<Resolver>> {
        self.authenticator.resolver.clone()
    }

    /// Attests, and is content only with who has a name.
    async fn identify(&self) -> Result<Attested, attest::Error> {
        let attested = self.authenticator.attestor.attest(&self.peer).await?;
        self.named(&attested)?;
        Ok(attested)
    }

    /// Who has been attested, named by the rules as they are now. An identity that these do not give is refused.
    fn named(&self, attested: &Attested) -> Result<Arc<Caller>, attest::Error> {
        let resolver = self.authenticator.resolver.borrow().clone();
        let mut named = self.named.lock();
        if let Some((by, caller)) = &*named
            && Arc::ptr_eq(by, &resolver)
        {
            return Ok(caller.clone());
        }
        let pod = attested.workload.pod();
        let identity = resolver.resolve(&attested.workload).map_err(|error| {
            let refused = attest::Error::refused(Reason::no_identity, error.to_string());
            attest::Error { pod: pod.cloned(), ..refused }
        })?;
        debug!(target: LOG_TARGET, peer = ?self.peer, workload = %attested.workload, %identity, again = named.is_some(), "caller named");
        let caller = Arc::new(Caller { attested: attested.clone(), identity: Arc::new(identity) });
        *named = Some((resolver, caller.clone()));
        drop(named);
        if let Some((observer, pod)) = self.authenticator.observer.as_ref().zip(pod) {
            observer.served(pod);
        }
        Ok(caller)
    }

    /// Whether the workload of `caller`, who has this connection, has ended. Asked before a key leaves: what `terminated` awaits is only about
    /// to be told when the process that connected has just ended and another holds the connection.
    pub fn has_ended(&self, caller: &Caller) -> bool {
        let terminated = &caller.attested.terminated;
        if !terminated.is_cancelled() && !self.authenticator.attestor.still_holds(&self.peer) {
            terminated.cancel();
        }
        terminated.is_cancelled()
    }

    /// Whether to tell the log of `what` this caller does, and how many like it were left out: one line for each cause, origin and minute.
    pub fn permit_log(&self, what: &'static str) -> Option<u64> {
        self.line_is_due(what, self.attested.get().is_some())
    }

    fn line_is_due(&self, what: &'static str, is_proven: bool) -> Option<u64> {
        self.refusals.permit(self.authenticator.cause(&self.origin, what, is_proven), tokio::time::Instant::now())
    }

    /// A caller that tries again and again does not fill the log.
    fn log(&self, error: &attest::Error) {
        match self.line_is_due(error.reason.as_str(), error.pod.is_some() || self.attested.get().is_some()) {
            Some(0) => warn!(target: LOG_TARGET, peer = ?self.peer, cause = %error, "caller not served"),
            Some(left_out) => {
                warn!(target: LOG_TARGET, peer = ?self.peer, origin = %self.origin, left_out, cause = %error, "caller not served");
            }
            None => debug!(target: LOG_TARGET, peer = ?self.peer, cause = %error, "caller not served, again"),
        }
    }

    /// Returns when the workload of this connection has ended; never while the caller is unknown.
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

    /// Knows everybody, until told that it does not.
    #[derive(Debug)]
    struct Fickle(AtomicBool);

    impl Attestor for Fickle {
        fn method(&self) -> Method {
            Method::unix
        }

        fn attest<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Result<Attested, attest::Error>> {
            let workload = workload_identity::Workload::Unix { uid: peer.uid };
            Box::pin(std::future::ready(Ok(Attested { workload, terminated: CancellationToken::new() })))
        }

        fn still_holds(&self, _peer: &Peer) -> bool {
            self.0.load(Ordering::SeqCst)
        }
    }

    /// Names users.
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
        assert!(connection.has_ended(&caller), "nobody comes back");
    }

    /// Refuses everybody: processes that have ended, and pods by what is known of them.
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

    /// One call of a caller from `origin`, which is refused.
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
