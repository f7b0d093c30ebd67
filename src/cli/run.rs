//! `sds-agent run`: the agent as it runs on a node. `dev` starts here too.

use std::{path::PathBuf, process::ExitCode};

use tokio::runtime::Builder;
use tracing::warn;

use super::{Exit, dev, output};
use crate::{
    app::{self, Base},
    config::{Config, Env, Loaded},
    process,
    shutdown::{Drained, Shutdown},
    telemetry,
};

/// A person at a terminal sees every issue, push and acknowledgement.
const DEV_FILTER: &str = "info,sds_agent::sds=debug,sds_agent::caller=debug";

/// The flags of `run`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The configuration, a YAML file (docs/configuration.md describes it)
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

const EXAMPLES: &str = "\
Example:
  sds-agent run --config /etc/sds-agent/agent.yaml

The shortest configuration that serves a cluster:
  issuer:
    certManager:
      issuerRef: { name: mesh-ca, kind: ClusterIssuer }
  trust:
    sources: [ { configMap: { namespace: cert-manager, name: mesh-roots } } ]

In a pod it needs NODE_NAME (spec.nodeName), POD_NAMESPACE, POD_NAME and POD_UID from the downward API, and hostPID for
the shared socket.

The log goes to standard error: text on a terminal, JSON lines otherwise. SDS_AGENT_LOG says how much of it, such as `debug`
or `sds_agent::rotation=debug,info`.

Exit codes: 0 ended as it was told to, 1 it could not start, or a part of it failed, or the drain was aborted, 64 usage or
configuration.";

impl Args {
    /// Reads the configuration; errors have been told when this returns an exit code.
    pub fn load(&self, env: Env<'_>) -> Result<Loaded, Exit> {
        Config::load(&self.config, env).map_err(|errors| {
            output::complain(format_args!("{} cannot be used:\n{errors}", self.config.display()));
            Exit::Usage
        })
    }
}

/// For whom the agent runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// A node: the log is for machines.
    Run,
    /// A person at a terminal.
    Dev,
}

/// Hardens the process, sets up the log, and runs the agent until it is told to stop.
pub fn start(loaded: &Loaded, file: Option<app::File>, style: Style, env: Env<'_>) -> anyhow::Result<ExitCode> {
    // Before the runtime's threads and before the first key.
    let hardened = process::harden(loaded.config.lock_memory)?;
    let filter = env(telemetry::VARIABLE).or((style == Style::Dev).then(|| DEV_FILTER.to_owned()));
    let log = telemetry::init(filter.as_deref())?;
    hardened.log();
    for warning in &loaded.warnings {
        warn!(field = %warning.path, "{}", warning.message);
    }
    let runtime = Builder::new_multi_thread().worker_threads(loaded.config.worker_threads).enable_all().build()?;
    let code = runtime.block_on(run(&loaded.config, file, log, style, &hardened));
    // What still runs has had its time.
    runtime.shutdown_background();
    code
}

async fn run(
    config: &Config,
    file: Option<app::File>,
    log: telemetry::Filter,
    style: Style,
    hardened: &process::Hardened,
) -> anyhow::Result<ExitCode> {
    let shutdown = Shutdown::new(config.drain);
    shutdown.follow_signals()?;
    let mut base = Base::new(shutdown);
    (base.file, base.log) = (file, Some(log));
    process::Metrics::register(base.exposition.registry()).observe(hardened);
    let bound = app::build(config, base).await?;
    if let (Style::Dev, Some(socket)) = (style, bound.socket()) {
        output::say(&dev::greeting(socket, bound.admin()?, config))?;
    }
    Ok(match bound.run().await? {
        Drained::Complete | Drained::TimedOut { .. } => ExitCode::SUCCESS,
        Drained::Aborted => Exit::Failed.into(),
    })
}
