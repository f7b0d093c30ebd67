//! What is in force: the issuers, the profiles, and how long things are kept. A value; a change of the configuration is another one.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tracing::{debug, info};
use workload_identity::{Identity, IssuerName, Profile};

use super::{Id, Rotation};
use crate::issuer::Issuer;

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::rotation::plan";

/// By what certificates are ordered and renewed.
#[derive(Debug, Clone)]
pub struct Plan {
    issuers: BTreeMap<IssuerName, Arc<dyn Issuer>>,
    profiles: Vec<([u8; 32], Arc<Profile>)>,
    retention: Duration,
}

impl Plan {
    /// The upstreams by the names that `profiles` use; `retention` is how long an entry without subscribers is kept.
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

    /// The upstreams' names.
    pub fn issuers(&self) -> impl Iterator<Item = &IssuerName> {
        self.issuers.keys()
    }

    /// The upstream of this name.
    pub fn issuer(&self, name: &IssuerName) -> Option<&Arc<dyn Issuer>> {
        self.issuers.get(name)
    }

    /// The same identity under the profile that issues alike now: its schedule and the names of things may have changed. None where no
    /// profile does any more.
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
    /// Issuers that may be asked have series in the metrics, and others have none.
    pub(super) fn count_issuers(&mut self) {
        let issuers: BTreeSet<IssuerName> = self.parts.plan.borrow().issuers().cloned().collect();
        issuers.difference(&self.counted).for_each(|issuer| self.parts.metrics.add_issuer(issuer));
        self.counted.difference(&issuers).for_each(|issuer| self.parts.metrics.remove_issuer(issuer));
        self.counted = issuers;
    }

    /// What may not be issued any more is not, though it may still be served; and whatever failed is tried again: the reason may be gone.
    pub(super) fn reconfigured(&mut self) {
        let plan = self.parts.plan.borrow_and_update().clone();
        self.count_issuers();
        let now = self.now();
        self.planner.set_retention(plan.retention());
        let mut retired = 0;
        for (id, entry) in &self.entries {
            let is_retired = plan.current(&entry.identity).is_none();
            if is_retired {
                if let Some(order) = self.orders.remove(id) {
                    order.task.abort();
                }
                self.verified.remove(id);
                self.awaiting_anchor.remove(id);
            }
            if self.planner.retire(now, *id, is_retired) {
                debug!(target: LOG_TARGET, identity = %entry.identity, profile = %entry.identity.profile.name, is_retired, "judged by another plan");
                retired += usize::from(is_retired);
            }
        }
        if retired > 0 {
            info!(target: LOG_TARGET, identities = retired, "no profile issues these any more: they are not renewed, and go when their clients have others");
        }
        self.planner.configuration_changed(now);
    }

    /// The identity of an entry, as it is issued now.
    pub(super) fn identity_of(&self, id: Id) -> Option<Arc<Identity>> {
        let entry = self.entries.get(&id)?;
        self.parts.plan.borrow().current(&entry.identity)
    }
}
