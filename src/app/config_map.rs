//! The watch of one ConfigMap.

use std::{fmt, pin::Pin, str::FromStr};

use agent_kube::{
    labels::Resource,
    watch::{Selection, Signal},
};
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client, runtime::watcher};

use crate::config;

/// The namespace and the name of a ConfigMap, written `NAMESPACE/NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigMapName {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl fmt::Display for ConfigMapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The text is not a namespace and a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write NAMESPACE/NAME, as in sds-agent/sds-agent")]
pub struct NotAName;

impl FromStr for ConfigMapName {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Self, NotAName> {
        let (namespace, name) = text.split_once('/').ok_or(NotAName)?;
        let is_valid = config::is_dns_label(namespace) && config::is_dns_name(name);
        if is_valid { Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() }) } else { Err(NotAName) }
    }
}

/// Watches one ConfigMap. The watch itself retries and logs failures of the API server.
pub(super) struct ConfigMapWatch {
    signals: Pin<Box<dyn Stream<Item = Signal<ConfigMap>> + Send>>,
    /// Whether the list in progress has the ConfigMap.
    is_listed: bool,
}

impl ConfigMapWatch {
    /// Begins with a list. The account needs the verbs `list` and `watch` for this name.
    pub(super) fn new(client: Client, namespace: &str, name: &str, metrics: agent_kube::Metrics) -> Self {
        let api: Api<ConfigMap> = Api::namespaced(client, namespace);
        let selection = Selection {
            resource: Resource::configmaps,
            name: format!("configmaps {name}"),
            namespace: Some(namespace.to_owned()),
            config: watcher::Config::default().fields(&format!("metadata.name={name}")),
        };
        Self { signals: Box::pin(agent_kube::watch::watch(api, selection, metrics)), is_listed: false }
    }

    /// Returns the ConfigMap after each change and each list; `Some(None)` if it does not exist. Returns `None` if the watch has ended,
    /// which it does not do by itself. A dropped call loses no change.
    pub(super) async fn next(&mut self) -> Option<Option<ConfigMap>> {
        loop {
            match self.signals.next().await? {
                Signal::Event(watcher::Event::Init) => self.is_listed = false,
                Signal::Event(watcher::Event::InitApply(object)) => {
                    self.is_listed = true;
                    return Some(Some(object));
                }
                Signal::Event(watcher::Event::Apply(object)) => return Some(Some(object)),
                Signal::Event(watcher::Event::Delete(_)) => return Some(None),
                Signal::Event(watcher::Event::InitDone) if !self.is_listed => return Some(None),
                Signal::Event(watcher::Event::InitDone) | Signal::Trouble(..) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_a_namespace_and_the_characters_of_both() {
        let name: ConfigMapName = "mesh-system/sds-agent.v2".parse().unwrap();
        assert_eq!((&*name.namespace, &*name.name, name.to_string().as_str()), ("mesh-system", "sds-agent.v2", "mesh-system/sds-agent.v2"));
        for bad in
            ["sds-agent", "/sds-agent", "mesh/", "mesh/a/b", "Mesh/a", "me.sh/a", "mesh/a b", "mesh/-a", &format!("{}/a", "m".repeat(64))]
        {
            assert_eq!(bad.parse::<ConfigMapName>(), Err(NotAName), "{bad}");
        }
    }
}
