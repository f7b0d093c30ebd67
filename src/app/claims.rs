//! The pods of this node as claims on identities: it joins the pod index with the rule that names pods.

use std::sync::Arc;

use tokio::sync::watch;

use crate::{
    attest::pods::Pods,
    identity::{Identity, Resolver},
    rotation::Claims,
};

/// Who of the node's pods has an identity.
#[derive(Debug)]
pub(super) struct NodeClaims {
    pods: Pods,
    resolver: watch::Receiver<Arc<Resolver>>,
}

impl NodeClaims {
    /// Of `pods`, as `resolver` names them.
    pub(super) fn new(pods: Pods, resolver: watch::Receiver<Arc<Resolver>>) -> Self {
        Self { pods, resolver }
    }
}

impl Claims for NodeClaims {
    fn is_claimed(&self, identity: &Identity) -> bool {
        let resolver = self.resolver.borrow().clone();
        self.pods.workloads().iter().any(|workload| resolver.resolve(workload).is_ok_and(|theirs| theirs == *identity))
    }

    fn departures(&self) -> watch::Receiver<u64> {
        self.pods.departures()
    }
}
