//! Reads a trust bundle from ClusterTrustBundles, with a watch on the selected objects.
//!
//! The caller runs [`ClusterTrustBundleSource::run`]. The bundle is the union of the selected objects, in the order of their names. If no
//! object is selected, or if the API server does not serve ClusterTrustBundles, this is counted and logged once, and the last valid bundle
//! stays.

use std::{collections::BTreeMap, fmt, ops::ControlFlow, time::Duration};

use agent_kube::{
    Cause, Failure,
    cluster_trust_bundle::{ClusterTrustBundle, GROUP, PLURAL, UNSERVED, UNSERVED_REMEDY, served_version},
    labels::Resource,
    watch::{Selection, Signal},
};
use futures::StreamExt;
use kube::{Api, Client, runtime::watcher};
use sds_server::trust::Source;
use tokio_util::sync::CancellationToken;

use super::changed_content::{ChangedContent, Missing};
use crate::config::BundleSelection;

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::app::cluster_trust_bundle_source";

/// Pause before the API server is asked again which versions it serves, 500 ms. Each further attempt doubles it. Up to half of a pause is
/// removed at random.
const MIN_PAUSE: Duration = Duration::from_millis(500);
/// Maximum pause while the API server cannot be asked, 10 s.
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// Maximum pause while the API server does not serve the kind, 2 min: an operator has to start it with other flags.
const MAX_PAUSE_UNSERVED: Duration = Duration::from_secs(120);

/// Watches ClusterTrustBundles and offers their content to a source of the trust.
pub struct ClusterTrustBundleSource {
    client: Client,
    selection: BundleSelection,
    content: ChangedContent,
    metrics: agent_kube::Metrics,
    pause: Duration,
    /// The last logged failure to ask for the versions.
    announced: Option<Failure>,
}

impl fmt::Debug for ClusterTrustBundleSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterTrustBundleSource").field("content", &self.content).finish_non_exhaustive()
    }
}

impl ClusterTrustBundleSource {
    /// The name for [`Trust::source`](sds_server::trust::Trust::source).
    pub fn source_name(selection: &BundleSelection) -> String {
        format!("clusterTrustBundle {selection}")
    }

    /// The objects of `selection`, offered to `source`.
    pub fn new(client: Client, selection: BundleSelection, source: Source, metrics: agent_kube::Metrics) -> Self {
        Self { client, selection, content: ChangedContent::new(source), metrics, pause: MIN_PAUSE, announced: None }
    }

    /// Watches until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        shutdown.run_until_cancelled(self.follow()).await;
    }

    async fn follow(&mut self) {
        loop {
            let longest = match served_version(&self.client).await {
                Ok(Some(version)) => {
                    self.announced = None;
                    self.watch(Api::all_with(self.client.clone(), &version)).await;
                    MAX_PAUSE
                }
                Ok(None) => {
                    self.announced = None;
                    self.content.missing(Missing::Kind, format_args!("{UNSERVED}: {UNSERVED_REMEDY}"));
                    MAX_PAUSE_UNSERVED
                }
                Err(failure) => {
                    self.announce(failure);
                    MAX_PAUSE
                }
            };
            let pause = self.pause.min(longest);
            self.pause = (pause * 2).min(longest);
            tokio::time::sleep(pause.mul_f64(0.5 + 0.5 * fastrand::f64())).await;
        }
    }

    fn announce(&mut self, failure: Failure) {
        if self.announced.as_ref() != Some(&failure) {
            let resource = format!("{PLURAL}.{GROUP}");
            tracing::warn!(target: LOG_TARGET, resource, error = %failure, "cannot ask the API server which version it serves; trying again");
            self.announced = Some(failure);
        }
    }

    /// Follows the objects, until the API server no longer knows their kind.
    async fn watch(&mut self, api: Api<ClusterTrustBundle>) {
        let selection = Selection {
            resource: Resource::clustertrustbundles,
            name: format!("{PLURAL}.{GROUP}"),
            namespace: None,
            config: self.selection.watch_config(),
        };
        let mut signals = Box::pin(agent_kube::watch::watch(api, selection, self.metrics.clone()));
        let mut bundles = Bundles::default();
        while let Some(signal) = signals.next().await {
            match signal {
                Signal::Trouble(_, failure) if failure.cause == Cause::NoSuchKind => return,
                Signal::Trouble(..) => {}
                Signal::Event(event) => {
                    if bundles.apply(event).is_break() {
                        self.pause = MIN_PAUSE;
                        self.publish(&bundles);
                    }
                }
            }
        }
    }

    fn publish(&mut self, bundles: &Bundles) {
        match bundles.union() {
            Some(pem) => self.content.offer(pem.as_bytes()),
            None => self.content.missing(Missing::Object, self.selection.absence()),
        }
    }
}

/// The selected objects, as the events of a watch show them.
#[derive(Debug, Default)]
struct Bundles {
    /// The PEM by the name of its object.
    current: BTreeMap<String, String>,
    /// The objects of a list that is not complete yet.
    listed: BTreeMap<String, String>,
}

impl Bundles {
    /// Applies an event. Breaks if the objects may have changed, and are complete.
    fn apply(&mut self, event: watcher::Event<ClusterTrustBundle>) -> ControlFlow<()> {
        let entry = |object: ClusterTrustBundle| (object.metadata.name.unwrap_or_default(), object.spec.trust_bundle);
        match event {
            watcher::Event::Init => self.listed.clear(),
            watcher::Event::InitApply(object) => self.listed.extend([entry(object)]),
            watcher::Event::InitDone => {
                self.current = std::mem::take(&mut self.listed);
                return ControlFlow::Break(());
            }
            watcher::Event::Apply(object) => {
                self.current.extend([entry(object)]);
                return ControlFlow::Break(());
            }
            watcher::Event::Delete(object) => {
                self.current.remove(&entry(object).0);
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }

    /// The PEM of all objects. `None` without an object.
    fn union(&self) -> Option<String> {
        let blocks = self.current.values().map(|pem| pem.trim_end().to_owned() + "\n");
        (!self.current.is_empty()).then(|| blocks.collect())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use agent_kube::fake::{self, FakeApi};
    use sds_server::trust::{BundleSet, Metrics, Trust};
    use serde_json::{Value, json};
    use tokio::{sync::watch::Receiver, time::timeout};

    use super::*;

    const SIGNER: &str = "example.com/mesh";

    fn root(name: &str) -> String {
        let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
        parameters.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
    }

    fn object(name: &str, labels: &Value, pem: &str) -> Value {
        let signer = name.contains(':').then_some(SIGNER);
        json!({"metadata": {"name": name, "labels": labels}, "spec": {"signerName": signer, "trustBundle": pem}})
    }

    struct World {
        api: FakeApi,
        trust: Trust,
        bundles: Receiver<Arc<BundleSet>>,
        refused: prometheus_client::registry::Registry,
    }

    impl World {
        fn start(api: FakeApi, selection: BundleSelection) -> Self {
            let mut refused = prometheus_client::registry::Registry::default();
            let trust = Trust::new(Metrics::register(&mut refused));
            let metrics = agent_kube::Metrics::default();
            let source = trust.source(None, &ClusterTrustBundleSource::source_name(&selection));
            let source = ClusterTrustBundleSource::new(api.client(&metrics), selection, source, metrics);
            tokio::spawn(source.run(CancellationToken::new()));
            let bundles = trust.subscribe();
            Self { api, trust, bundles, refused }
        }

        /// The next bundle has these roots, in this order.
        async fn expect(&mut self, roots: &[&String]) {
            timeout(Duration::from_secs(3600), self.bundles.changed()).await.expect("no new bundle").unwrap();
            self.has(roots);
        }

        fn has(&self, roots: &[&String]) {
            let set = self.trust.subscribe().borrow().clone();
            let pem = String::from_utf8(set.own.as_ref().unwrap().roots.to_pem()).unwrap();
            let plain = |pem: &str| pem.split_whitespace().collect::<String>();
            assert_eq!(plain(&pem), plain(&roots.iter().map(|root| root.as_str()).collect::<String>()));
        }

        fn count_of_refusals(&self) -> u64 {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &self.refused).unwrap();
            let line = text.lines().find(|line| line.starts_with("bundles_refused_total{")).unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        }

        async fn refused(&self, count: u64) {
            let waiting = async {
                while self.count_of_refusals() < count {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            timeout(Duration::from_secs(600), waiting).await.unwrap_or_else(|_| panic!("refused {} times", self.count_of_refusals()));
            assert_eq!(self.count_of_refusals(), count);
        }
    }

    fn serving() -> FakeApi {
        let api = FakeApi::new();
        api.serve("certificates.k8s.io/v1beta1", &[PLURAL]);
        api
    }

    fn of_signer(labels: &[(&'static str, &'static str)]) -> BundleSelection {
        BundleSelection::Signer { signer_name: SIGNER.to_owned(), labels: labels.iter().copied().collect() }
    }

    #[tokio::test(start_paused = true)]
    async fn the_union_of_a_signer_follows_its_objects_and_is_never_empty() {
        let [first, second, third] = [root("first"), root("second"), root("third")];
        let mut world = World::start(serving(), of_signer(&[]));
        world.refused(1).await;
        let put = |world: &World, name: &str, pem: &str| drop(world.api.put(PLURAL, object(name, &json!({}), pem)));
        put(&world, "unsigned", &third);
        put(&world, "example.com:mesh:b", &second);
        world.expect(&[&second]).await;
        put(&world, "example.com:mesh:a", &first);
        world.expect(&[&first, &second]).await;
        put(&world, "example.com:mesh:b", third.trim_end());
        world.expect(&[&first, &third]).await;
        // After a broken watch, objects that were deleted meanwhile are removed by the list.
        world.api.fail("watch", PLURAL, fake::Fault::Refuse, 2);
        world.api.cut_watches(true);
        world.api.remove(PLURAL, "", "example.com:mesh:a");
        world.api.forget_history();
        world.expect(&[&third]).await;
        put(&world, "example.com:mesh:b", "garbage");
        world.refused(2).await;
        world.api.remove(PLURAL, "", "example.com:mesh:b");
        world.refused(3).await;
        world.has(&[&third]);
        let query = world.api.queries("list", PLURAL).remove(0);
        assert_eq!(query["fieldSelector"], "spec.signerName=example.com/mesh");
        assert!(!query.contains_key("labelSelector"), "{query:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn labels_and_names_select() {
        let [live, canary] = [root("live"), root("canary")];
        let api = serving();
        api.put(PLURAL, object("example.com:mesh:live", &json!({"tier": "live"}), &live));
        api.put(PLURAL, object("example.com:mesh:canary", &json!({"tier": "canary"}), &canary));
        for (selection, root) in
            [(of_signer(&[("tier", "canary")]), &canary), (BundleSelection::Name("example.com:mesh:live".to_owned()), &live)]
        {
            World::start(api.clone(), selection).expect(&[root]).await;
        }
    }

    /// The words are logged once, the questions become rare, and the source works when the kind is served.
    #[tokio::test(start_paused = true)]
    async fn a_server_without_the_kind_is_asked_until_it_has_it() {
        let (first, second) = (root("first"), root("second"));
        let api = FakeApi::new();
        api.put(PLURAL, object("roots", &json!({}), &first));
        let mut world = World::start(api, BundleSelection::Name("roots".to_owned()));
        world.refused(1).await;
        tokio::time::sleep(Duration::from_secs(3600)).await;
        let asked = world.api.count("get", "discovery") / 3;
        assert!((30..80).contains(&asked), "asked {asked} times within an hour");
        world.refused(1).await;
        world.api.serve("certificates.k8s.io/v1alpha1", &[PLURAL]);
        world.expect(&[&first]).await;

        // The kind goes away, and comes back in another version.
        let page = fake::Fault::Text(404, "404 page not found");
        world.api.fail("watch", PLURAL, page.clone(), 1);
        world.api.fail("list", PLURAL, page, 1);
        world.api.remove("discovery", "", "certificates.k8s.io/v1alpha1");
        world.api.cut_watches(true);
        world.refused(2).await;
        world.has(&[&first]);
        world.api.serve("certificates.k8s.io/v1", &[PLURAL]);
        world.api.put(PLURAL, object("roots", &json!({}), &second));
        world.expect(&[&second]).await;
    }

    #[test]
    fn a_list_replaces_the_objects_when_it_is_complete() {
        let object = |name: &str, pem: &str| -> ClusterTrustBundle {
            serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"trustBundle": pem}})).unwrap()
        };
        let mut bundles = Bundles::default();
        assert!(bundles.apply(watcher::Event::Apply(object("b", "b\n\n"))).is_break());
        assert!(bundles.apply(watcher::Event::Init).is_continue());
        assert!(bundles.apply(watcher::Event::InitApply(object("c", "c"))).is_continue());
        assert!(bundles.apply(watcher::Event::InitApply(object("a", "a"))).is_continue());
        assert_eq!(bundles.union().as_deref(), Some("b\n"));
        assert!(bundles.apply(watcher::Event::InitDone).is_break());
        assert_eq!(bundles.union().as_deref(), Some("a\nc\n"));
        for name in ["a", "c"] {
            assert!(bundles.apply(watcher::Event::Delete(object(name, ""))).is_break());
        }
        assert_eq!(bundles.union(), None);
    }
}
