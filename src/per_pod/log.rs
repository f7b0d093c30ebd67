//! Limits the log lines about calls of the kubelet: one line a minute for each volume and cause.
//!
//! A pod can cause such calls again and again: the kubelet retries a volume that cannot be published, and pods can be created in a loop.

use agent_runtime::telemetry::hush::{self, LogLimiter};
use tokio::time::Instant;
use tonic::Code;

use super::volume::Place;

/// The cause of a line.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Cause {
    /// A call was refused with this code. `None` if its target path names no volume.
    Refused(Option<Place>, &'static str, Code),
    /// The directory of a volume that was not published stays.
    NotCleared(Place),
    Published(Place),
    /// A volume was published, and the agent does not serve its socket yet.
    NotServed(Place),
    Unpublished(Place),
    /// A volume was unpublished, and its directory stays.
    DirectoryStays(Place),
    /// The socket of a pod that no longer exists was removed.
    Removed(Place),
    /// The socket of a pod that no longer exists cannot be removed.
    NotRemoved(Place),
}

impl hush::Cause for Cause {
    /// Only root can call the driver, but a call can name a volume that no pod has.
    fn is_proven(&self) -> bool {
        !matches!(self, Self::Refused(..))
    }
}

/// The limiter that all parts of the driver share.
#[derive(Debug, Default)]
pub(crate) struct VolumeLog(LogLimiter<Cause>);

impl VolumeLog {
    /// Returns the number of similar lines that were left out since the last one, if a line about `cause` may be logged now.
    pub(crate) fn permit(&self, cause: Cause) -> Option<u64> {
        self.0.permit(cause, Instant::now())
    }
}
