//! Applies changes of the configuration file while the agent runs, and logs the changes that need a restart.
//!
//! Owns the configuration in force. Rotation gets its [`Plan`]; streams and sockets get the [`Resolver`]. An invalid file changes nothing.
//! Issuers and profiles change together or not at all.

use std::{path::PathBuf, sync::Arc};

use agent_runtime::{clock::Clock, file::Followed};
use issuance::rotation::plan::Plan;
use sds_server::sds::reissue_window::ReissueWindow;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use workload_identity::Resolver;

use super::upstream::{IssuerSet, Started};
use crate::config::{
    Config, Errors, Loaded, MAX_FILE_BYTES, Warning, live,
    reloads::{Metrics, Outcome},
};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::app::reload";

/// The configuration file of the agent and the environment with which it is read.
#[derive(Debug, Clone)]
pub struct File {
    /// The path of the file.
    pub path: PathBuf,
    /// The environment.
    pub env: fn(&str) -> Option<String>,
}

/// The channels through which other parts receive the configuration in force.
pub(super) struct ConfigChannels {
    /// For rotation.
    pub(super) plan: watch::Sender<Arc<Plan>>,
    /// For streams: the time over which they move to other certificates.
    pub(super) reissue_window: watch::Sender<ReissueWindow>,
    /// For parts that derive the identity of a caller.
    pub(super) resolver: watch::Sender<Arc<Resolver>>,
}

impl ConfigChannels {
    /// Creates the channels with the values of `config`.
    pub(super) fn new(config: &Config, issuer_set: &IssuerSet, clock: &dyn Clock) -> Self {
        Self {
            plan: watch::Sender::new(Arc::new(plan(config, issuer_set))),
            reissue_window: watch::Sender::new(reissue_window(config, clock)),
            resolver: watch::Sender::new(Arc::new(config.resolver())),
        }
    }
}

fn plan(config: &Config, issuer_set: &IssuerSet) -> Plan {
    let profiles = config.profiles.iter().map(|rule| &rule.profile).chain([&config.default_profile]).cloned();
    Plan::new(issuer_set.issuers(), profiles, config.retention)
}

fn reissue_window(config: &Config, clock: &dyn Clock) -> ReissueWindow {
    ReissueWindow::new(clock.now(), config.reissue_over, fastrand::u64(..))
}

/// Follows the file and owns the configuration in force.
pub(super) struct Reload {
    file: File,
    issuer_set: IssuerSet,
    channels: ConfigChannels,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    /// The configuration in force.
    in_force: Config,
    /// The last valid file. It differs from `in_force` in the fields that need a restart.
    asked: Config,
    errors: Option<Errors>,
    warnings: Vec<Warning>,
    /// The background tasks of issuers that a reload has added.
    beside: JoinSet<()>,
    last: CancellationToken,
}

impl Reload {
    /// Follows `file`, without reading it yet; `config` is in force.
    pub(super) fn new(
        file: File,
        config: &Config,
        issuer_set: IssuerSet,
        channels: ConfigChannels,
        clock: Arc<dyn Clock>,
        metrics: Metrics,
        last: CancellationToken,
    ) -> Self {
        Self {
            file,
            issuer_set,
            channels,
            clock,
            metrics,
            in_force: config.clone(),
            asked: config.clone(),
            errors: None,
            warnings: Vec::new(),
            beside: JoinSet::new(),
            last,
        }
    }

    /// Follows the file until the agent ends. Returns earlier only if a background task of a new issuer has failed.
    pub(super) async fn run(mut self) {
        let (tell, mut told) = mpsc::unbounded_channel();
        let file = Followed::new(self.file.path.clone(), MAX_FILE_BYTES);
        let path = self.file.path.clone();
        let env = self.file.env;
        let follow = file.run(move |content| {
            // The receiver lives as long as this future.
            let _ = tell.send(Config::of_content(&path, content, &env));
        });
        let mut follow = std::pin::pin!(follow);
        let last = self.last.clone();
        let mut first = true;
        loop {
            tokio::select! {
                () = last.cancelled() => break,
                () = &mut follow => break,
                Some(read) = told.recv() => self.take(read, std::mem::take(&mut first)),
                Some(ended) = self.beside.join_next() => {
                    error!(target: LOG_TARGET, cause = ended.err().map(tracing::field::display), "a task of a new issuer has ended");
                    return;
                }
            }
        }
        while self.beside.join_next().await.is_some() {}
    }

    fn take(&mut self, read: Result<Loaded, Errors>, first: bool) {
        let Loaded { config, warnings } = match read {
            Ok(loaded) => loaded,
            Err(errors) => return self.refuse(errors),
        };
        let was_invalid = self.errors.take().is_some();
        if config == self.asked {
            if first {
                // The first read returns the file as it was at the start, so it is not counted.
                self.warnings = warnings;
                return;
            }
            self.metrics.read(Outcome::unchanged);
            if was_invalid {
                info!(target: LOG_TARGET, file = %self.file.path.display(), "the configuration file is good again and has not changed");
            }
            return;
        }
        for warning in warnings.iter().filter(|warning| !self.warnings.contains(warning)) {
            warn!(target: LOG_TARGET, field = %warning.path, "{}", warning.message);
        }
        self.warnings = warnings;
        let changed: Vec<_> = live::differences(&self.asked, &config).iter().map(|field| field.path).collect();
        let cause = self.apply(&config);
        self.metrics.read(Outcome::ok);
        info!(target: LOG_TARGET, file = %self.file.path.display(), changed = changed.join(", "), "the configuration was read again");
        self.asked = config;
        let waiting: Vec<_> = live::differences(&self.in_force, &self.asked).iter().map(|field| field.path).collect();
        self.metrics.waiting(waiting.len());
        if !waiting.is_empty() {
            warn!(
                target: LOG_TARGET, fields = waiting.join(", "),
                cause = cause.map(tracing::field::display),
                "these changes of the configuration need a restart; until then the agent uses the former values"
            );
        }
    }

    fn refuse(&mut self, errors: Errors) {
        self.metrics.read(Outcome::invalid);
        if self.errors.as_ref() != Some(&errors) {
            error!(
                target: LOG_TARGET, file = %self.file.path.display(),
                errors = errors.0.len(),
                "the configuration file cannot be used; the former configuration stays in force"
            );
            for problem in &errors.0 {
                error!(target: LOG_TARGET, field = %problem.path, "{problem}");
            }
        }
        self.errors = Some(errors);
    }

    /// Puts the fields into force that need no restart. Returns the reason if issuers and profiles need one.
    fn apply(&mut self, config: &Config) -> Option<String> {
        let mut next = Config { reissue_over: config.reissue_over, retention: config.retention, ..self.in_force.clone() };
        let issuance = Config {
            default_profile: config.default_profile.clone(),
            profiles: config.profiles.clone(),
            issuers: config.issuers.clone(),
            ..next.clone()
        };
        // The names and matches in the file were checked with its own trustDomain and attestation.
        let cause = if (&config.trust_domain, config.attestation) != (&next.trust_domain, next.attestation) {
            Some("identities depend on trustDomain and attestation".to_owned())
        } else {
            match self.issuer_set.change(&issuance) {
                Ok(started) => {
                    next = issuance;
                    self.begin(started);
                    None
                }
                Err(cause) => Some(cause.to_string()),
            }
        };
        self.in_force = next;
        // The resolver changes last: a caller with a new identity finds the plan and the reissue window for it.
        self.channels.plan.send_replace(Arc::new(plan(&self.in_force, &self.issuer_set)));
        let resolver = self.in_force.resolver();
        if **self.channels.resolver.borrow() != resolver {
            self.channels.reissue_window.send_replace(reissue_window(&self.in_force, &*self.clock));
            self.channels.resolver.send_replace(Arc::new(resolver));
        }
        cause
    }

    fn begin(&mut self, started: Started) {
        for task in started.tasks(&self.last) {
            self.beside.spawn(task);
        }
    }
}

#[cfg(test)]
mod tests;
