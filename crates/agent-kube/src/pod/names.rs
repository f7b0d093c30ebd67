//! Texts that many pods share, each held once: namespaces, nodes, service accounts, and the keys and values of labels.

use std::{collections::HashSet, hash::Hash, sync::Arc};

use workload_identity::Labels;

use super::Pod;

/// Size of a set below which it is not searched for unused values.
const MIN_SWEEP_AT: usize = 1024;

/// Texts and sets of labels. The pods of a Deployment share all their labels, those of a StatefulSet all but one.
#[derive(Debug, Default)]
pub struct Names {
    texts: Interned<Arc<str>>,
    labels: Interned<Labels>,
}

impl Names {
    /// Replaces the texts and labels of `pod` by equal ones that other pods hold.
    pub fn share(&mut self, pod: &mut Pod) {
        self.texts.intern(&mut pod.pod.namespace);
        pod.node_name.iter_mut().chain(&mut pod.service_account).for_each(|name| self.texts.intern(name));
        if self.labels.replace(&mut pod.labels) {
            return;
        }
        let labels = pod.labels.iter().map(|(key, value)| (key.clone(), value.clone())).map(|(mut key, mut value)| {
            self.texts.intern(&mut key);
            self.texts.intern(&mut value);
            (key, value)
        });
        pod.labels = labels.collect();
        self.labels.intern(&mut pod.labels);
    }
}

/// A value whose clones share one allocation.
trait Shared: Clone + Hash + Eq {
    /// Returns whether another clone exists.
    fn is_shared(&self) -> bool;
}

impl Shared for Arc<str> {
    fn is_shared(&self) -> bool {
        Self::strong_count(self) > 1
    }
}

impl Shared for Labels {
    fn is_shared(&self) -> bool {
        Self::is_shared(self)
    }
}

/// A set of values. A value without a pod is removed when the set has doubled.
#[derive(Debug)]
struct Interned<T> {
    known: HashSet<T>,
    sweep_at: usize,
}

impl<T> Default for Interned<T> {
    fn default() -> Self {
        Self { known: HashSet::new(), sweep_at: MIN_SWEEP_AT }
    }
}

impl<T: Shared> Interned<T> {
    /// Replaces `value` by the equal one of the set. Returns false if the set has none.
    fn replace(&self, value: &mut T) -> bool {
        let known = self.known.get(value);
        if let Some(known) = known {
            *value = known.clone();
        }
        known.is_some()
    }

    /// Replaces `value` by the equal one of the set, or adds it.
    fn intern(&mut self, value: &mut T) {
        if self.replace(value) {
            return;
        }
        if self.known.len() >= self.sweep_at {
            self.known.retain(Shared::is_shared);
            self.sweep_at = (2 * self.known.len()).max(MIN_SWEEP_AT);
        }
        self.known.insert(value.clone());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(number: usize) -> Pod {
        let object = json!({
            "metadata": {"namespace": "shop", "name": format!("p{number}"), "uid": format!("u{number}"),
                         "labels": {"app": "cart", "statefulset.kubernetes.io/pod-name": format!("p{number}")}},
            "spec": {"nodeName": "n1", "serviceAccountName": "cart"},
        });
        Pod::of(&serde_json::from_value(object).unwrap(), None).unwrap()
    }

    #[test]
    fn equal_texts_of_pods_are_held_once() {
        let mut names = Names::default();
        let [mut one, mut two] = [pod(1), pod(2)];
        let (before, other) = (one.clone(), two.clone());
        names.share(&mut one);
        names.share(&mut two);
        assert_eq!((&one, &two), (&before, &other), "only the memory changes");
        assert!(Arc::ptr_eq(&one.pod.namespace, &two.pod.namespace));
        assert!(Arc::ptr_eq(one.node_name.as_ref().unwrap(), two.node_name.as_ref().unwrap()));
        assert!(Arc::ptr_eq(one.service_account.as_ref().unwrap(), two.service_account.as_ref().unwrap()));
        assert!(one.labels.iter().zip(two.labels.iter()).all(|((key, _), (other, _))| Arc::ptr_eq(key, other)));
        assert_eq!(names.texts.known.len(), "shop n1 cart app statefulset.kubernetes.io/pod-name p1 p2".split(' ').count());
    }

    #[test]
    fn texts_of_deleted_pods_do_not_accumulate() {
        let mut names = Names::default();
        let mut kept = pod(0);
        names.share(&mut kept);
        for number in 1..10 * MIN_SWEEP_AT {
            names.share(&mut pod(number));
            let held = names.texts.known.len().max(names.labels.known.len());
            assert!(held <= 4 * MIN_SWEEP_AT, "{held}");
        }
        let mut again = pod(0);
        names.share(&mut again);
        assert!(Arc::ptr_eq(&kept.pod.namespace, &again.pod.namespace), "a text in use stays");
    }
}
