//! The one owner of trust bundles: sources offer PEM, and everybody else watches the [`BundleSet`].
//!
//! A source that offers nothing, garbage or an empty file is reported and changes nothing: the last good bundle stays. The bundle of a
//! domain is the union of its sources, in their order. Published only when the content changes. A source may offer revocation lists too,
//! beside roots or alone; [`crl`] says when they are served.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
    time::SystemTime,
};

use agent_runtime::clock;
use aws_lc_rs::digest;
use parking_lot::{Mutex, MutexGuard};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;
use workload_identity::TrustDomain;

use self::crl::RevocationList;
use crate::material::{self, Attached, CertificateChain, TrustBundle};

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::trust";

pub mod crl;
pub mod file;

/// Why lists wait after the start.
const FIRST_CHAIN: &str = "no certificate has been issued since the start: it is not known which authorities sign";
/// Authorities below the roots that are remembered; more are not needed to see that there are many.
const MAX_INTERMEDIATES: usize = 64;

/// A bundle, and what the server keeps with it.
#[derive(Debug)]
pub struct Bundle {
    /// The roots.
    pub roots: TrustBundle,
    /// Revocation lists that go with them, or none.
    crls: Vec<RevocationList>,
    version: String,
    /// Of the server.
    pub attached: Attached,
}

impl Bundle {
    /// Roots and lists that fit them.
    pub fn new(roots: TrustBundle, crls: Vec<RevocationList>) -> Self {
        let mut version = roots.version().to_owned();
        if !crls.is_empty() {
            let mut hash = digest::Context::new(&digest::SHA256);
            hash.update(version.as_bytes());
            crls.iter().for_each(|list| hash.update(list.der()));
            version = format!("b-{}", agent_runtime::text::hex(&hash.finish().as_ref()[..8]));
        }
        Self { roots, crls, version, attached: Attached::default() }
    }

    /// `b-` and a digest of the content: of the roots alone where there are no lists.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Its lists.
    pub fn crls(&self) -> &[RevocationList] {
        &self.crls
    }

    /// The lists as PEM; none where there are none.
    pub fn crls_pem(&self) -> Option<Vec<u8>> {
        let mut pem = Vec::new();
        self.crls.iter().for_each(|list| material::push_pem("X509 CRL", list.der(), &mut pem));
        (!pem.is_empty()).then_some(pem)
    }

    fn holds(&self, roots: &TrustBundle, crls: &[RevocationList]) -> bool {
        self.roots == *roots && self.crls == crls
    }
}

/// Every bundle that the agent has.
#[derive(Debug, Default, Clone)]
pub struct BundleSet {
    /// The agent's own trust domain's; none until the first source has offered one.
    pub own: Option<Arc<Bundle>>,
    /// Other domains'.
    pub federated: BTreeMap<TrustDomain, Arc<Bundle>>,
    /// Revocation lists wait for the first chain: only that shows which authorities sign.
    pub wants_chain: bool,
}

/// What the operator should know: a source's offer was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("trust bundle from {origin} {cause}; the last good one stays in use")]
pub struct Refused {
    /// The source's name.
    pub origin: Arc<str>,
    /// What is wrong with it.
    pub cause: material::Error,
}

/// Owns the bundles.
#[derive(Debug, Clone)]
pub struct Trust(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    offers: Mutex<Offers>,
    set: watch::Sender<Arc<BundleSet>>,
    metrics: Metrics,
}

/// All that there is to make bundles of.
#[derive(Debug, Default)]
struct Offers {
    slots: Vec<Slot>,
    /// Whether a chain of the own domain has been met.
    has_met: bool,
    /// Authorities below the roots, as met in such chains, and until when their certificates live.
    intermediates: HashMap<CertificateDer<'static>, SystemTime>,
    /// Why lists are withheld, as it was told.
    withheld: BTreeMap<Option<TrustDomain>, String>,
}

#[derive(Debug)]
struct Slot {
    domain: Option<TrustDomain>,
    bundle: Option<TrustBundle>,
    crls: Vec<RevocationList>,
}

/// One source's place. Its owner offers whatever it reads.
#[derive(Debug, Clone)]
pub struct Source {
    trust: Trust,
    index: usize,
    name: Arc<str>,
}

impl Trust {
    /// Starts without sources.
    pub fn new(metrics: Metrics) -> Self {
        Self(Arc::new(Inner { offers: Mutex::default(), set: watch::Sender::new(Arc::default()), metrics }))
    }

    /// The bundles, now and later.
    pub fn subscribe(&self) -> watch::Receiver<Arc<BundleSet>> {
        self.0.set.subscribe()
    }

    /// A place for one source of `domain`'s bundle; `None` is the agent's own domain. `name` is for people: `configMap a/b[c]`.
    pub fn source(&self, domain: Option<TrustDomain>, name: &str) -> Source {
        let slots = &mut self.offers().slots;
        slots.push(Slot { domain, bundle: None, crls: Vec::new() });
        let source = Source { trust: self.clone(), index: slots.len() - 1, name: name.into() };
        // From zero on, or the first refusal would be no increase.
        drop(self.0.metrics.refused.get_or_create(&source.label()));
        source
    }

    /// A certificate of the own domain came with these authorities below its root, if any, and lives for a time: lists have to cover them.
    /// What a former process met is not known, so that lists wait for the first.
    pub fn met(&self, chain: &CertificateChain, now: SystemTime) {
        let intermediates = chain.certificates().get(1..).unwrap_or_default();
        let mut offers = self.offers();
        let first = !std::mem::replace(&mut offers.has_met, true);
        let known = &mut offers.intermediates;
        let before = known.len();
        known.retain(|_, until| *until > now);
        let mut changed = first || known.len() != before;
        for authority in intermediates {
            let room = known.len() < MAX_INTERMEDIATES;
            match known.get_mut(authority) {
                Some(until) => *until = chain.validity.not_after.max(*until),
                None if room => {
                    known.insert(authority.clone(), chain.validity.not_after);
                    changed = true;
                }
                None => {}
            }
        }
        if changed {
            self.publish(&mut offers);
        }
    }

    fn offers(&self) -> MutexGuard<'_, Offers> {
        self.0.offers.lock()
    }

    fn publish(&self, offers: &mut Offers) {
        let Offers { slots, has_met, intermediates, withheld } = offers;
        let mut domains: BTreeMap<Option<TrustDomain>, (Vec<_>, Vec<_>)> = BTreeMap::new();
        for slot in slots {
            let (roots, crls) = domains.entry(slot.domain.clone()).or_default();
            roots.extend_from_slice(slot.bundle.as_ref().map_or(&[], TrustBundle::roots));
            crls.extend_from_slice(&slot.crls);
        }
        // The same on every node and after every restart.
        let mut below: Vec<_> = intermediates.keys().collect();
        below.sort_unstable_by(|one, other| one.as_ref().cmp(other.as_ref()));
        let (mut next, mut counts) = (BundleSet::default(), (0, 0));
        let current = self.0.set.borrow().clone();
        for (domain, (certificates, crls)) in domains {
            // Each root was parsed when it was offered; where there is none yet, lists alone are of no use.
            let Ok(roots) = TrustBundle::from_certificates(certificates) else { continue };
            let fitting = match &domain {
                _ if crls.is_empty() => Ok(Vec::new()),
                Some(domain) => Err(format!("they are of {domain}, and nobody here sees which authorities sign there")),
                None if !*has_met => Err(FIRST_CHAIN.to_owned()),
                None => crl::fit(roots.roots().iter().chain(below.iter().copied()), &crls),
            };
            next.wants_chain |= fitting.as_ref().is_err_and(|why| why == FIRST_CHAIN);
            let crls = match fitting {
                Ok(fitting) => {
                    counts.0 += fitting.len();
                    if withheld.remove(&domain).is_some() {
                        tracing::info!(target: LOG_TARGET, lists = fitting.len(), "revocation lists are served again");
                    }
                    fitting
                }
                Err(why) => {
                    counts.1 += crls.len();
                    if next.wants_chain {
                        tracing::info!(target: LOG_TARGET, why, lists = crls.len(), "revocation lists are not served yet");
                    } else if withheld.get(&domain) != Some(&why) {
                        tracing::warn!(
                            target: LOG_TARGET, why,
                            lists = crls.len(),
                            "revocation lists are not served: clients would refuse all peers of an authority without a list of its own"
                        );
                        withheld.insert(domain.clone(), why);
                    }
                    Vec::new()
                }
            };
            let old = domain.as_ref().map_or(current.own.as_ref(), |d| current.federated.get(d));
            let bundle = old.filter(|old| old.holds(&roots, &crls)).cloned().unwrap_or_else(|| Arc::new(Bundle::new(roots, crls)));
            match domain {
                None => next.own = Some(bundle),
                Some(domain) => drop(next.federated.insert(domain, bundle)),
            }
        }
        self.0.metrics.served(counts);
        self.0.set.send_if_modified(|current| {
            let changed = !current.same(&next);
            *current = Arc::new(next);
            changed
        });
    }
}

impl BundleSet {
    fn same(&self, other: &Self) -> bool {
        let equal = |a: Option<&Arc<Bundle>>, b: Option<&Arc<Bundle>>| match (a, b) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        self.wants_chain == other.wants_chain
            && equal(self.own.as_ref(), other.own.as_ref())
            && self.federated.len() == other.federated.len()
            && self.federated.iter().all(|(domain, bundle)| equal(Some(bundle), other.federated.get(domain)))
    }
}

impl Source {
    /// The name given for people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Offers PEM: roots, revocation lists, or both. What cannot be used is refused, counted and logged, and changes nothing.
    pub fn offer(&self, pem: &[u8]) -> Result<(), Refused> {
        let read = || {
            let crls = crl::from_pem(pem)?;
            match TrustBundle::from_pem(pem) {
                Ok(bundle) => Ok((Some(bundle), crls)),
                Err(material::Error::Empty) if !crls.is_empty() => Ok((None, crls)),
                Err(cause) => Err(cause),
            }
        };
        match read() {
            Ok((bundle, crls)) => {
                self.put(bundle, Some(crls));
                Ok(())
            }
            Err(cause) => {
                let refused = Refused { origin: self.name.clone(), cause };
                self.trust.0.metrics.refused.get_or_create(&self.label()).inc();
                tracing::warn!(target: LOG_TARGET, source = %self.name, error = %refused, "trust bundle refused");
                Err(refused)
            }
        }
    }

    /// There is nothing to offer, and `why` says so: counted and logged like a refused offer, and changes nothing either.
    pub fn missing(&self, why: impl fmt::Display) {
        self.trust.0.metrics.refused.get_or_create(&self.label()).inc();
        tracing::warn!(target: LOG_TARGET, source = %self.name, error = %why, "no trust bundle there; the last good one stays in use");
    }

    /// Takes a bundle that has been read already.
    pub fn take(&self, bundle: TrustBundle) {
        self.put(Some(bundle), None);
    }

    /// Puts what there is into the source's place; what is none stays as it was. Roots never go for want of an offer.
    fn put(&self, bundle: Option<TrustBundle>, crls: Option<Vec<RevocationList>>) {
        let metrics = &self.trust.0.metrics;
        let mut offers = self.trust.offers();
        let slot = &mut offers.slots[self.index];
        let (mut changed, version) = (false, bundle.as_ref().map(|bundle| bundle.version().to_owned()));
        if let Some(bundle) = bundle {
            metrics.expiry.get_or_create(&self.label()).set(seconds(bundle.earliest_expiry));
            if slot.bundle.as_ref() != Some(&bundle) {
                tracing::info!(target: LOG_TARGET, source = %self.name, roots = bundle.roots().len(), version, "trust bundle taken");
                slot.bundle = Some(bundle);
                changed = true;
            }
        }
        if let Some(crls) = crls.filter(|crls| *crls != slot.crls) {
            let revoked: usize = crls.iter().map(|list| list.revoked).sum();
            tracing::info!(target: LOG_TARGET, source = %self.name, lists = crls.len(), revoked, "revocation lists taken");
            metrics.listed(&self.label(), &crls);
            slot.crls = crls;
            changed = true;
        }
        if changed {
            self.trust.publish(&mut offers);
        }
    }

    fn label(&self) -> Label {
        Label { source: self.name.to_string() }
    }
}

/// The source's name; there are as many as are configured.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Label {
    source: String,
}

/// Whether lists are served.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Standing {
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the names are the label's values")]
enum State {
    served,
    withheld,
}

/// What trust counts.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    expiry: Family<Label, Gauge>,
    refused: Family<Label, Counter>,
    crls: Family<Standing, Gauge>,
    this_update: Family<Label, Gauge>,
    next_update: Family<Label, Gauge>,
}

impl Metrics {
    /// Registers the module's metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "bundle_expiration_timestamp_seconds",
            "The first moment at which a root of this source has expired",
            metrics.expiry.clone(),
        );
        registry.register(
            "bundles_refused",
            "Times that a source had no bundle that could be used: missing, empty, oversized or unparsable",
            metrics.refused.clone(),
        );
        registry.register(
            "crls",
            "Revocation lists that the sources offer; withheld are those that would make clients refuse every peer",
            metrics.crls.clone(),
        );
        registry.register(
            "crl_this_update_timestamp_seconds",
            "When that revocation list of this source was made which ends first",
            metrics.this_update.clone(),
        );
        registry.register(
            "crl_next_update_timestamp_seconds",
            "When the first revocation list of this source ends: from then on clients refuse every peer of its authority",
            metrics.next_update.clone(),
        );
        metrics.served((0, 0));
        metrics
    }

    fn served(&self, (served, withheld): (usize, usize)) {
        for (state, count) in [(State::served, served), (State::withheld, withheld)] {
            self.crls.get_or_create(&Standing { state }).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// The series of a source are there as long as it has lists that end.
    fn listed(&self, label: &Label, crls: &[RevocationList]) {
        match crls.iter().filter_map(|list| Some((list.next_update?, list.this_update))).min() {
            Some((next, this)) => {
                self.next_update.get_or_create(label).set(seconds(next));
                self.this_update.get_or_create(label).set(seconds(this));
            }
            None => {
                self.next_update.remove(label);
                self.this_update.remove(label);
            }
        }
    }

    /// Registers and counts one of everything, for the reference.
    #[cfg(any(test, feature = "testing"))]
    pub fn sample(registry: &mut Registry) {
        let metrics = Self::register(registry);
        let label = Label { source: agent_runtime::metrics::ANY.to_owned() };
        metrics.expiry.get_or_create(&label).set(1);
        metrics.refused.get_or_create(&label).inc();
        metrics.this_update.get_or_create(&label).set(1);
        metrics.next_update.get_or_create(&label).set(1);
    }
}

fn seconds(at: SystemTime) -> i64 {
    i64::try_from(clock::unix_seconds(at)).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::{crl::samples::Authority, *};

    fn pem(name: &str) -> Vec<u8> {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.self_signed(&key).unwrap().pem().into_bytes()
    }

    #[test]
    fn a_bad_offer_never_replaces_a_good_bundle() {
        let trust = Trust::new(Metrics::default());
        let source = trust.source(None, "file a");
        let mut watcher = trust.subscribe();
        source.offer(&pem("a")).unwrap();
        let good = watcher.borrow_and_update().own.clone().unwrap();

        for bad in [&b""[..], b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            let refused = source.offer(bad).unwrap_err();
            assert!(refused.to_string().starts_with("trust bundle from file a "), "{refused}");
        }
        source.missing("the file is gone");
        assert!(!watcher.has_changed().unwrap());
        assert!(Arc::ptr_eq(&good, watcher.borrow().own.as_ref().unwrap()));
        assert_eq!(trust.0.metrics.refused.get_or_create(&source.label()).get(), 4);
    }

    #[test]
    fn sources_of_a_domain_are_joined_and_equal_content_wakes_nobody() {
        let trust = Trust::new(Metrics::default());
        let (first, second) = (trust.source(None, "a"), trust.source(None, "b"));
        let (a, b) = (pem("a"), pem("b"));
        let mut watcher = trust.subscribe();
        second.offer(&b).unwrap();
        first.offer(&a).unwrap();
        let set = watcher.borrow_and_update().clone();
        assert_eq!(set.own.as_ref().unwrap().roots, TrustBundle::from_pem(&[a.clone(), b].concat()).unwrap());
        first.offer(&a).unwrap();
        assert!(!watcher.has_changed().unwrap());
    }

    fn chain(certificates: &[&Authority]) -> CertificateChain {
        let pem: String = certificates.iter().map(|authority| authority.certificate.pem()).collect();
        CertificateChain::from_pem(pem.as_bytes()).unwrap()
    }

    #[test]
    fn another_domains_lists_are_not_served() {
        let trust = Trust::new(Metrics::default());
        let (partner, a) = (TrustDomain::new("partner.example").unwrap(), Authority::new("a"));
        trust.source(Some(partner.clone()), "partner").offer([a.certificate.pem(), a.list(1, 0)].concat().as_bytes()).unwrap();
        trust.met(&chain(&[&a]), SystemTime::now());
        let set = trust.subscribe().borrow().clone();
        assert!(set.federated[&partner].crls().is_empty() && !set.wants_chain);
    }

    #[test]
    fn crls_are_served_only_when_every_root_has_one() {
        let metrics = Metrics::default();
        let trust = Trust::new(metrics.clone());
        let (roots, crls) = (trust.source(None, "roots"), trust.source(None, "lists"));
        let (a, b) = (Authority::new("a"), Authority::new("b"));
        let own = || trust.subscribe().borrow().own.clone().unwrap();
        let counts = || [State::served, State::withheld].map(|state| metrics.crls.get_or_create(&Standing { state }).get());
        // Lists before roots wait for them, and for a certificate.
        crls.offer(a.list(1, 0).as_bytes()).unwrap();
        assert!(trust.subscribe().borrow().own.is_none());
        roots.offer(a.certificate.pem().as_bytes()).unwrap();
        assert!(own().crls().is_empty() && trust.subscribe().borrow().wants_chain);
        trust.met(&chain(&[&b]), SystemTime::now());
        assert!(!trust.subscribe().borrow().wants_chain);
        assert!(own().crls_pem().is_some_and(|pem| pem.starts_with(b"-----BEGIN X509 CRL-----")));
        assert_eq!((own().crls()[0].revoked, counts()), (1, [1, 0]));
        assert_ne!(own().version(), own().roots.version(), "another content is another version");

        for bad in [&b""[..], b"garbage", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"] {
            crls.offer(bad).unwrap_err();
        }
        assert_eq!(own().crls().len(), 1);
        // Another root without a list: clients would refuse all its peers.
        roots.offer([a.certificate.pem(), b.certificate.pem()].concat().as_bytes()).unwrap();
        assert_eq!((own().crls().len(), own().roots.roots().len(), counts()), (0, 2, [0, 1]));
        assert_eq!(own().version(), own().roots.version());
        crls.offer([a.list(1, 0), b.list(0, 0)].concat().as_bytes()).unwrap();
        assert_eq!((own().crls().len(), counts()), (2, [2, 0]));
        assert!(metrics.next_update.get_or_create(&crls.label()).get() > metrics.this_update.get_or_create(&crls.label()).get());

        // A file of lists alone takes no root away, and one of roots alone its lists.
        roots.offer(a.list(3, 0).as_bytes()).unwrap();
        assert_eq!(own().roots.roots().len(), 2);
        roots.offer([a.certificate.pem(), b.certificate.pem()].concat().as_bytes()).unwrap();
        assert_eq!(own().crls().len(), 2);
    }

    #[test]
    fn an_authority_below_a_root_needs_a_list_while_its_certificates_live() {
        let trust = Trust::new(Metrics::default());
        let (root, below) = (Authority::new("root"), Authority::new("below"));
        trust.source(None, "all").offer([root.certificate.pem(), root.list(0, 0)].concat().as_bytes()).unwrap();
        let served = || trust.subscribe().borrow().own.as_ref().unwrap().crls().len();
        let leaf = Authority::new("leaf");
        let now = SystemTime::now();
        trust.met(&chain(&[&leaf]), now);
        assert_eq!(served(), 1);
        let deep = chain(&[&leaf, &below]);
        trust.met(&deep, now);
        assert_eq!(served(), 0, "nobody would accept what it has signed");
        trust.source(None, "below").offer(below.list(0, 0).as_bytes()).unwrap();
        assert_eq!(served(), 2);
        // Its last certificate has ended.
        let later = deep.validity.not_after + std::time::Duration::from_secs(1);
        trust.met(&chain(&[&leaf, &root]), later);
        assert_eq!(trust.offers().intermediates.len(), 1);
    }

    #[test]
    fn domains_are_kept_apart() {
        let trust = Trust::new(Metrics::default());
        let partner = TrustDomain::new("partner.example").unwrap();
        trust.source(None, "own").offer(&pem("a")).unwrap();
        let own = trust.subscribe().borrow().own.clone().unwrap();
        trust.source(Some(partner.clone()), "partner").offer(&pem("b")).unwrap();
        let set = trust.subscribe().borrow().clone();
        assert!(Arc::ptr_eq(&own, set.own.as_ref().unwrap()), "another domain's news do not touch it");
        assert!(set.federated.contains_key(&partner));
    }
}
