//! Rules that select the workloads of a profile by namespace, service account and labels of the pod.
//!
//! A match holds if its namespaces, its service accounts and its labels all hold. A list holds if it is empty or any of its patterns
//! matches. Every label must have the given value. No I/O: the approver uses the same code.

use std::{collections::BTreeMap, fmt, sync::Arc};

use super::{Profile, Workload};

/// A name, or a prefix or suffix with `*` for the rest: `payments`, `team-*`, `*-canary`, `*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(Shape);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Shape {
    Exactly(Arc<str>),
    Beginning(Arc<str>),
    Ending(Arc<str>),
}

impl Pattern {
    /// Parses a pattern. Returns `None` if `text` has more than one `*`, or a `*` that is neither first nor last.
    pub fn parse(text: &str) -> Option<Self> {
        let shape = match (text.strip_suffix('*'), text.strip_prefix('*')) {
            (Some(part), _) => Shape::Beginning(part.into()),
            (None, Some(part)) => Shape::Ending(part.into()),
            (None, None) => Shape::Exactly(text.into()),
        };
        (!shape.part().contains('*')).then_some(Self(shape))
    }

    /// Returns whether the pattern matches `name`.
    pub fn matches(&self, name: &str) -> bool {
        match &self.0 {
            Shape::Exactly(part) => **part == *name,
            Shape::Beginning(part) => name.starts_with(&**part),
            Shape::Ending(part) => name.ends_with(&**part),
        }
    }

    /// Returns the text of the pattern without `*`.
    pub fn part(&self) -> &str {
        self.0.part()
    }

    /// Returns a name that the pattern matches, with `filler` in place of `*`.
    pub fn example(&self, filler: &str) -> String {
        match &self.0 {
            Shape::Exactly(part) => part.to_string(),
            Shape::Beginning(part) => format!("{part}{filler}"),
            Shape::Ending(part) => format!("{filler}{part}"),
        }
    }

    /// Returns whether the pattern matches every name that `other` matches.
    fn covers(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (shape, _) if shape.part().is_empty() && !matches!(shape, Shape::Exactly(_)) => true,
            (_, Shape::Exactly(name)) => self.matches(name),
            (Shape::Beginning(part), Shape::Beginning(longer)) => longer.starts_with(&**part),
            (Shape::Ending(part), Shape::Ending(longer)) => longer.ends_with(&**part),
            _ => false,
        }
    }

    fn covers_all(&self) -> bool {
        self.covers(&Self(Shape::Beginning("".into())))
    }
}

impl Shape {
    fn part(&self) -> &str {
        match self {
            Self::Exactly(part) | Self::Beginning(part) | Self::Ending(part) => part,
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Shape::Exactly(part) => f.write_str(part),
            Shape::Beginning(part) => write!(f, "{part}*"),
            Shape::Ending(part) => write!(f, "*{part}"),
        }
    }
}

/// Conditions on a pod. The default matches every pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Match {
    /// `namespaces`: one of them has to match; empty for all.
    pub namespaces: Vec<Pattern>,
    /// `serviceAccounts`: one of them has to match; empty for all.
    pub service_accounts: Vec<Pattern>,
    /// `podLabels`: the pod has each of them with exactly this value.
    pub pod_labels: BTreeMap<String, String>,
}

/// Reason why a match does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mismatch {
    /// The workload is not a pod.
    NoPod,
    /// No pattern matches this namespace of the pod.
    Namespace(String),
    /// No pattern matches this service account of the pod.
    ServiceAccount(String),
    /// The pod does not have this label with this value.
    Label(String, String),
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPod => f.write_str("it applies to pods only"),
            Self::Namespace(name) => write!(f, "namespace {name} is not among its namespaces"),
            Self::ServiceAccount(name) => write!(f, "service account {name} is not among its serviceAccounts"),
            Self::Label(key, value) => write!(f, "the pod has no label {key}={value}"),
        }
    }
}

impl Match {
    /// Checks whether the match holds for `workload`.
    ///
    /// # Errors
    ///
    /// The first condition that does not hold.
    pub fn check(&self, workload: &Workload) -> Result<(), Mismatch> {
        let Workload::Pod { pod, service_account, labels, .. } = workload else { return Err(Mismatch::NoPod) };
        let holds = |patterns: &[Pattern], name: &str| patterns.is_empty() || patterns.iter().any(|pattern| pattern.matches(name));
        if !holds(&self.namespaces, &pod.namespace) {
            return Err(Mismatch::Namespace(pod.namespace.to_string()));
        }
        let account = service_account.as_deref().unwrap_or_default();
        if !holds(&self.service_accounts, account) {
            return Err(Mismatch::ServiceAccount(account.to_owned()));
        }
        match self.pod_labels.iter().find(|(key, value)| labels.get(key) != Some(value.as_str())) {
            Some((key, value)) => Err(Mismatch::Label(key.clone(), value.clone())),
            None => Ok(()),
        }
    }

    /// Returns whether the match holds for every pod for which `other` holds. May return false for such a match if only several of its
    /// patterns together cover one pattern of `other`.
    pub fn covers(&self, other: &Self) -> bool {
        let covers = |own: &[Pattern], others: &[Pattern]| match (own, others) {
            ([], _) => true,
            (_, []) => own.iter().any(Pattern::covers_all),
            _ => others.iter().all(|other| own.iter().any(|pattern| pattern.covers(other))),
        };
        covers(&self.namespaces, &other.namespaces)
            && covers(&self.service_accounts, &other.service_accounts)
            && self.pod_labels.iter().all(|(key, value)| other.pod_labels.get(key) == Some(value))
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        for (what, patterns) in [("namespace", &self.namespaces), ("service account", &self.service_accounts)] {
            if !patterns.is_empty() {
                let names: Vec<String> = patterns.iter().map(ToString::to_string).collect();
                parts.push(format!("{what} {}", names.join(" or ")));
            }
        }
        parts.extend(self.pod_labels.iter().map(|(key, value)| format!("label {key}={value}")));
        if parts.is_empty() { f.write_str("every pod") } else { f.write_str(&parts.join(", ")) }
    }
}

/// A profile, and the pods that it applies to.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// Conditions on the pod.
    pub matches: Match,
    /// The profile.
    pub profile: Arc<Profile>,
    /// `selectable`: the profile applies only to pods that pick it by an attribute of their CSI volume, and only if `matches` holds.
    pub selectable: bool,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::PodRef;

    fn pattern(text: &str) -> Pattern {
        Pattern::parse(text).unwrap()
    }

    fn pod(namespace: &str, account: &str, labels: &[(&str, &str)]) -> Workload {
        Workload::Pod {
            pod: PodRef { namespace: namespace.into(), name: "p".into(), uid: "u".into() },
            service_account: Some(account.into()),
            labels: labels.iter().copied().collect(),
            picked: None,
        }
    }

    fn matching(namespaces: &[&str], accounts: &[&str], labels: &[(&str, &str)]) -> Match {
        Match {
            namespaces: namespaces.iter().map(|n| pattern(n)).collect(),
            service_accounts: accounts.iter().map(|n| pattern(n)).collect(),
            pod_labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        }
    }

    #[test]
    fn a_pattern_is_a_name_or_one_end_of_it() {
        for (text, name, wanted) in [
            ("pay", "pay", true),
            ("pay", "payments", false),
            ("pay*", "payments", true),
            ("pay*", "pay", true),
            ("pay*", "repay", false),
            ("*-eu", "shop-eu", true),
            ("*-eu", "shop-eu-1", false),
            ("*", "anything", true),
            ("*", "", true),
        ] {
            assert_eq!(pattern(text).matches(name), wanted, "{text} {name}");
            assert_eq!(pattern(text).to_string(), text);
        }
        for wrong in ["a*b", "*a*", "**", "a**"] {
            assert_eq!(Pattern::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_match_holds_where_all_of_it_does_and_says_what_does_not() {
        let rule = matching(&["shop", "pay*"], &["cart"], &[("tier", "gold")]);
        let gold = [("tier", "gold"), ("app", "x")];
        assert_eq!(rule.check(&pod("payments", "cart", &gold)), Ok(()));
        for (workload, why) in [
            (pod("other", "cart", &gold), "namespace other is not among its namespaces"),
            (pod("shop", "till", &gold), "service account till is not among its serviceAccounts"),
            (pod("shop", "cart", &[("tier", "silver")]), "the pod has no label tier=gold"),
            (pod("shop", "cart", &[]), "the pod has no label tier=gold"),
            (Workload::Unix { uid: 0 }, "it applies to pods only"),
        ] {
            assert_eq!(rule.check(&workload).unwrap_err().to_string(), why);
        }
        assert_eq!(Match::default().check(&pod("a", "b", &[])), Ok(()));
        assert_eq!(rule.to_string(), "namespace shop or pay*, service account cart, label tier=gold");
        assert_eq!(Match::default().to_string(), "every pod");
    }

    #[test]
    fn a_match_covers_what_it_always_takes() {
        let all = Match::default();
        let pay = matching(&["pay*"], &[], &[]);
        let payments = matching(&["payments"], &["cart"], &[]);
        let gold = matching(&["payments"], &["cart"], &[("tier", "gold")]);
        let stars = matching(&["*"], &["*"], &[]);
        for (one, other, wanted) in [
            (&all, &gold, true),
            (&stars, &all, true),
            (&pay, &payments, true),
            (&payments, &gold, true),
            (&gold, &payments, false),
            (&payments, &pay, false),
            (&pay, &all, false),
            (&matching(&["a", "pay*"], &[], &[]), &matching(&["a", "b"], &[], &[]), false),
            (&matching(&["*x"], &[], &[]), &matching(&["ax", "*yx"], &[], &[]), true),
            (&matching(&["*x"], &[], &[]), &matching(&["x*"], &[], &[]), false),
        ] {
            assert_eq!(one.covers(other), wanted, "{one} / {other}");
        }
    }

    proptest! {
        #[test]
        fn what_is_covered_never_matches_alone(a in "[ab]{0,2}\\*?", b in "[ab]{0,2}\\*?", c in "\\*?[ab]{0,2}", name in "[ab]{0,4}") {
            for (one, other) in [(&a, &b), (&b, &c), (&c, &a)] {
                let (one, other) = (pattern(one), pattern(other));
                prop_assert!(!one.covers(&other) || !other.matches(&name) || one.matches(&name), "{} {} {}", one, other, name);
            }
        }

        #[test]
        fn an_example_is_one(text in "[a-c]{1,3}", filler in "[a-c]{0,3}") {
            for text in [text.clone(), format!("{text}*"), format!("*{text}"), "*".to_owned()] {
                prop_assert!(pattern(&text).matches(&pattern(&text).example(&filler)));
            }
        }
    }
}
