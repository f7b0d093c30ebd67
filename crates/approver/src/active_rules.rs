//! The rules in force: the newest rules, and superseded rules until their overlap ends. No I/O, no clock.
//!
//! A configuration change reaches the approver and the agents at different times. For `approver.overlap` (default 10 min) after a change,
//! the approver also approves requests that the superseded rules allow, so that an agent with the older file is not denied.
//!
//! Three removals take effect immediately, because an operator makes them for security: an agent's user name (its token may be
//! compromised), an issuer (its key may be compromised) and an allowed annotation (an issuer may obey it). Every other change only alters
//! which names the agents' pods get from an issuer that is still trusted, and certificates issued before the change have those names
//! anyway. An operator who makes such a change for security sets `overlap: 0s` in the same change, which ends the superseded rules.

use std::{collections::BTreeSet, iter, sync::Arc, time::Duration};

use tokio::time::Instant;

use cert_manager::RequestNamespace;

use super::{
    requests::Namespaces,
    rules::{Guarded, Rules},
};

/// Maximum number of superseded rules. Operators make the changes, and each reaches the agents within two minutes.
const MAX_SUPERSEDED: usize = 8;
/// Maximum time by which the approver's file is older than an agent's: a kubelet syncs a mounted ConfigMap every 60 to 90 seconds.
const MAX_DEFERRAL: Duration = Duration::from_secs(120);

/// The newest rules and the superseded rules that still approve. Immutable: a change makes a new value.
#[derive(Debug, Clone)]
pub struct ActiveRules {
    /// The newest rules.
    pub rules: Rules,
    /// Names of the nodes whose agents get no certificate, whichever rules allow it.
    pub denied_nodes: Arc<BTreeSet<String>>,
    superseded: Vec<Superseded>,
}

#[derive(Debug, Clone)]
struct Superseded {
    rules: Rules,
    until: Instant,
}

impl ActiveRules {
    /// Creates the value for `rules`, without superseded rules.
    pub fn new(rules: Rules) -> Self {
        Self { rules, denied_nodes: Arc::default(), superseded: Vec::new() }
    }

    /// Returns these rules with other denied nodes. They take effect immediately, for requests that are undecided already, too.
    #[must_use]
    pub fn denying(&self, denied_nodes: BTreeSet<String>) -> Self {
        Self { denied_nodes: Arc::new(denied_nodes), ..self.clone() }
    }

    /// Returns the rules in force after `rules` replace these at `now`. The overlap of the new rules limits every superseded one.
    pub fn replaced(&self, rules: Rules, now: Instant) -> Self {
        let until = now + rules.overlap;
        let replaced = iter::once(Superseded { rules: self.rules.clone(), until });
        let before = self.superseded.iter().map(|superseded| Superseded { until: superseded.until.min(until), ..superseded.clone() });
        let mut superseded: Vec<_> = replaced.chain(before).filter(|superseded| now < superseded.until).take(MAX_SUPERSEDED).collect();
        for Superseded { rules: superseded, .. } in &mut superseded {
            superseded.agents.clone_from(&rules.agents);
            superseded.annotations.clone_from(&rules.annotations);
            superseded.issuers.retain(|guarded| rules.issuers.iter().any(|still| still.issuer == guarded.issuer));
        }
        Self { rules, denied_nodes: self.denied_nodes.clone(), superseded }
    }

    /// Returns the superseded rules whose overlap has not ended at `now`, newest first.
    pub fn superseded(&self, now: Instant) -> impl Iterator<Item = &Rules> {
        self.superseded.iter().filter(move |superseded| now < superseded.until).map(|superseded| &superseded.rules)
    }

    /// Returns the namespaces in which agents may create requests, by these rules and by the superseded ones.
    pub fn namespaces(&self) -> Namespaces {
        let rules = iter::once(&self.rules).chain(self.superseded.iter().map(|superseded| &superseded.rules));
        let of = |guarded: &Guarded| match &guarded.namespace {
            RequestNamespace::Fixed(namespace) => Some(namespace.clone()),
            RequestNamespace::Workload => None,
        };
        let names: Option<BTreeSet<String>> = rules.flat_map(|rules| &rules.issuers).map(of).collect();
        names.map_or(Namespaces::All, Namespaces::Only)
    }

    /// Returns the time after first sight for which a request that differs from the configuration is not denied, because the agent's file
    /// may be newer: `overlap`, at most 120 s.
    pub fn deferral(&self) -> Duration {
        self.rules.overlap.min(MAX_DEFERRAL)
    }
}

#[cfg(test)]
mod tests {
    use cert_manager::{IssuerRef, denied};
    use workload_identity::{IssuerName, Profile};

    use super::*;
    use crate::{
        judge::{
            self, Decision, PodView,
            tests::{pod, request, rules},
        },
        rules::Guarded,
    };

    const OVERLAP: Duration = Duration::from_secs(600);

    /// The test rules with a lifetime of `hours`.
    fn lasting(hours: u64) -> Rules {
        let mut rules = Rules { overlap: OVERLAP, ..rules() };
        let profile = Profile { lifetime: Duration::from_secs(hours * 3600), ..(*rules.resolver.default_profile).clone() };
        rules.resolver.default_profile = profile.into();
        rules
    }

    /// The reason of the denial; `None` for an approval.
    fn denial(active_rules: &ActiveRules, now: Instant) -> Option<&'static str> {
        let pod = pod();
        match judge::decide(&request(), PodView::Live(Some(&pod)), active_rules, now).0 {
            Decision::Approve(_) => None,
            Decision::Deny(denial) => Some(denial.code),
            Decision::Ignore => Some("ignored"),
            Decision::NeedsLiveRead(_) => panic!("a second live read after a live read"),
        }
    }

    #[test]
    fn superseded_rules_still_approve_until_the_overlap_ends() {
        let now = Instant::now();
        let (one, two) = (ActiveRules::new(lasting(1)), ActiveRules::new(lasting(1)).replaced(lasting(2), now));
        assert_eq!((denial(&one, now), denial(&two, now)), (None, None));
        let pod = pod();
        let (decision, by_superseded) = judge::decide(&request(), PodView::Cached(Some(&pod)), &two, now);
        assert!(by_superseded && matches!(decision, Decision::Approve(_)), "{decision:?}");
        assert!(!judge::decide(&request(), PodView::Cached(Some(&pod)), &one, now).1);
        assert_eq!(denial(&two, now + OVERLAP - Duration::from_millis(1)), None);
        assert_eq!(denial(&two, now + OVERLAP), Some(denied::PROFILE_MISMATCH));

        // Two changes in a row: each superseded rule set has its own end.
        let later = now + OVERLAP / 2;
        let three = two.replaced(lasting(3), later);
        assert_eq!(denial(&three, later), None);
        assert_eq!(denial(&three, now + OVERLAP), Some(denied::PROFILE_MISMATCH));
        assert_eq!(three.superseded(now + OVERLAP).count(), 1);
    }

    #[test]
    fn without_an_overlap_nothing_former_counts_and_one_that_runs_ends() {
        let now = Instant::now();
        let at_once = |rules: Rules| Rules { overlap: Duration::ZERO, ..rules };
        let two = ActiveRules::new(lasting(1)).replaced(lasting(2), now);
        for ended in [ActiveRules::new(lasting(1)).replaced(at_once(lasting(2)), now), two.replaced(at_once(lasting(2)), now)] {
            assert_eq!((denial(&ended, now), ended.deferral()), (Some(denied::PROFILE_MISMATCH), Duration::ZERO));
        }
    }

    #[test]
    fn a_removed_agent_is_denied_without_an_overlap() {
        let now = Instant::now();
        let agents = |name: &str, hours| Rules { agents: [name.to_owned()].into(), ..lasting(hours) };
        let agent = rules().agents.pop_first().unwrap();
        for hours in [1, 2] {
            let removed = ActiveRules::new(lasting(1)).replaced(agents("system:serviceaccount:a:b", hours), now);
            assert_eq!(denial(&removed, now), Some(denied::NOT_THE_AGENT));
            let twice = removed.replaced(agents("system:serviceaccount:a:c", hours), now);
            assert_eq!(denial(&twice, now), Some(denied::NOT_THE_AGENT));
        }
        let added = ActiveRules::new(agents("system:serviceaccount:a:b", 1)).replaced(agents(&agent, 2), now);
        assert_eq!(denial(&added, now), None);
    }

    #[test]
    fn an_issuer_that_was_taken_out_signs_nothing_more() {
        let now = Instant::now();
        let named = |name: &str| IssuerRef { name: name.into(), kind: "ClusterIssuer".into(), group: "cert-manager.io".into() };
        let guarded =
            |profile: &str, issuer: &str| Guarded { name: IssuerName(profile.into()), issuer: named(issuer), ..rules().issuers.remove(0) };
        let removed = ActiveRules::new(lasting(1)).replaced(Rules { issuers: vec![guarded("default", "new-ca")], ..lasting(1) }, now);
        assert_eq!(denial(&removed, now), Some("ignored"));
        assert!(removed.superseded(now).all(|rules| rules.issuers.is_empty()));
        // An issuer that another profile still uses signs for its former profile until the overlap ends.
        let moved = vec![guarded("default", "new-ca"), guarded("payments", "mesh-ca")];
        let moved = ActiveRules::new(lasting(1)).replaced(Rules { issuers: moved, ..lasting(1) }, now);
        assert_eq!((denial(&moved, now), denial(&moved, now + OVERLAP)), (None, Some(denied::PROFILE_MISMATCH)));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let now = Instant::now();
        let many = (2..100).fold(ActiveRules::new(lasting(1)), |active_rules, hours| active_rules.replaced(lasting(hours), now));
        assert_eq!((many.superseded(now).count(), many.deferral()), (MAX_SUPERSEDED, MAX_DEFERRAL));
    }
}
