//! `sds-agent mount-helper`: publishes the volumes of per-pod sockets for the kubelet, in a container of its own.

use std::{path::PathBuf, process::ExitCode};

use agent_runtime::{
    shutdown::{Drained, Shutdown},
    telemetry,
};
use tracing::warn;

use super::{
    Exit,
    run::{refuse, serve},
};
use crate::{
    app::{self, Base},
    config::{Config, Env, Loaded},
    per_pod::PerPod,
    process::{self, LockMemory},
};

/// Target of the log lines.
const LOG_TARGET: &str = "sds_agent::cli::mount_helper";

/// The kubelet's calls are few and short.
const WORKER_THREADS: usize = 2;

/// The flags of `mount-helper`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The agent's configuration, a YAML file (docs/configuration.md describes it)
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

const EXAMPLES: &str = "\
Example:
  sds-agent mount-helper --config /etc/sds-agent/config.yaml

The mount helper is the CSI driver of per-pod sockets (`sockets.perPod`). It makes a directory for each volume and mounts it in
the pod; the agent, in another container of the same pod, serves the socket there. Only the mount helper is privileged. It needs
NODE_NAME (spec.nodeName), sockets.perPod.directory, and plugins, plugins_registry and pods of the kubelet's directory. It reads
the same configuration as the agent, and needs no access to the API server.

Exit codes: 0 stopped by a signal, 1 it could not start, or a part of it failed, or the drain was aborted, 64 usage or
configuration.";

impl Args {
    /// Reads the configuration. Errors are already printed when this returns an exit code.
    pub fn load(&self, env: Env<'_>) -> Result<Ready, Exit> {
        let loaded = Config::load(&self.config, env).map_err(|errors| refuse(&self.config, errors))?;
        match loaded.config.per_pod.clone() {
            Some(per_pod) => Ok(Ready { loaded, per_pod }),
            None => {
                Err(refuse(&self.config, "sockets.perPod.enabled: false, and the mount helper is only for sockets of pods; set it to true"))
            }
        }
    }
}

/// A configuration with sockets of pods.
#[derive(Debug)]
pub struct Ready {
    loaded: Loaded,
    per_pod: PerPod,
}

/// Sets up the log, and runs the mount helper until a signal stops it.
pub fn start(ready: Ready, env: Env<'_>) -> anyhow::Result<ExitCode> {
    let Ready { loaded, per_pod } = ready;
    // It holds no keys, so its memory need not be locked.
    let hardened = process::harden(LockMemory::Never)?;
    let mut base = Base::new(Shutdown::new(loaded.config.drain));
    let log = telemetry::init(env(telemetry::VARIABLE).as_deref(), &telemetry::Metrics::register(base.exposition.registry()))?;
    hardened.log();
    for warning in &loaded.warnings {
        warn!(target: LOG_TARGET, field = %warning.path, "{}", warning.message);
    }
    base.log = Some(log.filter.clone());
    let signals = log.clone();
    let work = async move {
        base.shutdown.follow_signals(move || signals.end())?;
        Ok(match app::build_mount_helper(&loaded.config, per_pod, base)?.run().await? {
            Drained::Complete | Drained::TimedOut { .. } => ExitCode::SUCCESS,
            Drained::Aborted => Exit::Failed.into(),
        })
    };
    Ok(serve(&log, WORKER_THREADS, work))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test's own file")]
    fn it_is_only_for_sockets_of_pods() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.yaml");
        let issuer = "issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }";
        for (sockets, exit) in [("{}", Some(Exit::Usage)), ("{ perPod: { enabled: true } }", None)] {
            std::fs::write(&config, format!("sockets: {sockets}\n{issuer}\n")).unwrap();
            assert_eq!(
                Args { config: config.clone() }.load(&|name| (name == "NODE_NAME").then(|| "n".to_owned())).err(),
                exit,
                "{sockets}"
            );
        }
    }
}
