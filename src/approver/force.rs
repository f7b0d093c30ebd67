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
const MOST_FORMER: usize = 8;
/// By so much may the approver's file be behind an agent's: a kubelet looks at a mounted ConfigMap every 60 to 90 seconds.
const LONGEST_HESITATION: Duration = Duration::from_secs(120);

/// See the module.
#[derive(Debug, Clone)]
pub struct InForce {
    /// The newest.
    pub rules: Rules,
    former: Vec<Former>,
}

#[derive(Debug, Clone)]
struct Former {
    rules: Rules,
    until: Instant,
}

impl InForce {
    /// These, and none before them.
    pub fn new(rules: Rules) -> Self {
        Self { rules, former: Vec::new() }
    }

    /// What is in force when `rules` replace these at `now`. How long the former count is for the new ones to say.
    pub fn replaced(&self, rules: Rules, now: Instant) -> Self {
        let until = now + rules.overlap;
        let replaced = iter::once(Former { rules: self.rules.clone(), until });
        let before = self.former.iter().map(|former| Former { until: former.until.min(until), ..former.clone() });
        let mut former: Vec<_> = replaced.chain(before).filter(|former| now < former.until).take(MOST_FORMER).collect();
        for Former { rules: former, .. } in &mut former {
            former.agents.clone_from(&rules.agents);
            former.annotations.clone_from(&rules.annotations);
            former.issuers.retain(|guarded| rules.issuers.iter().any(|still| still.issuer == guarded.issuer));
        }
        Self { rules, former }
    }

    /// The former rules that still count at `now`, the latest first.
    pub fn former(&self, now: Instant) -> impl Iterator<Item = &Rules> {
        self.former.iter().filter(move |former| now < former.until).map(|former| &former.rules)
    }

    /// For how long after its first sight a request that differs from the configuration is not denied: the agent's file may be newer.
    pub fn hesitation(&self) -> Duration {
        self.rules.overlap.min(LONGEST_HESITATION)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        approver::{
            judge::{
                self, Decision, Sight,
                tests::{pod, request, rules},
            },
            rules::Guarded,
        },
        cert_manager::denied,
        config::IssuerRef,
        identity::{IssuerName, Profile},
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
    fn denial(in_force: &InForce, now: Instant) -> Option<&'static str> {
        let pod = pod();
        match judge::decide(&request(), Sight::Live(Some(&pod)), in_force, now).0 {
            Decision::Approve(_) => None,
            Decision::Deny(denial) => Some(denial.code),
            Decision::Ignore => Some("ignored"),
            Decision::Look(_) => panic!("a live read leaves nothing to look at"),
        }
    }

    #[test]
    fn what_the_former_rules_allow_is_allowed_for_the_overlap_and_not_for_longer() {
        let now = Instant::now();
        let (one, two) = (InForce::new(lasting(1)), InForce::new(lasting(1)).replaced(lasting(2), now));
        assert_eq!((denial(&one, now), denial(&two, now)), (None, None));
        let pod = pod();
        let (decision, by_former) = judge::decide(&request(), Sight::Watched(Some(&pod)), &two, now);
        assert!(by_former && matches!(decision, Decision::Approve(_)), "{decision:?}");
        assert!(!judge::decide(&request(), Sight::Watched(Some(&pod)), &one, now).1);
        assert_eq!(denial(&two, now + OVERLAP - Duration::from_millis(1)), None);
        assert_eq!(denial(&two, now + OVERLAP), Some(denied::PROFILE_MISMATCH));

        // Two changes in a row: each of the former has its own time.
        let later = now + OVERLAP / 2;
        let three = two.replaced(lasting(3), later);
        assert_eq!(denial(&three, later), None);
        assert_eq!(denial(&three, now + OVERLAP), Some(denied::PROFILE_MISMATCH));
        assert_eq!(three.former(now + OVERLAP).count(), 1);
    }

    #[test]
    fn without_an_overlap_nothing_former_counts_and_one_that_runs_ends() {
        let now = Instant::now();
        let at_once = |rules: Rules| Rules { overlap: Duration::ZERO, ..rules };
        let two = InForce::new(lasting(1)).replaced(lasting(2), now);
        for ended in [InForce::new(lasting(1)).replaced(at_once(lasting(2)), now), two.replaced(at_once(lasting(2)), now)] {
            assert_eq!((denial(&ended, now), ended.hesitation()), (Some(denied::PROFILE_MISMATCH), Duration::ZERO));
        }
    }

    #[test]
    fn an_agent_that_was_taken_out_is_nobody_at_once_and_one_that_came_may_ask_as_before() {
        let now = Instant::now();
        let agents = |name: &str, hours| Rules { agents: [name.to_owned()].into(), ..lasting(hours) };
        let agent = rules().agents.pop_first().unwrap();
        for hours in [1, 2] {
            let removed = InForce::new(lasting(1)).replaced(agents("system:serviceaccount:a:b", hours), now);
            assert_eq!(denial(&removed, now), Some(denied::NOT_THE_AGENT));
            let twice = removed.replaced(agents("system:serviceaccount:a:c", hours), now);
            assert_eq!(denial(&twice, now), Some(denied::NOT_THE_AGENT));
        }
        let added = InForce::new(agents("system:serviceaccount:a:b", 1)).replaced(agents(&agent, 2), now);
        assert_eq!(denial(&added, now), None);
    }

    #[test]
    fn an_issuer_that_was_taken_out_signs_nothing_more() {
        let now = Instant::now();
        let named = |name: &str| IssuerRef { name: name.into(), kind: "ClusterIssuer".into(), group: "cert-manager.io".into() };
        let guarded =
            |profile: &str, issuer: &str| Guarded { name: IssuerName(profile.into()), issuer: named(issuer), ..rules().issuers.remove(0) };
        let removed = InForce::new(lasting(1)).replaced(Rules { issuers: vec![guarded("default", "new-ca")], ..lasting(1) }, now);
        assert_eq!(denial(&removed, now), Some("ignored"));
        assert!(removed.former(now).all(|rules| rules.issuers.is_empty()));
        // One that still signs for others does so for those who had it, as long as the overlap lasts.
        let moved = vec![guarded("default", "new-ca"), guarded("payments", "mesh-ca")];
        let moved = InForce::new(lasting(1)).replaced(Rules { issuers: moved, ..lasting(1) }, now);
        assert_eq!((denial(&moved, now), denial(&moved, now + OVERLAP)), (None, Some(denied::PROFILE_MISMATCH)));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let now = Instant::now();
        let many = (2..100).fold(InForce::new(lasting(1)), |in_force, hours| in_force.replaced(lasting(hours), now));
        assert_eq!((many.former(now).count(), many.hesitation()), (MOST_FORMER, LONGEST_HESITATION));
    }
}
