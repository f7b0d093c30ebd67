//! The trust bundles. Sources offer PEM; all other parts watch the [`BundleSet`].
//!
//! The bundle of a trust domain is the union of its sources, in their order. It is published only when its content changes. An offer that
//! is empty or invalid is reported and changes nothing: the last good bundle stays. A source may also offer revocation lists, with roots or
//! alone; [`crl`] describes when they are served.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
    time::SystemTime,
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
use tokio::sync::watch;
use workload_identity::TrustDomain;

use self::crl::RevocationList;
use crate::material::{self, Attached, CertificateChain, TrustBundle};

/// Target of the log lines of this module.
const LOG_TARGET: &str = "sds_agent::trust";

pub mod crl;
pub mod file;

/// The reason for withholding revocation lists after the start.
const FIRST_CHAIN: &str = "no certificate has been issued since the start: the signing authorities are not known yet";
/// Intermediate authorities that are remembered. Further ones are ignored.
const MAX_INTERMEDIATES: usize = 64;

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
    /// Revocation lists wait for the first issued chain, which shows which authorities sign.
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
}

/// The input for the bundles.
#[derive(Debug, Default)]
struct Offers {
    slots: Vec<Slot>,
    /// Whether a chain of the own domain has been recorded.
    has_met: bool,
    /// Intermediate authorities of recorded chains, each with the expiry of its last certificate.
    intermediates: HashMap<CertificateDer<'static>, SystemTime>,
    /// The last logged reason for withholding revocation lists, by domain.
    withheld: BTreeMap<Option<TrustDomain>, String>,
    /// The time after which an authority of the own domain has expired and needs no revocation list. `None` if there are no lists.
    refit_at: Option<SystemTime>,
}

#[derive(Debug)]
struct Slot {
    domain: Option<TrustDomain>,
    bundle: Option<TrustBundle>,
    crls: Vec<RevocationList>,
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
        Self(Arc::new(Inner { offers: Mutex::default(), set: watch::Sender::new(Arc::default()), metrics, clock }))
    }

    /// Returns a receiver for the current bundles and their changes.
    pub fn subscribe(&self) -> watch::Receiver<Arc<BundleSet>> {
        self.0.set.subscribe()
    }

    /// Adds a source for the bundle of `domain`; `None` is the own trust domain. `name` is for the log and metrics, for example `configMap
    /// a/b[c]`.
    pub fn source(&self, domain: Option<TrustDomain>, name: &str) -> Source {
        let slots = &mut self.offers().slots;
        slots.push(Slot { domain, bundle: None, crls: Vec::new() });
        let source = Source { trust: self.clone(), index: slots.len() - 1, name: name.into() };
        // Starts at zero: otherwise the first refusal would not be an increase for Prometheus.
        drop(self.0.metrics.refused.get_or_create(&source.label()));
        source
    }

    /// Records the intermediates of an issued chain of the own domain. A revocation list is required for each, until the certificates that
    /// it has signed expire. The intermediates from before a restart are not known, so that lists are withheld until the first chain. Each
    /// call also notices that an authority has expired since the lists were last compared.
    pub fn met(&self, chain: &CertificateChain, now: SystemTime) {
        let intermediates = chain.certificates().get(1..).unwrap_or_default();
        let mut offers = self.offers();
        let first = !std::mem::replace(&mut offers.has_met, true);
        let has_expired = offers.refit_at.is_some_and(|at| at < self.0.clock.now());
        let known = &mut offers.intermediates;
        let before = known.len();
        known.retain(|_, until| *until > now);
        let mut changed = first || has_expired || known.len() != before;
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
        let Offers { slots, has_met, intermediates, withheld, refit_at } = offers;
        let now = self.0.clock.now();
        *refit_at = None;
        let mut domains: BTreeMap<Option<TrustDomain>, (Vec<_>, Vec<_>)> = BTreeMap::new();
        for slot in slots {
            let (roots, crls) = domains.entry(slot.domain.clone()).or_default();
            roots.extend_from_slice(slot.bundle.as_ref().map_or(&[], TrustBundle::roots));
            crls.extend_from_slice(&slot.crls);
        }
        // Sorted, so that the version is equal on every node and after every restart.
        let mut below: Vec<_> = intermediates.keys().collect();
        below.sort_unstable_by(|one, other| one.as_ref().cmp(other.as_ref()));
        let (mut next, mut counts) = (BundleSet::default(), (0, 0));
        let current = self.0.set.borrow().clone();
        for (domain, (certificates, crls)) in domains {
            // Fails only if the domain has no root yet: each root was parsed when it was offered. Revocation lists alone are not served.
            let Ok(roots) = TrustBundle::from_certificates(certificates) else { continue };
            let fitting = match &domain {
                _ if crls.is_empty() => Ok(Vec::new()),
                Some(domain) => Err(format!("the lists are of {domain}, and its signing authorities are not known here")),
                None if !*has_met => Err(FIRST_CHAIN.to_owned()),
                None => {
                    let authorities = || roots.roots().iter().chain(below.iter().copied());
                    *refit_at = crl::next_expiry(authorities(), now);
                    crl::fit(authorities(), &crls, now)
                }
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
    /// The name of the source, for the log and metrics.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Offers PEM: roots, revocation lists, or both.
    ///
    /// # Errors
    ///
    /// If the PEM is not usable. The refusal is logged and counted, and the last good content stays in use.
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

    /// Reports that the source has no content, for example because its file cannot be read. It is logged and counted like a refused offer,
    /// and the last good content stays in use.
    pub fn missing(&self, why: impl fmt::Display) {
        self.trust.0.metrics.refused.get_or_create(&self.label()).inc();
        tracing::warn!(target: LOG_TARGET, source = %self.name, error = %why, "source has no trust bundle; the last good one stays in use");
    }

    /// Offers a bundle that is already parsed.
    pub fn take(&self, bundle: TrustBundle) {
        self.put(Some(bundle), None);
    }

    /// Stores the content of an offer. `None` keeps the stored part: roots are never removed because an offer has none.
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
            "Earliest expiry (nextUpdate) of a revocation list of this source: from then on clients reject every peer of its authority",
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
        metrics.this_update.get_or_create(&label).set(1);
        metrics.next_update.get_or_create(&label).set(1);
    }
}

fn seconds(at: SystemTime) -> i64 {
    i64::try_from(clock::unix_seconds(at)).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
