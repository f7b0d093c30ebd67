//! An agent hands its socket over to its successor.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use agent_runtime::{
    readiness::{self, Readiness},
    shutdown::{Drained, Shutdown},
};
use sds_agent::{
    app::{self, Base},
    config::{self, Config},
    handover::{AWAITED, Metrics, SocketLease, SocketSpec, holder::SameUser},
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use unix_peer::listener::{self, BoundPath};

fn config(socket: PathBuf) -> Config {
    let flags = config::Dev { socket: Some(socket), admin: Some(([127, 0, 0, 1], 0).into()), ..config::Dev::default() };
    config::dev(flags, &|_| None).unwrap()
}

/// A complete agent that runs.
struct Agent {
    shutdown: Shutdown,
    running: JoinHandle<anyhow::Result<Drained>>,
}

impl Agent {
    async fn start(socket: &Path) -> Self {
        let shutdown = Shutdown::new(Duration::from_secs(5));
        let bound = app::build(&config(socket.to_owned()), Base::new(shutdown.clone())).await.unwrap();
        Self { shutdown, running: tokio::spawn(bound.run()) }
    }

    async fn end(self) {
        self.shutdown.begin();
        self.running.await.unwrap().unwrap();
    }
}

/// A lease of the socket's path that a task keeps.
struct Kept {
    end: CancellationToken,
    opened: mpsc::Receiver<UnixListener>,
    keeping: JoinHandle<Result<Option<BoundPath>, listener::Error>>,
}

impl Kept {
    fn of(lease: SocketLease) -> Self {
        let (end, (open, opened)) = (CancellationToken::new(), mpsc::channel(1));
        Self { keeping: tokio::spawn(lease.keep(end.clone(), open)), end, opened }
    }

    /// Waits until the task has the path.
    async fn opened(&mut self) -> UnixListener {
        timeout(Duration::from_secs(20), self.opened.recv()).await.unwrap().unwrap()
    }

    async fn end(self) -> Option<BoundPath> {
        self.end.cancel();
        self.keeping.await.unwrap().unwrap()
    }
}

async fn acquire(path: &Path, readiness: &Readiness) -> SocketLease {
    let spec = SocketSpec { path: path.to_owned(), mode: 0o666, denial_is_final: false };
    SocketLease::acquire(spec, readiness, Arc::new(SameUser), Metrics::default()).await.unwrap()
}

/// A time in which a handover without a wait would have happened.
async fn a_while() {
    tokio::time::sleep(Duration::from_millis(200)).await;
}

fn inode(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap())
}

#[tokio::test]
async fn a_healthy_predecessor_serves_until_all_else_is_in_sync() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sds.sock");
    let old = Agent::start(&path).await;
    let before = inode(&path);

    let (readiness, start) = Readiness::new(readiness::Metrics::default());
    let index = readiness.guard("the pod index");
    let mut kept = Kept::of(acquire(&path, &readiness).await);
    drop(start);
    a_while().await;
    assert_eq!(inode(&path), before);
    UnixStream::connect(&path).await.expect("the predecessor still answers");

    drop(index);
    let _listener = kept.opened().await;
    assert_ne!(inode(&path), before);
    timeout(Duration::from_secs(20), readiness.reached()).await.unwrap();
    // The end of the predecessor does not affect its successor.
    old.end().await;
    assert!(kept.end().await.unwrap().is_owned());
}

#[tokio::test]
async fn a_predecessor_that_goes_is_succeeded_before_all_else_is_in_sync() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sds.sock");
    let old = Agent::start(&path).await;
    let (readiness, _start) = Readiness::new(readiness::Metrics::default());
    let mut kept = Kept::of(acquire(&path, &readiness).await);
    old.end().await;
    let _listener = kept.opened().await;
    assert!(!readiness.is_ready());
    assert!(kept.end().await.unwrap().is_owned());
}

#[tokio::test]
async fn a_successor_that_never_gets_in_sync_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sds.sock");
    let old = Agent::start(&path).await;
    let before = inode(&path);
    let (readiness, _start) = Readiness::new(readiness::Metrics::default());
    let kept = Kept::of(acquire(&path, &readiness).await);
    assert!(kept.end().await.is_none());
    assert_eq!(inode(&path), before);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "another file is left in the directory");
    old.end().await;
}

#[tokio::test]
async fn a_name_that_was_lost_is_taken_back_once_whoever_has_it_goes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sds.sock");
    let (readiness, start) = Readiness::new(readiness::Metrics::default());
    let mut kept = Kept::of(acquire(&path, &readiness).await);
    let _first = kept.opened().await;
    drop(start);
    assert!(readiness.is_ready());

    // No server answers on this socket, so the other agent takes the path. The first one is in sync, but must not take the path back
    // while the other one serves.
    let predecessor = Agent::start(&path).await;
    let theirs = inode(&path);
    a_while().await;
    assert_eq!(inode(&path), theirs);
    assert!(kept.opened.is_empty());
    predecessor.end().await;
    let _second = kept.opened().await;
    assert!(path.exists());

    // A socket file that is removed is created again.
    std::fs::remove_file(&path).unwrap();
    let _third = kept.opened().await;
    assert!(kept.end().await.unwrap().is_owned());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "another file is left in the directory");
}

/// This agent has taken over for a predecessor whose restarted program takes the path. It becomes ready when its remaining parts are
/// ready and it has the path.
#[tokio::test]
async fn one_that_has_stepped_in_is_not_ready_without_the_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sds.sock");
    let (readiness, start) = Readiness::new(readiness::Metrics::default());
    let index = readiness.guard("the pod index");
    let mut kept = Kept::of(acquire(&path, &readiness).await);
    drop(start);
    let _first = kept.opened().await;
    let predecessor = Agent::start(&path).await;
    let theirs = inode(&path);
    timeout(Duration::from_secs(20), async {
        while !readiness.awaited().iter().any(|awaited| **awaited == *AWAITED) {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert_eq!(inode(&path), theirs);
    drop(index);
    let _second = kept.opened().await;
    timeout(Duration::from_secs(20), readiness.reached()).await.unwrap();
    assert_ne!(inode(&path), theirs);
    predecessor.end().await;
    assert!(kept.end().await.unwrap().is_owned());
}
