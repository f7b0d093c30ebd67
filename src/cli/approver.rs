//! `sds-agent approver`: approves or denies the agents' CertificateRequests, as a separate Deployment.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use agent_runtime::{
    shutdown::{Drained, Shutdown},
    telemetry::{self, Log},
};
use tokio::runtime::Builder;
use tracing::warn;

use super::{Exit, output, run::serve};
use crate::{
    app::{
        self, Base,
        approver::{Start, source::CannotStart},
        config_map::ConfigMapName,
    },
    config::Env,
};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::cli::approver";

/// The flags of `approver`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Where the configuration is.
    #[command(flatten)]
    pub source: SourceArgs,
}

/// Where the configuration is.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct SourceArgs {
    /// The agents' configuration, a YAML file (docs/configuration.md describes it)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The agents' ConfigMap, read from the API server: the configuration in its key config.yaml, and deniedNodes
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub config_map: Option<ConfigMapName>,
}

/// The drain of an approver whose configuration is not read yet.
const DRAIN: Duration = Duration::from_secs(10);

const EXAMPLES: &str = "\
Examples:
  sds-agent approver --config-map sds-agent/sds-agent
  sds-agent approver --config /etc/sds-agent/config.yaml

The approver reads the same configuration as the agents: identities, issuers and lifetimes must be the same. Fields that only
agents use are checked and ignored. A change takes effect at once, and the previous configuration still applies for
approver.overlap. With --config-map, the namespace of the ConfigMap is that of the agents, and the approver waits until the
ConfigMap exists. With --config, POD_NAMESPACE is that of the agents. In a pod, the approver needs POD_NAMESPACE, POD_NAME and
POD_UID from the downward API. Any number of replicas may run. Remove the issuers from cert-manager's own approver
(approveSignerNames of its chart); docs/security.md explains why.

Exit codes: 0 stopped by a signal, 1 it could not start, or a part of it failed, or the drain was aborted, 64 usage or
configuration.";

/// The configuration, as far as it is known before the log is set up.
#[derive(Debug)]
pub enum Ready {
    /// The files are read.
    Files(Box<Start>),
    /// The ConfigMap is read next.
    ConfigMap(ConfigMapName),
}

impl Args {
    /// Reads the files. Errors are already printed when this returns an exit code.
    pub fn load(self, env: Env<'_>) -> Result<Ready, Exit> {
        match self.source {
            SourceArgs { config_map: Some(name), .. } => Ok(Ready::ConfigMap(name)),
            SourceArgs { config, .. } => {
                Start::of_file(config.unwrap_or_default(), env).map(|start| Ready::Files(Box::new(start))).map_err(|error| complain(&error))
            }
        }
    }
}

fn complain(error: &CannotStart) -> Exit {
    output::complain(format_args!("{error}"));
    match error {
        CannotStart::Refused(..) => Exit::Usage,
        CannotStart::DeniedNodes(..) | CannotStart::Client(_) | CannotStart::WatchEnded(_) => Exit::Failed,
    }
}

/// Sets up the log, and runs the approver until a signal stops it.
pub fn start(ready: Ready, env: Env<'static>) -> anyhow::Result<ExitCode> {
    let mut base = Base::new(Shutdown::new(DRAIN));
    let log = telemetry::init(env(telemetry::VARIABLE).as_deref(), &telemetry::Metrics::register(base.exposition.registry()))?;
    base.log = Some(log.filter.clone());
    let start = match ready {
        Ready::Files(start) => *start,
        Ready::ConfigMap(name) => {
            // The configuration decides about the runtime of the approver, so another one reads it.
            let runtime = Builder::new_current_thread().enable_all().build()?;
            match runtime.block_on(Start::of_config_map(name, env)) {
                Ok(start) => start,
                Err(error) => {
                    let exit = complain(&error);
                    log.end();
                    return Ok(exit.into());
                }
            }
        }
    };
    let config = &start.settings.config;
    base.shutdown = Shutdown::new(config.drain);
    for warning in &start.settings.warnings {
        warn!(target: LOG_TARGET, "{warning}");
    }
    let worker_threads = config.worker_threads;
    Ok(serve(&log, worker_threads, run(start, base, log.clone(), env)))
}

async fn run(start: Start, base: Base, log: Log, env: Env<'static>) -> anyhow::Result<ExitCode> {
    base.shutdown.follow_signals(move || log.end())?;
    let bound = app::build_approver(start, env, base).await?;
    Ok(match bound.run().await? {
        Drained::Complete | Drained::TimedOut { .. } => ExitCode::SUCCESS,
        Drained::Aborted => Exit::Failed.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "a test's own file")]
    fn load(text: &str) -> Result<Ready, Exit> {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.yaml");
        std::fs::write(&config, text).unwrap();
        let env = |name: &str| (name == "POD_NAMESPACE").then(|| "mesh".to_owned());
        Args { source: SourceArgs { config: Some(config), config_map: None } }.load(&env)
    }

    #[test]
    fn the_agents_file_is_enough_and_its_warnings_are_theirs() {
        let ready = load("issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }\nretention: 1s\n").unwrap();
        let Ready::Files(start) = ready else { panic!("{ready:?}") };
        assert_eq!(start.settings.warnings, []);
        assert_eq!(start.settings.rules.agents.iter().collect::<Vec<_>>(), ["system:serviceaccount:mesh:sds-agent"]);
    }

    #[test]
    fn what_makes_no_requests_for_pods_needs_no_approver() {
        assert_eq!(load("issuer: { embedded: {} }\n").unwrap_err(), Exit::Usage);
        let unix = "attestation: unix\nissuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }\n";
        assert_eq!(load(unix).unwrap_err(), Exit::Usage);
    }
}
