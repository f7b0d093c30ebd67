//! The composition root: it knows every part, and nothing knows it.
//!
//! [`build`] makes the real dependencies from a configuration, [`build_with`] joins any; both return a [`Bound`], whose sockets are open.
//! The workload socket is bound before anything upstream is asked: a client that comes early waits in an open stream, not before a
//! closed door. Only from a healthy predecessor it is taken later, once all is in sync ([`handover`](crate::handover)). [`Bound::run`] serves
//! until the shutdown begins and has drained.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use agent_runtime::{
    clock::Clock,
    metrics::Exposition,
    readiness::{self, Readiness},
    shutdown::{Drained, Shutdown},
    telemetry,
};
use attest_kubernetes::pods::Pods;
use futures::future::BoxFuture;
use issuance::rotation;
use sds_server::{
    attest::{self, Attestor},
    server,
    session::Sessions,
    store::Store,
    trust::Trust,
};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::mpsc,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    admin, build_info,
    config::{Config, SharedSocket, reloads},
    csi,
    handover::SocketLease,
    warm::{
        self, Prefetcher,
        starts::{Rule, Starts},
    },
};
use reload::{ConfigChannels, Reload};

pub mod approver;
mod builder;
pub mod config_map_source;
mod identity_users;
pub mod inventory;
mod parts;
mod reload;
mod upstream;

pub use approver::{BoundApprover, build_approver};

/// Of the log's lines.
const LOG_TARGET: &str = "sds_agent::app";
#[cfg(test)]
pub(crate) use inventory::sample as sample_inventory;
pub(crate) use parts::attestor;
pub use reload::File;
pub use upstream::IssuerSet;

/// How long the parts that end last may take: rotation, and then the deletions upstream, which give up by themselves after five seconds.
const LAST_STEPS: Duration = Duration::from_secs(6);

/// What differs between a node, a laptop and a test.
pub struct Deps {
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// How callers of the shared socket are known.
    pub attestor: Arc<dyn Attestor>,
    /// This node's pods, where they are known: sockets of pods need them, and keys go with the last pod that may have them.
    pub pods: Option<Pods>,
    /// The upstreams.
    pub issuer_set: IssuerSet,
    /// The bundles; its sources are fed by `tasks`.
    pub trust: Trust,
    /// Whether a bundle comes from elsewhere than the issuers, so that nothing is verified before it has come.
    pub await_bundle: bool,
    /// Who is told how it goes with identities.
    pub observer: Option<Arc<dyn rotation::IssuanceObserver>>,
    /// Who hears of pods that are not served.
    pub caller_observer: Option<Arc<dyn attest::CallerObserver>>,
    /// What must run beside: watches, sweeps. They end by themselves when `last` is cancelled.
    pub tasks: Vec<BoxFuture<'static, ()>>,
    /// Cancelled when the streams have ended.
    pub last: CancellationToken,
}

impl std::fmt::Debug for Deps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deps").field("attestor", &self.attestor).field("issuer_set", &self.issuer_set).finish_non_exhaustive()
    }
}

/// The parts that every composition has, made before the dependencies.
#[derive(Debug)]
pub struct Base {
    /// Where modules register their metrics.
    pub exposition: Exposition,
    /// Whether all is there.
    pub readiness: Readiness,
    /// The end.
    pub shutdown: Shutdown,
    /// The configuration's file, where it is followed.
    pub file: Option<File>,
    /// The log's filter, where it can be changed.
    pub log: Option<telemetry::Filter>,
    start: readiness::Guard,
}

impl Base {
    /// Fresh parts; `shutdown` is the process's.
    pub fn new(shutdown: Shutdown) -> Self {
        let mut exposition = Exposition::new(build_info::VERSION, build_info::REVISION);
        let (readiness, start) = Readiness::new(readiness::Metrics::register(exposition.registry()));
        Self { exposition, readiness, shutdown, file: None, log: None, start }
    }
}

/// An agent whose sockets are open.
#[derive(Debug)]
pub struct Bound {
    socket: Option<LeasedSocket>,
    admin: TcpListener,
    metrics: TcpListener,
    sessions: Sessions,
    csi: Option<csi::Driver>,
    rotation: rotation::Parts,
    routes: admin::Routes,
    readiness: Readiness,
    tasks: Tasks,
    ending: CancellationToken,
    last: CancellationToken,
    shutdown: Shutdown,
    start: readiness::Guard,
}

/// The shared socket: it has its name or will take it.
#[derive(Debug)]
struct LeasedSocket {
    path: PathBuf,
    lease: SocketLease,
}

struct Tasks(Vec<BoxFuture<'static, ()>>);

impl std::fmt::Debug for Tasks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} tasks", self.0.len())
    }
}

/// The agent as configured.
pub async fn build(config: &Config, mut base: Base) -> anyhow::Result<Bound> {
    let deps = parts::make(config, &mut base).await?;
    build_with(config, base, deps).await
}

/// An agent of the given parts.
pub async fn build_with(config: &Config, base: Base, deps: Deps) -> anyhow::Result<Bound> {
    let Base { mut exposition, readiness, shutdown, file, log, start } = base;
    let admin = admin::bind("admin.address", config.admin).await?;
    let metrics = admin::bind("metrics.address", config.metrics).await?;
    let registry = exposition.registry();

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
    let warmer = Prefetcher { store: store.clone(), resolver: resolver.clone(), metrics: warm::metrics::Metrics::register(registry) };
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
    let sessions = server.build().await?.sessions;
    let ending = sessions.ending.clone();
    let csi_metrics = config.per_pod.as_ref().map(|_| csi::metrics::Metrics::register(registry));
    let inventory = inventory::Inventory::new(store, plan, deps.clock).per_workload(config.metrics_per_workload);
    registry.register_collector(Box::new(inventory.clone()));
    let certificates = Arc::new(move || inventory.rows());
    let routes = admin::Routes::new(readiness.clone(), Arc::new(exposition))
        .with_controls(admin::Controls { certificates, reissue })
        .with_log(log.map(admin::LogLevel::new));
    // Last of all that can fail, as they take names from a predecessor that may be serving well.
    let csi = match (&config.per_pod, deps.pods, csi_metrics) {
        (Some(per_pod), Some(pods), Some(metrics)) => {
            let (config, node, sessions) = (per_pod.clone(), config.node.clone(), sessions.clone());
            Some(csi::Driver::bind(csi::Parts { config, node, pods, sessions, warmer, metrics })?)
        }
        (Some(_), ..) => anyhow::bail!("sockets.perPod serves the pods of one node: set NODE_NAME"),
        (None, ..) => None,
    };
    let socket = match &config.shared_socket {
        Some(SharedSocket { path, mode, .. }) => {
            Some(LeasedSocket { path: path.clone(), lease: SocketLease::acquire(path, *mode, &readiness).await? })
        }
        None => None,
    };
    Ok(Bound {
        socket,
        admin,
        metrics,
        sessions,
        csi,
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
    /// The shared socket's path, where there is one.
    pub fn socket(&self) -> Option<&Path> {
        self.socket.as_ref().map(|socket| &*socket.path)
    }

    /// The admin listener's address.
    pub fn admin(&self) -> std::io::Result<SocketAddr> {
        self.admin.local_addr()
    }

    /// The metrics listener's address.
    pub fn metrics(&self) -> std::io::Result<SocketAddr> {
        self.metrics.local_addr()
    }

    /// Serves until the shutdown has begun and has drained; an error where a part of the agent was what began it.
    pub async fn run(self) -> anyhow::Result<Drained> {
        let Self { socket, admin, metrics, sessions, csi, rotation, routes, readiness, tasks, ending, last, shutdown, start } = self;
        info!(target: LOG_TARGET, socket = socket.as_ref().map(|socket| tracing::field::display(socket.path.display())), "serving");
        admin::tell(&metrics);
        let mut beside = JoinSet::new();
        for task in tasks.0 {
            beside.spawn(task);
        }
        beside.spawn(rotation::run(rotation, last.clone()));
        if let Some(driver) = csi {
            beside.spawn(driver.run(last.clone()));
        }
        tokio::spawn(admin::serve(admin, routes.clone(), shutdown.clone()));
        tokio::spawn(admin::serve(metrics, routes.without_controls(), shutdown.clone()));
        let services = sessions.services.clone();
        let (open, opened) = mpsc::channel(1);
        let accepting = tokio::spawn(accept(sessions, opened));
        let holding = socket.map(|socket| tokio::spawn(socket.lease.keep(shutdown.drain.clone(), open)));
        drop(start);
        tokio::spawn(async move {
            readiness.reached().await;
            info!(target: LOG_TARGET, "ready");
        });

        // A part that ends before the shutdown has failed.
        let failed = tokio::select! {
            biased;
            () = shutdown.drain.cancelled() => None,
            Some(ended) = beside.join_next() => Some(ended.err().map_or_else(|| "it ended".to_owned(), |error| error.to_string())),
        };
        if let Some(cause) = &failed {
            error!(target: LOG_TARGET, cause, "a part of the agent has failed; shutting down so that it is started anew");
            shutdown.begin();
        }
        // Nobody new comes in, the name is free, and only then the streams end: clients find the successor, not us.
        if let Some(holding) = holding
            && let Ok(Some(name)) = holding.await
        {
            name.unlink_if_owned();
            info!(target: LOG_TARGET, socket = %name.path().display(), "the socket is released");
        }
        let _ = accepting.await;
        services.leaving().await;
        ending.cancel();
        let drained = shutdown.drained().await;
        if let Drained::TimedOut { holders } = drained {
            warn!(target: LOG_TARGET, holders, "not everything ended within the drain's deadline; dropping the rest");
            shutdown.abort.cancel();
        }
        last.cancel();
        let finish = async { while beside.join_next().await.is_some() {} };
        if tokio::time::timeout(LAST_STEPS, finish).await.is_err() {
            warn!(target: LOG_TARGET, "the last steps did not end in time");
        }
        info!(target: LOG_TARGET, "stopped");
        match failed {
            None => Ok(drained),
            Some(cause) => Err(anyhow::anyhow!("a part of the agent has failed: {cause}")),
        }
    }
}

/// Accepts from what is opened last, until the drain begins.
async fn accept(sessions: Sessions, mut opened: mpsc::Receiver<UnixListener>) {
    let mut accepting = JoinSet::new();
    while let Some(listener) = opened.recv().await {
        // The one before lost its name some time ago: nobody has come to it since.
        accepting.abort_all();
        accepting.spawn(sessions.clone().accept(listener));
    }
    while accepting.join_next().await.is_some() {}
}
