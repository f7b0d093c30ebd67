//! Reads a trust bundle from a key of a ConfigMap, as trust-manager writes it, with a watch on that one object.
//!
//! The key may be in `data` or in `binaryData`. The caller runs [`ConfigMapSource::run`]. A missing ConfigMap or key is counted and logged once, and the last valid bundle stays.

use std::{collections::BTreeMap, fmt, sync::Arc};

use agent_runtime::text;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Client;
use sds_server::trust::Source;
use tokio_util::sync::CancellationToken;

use super::{
    changed_content::{ChangedContent, Missing},
    config_map::ConfigMapWatch,
};

/// Keys of a ConfigMap that a message lists.
const MAX_LISTED_KEYS: usize = 10;

/// Watches a key of a ConfigMap and offers its content to a source of the trust.
pub struct ConfigMapSource {
    client: Client,
    namespace: Arc<str>,
    name: Arc<str>,
    key: Arc<str>,
    content: ChangedContent,
    metrics: agent_kube::Metrics,
}

impl fmt::Debug for ConfigMapSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigMapSource").field("content", &self.content).finish_non_exhaustive()
    }
}

impl ConfigMapSource {
    /// The name for [`Trust::source`](sds_server::trust::Trust::source).
    pub fn source_name(namespace: &str, name: &str, key: &str) -> String {
        format!("configMap {namespace}/{name}[{key}]")
    }

    /// `key` of the ConfigMap `namespace`/`name`, offered to `source`.
    pub fn new(client: Client, namespace: &str, name: &str, key: &str, source: Source, metrics: agent_kube::Metrics) -> Self {
        let content = ChangedContent::new(source);
        Self { client, namespace: namespace.into(), name: name.into(), key: key.into(), content, metrics }
    }

    /// Watches until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        shutdown.run_until_cancelled(self.watch()).await;
    }

    async fn watch(&mut self) {
        let mut watch = ConfigMapWatch::new(self.client.clone(), &self.namespace, &self.name, self.metrics.clone());
        while let Some(object) = watch.next().await {
            match object {
                Some(object) => self.read(&object),
                None => self.content.missing(Missing::Object, "the ConfigMap does not exist: create it, or correct trust.sources"),
            }
        }
    }

    fn read(&mut self, object: &ConfigMap) {
        match content(object, &self.key) {
            Some(pem) => self.content.offer(pem),
            None => {
                let keys = keys(object);
                let why = format_args!("the ConfigMap has no such key, only {keys:?}: correct the key, or write the roots there");
                self.content.missing(Missing::Key, why);
            }
        }
    }
}

/// Returns the content of `key`. `kubectl create configmap --from-file` writes a file that is not UTF-8 to `binaryData`, for example a
/// bundle with one Latin-1 letter in a comment. The API server accepts a key in one of the two fields only.
fn content<'o>(object: &'o ConfigMap, key: &str) -> Option<&'o [u8]> {
    let text = object.data.as_ref().and_then(|data| data.get(key)).map(String::as_bytes);
    text.or_else(|| object.binary_data.as_ref()?.get(key).map(|bytes| &*bytes.0))
}

/// Returns the keys of both fields for a message, at most [`MAX_LISTED_KEYS`].
fn keys(object: &ConfigMap) -> Vec<String> {
    let (text, binary) = (object.data.iter().flat_map(BTreeMap::keys), object.binary_data.iter().flat_map(BTreeMap::keys));
    text.chain(binary).take(MAX_LISTED_KEYS).map(|key| text::excerpt(key, text::MAX_NAME_CHARS)).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use agent_kube::fake::{self, FakeApi};
    use base64::{Engine, prelude::BASE64_STANDARD};
    use sds_server::trust::{Metrics, Trust};
    use serde_json::json;
    use tokio::time::timeout;

    use super::*;

    fn pem() -> String {
        let key = rcgen::KeyPair::generate().unwrap();
        rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap().pem()
    }

    fn config_map(key: &str, value: &str) -> serde_json::Value {
        json!({"metadata": {"name": "mesh-roots", "namespace": "cert-manager"}, "data": {key: value}})
    }

    #[test]
    fn the_key_is_read_from_either_field_and_the_keys_of_both_are_listed() {
        let object = |fields: serde_json::Value| -> ConfigMap { serde_json::from_value(fields).unwrap() };
        // `# é` in Latin-1, as base64.
        let both = object(json!({"data": {"a": "text"}, "binaryData": {"b": "IyDp"}}));
        assert_eq!([content(&both, "a"), content(&both, "b"), content(&both, "c")], [Some(&b"text"[..]), Some(&b"# \xe9"[..]), None]);
        assert_eq!(keys(&both), ["a", "b"]);
        assert_eq!(content(&object(json!({})), "a"), None);
        let many: serde_json::Map<_, _> = (0..20).map(|n| (format!("{n:02}\n"), json!(""))).collect();
        let listed = keys(&object(json!({"data": {"a": ""}, "binaryData": many})));
        assert_eq!((listed.len(), &*listed[0], &*listed[9]), (10, "a", "08"));
        let long = keys(&object(json!({"binaryData": {"x".repeat(5000): ""}})));
        assert!(long[0].chars().count() <= text::MAX_NAME_CHARS + 1, "{long:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_key_is_followed_and_what_is_missing_or_broken_changes_nothing() {
        let (api, metrics) = (FakeApi::new(), agent_kube::Metrics::default());
        let trust = Trust::new(Metrics::default());
        let name = ConfigMapSource::source_name("cert-manager", "mesh-roots", "ca.crt");
        let source = trust.source(None, &name);
        let source = ConfigMapSource::new(api.client(&metrics), "cert-manager", "mesh-roots", "ca.crt", source, metrics);
        tokio::spawn(source.run(CancellationToken::new()));
        let mut bundles = trust.subscribe();
        let own = |set: &Arc<sds_server::trust::BundleSet>| set.own.as_ref().map(|b| b.version().to_owned());
        let changed =
            async |bundles: &mut tokio::sync::watch::Receiver<_>| timeout(Duration::from_secs(60), bundles.changed()).await.is_ok();
        api.until("the watch", |api| (api.count("watch", "configmaps") == 1).then_some(())).await;
        api.put("configmaps", json!({"metadata": {"name": "other", "namespace": "cert-manager"}, "data": {"ca.crt": pem()}}));
        assert!(!changed(&mut bundles).await, "a ConfigMap of another name changes nothing");

        api.put("configmaps", config_map("ca.crt", &pem()));
        assert!(changed(&mut bundles).await);
        let first = own(&bundles.borrow_and_update()).unwrap();
        let other_key = json!({"metadata": {"name": "mesh-roots", "namespace": "cert-manager"}, "binaryData": {"ca.pem": "IyDp"}});
        for bad in [config_map("ca.pem", &pem()), config_map("ca.crt", ""), config_map("ca.crt", "garbage"), other_key] {
            api.put("configmaps", bad);
            assert!(!changed(&mut bundles).await);
        }
        api.remove("configmaps", "cert-manager", "mesh-roots");
        assert!(!changed(&mut bundles).await);
        assert_eq!(own(&bundles.borrow()), Some(first.clone()));

        api.fail("watch", "configmaps", fake::Fault::Refuse, 3);
        api.cut_watches(true);
        api.put("configmaps", config_map("ca.crt", &pem()));
        assert!(changed(&mut bundles).await);
        let second = own(&bundles.borrow_and_update());
        assert_ne!(second, Some(first));

        let latin = BASE64_STANDARD.encode([b"# \xe9\n", pem().as_bytes()].concat());
        api.put("configmaps", json!({"metadata": {"name": "mesh-roots", "namespace": "cert-manager"}, "binaryData": {"ca.crt": latin}}));
        assert!(changed(&mut bundles).await);
        assert_ne!(own(&bundles.borrow()), second);
    }
}
