//! Attestation by user id, for development and bare machines: the kernel vouches for the peer's uid at connect time.
//!
//! Any process of the user has the user's identity.

use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use unix_peer::peer::Peer;
use workload_identity::Workload;

use crate::attest::{Attested, Attestor, Error, Method};

/// uid → [`Workload::Unix`].
#[derive(Debug, Clone, Copy, Default)]
pub struct UnixAttestor;

impl Attestor for UnixAttestor {
    fn method(&self) -> Method {
        Method::unix
    }

    fn attest<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Result<Attested, Error>> {
        // The uid is what is attested, not the process: a connection handed to a child of the same user stays that user's.
        let attested = Attested { workload: Workload::Unix { uid: peer.uid }, terminated: CancellationToken::new() };
        Box::pin(std::future::ready(Ok(attested)))
    }
}
