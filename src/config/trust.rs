//! The section `trust`: the sources of the trust bundles.

use std::{collections::BTreeMap, fmt, path::PathBuf, sync::Arc};

use sds_server::trust::{Metrics, Trust};
use serde_json::Value;
use tracing::Dispatch;
use workload_identity::TrustDomain;

mod cluster_trust_bundle;

pub use cluster_trust_bundle::BundleSelection;

use super::{
    error::FieldError,
    reader::Section,
    values::{self, one_of},
};

/// A source of a trust bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrustSource {
    /// A key of a ConfigMap, as trust-manager writes it.
    ConfigMap {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// The key in the ConfigMap.
        key: String,
    },
    /// A PEM file, which the agent watches.
    File {
        /// Its path.
        path: PathBuf,
    },
    /// ClusterTrustBundles, as a signer of Kubernetes writes them.
    ClusterTrustBundle(BundleSelection),
    /// PEM in the configuration itself.
    Inline {
        /// The path of the source in the configuration, which is its name.
        path: String,
        /// The PEM.
        pem: InlinePem,
    },
}

impl TrustSource {
    /// Whether the agent reads the source through the API server.
    pub fn is_in_cluster(&self) -> bool {
        match self {
            Self::ConfigMap { .. } | Self::ClusterTrustBundle(_) => true,
            Self::File { .. } | Self::Inline { .. } => false,
        }
    }
}

/// PEM of the configuration. Its `Debug` has no part of the text.
#[derive(Clone, PartialEq, Eq)]
pub struct InlinePem(Arc<str>);

impl InlinePem {
    /// The text.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for InlinePem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InlinePem({} bytes)", self.0.len())
    }
}

/// The own sources, and those of other trust domains.
pub(super) type Sources = (Option<Vec<TrustSource>>, Option<BTreeMap<TrustDomain, TrustSource>>);

/// Decodes `trust`. `own` is the agent's trust domain.
pub(super) fn decode(trust: &Section<'_>, own: Option<&TrustDomain>) -> Sources {
    (trust.sections("sources", source), federated(trust, own))
}

fn source(source: &Section<'_>) -> Option<TrustSource> {
    // All kinds are decoded, so that all errors are found.
    let kinds = [
        ("configMap", source.has("configMap").then(|| source.section("configMap", config_map))),
        (
            "clusterTrustBundle",
            source.has("clusterTrustBundle").then(|| source.section("clusterTrustBundle", cluster_trust_bundle::decode)),
        ),
        ("file", source.has("file").then(|| file(source))),
        ("inline", source.has("inline").then(|| inline(source))),
    ];
    let mut named = kinds.into_iter().filter_map(|(kind, decoded)| Some((kind, decoded?)));
    match (named.next(), named.next()) {
        (Some((_, decoded)), None) => decoded,
        (Some((first, _)), Some((second, _))) => {
            source.wrong_here(format!("names both {first} and {second}"), "make it two sources");
            None
        }
        (None, _) => {
            let examples = [
                "{ configMap: { namespace: cert-manager, name: mesh-roots } }",
                "{ clusterTrustBundle: { name: mesh-roots } }",
                "{ file: /etc/sds-agent/roots.pem }",
                "{ inline: | } with PEM below it",
            ];
            source.wrong_here("names no source", format!("write {}", one_of(&examples)));
            None
        }
    }
}

fn config_map(map: &Section<'_>) -> Option<TrustSource> {
    let absent = |what: &'static str| move || FieldError::new("is missing", what);
    let namespace = map.require("namespace", absent("name the namespace of the ConfigMap"), values::namespace);
    let name = map.require("name", absent("name the ConfigMap that holds the roots"), values::object_name);
    let key = map.read("key", "ca.crt".into(), values::config_map_key);
    Some(TrustSource::ConfigMap { namespace: namespace?, name: name?, key: key? })
}

fn file(source: &Section<'_>) -> Option<TrustSource> {
    let absent = || FieldError::new("is missing", "name a PEM file");
    source.require("file", absent, values::absolute_path).map(|path| TrustSource::File { path })
}

fn inline(source: &Section<'_>) -> Option<TrustSource> {
    let absent = || FieldError::new("is missing", "write the roots as PEM");
    let pem = source.require_hidden("inline", absent, inline_pem)?;
    Some(TrustSource::Inline { path: source.here().to_owned(), pem })
}

/// PEM that a trust bundle can be made from. An error has no part of the text, which may hold a private key.
fn inline_pem(value: &Value) -> Result<InlinePem, FieldError> {
    let Value::String(pem) = value else { return Err(FieldError::new("is not text", "write the PEM as a block: `inline: |`")) };
    if pem.contains("PRIVATE KEY") {
        return Err(FieldError::new("has a private key", "write certificates only, and replace that key: this file is not secret"));
    }
    let source = Trust::new(Metrics::default()).source(None, "inline");
    // The offer of a source is logged. This one is only a check, and its error goes to the caller.
    let offered = tracing::dispatcher::with_default(&Dispatch::none(), || source.offer(pem.as_bytes()));
    match offered {
        Ok(()) => Ok(InlinePem(pem.as_str().into())),
        Err(refused) => Err(FieldError::new(refused.cause.to_string(), "write the roots in PEM, as in the file of a CA")),
    }
}

fn federated(trust: &Section<'_>, own: Option<&TrustDomain>) -> Option<BTreeMap<TrustDomain, TrustSource>> {
    trust.section("federated", |federated| {
        let entries = federated.entries(|name, entry| {
            let domain = TrustDomain::new(name).ok();
            match &domain {
                None => entry.wrong_here("has a name that is not a trust domain", "use a name such as partner.example"),
                Some(domain) if Some(domain) == own => {
                    entry.wrong_here("is the agent's own trust domain", "put its roots under trust.sources");
                }
                Some(_) => {}
            }
            let source = source(entry);
            Some((domain?, source?))
        });
        Some(entries?.into_iter().collect())
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::Config;

    fn with(sources: &Value) -> String {
        let text = json!({"attestation": "unix", "issuer": {"embedded": {}}, "trust": {"sources": sources}});
        text.to_string()
    }

    fn root() -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        (rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    #[test]
    fn inline_pem_is_named_by_its_place() {
        let (root, _) = root();
        let block: String = root.lines().map(|line| format!("        {line}\n")).collect();
        let text = format!(
            "attestation: unix\nissuer: {{ embedded: {{}} }}\ntrust:\n  sources:\n    - file: /a.pem\n    - inline: |\n{block}  federated:\n    \
             partner.example:\n      inline: |\n{block}"
        );
        let config = Config::parse(&text, &|_| None).unwrap().config;
        let inline = |path: &str| TrustSource::Inline { path: path.into(), pem: InlinePem(root.as_str().into()) };
        assert_eq!(config.trust_sources[1], inline("trust.sources[1]"));
        assert_eq!(config.federated.into_values().collect::<Vec<_>>(), [inline("trust.federated.partner.example")]);
        assert_eq!(
            format!("{:?}", config.trust_sources[1]),
            format!("Inline {{ path: \"trust.sources[1]\", pem: InlinePem({} bytes) }}", root.len())
        );
    }

    #[test]
    fn an_error_about_inline_pem_has_no_part_of_it() {
        let (root, key) = root();
        let body = root.lines().nth(1).unwrap();
        let broken = root.replacen(body, &body[1..], 1);
        for (value, words) in [
            (
                json!(key),
                "trust.sources[0].inline: has a private key; write certificates only, and replace that key: this file is not secret",
            ),
            (json!(format!("{root}{key}")), "trust.sources[0].inline: has a private key; "),
            (json!(""), "trust.sources[0].inline: holds no certificate; write the roots in PEM, as in the file of a CA"),
            (json!(body), "trust.sources[0].inline: holds no certificate; "),
            (json!(broken), "trust.sources[0].inline: "),
            (json!(root.replace("-----END", "----END")), "trust.sources[0].inline: is not valid PEM: "),
            (json!([body]), "trust.sources[0].inline: is not text; write the PEM as a block: `inline: |`"),
            (json!({body: 1}), "trust.sources[0].inline: is not text; "),
            (json!(12345), "trust.sources[0].inline: is not text; "),
            (json!(null), "trust.sources[0].inline: is missing; write the roots as PEM"),
        ] {
            let error = Config::parse(&with(&json!([{"inline": value}])), &|_| None).unwrap_err();
            let text = format!("{error} {error:?}");
            assert!(text.starts_with(words), "{text}");
            assert!([&root, &key].iter().flat_map(|pem| pem.lines()).all(|line| !text.contains(&line[..16.min(line.len())])), "{text}");
            assert!(!text.contains("12345"), "{text}");
        }
    }

    /// A block with a wrong indentation is an error of the YAML or of another field.
    #[test]
    fn pem_in_the_wrong_place_is_not_shown() {
        let (root, key) = root();
        let lines = |indent: &str| root.lines().chain(key.lines()).map(|line| format!("{indent}{line}\n")).collect::<String>();
        let head = "attestation: unix\nissuer: { embedded: {} }\ntrust:\n  sources:\n";
        for text in [
            format!("{head}    - inline: |\n{}", lines("")),
            format!("{head}    - inline: |\n{}", lines("    ")),
            format!("{head}    - inline:\n{}", lines("        ")),
            format!("{head}    - inline: >\n{}", lines("  ")),
            format!("{head}    - |\n{}", lines("      ")),
            format!("{head}    - inlines: |\n{}", lines("        ")),
            format!("{head}    - inline: \"{}", lines("")),
            format!("{head}    - inline: [\n{}]\n", lines("        ")),
        ] {
            let error = Config::parse(&text, &|_| None).unwrap_err().to_string();
            let shown = root.lines().chain(key.lines()).find(|line| error.contains(&line[..16.min(line.len())]) && !line.contains("-----"));
            assert_eq!(shown, None, "{error}\n{text}");
        }
    }

    #[test]
    fn a_source_has_one_kind() {
        let (root, _) = root();
        let error = |source: Value| Config::parse(&with(&json!([source])), &|_| None).unwrap_err().to_string();
        assert_eq!(error(json!({"file": "/a", "inline": root})), "trust.sources[0]: names both file and inline; make it two sources");
        let none = error(json!({}));
        assert!(none.starts_with("trust.sources[0]: names no source; write { configMap: ") && none.contains("{ inline: | }"), "{none}");
    }
}
