//! The rules in force: the newest, and for a while those that they have replaced. No I/O, no clock.
//!
//! A change of the configuration reaches approver and agents at different moments. For `approver.overlap` after it, what the former rules
//! would have approved is approved too, so that no agent is denied for a file that it has not got yet. What an operator takes away
//! for safety is gone at once, whatever the former rules said: an agent's user name, behind which a token may be stolen, an issuer, whose
//! key may be, and an annotation, from which an issuer may take orders. Everything else in the file says who of an agent's pods gets what
//! from an issuer that still counts, which is had by certificates that are out already anyway; a file cannot tell whether such a change is
//! a roll-out or an alarm, so the operator does: with `overlap: 0s` in the same change the former rules are gone, too.

use std::{iter, time::Duration};

use tokio::time::Instant;

use super::rules::Rules;

/// Former rules that are remembered: changes come by a person's hand, and each reaches the agents within a minute or two.
const MAX_SUPERSEDED: usize = 8;
/// By so much may the approver's file be behind an agent's: a kubelet looks at a mounted ConfigMap every 60 to 90 seconds.
const MAX_DEFERRAL: Duration = Duration::from_secs(120);

/// See the module.
#[derive(Debug, Clone)]
pub struct ActiveRules {
    /// The newest.
    pub rules: Rules,
    superseded: Vec<Superseded>,
}

#[derive(Debug, Clone)]
struct Superseded {
    rules: Rules,
    until: Instant,
}

impl ActiveRules {
    /// These, and none before them.
    pub fn new(rules: Rules) -> Self {
        Self { rules, superseded: Vec::new() }
    }

    /// What is in force when `rules` replace these at `now`. How long the former count is for the new ones to say.
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
        Self { rules, superseded }
    }

    /// The former rules that still count at `now`, the latest first.
    pub fn superseded(&self, now: Instant) -> impl Iterator<Item = &Rules> {
        self.superseded.iter().filter(move |superseded| now < superseded.until).map(|superseded| &superseded.rules)
    }

    /// For how long after its first sight a request that differs from the configuration is not denied: the agent's file may be newer.
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

    /// The rules of the tests with another lifetime.
    fn lasting(hours: u64) -> Rules {
        let mut rules = Rules { overlap: OVERLAP, ..rules() };
        let profile = Profile { lifetime: Duration::from_secs(hours * 3600), ..(*rules.resolver.default_profile).clone() };
        rules.resolver.default_profile = profile.into();
        rules
    }

    /// Why not, or nothing.
    fn denial(active_rules: &ActiveRules, now: Instant) -> Option<&'static str> {
        let pod = pod();
        match judge::decide(&request(), PodView::Live(Some(&pod)), active_rules, now).0 {
            Decision::Approve(_) => None,
            Decision::Deny(denial) => Some(denial.code),
            Decision::Ignore => Some("ignored"),
            Decision::NeedsLiveRead(_) => panic!("a live read leaves nothing to look at"),
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

        // Two changes in a row: each of the former has its own time.
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
        // One that still signs for others does so for those who had it, as long as the overlap lasts.
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
