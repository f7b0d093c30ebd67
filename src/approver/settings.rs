//! What an approver takes from the agents' configuration file.

use std::{io, path::Path};

use super::rules::{Rules, Unfit};
use crate::config::{Config, Env, Errors, Loaded, Warning};

/// A configuration that an approver can use.
#[derive(Debug, Clone)]
pub struct Settings {
    /// All of it.
    pub config: Config,
    /// What it decides by.
    pub rules: Rules,
    /// What of it concerns the approver; agents tell the rest.
    pub warnings: Vec<Warning>,
}

/// Why it cannot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The file is wrong.
    #[error(transparent)]
    Invalid(#[from] Errors),
    /// It is right, and gives an approver nothing to do.
    #[error(transparent)]
    Unfit(#[from] Unfit),
}

impl Settings {
    /// Reads the file at `path`, with what the environment adds.
    pub fn load(path: &Path, env: Env<'_>) -> Result<Self, Refused> {
        Self::of(Config::load(path, &anywhere(env))?)
    }

    /// The same of what was found at `path`.
    pub fn of_content(path: &Path, content: Result<&[u8], &io::Error>, env: Env<'_>) -> Result<Self, Refused> {
        Self::of(Config::of_content(path, content, &anywhere(env))?)
    }

    fn of(loaded: Loaded) -> Result<Self, Refused> {
        let Loaded { config, warnings } = loaded;
        let rules = Rules::of(&config)?;
        let warnings = warnings.into_iter().filter(|warning| warning.path.starts_with("approver")).collect();
        Ok(Self { config, rules, warnings })
    }

    /// The fields that the approver uses, and in which the two differ though it goes by them from its start only.
    pub(super) fn needing_restart(&self, started: &Config) -> Vec<&'static str> {
        let (one, other) = (&self.config, started);
        let driver = |config: &Config| config.per_pod.as_ref().map(|per_pod| per_pod.driver_name.clone());
        let fields = [
            ("sockets.perPod.driverName", driver(one) != driver(other)),
            ("drain", one.drain != other.drain),
            ("admin.address", one.admin != other.admin),
            ("metrics.address", one.metrics != other.metrics),
            ("workerThreads", one.worker_threads != other.worker_threads),
        ];
        fields.into_iter().filter_map(|(field, differs)| differs.then_some(field)).collect()
    }
}

/// An approver belongs to no node, and owns no requests: what agents miss without it is not missed here.
fn anywhere<'a>(env: Env<'a>) -> impl Fn(&str) -> Option<String> + Sync + 'a {
    move |name| match name {
        "NODE_NAME" => Some("none".to_owned()),
        "POD_NAME" | "POD_UID" => env(name).or_else(|| Some("sds-agent-approver".to_owned())),
        _ => env(name),
    }
}
