//! The one owner of trust bundles: sources offer PEM, and everybody else watches the [`BundleSet`].
//!
//! A source that offers nothing, garbage or an empty file is reported and changes nothing: the last good bundle stays. The bundle of a
//! domain is the union of its sources, in their order. Published only when the content changes.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::sync::watch;

use crate::{
    clock,
    identity::TrustDomain,
    material::{self, Encodings, TrustBundle},
};

pub mod config_map;
pub mod file;

/// A bundle and its encoded forms.
#[derive(Debug)]
pub struct Bundle {
    /// The roots.
    pub roots: TrustBundle,
    /// Its encoded forms.
    pub encodings: Encodings,
}

/// Every bundle that the agent has.
#[derive(Debug, Default, Clone)]
pub struct BundleSet {
    /// The agent's own trust domain's; none until the first source has offered one.
    pub own: Option<Arc<Bundle>>,
    /// Other domains'.
    pub federated: BTreeMap<TrustDomain, Arc<Bundle>>,
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
    slots: Mutex<Vec<Slot>>,
    set: watch::Sender<Arc<BundleSet>>,
    metrics: Metrics,
}

#[derive(Debug)]
struct Slot {
    domain: Option<TrustDomain>,
    bundle: Option<TrustBundle>,
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
        Self(Arc::new(Inner { slots: Mutex::default(), set: watch::Sender::new(Arc::default()), metrics }))
    }

    /// The bundles, now and later.
    pub fn subscribe(&self) -> watch::Receiver<Arc<BundleSet>> {
        self.0.set.subscribe()
    }

    /// A place for one source of `domain`'s bundle; `None` is the agent's own domain. `name` is for people: `configMap a/b[c]`.
    pub fn source(&self, domain: Option<TrustDomain>, name: &str) -> Source {
        let mut slots = self.0.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.push(Slot { domain, bundle: None });
        let source = Source { trust: self.clone(), index: slots.len() - 1, name: name.into() };
        // From zero on, or the first refusal would be no increase.
        drop(self.0.metrics.refused.get_or_create(&source.label()));
        source
    }

    fn publish(&self, slots: &[Slot]) {
        let mut roots: BTreeMap<Option<&TrustDomain>, Vec<_>> = BTreeMap::new();
        for slot in slots {
            if let Some(bundle) = &slot.bundle {
                roots.entry(slot.domain.as_ref()).or_default().extend_from_slice(bundle.roots());
            }
        }
        self.0.set.send_if_modified(|current| {
            let mut next = BundleSet::default();
            for (domain, certificates) in roots {
                // Each root was parsed when it was offered.
                let Ok(roots) = TrustBundle::from_certificates(certificates) else { continue };
                let old = domain.map_or(current.own.as_ref(), |d| current.federated.get(d));
                let bundle = match old {
                    Some(old) if old.roots == roots => old.clone(),
                    _ => Arc::new(Bundle { roots, encodings: Encodings::default() }),
                };
                match domain {
                    None => next.own = Some(bundle),
                    Some(domain) => drop(next.federated.insert(domain.clone(), bundle)),
                }
            }
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
        equal(self.own.as_ref(), other.own.as_ref())
            && self.federated.len() == other.federated.len()
            && self.federated.iter().all(|(domain, bundle)| equal(Some(bundle), other.federated.get(domain)))
    }
}

impl Source {
    /// The name given for people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Offers PEM. What cannot be used is refused, counted and logged, and changes nothing.
    pub fn offer(&self, pem: &[u8]) -> Result<(), Refused> {
        match TrustBundle::from_pem(pem) {
            Ok(bundle) => {
                self.take(bundle);
                Ok(())
            }
            Err(cause) => {
                let refused = Refused { origin: self.name.clone(), cause };
                self.trust.0.metrics.refused.get_or_create(&self.label()).inc();
                tracing::warn!(source = %self.name, error = %refused, "trust bundle refused");
                Err(refused)
            }
        }
    }

    /// There is nothing to offer, and `why` says so: counted and logged like a refused offer, and changes nothing either.
    pub fn missing(&self, why: impl fmt::Display) {
        self.trust.0.metrics.refused.get_or_create(&self.label()).inc();
        tracing::warn!(source = %self.name, error = %why, "no trust bundle there; the last good one stays in use");
    }

    /// Takes a bundle that has been read already.
    pub fn take(&self, bundle: TrustBundle) {
        let inner = &self.trust.0;
        let expiry = i64::try_from(clock::unix_seconds(bundle.earliest_expiry)).unwrap_or(i64::MAX);
        inner.metrics.expiry.get_or_create(&self.label()).set(expiry);
        let mut slots = inner.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots[self.index].bundle.as_ref() == Some(&bundle) {
            return;
        }
        tracing::info!(source = %self.name, roots = bundle.roots().len(), version = bundle.version(), "trust bundle taken");
        slots[self.index].bundle = Some(bundle);
        self.trust.publish(&slots);
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

/// What trust counts.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    expiry: Family<Label, Gauge>,
    refused: Family<Label, Counter>,
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
        metrics
    }

    /// Registers and counts one of everything, for the reference.
    #[cfg(test)]
    pub(crate) fn sample(registry: &mut Registry) {
        let metrics = Self::register(registry);
        let label = Label { source: crate::metrics::ANY.to_owned() };
        metrics.expiry.get_or_create(&label).set(1);
        metrics.refused.get_or_create(&label).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
