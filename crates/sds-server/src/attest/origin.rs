//! Where a connection comes from, as far as quotas and the log are concerned: cheap, told before anybody is attested, and no proof.
//!
//! It groups what one pod does, whatever its processes and user ids are, by what the pod cannot choose: its cgroup, or the socket that is
//! its own. Whoever is in no pod is grouped by user id. An identity is never given for it; that is an [`Attestor`]'s work.
//!
//! [`Attestor`]: super::Attestor

use std::{fmt, sync::Arc};

use unix_peer::peer::Peer;

/// A group of connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Origin {
    /// Of the pod with this UID.
    Pod(Arc<str>),
    /// Of a user's processes that are in no pod, or have ended.
    User(u32),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(uid) => write!(f, "pod {uid}"),
            Self::User(uid) => write!(f, "user {uid}"),
        }
    }
}

/// Finds the pod of a process, without proof.
pub trait PodOfProcess: fmt::Debug + Send + Sync {
    /// The UID of the pod that the process `pid` is in; none where it is in no pod, is gone, or is in several.
    fn pod(&self, pid: i32) -> Option<Arc<str>>;
}

/// How the connections of one socket are grouped.
#[derive(Debug, Clone)]
pub enum Origins {
    /// By the pod of the peer's process.
    ByPod(Arc<dyn PodOfProcess>),
    /// By the peer's user id.
    ByUser,
    /// All are one: the socket belongs to one pod.
    Fixed(Origin),
}

impl Origins {
    /// The origin, where nothing has to be read for it.
    pub fn at_once(&self, peer: &Peer) -> Option<Origin> {
        match self {
            Self::Fixed(origin) => Some(origin.clone()),
            // A process that is not visible has no cgroups to read, and is served by nobody.
            Self::ByPod(_) if peer.pid > 0 => None,
            Self::ByPod(_) | Self::ByUser => Some(Origin::User(peer.uid)),
        }
    }

    /// The origin of the process `pid` of user `uid`. It may wait for the kernel: not for a thread that serves others.
    pub fn read(&self, pid: i32, uid: u32) -> Origin {
        let pod = match self {
            Self::Fixed(origin) => return origin.clone(),
            Self::ByUser => None,
            Self::ByPod(by_pod) => by_pod.pod(pid),
        };
        pod.map_or(Origin::User(uid), Origin::Pod)
    }
}
