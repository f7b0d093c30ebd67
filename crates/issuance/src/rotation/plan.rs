//! The configuration in force: issuers, profiles and retention. A change of the configuration replaces the [`Plan`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tracing::{debug, info};
use workload_identity::{Identity, IssuerName, Profile};

use super::{Id, Rotation};
use crate::issuer::Issuer;

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::rotation::plan";

/// The issuers and profiles by which certificates are ordered and renewed. Immutable.
#[derive(Debug, Clone)]
pub struct Plan {
    issuers: BTreeMap<IssuerName, Arc<dyn Issuer>>,
    profiles: Vec<([u8; 32], Arc<Profile>)>,
    retention: Duration,
}

impl Plan {
    /// Creates a plan. `issuers` has the names that `profiles` use. `retention` is how long an entry without subscribers is kept.
    pub fn new(
        issuers: BTreeMap<IssuerName, Arc<dyn Issuer>>,
        profiles: impl IntoIterator<Item = Arc<Profile>>,
        retention: Duration,
    ) -> Self {
        let profiles = profiles.into_iter().map(|profile| (profile.fingerprint(), profile)).collect();
        Self { issuers, profiles, retention }
    }

    /// How long an entry without subscribers is kept.
    pub fn retention(&self) -> Duration {
        self.retention
    }

    /// Names of the issuers.
    pub fn issuers(&self) -> impl Iterator<Item = &IssuerName> {
        self.issuers.keys()
    }

    /// The issuer of this name.
    pub fn issuer(&self, name: &IssuerName) -> Option<&Arc<dyn Issuer>> {
        self.issuers.get(name)
    }

    /// Returns the identity under a current profile with the same fingerprint. Its schedule and its names may have changed. `None` if no
    /// profile has the fingerprint.
    pub fn current(&self, identity: &Arc<Identity>) -> Option<Arc<Identity>> {
        let own = &identity.profile;
        if self.profiles.iter().any(|(_, profile)| Arc::ptr_eq(profile, own)) {
            return Some(identity.clone());
        }
        let fingerprint = own.fingerprint();
        let alike = || self.profiles.iter().filter(|(print, _)| *print == fingerprint).map(|(_, profile)| profile);
        let profile = alike().find(|profile| profile.name == own.name).or_else(|| alike().next())?;
        Some(Arc::new(Identity { profile: profile.clone(), ..(**identity).clone() }))
    }
}

impl Rotation {
    /// Adds metric series for new issuers, and removes those of issuers that are no longer configured.
    pub(super) fn count_issuers(&mut self) {
        let issuers: BTreeSet<IssuerName> = self.parts.plan.borrow().issuers().cloned().collect();
        issuers.difference(&self.counted).for_each(|issuer| self.parts.metrics.add_issuer(issuer));
        self.counted.difference(&issuers).for_each(|issuer| self.parts.metrics.remove_issuer(issuer));
        self.counted = issuers;
    }

    /// Applies a changed plan. Identities that no profile issues are not renewed, but may still be served. Failed orders are retried,
    /// because the cause may be fixed.
    pub(super) fn reconfigured(&mut self) {
        let plan = self.parts.plan.borrow_and_update().clone();
        self.count_issuers();
        let now = self.now();
        self.planner.set_retention(plan.retention());
        let mut retired = 0;
        for (id, entry) in &self.entries {
            let is_retired = plan.current(&entry.identity).is_none();
            if is_retired {
                self.orders.abort_all(*id);
                self.verified.remove(id);
                self.awaiting_anchor.remove(id);
            }
            if self.planner.retire(now, *id, is_retired) {
                debug!(target: LOG_TARGET, identity = %entry.identity, profile = %entry.identity.profile.name, is_retired, "the configuration change affects this identity");
                retired += usize::from(is_retired);
            }
        }
        if retired > 0 {
            info!(target: LOG_TARGET, identities = retired, "no profile issues these identities: they are not renewed, and are forgotten when their clients have others");
        }
        self.planner.configuration_changed(now);
    }

    /// Returns the identity of an entry under the current plan. `None` if no profile issues it.
    pub(super) fn identity_of(&self, id: Id) -> Option<Arc<Identity>> {
        let entry = self.entries.get(&id)?;
        self.parts.plan.borrow().current(&entry.identity)
    }
}
