//! Finds the origin of a new connection. It has to be fast: the accept loop rejects a flood only as fast as it finds the origin of each
//! connection.
//!
//! A process that connects repeatedly is recognised by its handle, without another read of `/proc`. Reads of `/proc` run on blocking
//! threads, at most 8 at once. The accept loop waits while all 8 are in use, so that the connections of many short-lived processes wait in
//! the queue of the kernel and not in memory.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use unix_peer::peer::Peer;

use crate::attest::origin::{Origin, Origins};

/// Concurrent reads of `/proc`. They share a kernel lock, so that more reads would only wait.
const MAX_CONCURRENT_READS: usize = 8;
/// The time for which an origin is cached. Handle numbers of older kernels do not distinguish the successive owners of a pid.
const MAX_AGE: Duration = Duration::from_secs(1);
/// Cached processes. A full cache is cleared, because a new read is cheap.
const MAX_PROCESSES: usize = 1024;

/// Finds and caches the origins of the connections of one socket. Clones share the cache.
#[derive(Debug, Clone)]
pub(super) struct OriginCache {
    origins: Origins,
    reads: Arc<Semaphore>,
    seen: Arc<Mutex<HashMap<Process, (Origin, Instant)>>>,
}

/// The process that connected has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gone;

/// A pid and the number of its handle. Newer kernels never reuse the number.
type Process = (i32, u64);

impl OriginCache {
    pub(super) fn new(origins: Origins) -> Self {
        Self { origins, reads: Arc::new(Semaphore::new(MAX_CONCURRENT_READS)), seen: Arc::default() }
    }

    /// The origin of `peer`, if it is known without a read.
    pub(super) fn cached(&self, peer: &Peer) -> Option<Origin> {
        self.origins.at_once(peer).or_else(|| {
            let seen = self.seen();
            let (origin, at) = seen.get(&process(peer)?)?;
            (at.elapsed() < MAX_AGE).then(|| origin.clone())
        })
    }

    /// Waits for a permit to read an origin.
    pub(super) async fn read_permit(&self) -> OwnedSemaphorePermit {
        match self.reads.clone().acquire_owned().await {
            Ok(read_permit) => read_permit,
            // The semaphore is never closed.
            Err(_) => std::future::pending().await,
        }
    }

    /// Reads and caches the origin of `peer`, unless its process has ended. `None` if the runtime is shutting down.
    pub(super) async fn resolve(&self, peer: &Peer, _permit: OwnedSemaphorePermit) -> Option<Result<Origin, Gone>> {
        let (origins, pid, uid) = (self.origins.clone(), peer.pid, peer.uid);
        let origin = tokio::task::spawn_blocking(move || origins.read(pid, uid)).await.ok()?;
        // An ended process cannot be attested, so none of its requests could be served. The read may be about a later owner of the pid.
        if !peer.is_alive() {
            return Some(Err(Gone));
        }
        if let Some(process) = process(peer) {
            let mut seen = self.seen();
            if seen.len() >= MAX_PROCESSES {
                seen.clear();
            }
            seen.insert(process, (origin.clone(), Instant::now()));
        }
        Some(Ok(origin))
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

    /// A process is in the pod while a file for it exists in this directory.
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
        assert_eq!(origin_cache.resolve(&peer, origin_cache.read_permit().await).await, pod.clone().map(Ok));
        fs::remove_file(file).unwrap();
        assert_eq!(origin_cache.clone().cached(&Peer::of(&ours).unwrap()), pod, "another connection of the same process is recognised");
        advance(MAX_AGE).await;
        assert_eq!(origin_cache.cached(&peer), None);
        assert_eq!(origin_cache.resolve(&peer, origin_cache.read_permit().await).await, Some(Ok(Origin::NoPod)));
    }

    #[tokio::test]
    async fn a_process_that_has_ended_gets_no_place_and_its_successor_does_not_pay() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let proc = tempfile::tempdir().unwrap();
        // The process has ended, and another process has its pid.
        let peer = Peer::recorded(&ours, proc.path()).unwrap();
        let file = proc.path().join(peer.pid.to_string()).join("cgroup");
        fs::create_dir(file.parent().unwrap()).unwrap();
        fs::write(&file, "").unwrap();
        let origin_cache = OriginCache::new(Origins::ByPod(Arc::new(Files(proc.path().to_owned()))));
        assert_eq!(origin_cache.resolve(&peer, origin_cache.read_permit().await).await, Some(Err(Gone)));
    }

    #[tokio::test]
    async fn what_is_remembered_is_bounded() {
        let origin_cache = OriginCache::new(Origins::ByUser);
        for number in 0..u64::try_from(MAX_PROCESSES).unwrap() {
            origin_cache.seen().insert((1, number), (Origin::User(0), Instant::now()));
        }
        let (ours, _theirs) = UnixStream::pair().unwrap();
        origin_cache.resolve(&Peer::of(&ours).unwrap(), origin_cache.read_permit().await).await.unwrap().unwrap();
        assert_eq!(origin_cache.seen().len(), 1);
    }
}
