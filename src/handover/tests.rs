//! Tests with real sockets. Tests with a predecessor that serves are in `tests/agent`.

use std::os::unix::net::UnixListener as StdListener;

use agent_runtime::{
    readiness,
    telemetry::{self, captured::Captured},
};

use super::*;

fn inode(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap())
}

/// As a process does that can write to the directory.
#[tokio::test]
async fn a_name_that_is_lost_in_a_loop_is_taken_back_and_logged_once() {
    const TIMES: usize = 1000;
    let log = Captured::default();
    let (_guard, _filter) = telemetry::capture("info", telemetry::Format::Json, log.clone()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sds.sock");
    let (readiness, _start) = Readiness::new(readiness::Metrics::default());
    let lease = SocketLease::acquire(&path, 0o666, &readiness).await.unwrap();
    let (end, (open, mut opened)) = (CancellationToken::new(), mpsc::channel(1));
    let keeping = tokio::spawn(lease.keep(end.clone(), open));
    for _ in 0..TIMES {
        let _listener = timeout(Duration::from_secs(20), opened.recv()).await.unwrap().unwrap();
        std::fs::remove_file(&path).unwrap();
    }
    let _listener = timeout(Duration::from_secs(20), opened.recv()).await.unwrap().unwrap();
    for message in ["the socket has lost its name", "the socket is acquired"] {
        assert_eq!(log.count(message), 1, "{message}");
    }
    assert_eq!(log.text().lines().count(), 2);
    end.cancel();
    assert!(keeping.await.unwrap().unwrap().is_owned());
}

#[tokio::test]
async fn a_name_that_nobody_serves_is_taken_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sds.sock");
    let (readiness, start) = Readiness::new(readiness::Metrics::default());
    // A socket of a process that was killed, and then one of a process that does not accept.
    drop(StdListener::bind(&path).unwrap());
    let lease = SocketLease::acquire(&path, 0o666, &readiness).await.unwrap();
    assert!(lease.is_held(), "{lease:?}");
    let before = inode(&path);
    let lease = SocketLease::acquire(&path, 0o666, &readiness).await.unwrap();
    let (end, (open, mut opened)) = (CancellationToken::new(), mpsc::channel(1));
    let keeping = tokio::spawn(lease.keep(end.clone(), open));
    let _listener = timeout(Duration::from_secs(20), opened.recv()).await.unwrap().unwrap();
    assert_ne!(inode(&path), before, "a process that does not answer is no predecessor");
    drop(start);
    assert!(readiness.is_ready());
    end.cancel();
    assert!(keeping.await.unwrap().unwrap().is_owned());
}
