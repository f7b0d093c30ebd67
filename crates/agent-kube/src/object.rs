//! Objects as this program reads them: part of the metadata, and the fields of spec and status that the reader declares.
//!
//! The API server sends `metadata.managedFields` with every object. As a tree of values it takes several times the memory of the rest.
//! [`Observed`] skips it during deserialisation, together with owner references and finalizers. Of labels and annotations it keeps those
//! that the [`Kind`] selects. An `Observed` is for reading only: an object that is written back to the server would lose the skipped
//! fields.

use std::{borrow::Cow, collections::BTreeMap, fmt, marker::PhantomData};

use k8s_openapi::{
    NamespaceResourceScope,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use kube::Resource;
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};

/// A kind of namespaced object, and the selection of its labels and annotations.
pub trait Kind: Clone + fmt::Debug + Send + Sync + 'static {
    /// API group; empty for the core group.
    const GROUP: &'static str;
    /// Version of the group.
    const VERSION: &'static str;
    /// Kind, as in `kind`.
    const KIND: &'static str;
    /// Plural, as in API paths.
    const PLURAL: &'static str;

    /// Returns whether the label with this key is kept.
    fn keeps_label(key: &str) -> bool;

    /// Returns whether the annotation with this key is kept.
    fn keeps_annotation(key: &str) -> bool;
}

/// An object of kind `K`, with the spec fields `P` and the status fields `U`.
#[derive(Debug, Clone, Deserialize)]
#[cfg_attr(any(test, feature = "testing"), derive(serde::Serialize), serde(bound(serialize = "P: serde::Serialize, U: serde::Serialize")))]
#[serde(bound(deserialize = "P: Default + Deserialize<'de>, U: Deserialize<'de>"))]
pub struct Observed<K: Kind, P, U> {
    /// Name, namespace, UID, resource version, the times of creation and deletion, and the labels and annotations that `K` keeps. All other
    /// fields are empty.
    #[serde(default, deserialize_with = "metadata::<K, _>")]
    pub metadata: ObjectMeta,
    /// `spec`
    #[serde(default)]
    pub spec: P,
    /// `status`
    pub status: Option<U>,
    #[serde(skip)]
    kind: PhantomData<K>,
}

#[cfg(any(test, feature = "testing"))]
impl<K: Kind, P, U> Observed<K, P, U> {
    /// Creates an object with this name and spec, for tests.
    pub fn new(name: &str, spec: P) -> Self {
        let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        Self { metadata, spec, status: None, kind: PhantomData }
    }
}

impl<K: Kind, P, U> Resource for Observed<K, P, U> {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind(_: &()) -> Cow<'_, str> {
        K::KIND.into()
    }

    fn group(_: &()) -> Cow<'_, str> {
        K::GROUP.into()
    }

    fn version(_: &()) -> Cow<'_, str> {
        K::VERSION.into()
    }

    fn plural(_: &()) -> Cow<'_, str> {
        K::PLURAL.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// The metadata fields that are read. All others are skipped without building a value.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", bound(deserialize = ""))]
struct Metadata<K: Kind> {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    labels: Option<Kept<Labels<K>>>,
    annotations: Option<Kept<Annotations<K>>>,
}

fn metadata<'de, K: Kind, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    let read = Metadata::<K>::deserialize(deserializer)?;
    Ok(ObjectMeta {
        name: read.name,
        namespace: read.namespace,
        uid: read.uid,
        resource_version: read.resource_version,
        creation_timestamp: read.creation_timestamp,
        deletion_timestamp: read.deletion_timestamp,
        labels: read.labels.and_then(Kept::into_map),
        annotations: read.annotations.and_then(Kept::into_map),
        ..ObjectMeta::default()
    })
}

/// Selects the entries of a map that are kept.
trait Filter {
    fn keeps(key: &str) -> bool;
}

struct Labels<K>(PhantomData<K>);

impl<K: Kind> Filter for Labels<K> {
    fn keeps(key: &str) -> bool {
        K::keeps_label(key)
    }
}

struct Annotations<K>(PhantomData<K>);

impl<K: Kind> Filter for Annotations<K> {
    fn keeps(key: &str) -> bool {
        K::keeps_annotation(key)
    }
}

/// A map with only the entries that `F` keeps.
struct Kept<F>(BTreeMap<String, String>, PhantomData<F>);

impl<F> Kept<F> {
    fn into_map(self) -> Option<BTreeMap<String, String>> {
        Some(self.0).filter(|map| !map.is_empty())
    }
}

impl<'de, F: Filter> Deserialize<'de> for Kept<F> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

struct Entries<F>(PhantomData<F>);

impl<'de, F: Filter> Visitor<'de> for Entries<F> {
    type Value = Kept<F>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Kept<F>, A::Error> {
        let mut map = BTreeMap::new();
        while let Some(key) = entries.next_key::<String>()? {
            if F::keeps(&key) {
                map.insert(key, entries.next_value()?);
            } else {
                entries.next_value::<IgnoredAny>()?;
            }
        }
        Ok(Kept(map, PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use kube::core::{NotUsed, ObjectList, WatchEvent};
    use serde_json::{Value, json};

    use super::*;

    #[derive(Debug, Clone)]
    struct Example;

    impl Kind for Example {
        const GROUP: &'static str = "example.com";
        const VERSION: &'static str = "v2";
        const KIND: &'static str = "Example";
        const PLURAL: &'static str = "examples";

        fn keeps_label(key: &str) -> bool {
            key == "kept"
        }

        fn keeps_annotation(key: &str) -> bool {
            key.starts_with("kept/")
        }
    }

    type Read = Observed<Example, NotUsed, NotUsed>;

    fn object() -> Value {
        json!({
            "apiVersion": "example.com/v2", "kind": "Example",
            "metadata": {
                "name": "a", "namespace": "n", "uid": "u", "resourceVersion": "7", "generation": 3, "generateName": "a-",
                "creationTimestamp": "2026-01-02T03:04:05Z", "deletionTimestamp": "2026-01-02T03:04:06Z", "deletionGracePeriodSeconds": 30,
                "labels": {"kept": "1", "other": "2"}, "annotations": {"kept/x": "1", "other": "2"},
                "finalizers": ["f"], "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "x"}],
                "managedFields": [{
                    "manager": "kubelet", "operation": "Update", "apiVersion": "v1", "time": "2026-01-02T03:04:05Z", "fieldsType": "FieldsV1",
                    "fieldsV1": {"f:status": {"f:conditions": {"k:{\"type\":\"Ready\"}": {".": {}, "f:status": {}}}}}, "subresource": "status",
                }],
            },
            "spec": {"a": [1, {"b": null}]}, "status": {"c": "d"},
        })
    }

    fn check(read: &Read) {
        let expected = ObjectMeta {
            name: Some("a".into()),
            namespace: Some("n".into()),
            uid: Some("u".into()),
            resource_version: Some("7".into()),
            creation_timestamp: read.metadata.creation_timestamp.clone(),
            deletion_timestamp: read.metadata.deletion_timestamp.clone(),
            labels: Some([("kept".to_owned(), "1".to_owned())].into()),
            annotations: Some([("kept/x".to_owned(), "1".to_owned())].into()),
            ..ObjectMeta::default()
        };
        assert_eq!(read.metadata, expected);
        assert!(read.metadata.creation_timestamp < read.metadata.deletion_timestamp);
    }

    #[test]
    fn of_the_metadata_only_what_is_read_is_kept_in_every_answer() {
        check(&serde_json::from_str(&object().to_string()).unwrap());
        let list =
            json!({"kind": "ExampleList", "apiVersion": "example.com/v2", "metadata": {"resourceVersion": "9"}, "items": [object()]});
        check(&serde_json::from_str::<ObjectList<Read>>(&list.to_string()).unwrap().items[0]);
        // The API server writes `type` before `object`.
        let event = format!("{{\"type\":\"MODIFIED\",\"object\":{}}}", object());
        match serde_json::from_str(&event).unwrap() {
            WatchEvent::Modified(read) => check(&read),
            other => panic!("{other:?}"),
        }
        let bare: Read = serde_json::from_str("{\"metadata\":{\"labels\":null,\"annotations\":{}}}").unwrap();
        assert_eq!(bare.metadata, ObjectMeta::default());
        assert!(bare.status.is_none());
    }

    #[test]
    fn its_paths_are_those_of_its_kind() {
        assert_eq!(Read::url_path(&(), Some("n")), "/apis/example.com/v2/namespaces/n/examples");
        assert_eq!(Read::url_path(&(), None), "/apis/example.com/v2/examples");
    }
}
