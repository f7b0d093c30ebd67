//! An agent whose parts fail, or that cannot start.

use std::{path::Path, sync::Arc, time::Duration};

use agent_runtime::{clock::SystemClock, shutdown::Shutdown};
use futures::future::BoxFuture;
use sds_agent::{
    app::{Base, Deps, build_with},
    config::{self, Config},
    handover::holder::SameUser,
};
use sds_server::{
    attest::{Attested, Attestor, Error, Method, origin::Origins, unix::UnixAttestor},
    trust::{self, Trust},
};
use tokio::{net::TcpListener, time::timeout};
use tokio_util::sync::CancellationToken;
use unix_peer::peer::Peer;

/// The configuration of `dev`, with its socket in `directory` and ports that the kernel chooses.
fn config(directory: &Path) -> Config {
    let flags = config::Dev { socket: Some(directory.join("sds.sock")), admin: Some(([127, 0, 0, 1], 0).into()), ..config::Dev::default() };
    config::dev(flags, &|_| None).unwrap()
}

fn deps(tasks: Vec<BoxFuture<'static, ()>>) -> Deps {
    Deps {
        clock: Arc::new(SystemClock),
        attestor: Arc::new(UnixAttestor),
        holder_attestor: Arc::new(SameUser),
        pods: None,
        issuer_set: std::collections::BTreeMap::new().into(),
        trust: Trust::new(trust::Metrics::default()),
        await_bundle: false,
        observer: None,
        caller_observer: None,
        tasks,
        last: CancellationToken::new(),
    }
}

#[tokio::test]
async fn a_part_that_ends_or_panics_ends_the_agent_as_failed() {
    let parts: [BoxFuture<'static, ()>; 2] = [Box::pin(std::future::ready(())), Box::pin(async { panic!("as requested") })];
    for part in parts {
        let directory = tempfile::tempdir().unwrap();
        let shutdown = Shutdown::new(Duration::from_secs(20));
        let bound = build_with(&config(directory.path()), Base::new(shutdown), deps(vec![part])).await.unwrap();
        assert!(timeout(Duration::from_secs(20), bound.run()).await.unwrap().is_err());
    }
}

/// An attestor that fails as soon as the agent accepts connections.
#[derive(Debug)]
struct FailsToAccept;

impl Attestor for FailsToAccept {
    fn method(&self) -> Method {
        Method::unix
    }

    fn origins(&self) -> Origins {
        panic!("as requested")
    }

    fn attest<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Result<Attested, Error>> {
        UnixAttestor.attest(peer)
    }
}

#[tokio::test]
async fn an_agent_that_accepts_no_more_connections_ends_as_failed() {
    let directory = tempfile::tempdir().unwrap();
    let deps = Deps { attestor: Arc::new(FailsToAccept), ..deps(Vec::new()) };
    let shutdown = Shutdown::new(Duration::from_secs(20));
    let bound = build_with(&config(directory.path()), Base::new(shutdown), deps).await.unwrap();
    let error = timeout(Duration::from_secs(20), bound.run()).await.expect("the agent ends").unwrap_err();
    assert!(error.to_string().contains("panicked"), "{error}");
}

/// As a mount does: this process still sees the deleted directory, and only a restart helps.
#[tokio::test]
async fn an_agent_whose_socket_directory_was_deleted_ends_as_failed() {
    let directory = tempfile::tempdir().unwrap();
    let folder = directory.path().join("sockets");
    std::fs::create_dir(&folder).unwrap();
    let opened = std::fs::File::open(&folder).unwrap();
    let through = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&opened));
    let shutdown = Shutdown::new(Duration::from_secs(20));
    let bound = build_with(&config(Path::new(&through)), Base::new(shutdown), deps(Vec::new())).await.unwrap();
    let running = tokio::spawn(bound.run());
    std::fs::remove_dir_all(&folder).unwrap();
    let error = timeout(Duration::from_secs(20), running).await.unwrap().unwrap().unwrap_err();
    assert!(error.to_string().contains("the directory was deleted"), "{error}");
}

#[tokio::test]
async fn an_agent_that_cannot_start_leaves_its_predecessors_socket_alone() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path());
    let path = &config.shared_socket.as_ref().unwrap().path;
    let _predecessor = unix_peer::listener::bind(path, 0o666).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = Config { metrics: taken.local_addr().unwrap(), ..config.clone() };
    let built = build_with(&config, Base::new(Shutdown::new(Duration::ZERO)), deps(Vec::new())).await;
    assert!(built.unwrap_err().to_string().contains("metrics.address"));
    tokio::net::UnixStream::connect(path).await.expect("the predecessor answers");
}
