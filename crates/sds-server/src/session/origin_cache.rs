//! Finds out whose a new connection is, quickly: the accept loop turns a flood away only as fast as it can tell who floods.
//!
//! A process that connects again and again is recognised by its handle, without another look at `/proc`. What has to be read is read
//! off the threads that serve, a few at a time; the accept loop waits while there are as many, so that a flood of short-lived processes
//! is held up in the kernel's queue and not in memory.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use unix_peer::peer::Peer;

use crate::attest::origin::{Origin, Origins};

/// Reads at once. They share a lock in the kernel: more would only wait.
const MAX_CONCURRENT_READS: usize = 8;
/// How long a process is believed to be where it was: an older kernel's handles do not tell a pid's owners apart.
const MAX_AGE: Duration = Duration::from_secs(1);
/// Processes that are remembered. When there are more, all are forgotten: the next look is cheap.
const MAX_PROCESSES: usize = 1024;

/// Tells the connections of one socket apart. Clones share what they know.
#[derive(Debug, Clone)]
pub(super) struct OriginCache {
    origins: Origins,
    reads: Arc<Semaphore>,
    seen: Arc<Mutex<HashMap<Process, (Origin, Instant)>>>,
}

/// A pid, and the number of its handle, which newer kernels never give twice.
type Process = (i32, u64);

impl OriginCache {
    pub(super) fn new(origins: Origins) -> Self {
        Self { origins, reads: Arc::new(Semaphore::new(MAX_CONCURRENT_READS)), seen: Arc::default() }
    }

    /// The origin of `peer`, where it is known without a look.
    pub(super) fn cached(&self, peer: &Peer) -> Option<Origin> {
        self.origins.at_once(peer).or_else(|| {
            let seen = self.seen();
            let (origin, at) = seen.get(&process(peer)?)?;
            (at.elapsed() < MAX_AGE).then(|| origin.clone())
        })
    }

    /// Waits for the turn to look.
    pub(super) async fn read_permit(&self) -> OwnedSemaphorePermit {
        match self.reads.clone().acquire_owned().await {
            Ok(read_permit) => read_permit,
            // Nobody closes it.
            Err(_) => std::future::pending().await,
        }
    }

    /// Looks where `peer` belongs. None when the agent is ending.
    pub(super) async fn resolve(&self, peer: &Peer, _permit: OwnedSemaphorePermit) -> Option<Origin> {
        let (origins, pid, uid) = (self.origins.clone(), peer.pid, peer.uid);
        let origin = tokio::task::spawn_blocking(move || origins.read(pid, uid)).await.ok()?;
        // Only of one that lives: then what was read is about it, and about no later owner of its pid, who is not to pay for it.
        if !peer.is_alive() {
            return Some(Origin::User(uid));
        }
        if let Some(process) = process(peer) {
            let mut seen = self.seen();
            if seen.len() >= MAX_PROCESSES {
                seen.clear();
            }
            seen.insert(process, (origin.clone(), Instant::now()));
        }
        Some(origin)
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<Process, (Origin, Instant)>> {
        self.seen.lock()
    }
}

fn process(peer: &Peer) -> Option<Process> {
    Some((peer.pid, peer.handle_number()?))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::net::UnixStream, path::PathBuf};

    use tokio::time::{advance, pause};

    use super::*;
    use crate::attest::origin::PodOfProcess;

    const UID: &str = "2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4e";

    /// A process is in the pod for as long as there is its file below this folder.
    #[derive(Debug)]
    struct Files(PathBuf);

    impl PodOfProcess for Files {
        fn pod(&self, pid: i32) -> Option<Arc<str>> {
            self.0.join(pid.to_string()).join("cgroup").exists().then(|| UID.into())
        }
    }

    #[tokio::test]
    async fn a_process_is_recognised_for_a_while_and_then_looked_at_again() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).unwrap();
        let proc = tempfile::tempdir().unwrap();
        let file = proc.path().join(peer.pid.to_string()).join("cgroup");
        fs::create_dir(file.parent().unwrap()).unwrap();
        fs::write(&file, "").unwrap();
        let origin_cache = OriginCache::new(Origins::ByPod(Arc::new(Files(proc.path().to_owned()))));
        assert_eq!(origin_cache.cached(&peer), None);
        let pod = Some(Origin::Pod(UID.into()));
        pause();
        assert_eq!(origin_cache.resolve(&peer, origin_cache.read_permit().await).await, pod);
        fs::remove_file(file).unwrap();
        assert_eq!(origin_cache.clone().cached(&Peer::of(&ours).unwrap()), pod, "of another connection of the same process");
        advance(MAX_AGE).await;
        assert_eq!(origin_cache.cached(&peer), None);
        assert_eq!(origin_cache.resolve(&peer, origin_cache.read_permit().await).await, Some(Origin::User(peer.uid)));
    }

    #[tokio::test]
    async fn who_has_a_recycled_pid_does_not_pay_for_its_former_owner() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let proc = tempfile::tempdir().unwrap();
        // Of a process that has ended; its number is another's by now.
        let peer = Peer::recorded(&ours, proc.path()).unwrap();
        let file = proc.path().join(peer.pid.to_string()).join("cgroup");
        fs::create_dir(file.parent().unwrap()).unwrap();
        fs::write(&file, "").unwrap();
        let origin_cache = OriginCache::new(Origins::ByPod(Arc::new(Files(proc.path().to_owned()))));
        assert_eq!(origin_cache.resolve(&peer, origin_cache.read_permit().await).await, Some(Origin::User(peer.uid)));
    }

    #[tokio::test]
    async fn what_is_remembered_is_bounded() {
        let origin_cache = OriginCache::new(Origins::ByUser);
        for number in 0..u64::try_from(MAX_PROCESSES).unwrap() {
            origin_cache.seen().insert((1, number), (Origin::User(0), Instant::now()));
        }
        let (ours, _theirs) = UnixStream::pair().unwrap();
        origin_cache.resolve(&Peer::of(&ours).unwrap(), origin_cache.read_permit().await).await.unwrap();
        assert_eq!(origin_cache.seen().len(), 1);
    }
}
