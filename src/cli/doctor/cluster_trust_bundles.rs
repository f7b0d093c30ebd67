//! The step about ClusterTrustBundles: whether the API server serves them, if the configuration names one.

use agent_kube::cluster_trust_bundle::{GROUP, PLURAL, UNSERVED, UNSERVED_REMEDY, served_version};
use kube::Client;

use super::{cluster::failed, report::Step};
use crate::{
    cli::Exit,
    config::{Config, TrustSource},
};

/// Asks the API server for its versions. `None` if the configuration has no such source.
pub(super) async fn look(client: &Client, config: &Config) -> Option<Step> {
    let name = "trust bundles";
    let mut sources = config.trust_sources.iter().chain(config.federated.values());
    sources.find(|source| matches!(source, TrustSource::ClusterTrustBundle(_)))?;
    Some(match served_version(client).await {
        Ok(Some(version)) => Step::ok(name, format!("the API server serves {PLURAL}.{GROUP} in {}", version.as_str())),
        Ok(None) => Step::failed(name, Exit::Failed, UNSERVED, UNSERVED_REMEDY),
        Err(failure) => failed(name, &failure),
    })
}
