//! Applies changes of the configuration while the approver runs. An invalid configuration changes nothing.
//!
//! Owns the rules in force. The caller runs [`Reload::run`] as long as the approver runs.

use std::{path::Path, sync::Arc};

use agent_runtime::file::Followed;
use approver::active_rules::ActiveRules;
use kube::Client;
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tracing::{error, info, warn};

use super::{
    denied_nodes::{self, DeniedNodes},
    settings::{Refused, Settings},
    source::{self, Source, Start},
};
use crate::{
    app::config_map::{ConfigMapName, ConfigMapWatch},
    config::{
        Config, Env, MAX_FILE_BYTES, Warning,
        reloads::{Metrics, Outcome},
    },
};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::approver::reload";

/// Follows the configuration and owns the rules in force.
pub struct Reload {
    source: Source,
    env: Env<'static>,
    active_rules: watch::Sender<Arc<ActiveRules>>,
    metrics: Metrics,
    started: Config,
    is_first: bool,
    refused: Option<Refused>,
    warnings: Vec<Warning>,
    waiting: Vec<&'static str>,
    /// The last reported error of the denied nodes.
    denied_error: Option<String>,
}

impl std::fmt::Debug for Reload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reload").field("source", &self.source).finish_non_exhaustive()
    }
}

impl Reload {
    /// Follows the source from which `start` was read, which is in force until it changes.
    pub fn new(start: Start, env: Env<'static>, metrics: Metrics) -> Self {
        let Start { settings, source, denied } = start;
        let mut reload = Self {
            source,
            env,
            active_rules: watch::Sender::new(Arc::new(ActiveRules::new(settings.rules))),
            metrics,
            started: settings.config,
            is_first: true,
            refused: None,
            warnings: settings.warnings,
            waiting: Vec::new(),
            denied_error: None,
        };
        reload.deny(Ok(denied));
        reload
    }

    /// A receiver of the rules in force.
    pub fn active_rules(&self) -> watch::Receiver<Arc<ActiveRules>> {
        self.active_rules.subscribe()
    }

    /// Follows the files, or the ConfigMap with `client`; does not return by itself.
    pub async fn run(self, client: Client, kube_metrics: agent_kube::Metrics) {
        match self.source.clone() {
            Source::File(path) => self.follow_files(&path).await,
            Source::ConfigMap(name) => {
                let watch = ConfigMapWatch::new(client, &name.namespace, &name.name, kube_metrics);
                self.follow_config_map(&name, watch).await;
            }
        }
    }

    async fn follow_files(self, path: &Path) {
        let env = self.env;
        let (rules, denied) =
            (Followed::new(path.to_owned(), MAX_FILE_BYTES), Followed::new(denied_nodes::beside(path), denied_nodes::MAX_BYTES));
        let reload = Mutex::new(self);
        futures::join!(
            rules.run(|content| reload.lock().take(Settings::of_content(path, content, env))),
            denied.run(|content| reload.lock().deny(denied_nodes::of_content(content))),
        );
    }

    async fn follow_config_map(mut self, name: &ConfigMapName, mut watch: ConfigMapWatch) {
        while let Some(map) = watch.next().await {
            let (settings, denied) = source::read(name, map.as_ref(), self.env);
            self.deny(denied);
            self.take(settings);
        }
    }

    /// Puts other denied nodes into force. An error changes nothing.
    fn deny(&mut self, read: Result<DeniedNodes, String>) {
        let file = self.source.of_denied_nodes();
        let DeniedNodes { nodes, invalid_lines } = match read {
            Ok(denied) => denied,
            Err(error) => {
                if self.denied_error.as_ref() != Some(&error) {
                    error!(target: LOG_TARGET, file, error, "the denied nodes cannot be read; the former ones stay denied");
                }
                self.denied_error = Some(error);
                return;
            }
        };
        self.denied_error = None;
        if let Some(line) = invalid_lines.first() {
            warn!(target: LOG_TARGET, file, line, lines = invalid_lines.len(), "a line is not the name of a node, and denies no node");
        }
        let before = self.active_rules.borrow().clone();
        if nodes == *before.denied_nodes {
            return;
        }
        let (added, removed) = (nodes.difference(&before.denied_nodes).count(), before.denied_nodes.difference(&nodes).count());
        warn!(target: LOG_TARGET, file, nodes = nodes.len(), added, removed, "the denied nodes have changed");
        self.active_rules.send_replace(Arc::new(before.denying(nodes)));
    }

    fn take(&mut self, read: Result<Settings, Refused>) {
        let is_first = std::mem::take(&mut self.is_first);
        let settings = match read {
            Ok(settings) => settings,
            Err(refused) => return self.refuse(refused),
        };
        let file = self.source.to_string();
        if self.refused.take().is_some() {
            info!(target: LOG_TARGET, file, "the configuration file is good again");
        }
        self.tell(&settings);
        let before = self.active_rules.borrow().clone();
        if settings.rules == before.rules {
            // The first read returns the file as it was at the start, so it is not counted.
            if !is_first {
                self.metrics.read(Outcome::unchanged);
            }
            return;
        }
        self.metrics.read(Outcome::ok);
        let overlap = humantime::format_duration(settings.rules.overlap).to_string();
        info!(
            target: LOG_TARGET, file,
            overlap, "the rules have changed; during the overlap the former rules also apply to the agents and issuers that remain"
        );
        self.active_rules.send_replace(Arc::new(before.replaced(settings.rules, Instant::now())));
    }

    /// Logs new warnings, and the fields that need a restart, once for each change.
    fn tell(&mut self, settings: &Settings) {
        for warning in settings.warnings.iter().filter(|warning| !self.warnings.contains(warning)) {
            warn!(target: LOG_TARGET, "{warning}");
        }
        self.warnings.clone_from(&settings.warnings);
        let waiting = settings.needing_restart(&self.started);
        self.metrics.waiting(waiting.len());
        if !waiting.is_empty() && waiting != self.waiting {
            warn!(
                target: LOG_TARGET, fields = waiting.join(", "),
                "these changes of the configuration need a restart; until then the approver uses the former values"
            );
        }
        self.waiting = waiting;
    }

    fn refuse(&mut self, refused: Refused) {
        self.metrics.read(Outcome::invalid);
        if self.refused.as_ref() != Some(&refused) {
            error!(target: LOG_TARGET, file = %self.source, "the configuration file cannot be used; the former rules stay in force");
            match &refused {
                Refused::Invalid(errors) => {
                    errors.0.iter().for_each(|problem| error!(target: LOG_TARGET, field = %problem.path, "{problem}"));
                }
                Refused::Unfit(_) | Refused::Missing(_) => error!(target: LOG_TARGET, "{refused}"),
            }
        }
        self.refused = Some(refused);
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::PathBuf, time::Duration};

    use agent_kube::fake::FakeApi;
    use agent_runtime::file::MountedFile;
    use serde_json::json;
    use tokio::time::timeout;

    use super::*;

    fn text(lifetime: &str) -> String {
        format!(
            "issuer: {{ certManager: {{ issuerRef: {{ name: mesh-ca, kind: ClusterIssuer }} }} }}\ncertificate: {{ lifetime: {lifetime} }}\n"
        )
    }

    fn settings(text: &str) -> Result<Settings, Refused> {
        Settings::of_content("config.yaml".as_ref(), Ok(text.as_bytes()), &|_| None)
    }

    fn reload_of(source: Source) -> Reload {
        let start = Start { settings: settings(&text("1h")).unwrap(), source, denied: DeniedNodes::default() };
        Reload::new(start, &|_| None, Metrics::default())
    }

    fn reload(path: PathBuf) -> Reload {
        reload_of(Source::File(path))
    }

    fn counted(metrics: &Metrics) -> [u64; 3] {
        [Outcome::ok, Outcome::invalid, Outcome::unchanged].map(|result| metrics.counts(result).0)
    }

    fn lifetime(active_rules: &ActiveRules) -> u64 {
        active_rules.rules.resolver.default_profile.lifetime.as_secs() / 3600
    }

    #[test]
    fn a_good_file_counts_and_a_bad_one_changes_nothing() {
        let mut reload = reload("config.yaml".into());
        let (rules, metrics) = (reload.active_rules(), reload.metrics.clone());
        let now = |hours| {
            let active_rules = rules.borrow();
            assert_eq!(lifetime(&active_rules), hours);
            active_rules.superseded(Instant::now()).count()
        };
        reload.take(settings(&text("1h")));
        assert_eq!((now(1), counted(&metrics)), (0, [0, 0, 0]));
        reload.take(settings(&text("2h")));
        assert_eq!((now(2), counted(&metrics)), (1, [1, 0, 0]));
        for bad in [text("2 fortnights"), "attestation: unix\nissuer: { embedded: {} }\n".to_owned(), text("1s")] {
            reload.take(settings(&bad));
            assert_eq!((now(2), metrics.counts(Outcome::ok).1), (1, 0), "{bad}");
        }
        let missing = std::io::Error::from(std::io::ErrorKind::NotFound);
        reload.take(Settings::of_content("config.yaml".as_ref(), Err(&missing), &|_| None));
        assert_eq!((now(2), metrics.counts(Outcome::ok).1, counted(&metrics)), (1, 0, [1, 4, 0]));
        // A field that only agents use does not change the rules.
        reload.take(settings(&format!("{}retention: 1h\n", text("2h"))));
        assert_eq!((now(2), metrics.counts(Outcome::ok).1, counted(&metrics)), (1, 1, [1, 4, 1]));
        // A change that needs a restart is counted; a change of the overlap needs none.
        reload.take(settings(&format!("{}workerThreads: 3\napprover: {{ overlap: 0s }}\n", text("2h"))));
        assert_eq!((now(2), metrics.counts(Outcome::ok).2, counted(&metrics)), (0, 1, [2, 4, 1]));
    }

    #[tokio::test]
    async fn a_mounted_config_map_changes_the_rules() {
        let mount = tempfile::tempdir().unwrap();
        let mut file = MountedFile::new(mount.path(), "config.yaml", &text("1h"));
        let reload = reload(file.path());
        let (mut rules, metrics) = (reload.active_rules(), reload.metrics.clone());
        let path = file.path();
        let task = tokio::spawn(async move { reload.follow_files(&path).await });
        file.publish(&text("2h"));
        file.publish("no: configuration\n");
        file.publish(&text("3h"));
        let changed = rules.wait_for(|active_rules| lifetime(active_rules) == 3);
        timeout(Duration::from_secs(20), changed).await.expect("no change").unwrap();
        assert_eq!(metrics.counts(Outcome::ok).1, 1);
        task.abort();
    }

    #[tokio::test]
    async fn denied_nodes_are_followed_beside_the_configuration() {
        let mount = tempfile::tempdir().unwrap();
        let config = mount.path().join("config.yaml");
        fs::write(&config, text("1h")).unwrap();
        let denied = mount.path().join("deniedNodes");
        fs::write(&denied, "n1\n").unwrap();
        let reload = Reload::new(Start::of_file(config.clone(), &|_| None).unwrap(), &|_| None, Metrics::default());
        let mut rules = reload.active_rules();
        assert_eq!(*rules.borrow().denied_nodes, ["n1".to_owned()].into(), "before the first decision");
        let path = config.clone();
        let task = tokio::spawn(async move { reload.follow_files(&path).await });
        let wait = async |rules: &mut watch::Receiver<Arc<ActiveRules>>, nodes: &[&str]| {
            let nodes: BTreeSet<String> = nodes.iter().map(|node| (*node).to_owned()).collect();
            let changed = rules.wait_for(|active_rules| *active_rules.denied_nodes == nodes);
            drop(timeout(Duration::from_secs(20), changed).await.expect("no change").unwrap());
        };
        fs::write(&denied, "n1\nn2\nNot A Node\n").unwrap();
        wait(&mut rules, &["n1", "n2"]).await;
        // Other rules leave them denied.
        fs::write(&config, text("2h")).unwrap();
        drop(timeout(Duration::from_secs(20), rules.wait_for(|active_rules| lifetime(active_rules) == 2)).await.unwrap().unwrap());
        assert_eq!(rules.borrow().denied_nodes.len(), 2);
        fs::remove_file(&denied).unwrap();
        wait(&mut rules, &[]).await;
        task.abort();
    }

    #[test]
    fn an_unreadable_file_of_denied_nodes_stops_only_the_start() {
        let mount = tempfile::tempdir().unwrap();
        let config = mount.path().join("config.yaml");
        fs::write(&config, text("1h")).unwrap();
        fs::write(mount.path().join("deniedNodes"), [0xff]).unwrap();
        let error = Start::of_file(config, &|_| None).unwrap_err().to_string();
        assert!(error.ends_with("deniedNodes is not UTF-8"), "{error}");
        let mut reload = reload("config.yaml".into());
        reload.deny(denied_nodes::of_content(Ok(b"n1")));
        reload.deny(denied_nodes::of_content(Ok(&[0xff])));
        assert_eq!(reload.active_rules().borrow().denied_nodes.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_config_map_changes_rules_and_denied_nodes_and_its_loss_neither() {
        let (api, kube_metrics) = (FakeApi::new(), agent_kube::Metrics::default());
        let map = |lifetime: &str, denied: &str| {
            let data = json!({"config.yaml": text(lifetime), "deniedNodes": denied});
            json!({"metadata": {"name": "sds-agent", "namespace": "mesh"}, "data": data})
        };
        let reload = reload_of(Source::ConfigMap("mesh/sds-agent".parse().unwrap()));
        let (mut rules, metrics) = (reload.active_rules(), reload.metrics.clone());
        tokio::spawn(reload.run(api.client(&kube_metrics), kube_metrics));
        api.put("configmaps", map("2h", "n1\nn2"));
        let is = |hours: u64, nodes: usize| move |rules: &Arc<ActiveRules>| lifetime(rules) == hours && rules.denied_nodes.len() == nodes;
        let wait = async |rules: &mut watch::Receiver<Arc<ActiveRules>>, hours: u64, nodes: usize| {
            let changed = rules.wait_for(is(hours, nodes));
            drop(timeout(Duration::from_secs(60), changed).await.unwrap_or_else(|_| panic!("no {hours}h with {nodes} nodes")).unwrap());
        };
        wait(&mut rules, 2, 2).await;
        api.remove("configmaps", "mesh", "sds-agent");
        let refused = async || {
            while metrics.counts(Outcome::invalid).0 == 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(60), refused()).await.unwrap();
        assert!(is(2, 2)(&rules.borrow()), "a deleted ConfigMap allows no denied node");
        api.put("configmaps", map("3h", ""));
        wait(&mut rules, 3, 0).await;
    }
}
