//! Maps workloads to profiles and identities. No I/O: agent and approver get the same result from the same pod.

use std::{fmt, sync::Arc};

use super::{Error, Identity, Profile, Rule, SpiffeId, TrustDomain, Workload};

/// The configured mapping from workloads to identities. Immutable: a new configuration makes a new value.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolver {
    /// The agent's own trust domain.
    pub trust_domain: TrustDomain,
    /// Rules in the order of the configuration. The names of their profiles are unique.
    pub rules: Arc<[Rule]>,
    /// Profile of every workload that no rule matches.
    pub default_profile: Arc<Profile>,
}

/// The profile of a workload, and the reason.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision<'a> {
    /// The profile.
    pub profile: &'a Arc<Profile>,
    /// Reason for this profile.
    pub reason: Reason<'a>,
}

/// Reason why a workload has its profile.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reason<'a> {
    /// The pod picks the selectable rule at this index, and its match holds.
    Picked(usize, &'a Rule),
    /// The rule at this index is the first that is not selectable and whose match holds.
    Matched(usize, &'a Rule),
    /// No match holds, so the default profile applies.
    Default,
}

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Picked(place, rule) => write!(f, "the pod picks profiles[{place}], and its match holds ({})", rule.matches),
            Self::Matched(place, rule) => write!(f, "profiles[{place}] is the first whose match holds ({})", rule.matches),
            Self::Default => f.write_str("no match holds"),
        }
    }
}

impl Resolver {
    /// Creates a resolver with one profile for all workloads.
    pub fn single(trust_domain: TrustDomain, profile: Arc<Profile>) -> Self {
        Self { trust_domain, rules: Arc::new([]), default_profile: profile }
    }

    /// Returns the identity of `workload`.
    ///
    /// # Errors
    ///
    /// The errors of [`decide`](Self::decide) and [`identity`](Self::identity).
    pub fn resolve(&self, workload: &Workload) -> Result<Identity, Error> {
        self.identity(self.decide(workload)?.profile, workload)
    }

    /// Returns the profile of `workload`: the picked one, or else the first whose match holds, or else the default.
    ///
    /// # Errors
    ///
    /// [`Error::NoServiceAccount`] for a pod without a service account. [`Error::Pick`] for a picked profile that is not configured, not
    /// selectable, or does not match; an invalid pick never falls back to another profile.
    pub fn decide(&self, workload: &Workload) -> Result<Decision<'_>, Error> {
        let rules = || self.rules.iter().enumerate();
        match workload {
            Workload::Pod { pod, service_account: None, .. } => Err(Error::NoServiceAccount { pod: pod.to_string() }),
            Workload::Pod { pod, picked: Some(name), .. } => {
                let wrong = |why: String| Err(Error::Pick { pod: pod.to_string(), profile: name.to_string(), why });
                let Some((place, rule)) = rules().find(|(_, rule)| rule.profile.name == *name) else {
                    return wrong("no profile of this name is configured".to_owned());
                };
                if !rule.selectable {
                    return wrong(format!("profiles[{place}] is not selectable"));
                }
                match rule.matches.check(workload) {
                    Ok(()) => Ok(Decision { profile: &rule.profile, reason: Reason::Picked(place, rule) }),
                    Err(why) => wrong(format!("the match of profiles[{place}] does not hold: {why}")),
                }
            }
            _ => Ok(match rules().find(|(_, rule)| !rule.selectable && rule.matches.check(workload).is_ok()) {
                Some((place, rule)) => Decision { profile: &rule.profile, reason: Reason::Matched(place, rule) },
                None => Decision { profile: &self.default_profile, reason: Reason::Default },
            }),
        }
    }

    /// Renders the identity of `workload` under `profile`, without a check that the profile applies to the workload.
    ///
    /// # Errors
    ///
    /// [`Error::Template`] if a template uses a field that the workload does not have. [`Error::SpiffeId`] or [`Error::TrustDomain`] if
    /// the rendered SPIFFE ID is invalid.
    pub fn identity(&self, profile: &Arc<Profile>, workload: &Workload) -> Result<Identity, Error> {
        let render = |template: &str| render(template, |field| placeholder(field, &self.trust_domain, workload));
        let spiffe_id = SpiffeId::new(&render(&profile.spiffe_id)?)?;
        let dns_names = profile.dns_names.iter().map(|template| render(template)).collect::<Result<_, _>>()?;
        let pod_uid = workload.pod().filter(|_| profile.per_pod).map(|pod| pod.uid.clone());
        Ok(Identity { spiffe_id, dns_names, profile: profile.clone(), pod_uid, account: workload.account() })
    }

    /// Explains the profile of `workload` for an operator: first the decision, then one line for each rule before the deciding one. A
    /// pick has no such lines.
    pub fn explain(&self, workload: &Workload) -> Vec<String> {
        let decided = self.decide(workload);
        let end = match &decided {
            Ok(Decision { reason: Reason::Picked(place, _) | Reason::Matched(place, _), .. }) => *place,
            _ => self.rules.len(),
        };
        let picked = matches!(workload, Workload::Pod { picked: Some(_), .. });
        let passed = self.rules.iter().enumerate().take(end).filter(|_| !picked).map(|(place, rule)| {
            let why = match rule.matches.check(workload) {
                _ if rule.selectable => "only for pods that pick it".to_owned(),
                Err(why) => why.to_string(),
                // Only for a pod without a service account: otherwise the first such rule is the deciding one.
                Ok(()) => "its match holds".to_owned(),
            };
            format!("not {} of profiles[{place}]: {why}", rule.profile.name)
        });
        let last = match &decided {
            Ok(decision) => format!("{}: {}", decision.profile.name, decision.reason),
            Err(error) => error.to_string(),
        };
        [last].into_iter().chain(passed).collect()
    }
}

/// Returns the value of a template's `{field}`. `None` if the field is unknown, or this kind of workload does not have it.
pub fn placeholder(field: &str, trust_domain: &TrustDomain, workload: &Workload) -> Option<String> {
    match (field, workload) {
        ("trustDomain", _) => Some(trust_domain.to_string()),
        ("namespace", Workload::Pod { pod, .. }) => Some(pod.namespace.to_string()),
        ("podName", Workload::Pod { pod, .. }) => Some(pod.name.to_string()),
        ("podUid", Workload::Pod { pod, .. }) => Some(pod.uid.to_string()),
        ("serviceAccount", Workload::Pod { service_account: Some(name), .. }) => Some(name.to_string()),
        ("uid", Workload::Unix { uid }) => Some(uid.to_string()),
        _ => None,
    }
}

/// Replaces each `{field}` of `template` by `value(field)`.
///
/// # Errors
///
/// [`Error::Template`] with the first field for which `value` returns `None`.
pub fn render(template: &str, value: impl Fn(&str) -> Option<String>) -> Result<String, Error> {
    let mut out = String::with_capacity(template.len() + 32);
    let mut rest = template;
    while let Some(open) = rest.find('{') {
        out.push_str(&rest[..open]);
        let after = &rest[open + 1..];
        let end = after.find('}').unwrap_or(after.len());
        let field = &after[..end];
        match value(field) {
            Some(text) => out.push_str(&text),
            None => return Err(Error::Template { template: template.to_owned(), field: field.to_owned() }),
        }
        rest = after.get(end + 1..).unwrap_or_default();
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        Match, Pattern, PodRef,
        samples::{ISTIO, pod, profile},
    };

    fn resolver(profile: Profile) -> Resolver {
        Resolver::single(TrustDomain::new("cluster.local").unwrap(), Arc::new(profile))
    }

    fn rule(name: &str, matches: Match, selectable: bool) -> Rule {
        Rule { matches, profile: Arc::new(Profile { name: name.into(), ..profile(ISTIO) }), selectable }
    }

    fn namespaces(names: &[&str]) -> Match {
        Match { namespaces: names.iter().map(|name| Pattern::parse(name).unwrap()).collect(), ..Match::default() }
    }

    fn label(key: &str, value: &str) -> Match {
        Match { pod_labels: BTreeMap::from([(key.to_owned(), value.to_owned())]), ..Match::default() }
    }

    fn workload(namespace: &str, labels: &[(&str, &str)], picked: Option<&str>) -> Workload {
        Workload::Pod {
            pod: PodRef { namespace: namespace.into(), name: "cart-1".into(), uid: "u1".into() },
            service_account: Some("cart".into()),
            labels: labels.iter().copied().collect(),
            picked: picked.map(Into::into),
        }
    }

    fn several() -> Resolver {
        let rules = [
            rule("gold", label("tier", "gold"), false),
            rule("payments", namespaces(&["pay*"]), false),
            rule("short", namespaces(&["shop"]), true),
            rule("rest-of-shop", namespaces(&["shop"]), false),
        ];
        Resolver { rules: rules.into(), ..resolver(profile(ISTIO)) }
    }

    fn name(resolver: &Resolver, workload: &Workload) -> String {
        resolver.resolve(workload).unwrap().profile.name.to_string()
    }

    #[test]
    fn a_pod_gets_the_identity_of_its_service_account() {
        let identity = resolver(profile(ISTIO)).resolve(&pod(Some("cart"), "u1")).unwrap();
        assert_eq!(identity.spiffe_id.as_str(), "spiffe://cluster.local/ns/shop/sa/cart");
        assert_eq!(&*identity.dns_names, ["cart.shop.svc".to_owned()]);
    }

    #[test]
    fn siblings_share_an_identity_unless_the_profile_says_per_pod() {
        let shared = resolver(profile(ISTIO));
        assert_eq!(shared.resolve(&pod(Some("cart"), "u1")).unwrap(), shared.resolve(&pod(Some("cart"), "u2")).unwrap());
        let own = resolver(Profile { per_pod: true, ..profile(ISTIO) });
        assert_ne!(own.resolve(&pod(Some("cart"), "u1")).unwrap(), own.resolve(&pod(Some("cart"), "u2")).unwrap());
    }

    #[test]
    fn a_static_pod_has_no_identity_whatever_matches_it() {
        for resolver in [resolver(profile(ISTIO)), several()] {
            let error = resolver.resolve(&pod(None, "u1")).unwrap_err();
            assert_eq!(error.to_string(), "pod shop/cart-1 has no service account and therefore no identity");
        }
    }

    #[test]
    fn a_template_that_does_not_fit_names_the_field() {
        let error = resolver(profile(ISTIO)).resolve(&Workload::Unix { uid: 7 }).unwrap_err();
        assert!(error.to_string().contains("{namespace}"), "{error}");
    }

    #[test]
    fn the_first_match_decides_and_selectable_profiles_are_passed_over() {
        let resolver = several();
        for (namespace, labels, expected) in [
            ("payments", &[("tier", "gold")][..], "gold"),
            ("payments", &[("tier", "silver")], "payments"),
            ("shop", &[], "rest-of-shop"),
            ("elsewhere", &[], "default"),
        ] {
            assert_eq!(name(&resolver, &workload(namespace, labels, None)), expected);
        }
    }

    #[test]
    fn a_pick_fails_unless_the_profile_is_selectable_and_matches() {
        let resolver = several();
        // A pick takes precedence over every match.
        assert_eq!(name(&resolver, &workload("shop", &[("tier", "gold")], Some("short"))), "short");
        for (namespace, picked, why) in [
            ("shop", "gold", "\"gold\" by its volume: profiles[0] is not selectable"),
            ("shop", "default", "\"default\" by its volume: no profile of this name is configured"),
            ("shop", "", "\"\" by its volume: no profile of this name is configured"),
            ("payments", "short", "the match of profiles[2] does not hold: namespace payments is not among its namespaces"),
        ] {
            let error = resolver.resolve(&workload(namespace, &[], Some(picked))).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn the_explanation_names_the_deciding_rule_and_those_passed_over() {
        let resolver = several();
        assert_eq!(
            resolver.explain(&workload("shop", &[], None)),
            [
                "rest-of-shop: profiles[3] is the first whose match holds (namespace shop)",
                "not gold of profiles[0]: the pod has no label tier=gold",
                "not payments of profiles[1]: namespace shop is not among its namespaces",
                "not short of profiles[2]: only for pods that pick it",
            ]
        );
        let picked = resolver.explain(&workload("shop", &[], Some("short")));
        assert_eq!(picked, ["short: the pod picks profiles[2], and its match holds (namespace shop)"]);
        assert_eq!(resolver.explain(&workload("elsewhere", &[], None)).len(), 5);
        assert_eq!(resolver.explain(&workload("elsewhere", &[], None))[0], "default: no match holds");
    }
}
