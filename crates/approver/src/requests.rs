//! The watch of CertificateRequests, in the namespaces in which agents may create requests.
//!
//! With a fixed namespace for requests, requests of other namespaces are not read: their authors could fill the approver's memory. The
//! policies reject such a request for a guarded issuer, and without the policies it stays undecided.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    pin::Pin,
    sync::Arc,
};

use agent_kube::{
    self,
    labels::Resource,
    watch::{Selection, Signal},
};
use cert_manager::{REQUESTS_PER_PAGE, Request};
use futures::{
    Stream, StreamExt,
    stream::{self, SelectAll},
};
use kube::{Api, Client, runtime::watcher};

use crate::queue::{Key, key};

/// A set of namespaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Namespaces {
    /// Every namespace.
    All,
    /// These namespaces.
    Only(BTreeSet<String>),
}

impl Namespaces {
    /// Returns whether the set contains this namespace.
    pub fn contains(&self, namespace: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => names.contains(namespace),
        }
    }
}

/// The namespace of one list, or `None` for a list of all namespaces.
type Scope = Option<Arc<str>>;

/// A change that a [`RequestWatch`] reports.
#[derive(Debug)]
pub enum Update {
    /// A request of a list.
    Listed(Request),
    /// A new or changed request.
    Applied(Request),
    /// A deleted request.
    Deleted(Request),
    /// The end of a list: requests that it [lacks](List::lacks) do not exist.
    Complete(List),
}

/// The keys of a complete list.
#[derive(Debug)]
pub struct List {
    scope: Scope,
    keys: HashSet<Key>,
}

impl List {
    /// Returns whether the request with this key belongs to the list's namespaces and was not in the list.
    pub fn lacks(&self, key: &Key) -> bool {
        self.scope.as_ref().is_none_or(|namespace| **namespace == *key.0) && !self.keys.contains(key)
    }
}

/// The signals of one namespace.
type Signals = Pin<Box<dyn Stream<Item = (Scope, Signal<Request>)> + Send>>;

/// Watches the requests of some namespaces, each with a list of its own.
pub struct RequestWatch {
    signals: SelectAll<Signals>,
    /// Namespaces that have not been listed completely yet.
    open: HashSet<Scope>,
    /// The lists that are being read.
    lists: HashMap<Scope, HashSet<Key>>,
}

impl RequestWatch {
    /// Creates the watch. It sends no request before [`next`](Self::next).
    pub fn new(client: &Client, namespaces: &Namespaces, metrics: &agent_kube::Metrics) -> Self {
        let open: HashSet<Scope> = match namespaces {
            Namespaces::All => [None].into(),
            Namespaces::Only(names) => names.iter().map(|name| Some(Arc::from(name.as_str()))).collect(),
        };
        let signals = open.iter().map(|scope| {
            let api: Api<Request> = match scope {
                Some(namespace) => Api::namespaced(client.clone(), namespace),
                None => Api::all(client.clone()),
            };
            let selection = Selection {
                resource: Resource::certificaterequests,
                name: "certificaterequests.cert-manager.io".to_owned(),
                namespace: scope.as_deref().map(str::to_owned),
                config: watcher::Config::default().page_size(REQUESTS_PER_PAGE),
            };
            let scope = scope.clone();
            let signals = agent_kube::watch::watch(api, selection, metrics.clone());
            Box::pin(signals.map(move |signal| (scope.clone(), signal))) as Signals
        });
        Self { signals: stream::select_all(signals), open, lists: HashMap::new() }
    }

    /// Returns the next change. Waits forever if no namespace is watched.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no change.
    pub async fn next(&mut self) -> Update {
        loop {
            let Some((scope, signal)) = self.signals.next().await else { return std::future::pending().await };
            let Signal::Event(event) = signal else { continue };
            match event {
                watcher::Event::Init => drop(self.lists.insert(scope, HashSet::new())),
                watcher::Event::InitApply(request) => {
                    self.lists.entry(scope).or_default().insert(key(&request));
                    return Update::Listed(request);
                }
                watcher::Event::InitDone => {
                    self.open.remove(&scope);
                    let keys = self.lists.remove(&scope).unwrap_or_default();
                    return Update::Complete(List { scope, keys });
                }
                watcher::Event::Apply(request) => return Update::Applied(request),
                watcher::Event::Delete(request) => return Update::Deleted(request),
            }
        }
    }

    /// Returns whether each namespace has been listed completely once.
    pub fn is_complete(&self) -> bool {
        self.open.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_one_namespace_takes_away_nothing_of_another() {
        let key = |namespace: &str, name: &str| (namespace.to_owned(), name.to_owned());
        let lists = |scope: Option<&str>| {
            let list = List { scope: scope.map(Arc::from), keys: [key("n", "a")].into() };
            [key("n", "a"), key("n", "b"), key("m", "a")].map(|key| list.lacks(&key))
        };
        assert_eq!((lists(Some("n")), lists(None)), ([false, true, false], [false, true, true]));
        let only = Namespaces::Only(["n".to_owned()].into());
        assert!(only.contains("n") && !only.contains("m") && Namespaces::All.contains("m"));
    }
}
