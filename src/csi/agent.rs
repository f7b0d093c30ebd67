//! Calls of the mount helper to the agent.
//!
//! The agent is treated as hostile: it parses the requests of every pod of the node. A call has a time limit, a response has a limit of
//! bytes, and the helper uses no more of a response than a code and a subset of what it has sent. The socket must be a socket in the
//! directory itself, not a link to another one. A connection serves one call.

use std::{
    collections::HashSet,
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use agent_runtime::text;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use sds_server::grpc::client;
use tokio::{net::UnixStream, time::timeout};
use tonic::{Code, Status};

use crate::per_pod::{
    CONFIRMATION,
    interface::{FindEndedRequest, ServeRequest, WithdrawRequest, pod_sockets_client::PodSocketsClient},
    volume::{Place, Volume},
};

/// Time limit for a call beyond the time that the agent waits by itself.
const ANSWER: Duration = Duration::from_secs(2);
/// Time limit for the answer which pods have ended. The agent waits for the API server before.
const ENDED: Duration = Duration::from_secs(60);
/// Maximum length of a response, in bytes: the volumes of all pods of a node.
const MAX_RESPONSE_BYTES: usize = 256 << 10;

/// The agent has not served a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotServed {
    /// The agent refuses to serve it.
    Refused(Code, String),
    /// The agent does not run, does not answer in time, or cannot serve it now.
    Unavailable(String),
}

/// The agent's socket.
#[derive(Debug, Clone)]
pub struct Agent {
    socket: PathBuf,
    wait: Duration,
}

impl Agent {
    /// The agent at `socket`. `wait` is `waitForCertificate`.
    pub fn new(socket: PathBuf, wait: Duration) -> Self {
        Self { socket, wait }
    }

    /// Requests that the agent serves `volume`.
    ///
    /// # Errors
    ///
    /// See [`NotServed`].
    ///
    /// # Cancel safety
    ///
    /// The agent may serve the volume even if the future is dropped.
    pub async fn serve(&self, volume: &Volume) -> Result<(), NotServed> {
        let request = ServeRequest::from(volume);
        let limit = self.wait + CONFIRMATION + ANSWER;
        self.call(limit, async |mut client| client.serve(request).await.map(drop)).await.map_err(|status| not_served(&status))
    }

    /// Requests that the agent no longer serves the volume of `place`. An agent that does not answer finds out by itself.
    pub async fn withdraw(&self, place: &Place) {
        let request = WithdrawRequest { volume: Some(place.into()) };
        let _ = self.call(ANSWER, async |mut client| client.withdraw(request).await.map(drop)).await;
    }

    /// Returns those of `places` whose pods no longer exist.
    ///
    /// # Errors
    ///
    /// The agent does not run, or does not know all pods.
    pub async fn find_ended(&self, places: &HashSet<Place>) -> Result<Vec<Place>, String> {
        let request = FindEndedRequest { volumes: places.iter().map(Into::into).collect() };
        let ended = self.call(ENDED, async |mut client| client.find_ended(request).await).await.map_err(|status| sentence(&status))?;
        let ended = ended.into_inner().volumes.into_iter().filter_map(|volume| Place::try_from(Some(volume)).ok());
        Ok(ended.filter(|place| places.contains(place)).collect())
    }

    async fn call<T>(
        &self,
        limit: Duration,
        call: impl AsyncFnOnce(PodSocketsClient<client::Connection>) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let done = timeout(limit, async {
            let cannot = |error: io::Error| Status::unavailable(format!("cannot connect: {error}"));
            let socket = open(&self.socket).map_err(|error| cannot(error.into()))?;
            let stream = UnixStream::connect(by_descriptor(&socket)).await.map_err(cannot)?;
            let (connection, driver) = client::over(stream).await.map_err(|error| Status::unavailable(error.to_string()))?;
            let client = PodSocketsClient::with_origin(connection, client::origin()).max_decoding_message_size(MAX_RESPONSE_BYTES);
            tokio::select! {
                done = call(client) => done,
                () = driver => Err(Status::unavailable("the connection has ended")),
            }
        });
        done.await.unwrap_or_else(|_| Err(Status::unavailable(format!("no answer within {} s", limit.as_secs()))))
    }
}

/// Opens the socket itself. A link that the agent puts in its place is not followed.
fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    let socket = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    match FileType::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode) {
        FileType::Socket => Ok(socket),
        _ => Err(rustix::io::Errno::NOTSOCK),
    }
}

fn by_descriptor(socket: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", socket.as_raw_fd()).into()
}

fn not_served(status: &Status) -> NotServed {
    match status.code() {
        code @ (Code::InvalidArgument | Code::NotFound | Code::AlreadyExists | Code::PermissionDenied | Code::FailedPrecondition) => {
            NotServed::Refused(code, text::excerpt(status.message(), text::MAX_MESSAGE_CHARS))
        }
        _ => NotServed::Unavailable(sentence(status)),
    }
}

fn sentence(status: &Status) -> String {
    format!("{:?}: {}", status.code(), text::excerpt(status.message(), text::MAX_MESSAGE_CHARS))
}
