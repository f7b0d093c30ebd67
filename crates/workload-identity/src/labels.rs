//! Labels of a pod, in a form that takes little memory.

use std::{fmt, sync::Arc};

/// Labels of a pod, sorted by key. Clones share one allocation.
///
/// A process that holds the labels of every pod of a cluster passes keys and values that it holds already: equal texts then exist once.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Labels(Arc<[(Arc<str>, Arc<str>)]>);

impl Labels {
    /// Returns the value of the label with this key.
    pub fn get(&self, key: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(known, _)| (**known).cmp(key)).ok()?;
        self.0.get(at).map(|(_, value)| &**value)
    }

    /// Returns whether another clone of these labels exists.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// Returns the keys with their values, sorted by key.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&Arc<str>, &Arc<str>)> {
        self.0.iter().map(|(key, value)| (key, value))
    }
}

impl Default for Labels {
    fn default() -> Self {
        Self(Arc::from([]))
    }
}

impl fmt::Debug for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// If a key occurs several times, its first value counts.
impl<K: Into<Arc<str>>, V: Into<Arc<str>>> FromIterator<(K, V)> for Labels {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(labels: I) -> Self {
        let mut labels: Vec<(Arc<str>, Arc<str>)> = labels.into_iter().map(|(key, value)| (key.into(), value.into())).collect();
        labels.sort_by(|(one, _), (other, _)| one.cmp(other));
        labels.dedup_by(|(later, _), (first, _)| later == first);
        Self(labels.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_found_by_key_in_whatever_order_they_came() {
        let labels: Labels = [("b", "2"), ("a", "1"), ("c", "3"), ("a", "4")].into_iter().collect();
        assert_eq!((labels.get("a"), labels.get("b"), labels.get("c"), labels.get("d")), (Some("1"), Some("2"), Some("3"), None));
        assert_eq!(labels.iter().map(|(key, _)| &**key).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(labels, [("c", "3"), ("b", "2"), ("a", "1")].into_iter().collect());
        assert_eq!((Labels::default().get("a"), Labels::default().iter().len()), (None, 0));
        assert_eq!(format!("{:?}", [("a", "1")].into_iter().collect::<Labels>()), "{\"a\": \"1\"}");
    }
}
