//! `sds-agent approver`: approves or denies the agents' CertificateRequests, as a separate Deployment.

use std::{path::PathBuf, process::ExitCode};

use agent_runtime::{
    shutdown::{Drained, Shutdown},
    telemetry::{self, Log},
};
use tracing::warn;

use super::{Exit, output, run::serve};
use crate::{
    app::{
        self, Base,
        approver::{Settings, reload},
    },
    config::Env,
};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::cli::approver";

/// The flags of `approver`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The agents' configuration, a YAML file (docs/configuration.md describes it)
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

const EXAMPLES: &str = "\
Example:
  sds-agent approver --config /etc/sds-agent/config.yaml

The approver reads the same file as the agents: identities, issuers and lifetimes must be the same. Fields that only agents
use are checked and ignored. The approver reloads the file when it changes. A change takes effect at once, and the previous
configuration still applies for approver.overlap. In a pod, the approver needs POD_NAMESPACE and POD_NAME from the
downward API. Any number of replicas may run. Remove the issuers from cert-manager's own approver (approveSignerNames of
its chart); docs/security.md explains why.

Exit codes: 0 stopped by a signal, 1 it could not start, or a part of it failed, or the drain was aborted, 64 usage or
configuration.";

/// The configuration and its path.
#[derive(Debug)]
pub struct Ready {
    settings: Settings,
    path: PathBuf,
}

impl Args {
    /// Reads the configuration. Errors are already printed when this returns an exit code.
    pub fn load(&self, env: Env<'_>) -> Result<Ready, Exit> {
        let settings = Settings::load(&self.config, env).map_err(|refused| {
            output::complain(format_args!("{} cannot be used:\n{refused}", self.config.display()));
            Exit::Usage
        })?;
        Ok(Ready { settings, path: self.config.clone() })
    }
}

/// Sets up the log, and runs the approver until a signal stops it.
pub fn start(ready: Ready, env: Env<'static>) -> anyhow::Result<ExitCode> {
    let config = &ready.settings.config;
    let mut base = Base::new(Shutdown::new(config.drain));
    let log = telemetry::init(env(telemetry::VARIABLE).as_deref(), &telemetry::Metrics::register(base.exposition.registry()))?;
    for warning in &ready.settings.warnings {
        warn!(target: LOG_TARGET, "{warning}");
    }
    base.log = Some(log.filter.clone());
    let worker_threads = config.worker_threads;
    Ok(serve(&log, worker_threads, run(ready, base, log.clone(), env)))
}

async fn run(ready: Ready, base: Base, log: Log, env: Env<'static>) -> anyhow::Result<ExitCode> {
    let Ready { settings, path } = ready;
    base.shutdown.follow_signals(move || log.end())?;
    let bound = app::build_approver(&settings, reload::File { path, env }, base).await?;
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
        Args { config }.load(&env)
    }

    #[test]
    fn the_agents_file_is_enough_and_its_warnings_are_theirs() {
        let ready = load("issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }\nretention: 1s\n").unwrap();
        assert_eq!(ready.settings.warnings, []);
        assert_eq!(ready.settings.rules.agents.iter().collect::<Vec<_>>(), ["system:serviceaccount:mesh:sds-agent"]);
    }

    #[test]
    fn what_makes_no_requests_for_pods_needs_no_approver() {
        assert_eq!(load("issuer: { embedded: {} }\n").unwrap_err(), Exit::Usage);
        let unix = "attestation: unix\nissuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }\n";
        assert_eq!(load(unix).unwrap_err(), Exit::Usage);
    }
}
