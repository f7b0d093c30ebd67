//! Groups connections by the pod in the peer's cgroups.

use std::{path::PathBuf, sync::Arc};

use sds_server::attest::origin::PodOfProcess;

use crate::cgroup::{self, HostPrefix};

/// Reads the pod of a process from its cgroups.
#[derive(Debug, Clone)]
pub struct CgroupOrigins {
    /// Mount point of procfs.
    proc: Arc<PathBuf>,
    /// The agent's own cgroup prefix.
    own: Arc<HostPrefix>,
}

impl CgroupOrigins {
    /// Reads below `proc`; `own` is the agent's own cgroup prefix.
    pub fn new(proc: PathBuf, own: Arc<HostPrefix>) -> Self {
        Self { proc: Arc::new(proc), own }
    }
}

impl PodOfProcess for CgroupOrigins {
    fn pod(&self, pid: i32) -> Option<Arc<str>> {
        let file = cgroup::read(std::fs::File::open(self.proc.join(pid.to_string()).join("cgroup"))).ok()?;
        cgroup::pod_uid(&file, &self.own).ok().map(|uid| uid.as_str().into())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use sds_server::attest::origin::{Origin, Origins};
    use unix_peer::peer::Peer;

    use super::*;

    const UID: &str = "2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4e";

    fn by_pod(proc: &Path) -> Origins {
        Origins::ByPod(Arc::new(CgroupOrigins::new(proc.to_owned(), Arc::default())))
    }

    #[test]
    fn origins_are_per_pod_inside_pods_and_one_outside() {
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
        assert_eq!(origins.read(8, 0), Origin::Pod(UID.into()), "cgroups that a pod creates below its own are ignored");
        assert_eq!((origins.read(9, 5), origins.read(10, 5), origins.read(11, 6)), (Origin::NoPod, Origin::NoPod, Origin::NoPod));
    }

    #[test]
    fn only_a_visible_process_of_a_shared_socket_is_read_about() {
        let mut peer = Peer::without_process(5);
        let pod = Origin::Pod(UID.into());
        let shared = by_pod(Path::new("/nonexistent"));
        assert_eq!(shared.at_once(&peer), Some(Origin::NoPod), "its process is not visible");
        peer.pid = 7;
        assert_eq!(shared.at_once(&peer), None);
        assert_eq!(Origins::ByUser.at_once(&peer), Some(Origin::User(5)));
        assert_eq!(Origins::Fixed(pod.clone()).at_once(&peer), Some(pod));
    }
}
