//! Which changes of the file come into force, which do not, and which are logged. Tests that create issuers use a scripted API server.

use std::{
    path::Path,
    time::{Duration, UNIX_EPOCH},
};

use agent_kube::fake::FakeApi;
use agent_runtime::{clock::TestClock, file::MountedFile, shutdown::Shutdown};
use tokio::time::timeout;
use workload_identity::IssuerName;

use super::*;
use crate::{
    app::{
        Base,
        builder::{Builder, Cluster},
        upstream,
    },
    config::Env,
};

const PATIENCE: Duration = Duration::from_secs(20);

fn env(name: &str) -> Option<String> {
    match name {
        "NODE_NAME" => Some("n1".to_owned()),
        "POD_NAMESPACE" => Some("sds-agent".to_owned()),
        _ => None,
    }
}

const ISSUER: &str = "issuer: { certManager: { issuerRef: { name: mesh-ca, kind: ClusterIssuer } } }\n";

fn parse(text: &str) -> Result<Loaded, Errors> {
    let issuer = if text.contains("issuer:") { "" } else { ISSUER };
    Config::parse(&format!("{issuer}trust: {{ sources: [ {{ file: /roots.pem }} ] }}\n{text}\n"), &env as Env<'_>)
}

struct World {
    reload: Reload,
    plan: watch::Receiver<Arc<Plan>>,
    resolver: watch::Receiver<Arc<Resolver>>,
    reissue_window: watch::Receiver<ReissueWindow>,
}

impl World {
    fn new(text: &str, path: &Path) -> Self {
        let config = parse(text).unwrap().config;
        let (api, metrics) = (FakeApi::new(), agent_kube::Metrics::default());
        let cluster = Cluster { client: api.client(&metrics), metrics, pods: None, node_uid: None };
        let clock: Arc<dyn Clock> = Arc::new(TestClock::new(UNIX_EPOCH + Duration::from_secs(1_800_000_000)));
        let mut base = Base::new(Shutdown::new(Duration::ZERO));
        let mut builder = Builder::new(&config, &mut base);
        builder.clock.clone_from(&clock);
        let issuer_set = upstream::issuers(&mut builder, Some(&cluster)).unwrap();
        let last = builder.last;
        let channels = ConfigChannels::new(&config, &issuer_set, &*clock);
        let (plan, resolver, reissue_window) =
            (channels.plan.subscribe(), channels.resolver.subscribe(), channels.reissue_window.subscribe());
        let file = File { path: path.to_owned(), env };
        let mut reload = Reload::new(file, &config, issuer_set, channels, clock, Metrics::default(), last);
        reload.take(parse(text), true);
        Self { reload, plan, resolver, reissue_window }
    }

    /// Reads `text`. Returns whether the plan, the resolver and the reissue window have changed.
    fn read(&mut self, text: &str) -> (bool, bool, bool) {
        self.reload.take(parse(text), false);
        self.heard()
    }

    fn heard(&mut self) -> (bool, bool, bool) {
        let heard = (self.plan.has_changed().unwrap(), self.resolver.has_changed().unwrap(), self.reissue_window.has_changed().unwrap());
        self.plan.mark_unchanged();
        self.resolver.mark_unchanged();
        self.reissue_window.mark_unchanged();
        heard
    }

    fn counted(&self, result: Outcome) -> u64 {
        self.reload.metrics.counts(result).0
    }

    fn restart_required(&self) -> i64 {
        self.reload.metrics.counts(Outcome::ok).2
    }

    fn issuers(&self) -> Vec<String> {
        self.reload.issuer_set.issuers().keys().map(ToString::to_string).collect()
    }

    fn scopes(&self) -> usize {
        self.reload.issuer_set.scopes()
    }
}

fn world(text: &str) -> World {
    World::new(text, Path::new("/nonexistent"))
}

#[tokio::test]
async fn a_reload_of_an_invalid_or_equal_file_changes_nothing() {
    let mut w = world("retention: 1m");
    assert_eq!(w.read("retention: 1m # a word"), (false, false, false));
    assert_eq!((w.counted(Outcome::unchanged), w.reload.metrics.counts(Outcome::ok).1), (1, 1));
    for text in ["retention: 1", "retention: [", "frobnicate: yes", "retention: 1"] {
        assert_eq!(w.read(text), (false, false, false), "{text}");
    }
    assert_eq!((w.counted(Outcome::invalid), w.reload.metrics.counts(Outcome::ok).1), (4, 0));
    assert_eq!(w.plan.borrow().retention(), Duration::from_secs(60));
    assert_eq!(w.read("retention: 2m"), (true, false, false));
    assert_eq!((w.counted(Outcome::ok), w.reload.metrics.counts(Outcome::ok).1), (1, 1));
    assert_eq!(w.plan.borrow().retention(), Duration::from_secs(120));
}

#[tokio::test]
async fn what_needs_a_restart_is_counted_and_the_rest_comes_into_force() {
    let mut w = world("");
    let profile = "profiles: [ { name: short, match: { namespaces: [shop] }, certificate: { lifetime: 2h } } ]";
    assert_eq!(w.read(&format!("limits: {{ idle: 2h }}\nworkerThreads: 3\n{profile}")), (true, true, true));
    assert_eq!(w.restart_required(), 2);
    assert_eq!(&*w.resolver.borrow().rules[0].profile.name, "short");
    assert_eq!(w.reload.in_force.worker_threads, 2);
    // A reverted change needs no restart.
    assert_eq!(w.read(&format!("workerThreads: 3\n{profile}")), (true, false, false));
    assert_eq!(w.restart_required(), 1);
    w.read(profile);
    assert_eq!(w.restart_required(), 0);
}

/// A change of `attestation` would end every stream: the templates for one attestation have no identity for callers of another.
#[tokio::test]
async fn identities_stay_while_what_they_depend_on_waits_for_a_restart() {
    let mut w = world("");
    for text in ["attestation: unix", "trustDomain: other.example\nauthorityEpoch: 1"] {
        assert!(!w.read(text).1, "{text}");
    }
    assert_eq!(w.restart_required(), 2, "trustDomain and authorityEpoch");
    assert!(w.read("authorityEpoch: 1").1);
    assert_eq!((w.restart_required(), w.resolver.borrow().default_profile.epoch), (0, 1));
}

#[tokio::test]
async fn issuers_come_and_go_and_one_that_stays_is_the_same() {
    let mut w = world("");
    let known = w.reload.issuer_set.issuers()[&IssuerName("default".into())].clone();
    let profile = |namespace: &str| {
        let issuer = "issuerRef: { name: shop-ca, kind: ClusterIssuer }";
        format!("profiles: [ {{ name: shop, match: {{ namespaces: [shop] }}, {issuer}, namespace: {namespace} }} ]")
    };
    assert_eq!(w.read(&profile("sds-agent")), (true, true, true));
    assert_eq!((w.issuers(), w.scopes()), (vec!["default".into(), "shop".into()], 1));
    assert!(Arc::ptr_eq(&known, &w.reload.issuer_set.issuers()[&IssuerName("default".into())]));
    let of_shop = w.reload.issuer_set.issuers()[&IssuerName("shop".into())].clone();
    // Another fixed namespace gets its own watch.
    w.read(&profile("elsewhere"));
    assert_eq!((w.issuers().len(), w.scopes()), (2, 2));
    w.read("");
    assert_eq!((w.issuers(), w.scopes()), (vec!["default".into()], 2));
    w.read(&profile("sds-agent"));
    assert!(Arc::ptr_eq(&of_shop, &w.reload.issuer_set.issuers()[&IssuerName("shop".into())]), "the issuer keeps its queue and its state");

    // A watch of all namespaces would see the namespaces of the others: issuers and profiles stay, the other fields change.
    let before = w.reload.in_force.clone();
    assert_eq!(w.read(&format!("retention: 1m\nauthorityEpoch: 2\n{}", profile("workload"))), (true, false, false));
    assert_eq!((w.issuers().len(), w.scopes(), w.restart_required()), (2, 2, 2));
    assert_eq!(w.reload.in_force, Config { retention: Duration::from_secs(60), ..before });
    // With a watch of all namespaces, a profile can change to a fixed namespace.
    let mut w = world(&profile("workload"));
    assert_eq!(w.read(&profile("elsewhere")), (true, true, true), "another namespace is another issuer");
    assert_eq!((w.scopes(), w.restart_required()), (1, 0));
}

#[tokio::test]
async fn a_mounted_config_map_changes_the_plan() {
    let mount = tempfile::tempdir().unwrap();
    let text = |text: &str| format!("{ISSUER}trust: {{ sources: [ {{ file: /roots.pem }} ] }}\n{text}\n");
    let mut file = MountedFile::new(mount.path(), "agent.yaml", &text(""));
    let World { reload, mut plan, .. } = World::new("", &file.path());
    let (metrics, last) = (reload.metrics.clone(), reload.last.clone());
    let running = tokio::spawn(reload.run());
    file.publish(&text("retention: 1m"));
    timeout(PATIENCE, plan.wait_for(|plan| plan.retention().as_secs() == 60)).await.unwrap().unwrap();
    file.publish(&text("retention: 1"));
    file.publish(&text("retention: 2m"));
    timeout(PATIENCE, plan.wait_for(|plan| plan.retention().as_secs() == 120)).await.unwrap().unwrap();
    assert_eq!(metrics.counts(Outcome::ok).1, 1);
    last.cancel();
    timeout(PATIENCE, running).await.unwrap().unwrap();
}
