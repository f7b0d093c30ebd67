//! `sds-agent run`: starts the agent on a node. `dev` starts its agent here too.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
};

use agent_runtime::{
    shutdown::{Drained, Shutdown},
    telemetry::{self, Log},
};
use tokio::runtime::Builder;
use tracing::warn;
use unix_peer::listener;

use super::{Exit, dev, output};
use crate::{
    app::{self, Base, access::access},
    config::{Config, Env, Loaded},
    process::{
        self,
        confinement::{self, Policy},
    },
};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::cli::run";

/// The log filter of `dev`: a user at a terminal sees every issued certificate, response and acknowledgement.
const DEV_FILTER: &str = "info,sds_agent::sds=debug,sds_agent::caller=debug";

/// The flags of `run`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Configuration, a YAML file (docs/configuration.md describes it)
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

const EXAMPLES: &str = "\
Example:
  sds-agent run --config /etc/sds-agent/agent.yaml

A minimal configuration for a cluster:
  issuer:
    certManager:
      issuerRef: { name: mesh-ca, kind: ClusterIssuer }
  trust:
    sources: [ { configMap: { namespace: cert-manager, name: mesh-roots } } ]

In a pod, the agent needs NODE_NAME (spec.nodeName), POD_NAMESPACE, POD_NAME and POD_UID from the downward API, and
hostPID for the shared socket.

The log goes to standard error: as text on a terminal, otherwise as JSON lines. SDS_AGENT_LOG sets its filter, such as
`debug` or `sds_agent::rotation=debug,info`. Default: `info`.

Exit codes: 0 stopped by a signal, 1 it could not start, or a part of it failed, or the drain was aborted, 64 usage or
configuration.";

impl Args {
    /// Reads the configuration. Errors are already printed when this returns an exit code.
    pub fn load(&self, env: Env<'_>) -> Result<Loaded, Exit> {
        Config::load(&self.config, env).map_err(|errors| refuse(&self.config, errors))
    }
}

/// Prints why a configuration cannot be used.
pub(super) fn refuse(config: &Path, why: impl Display) -> Exit {
    output::complain(format_args!("{} cannot be used:\n{why}", config.display()));
    Exit::Usage
}

/// The form of the log and of the greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// `run`: on a node.
    Run,
    /// `dev`: for a user at a terminal.
    Dev,
}

/// Hardens the process, sets up the log, and runs the agent until a signal stops it.
pub fn start(loaded: &Loaded, file: Option<app::File>, style: Style, env: Env<'_>) -> anyhow::Result<ExitCode> {
    // Hardening must precede the first additional thread, which is the log's, and the first key.
    let hardened = process::harden(loaded.config.lock_memory)?;
    let access = access(&loaded.config, file.as_ref().map(|file| &*file.path), env);
    if loaded.config.confinement != Policy::Never {
        // A confined process can make no directory. The step that needs the directory reports the error.
        for directory in &access.sockets {
            let _ = listener::make_directory(directory);
        }
    }
    let confined = confinement::confine(loaded.config.confinement, &access);
    if let (Policy::Always, Some((mechanism, outcome))) = (loaded.config.confinement, confined.missing()) {
        anyhow::bail!("confinement is always, but {mechanism} is not in force: {outcome}");
    }
    let mut base = Base::new(Shutdown::new(loaded.config.drain));
    let filter = env(telemetry::VARIABLE).or((style == Style::Dev).then(|| DEV_FILTER.to_owned()));
    let log = telemetry::init(filter.as_deref(), &telemetry::Metrics::register(base.exposition.registry()))?;
    hardened.log();
    confined.log(&access);
    for warning in &loaded.warnings {
        warn!(target: LOG_TARGET, field = %warning.path, "{}", warning.message);
    }
    process::Metrics::register(base.exposition.registry()).observe(&hardened, &confined);
    (base.file, base.log) = (file, Some(log.filter.clone()));
    Ok(serve(&log, loaded.config.worker_threads, run(&loaded.config, base, log.clone(), style)))
}

async fn run(config: &Config, base: Base, log: Log, style: Style) -> anyhow::Result<ExitCode> {
    base.shutdown.follow_signals(move || log.end())?;
    let bound = app::build(config, base).await?;
    if let (Style::Dev, Some(socket), Some(admin)) = (style, bound.socket(), bound.admin_address()?) {
        let greeting = dev::greeting(socket, admin, config);
        // A paused terminal or a full pipe would block the write, so a thread of its own prints the greeting.
        thread::spawn(move || output::say(&greeting));
    }
    Ok(match bound.run().await? {
        Drained::Complete | Drained::TimedOut { .. } => ExitCode::SUCCESS,
        Drained::Aborted => Exit::Failed.into(),
    })
}

/// Runs `work` to its end. An error goes through the log, which bounds the wait for a stalled reader of standard error.
pub(super) fn serve(log: &Log, worker_threads: usize, work: impl Future<Output = anyhow::Result<ExitCode>>) -> ExitCode {
    let _end = log.until_dropped();
    let runtime = Builder::new_multi_thread().worker_threads(worker_threads).enable_all().build();
    let done = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        let done = runtime.block_on(work);
        // Tasks that still run have used up the drain time, so they are dropped.
        runtime.shutdown_background();
        done
    });
    done.unwrap_or_else(|error| {
        log.tell(format_args!("sds-agent: {error:#}"));
        Exit::Failed.into()
    })
}
