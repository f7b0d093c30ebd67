//! The composition root: imports every part of the agent, and no part imports it.
//!
//! [`build`] creates the real dependencies from a configuration; [`build_with`] accepts any. Both return a [`Bound`] with open sockets.
//! The workload socket is bound before any request to the API server or an issuer: a client that connects early waits in an open stream
//! instead of failing to connect. If a healthy predecessor serves the socket, the agent takes it only when all its parts are in sync
//! ([`handover`]). [`Bound::run`] serves until the shutdown has drained.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use agent_runtime::{
    clock::Clock,
    metrics::Exposition,
    readiness::{self, Readiness},
    shutdown::{Drained, Shutdown},
    telemetry,
};
use attest_kubernetes::pods::Pods;
use futures::future::{BoxFuture, OptionFuture};
use issuance::rotation;
use sds_server::{
    attest::{self, Attestor},
    server,
    session::Sessions,
    store::Store,
    trust::Trust,
};
use tokio::{
    net::UnixListener,
    sync::mpsc,
    task::{JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    admin, build_info,
    config::{Config, SharedSocket, reloads},
    handover::{
        self, SocketLease, SocketSpec,
        holder::{HolderAttestor, OtherAgents},
    },
    pod_sockets::{self, PodSockets},
    process::confinement::Policy,
    warm::{
        self, Prefetcher,
        starts::{Rule, Starts},
    },
};
use reload::{ConfigChannels, Reload};

pub mod access;
pub mod approver;
mod builder;
mod changed_content;
pub mod cluster_trust_bundle_source;
pub mod config_map;
pub mod config_map_source;
mod identity_users;
pub mod inventory;
pub mod mount_helper;
mod parts;
mod reload;
mod upstream;

pub use approver::{BoundApprover, build_approver};
pub use mount_helper::{BoundMountHelper, build_mount_helper};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::app";
#[cfg(test)]
pub(crate) use inventory::sample as sample_inventory;
pub(crate) use parts::attestor;
pub use reload::File;
pub use upstream::IssuerSet;

/// Time limit for the tasks that end after the streams: rotation, and the deletion of requests, which has its own limit of 5 s.
const LAST_STEPS: Duration = Duration::from_secs(6);

/// The dependencies that differ between `sds-agent run`, `sds-agent dev` and tests.
pub struct Deps {
    /// The clock.
    pub clock: Arc<dyn Clock>,
    /// Attests callers of the shared socket.
    pub attestor: Arc<dyn Attestor>,
    /// Attests another process that serves the path of the shared socket.
    pub holder_attestor: Arc<dyn HolderAttestor>,
    /// The index of this node's pods, if there is one. Per-pod sockets need it. A key is removed when the last pod that may use it ends.
    pub pods: Option<Pods>,
    /// The issuers.
    pub issuer_set: IssuerSet,
    /// The trust bundles. `tasks` feed their sources.
    pub trust: Trust,
    /// Whether a bundle comes from a source other than the issuers. If so, rotation verifies certificates only after the bundle is there.
    pub await_bundle: bool,
    /// Observes the outcome of issuance for each identity.
    pub observer: Option<Arc<dyn rotation::IssuanceObserver>>,
    /// Observes pods whose callers are refused, and pods that are served again.
    pub caller_observer: Option<Arc<dyn attest::CallerObserver>>,
    /// Background tasks, such as watches and sweeps. Each ends when `last` is cancelled.
    pub tasks: Vec<BoxFuture<'static, ()>>,
    /// Cancelled when the streams have ended.
    pub last: CancellationToken,
}

impl std::fmt::Debug for Deps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deps").field("attestor", &self.attestor).field("issuer_set", &self.issuer_set).finish_non_exhaustive()
    }
}

/// The parts that agent and approver have in common, created before the dependencies.
#[derive(Debug)]
pub struct Base {
    /// The registry of metrics.
    pub exposition: Exposition,
    /// Readiness of the process.
    pub readiness: Readiness,
    /// Shutdown of the process.
    pub shutdown: Shutdown,
    /// The configuration file, if the agent applies changes of it.
    pub file: Option<File>,
    /// The log filter, if it can be changed at runtime.
    pub log: Option<telemetry::Filter>,
    start: readiness::Guard,
}

impl Base {
    /// Creates the parts; `shutdown` is that of the process.
    pub fn new(shutdown: Shutdown) -> Self {
        let mut exposition = Exposition::new(build_info::VERSION, build_info::REVISION);
        let (readiness, start) = Readiness::new(readiness::Metrics::register(exposition.registry()));
        Self { exposition, readiness, shutdown, file: None, log: None, start }
    }
}

/// An agent whose sockets are open.
#[derive(Debug)]
pub struct Bound {
    socket: Option<SocketLease>,
    listeners: admin::Listeners,
    http_metrics: admin::Metrics,
    sessions: Sessions,
    pod_sockets: Option<PodSockets>,
    rotation: rotation::Parts,
    routes: admin::Routes,
    readiness: Readiness,
    tasks: Tasks,
    ending: CancellationToken,
    last: CancellationToken,
    shutdown: Shutdown,
    start: readiness::Guard,
}

struct Tasks(Vec<BoxFuture<'static, ()>>);

impl std::fmt::Debug for Tasks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} tasks", self.0.len())
    }
}

/// Creates the agent that `config` describes.
pub async fn build(config: &Config, mut base: Base) -> anyhow::Result<Bound> {
    let deps = parts::make(config, &mut base).await?;
    build_with(config, base, deps).await
}

/// Creates an agent with the given dependencies.
pub async fn build_with(config: &Config, base: Base, deps: Deps) -> anyhow::Result<Bound> {
    let Base { mut exposition, readiness, shutdown, file, log, start } = base;
    let listeners = admin::Listeners::bind(config.http_addresses())?;
    let registry = exposition.registry();
    let http_metrics = admin::Metrics::register(registry);

    let channels = ConfigChannels::new(config, &deps.issuer_set, &*deps.clock);
    let (resolver, plan, reissue_window) = (channels.resolver.subscribe(), channels.plan.subscribe(), channels.reissue_window.subscribe());
    let mut tasks = deps.tasks;
    if let Some(file) = file {
        let metrics = reloads::Metrics::register(registry);
        let reload = Reload::new(file, config, deps.issuer_set, channels, deps.clock.clone(), metrics, deps.last.clone());
        tasks.push(Box::pin(reload.run()));
    }
    let (reissue, reissues) = mpsc::channel(1);
    let (store, events) = Store::new();
    let identity_users = deps
        .pods
        .clone()
        .map(|pods| Arc::new(identity_users::PodsByIdentity::new(pods, resolver.clone())) as Arc<dyn rotation::IdentityUsers>);
    let rotation = rotation::Parts {
        store: store.clone(),
        events,
        plan: plan.clone(),
        reissues,
        trust: deps.trust.subscribe(),
        authorities: Some(deps.trust.clone()),
        await_bundle: deps.await_bundle,
        clock: deps.clock.clone(),
        identity_users,
        observer: deps.observer,
        metrics: rotation::metrics::Metrics::register(registry),
    };
    let warmer = Prefetcher {
        store: store.clone(),
        resolver: resolver.clone(),
        metrics: warm::metrics::Metrics::register(registry),
        lines: Arc::default(),
    };
    if let Some(((warm_up, socket), pods)) = config.warm_up.as_ref().zip(config.shared_socket.as_ref()).zip(deps.pods.as_ref()) {
        let starts = Starts::new(warmer.clone(), Rule::new(warm_up, &socket.path), deps.clock.clone(), pods);
        tasks.push(Box::pin(starts.run(shutdown.drain.clone())));
    }
    let mut server = server::Builder::new(deps.attestor, resolver, store.clone(), &deps.trust);
    server.names = config.names.clone();
    server.limits = config.limits.clone();
    server.clock = deps.clock.clone();
    server.observer = deps.caller_observer;
    server.metrics = server::Metrics::register(registry);
    server.reissue_window = reissue_window;
    server.shutdown = shutdown.clone();
    let mut sessions = server.build().await?.sessions;
    sessions.companions = Some(Arc::new(OtherAgents(deps.holder_attestor.clone())));
    let ending = sessions.ending.clone();
    let pod_sockets_metrics = config.per_pod.as_ref().map(|_| pod_sockets::metrics::Metrics::register(registry));
    let handover_metrics = handover::Metrics::register(registry);
    let inventory = inventory::Inventory::new(store, plan, deps.clock).per_workload(config.metrics_per_workload);
    registry.register_collector(Box::new(inventory.clone()));
    let certificates = Arc::new(move || inventory.rows());
    let routes = admin::Routes::new(readiness.clone(), Arc::new(exposition))
        .with_controls(admin::Controls { certificates, reissue })
        .with_log(log.map(admin::LogLevel::new));
    // The last steps that can fail: they take the names of sockets that a healthy predecessor may still serve.
    let pod_sockets = match (&config.per_pod, deps.pods, pod_sockets_metrics) {
        (Some(per_pod), Some(pods), Some(metrics)) => {
            let (config, node, sessions) = (per_pod.clone(), config.node.clone(), sessions.clone());
            Some(PodSockets::bind(pod_sockets::Parts { config, node, pods, sessions, warmer, metrics })?)
        }
        (Some(_), ..) => anyhow::bail!("sockets.perPod serves the pods of one node: set NODE_NAME"),
        (None, ..) => None,
    };
    let socket = match &config.shared_socket {
        Some(SharedSocket { path, mode, .. }) => {
            let spec = SocketSpec { path: path.clone(), mode: *mode, denial_is_final: config.confinement != Policy::Never };
            Some(SocketLease::acquire(spec, &readiness, deps.holder_attestor, handover_metrics).await?)
        }
        None => None,
    };
    Ok(Bound {
        socket,
        listeners,
        http_metrics,
        sessions,
        pod_sockets,
        rotation,
        routes,
        readiness,
        tasks: Tasks(tasks),
        ending,
        last: deps.last,
        shutdown,
        start,
    })
}

impl Bound {
    /// The path of the shared socket, if it is configured.
    pub fn socket(&self) -> Option<&Path> {
        self.socket.as_ref().map(SocketLease::path)
    }

    /// The admin address, with the port that the kernel has chosen.
    pub fn admin_address(&self) -> std::io::Result<Option<SocketAddr>> {
        self.listeners.admin_address()
    }

    /// Serves until the shutdown has drained.
    ///
    /// # Errors
    ///
    /// A task of the agent failed, and its failure began the shutdown.
    pub async fn run(self) -> anyhow::Result<Drained> {
        let Self {
            socket,
            listeners,
            http_metrics,
            sessions,
            pod_sockets,
            rotation,
            routes,
            readiness,
            tasks,
            ending,
            last,
            shutdown,
            start,
        } = self;
        info!(target: LOG_TARGET, socket = socket.as_ref().map(|socket| tracing::field::display(socket.path().display())), "serving");
        let mut beside = JoinSet::new();
        for task in tasks.0 {
            beside.spawn(task);
        }
        beside.spawn(rotation::run(rotation, last.clone()));
        if let Some(pod_sockets) = pod_sockets {
            beside.spawn(pod_sockets.run(last.clone()));
        }
        listeners.serve(&routes, &http_metrics, &shutdown);
        let services = sessions.services.clone();
        let (open, opened) = mpsc::channel(1);
        // Without a shared socket, no listener is ever opened.
        let mut accepting = socket.is_some().then(|| tokio::spawn(accept(sessions, opened)));
        let mut holding = socket.map(|lease| tokio::spawn(lease.keep(shutdown.drain.clone(), open)));
        drop(start);
        tokio::spawn(async move {
            readiness.reached().await;
            info!(target: LOG_TARGET, "ready");
        });

        // A task that ends before the shutdown has failed. A task that has ended is not awaited again.
        let failed = tokio::select! {
            biased;
            () = shutdown.drain.cancelled() => None,
            Some(ended) = beside.join_next() => Some(ended.err().map_or_else(|| "it ended".to_owned(), |error| error.to_string())),
            Some(ended) = OptionFuture::from(holding.as_mut()) => {
                holding = None;
                Some(match ended {
                    Ok(Err(error)) => error.to_string(),
                    Ok(Ok(_)) => "the shared socket is no longer kept".to_owned(),
                    Err(error) => error.to_string(),
                })
            }
            Some(ended) = OptionFuture::from(accepting.as_mut()) => {
                accepting = None;
                Some(ended.err().map_or_else(|| "no more connections are accepted".to_owned(), |error| error.to_string()))
            }
        };
        if let Some(cause) = &failed {
            error!(target: LOG_TARGET, cause, "a task of the agent has failed; shutting down for a restart");
            shutdown.begin();
        }
        // The agent stops accepting and removes the socket's name before it ends the streams: clients reconnect to the successor.
        if let Some(holding) = holding
            && let Ok(Ok(Some(name))) = holding.await
        {
            name.unlink_if_owned();
            info!(target: LOG_TARGET, socket = %name.path().display(), "the socket is released");
        }
        if let Some(accepting) = accepting {
            let _ = accepting.await;
        }
        services.leaving().await;
        ending.cancel();
        let drained = shutdown.drained().await;
        if let Drained::TimedOut { holders } = drained {
            warn!(target: LOG_TARGET, holders, "some connections did not end before the drain deadline; closing them");
            shutdown.abort.cancel();
        }
        last.cancel();
        let finish = async { while beside.join_next().await.is_some() {} };
        if tokio::time::timeout(LAST_STEPS, finish).await.is_err() {
            warn!(target: LOG_TARGET, "background tasks did not end within 6 s after the drain");
        }
        info!(target: LOG_TARGET, "stopped");
        match failed {
            None => Ok(drained),
            Some(cause) => Err(anyhow::anyhow!("a task of the agent has failed: {cause}")),
        }
    }
}

/// Accepts connections from the listener that was opened last, until the drain begins. Panics if accepting does: the agent cannot serve
/// without it.
async fn accept(sessions: Sessions, opened: mpsc::Receiver<UnixListener>) {
    serve_last(opened, |listener| sessions.clone().accept(listener)).await;
}

/// Runs `serve` for the listener that was opened last. Returns when no further listener can come and the last one is no longer served.
async fn serve_last<F>(mut opened: mpsc::Receiver<UnixListener>, serve: impl Fn(UnixListener) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut serving = JoinSet::new();
    let propagate = |ended: Result<(), JoinError>| {
        if let Err(error) = ended
            && let Ok(panic) = error.try_into_panic()
        {
            std::panic::resume_unwind(panic);
        }
    };
    loop {
        tokio::select! {
            listener = opened.recv() => {
                let Some(listener) = listener else { break };
                // The previous listener lost its name earlier, so no client connects to it.
                serving.abort_all();
                serving.spawn(serve(listener));
            }
            Some(ended) = serving.join_next() => propagate(ended),
        }
    }
    while let Some(ended) = serving.join_next().await {
        propagate(ended);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_while_accepting_ends_the_accept_task() {
        let directory = tempfile::tempdir().unwrap();
        let (open, opened) = mpsc::channel(1);
        let accepting = tokio::spawn(serve_last(opened, |_listener| async { panic!("as requested") }));
        open.send(UnixListener::bind(directory.path().join("s")).unwrap()).await.unwrap();
        // The sender is open, as while the agent keeps the socket's path.
        let ended = tokio::time::timeout(Duration::from_secs(20), accepting).await.expect("the task goes on without accepting");
        assert!(ended.unwrap_err().is_panic());
        drop(open);
    }

    #[tokio::test]
    async fn only_the_last_listener_is_served() {
        let directory = tempfile::tempdir().unwrap();
        let (open, opened) = mpsc::channel(1);
        let (served, mut of) = mpsc::unbounded_channel();
        let accepting = tokio::spawn(serve_last(opened, move |listener| {
            let served = served.clone();
            async move {
                while let Ok((_stream, _)) = listener.accept().await {
                    let _ = served.send(listener.local_addr().unwrap().as_pathname().unwrap().to_owned());
                }
            }
        }));
        let paths = ["a", "b"].map(|name| directory.path().join(name));
        for path in &paths {
            open.send(UnixListener::bind(path).unwrap()).await.unwrap();
            let _stream = tokio::net::UnixStream::connect(path).await.unwrap();
            assert_eq!(of.recv().await.as_ref(), Some(path));
        }
        tokio::net::UnixStream::connect(&paths[0]).await.unwrap_err();
        accepting.abort();
    }
}
