//! Attestation by mount: a caller that reaches a pod's own socket is that pod, because the socket is mounted into no other pod. No evidence
//! about the peer is read.
//!
//! The data that the kubelet passes at publish is only a claim, because it can be forged. A caller is served only if the pod index knows
//! the UID and agrees with the claim. After a restart there is no claim, and the entry in the index is sufficient: the UID was part of the
//! kubelet's own path. The caller of this module cancels `terminated` when the volume is unpublished.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use agent_kube::pod::Pod;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use sds_server::attest::{
    Attested, Attestor, Error, Method, Reason,
    origin::{Origin, Origins},
};
use tokio_util::sync::CancellationToken;
use unix_peer::peer::Peer;
use workload_identity::{PodRef, Workload};

use crate::pods::{Known, Pods};

/// The pod that a volume was published for, according to the kubelet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Namespace, name and UID.
    pub pod: PodRef,
    /// Service account of the pod.
    pub service_account: Arc<str>,
    /// Profile that the volume picks, if any.
    pub picked: Option<Arc<str>>,
}

impl Claim {
    /// Compares the claim with the index's entry for the pod and its `volume`.
    ///
    /// # Errors
    ///
    /// [`Reason::other_pod`], not temporary, if namespace, name, picked profile or service account differ.
    pub fn check(&self, known: &Pod, volume: &str) -> Result<(), Error> {
        let says = |what: &str, index: &str, kubelet: &str| {
            let detail = format!("pod UID {}: its {what} is {index}, but its volume was published for {kubelet}", self.pod.uid);
            Err(Error::refused(Reason::other_pod, detail))
        };
        if known.pod.namespace != self.pod.namespace {
            return says("namespace", &known.pod.namespace, &self.pod.namespace);
        }
        if known.pod.name != self.pod.name {
            return says("name", &known.pod.name, &self.pod.name);
        }
        if known.picks.get(volume) != self.picked.as_ref() {
            return says("picked profile", "the one in its spec", "another");
        }
        match &known.service_account {
            Some(account) if *account != self.service_account => says("service account", account, &self.service_account),
            _ => Ok(()),
        }
    }
}

/// Attests all callers on one pod's socket as that pod.
#[derive(Debug)]
pub struct MountAttestor {
    pods: Pods,
    uid: Arc<str>,
    volume: Arc<str>,
    claim: Mutex<Option<Claim>>,
    terminated: CancellationToken,
    follows_pod: AtomicBool,
    first_call: CancellationToken,
}

impl MountAttestor {
    /// Creates the attestor of the socket in `volume` of the pod with this UID. `claim` is `None` for a volume that was published before a
    /// restart. `terminated` is cancelled with the socket.
    pub fn new(pods: Pods, uid: Arc<str>, volume: Arc<str>, claim: Option<Claim>, terminated: CancellationToken) -> Self {
        Self {
            pods,
            uid,
            volume,
            claim: Mutex::new(claim),
            terminated,
            follows_pod: AtomicBool::new(false),
            first_call: CancellationToken::new(),
        }
    }

    /// The kubelet's claim at publish; `None` after a restart.
    pub fn claim(&self) -> Option<Claim> {
        self.claim.lock().clone()
    }

    /// Replaces the claim, when the volume is published again.
    pub fn set_claim(&self, claim: Claim) {
        *self.claim.lock() = Some(claim);
    }

    /// Cancelled with the socket, and when its pod has ended.
    pub fn terminated(&self) -> &CancellationToken {
        &self.terminated
    }

    /// Cancelled when the first caller has been attested.
    pub fn first_call(&self) -> &CancellationToken {
        &self.first_call
    }

    /// Returns the workload of every caller on this socket, with the current facts about its pod. Waits for the pod like
    /// [`Pods::wait_for`].
    ///
    /// # Errors
    ///
    /// The errors of [`Pods::wait_for`]. Not temporary: [`Reason::pod_ended`] if the pod has ended or the volume was unpublished,
    /// [`Reason::other_pod`] if the index contradicts the claim, [`Reason::no_service_account`] if the pod has no service account.
    ///
    /// # Cancel safety
    ///
    /// A dropped future only stops waiting.
    pub async fn workload(&self) -> Result<Workload, Error> {
        Ok(self.known().await?.pod.workload_at(&self.volume))
    }

    /// Returns the pod of this socket, if its processes may be served.
    async fn known(&self) -> Result<Known, Error> {
        let unpublished = || Error::refused(Reason::pod_ended, format!("pod UID {}: it has ended, or its volume is unpublished", self.uid));
        let known = tokio::select! {
            biased;
            () = self.terminated.cancelled() => return Err(unpublished()),
            known = self.pods.wait_for(&self.uid) => known?,
        };
        self.follow(&known);
        let pod = &known.pod;
        if let Some(claim) = self.claim() {
            claim.check(pod, &self.volume)?;
        }
        if pod.service_account.is_none() {
            return Err(Error::refused(Reason::no_service_account, format!("pod {} has no service account", pod.pod)).by(&pod.pod));
        }
        Ok(known)
    }

    /// Cancels `terminated` when the pod ends. One task is sufficient, because a UID is never used again.
    fn follow(&self, known: &Known) {
        if !self.follows_pod.swap(true, Ordering::Relaxed) {
            let (pod, terminated) = (known.terminated.clone(), self.terminated.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = pod.cancelled() => terminated.cancel(),
                    () = terminated.cancelled() => {}
                }
            });
        }
    }
}

impl Attestor for MountAttestor {
    fn method(&self) -> Method {
        Method::mount
    }

    /// The origin is the pod, regardless of the caller's user: every proxy of a mesh runs as the same user.
    fn origins(&self) -> Origins {
        Origins::Fixed(Origin::Pod(self.uid.clone()))
    }

    fn attest<'a>(&'a self, _peer: &'a Peer) -> BoxFuture<'a, Result<Attested, Error>> {
        Box::pin(async {
            let known = self.known().await?;
            self.first_call.cancel();
            let workload = known.pod.workload_at(&self.volume);
            Ok(Attested { workload, facts: Some(known.facts.subscribe()), terminated: self.terminated.child_token() })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, time::Duration};

    use agent_kube::{fake::FakeApi, pod::picks::PROFILE};
    use serde_json::json;
    use tokio::time::timeout;

    use super::*;

    const UID: &str = "2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4e";
    const SOON: Duration = Duration::from_secs(60);

    struct World {
        api: FakeApi,
        pods: Pods,
        peer: Peer,
        shutdown: CancellationToken,
    }

    impl World {
        fn new() -> Self {
            let (api, metrics) = (FakeApi::new(), agent_kube::Metrics::default());
            let pods = Pods::new(api.client(&metrics), "n1", metrics).with_picks_by("csi.sds-agent.io");
            let shutdown = CancellationToken::new();
            tokio::spawn({
                let (pods, shutdown) = (pods.clone(), shutdown.clone());
                async move { pods.run(shutdown).await }
            });
            Self { api, pods, peer: Peer::of(&UnixStream::pair().unwrap().0).unwrap(), shutdown }
        }

        fn put(&self, account: Option<&str>) {
            let metadata = json!({"metadata": {"name": "cart-1", "namespace": "shop", "uid": UID}});
            let mut pod = metadata;
            pod["spec"] = json!({"nodeName": "n1", "serviceAccountName": account});
            self.api.put("pods", pod);
        }

        fn attestor(&self, claim: Option<Claim>) -> Arc<MountAttestor> {
            Arc::new(MountAttestor::new(self.pods.clone(), UID.into(), "sds".into(), claim, CancellationToken::new()))
        }

        async fn attest(&self, attestor: &MountAttestor) -> Result<Attested, Error> {
            timeout(SOON, attestor.attest(&self.peer)).await.expect("no verdict")
        }
    }

    impl Drop for World {
        fn drop(&mut self) {
            self.shutdown.cancel();
        }
    }

    fn claim(namespace: &str, name: &str, account: &str) -> Claim {
        let pod = PodRef { namespace: namespace.into(), name: name.into(), uid: UID.into() };
        Claim { pod, service_account: account.into(), picked: None }
    }

    #[tokio::test]
    async fn a_profile_is_picked_by_the_pods_own_volume_and_by_nothing_else() {
        let world = World::new();
        let volume = |name: &str, profile: &str| json!({"name": name, "csi": {"driver": "csi.sds-agent.io", "volumeAttributes": {PROFILE: profile}}});
        let mut pod = json!({"metadata": {"name": "cart-1", "namespace": "shop", "uid": UID}});
        pod["spec"] = json!({"nodeName": "n1", "serviceAccountName": "cart", "volumes": [volume("sds", "gold"), volume("other", "lead")]});
        world.api.put("pods", pod);
        let picked = |workload: Workload| match workload {
            Workload::Pod { picked, .. } => picked,
            Workload::Unix { .. } => None,
        };
        // After a restart there is no claim, and the picked profile is the same.
        for claimed in [None, Some(Claim { picked: Some("gold".into()), ..claim("shop", "cart-1", "cart") })] {
            let role = format!("claimed-{}", claimed.is_some());
            let attested = world.attest(&world.attestor(claimed)).await.unwrap();
            assert_eq!(picked(attested.workload.clone()).as_deref(), Some("gold"));
            // The pick stays when other facts of the pod change.
            let mut facts = attested.facts.clone().unwrap();
            world.api.change("pods", "shop", "cart-1", |pod| pod["metadata"]["labels"] = json!({"role": role}));
            timeout(SOON, facts.changed()).await.unwrap().unwrap();
            assert_ne!(attested.current(), attested.workload);
            assert_eq!(picked(attested.current()).as_deref(), Some("gold"));
        }
        for forged in [None, Some("lead".into())] {
            let attestor = world.attestor(Some(Claim { picked: forged, ..claim("shop", "cart-1", "cart") }));
            let error = world.attest(&attestor).await.unwrap_err();
            assert!(
                error.reason == Reason::other_pod
                    && error.detail.contains("its picked profile is the one in its spec, but its volume was published for another"),
                "{error}"
            );
        }
    }

    #[tokio::test]
    async fn the_socket_is_its_pods_once_the_index_says_so_and_until_the_pod_goes() {
        let world = World::new();
        world.put(Some("cart"));
        let attestor = world.attestor(Some(claim("shop", "cart-1", "cart")));
        let attested = world.attest(&attestor).await.unwrap();
        let Workload::Pod { pod, service_account, .. } = &attested.workload else { panic!("{:?}", attested.workload) };
        assert_eq!((pod.to_string().as_str(), service_account.as_deref()), ("shop/cart-1", Some("cart")));
        assert!(attestor.first_call().is_cancelled());
        assert!(matches!(attestor.origins(), Origins::Fixed(Origin::Pod(uid)) if &*uid == UID), "quotas are per pod, not per user");
        world.api.remove("pods", "shop", "cart-1");
        timeout(SOON, attested.terminated.cancelled()).await.unwrap();
        assert_eq!(world.attest(&attestor).await.unwrap_err().reason, Reason::pod_ended);
    }

    #[tokio::test]
    async fn nobody_is_served_on_the_kubelets_word_alone() {
        let world = World::new();
        world.put(Some("cart"));
        for forged in [claim("other", "cart-1", "cart"), claim("shop", "cart-2", "cart"), claim("shop", "cart-1", "admin")] {
            let attestor = world.attestor(Some(forged));
            let error = world.attest(&attestor).await.unwrap_err();
            assert_eq!((error.reason, error.temporary), (Reason::other_pod, false), "{error}");
            assert!(!attestor.first_call().is_cancelled());
        }
        // After a restart only the index is checked; a claim that arrives later is checked too.
        let attestor = world.attestor(None);
        assert!(world.attest(&attestor).await.is_ok());
        attestor.set_claim(claim("shop", "cart-1", "admin"));
        assert_eq!(world.attest(&attestor).await.unwrap_err().reason, Reason::other_pod);
    }

    #[tokio::test]
    async fn a_pod_that_is_not_on_this_node_or_has_no_account_is_not_served() {
        let world = World::new();
        let error = world.attest(&world.attestor(None)).await.unwrap_err();
        assert_eq!((error.reason, error.temporary), (Reason::unknown_pod, true));
        world.put(None);
        let error = world.attest(&world.attestor(None)).await.unwrap_err();
        assert_eq!(error.reason, Reason::no_service_account);
    }

    #[tokio::test]
    async fn unpublishing_ends_those_who_are_served_and_those_who_wait() {
        let world = World::new();
        world.put(Some("cart"));
        let attestor = world.attestor(None);
        let attested = world.attest(&attestor).await.unwrap();
        attestor.terminated().cancel();
        assert!(attested.terminated.is_cancelled());

        let metrics = agent_kube::Metrics::default();
        // An index that does not run is never complete.
        let idle = Pods::new(world.api.client(&metrics), "n1", metrics);
        let attestor = Arc::new(MountAttestor::new(idle, UID.into(), "sds".into(), None, CancellationToken::new()));
        let waiting = tokio::spawn({
            let attestor = attestor.clone();
            async move { attestor.workload().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        attestor.terminated().cancel();
        assert_eq!(timeout(SOON, waiting).await.unwrap().unwrap().unwrap_err().reason, Reason::pod_ended);
    }
}
