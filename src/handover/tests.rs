//! Tests with real sockets. The other process on the path is a server of this process, and an attestor with a script says what it is.
//! Tests with complete agents are in `tests/agent`.

use std::os::unix::net::UnixListener as StdListener;

use agent_runtime::{
    readiness,
    telemetry::{self, captured::Captured},
};
use futures::future::BoxFuture;
use hyper::server::conn::http2;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
};
use tokio_util::task::AbortOnDropHandle;
use unix_peer::peer::Peer;

use super::{
    holder::{SameUser, Verdict},
    *,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// Says what the watch holds, and waits while it holds nothing, as for an index of pods that is not in sync.
#[derive(Debug)]
struct Script(watch::Sender<Option<Verdict>>, watch::Sender<usize>);

impl HolderAttestor for Script {
    fn attest<'a>(&'a self, _peer: &'a Peer) -> BoxFuture<'a, Verdict> {
        self.1.send_modify(|asked| *asked += 1);
        let mut verdicts = self.0.subscribe();
        Box::pin(async move { verdicts.wait_for(Option::is_some).await.unwrap().clone().unwrap() })
    }
}

impl Script {
    fn says(&self, verdict: Verdict) {
        self.0.send_replace(Some(verdict));
    }

    /// Waits until it was asked so often in total.
    async fn asked(&self, times: usize) {
        timeout(PATIENCE, self.1.subscribe().wait_for(|asked| *asked >= times)).await.unwrap().unwrap();
    }
}

fn impostor() -> Verdict {
    Verdict::Impostor("as the script says".to_owned())
}

fn unknown() -> Verdict {
    Verdict::UnknownPod("as the script says".to_owned())
}

/// A server that answers health checks. Its socket and its connections are closed when this is dropped.
struct Server(AbortOnDropHandle<()>);

impl Server {
    /// Binds beside `path` and renames the socket to it.
    fn at(path: &Path) -> Self {
        let beside = path.with_extension("beside");
        let listener = UnixListener::bind(&beside).unwrap();
        std::fs::rename(&beside, path).unwrap();
        let (_reporter, health) = tonic_health::server::health_reporter();
        Self(AbortOnDropHandle::new(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let service = TowerToHyperService::new(health.clone());
                connections.spawn(http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service));
            }
        })))
    }

    /// Ends, and waits until the socket is closed.
    async fn end(self) {
        self.0.abort();
        let _ = timeout(PATIENCE, self.0).await.unwrap();
    }
}

/// An agent that keeps the name `path`.
struct Scene {
    directory: tempfile::TempDir,
    path: PathBuf,
    script: Arc<Script>,
    metrics: Metrics,
    readiness: Readiness,
    /// Prevents readiness.
    start: Option<Guard>,
    end: CancellationToken,
    opened: mpsc::Receiver<UnixListener>,
    keeping: Option<JoinHandle<Result<Option<BoundPath>, listener::Error>>>,
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (readiness, start) = Readiness::new(readiness::Metrics::default());
        Self {
            path: directory.path().join("sockets/sds.sock"),
            directory,
            script: Arc::new(Script(watch::Sender::new(None), watch::Sender::new(0))),
            metrics: Metrics::default(),
            readiness,
            start: Some(start),
            end: CancellationToken::new(),
            opened: mpsc::channel(1).1,
            keeping: None,
        }
    }

    /// A ready agent that has the name.
    async fn active() -> (Self, UnixListener) {
        let mut scene = Self::new();
        scene.keep().await;
        let listener = scene.opened().await;
        scene.start = None;
        assert!(scene.readiness.is_ready());
        (scene, listener)
    }

    fn folder(&self) -> &Path {
        self.path.parent().unwrap()
    }

    async fn acquire(&self) -> SocketLease {
        let spec = SocketSpec { path: self.path.clone(), mode: 0o666, denial_is_final: false };
        SocketLease::acquire(spec, &self.readiness, self.script.clone(), self.metrics.clone()).await.unwrap()
    }

    async fn keep(&mut self) {
        let lease = self.acquire().await;
        let (open, opened) = mpsc::channel(1);
        self.opened = opened;
        self.keeping = Some(tokio::spawn(lease.keep(self.end.clone(), open)));
    }

    async fn opened(&mut self) -> UnixListener {
        timeout(PATIENCE, self.opened.recv()).await.expect("the agent does not take the name").unwrap()
    }

    /// Ends the agent. Returns whether it had the name.
    async fn ended(&mut self) -> bool {
        self.end.cancel();
        self.keeping.take().unwrap().await.unwrap().unwrap().is_some_and(|name| name.is_owned())
    }

    fn impostors(&self) -> u64 {
        self.metrics.impostors.get()
    }
}

fn inode(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap())
}

/// A time in which an agent that does not wait would have taken the name.
async fn a_while() {
    tokio::time::sleep(Duration::from_millis(200)).await;
}

#[tokio::test]
async fn a_name_that_no_process_serves_is_taken_at_once() {
    let mut scene = Scene::new();
    std::fs::create_dir(scene.folder()).unwrap();
    // A socket of a process that was killed, and then one of a process that does not accept.
    drop(StdListener::bind(&scene.path).unwrap());
    let lease = scene.acquire().await;
    assert!(lease.is_held(), "{lease:?}");
    let before = inode(&scene.path);
    scene.keep().await;
    let _listener = scene.opened().await;
    assert_ne!(inode(&scene.path), before, "a process that does not answer is no predecessor");
    scene.start = None;
    assert!(scene.readiness.is_ready());
    assert_eq!((scene.metrics.bound.get(), scene.impostors()), (1, 0));
    assert!(scene.ended().await);
}

#[tokio::test]
async fn an_impostor_that_answers_health_checks_is_displaced() {
    let (mut scene, _listener) = Scene::active().await;
    scene.script.says(impostor());
    let server = Server::at(&scene.path);
    let theirs = inode(&scene.path);
    let _second = scene.opened().await;
    assert_ne!(inode(&scene.path), theirs);
    assert_eq!((scene.metrics.bound.get(), scene.impostors()), (1, 1));
    drop(server);
    assert!(scene.ended().await);
}

#[tokio::test]
async fn an_impostor_that_answers_no_health_check_is_displaced() {
    let (mut scene, _listener) = Scene::active().await;
    scene.script.says(impostor());
    let beside = scene.folder().join("beside");
    let _silent = StdListener::bind(&beside).unwrap();
    std::fs::rename(&beside, &scene.path).unwrap();
    let _second = scene.opened().await;
    assert_eq!(scene.impostors(), 1);
}

#[tokio::test]
async fn another_agent_keeps_the_name_until_it_ends() {
    let (mut scene, _listener) = Scene::active().await;
    scene.script.says(Verdict::Agent);
    let server = Server::at(&scene.path);
    let theirs = inode(&scene.path);
    scene.script.asked(1).await;
    a_while().await;
    assert_eq!((inode(&scene.path), scene.metrics.bound.get()), (theirs, 0));
    server.end().await;
    let _second = scene.opened().await;
    assert_eq!((scene.metrics.bound.get(), scene.impostors()), (1, 0));
    assert!(scene.ended().await);
}

#[tokio::test]
async fn an_impostor_that_replaces_another_agent_is_displaced() {
    let (mut scene, _listener) = Scene::active().await;
    scene.script.says(Verdict::Agent);
    let _agent = Server::at(&scene.path);
    scene.script.asked(1).await;
    scene.script.says(impostor());
    // The other agent still runs, and does not notice.
    let _impostor = Server::at(&scene.path);
    let _second = scene.opened().await;
    assert_eq!(scene.impostors(), 1);
}

#[tokio::test]
async fn a_holder_is_a_predecessor_until_it_can_be_attested() {
    let mut scene = Scene::new();
    std::fs::create_dir(scene.folder()).unwrap();
    let _server = Server::at(&scene.path);
    let theirs = inode(&scene.path);
    scene.keep().await;
    scene.script.asked(1).await;
    a_while().await;
    assert_eq!(inode(&scene.path), theirs, "it is displaced before the index is in sync");
    scene.script.says(impostor());
    let _listener = scene.opened().await;
    assert_eq!(scene.impostors(), 1);
    assert!(!scene.readiness.is_ready(), "other parts are not in sync");
}

#[tokio::test]
async fn an_unknown_pod_is_waited_for_before_readiness_and_not_after() {
    let mut scene = Scene::new();
    std::fs::create_dir(scene.folder()).unwrap();
    let _predecessor = Server::at(&scene.path);
    let theirs = inode(&scene.path);
    scene.script.says(unknown());
    scene.keep().await;
    scene.script.asked(1).await;
    a_while().await;
    assert_eq!(inode(&scene.path), theirs);
    // In sync: it takes the name as from a predecessor, and reports no impostor.
    scene.start = None;
    let _first = scene.opened().await;
    timeout(PATIENCE, scene.readiness.reached()).await.unwrap();
    assert_eq!(scene.impostors(), 0);
    let _other = Server::at(&scene.path);
    let _second = scene.opened().await;
    assert_eq!(scene.impostors(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_impostor_is_displaced_at_most_once_in_10_seconds() {
    let (mut scene, _listener) = Scene::active().await;
    scene.script.says(impostor());
    let mut displacements = Vec::new();
    for count in 1..=4 {
        let _server = Server::at(&scene.path);
        let _listener = timeout(Duration::from_secs(15), scene.opened.recv()).await.unwrap().unwrap();
        displacements.push(Instant::now());
        assert_eq!(scene.impostors(), count);
    }
    for pair in displacements.windows(2) {
        assert!(pair[1] - pair[0] >= DISPLACE_INTERVAL, "{displacements:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_attestation_is_repeated_and_displaces_no_process() {
    let (mut scene, _listener) = Scene::active().await;
    scene.script.says(Verdict::Unavailable("the API server does not answer".to_owned()));
    let _server = Server::at(&scene.path);
    let (theirs, begun) = (inode(&scene.path), Instant::now());
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(inode(&scene.path), theirs);
    let asked = *scene.script.1.borrow();
    assert!((10..30).contains(&asked), "{asked} times in {:?}", begun.elapsed());
    scene.script.says(impostor());
    let _second = timeout(Duration::from_secs(31), scene.opened.recv()).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_socket_that_outlives_the_process_that_bound_it_is_an_impostors() {
    let (mut scene, _listener) = Scene::active().await;
    scene.script.says(Verdict::Ended("process 7 ended".to_owned()));
    let server = Server::at(&scene.path);
    let _second = scene.opened().await;
    assert_eq!(scene.impostors(), 1);
    // The socket of an agent that ends is closed with its process.
    let other = Server::at(&scene.path);
    scene.script.asked(2).await;
    other.end().await;
    let _third = scene.opened().await;
    assert_eq!(scene.impostors(), 1);
    drop(server);
}

#[tokio::test]
async fn a_directory_that_is_replaced_and_put_back_gets_its_socket_again() {
    let (mut scene, _listener) = Scene::active().await;
    let (folder, aside) = (scene.folder().to_owned(), scene.directory.path().join("aside"));
    std::fs::rename(&folder, &aside).unwrap();
    std::fs::write(&folder, "no directory").unwrap();
    timeout(PATIENCE, async {
        while scene.metrics.bound.get() == 1 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    a_while().await;
    std::fs::remove_file(&folder).unwrap();
    std::fs::remove_file(aside.join("sds.sock")).unwrap();
    std::fs::rename(&aside, &folder).unwrap();
    let _second = scene.opened().await;
    assert_eq!((scene.metrics.bound.get(), scene.impostors()), (1, 0));
    assert!(scene.ended().await);
}

#[tokio::test(start_paused = true)]
async fn failed_attempts_to_bind_are_30_seconds_apart_at_most() {
    let (mut scene, _listener) = Scene::active().await;
    std::fs::remove_file(&scene.path).unwrap();
    std::fs::create_dir_all(scene.path.join("not empty")).unwrap();
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(!scene.keeping.as_ref().unwrap().is_finished());
    std::fs::remove_dir_all(&scene.path).unwrap();
    let _second = timeout(Duration::from_secs(31), scene.opened.recv()).await.unwrap().unwrap();
    assert_eq!(std::fs::read_dir(scene.folder()).unwrap().count(), 1, "another file is left in the directory");
}

#[tokio::test]
async fn a_deleted_directory_ends_the_agent() {
    let mut scene = Scene::new();
    std::fs::create_dir(scene.folder()).unwrap();
    // Like a mount: the path leads to the directory after its deletion.
    let directory = std::fs::File::open(scene.folder()).unwrap();
    let folder = scene.folder().to_owned();
    scene.path = format!("/proc/self/fd/{}/sds.sock", std::os::fd::AsRawFd::as_raw_fd(&directory)).into();
    scene.keep().await;
    let _listener = scene.opened().await;
    std::fs::remove_dir_all(&folder).unwrap();
    let ended = timeout(PATIENCE, scene.keeping.take().unwrap()).await.unwrap().unwrap();
    assert!(ended.unwrap_err().needs_restart());
}

#[tokio::test]
async fn without_a_pod_processes_of_the_same_user_and_of_root_are_agents() {
    let own = rustix::process::geteuid().as_raw();
    for (uid, is_agent) in [(own, true), (0, true), (own + 1, false), (65534, own == 65534)] {
        let verdict = SameUser.attest(&Peer::without_process(uid)).await;
        assert_eq!(verdict == Verdict::Agent, is_agent, "{uid}: {verdict:?}");
    }
}

/// As a process does that can write to the directory.
#[tokio::test(start_paused = true)]
async fn a_name_that_is_lost_in_a_loop_is_taken_back_and_logged_once() {
    const TIMES: usize = 100;
    let log = Captured::default();
    let (_guard, _filter) = telemetry::capture("info", telemetry::Format::Json, log.clone()).unwrap();
    let (mut scene, _listener) = Scene::active().await;
    let begun = Instant::now();
    for _ in 0..TIMES {
        std::fs::remove_file(&scene.path).unwrap();
        let _listener = timeout(Duration::from_secs(20), scene.opened.recv()).await.unwrap().unwrap();
    }
    let minutes = usize::try_from(begun.elapsed().as_secs() / 60).unwrap();
    for message in ["the socket has lost its name", "the socket is acquired"] {
        assert!((1..=1 + minutes).contains(&log.count(message)), "{message}: {}", log.text());
    }
}
