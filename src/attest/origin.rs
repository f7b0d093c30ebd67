//! Where a connection comes from, as far as quotas and the log are concerned: cheap, told before anybody is attested, and no proof.
//!
//! It groups what one pod does, whatever its processes and user ids are, by what the pod cannot choose: its cgroup, or the socket that is
//! its own. Whoever is in no pod is grouped by user id. An identity is never given for it; that is an [`Attestor`]'s work.
//!
//! [`Attestor`]: super::Attestor

use std::{fmt, path::PathBuf, sync::Arc};

use super::{
    cgroup::{self, HostPrefix},
    kubernetes::read_cgroup,
};
use crate::peer::Peer;

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

/// How the connections of one socket are grouped.
#[derive(Debug, Clone)]
pub enum Origins {
    /// By the pod in the peer's cgroups.
    ByPod(ByPod),
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

/// What is needed to read a pod from a process's cgroups.
#[derive(Debug, Clone)]
pub struct ByPod {
    /// Where procfs is mounted.
    proc: Arc<PathBuf>,
    /// The agent's own place.
    own: Arc<HostPrefix>,
}

impl ByPod {
    /// By what `proc` says, seen from the agent's `own` place.
    pub fn new(proc: PathBuf, own: Arc<HostPrefix>) -> Self {
        Self { proc: Arc::new(proc), own }
    }

    /// None where the process is in no pod, is gone, or is in several: attestation tells what of these it is.
    fn pod(&self, pid: i32) -> Option<Arc<str>> {
        let file = read_cgroup(std::fs::File::open(self.proc.join(pid.to_string()).join("cgroup"))).ok()?;
        cgroup::pod_uid(&file, &self.own).ok().map(|uid| uid.as_str().into())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    const UID: &str = "2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4e";

    fn by_pod(proc: &Path) -> Origins {
        Origins::ByPod(ByPod::new(proc.to_owned(), Arc::default()))
    }

    #[test]
    fn a_pods_processes_are_one_whatever_their_user_and_a_user_is_one_outside_of_pods() {
        let proc = tempfile::tempdir().unwrap();
        let write = |pid: i32, file: &str| {
            fs::create_dir(proc.path().join(pid.to_string())).unwrap();
            fs::write(proc.path().join(pid.to_string()).join("cgroup"), file).unwrap();
        };
        write(7, &format!("0::/kubepods/burstable/pod{UID}/a"));
        write(8, &format!("0::/kubepods/burstable/pod{UID}/b/kubepods/pod{}", UID.replace('2', "3")));
        write(9, "0::/user.slice/a");
        write(10, "0::/user.slice/b");
        let origins = by_pod(proc.path());
        assert_eq!(origins.read(7, 1337), Origin::Pod(UID.into()));
        assert_eq!(origins.read(8, 0), Origin::Pod(UID.into()), "what a pod makes below itself is of no use");
        assert_eq!((origins.read(9, 5), origins.read(10, 5), origins.read(11, 6)), (Origin::User(5), Origin::User(5), Origin::User(6)));
    }

    #[test]
    fn only_a_visible_process_of_a_shared_socket_is_read_about() {
        let mut peer = Peer::without_process(5);
        let pod = Origin::Pod(UID.into());
        let shared = by_pod(Path::new("/nonexistent"));
        assert_eq!(shared.at_once(&peer), Some(Origin::User(5)), "nothing can be read of it");
        peer.pid = 7;
        assert_eq!(shared.at_once(&peer), None);
        assert_eq!(Origins::ByUser.at_once(&peer), Some(Origin::User(5)));
        assert_eq!(Origins::Fixed(pod.clone()).at_once(&peer), Some(pod));
    }
}
