//! The client's state of a state-of-the-world subscription: the accepted version and the resources seen. It has no side effects.
//!
//! It outlives connections, so that the first request of a new connection has the last version, as with Envoy.

use std::collections::{BTreeMap, BTreeSet};

use aws_lc_rs::digest::{Digest, SHA256, digest};
use sds_server::proto::{
    envoy::service::discovery::v3::{DiscoveryRequest, DiscoveryResponse},
    google::rpc::Status,
};

use super::resource::{self, Resource, TYPE_URL};

/// The requested names, and the answers so far.
#[derive(Debug)]
pub(super) struct Subscription {
    names: Vec<String>,
    accepted: String,
    answered: BTreeSet<String>,
    seen: BTreeMap<String, Digest>,
}

/// The content of one response.
#[derive(Debug)]
pub(super) struct Taken {
    /// New and changed resources.
    pub updates: Vec<Resource>,
    /// Resources that cannot be shown.
    pub problems: Vec<resource::Error>,
    /// The ACK, or a NACK if Envoy would reject the response too.
    pub reply: DiscoveryRequest,
}

impl Subscription {
    /// A subscription to `names`.
    pub(super) fn new(names: Vec<String>) -> Self {
        Self { names, accepted: String::new(), answered: BTreeSet::new(), seen: BTreeMap::new() }
    }

    /// The first request of a stream: the last version that was accepted, and no nonce.
    pub(super) fn first(&self) -> DiscoveryRequest {
        self.request(String::new())
    }

    /// Whether anything has been answered.
    pub(super) fn answered(&self) -> bool {
        !self.answered.is_empty()
    }

    /// The names without an answer yet.
    pub(super) fn missing(&self) -> Vec<&str> {
        self.names.iter().map(String::as_str).filter(|name| !self.answered.contains(*name)).collect()
    }

    /// Processes a response. A resource that has not changed since the server last sent it is not an update.
    pub(super) fn take(&mut self, response: DiscoveryResponse) -> Taken {
        let DiscoveryResponse { version_info, resources, nonce, .. } = response;
        let (mut updates, mut problems) = (Vec::new(), Vec::new());
        for any in &resources {
            let content = digest(&SHA256, &any.value);
            match resource::read(any, &version_info) {
                Ok(resource) => {
                    self.answered.insert(resource.name.clone());
                    let before = self.seen.insert(resource.name.clone(), content);
                    if before.is_none_or(|before| before.as_ref() != content.as_ref()) {
                        updates.push(resource);
                    }
                }
                Err(problem) => problems.push(problem),
            }
        }
        let refusal = problems.iter().find(|problem| problem.is_refusal());
        let error_detail = refusal.map(|problem| Status { code: tonic::Code::InvalidArgument.into(), message: problem.to_string() });
        if error_detail.is_none() {
            self.accepted = version_info;
        }
        let reply = DiscoveryRequest { error_detail, ..self.request(nonce) };
        Taken { updates, problems, reply }
    }

    fn request(&self, response_nonce: String) -> DiscoveryRequest {
        DiscoveryRequest {
            version_info: self.accepted.clone(),
            resource_names: self.names.clone(),
            type_url: TYPE_URL.to_owned(),
            response_nonce,
            error_detail: None,
        }
    }
}
