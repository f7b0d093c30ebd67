//! Attestation by user ID, for development and for hosts without Kubernetes. The kernel reports the user ID of the peer at connect time.
//!
//! Every process of a user has the identity of that user.

use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use unix_peer::peer::Peer;
use workload_identity::Workload;

use crate::attest::{Attested, Attestor, Error, Method};

/// Attests the user ID of the peer as [`Workload::Unix`].
#[derive(Debug, Clone, Copy, Default)]
pub struct UnixAttestor;

impl Attestor for UnixAttestor {
    fn method(&self) -> Method {
        Method::unix
    }

    fn attest<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Result<Attested, Error>> {
        // The user is attested, not the process: a connection that is passed to a child process of the user keeps the identity.
        let attested = Attested { workload: Workload::Unix { uid: peer.uid }, facts: None, terminated: CancellationToken::new() };
        Box::pin(std::future::ready(Ok(attested)))
    }
}
