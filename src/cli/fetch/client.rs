//! A client of the secret discovery service on one connection.

use std::path::Path;

use sds_server::{
    grpc::client::{self, Connection, Error},
    proto::envoy::service::{
        discovery::v3::{DiscoveryRequest, DiscoveryResponse},
        secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::failure::Failure;

/// A client on one connection.
pub(super) type Client = SecretDiscoveryServiceClient<Connection>;

/// Connects to the socket at `path`.
pub(super) async fn connect(path: &Path) -> Result<Client, Failure> {
    let (connection, driver) = client::connect(path).await.map_err(|error| match error {
        Error::Connect(source) => Failure::Connect { path: path.to_owned(), source },
        Error::Handshake(source) => Failure::Handshake { path: path.to_owned(), source },
    })?;
    tokio::spawn(driver);
    Ok(Client::with_origin(connection, client::origin()))
}

/// Opens a stream with its first request. Requests that are sent to the returned sender go to the server.
pub(super) async fn stream(
    client: &mut Client,
    first: DiscoveryRequest,
) -> Result<(mpsc::Sender<DiscoveryRequest>, Streaming<DiscoveryResponse>), Failure> {
    let (sender, receiver) = mpsc::channel(4);
    // The new channel has capacity for it.
    let _ = sender.try_send(first);
    let responses = client.stream_secrets(ReceiverStream::new(receiver)).await.map_err(Failure::status)?;
    Ok((sender, responses.into_inner()))
}
