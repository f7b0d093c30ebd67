//! The trust bundles. Sources offer PEM; all other parts watch the [`BundleSet`].
//!
//! The bundle of a trust domain is the union of its sources, in their order, without roots that have ended. It is published only when its
//! content changes. An offer that is empty or invalid is reported and changes nothing: the last good bundle stays. A source may also offer
//! revocation lists, with roots or alone; the two are judged apart. [`crl`] describes when lists are served. [`Trust::run`] publishes again
//! when a root or a list begins or ends.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use agent_runtime::clock::{self, Clock, SystemClock};
use aws_lc_rs::digest;
use parking_lot::{Mutex, MutexGuard};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use rustls::pki_types::CertificateDer;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use workload_identity::TrustDomain;

use self::{crl::RevocationList, live::LiveRoots};
use crate::material::{self, Attached, CertificateChain, TrustBundle};

/// Target of the log lines of this module.
const LOG_TARGET: &str = "sds_agent::trust";

pub mod crl;
pub mod file;
mod live;

/// The reason for withholding revocation lists after the start.
const FIRST_CHAIN: &str = "no certificate has been issued since the start: the signing authorities are not known yet";
/// Chains with different authorities that are remembered. Further ones are ignored.
const MAX_CHAINS: usize = 64;
/// Minimum time between two changes by the clock.
const MIN_WAIT: Duration = Duration::from_secs(1);
/// Maximum size of all bundles with their revocation lists, in bytes of PEM: 3 MiB. A gRPC client accepts messages of 4 MiB by default.
pub const MAX_BUNDLE_BYTES: usize = 3 << 20;
/// Maximum size of the names of the roots of one bundle, in bytes of DER. A TLS server sends them in an extension, and all extensions have at
/// most 65,535 bytes together (RFC 8446, section 4.3.2). Envoy sends the signature algorithms too, in 24 bytes, and fails each handshake beyond.
pub const MAX_NAME_BYTES: usize = 65_535 - 24 - 6;

/// The bundle of one trust domain: roots and revocation lists.
#[derive(Debug)]
pub struct Bundle {
    /// The roots.
    pub roots: TrustBundle,
    /// The revocation lists that are served with the roots; may be empty.
    crls: Vec<RevocationList>,
    version: String,
    /// Reserved for the server, for example for encoded forms.
    pub attached: Attached,
}

impl Bundle {
    /// Makes a bundle. `crls` must have a list for each authority, see [`crl::fit`].
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

    /// `b-` and a digest of the content. Without revocation lists, it is the version of the roots.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The revocation lists of the bundle.
    pub fn crls(&self) -> &[RevocationList] {
        &self.crls
    }

    /// The revocation lists as PEM. `None` if there are none.
    pub fn crls_pem(&self) -> Option<Vec<u8>> {
        let mut pem = Vec::new();
        self.crls.iter().for_each(|list| material::push_pem("X509 CRL", list.der(), &mut pem));
        (!pem.is_empty()).then_some(pem)
    }

    fn holds(&self, roots: &TrustBundle, crls: &[RevocationList]) -> bool {
        self.roots == *roots && self.crls == crls
    }
}

/// The bundles of all trust domains.
#[derive(Debug, Default, Clone)]
pub struct BundleSet {
    /// The bundle of the own trust domain. `None` until a source has offered roots.
    pub own: Option<Arc<Bundle>>,
    /// The bundles of other trust domains.
    pub federated: BTreeMap<TrustDomain, Arc<Bundle>>,
    /// The offered revocation lists of the own trust domain, also those that are not served.
    pub own_crls: Vec<RevocationList>,
    /// The first issued chain is missing: revocation lists wait for it, because it shows which authorities sign, or the bundle does, because
    /// its roots come with chains.
    pub wants_chain: bool,
}

/// The offer of a source was refused. The error is for the operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("trust bundle from {origin} {cause}; the last good one stays in use")]
pub struct Refused {
    /// The name of the source.
    pub origin: Arc<str>,
    /// The cause.
    pub cause: material::Error,
}

/// Owns the trust bundles. Clones share them.
#[derive(Debug, Clone)]
pub struct Trust(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    offers: Mutex<Offers>,
    set: watch::Sender<Arc<BundleSet>>,
    metrics: Metrics,
    clock: Arc<dyn Clock>,
    /// The time of the next change has become another one.
    rescheduled: Notify,
}

/// The input for the bundles.
#[derive(Debug, Default)]
struct Offers {
    slots: Vec<Slot>,
    /// Whether a chain of the own domain has been recorded.
    has_met: bool,
    /// The last chain of each set of authorities, the leaf first, with the expiry of its leaf.
    chains: Vec<(Vec<CertificateDer<'static>>, SystemTime)>,
    /// The last logged reason for withholding revocation lists, by domain.
    withheld: BTreeMap<Option<TrustDomain>, String>,
    /// The time of the last publication.
    judged_at: Option<SystemTime>,
    /// The next time at which a root, an intermediate or a list begins or ends.
    changes_at: Option<SystemTime>,
    /// Domains all of whose roots have ended, or have not begun.
    lifeless: BTreeSet<Option<TrustDomain>>,
}

#[derive(Debug)]
struct Slot {
    domain: Option<TrustDomain>,
    bundle: Option<TrustBundle>,
    crls: Vec<RevocationList>,
    /// Whether its roots come with issued chains.
    comes_with_chains: bool,
    /// An offer that was too large together with those of the other sources.
    too_large: Option<Offer>,
}

/// The content of an offer. `None` keeps the part that the slot has.
#[derive(Debug, Clone)]
struct Offer {
    bundle: Option<TrustBundle>,
    crls: Option<Vec<RevocationList>>,
}

impl Offers {
    /// Takes the offers that were too large before another source changed.
    fn take_what_fits_now(&mut self) {
        for index in 0..self.slots.len() {
            let Some(Offer { bundle, crls }) = self.slots[index].too_large.take() else { continue };
            if self.check_size(index, bundle.as_ref(), crls.as_deref()).is_err() {
                self.slots[index].too_large = Some(Offer { bundle, crls });
                continue;
            }
            tracing::info!(target: LOG_TARGET, "the trust bundle of a source is taken: with those of the other sources, it was too large before");
            let slot = &mut self.slots[index];
            slot.bundle = bundle.or(slot.bundle.take());
            slot.crls = crls.unwrap_or_else(|| std::mem::take(&mut slot.crls));
        }
    }

    /// Checks the size of all bundles with these parts of the slot at `index` in place of its own.
    fn check_size(&self, index: usize, bundle: Option<&TrustBundle>, crls: Option<&[RevocationList]>) -> Result<(), material::Error> {
        let (mut bytes, mut roots) = (0, BTreeMap::new());
        for (place, slot) in self.slots.iter().enumerate() {
            let of_slot = bundle.filter(|_| place == index).or(slot.bundle.as_ref()).map_or(&[][..], TrustBundle::roots);
            let lists = crls.filter(|_| place == index).unwrap_or(&slot.crls);
            // A root that several sources have is served once.
            roots.extend(of_slot.iter().map(|root| ((&slot.domain, &**root), root)));
            bytes += lists.iter().map(|list| material::pem_len("X509 CRL", list.der().len())).sum::<usize>();
        }
        let mut domains = BTreeMap::<&Option<TrustDomain>, Vec<&CertificateDer<'static>>>::new();
        for ((domain, _), root) in roots {
            bytes += material::pem_len("CERTIFICATE", root.len());
            domains.entry(domain).or_default().push(root);
        }
        if bytes > MAX_BUNDLE_BYTES {
            return Err(material::Error::BundleTooLarge(bytes));
        }
        match domains.into_values().map(material::names_len).find(|len| *len > MAX_NAME_BYTES) {
            Some(len) => Err(material::Error::NamesTooLarge(len)),
            None => Ok(()),
        }
    }
}

/// One source of a bundle. Its owner offers the content that it reads.
#[derive(Debug, Clone)]
pub struct Source {
    trust: Trust,
    index: usize,
    name: Arc<str>,
}

impl Trust {
    /// Without sources and bundles, by the machine's clock.
    pub fn new(metrics: Metrics) -> Self {
        Self::with_clock(metrics, Arc::new(SystemClock))
    }

    /// Without sources and bundles. `clock` decides which authorities have expired.
    pub fn with_clock(metrics: Metrics, clock: Arc<dyn Clock>) -> Self {
        Self(Arc::new(Inner {
            offers: Mutex::default(),
            set: watch::Sender::new(Arc::default()),
            metrics,
            clock,
            rescheduled: Notify::new(),
        }))
    }

    /// Returns a receiver for the current bundles and their changes.
    pub fn subscribe(&self) -> watch::Receiver<Arc<BundleSet>> {
        self.0.set.subscribe()
    }

    /// Adds a source for the bundle of `domain`; `None` is the own trust domain. `name` is for the log and metrics, for example `configMap
    /// a/b[c]`.
    pub fn source(&self, domain: Option<TrustDomain>, name: &str) -> Source {
        let slots = &mut self.offers().slots;
        slots.push(Slot { domain, bundle: None, crls: Vec::new(), comes_with_chains: false, too_large: None });
        let source = Source { trust: self.clone(), index: slots.len() - 1, name: name.into() };
        // Starts at zero: otherwise the first refusal would not be an increase for Prometheus.
        drop(self.0.metrics.refused.get_or_create(&source.label()));
        self.0.metrics.objects.get_or_create(&source.label()).set(0);
        source
    }

    /// Publishes the bundles again whenever a root, an intermediate or a revocation list begins or ends, until `shutdown`.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the bundles change only with their sources.
    pub async fn run(self, shutdown: CancellationToken) {
        let follow = async {
            loop {
                let rescheduled = self.0.rescheduled.notified();
                let (judged, next) = {
                    let offers = self.offers();
                    (offers.judged_at, offers.changes_at)
                };
                let until = next.unwrap_or_else(|| self.0.clock.now() + clock::MAX_SLEEP);
                tokio::select! {
                    () = self.0.clock.sleep_until(until) => {}
                    () = rescheduled => continue,
                }
                let now = self.0.clock.now();
                // A step of the clock into the past makes the last selection one of the future.
                if next.is_some_and(|at| at <= now) || judged.is_some_and(|at| now < at) {
                    self.publish(&mut self.offers());
                }
            }
        };
        shutdown.run_until_cancelled(follow).await;
    }

    /// Records an issued chain of the own domain. Revocation lists are served only if clients accept it with them, until its leaf expires.
    /// The chains from before a restart are not known, so that lists are withheld until the first chain.
    pub fn met(&self, chain: &CertificateChain, now: SystemTime) {
        let authorities = |chain: &[CertificateDer<'static>]| chain.get(1..).unwrap_or_default().to_vec();
        let mut offers = self.offers();
        let first = !std::mem::replace(&mut offers.has_met, true);
        let known = &mut offers.chains;
        let before = known.len();
        known.retain(|(_, until)| *until > now);
        let mut changed = first || known.len() != before;
        let met = (chain.certificates().to_vec(), chain.validity.not_after);
        match known.iter().position(|(known, _)| authorities(known) == authorities(&met.0)) {
            Some(index) => known[index] = (met.0, met.1.max(known[index].1)),
            None if known.len() < MAX_CHAINS => {
                known.push(met);
                changed = true;
            }
            None => {}
        }
        if changed {
            self.publish(&mut offers);
        }
    }

    fn offers(&self) -> MutexGuard<'_, Offers> {
        self.0.offers.lock()
    }

    fn publish(&self, offers: &mut Offers) {
        let Offers { slots, has_met, chains, withheld, judged_at, changes_at, lifeless } = offers;
        let now = self.0.clock.now();
        *judged_at = Some(now);
        let mut domains: BTreeMap<Option<TrustDomain>, (Vec<_>, Vec<_>)> = BTreeMap::new();
        for slot in slots.iter() {
            let (roots, crls) = domains.entry(slot.domain.clone()).or_default();
            roots.extend_from_slice(slot.bundle.as_ref().map_or(&[], TrustBundle::roots));
            crls.extend_from_slice(&slot.crls);
        }
        let chains: Vec<_> = chains.iter().map(|(chain, _)| chain.clone()).collect();
        let (mut next, mut counts) = (BundleSet::default(), (0, 0));
        let current = self.0.set.borrow().clone();
        let mut changes = Vec::new();
        for (domain, (certificates, crls)) in domains {
            let old = domain.as_ref().map_or(current.own.as_ref(), |d| current.federated.get(d));
            let LiveRoots { roots, changes_at } = live::select(&certificates, now);
            changes.extend(changes_at);
            let Some(roots) = served(&domain, roots, !certificates.is_empty(), old, lifeless) else { continue };
            let fitting = match &domain {
                _ if crls.is_empty() => Ok(Vec::new()),
                Some(domain) => Err(format!("the lists are of {domain}, and its signing authorities are not known here")),
                None if !*has_met => Err(FIRST_CHAIN.to_owned()),
                None => crl::fit(roots.roots(), &chains, &crls, now),
            };
            changes.extend(crls.iter().flat_map(|list| [Some(list.this_update), list.next_update]).flatten().filter(|at| *at > now));
            changes.extend(chains.iter().filter(|_| !crls.is_empty()).filter_map(|chain| live::select(chain, now).changes_at));
            next.wants_chain |= fitting.as_ref().is_err_and(|why| why == FIRST_CHAIN);
            let offered = crls.clone();
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
            let bundle = old.filter(|old| old.holds(&roots, &crls)).cloned().unwrap_or_else(|| {
                if let Some(name) = live::ambiguous(roots.roots()).filter(|_| old.is_none_or(|old| old.roots != roots)) {
                    tracing::warn!(
                        target: LOG_TARGET, name,
                        "the trust bundle has several roots of one name, and not all have key identifiers: clients may take the wrong one"
                    );
                }
                Arc::new(Bundle::new(roots, crls))
            });
            match domain {
                None => (next.own, next.own_crls) = (Some(bundle), offered),
                Some(domain) => drop(next.federated.insert(domain, bundle)),
            }
        }
        next.wants_chain |= next.own.is_none() && slots.iter().any(|slot| slot.comes_with_chains);
        self.0.metrics.served(counts);
        let first = changes.into_iter().min().map(|at| at.max(now + MIN_WAIT));
        if std::mem::replace(changes_at, first) != first {
            self.0.rescheduled.notify_waiters();
        }
        self.0.set.send_if_modified(|current| {
            let changed = !current.same(&next);
            *current = Arc::new(next);
            changed
        });
    }
}

/// The roots to serve for `domain`: the live ones, or the last bundle if there are none. `None` if there is no root at all.
fn served(
    domain: &Option<TrustDomain>,
    live: Vec<CertificateDer<'static>>,
    has_roots: bool,
    last: Option<&Arc<Bundle>>,
    lifeless: &mut BTreeSet<Option<TrustDomain>>,
) -> Option<TrustBundle> {
    // Fails only without a root: each root was parsed when it was offered.
    if let Ok(roots) = TrustBundle::from_certificates(live) {
        lifeless.remove(domain);
        return Some(roots);
    }
    if has_roots && lifeless.insert(domain.clone()) {
        tracing::error!(
            target: LOG_TARGET,
            trust_domain = domain.as_ref().map(tracing::field::display),
            served = last.map_or(0, |bundle| bundle.roots.roots().len()),
            "all roots of the trust bundle have ended or have not begun: the last bundle stays in use; add a root that is valid now"
        );
    }
    last.filter(|_| has_roots).map(|bundle| bundle.roots.clone())
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
    /// The name of the source, for the log and metrics.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Marks the source as one whose roots come with issued chains. Until the first root, [`BundleSet::wants_chain`] is set.
    pub fn comes_with_chains(&self) {
        let mut offers = self.trust.offers();
        offers.slots[self.index].comes_with_chains = true;
        self.trust.publish(&mut offers);
    }

    /// Offers PEM: roots, revocation lists, or both. The two are judged apart: roots are taken beside a list that is not usable, and the
    /// reverse.
    ///
    /// # Errors
    ///
    /// If the PEM, or a part of it, is not usable. The refusal is logged and counted, and the last good content of that part stays in use.
    pub fn offer(&self, pem: &[u8]) -> Result<(), Refused> {
        let refuse = |cause| {
            let refused = Refused { origin: self.name.clone(), cause };
            self.trust.0.metrics.refused.get_or_create(&self.label()).inc();
            let digest = agent_runtime::text::hex(&digest::digest(&digest::SHA256, pem).as_ref()[..8]);
            tracing::warn!(target: LOG_TARGET, source = %self.name, error = %refused, bytes = pem.len(), sha256 = digest, "trust bundle refused");
            refused
        };
        let objects = material::pem::read(pem).map_err(&refuse)?;
        let (certificates, lists): (Vec<_>, Vec<_>) =
            objects.into_iter().partition(|object| object.kind == material::pem::Kind::Certificate);
        let has_lists = !lists.is_empty();
        let certificates = certificates.into_iter().map(|object| CertificateDer::from(object.der)).collect();
        let bundle = match TrustBundle::from_certificates(certificates) {
            Err(material::Error::Empty) if has_lists => Ok(None),
            read => read.map(Some),
        };
        let crls = crl::of_objects(lists);
        let refused = [bundle.as_ref().err(), crls.as_ref().err()].into_iter().flatten().cloned().map(&refuse).reduce(|first, _| first);
        let (bundle, crls) = (bundle.ok().flatten(), crls.ok());
        // An offer without any usable part changes nothing; one whose roots are refused must not remove lists.
        let crls = crls.filter(|crls| refused.is_none() || !crls.is_empty());
        self.put(bundle, crls).map_err(&refuse)?;
        refused.map_or(Ok(()), Err)
    }

    /// Reports that the source has no content, for example because its file cannot be read. It is logged and counted like a refused offer,
    /// and the last good content stays in use.
    pub fn missing(&self, why: impl fmt::Display) {
        self.trust.0.metrics.refused.get_or_create(&self.label()).inc();
        tracing::warn!(target: LOG_TARGET, source = %self.name, error = %why, "source has no trust bundle; the last good one stays in use");
    }

    /// Offers a bundle that is already parsed.
    ///
    /// # Errors
    ///
    /// If the bundles would be larger than [`MAX_BUNDLE_BYTES`] or [`MAX_NAME_BYTES`].
    pub fn take(&self, bundle: TrustBundle) -> Result<(), material::Error> {
        self.put(Some(bundle), None)
    }

    /// Stores the content of an offer. `None` keeps the stored part: roots are never removed because an offer has none.
    fn put(&self, bundle: Option<TrustBundle>, crls: Option<Vec<RevocationList>>) -> Result<(), material::Error> {
        let metrics = &self.trust.0.metrics;
        let mut offers = self.trust.offers();
        if let Err(error) = offers.check_size(self.index, bundle.as_ref(), crls.as_deref()) {
            offers.slots[self.index].too_large = Some(Offer { bundle, crls });
            return Err(error);
        }
        offers.slots[self.index].too_large = None;
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
        let objects = slot.bundle.as_ref().map_or(0, |bundle| bundle.roots().len()) + slot.crls.len();
        metrics.objects.get_or_create(&self.label()).set(i64::try_from(objects).unwrap_or(i64::MAX));
        if changed {
            offers.take_what_fits_now();
            self.trust.publish(&mut offers);
        }
        Ok(())
    }

    fn label(&self) -> Label {
        Label { source: self.name.to_string() }
    }
}

/// The name of the source. Its values are limited by the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Label {
    source: String,
}

/// Labels of `crls`.
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

/// Metrics of the trust bundles.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    expiry: Family<Label, Gauge>,
    refused: Family<Label, Counter>,
    objects: Family<Label, Gauge>,
    crls: Family<Standing, Gauge>,
    this_update: Family<Label, Gauge>,
    next_update: Family<Label, Gauge>,
}

impl Metrics {
    /// Registers the metrics of this module.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("bundle_expiration_timestamp_seconds", "Earliest expiry of a root of this source", metrics.expiry.clone());
        registry.register(
            "bundles_refused",
            "Offers of a source without a usable bundle: missing, empty, oversized or unparsable",
            metrics.refused.clone(),
        );
        registry.register(
            "trust_source_objects",
            "Roots and revocation lists that this source has provided; 0 while it has provided nothing",
            metrics.objects.clone(),
        );
        registry.register(
            "crls",
            "Revocation lists that the sources offer. They are withheld if clients would reject peers because of them",
            metrics.crls.clone(),
        );
        registry.register(
            "crl_this_update_timestamp_seconds",
            "Issue time (thisUpdate) of the revocation list of this source that expires first",
            metrics.this_update.clone(),
        );
        registry.register(
            "crl_next_update_timestamp_seconds",
            "Earliest expiry (nextUpdate) of a revocation list of this source: from then on all lists are withheld",
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

    /// A source has these series only while it has a revocation list with `nextUpdate`.
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

    /// Registers the metrics and makes every series, for the metrics reference.
    #[cfg(any(test, feature = "testing"))]
    pub fn sample(registry: &mut Registry) {
        let metrics = Self::register(registry);
        let label = Label { source: agent_runtime::metrics::ANY.to_owned() };
        metrics.expiry.get_or_create(&label).set(1);
        metrics.refused.get_or_create(&label).inc();
        metrics.objects.get_or_create(&label).set(1);
        metrics.this_update.get_or_create(&label).set(1);
        metrics.next_update.get_or_create(&label).set(1);
    }
}

fn seconds(at: SystemTime) -> i64 {
    i64::try_from(clock::unix_seconds(at)).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
