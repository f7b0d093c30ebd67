//! `clusterTrustBundle` of a trust source: the names, signers and label selectors that Kubernetes accepts.

use std::{collections::BTreeSet, fmt};

use kube::{
    core::{Expression, Selector},
    runtime::watcher,
};
use serde_json::Value;

use super::TrustSource;
use crate::config::{
    error::FieldError,
    reader::Section,
    values::{self, is_dns_label},
};

/// Maximum length of the name of a Kubernetes object in characters, for each part between the colons of a ClusterTrustBundle's name.
const MAX_NAME_CHARS: usize = 253;
/// Maximum length of a signer name: a domain, `/`, and the name of a resource with its namespace.
const MAX_SIGNER_NAME_CHARS: usize = 571;

/// The ClusterTrustBundles of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BundleSelection {
    /// The one with this name.
    Name(String),
    /// All of one signer with these labels.
    Signer {
        /// `spec.signerName`
        signer_name: String,
        /// Selects all if it is empty.
        labels: Selector,
    },
}

/// The form that the names of sources have: `NAME`, or `signer SIGNER, labels SELECTOR`.
impl fmt::Display for BundleSelection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Signer { signer_name, labels } if labels.selects_all() => write!(f, "signer {signer_name}"),
            Self::Signer { signer_name, labels } => write!(f, "signer {signer_name}, labels {labels}"),
        }
    }
}

impl BundleSelection {
    /// The selectors of a watch.
    pub(crate) fn watch_config(&self) -> watcher::Config {
        match self {
            Self::Name(name) => watcher::Config::default().fields(&format!("metadata.name={name}")),
            Self::Signer { signer_name, labels } => {
                let config = watcher::Config::default().fields(&format!("spec.signerName={signer_name}"));
                if labels.selects_all() { config } else { config.labels_from(labels) }
            }
        }
    }

    /// The words for a selection without an object.
    pub(crate) fn absence(&self) -> &'static str {
        match self {
            Self::Name(_) => "the ClusterTrustBundle does not exist: create it, or correct the name in the configuration",
            Self::Signer { .. } => {
                "no ClusterTrustBundle of this signer has these labels: create one, or correct signerName and labelSelector in the configuration"
            }
        }
    }
}

pub(super) fn decode(section: &Section<'_>) -> Option<TrustSource> {
    let name = section.read("name", None, |v| object_name(v).map(Some));
    let signer_name = section.read("signerName", None, |v| signer(v).map(Some));
    let has_selector = section.is_set("labelSelector");
    let labels = section.section("labelSelector", selector);
    let (name, signer_name, labels) = (name?, signer_name?, labels?);
    let selection = match (name, signer_name) {
        (Some(_), Some(_)) => Err(("names both name and signerName", "keep one of them: the name of one object, or the signer of several")),
        (Some(_), None) if has_selector => {
            Err(("has a labelSelector beside name", "remove it: it selects among the objects of a signerName"))
        }
        (Some(name), None) => Ok(BundleSelection::Name(name)),
        (None, Some(_)) if !has_selector => {
            Err(("has a signerName without a labelSelector", "write labelSelector: {} for all of the signer, or name labels"))
        }
        (None, Some(signer_name)) => Ok(BundleSelection::Signer { signer_name, labels }),
        (None, None) => Err((
            "names no object",
            "write { name: mesh-roots } or { signerName: example.com/mesh, labelSelector: { matchLabels: { … } } }",
        )),
    };
    match selection {
        Ok(selection) => Some(TrustSource::ClusterTrustBundle(selection)),
        Err((what, remedy)) => {
            section.wrong_here(what, remedy);
            None
        }
    }
}

/// The name of a ClusterTrustBundle: that of any object, or below a signer `<domain>:<path>:<name>`.
fn object_name(value: &Value) -> Result<String, FieldError> {
    let name = values::text(value)?;
    let is_valid = match name.split(':').collect::<Vec<_>>()[..] {
        [name] => is_dns_subdomain(name),
        [domain, path, suffix] => is_signer(domain, path) && is_dns_subdomain(suffix),
        _ => false,
    };
    let remedy = "use lower-case letters, digits, '-' and '.', such as mesh-roots, and for an object of a signer the signer's name with : \
                  for / before it, such as example.com:mesh:roots";
    if is_valid { Ok(name.to_owned()) } else { Err(FieldError::new("is not the name of a ClusterTrustBundle", remedy)) }
}

fn signer(value: &Value) -> Result<String, FieldError> {
    let name = values::text(value)?;
    let is_valid = name.split_once('/').is_some_and(|(domain, path)| is_signer(domain, path));
    let wrong = || {
        let remedy = "write a domain of at least two parts, / and a name, in lower case, such as example.com/mesh";
        FieldError::new("is not the name of a signer", remedy)
    };
    if is_valid { Ok(name.to_owned()) } else { Err(wrong()) }
}

/// Whether `<domain>/<path>` is the name of a signer.
fn is_signer(domain: &str, path: &str) -> bool {
    domain.len() <= MAX_NAME_CHARS
        && domain.contains('.')
        && domain.split('.').all(is_dns_label)
        && path.split('.').all(is_dns_subdomain)
        && domain.len() + 1 + path.len() <= MAX_SIGNER_NAME_CHARS
}

/// Whether Kubernetes accepts `name` as a DNS subdomain (RFC 1123). It does not limit the length of one label.
fn is_dns_subdomain(name: &str) -> bool {
    let is_label = |label: &str| {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let edges = [label.bytes().next(), label.bytes().last()];
        edges.into_iter().all(|b| b.is_some_and(plain)) && label.bytes().all(|b| plain(b) || b == b'-')
    };
    name.len() <= MAX_NAME_CHARS && name.split('.').all(is_label)
}

fn selector(selector: &Section<'_>) -> Option<Selector> {
    let equal = selector.map("matchLabels", values::object_label);
    let expressions = selector.sections("matchExpressions", expression);
    let equal = equal?.into_iter().map(|(key, value)| Expression::Equal(key, value));
    Some(equal.chain(expressions?).collect())
}

/// The operators of an expression.
#[derive(Clone, Copy)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

fn expression(expression: &Section<'_>) -> Option<Expression> {
    let absent = |what: &'static str| move || FieldError::new("is missing", what);
    let key = expression.require("key", absent("name the key of a label"), |v| {
        let key = values::text(v)?;
        values::object_label(key, &Value::String(String::new())).map(|_| key.to_owned())
    });
    let operators =
        [("In", Operator::In), ("NotIn", Operator::NotIn), ("Exists", Operator::Exists), ("DoesNotExist", Operator::DoesNotExist)];
    let operator = expression.require("operator", absent("use In, NotIn, Exists or DoesNotExist"), values::choice(&operators));
    // The key was checked above: here only the value counts.
    let listed = expression.list("values", |v| values::object_label("key", v));
    let (key, operator, listed) = (key?, operator?, listed?);
    let needs_values = matches!(operator, Operator::In | Operator::NotIn);
    if needs_values == listed.is_empty() {
        let (what, remedy) = if needs_values {
            ("is empty, and In and NotIn compare with its entries", "list at least one value, or use Exists or DoesNotExist")
        } else {
            ("has entries, with which Exists and DoesNotExist do not compare", "remove it, or use In or NotIn")
        };
        expression.wrong("values", what, remedy);
        return None;
    }
    let listed: BTreeSet<_> = listed.into_iter().collect();
    Some(match operator {
        Operator::In => Expression::In(key, listed),
        Operator::NotIn => Expression::NotIn(key, listed),
        Operator::Exists => Expression::Exists(key),
        Operator::DoesNotExist => Expression::DoesNotExist(key),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn parse(bundle: &str) -> Result<BundleSelection, String> {
        let text =
            format!("attestation: unix\nissuer: {{ embedded: {{}} }}\ntrust: {{ sources: [ {{ clusterTrustBundle: {bundle} }} ] }}\n");
        let loaded = Config::parse(&text, &|_| None).map_err(|error| error.to_string())?;
        match loaded.config.trust_sources.into_iter().next() {
            Some(TrustSource::ClusterTrustBundle(selection)) => Ok(selection),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn a_source_is_one_object_or_those_of_a_signer() {
        let words = |text: &str| {
            let selection = parse(text).unwrap();
            let config = selection.watch_config();
            (selection.to_string(), config.field_selector.unwrap(), config.label_selector)
        };
        let named = |name: &str| (name.to_owned(), format!("metadata.name={name}"), None);
        assert_eq!(words("{ name: mesh-roots.v2 }"), named("mesh-roots.v2"));
        assert_eq!(words("{ name: 'example.com:mesh:roots' }"), named("example.com:mesh:roots"));
        let signer = "spec.signerName=example.com/mesh".to_owned();
        let all = words("{ signerName: example.com/mesh, labelSelector: {} }");
        assert_eq!(all, ("signer example.com/mesh".to_owned(), signer.clone(), None));
        let some = words(
            "{ signerName: example.com/mesh, labelSelector: { matchLabels: { a.b/tier: live, x: '' }, matchExpressions: [ \
             { key: k, operator: In, values: [ b, a ] }, { key: l, operator: NotIn, values: [ c ] }, { key: m, operator: Exists }, \
             { key: n, operator: DoesNotExist, values: [] } ] } }",
        );
        let labels = "a.b/tier=live,x=,k in (a,b),l notin (c),m,!n".to_owned();
        assert_eq!(some, (format!("signer example.com/mesh, labels {labels}"), signer, Some(labels)));
    }

    #[test]
    fn names_are_those_that_kubernetes_accepts() {
        let long = "a".repeat(253);
        for good in
            ["a", "0.a-b", &long, "a.b:c:d", "kubernetes.io:kube-apiserver-serving:x.y", &format!("a.b:{}.{long}:{long}", &long[..60])]
        {
            assert_eq!(parse(&format!("{{ name: '{good}' }}")), Ok(BundleSelection::Name(good.to_owned())), "{good}");
        }
        let label = "b".repeat(64);
        for bad in [
            "A",
            "-a",
            "a_b",
            "a..b",
            "a/b",
            "a:b",
            "a.b:c",
            "a.b:c:",
            ":a",
            "a:b:c",
            "a.b:c:d:e",
            "a.b:c:D",
            &format!("{long}a"),
            &format!("a.{label}:c:d"),
            "a.b:c/d:e",
        ] {
            let error = parse(&format!("{{ name: '{bad}' }}")).unwrap_err();
            assert!(
                error.starts_with("trust.sources[0].clusterTrustBundle.name: ") && error.contains("is not the name of a Cluster"),
                "{error}"
            );
        }
        let selector = |name: &str| parse(&format!("{{ signerName: '{name}', labelSelector: {{}} }}"));
        for good in ["a.b/c", "kubernetes.io/kube-apiserver-serving", "issuers.cert-manager.io/ns.name", &format!("a.b/{long}")] {
            assert!(selector(good).is_ok(), "{good}");
        }
        for bad in ["a", "a/b", "a.b/", "/c", "a.b/c/d", "a.b/C", "a.b:c", &format!("a.{label}/c"), &format!("{long}.c/{long}.{long}")] {
            let error = selector(bad).unwrap_err();
            assert!(
                error.starts_with("trust.sources[0].clusterTrustBundle.signerName: ") && error.contains("is not the name of a si"),
                "{error}"
            );
        }
    }

    #[test]
    fn each_mistake_has_its_sentence() {
        let place = "trust.sources[0].clusterTrustBundle";
        for (text, expected) in [
            ("{}", ": names no object; write { name: mesh-roots } or { signerName: "),
            (
                "{ name: a, signerName: a.b/c }",
                ": names both name and signerName; keep one of them: the name of one object, or the signer of several",
            ),
            (
                "{ name: a, labelSelector: {} }",
                ": has a labelSelector beside name; remove it: it selects among the objects of a signerName",
            ),
            (
                "{ signerName: a.b/c }",
                ": has a signerName without a labelSelector; write labelSelector: {} for all of the signer, or name labels",
            ),
            (
                "{ signerName: a.b/c, labelSelector: { matchLabels: { '-': x } } }",
                ".labelSelector.matchLabels.-: \"x\" is under an invalid label key; ",
            ),
            (
                "{ signerName: a.b/c, labelSelector: { matchLabels: { x: 'a b' } } }",
                ".labelSelector.matchLabels.x: \"a b\" is not the value of a label",
            ),
            (
                "{ signerName: a.b/c, labelSelector: { matchExpressions: [ { key: a, operator: In } ] } }",
                ".labelSelector.matchExpressions[0].values: is empty, and In and NotIn compare with its entries; list at least one value, ",
            ),
            (
                "{ signerName: a.b/c, labelSelector: { matchExpressions: [ { key: a, operator: Exists, values: [ b ] } ] } }",
                ".labelSelector.matchExpressions[0].values: a list has entries, with which Exists and DoesNotExist do not compare; remove it",
            ),
            (
                "{ signerName: a.b/c, labelSelector: { matchExpressions: [ { key: '', operator: in } ] } }",
                ".labelSelector.matchExpressions[0].key: \"\" is empty; ",
            ),
            (
                "{ signerName: a.b/c, labelSelector: { matchExpressions: [ { operator: in } ] } }",
                ".labelSelector.matchExpressions[0].key: is missing; name the key of a label",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with(&format!("{place}{expected}")), "{text}: {error}");
        }
    }
}
