//! The origin of a connection: the pod or user to which quotas and the log limiter assign it. It is known before attestation, is cheap to
//! find, and proves nothing.
//!
//! All connections of a pod have one origin, regardless of process and user ID. The origin comes from facts that the pod cannot choose: its
//! cgroup, or its own socket. On a socket for pods, all processes outside of pods share one origin, because a process can choose its user
//! ID. On a socket for users, callers are grouped by user ID. An origin never grants an identity; only an [`Attestor`]
//! does.
//!
//! [`Attestor`]: super::Attestor

use std::{fmt, sync::Arc};

use unix_peer::peer::Peer;

/// A group of connections, for quotas and the log limiter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Origin {
    /// Connections of the pod with this UID.
    Pod(Arc<str>),
    /// Connections from processes in no pod, on a socket for pods.
    NoPod,
    /// Connections of this user, on a socket for users.
    User(u32),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(uid) => write!(f, "pod {uid}"),
            Self::NoPod => f.write_str("no pod"),
            Self::User(uid) => write!(f, "user {uid}"),
        }
    }
}

/// Finds the pod of a process. The result is no proof.
pub trait PodOfProcess: fmt::Debug + Send + Sync {
    /// The UID of the pod of the process `pid`. `None` if the process is in no pod, has ended, or is in several pods.
    fn pod(&self, pid: i32) -> Option<Arc<str>>;
}

/// The rule that assigns the connections of one socket to origins.
#[derive(Debug, Clone)]
pub enum Origins {
    /// By the pod of the peer process.
    ByPod(Arc<dyn PodOfProcess>),
    /// By the user ID of the peer.
    ByUser,
    /// All connections have this origin, because one pod owns the socket.
    Fixed(Origin),
}

impl Origins {
    /// The origin, if it is known without reading `/proc`.
    pub fn at_once(&self, peer: &Peer) -> Option<Origin> {
        match self {
            Self::Fixed(origin) => Some(origin.clone()),
            // A process that is not visible (pid 0) has no cgroups to read. The attestor refuses it.
            Self::ByPod(_) if peer.pid > 0 => None,
            Self::ByPod(_) => Some(Origin::NoPod),
            Self::ByUser => Some(Origin::User(peer.uid)),
        }
    }

    /// Reads the origin of the process `pid` of user `uid`. The read may block: do not call it on a thread of the runtime.
    pub fn read(&self, pid: i32, uid: u32) -> Origin {
        match self {
            Self::Fixed(origin) => origin.clone(),
            Self::ByUser => Origin::User(uid),
            Self::ByPod(by_pod) => by_pod.pod(pid).map_or(Origin::NoPod, Origin::Pod),
        }
    }
}
