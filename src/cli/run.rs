//! `sds-agent run`: the agent as it runs on a node. Here is also the seam between the command line and the agent.

use std::{path::PathBuf, process::ExitCode};

use super::{Exit, output};
use crate::config::{Config, Env, Loaded};

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

In a pod it needs NODE_NAME (spec.nodeName), POD_NAMESPACE, POD_NAME and POD_UID from the downward API, and hostPID.";

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

/// Runs the agent until it is told to stop. It logs `loaded.warnings` once the log is set up.
pub async fn run_agent(loaded: Loaded, style: Style) -> anyhow::Result<ExitCode> {
    let Loaded { config, warnings } = loaded;
    for warning in &warnings {
        output::tell(format_args!("warning: {warning}"));
    }
    anyhow::bail!("the agent of trust domain {} in style {style:?} is not part of this build", config.trust_domain)
}
