//! Layer three: real sockets, and predecessors that serve, hang or go.

use std::{os::unix::net::UnixListener as StdListener, path::PathBuf};

use tokio::net::UnixListener;

use super::*;
use crate::{
    app::{Base, Bound},
    config::{self, Config},
    listener, readiness,
    shutdown::Shutdown,
};

fn config(socket: PathBuf) -> Config {
    let flags = config::Dev { socket: Some(socket), admin: Some(([127, 0, 0, 1], 0).into()), ..config::Dev::default() };
    config::dev(flags, &|_| None).unwrap()
}

/// A whole agent on `socket`.
async fn agent(socket: &Path) -> (Shutdown, Bound) {
    let shutdown = Shutdown::new(Duration::from_secs(5));
    let bound = crate::app::build(&config(socket.to_owned()), Base::new(shutdown.clone())).await.unwrap();
    (shutdown, bound)
}

fn prepare(path: &Path) -> (UnixListener, Prepared) {
    listener::prepare("sockets.shared.path", path, 0o666).unwrap()
}

fn inode(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap())
}

#[tokio::test]
async fn a_name_that_nobody_serves_is_taken_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sds.sock");
    let (readiness, start) = Readiness::new(readiness::Metrics::default());
    // Left by a process that was killed, and then by one that accepts nobody.
    drop(StdListener::bind(&path).unwrap());
    let (_listener, prepared) = prepare(&path);
    let claim = Claim::make(prepared, &readiness).await.unwrap();
    assert!(matches!(claim.0, State::Held(_)), "{claim:?}");
    let before = inode(&path);
    let (_second, prepared) = prepare(&path);
    let claim = Claim::make(prepared, &readiness).await.unwrap();
    assert!(claim.hold(CancellationToken::new()).await.unwrap().is_ours());
    assert_ne!(inode(&path), before, "one that does not answer is no predecessor");
    drop(start);
    assert!(readiness.is_ready());
}

#[tokio::test]
async fn a_healthy_predecessor_serves_until_all_else_is_in_sync() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sds.sock");
    let (old, bound) = agent(&path).await;
    let running = tokio::spawn(bound.run());
    let before = inode(&path);

    let (readiness, start) = Readiness::new(readiness::Metrics::default());
    let index = readiness.guard("the pod index");
    let (_listener, prepared) = prepare(&path);
    let claim = Claim::make(prepared, &readiness).await.unwrap();
    let holding = tokio::spawn(claim.hold(CancellationToken::new()));
    drop(start);
    // Enough for a handover that would not wait.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(inode(&path), before);
    assert!(find(&path).await.is_some(), "the predecessor still answers");

    drop(index);
    let name = holding.await.unwrap().unwrap();
    assert!(name.is_ours() && inode(&path) != before && readiness.is_ready());
    // The predecessor's end leaves its successor alone.
    old.begin();
    running.await.unwrap().unwrap();
    assert!(name.is_ours());
}

#[tokio::test]
async fn a_predecessor_that_goes_is_succeeded_before_all_else_is_in_sync() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sds.sock");
    let (old, bound) = agent(&path).await;
    let running = tokio::spawn(bound.run());
    let (readiness, _start) = Readiness::new(readiness::Metrics::default());
    let (_listener, prepared) = prepare(&path);
    let claim = Claim::make(prepared, &readiness).await.unwrap();
    let holding = tokio::spawn(claim.hold(CancellationToken::new()));
    old.begin();
    running.await.unwrap().unwrap();
    let name = timeout(Duration::from_secs(20), holding).await.unwrap().unwrap().unwrap();
    assert!(name.is_ours() && !readiness.is_ready());
}

#[tokio::test]
async fn a_successor_that_never_gets_in_sync_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sds.sock");
    let (old, bound) = agent(&path).await;
    let running = tokio::spawn(bound.run());
    let before = inode(&path);
    let (readiness, _start) = Readiness::new(readiness::Metrics::default());
    let (_listener, prepared) = prepare(&path);
    let claim = Claim::make(prepared, &readiness).await.unwrap();
    let end = CancellationToken::new();
    let holding = tokio::spawn(claim.hold(end.clone()));
    end.cancel();
    assert!(holding.await.unwrap().is_none());
    assert_eq!(inode(&path), before);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left beside it");
    old.begin();
    running.await.unwrap().unwrap();
}
